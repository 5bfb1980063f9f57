"""The metrics of a proxy and of its supervisor: one row each. See `metrics.metric` for the columns.

A new metric is one row here and one in docs/metrics.md; a test compares the two. A label value never comes from a client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from keyproxy.ai.categories import parse_category_source
from keyproxy.ai.model_source import DIALECT, NONE
from keyproxy.ai.models import OTHER
from keyproxy.config.schema import RouteRow
from keyproxy.config.tools.tool_settings import ToolRow
from keyproxy.metrics.access_log import AccessLog
from keyproxy.metrics.exposition import BUILD_INFO
from keyproxy.metrics.metric import Combine, Metric, MetricKind
from keyproxy.metrics.model_counts import ModelCount
from keyproxy.metrics.recorder import Cell, Histogram, Recorder
from keyproxy.metrics.tool_counts import approvals
from keyproxy.model import NO_TOKENS
from keyproxy.process.providers.proxy_providers import ProxyProviders
from keyproxy.process.signing.proxy_signing import ProxySigning
from keyproxy.reasons import Reason
from keyproxy.store.store import Store
from keyproxy.wire.server import ProxyServer
from keyproxy.wire.upstream.pool import Upstreams

COUNTER, GAUGE, HISTOGRAM = MetricKind.COUNTER, MetricKind.GAUGE, MetricKind.HISTOGRAM
SUM, MAX, MIN = Combine.SUM, Combine.MAX, Combine.MIN

#: Bounds of the histogram of the ledger's round trips.
ROUND_TRIP_BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

#: Bounds of the histogram of the time that decisions on approvals take.
APPROVAL_WAIT_BOUNDS: Final = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0, 86400.0)

#: Statuses by their first digit.
STATUS_CLASSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx")

_BLAMES: Final[Mapping[str, str]] = {reason.code: reason.value.blame.value for reason in Reason}
_MODES: Final = ("live", "test")


class Scrape(NamedTuple):
    """The parts of a proxy that its metrics are read from, as they are at one scrape."""

    recorder: Recorder
    #: The recorder's counts by labels.
    cells: Sequence[Cell]
    access_log: AccessLog
    server: ProxyServer
    upstreams: Upstreams
    store: Store
    routes: Sequence[RouteRow]
    #: The names of the configured models.
    models: Sequence[str]
    #: The names of the configured categories of prompts.
    categories: Sequence[str]
    #: The configured tools.
    tools: Sequence[ToolRow]
    #: The time from a message to the ledger to its response.
    ledger_round_trips: Histogram
    #: The time from the request for an approval to its decision.
    approval_waits: Histogram
    signing: ProxySigning
    providers: ProxyProviders


class Workers(NamedTuple):
    """What a supervisor reports about its workers."""

    by_state: Mapping[str, int]
    restarts: int


def _requests(scrape: Scrape) -> dict[tuple[str, ...], float]:
    counts: dict[tuple[str, ...], float] = {}
    for cell in scrape.cells:
        labels = (cell.route, str(cell.status), cell.mode, cell.code)
        counts[labels] = counts.get(labels, 0) + cell.count
    return counts


def _refusals(scrape: Scrape) -> dict[tuple[str, ...], float]:
    counts: dict[tuple[str, ...], float] = dict.fromkeys(_BLAMES.items(), 0)
    for cell in scrape.cells:
        if cell.code in _BLAMES:
            counts[cell.code, _BLAMES[cell.code]] += cell.count
    return counts


def _responses(scrape: Scrape) -> dict[str, float]:
    counts: dict[str, float] = dict.fromkeys(STATUS_CLASSES, 0)
    for cell in scrape.cells:
        if cell.status:
            counts[STATUS_CLASSES[cell.status // 100 - 1]] += cell.count
    return counts


def _tokens(scrape: Scrape, amount: Callable[[Cell], int]) -> dict[tuple[str, ...], float]:
    """Tokens by route and mode. Series of the metered routes start at 0."""
    routes = [row.name or row.match for row in scrape.routes if row.tokens != NO_TOKENS]
    sums: dict[tuple[str, ...], float] = {(route, mode): 0 for route in routes for mode in _MODES}
    for cell in scrape.cells:
        if cell.is_metered:
            labels = (cell.route, cell.mode)
            sums[labels] = sums.get(labels, 0) + amount(cell)
    return sums


def _tokens_held(scrape: Scrape) -> dict[tuple[str, ...], float]:
    return _tokens(scrape, lambda cell: cell.tokens_held)


def _tokens_settled(scrape: Scrape) -> dict[tuple[str, ...], float]:
    directions = {
        "in": _tokens(scrape, lambda cell: cell.tokens_in),
        "out": _tokens(scrape, lambda cell: cell.tokens_out),
    }
    return {(*labels, direction): count for direction, sums in directions.items() for labels, count in sums.items()}


def _tokens_estimated(scrape: Scrape) -> dict[tuple[str, ...], float]:
    return _tokens(scrape, lambda cell: cell.tokens_estimated)


def _by_model(scrape: Scrape) -> Mapping[str, ModelCount]:
    """The counts of every model. Series of the configured ones and of `other` start at 0."""
    names_models = any(row.tokens != NO_TOKENS or row.model not in (DIALECT, NONE) for row in scrape.routes)
    names = [*scrape.models, OTHER] if names_models else []
    return {**{name: ModelCount() for name in names}, **scrape.recorder.models.models}


def _model_requests(scrape: Scrape) -> dict[tuple[str, ...], float]:
    models = _by_model(scrape)
    return {(model, mode): count.requests.get(mode, 0) for model, count in models.items() for mode in _MODES}


def _model_tokens(scrape: Scrape) -> dict[tuple[str, ...], float]:
    models = _by_model(scrape)
    return {(model, kind): tokens for model, count in models.items() for kind, tokens in count.by_kind().items()}


def _spend(scrape: Scrape) -> dict[str, float]:
    return {model: count.spend_micros for model, count in _by_model(scrape).items()}


def _caps(scrape: Scrape) -> dict[str, float]:
    routes = [row.name or row.match for row in scrape.routes if row.tokens != NO_TOKENS]
    return {**dict.fromkeys(routes, 0.0), **scrape.recorder.models.caps}


def _categories(scrape: Scrape) -> dict[tuple[str, ...], float]:
    """Series of the configured categories, and of the sources that routes have, start at 0."""
    sources = {parse_category_source(text).counted for row in scrape.routes for text in row.category}
    names: list[tuple[str, ...]] = [(category, source) for category in scrape.categories for source in sorted(sources)]
    return {**dict.fromkeys(names, 0.0), **scrape.recorder.categories}


def _summed(parts: Iterable[tuple[tuple[str, ...], Histogram]]) -> dict[tuple[str, ...], Histogram]:
    """The sum of the histograms with the same label values."""
    sums: dict[tuple[str, ...], Histogram] = {}
    for labels, part in parts:
        whole = sums.setdefault(labels, Histogram(part.bounds))
        whole.counts = [one + other for one, other in zip(whole.counts, part.counts, strict=True)]
        whole.total += part.total
    return sums


def _request_seconds(scrape: Scrape) -> dict[tuple[str, ...], Histogram]:
    return _summed(((cell.route, cell.mode, cell.outcome), cell.request_seconds) for cell in scrape.cells)


def _upstream_seconds(scrape: Scrape) -> dict[tuple[str, ...], Histogram]:
    return _summed(((cell.route,), cell.upstream_seconds) for cell in scrape.cells)


def _task_defects(scrape: Scrape) -> dict[str, float]:
    tasks = (*scrape.store.lasting, scrape.signing.ring.lasting, scrape.providers.lasting)
    return {task.what: task.defects for task in tasks}


def _upstream_connections(scrape: Scrape) -> dict[str, float]:
    counts: dict[str, float] = {}
    for pool in scrape.upstreams.distinct().values():
        for state, count in pool.counts().items():
            counts[state] = counts.get(state, 0) + count
    return counts


PROXY_METRICS: Final[tuple[Metric[Scrape], ...]] = (
    # Requests that have ended.
    Metric("keyproxy_requests_total", COUNTER, "Requests that have ended.",
           ("route", "status", "mode", "code"), _requests, SUM),
    Metric("keyproxy_responses_total", COUNTER, "Requests that have ended, by status class.",
           ("class",), _responses, SUM),
    Metric("keyproxy_refusals_total", COUNTER, "Requests that keyproxy refused, by the party that has to act.",
           ("code", "blame"), _refusals, SUM),
    Metric("keyproxy_limit_refusals_total", COUNTER, "Requests refused because they exceed a limit; not charged.",
           ("policy", "reason"), lambda scrape: scrape.store.ledger.refusals, SUM),
    Metric("keyproxy_retiring_key_requests_total", COUNTER,
           "Requests with a rotated key, which expires at the end of its grace period.",
           (), lambda scrape: scrape.recorder.retiring_count, SUM),
    Metric("keyproxy_request_seconds", HISTOGRAM,
           "Time from a request's head to the end of its response, by outcome.",
           ("route", "mode", "outcome"), _request_seconds, SUM),
    Metric("keyproxy_upstream_seconds", HISTOGRAM,
           "Time from the first byte sent upstream to the first byte of the response.",
           ("route",), _upstream_seconds, SUM),
    Metric("keyproxy_overhead_seconds", HISTOGRAM,
           "Time in keyproxy before forwarding: from a request's head to its first byte upstream, without the time"
           " spent waiting for the client's body or for a connection to the upstream.",
           (), lambda scrape: scrape.recorder.overhead_seconds, SUM),
    Metric("keyproxy_connection_wait_seconds", HISTOGRAM,
           "Time that requests without an idle connection to the upstream waited for one.",
           (), lambda scrape: scrape.recorder.connection_wait_seconds, SUM),
    # Requests in flight, and connections.
    Metric("keyproxy_upstream_connections", GAUGE, "Connections to the upstream.",
           ("state",), _upstream_connections, SUM),
    Metric("keyproxy_open_requests", GAUGE, "Requests in flight.",
           (), lambda scrape: scrape.server.open_requests(), SUM),
    Metric("keyproxy_open_tunnels", GAUGE, "Requests in flight that are WebSocket tunnels.",
           (), lambda scrape: scrape.server.open_tunnels(), SUM),
    Metric("keyproxy_client_connections", GAUGE, "Open connections from clients.",
           (), lambda scrape: scrape.server.open_connections(), SUM),
    Metric("keyproxy_failed_connections_total", COUNTER,
           "Client connections that were not accepted, or were closed to make room.",
           ("why",), lambda scrape: scrape.server.failed_connections(), SUM),
    # Identities.
    Metric("keyproxy_identity_lookups_total", COUNTER, "Lookups of a key's identity.",
           ("result",), lambda scrape: scrape.store.identities.counts.by_name(), SUM),
    Metric("keyproxy_identities", GAUGE, "Entries in the identity cache.",
           ("table",), lambda scrape: scrape.store.identities.sizes(), SUM),
    Metric("keyproxy_acting_requests_total", COUNTER, "Requests that have ended in which a key acted for a user.",
           ("mode",), lambda scrape: scrape.recorder.delegation.requests, SUM),
    Metric("keyproxy_acting_entries", GAUGE, "Pairs of key and user in the identity cache.",
           (), lambda scrape: scrape.store.identities.sizes()["acting"], SUM),
    Metric("keyproxy_delegation_refusals_total", COUNTER,
           "Requests refused because a credential may not act for a user, or may not mint an agent token.",
           ("kind",), lambda scrape: scrape.recorder.delegation.refusals, SUM),
    Metric("keyproxy_agent_tokens_minted_total", COUNTER, "Agent tokens minted, by origin.",
           ("via",), lambda scrape: scrape.recorder.delegation.minted, SUM),
    Metric("keyproxy_owned_id_lookups_total", COUNTER, "Lookups of ids that a tenant may own.",
           ("result",), lambda scrape: scrape.store.owned_ids.counts.by_name(), SUM),
    Metric("keyproxy_owned_ids", GAUGE, "Entries in the cache of owned ids.",
           ("table",), lambda scrape: scrape.store.owned_ids.sizes(), SUM),
    Metric("keyproxy_store_up", GAUGE, "Whether the last request to the store succeeded.",
           (), lambda scrape: scrape.store.database.is_up, MIN),
    Metric("keyproxy_change_feed_lag_seconds", GAUGE, "Time since the change feed was last known to be current.",
           (), lambda scrape: scrape.store.feed.lag_seconds(), MAX),
    # Signing.
    Metric("keyproxy_agent_tokens_rejected_offline_total", COUNTER,
           "Agent tokens that failed the check that needs no query.",
           (), lambda scrape: scrape.store.signing_keys.rejected, SUM),
    Metric("keyproxy_assertions_signed_total", COUNTER, "Identity assertions that were signed.",
           (), lambda scrape: scrape.signing.assertions.total, SUM),
    Metric("keyproxy_signing_keys", GAUGE, "Signing keys in the store that have not ended, of all proxies.",
           (), lambda scrape: len(scrape.store.signing_keys.live()), MAX),
    Metric("keyproxy_signing_key_age_seconds", GAUGE, "Age of the key that signs; 0 if none is published.",
           (), lambda scrape: scrape.signing.ring.age_seconds(), MAX),
    # Credentials of upstreams.
    Metric("keyproxy_provider_credential_failures_total", COUNTER,
           "Responses with status 401 to requests with a credential of the provider.",
           ("provider",), lambda scrape: scrape.providers.failures(), SUM),
    Metric("keyproxy_provider_credential_age_seconds", GAUGE, "Age of the provider's oldest secret in use.",
           ("provider",), lambda scrape: scrape.providers.ages(), MAX),
    # Tokens.
    Metric("keyproxy_tokens_held_total", COUNTER, "Tokens reserved for requests that have ended.",
           ("route", "mode"), _tokens_held, SUM),
    Metric("keyproxy_tokens_settled_total", COUNTER, "Tokens charged.",
           ("route", "mode", "direction"), _tokens_settled, SUM),
    Metric("keyproxy_tokens_estimated_total", COUNTER,
           "Tokens charged by estimate, because the response reported no usage.",
           ("route", "mode"), _tokens_estimated, SUM),
    Metric("keyproxy_model_requests_total", COUNTER, "Metered or judged requests that were forwarded, by model.",
           ("model", "mode"), _model_requests, SUM),
    Metric("keyproxy_model_tokens_total", COUNTER, "Tokens charged, by configured model.",
           ("model", "kind"), _model_tokens, SUM),
    Metric("keyproxy_spend_micros_total", COUNTER, "Money charged, in micro-units, by configured model.",
           ("model",), _spend, SUM),
    Metric("keyproxy_caps_inserted_total", COUNTER, "Requests forwarded with an inserted output maximum.",
           ("route",), _caps, SUM),
    Metric("keyproxy_prompt_categories_total", COUNTER, "Requests that were forwarded, by category of their prompt.",
           ("category", "source"), _categories, SUM),
    Metric("keyproxy_usage_reads_after_abort_total", COUNTER,
           "Streams read to their usage after the client had left, by outcome.",
           ("outcome",), lambda scrape: scrape.server.usage_reads.outcomes, SUM),
    # Tools.
    Metric("keyproxy_tool_calls_total", COUNTER, "Calls of tools that have ended, by outcome.",
           ("tool", "outcome"), lambda scrape: scrape.recorder.tools.of(scrape.tools), SUM),
    Metric("keyproxy_approvals_total", COUNTER,
           "Approvals that were requested or used, and calls that were refused without one.",
           ("kind", "state"), lambda scrape: approvals(scrape.store.approvals.outcomes, scrape.tools), SUM),
    Metric("keyproxy_approval_wait_seconds", HISTOGRAM,
           "Time from the request for an approval to its decision, of those that were used.",
           (), lambda scrape: scrape.approval_waits, SUM),
    # The ledger.
    Metric("keyproxy_ledger_admissions_total", COUNTER, "Requests admitted under limits.",
           (), lambda scrape: scrape.store.ledger.counts.taken, SUM),
    Metric("keyproxy_ledger_waits_total", COUNTER, "Times that a request waited for the ledger.",
           (), lambda scrape: scrape.store.ledger.counts.waited, SUM),
    Metric("keyproxy_ledger_round_trip_seconds", HISTOGRAM, "Time from a message to the ledger to its response.",
           (), lambda scrape: scrape.ledger_round_trips, SUM),
    Metric("keyproxy_ledger_failures_total", COUNTER, "Messages to the ledger that failed or timed out.",
           (), lambda scrape: scrape.store.ledger.conversation.counts["failures"], SUM),
    Metric("keyproxy_ledger_leases", GAUGE, "Leases held by this process.",
           (), lambda scrape: scrape.store.ledger.conversation.lease_sync.outstanding, SUM),
    Metric("keyproxy_ledger_unsettled_seconds", GAUGE, "Age of the oldest charge that the ledger has not confirmed.",
           (), lambda scrape: scrape.store.ledger.conversation.unsettled_seconds(), MAX),
    Metric("keyproxy_repeats_not_charged_total", COUNTER,
           "Requests with an Idempotency-Key that had been charged before.",
           (), lambda scrape: scrape.store.claims.counts["repeats"], SUM),
    Metric("keyproxy_ledger_reap_failures_total", COUNTER, "Failed attempts to end dead holders of leases.",
           (), lambda scrape: scrape.store.ledger.conversation.reaping.failures, SUM),
    Metric("keyproxy_ledger_reap_age_seconds", GAUGE, "Time since all dead holders of leases were last ended.",
           (), lambda scrape: scrape.store.ledger.conversation.reap_age.seconds(), MAX),
    Metric("keyproxy_claims_unasked_total", COUNTER,
           "Requests with an Idempotency-Key charged in full, because the lookup failed.",
           (), lambda scrape: scrape.store.claims.counts["unasked"], SUM),
    Metric("keyproxy_claims_pending", GAUGE, "Requests with an Idempotency-Key that are not charged yet.",
           (), lambda scrape: scrape.store.claims.pending, SUM),
    # Usage.
    Metric("keyproxy_usage_batches_total", COUNTER, "Batches of usage written.",
           (), lambda scrape: scrape.store.usage.counts["batches"], SUM),
    Metric("keyproxy_usage_events_total", COUNTER, "Request events written.",
           (), lambda scrape: scrape.store.usage.counts["events"], SUM),
    Metric("keyproxy_usage_failures_total", COUNTER, "Failed attempts to write usage.",
           (), lambda scrape: scrape.store.usage.counts["failures"], SUM),
    Metric("keyproxy_usage_dropped_total", COUNTER, "Usage that was dropped because the backlog was full.",
           ("what",), lambda scrape: scrape.store.usage.dropped, SUM),
    Metric("keyproxy_usage_events_pending", GAUGE, "Request events that are not written yet.",
           (), lambda scrape: scrape.store.usage.pending_events, SUM),
    Metric("keyproxy_usage_unwritten_seconds", GAUGE, "Age of the oldest usage that is not written yet.",
           (), lambda scrape: scrape.store.usage.unwritten_seconds(), MAX),
    # Anomalies.
    Metric("keyproxy_anomalies_total", COUNTER, "Signals that a key or network behaves unusually, by this process.",
           ("kind",), lambda scrape: scrape.store.signals.reported, SUM),
    Metric("keyproxy_anomalies_dropped_total", COUNTER, "Signals and habits of keys that were dropped.",
           (), lambda scrape: scrape.store.signals.dropped, SUM),
    Metric("keyproxy_suspensions_withheld_total", COUNTER, "Signals that may suspend their key, and did not.",
           (), lambda scrape: scrape.store.signals.withheld, SUM),
    # The process.
    Metric("keyproxy_access_log_dropped_total", COUNTER, "Access log lines that were dropped.",
           (), lambda scrape: scrape.access_log.dropped, SUM),
    Metric("keyproxy_task_defects_total", COUNTER, "Failures of background tasks, which were restarted.",
           ("task",), _task_defects, SUM),
    Metric("keyproxy_housekeeping_failures_total", COUNTER,
           "Failed statements that remove dead lease holders or old rows.",
           ("work",), lambda scrape: {chore.name: chore.failures for chore in scrape.store.chores}, SUM),
    BUILD_INFO,
)  # fmt: skip

SUPERVISOR_METRICS: Final[tuple[Metric[Workers], ...]] = (
    Metric(
        "keyproxy_workers",
        GAUGE,
        "Processes that share the proxied port.",
        ("state",),
        lambda workers: workers.by_state,
        SUM,
    ),
    Metric(
        "keyproxy_worker_restarts_total",
        COUNTER,
        "Workers that were restarted after a crash.",
        (),
        lambda workers: workers.restarts,
        SUM,
    ),
)
