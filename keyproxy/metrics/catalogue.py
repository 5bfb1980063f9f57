"""Every metric of keyproxy, with its name, help and labels, rendered for Prometheus at each scrape.

The values live in the recorder and behind the callables of `Sources`, which `app` provides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from keyproxy.metrics.build import build_info
from keyproxy.metrics.recorder import Cell, Histogram, Recorder
from keyproxy.metrics.spending import ROUND_TRIP_BOUNDS, Spending, families
from keyproxy.reasons import Reason

CONTENT_TYPE = CONTENT_TYPE_LATEST

_BLAMES: Final[Mapping[str, str]] = {reason.code: reason.value.blame.value for reason in Reason}

#: Statuses by their first digit.
CLASSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx")

_MODES: Final = ("live", "test")


@dataclass(frozen=True, slots=True)
class Sources:
    """Values that are read at scrape time."""

    identity_lookups: Callable[[], Mapping[str, int]]
    identities: Callable[[], Mapping[str, int]]
    store_is_up: Callable[[], bool]
    change_feed_lag_seconds: Callable[[], float]
    upstream_connections: Callable[[], Mapping[str, int]]
    open_requests: Callable[[], int]
    open_tunnels: Callable[[], int]
    client_connections: Callable[[], int]
    failed_connections: Callable[[], Mapping[str, int]]
    access_log_dropped: Callable[[], int]
    defects: Callable[[], Mapping[str, int]]
    housekeeping_failures: Callable[[], Mapping[str, int]]
    #: The labels of the routes whose tokens are counted.
    token_routes: Callable[[], Sequence[str]]
    spending: Spending


class Catalogue(Collector):
    """The metrics of one process."""

    def __init__(self, recorder: Recorder, sources: Sources) -> None:
        self._recorder = recorder
        self._sources = sources
        #: The time from a message to the ledger to its response.
        self.ledger_round_trips = Histogram(ROUND_TRIP_BOUNDS)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """The page in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for every scrape."""
        cells, sources = self._recorder.cells(), self._sources
        yield from _requests(cells)
        retiring = CounterMetricFamily(
            "keyproxy_retiring_key_requests",
            "Requests with a rotated key, which expires at the end of its grace period.",
        )
        retiring.add_metric([], self._recorder.retiring_count)
        yield retiring
        yield _histogram(
            "keyproxy_request_seconds",
            "Time from a request's head to the end of its response, by outcome.",
            ("route", "mode", "outcome"),
            [((cell.route, cell.mode, cell.outcome), cell.request_seconds) for cell in cells],
        )
        yield _histogram(
            "keyproxy_upstream_seconds",
            "Time from the first byte sent upstream to the first byte of the response.",
            ("route",),
            [((cell.route,), cell.upstream_seconds) for cell in cells],
        )
        yield _histogram(
            "keyproxy_overhead_seconds",
            "Time in keyproxy before forwarding: from a request's head to its first byte upstream, without the time"
            " spent waiting for the client's body or for a connection to the upstream.",
            (),
            [((), self._recorder.overhead_seconds)],
        )
        yield _histogram(
            "keyproxy_connection_wait_seconds",
            "Time that requests without an idle connection to the upstream waited for one.",
            (),
            [((), self._recorder.connection_wait_seconds)],
        )
        yield _counter(
            "keyproxy_identity_lookups", "Lookups of a key's identity.", "result", sources.identity_lookups()
        )
        yield _gauge("keyproxy_identities", "Entries in the identity cache.", "table", sources.identities())
        yield _value(
            "keyproxy_store_up", "Whether the last request to the store succeeded.", float(sources.store_is_up())
        )
        yield _value(
            "keyproxy_change_feed_lag_seconds", "Time since the change feed was last known to be current.",
            sources.change_feed_lag_seconds(),
        )  # fmt: skip
        yield from _process(sources)
        yield from _tokens(cells, sources.token_routes())
        yield from families(sources.spending)
        yield _histogram(
            "keyproxy_ledger_round_trip_seconds",
            "Time from a message to the ledger to its response.",
            (),
            [((), self.ledger_round_trips)],
        )
        yield build_info()


def _process(sources: Sources) -> Iterator[Metric]:
    """Connections of this process, requests in flight, and its background work."""
    yield _gauge(
        "keyproxy_upstream_connections", "Connections to the upstream.", "state", sources.upstream_connections()
    )
    yield _value("keyproxy_open_requests", "Requests in flight.", sources.open_requests())
    yield _value("keyproxy_open_tunnels", "Requests in flight that are WebSocket tunnels.", sources.open_tunnels())
    yield _value("keyproxy_client_connections", "Open connections from clients.", sources.client_connections())
    yield _counter(
        "keyproxy_failed_connections", "Client connections that were not accepted, or were closed to make room.", "why",
        sources.failed_connections(),
    )  # fmt: skip
    dropped = CounterMetricFamily("keyproxy_access_log_dropped", "Access log lines that were dropped.")
    dropped.add_metric([], sources.access_log_dropped())
    yield dropped
    yield _counter(
        "keyproxy_task_defects", "Failures of background tasks, which were restarted.", "task",
        sources.defects(),
    )  # fmt: skip
    yield _counter(
        "keyproxy_housekeeping_failures", "Failed statements that remove dead lease holders or old rows.", "work",
        sources.housekeeping_failures(),
    )  # fmt: skip


def _requests(cells: Sequence[Cell]) -> Iterator[Metric]:
    """Requests that have ended. Series with known label values start at 0."""
    counts: dict[tuple[str, str, str, str], int] = {}
    refusals = dict.fromkeys(_BLAMES.items(), 0)
    responses = dict.fromkeys(CLASSES, 0)
    for cell in cells:
        labels = (cell.route, str(cell.status), cell.mode, cell.code)
        counts[labels] = counts.get(labels, 0) + cell.count
        if cell.code in _BLAMES:
            refusals[cell.code, _BLAMES[cell.code]] += cell.count
        if cell.status:
            responses[CLASSES[cell.status // 100 - 1]] += cell.count
    yield _labelled(
        "keyproxy_requests", "Requests that have ended.", ("route", "status", "mode", "code"), counts.items()
    )
    yield _labelled(
        "keyproxy_refusals", "Requests that keyproxy refused, by the party that has to act.", ("code", "blame"),
        refusals.items(),
    )  # fmt: skip
    yield _counter("keyproxy_responses", "Requests that have ended, by status class.", "class", responses)


def _tokens(cells: Sequence[Cell], routes: Sequence[str]) -> Iterator[Metric]:
    """Tokens of requests that have ended, by route and mode; series of `routes` start at 0."""
    labels = ("route", "mode")
    held = CounterMetricFamily("keyproxy_tokens_held", "Tokens reserved for requests that have ended.", labels=labels)
    settled = CounterMetricFamily("keyproxy_tokens_settled", "Tokens charged.", labels=(*labels, "direction"))
    estimated = CounterMetricFamily(
        "keyproxy_tokens_estimated", "Tokens charged by estimate, because the response reported no usage.",
        labels=labels,
    )  # fmt: skip
    sums: dict[tuple[str, str], list[int]] = {(route, mode): [0, 0, 0, 0] for route in routes for mode in _MODES}
    for cell in cells:
        if cell.is_metered:
            whole = sums.setdefault((cell.route, cell.mode), [0, 0, 0, 0])
            for place, part in enumerate((cell.tokens_held, cell.tokens_in, cell.tokens_out, cell.tokens_estimated)):
                whole[place] += part
    for names, (was_held, tokens_in, tokens_out, was_estimated) in sums.items():
        held.add_metric(names, was_held)
        settled.add_metric((*names, "in"), tokens_in)
        settled.add_metric((*names, "out"), tokens_out)
        estimated.add_metric(names, was_estimated)
    yield from (held, settled, estimated)


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    return _labelled(name, text, (label,), [((value,), count) for value, count in counts.items()])


def _labelled(name: str, text: str, labels: tuple[str, ...], counts: Iterable[tuple[tuple[str, ...], int]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in counts:
        family.add_metric(values, count)
    return family


def _gauge(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family


def _value(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _histogram(
    name: str, text: str, labels: tuple[str, ...], parts: Iterable[tuple[tuple[str, ...], Histogram]]
) -> Metric:
    """A family of histograms; parts with the same label values are summed."""
    family = HistogramMetricFamily(name, text, labels=labels)
    sums: dict[tuple[str, ...], Histogram] = {}
    for values, part in parts:
        whole = sums.setdefault(values, Histogram(part.bounds))
        whole.counts = [one + other for one, other in zip(whole.counts, part.counts, strict=True)]
        whole.total += part.total
    for values, whole in sums.items():
        if not any(whole.counts) and labels:
            continue
        cumulated = list(accumulate(whole.counts))
        bounds = (*map(str, whole.bounds), "+Inf")
        family.add_metric(values, list(zip(bounds, cumulated, strict=True)), sum_value=whole.total)
    return family
