"""The metrics: initial series, counting, and their list in docs/metrics.md."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from keyproxy.admin.listener import traffic
from keyproxy.admin.metrics_page import ADMIN_METRICS, AdminScrape, StoreFigures
from keyproxy.admin.service import ENDPOINTS
from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.ai.tools.tool import Tool
from keyproxy.ai.tools.tool_call import ToolCall
from keyproxy.authorize.metrics import AUTHORIZE_METRICS, OAuthCounts
from keyproxy.config.schema import LedgerSettings, RouteRow
from keyproxy.config.tools.anomaly_settings import SIGNALS
from keyproxy.config.tools.tool_settings import ToolRow
from keyproxy.limits.allowance import Allowance, Bundle, Hold
from keyproxy.limits.lease_sync import LeaseSync, Short
from keyproxy.limits.lease_table import LeaseTable
from keyproxy.limits.ledger_protocol import PLANNED_POOLS, POLICIES, REFUSALS, Pool
from keyproxy.limits.plan import PERS, Limit, Plan
from keyproxy.metrics.access_log import AccessLog
from keyproxy.metrics.exposition import PROCESS_METRICS, Catalogue
from keyproxy.metrics.fleet import Fleet
from keyproxy.metrics.metric import Combine, Metric, MetricKind
from keyproxy.metrics.recorder import Histogram, Recorder
from keyproxy.model import COMPLETED, AgentToken, Ending, Grant, Identity, Permit, Route
from keyproxy.platform import clock
from keyproxy.ports.exchange import Exchange
from keyproxy.process.providers.proxy_providers import ProxyProviders
from keyproxy.process.proxy_metrics import (
    APPROVAL_WAIT_BOUNDS,
    PROXY_METRICS,
    ROUND_TRIP_BOUNDS,
    STATUS_CLASSES,
    SUPERVISOR_METRICS,
    Scrape,
    Workers,
)
from keyproxy.process.signing.proxy_signing import ProxySigning
from keyproxy.reasons import Reason
from keyproxy.store.ledger.backend import LedgerBackend
from keyproxy.store.ledger.ledger import Ledger
from keyproxy.store.store import Store
from keyproxy.wire.server import ProxyServer
from keyproxy.wire.upstream.pool import Upstreams
from tests import fakes

ROOT = Path(__file__).parents[2]
TOKENS = "POST /v1/chat/completions"


def store(number: int) -> Store:
    """The figures of a store that metrics read; the type checker compares their names with those of the store."""
    ledger = SimpleNamespace(
        refusals=dict.fromkeys(REFUSALS, number),
        counts=SimpleNamespace(taken=number, waited=number),
        conversation=SimpleNamespace(
            counts={"failures": number},
            unsettled_seconds=lambda: float(number),
            lease_sync=SimpleNamespace(outstanding=number),
            reaping=SimpleNamespace(failures=number),
            reap_age=SimpleNamespace(seconds=lambda: float(number)),
        ),
    )
    usage = SimpleNamespace(
        counts=dict.fromkeys(("batches", "events", "failures"), number),
        dropped=dict.fromkeys(("requests", "events"), number),
        pending_events=number,
        unwritten_seconds=lambda: float(number),
    )
    lookups = dict.fromkeys(("hit", "miss", "stale", "unknown", "refused"), number)
    figures = SimpleNamespace(
        ledger=ledger,
        usage=usage,
        approvals=SimpleNamespace(outcomes={("admin", "pending"): number}),
        claims=SimpleNamespace(counts=dict.fromkeys(("repeats", "unasked"), number), pending=number),
        identities=SimpleNamespace(
            counts=SimpleNamespace(by_name=lambda: lookups),
            sizes=lambda: dict.fromkeys(("known", "unknown", "acting"), number),
        ),
        owned_ids=SimpleNamespace(
            counts=SimpleNamespace(by_name=lambda: lookups), sizes=lambda: dict.fromkeys(("owned", "nothing"), number)
        ),
        signals=SimpleNamespace(reported=dict.fromkeys(SIGNALS, number), dropped=number, withheld=number),
        database=SimpleNamespace(is_up=number > 1),
        feed=SimpleNamespace(lag_seconds=lambda: float(number)),
        signing_keys=SimpleNamespace(rejected=number, live=lambda: [None] * number),
        lasting=[SimpleNamespace(what="usage", defects=number)],
        chores=[SimpleNamespace(name="holders", failures=number)],
    )
    return cast("Store", figures)


def server(number: int) -> ProxyServer:
    figures = SimpleNamespace(
        open_requests=lambda: number,
        open_tunnels=lambda: number,
        open_connections=lambda: number,
        failed_connections=lambda: dict.fromkeys(("file_descriptors", "handshake"), number),
        usage_reads=SimpleNamespace(outcomes=dict.fromkeys(("reported", "not_reported", "timed_out"), number)),
    )
    return cast("ProxyServer", figures)


def signing(number: int) -> ProxySigning:
    ring = SimpleNamespace(
        age_seconds=lambda: float(number), lasting=SimpleNamespace(what="signing_key_publishing", defects=number)
    )
    return cast("ProxySigning", SimpleNamespace(assertions=SimpleNamespace(total=number), ring=ring))


def providers(number: int) -> ProxyProviders:
    figures = SimpleNamespace(
        failures=lambda: {"openai": number}, ages=lambda: {"openai": number},
        lasting=SimpleNamespace(what="provider_files", defects=number),
    )  # fmt: skip
    return cast("ProxyProviders", figures)


def scrape(recorder: Recorder, number: int) -> Scrape:
    pool = SimpleNamespace(counts=lambda: dict.fromkeys(("idle", "busy"), number))
    ledger_round_trips = Histogram(ROUND_TRIP_BOUNDS)
    ledger_round_trips.observe(*[0.001] * number)
    approval_waits = Histogram(APPROVAL_WAIT_BOUNDS)
    approval_waits.observe(*[10.0] * number)
    return Scrape(
        recorder=recorder,
        cells=recorder.cells(),
        access_log=cast("AccessLog", SimpleNamespace(dropped=number)),
        server=server(number),
        upstreams=cast("Upstreams", SimpleNamespace(distinct=lambda: {"live": pool})),
        store=store(number),
        routes=[RouteRow("/plain"), RouteRow(TOKENS, tokens="openai", category=["template", "=chat", "=code"])],
        models=["gpt-4o"],
        categories=["chat", "code"],
        tools=[ToolRow("search"), ToolRow("run_shell", approval="admin")],
        ledger_round_trips=ledger_round_trips,
        approval_waits=approval_waits,
        signing=signing(number),
        providers=providers(number),
    )


def exchange(
    *,
    reason: Reason | None = None,
    ending: Ending | None = None,
    status: int = 200,
    route: str | None = None,
    use: TokenUse | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Exchange:
    """An exchange that was sent after a second and took two."""
    one = Exchange()
    one.identity = fakes.identity()
    one.reason = reason
    one.ending = ending or (COMPLETED if reason is None else Ending.REFUSED)
    one.status = status if reason is None or one.ending is not Ending.REFUSED else reason.value.status
    one.route = None if route is None else Route(route)
    one.started_mono, one.sent_mono, one.responded_mono, one.ended_mono = 10.0, 11.0, 11.5, 12.0
    if one.ending is Ending.REFUSED:
        one.sent_mono = one.responded_mono = 0.0
    one.token_use = use
    if use is not None:
        one.metered, one.cost_micros = fakes.metered_request(cap=4_096), 5
    for name, value in (seconds or {}).items():
        setattr(one, name, value)
    return one


def calling(tool: str | None, *, reason: Reason | None = None, ending: Ending | None = None) -> Exchange:
    """An exchange that calls this tool; None: one that has no row."""
    one = exchange(reason=reason, ending=ending)
    one.tool_call = None if tool is None else ToolCall(Tool(tool, tool))
    return one


def page(*exchanges: Exchange, number: int = 0) -> str:
    """The page of a proxy on which these have ended."""
    recorder = Recorder(None)
    for one in exchanges:
        recorder.record(one)
    return Catalogue(PROXY_METRICS, lambda: scrape(recorder, number)).render().decode()


def workers_page(*pages: str, by_state: Mapping[str, int] | None = None) -> str:
    """The page of a supervisor over workers with these pages."""
    own = Catalogue(SUPERVISOR_METRICS, lambda: Workers(by_state or {}, 1))
    return Fleet(PROXY_METRICS, own).render(pages).decode()


def series(text: str, name: str) -> dict[tuple[str, ...], float]:
    """The values of a metric by those of its labels, in the order of the labels' names."""
    return {
        tuple(value for label, value in sorted(sample.labels.items()) if label != "le"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


# -- from 0 on


def test_every_refusal_starts_at_0_with_its_blame() -> None:
    before = series(page(), "keyproxy_refusals_total")
    assert before == {(reason.value.blame.value, reason.code): 0.0 for reason in Reason}
    after = series(page(exchange(reason=Reason.INTERNAL_ERROR)), "keyproxy_refusals_total")
    assert after == before | {("us", "internal_error"): 1.0}


def test_the_first_event_of_a_kind_increases_an_existing_counter() -> None:
    """A series that appears with the value 1 never rose for Prometheus: increase() of it is 0."""
    text = page()
    assert set(series(text, "keyproxy_responses_total")) == {(one,) for one in STATUS_CLASSES}
    assert set(series(text, "keyproxy_limit_refusals_total")) == set(REFUSALS)
    assert set(series(text, "keyproxy_spend_micros_total")) == {("gpt-4o",), ("other",)}
    assert set(series(text, "keyproxy_caps_inserted_total")) == {(TOKENS,)}
    for name in ("keyproxy_tokens_held_total", "keyproxy_tokens_estimated_total"):
        assert set(series(text, name)) == {("live", TOKENS), ("test", TOKENS)}
    assert set(series(text, "keyproxy_tokens_settled_total")) == {
        (direction, mode, TOKENS) for mode in ("live", "test") for direction in ("in", "out")
    }
    labelled = [family for family in text_string_to_metric_families(text) if family.type == "counter"]
    assert {family.name for family in labelled if not family.samples} == {"keyproxy_requests"}


async def test_the_ledger_counts_every_policy_from_0_on() -> None:
    ledger = Ledger(cast("LedgerBackend", None), LedgerSettings(), clock.now)
    assert ledger.refusals == dict.fromkeys(REFUSALS, 0)
    assert {policy for policy, _ in REFUSALS} == set(POLICIES)


def test_every_policy_of_a_plan_is_counted_from_0_on() -> None:
    plan = Plan(
        [Limit(measure, per, 1) for measure in PERS for per in PERS[measure][-6:] if "-rate" not in measure]
        + [Limit("request-rate", "second", 1), Limit("token-rate", "second", 1)]
    )
    table = LeaseTable(LeaseSync(lambda: None))
    for kind in PLANNED_POOLS:
        allowance = Allowance(((Pool(kind, "x", False), plan),))
        with pytest.raises(Short):
            table.take(allowance, 0.0)
        bundle = allowance.bundle
        assert bundle is not None
        assert bundle.tokens_per_request is not None
        assert bundle.spend_per_request is not None
        bounds = {bundle.tokens_per_request.policy.name, bundle.spend_per_request.policy.name}
        names = {lease.policy.name for lease in bundle.leases} | bounds
        assert names == {policy for policy in POLICIES if policy.startswith(f"{kind}.")}


def test_budgets_of_tokens_alone_are_counted_from_0_on() -> None:
    counted = [(policy, reason) for policy, reason in REFUSALS if policy.startswith("token.") or "total" in policy]
    assert set(counted) == {
        (f"token.{measure}", reason) for measure in ("requests_total", "tokens_total") for reason in ("spent", "held")
    }


def test_series_that_start_at_0_survive_worker_restarts() -> None:
    fleet = Fleet(PROXY_METRICS, Catalogue(SUPERVISOR_METRICS, lambda: Workers({"ready": 2}, 0)))
    first, second = page(exchange(reason=Reason.KEY_INVALID)), page()
    merged = series(fleet.render([first, second]).decode(), "keyproxy_refusals_total")
    assert merged == series(page(), "keyproxy_refusals_total") | {("caller", "api_key_invalid"): 1.0}
    fleet.ended(first)
    merged = series(fleet.render([second]).decode(), "keyproxy_refusals_total")
    assert merged[("caller", "api_key_invalid")] == 1.0
    assert len(merged) == len(Reason)


# -- what is counted as what


def test_forwarded_requests_are_counted_by_the_categories_of_their_prompt_from_0_on() -> None:
    recorder = Recorder(None)

    def counts() -> dict[tuple[str, str], float]:
        page = Catalogue(PROXY_METRICS, lambda: scrape(recorder, 1)).render().decode()
        return {
            (sample.labels["category"], sample.labels["source"]): sample.value
            for family in text_string_to_metric_families(page)
            if family.name == "keyproxy_prompt_categories"
            for sample in family.samples
        }

    nothing = {("chat", "route"): 0, ("chat", "template"): 0, ("code", "route"): 0, ("code", "template"): 0}
    assert counts() == nothing
    forwarded = exchange(route=TOKENS)
    forwarded.categories = (("chat", "route"), ("code", "template"), ("code", "pattern"))
    refused = exchange(route=TOKENS, reason=Reason.TOKEN_BUDGET_EXHAUSTED)
    refused.categories, refused.sent_mono = (("chat", "route"),), 0.0
    for one in (forwarded, forwarded, refused, exchange(route=TOKENS)):
        recorder.record(one)
    assert counts() == {**nothing, ("chat", "route"): 2, ("code", "template"): 2, ("code", "pattern"): 2}


TOKEN = AgentToken("agt_0123456789abcdefghijAB", ("crawler",), 0)
ACTING = dataclasses.replace(fakes.identity(), actor_user_id="u_worker")
OF_TOKEN = dataclasses.replace(fakes.identity(), actor_user_id="u_worker", agent_token=TOKEN)


def delegated(identity: Identity, *, reason: Reason | None = None, is_minting: bool = False) -> Exchange:
    one = exchange(reason=reason)
    one.identity, one.is_minting = identity, is_minting
    return one


def test_delegation_is_counted_from_0_on() -> None:
    names = (
        "keyproxy_acting_requests_total",
        "keyproxy_delegation_refusals_total",
        "keyproxy_agent_tokens_minted_total",
    )
    before = page()
    assert [series(before, name) for name in names] == [
        {("live",): 0, ("test",): 0},
        {("acting",): 0, ("mint",): 0},
        {("route",): 0, ("admin",): 0},
    ]
    assert series(before, "keyproxy_acting_entries") == {(): 0}
    refused = Reason.DELEGATION_REFUSED
    after = page(
        delegated(ACTING),
        delegated(dataclasses.replace(ACTING, is_test=True)),
        delegated(ACTING, reason=Reason.SCOPE_INSUFFICIENT),
        delegated(ACTING, reason=refused, is_minting=True),
        delegated(ACTING, is_minting=True),
        delegated(OF_TOKEN),
        delegated(OF_TOKEN, reason=refused),
        delegated(fakes.identity(), reason=refused),
        delegated(fakes.identity(), is_minting=True),
        delegated(fakes.identity(), reason=Reason.QUOTA_EXHAUSTED, is_minting=True),
        delegated(fakes.identity()),
    )
    assert [series(after, name) for name in names] == [
        {("live",): 4, ("test",): 1},
        {("acting",): 2, ("mint",): 1},
        {("route",): 2, ("admin",): 0},
    ]
    assert series(workers_page(after, after), names[1]) == {("acting",): 4, ("mint",): 2}


def test_responses_are_counted_by_the_class_of_their_status() -> None:
    text = page(
        *[exchange(status=status) for status in (101, 200, 204, 302, 404, 500, 599)],
        exchange(status=499, ending=Ending.CLIENT_GONE),
        exchange(reason=Reason.RATE_LIMITED),
    )
    assert series(text, "keyproxy_responses_total") == {
        ("1xx",): 1,
        ("2xx",): 2,
        ("3xx",): 1,
        ("4xx",): 3,
        ("5xx",): 2,
    }


def test_relayed_requests_and_refusals_have_separate_durations() -> None:
    text = page(
        exchange(route="any"),
        exchange(route="any", status=500),
        exchange(route="any", reason=Reason.RATE_LIMITED),
        exchange(route="any", ending=Ending.CUT, reason=Reason.UPSTREAM_UNREACHABLE),
        exchange(route="any", ending=Ending.CLIENT_GONE, status=499),
    )
    assert series(text, "keyproxy_request_seconds_count") == {
        ("live", "ok", "any"): 2,
        ("live", "refused", "any"): 1,
        ("live", "cut", "any"): 1,
        ("live", "client_gone", "any"): 1,
    }


def test_a_code_and_a_status_that_end_in_two_ways_are_one_series_of_requests() -> None:
    text = page(
        exchange(reason=Reason.STORE_UNAVAILABLE),
        exchange(reason=Reason.STORE_UNAVAILABLE, status=503, ending=Ending.CUT),
    )
    names = [line for line in text.splitlines() if line.startswith("keyproxy_requests_total{")]
    assert len(names) == len({line.rpartition(" ")[0] for line in names}) == 1
    assert names[0].endswith(" 2.0")


@pytest.mark.parametrize(
    ("waits", "overhead"),
    [
        ({}, 1.0),
        ({"body_wait_seconds": 0.75}, 0.25),
        ({"connection_wait_seconds": 0.5}, 0.5),
        ({"body_wait_seconds": 0.5, "connection_wait_seconds": 0.25}, 0.25),
    ],
)
def test_overhead_is_the_time_of_the_proxy_alone(waits: dict[str, float], overhead: float) -> None:
    text = page(exchange(seconds=waits))
    assert series(text, "keyproxy_overhead_seconds_sum") == {(): pytest.approx(overhead)}
    waited = waits.get("connection_wait_seconds", 0.0)
    assert series(text, "keyproxy_connection_wait_seconds_count") == {(): float(waited > 0)}
    assert series(text, "keyproxy_connection_wait_seconds_sum") == {(): waited}


def test_calls_of_tools_start_at_0_and_are_counted_by_their_outcome() -> None:
    before = series(page(), "keyproxy_tool_calls_total")
    assert set(before.values()) == {0.0}
    assert {tool for _, tool in before} == {"search", "run_shell", "other"}
    text = page(
        *[calling("search") for _ in range(2)],
        calling("search", reason=Reason.RATE_LIMITED),
        calling("search", ending=Ending.CLIENT_GONE),
        calling("run_shell", reason=Reason.TOOL_NOT_ALLOWED),
        calling("run_shell", reason=Reason.APPROVAL_REQUIRED),
        calling("run_shell", reason=Reason.APPROVAL_DENIED),
        calling(None, reason=Reason.TOOL_NOT_ALLOWED),
        calling(None, reason=Reason.SCOPE_INSUFFICIENT),
        calling(None),
    )
    after = series(text, "keyproxy_tool_calls_total")
    assert before.keys() == after.keys()
    assert {labels: count for labels, count in after.items() if count} == {
        ("ok", "search"): 2.0,
        ("refused", "search"): 1.0,
        ("client_gone", "search"): 1.0,
        ("tool_not_allowed", "run_shell"): 1.0,
        ("approval_required", "run_shell"): 1.0,
        ("approval_denied", "run_shell"): 1.0,
        ("tool_not_allowed", "other"): 1.0,
    }


def test_requests_and_failed_logins_of_the_admin_api_are_counted_from_0_on() -> None:
    counted = traffic()
    page_of_admin = Catalogue(ADMIN_METRICS, lambda: AdminScrape(None, {}, {}, {}, counted, 0))
    before = page_of_admin.render().decode()
    requests = series(before, "keyproxy_admin_requests_total")
    assert set(requests.values()) == {0.0}
    assert ("4xx", "none", "none") in requests
    routes = {*((one.method, one.path) for one in ENDPOINTS), ("GET", "/metrics"), ("GET", "/livez")}
    assert {(number, *route) for route in routes for number in ("2xx", "4xx", "5xx")} <= set(requests)
    assert set(series(before, "keyproxy_admin_failed_logins_total")) == {
        ("token_missing",),
        ("token_invalid",),
        ("token_expired",),
        ("token_revoked",),
        ("account_disabled",),
        ("too_many_failures",),
    }
    counted.note("GET", "/metrics", 200, "")
    counted.note("BREW", "/nowhere", 404, "not_found")
    counted.note("GET", "/metrics", 401, "token_expired")
    after = page_of_admin.render().decode()
    assert {key: value for key, value in series(after, "keyproxy_admin_requests_total").items() if value} == {
        ("2xx", "GET", "/metrics"): 1,
        ("4xx", "none", "none"): 1,
        ("4xx", "GET", "/metrics"): 1,
    }
    assert series(after, "keyproxy_admin_failed_logins_total")[("token_expired",)] == 1


# -- the documentation


def populated(number: int = 1) -> str:
    """A page of a proxy on which every metric has a series, and so many of everything."""
    ended = []
    for _ in range(number):
        one = exchange(route=TOKENS, use=TokenUse(1, 2), seconds={"connection_wait_seconds": 0.1})
        one.permit = Permit(Grant(fakes.identity(), Route(TOKENS)), Hold(Bundle(()), Bundle(()), 5))
        one.is_estimated, one.categories = True, (("code", "route"),)
        one.identity = dataclasses.replace(fakes.identity(), retiring_field=b"X-Keyproxy-Key-Expires-In: ")
        acting, minted = exchange(), exchange(status=201)
        acting.identity, minted.is_minting = ACTING, True
        refused = [exchange(reason=Reason.RATE_LIMITED), exchange(reason=Reason.DELEGATION_REFUSED)]
        ended += [one, acting, minted, *refused, calling("search")]
    return page(*ended, number=number)


def admin_page() -> str:
    figures = StoreFigures({(1, False): 1}, {1: 1}, {"tok_1": 1.0}, 1)
    deliveries: dict[tuple[str, ...], int] = {("limit.threshold", "sent"): 1}
    scrape = AdminScrape(figures, {"sent": 1}, {"80": 1}, deliveries, traffic(), 1)
    return Catalogue(ADMIN_METRICS, lambda: scrape).render().decode()


def authorization_server_page() -> str:
    counts = OAuthCounts()
    counts.requests["token", "ok"] += 1
    return Catalogue(AUTHORIZE_METRICS, lambda: counts).render().decode()


def described(text: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(name, type, labels) of every metric of a page but those of the process."""
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("keyproxy_"):
            continue
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert family.samples, f"{family.name} has no series here"
        name = family.name + ("_total" if family.type == "counter" else "")
        yield name, family.type, tuple(sorted(labels))


def tables() -> dict[str, list[list[str]]]:
    """The rows of each table of docs/metrics.md, by its heading."""
    found: dict[str, list[list[str]]] = {}
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for part in re.split(r"(?m)^## ", text)[1:]:
        rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| `keyproxy_")]
        found[part.partition("\n")[0]] = [[cell.strip() for cell in row] for row in rows]
    return found


DECLARED: dict[str, tuple[Metric[Any], ...]] = {
    "Of a proxy": PROXY_METRICS,
    "Of a supervisor": SUPERVISOR_METRICS,
    "Of an admin process": ADMIN_METRICS,
    "Of an authorization server": AUTHORIZE_METRICS,
}


@pytest.mark.parametrize("heading", DECLARED)
def test_page_of_metrics_lists_exactly_the_declared_ones(heading: str) -> None:
    documented = [
        (name.strip("`"), kind, tuple(re.findall(r"`(\w+)`", labels)), combine)
        for name, kind, labels, combine, _ in tables()[heading]
    ]
    declared = [(one.name, one.kind.value, one.labels, one.combine.value) for one in DECLARED[heading]]
    assert sorted(documented) == sorted(declared)


@pytest.mark.parametrize("heading", DECLARED)
def test_every_declared_metric_is_on_its_page_with_its_labels(heading: str) -> None:
    pages = {
        "Of a proxy": populated,
        "Of a supervisor": lambda: workers_page(by_state={"ready": 1}),
        "Of an admin process": admin_page,
        "Of an authorization server": authorization_server_page,
    }
    declared = [(one.name, one.kind.value, tuple(sorted(one.labels))) for one in DECLARED[heading]]
    assert sorted(described(pages[heading]())) == sorted(declared)


def test_metric_cannot_be_declared_without_how_it_combines() -> None:
    declare = cast("Any", Metric)
    with pytest.raises(TypeError, match="combine"):
        declare("keyproxy_x_seconds", MetricKind.GAUGE, "", (), lambda _: 0)


@pytest.mark.parametrize("kind", [MetricKind.COUNTER, MetricKind.HISTOGRAM])
@pytest.mark.parametrize("combine", [Combine.MAX, Combine.MIN])
def test_counters_and_histograms_can_only_be_summed(kind: MetricKind, combine: Combine) -> None:
    name = "keyproxy_x_total" if kind is MetricKind.COUNTER else "keyproxy_x_seconds"
    with pytest.raises(ValueError, match="summed"):
        Metric(name, kind, "", (), lambda _: 0, combine)


@pytest.mark.parametrize(("name", "kind"), [("keyproxy_x", MetricKind.COUNTER), ("keyproxy_x_total", MetricKind.GAUGE)])
def test_counters_and_no_other_metrics_end_with_total(name: str, kind: MetricKind) -> None:
    with pytest.raises(ValueError, match="_total"):
        Metric(name, kind, "", (), lambda _: 0, Combine.SUM)


def test_every_metric_of_the_client_library_declares_how_it_combines() -> None:
    families = {family.name for family in text_string_to_metric_families(page())}
    assert {name for name in families if not name.startswith("keyproxy_")} == set(PROCESS_METRICS)


def test_merged_page_has_every_metric_of_a_worker() -> None:
    names = {family.name for family in text_string_to_metric_families(populated())}
    merged = {family.name for family in text_string_to_metric_families(workers_page(populated()))}
    assert merged == names | {metric.family for metric in SUPERVISOR_METRICS}


def test_metric_of_a_newer_worker_is_omitted_from_the_merged_page() -> None:
    assert "keyproxy_new" not in workers_page("# TYPE keyproxy_new gauge\nkeyproxy_new 1\n")


def test_the_page_of_metrics_states_how_values_of_workers_are_combined() -> None:
    def of(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return {
            (
                family.name + ("_total" if family.type == "counter" else ""),
                tuple(sorted(sample.labels.items())),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.name.endswith(("_bucket", "_sum"))
        }

    merged = of(workers_page(populated(1), populated(3)))
    one, three = of(populated(1)), of(populated(3))
    for name, _, _, how, _ in tables()["Of a proxy"]:
        key = next(
            key
            for key in one
            if (key[0] == name.strip("`") and three[key] != one[key])
            or key[0] == name.strip("`") == "keyproxy_build_info"
        )
        together: dict[str, Any] = {
            "sum": one[key] + three[key],
            "max": max(one[key], three[key]),
            "min": min(one[key], three[key]),
        }
        assert merged[key] == together[how], name


@functools.cache
def names_of_the_client() -> frozenset[str]:
    """Its commands, tables, functions and message headers. It has no metrics."""
    modules = sorted((ROOT / "client" / "keyproxy_client").rglob("*.py"))
    texts = [text for path in modules for text in (path.stem, path.read_text(encoding="utf-8"))]
    return frozenset(re.findall(r"keyproxy_[a-z0-9_]+", " ".join(texts)))


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "config.example.toml"]),
    ids=lambda path: path.name,
)
def test_every_metric_named_in_the_repository_exists(path: Path) -> None:
    known = {row[0].strip("`") for rows in tables().values() for row in rows}
    histograms = {row[0].strip("`") for rows in tables().values() for row in rows if row[1] == "histogram"}
    known |= {name + suffix for name in histograms for suffix in ("_bucket", "_sum", "_count")}
    others = {
        "keyproxy_proxy", "keyproxy_admin", "keyproxy_authorize", "keyproxy_app", "keyproxy_broken", "keyproxy_restored",
    } | names_of_the_client()  # fmt: skip
    text = path.read_text(encoding="utf-8")
    if path.name == "CHANGELOG.md":
        text = ""  # also names former metrics
    assert set(re.findall(r"(?<![\w./-])keyproxy_[a-z0-9_]+\b(?!\.)", text)) - known - others == set()


# -- as Prometheus reads them


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus")
@pytest.mark.parametrize("kind", ["proxy", "proxy before anything", "workers", "admin"])
def test_promtool_reports_no_problems(kind: str) -> None:
    pages: dict[str, Callable[[], str]] = {
        "proxy": populated,
        "proxy before anything": page,
        "admin": admin_page,
        "workers": lambda: workers_page(populated(), page(), by_state={"ready": 1}),
    }
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=pages[kind](), text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
