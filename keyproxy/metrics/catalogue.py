"""Every metric of keyproxy, with its name, help and labels, rendered for Prometheus when somebody scrapes.

The numbers live where they arise: in the recorder, and behind the callables of `Sources`, which `app` fills in.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from keyproxy import __version__
from keyproxy.metrics.recorder import Histogram, Recorder
from keyproxy.reasons import Reason

CONTENT_TYPE = CONTENT_TYPE_LATEST

_CODES = frozenset(reason.code for reason in Reason)


@dataclass(frozen=True, slots=True)
class Sources:
    """Numbers that are asked for at scrape time."""

    identity_lookups: Callable[[], Mapping[str, int]]
    identities: Callable[[], Mapping[str, int]]
    store_is_up: Callable[[], bool]
    change_feed_lag_seconds: Callable[[], float]
    upstream_connections: Callable[[], Mapping[str, int]]
    open_requests: Callable[[], int]
    client_connections: Callable[[], int]
    access_log_dropped: Callable[[], int]


class Catalogue(Collector):
    """The metrics of one process."""

    def __init__(self, recorder: Recorder, sources: Sources) -> None:
        self._recorder = recorder
        self._sources = sources
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """The page in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for every scrape."""
        yield from self._requests()
        recorder, sources = self._recorder, self._sources
        yield _histogram(
            "keyproxy_request_seconds", "From a request's head to the end of its answer.",
            ("route", "mode"), recorder.request_seconds.items(),
        )  # fmt: skip
        yield _histogram(
            "keyproxy_upstream_seconds", "From the first byte sent upstream to the first byte of the answer.",
            ("route",), [((route,), histogram) for route, histogram in recorder.upstream_seconds.items()],
        )  # fmt: skip
        yield _histogram(
            "keyproxy_overhead_seconds",
            "Our own time before forwarding: from a request's head to its first byte upstream.",
            (), [((), recorder.overhead_seconds)],
        )  # fmt: skip
        yield _counter(
            "keyproxy_identity_lookups", "Look-ups of a key's identity.", "result", sources.identity_lookups()
        )
        yield _gauge("keyproxy_identities", "Entries of the identity cache.", "table", sources.identities())
        yield _value("keyproxy_store_up", "Whether the store answered last time.", float(sources.store_is_up()))
        yield _value(
            "keyproxy_change_feed_lag_seconds", "For how long the change feed has not been known to be current.",
            sources.change_feed_lag_seconds(),
        )  # fmt: skip
        yield _gauge(
            "keyproxy_upstream_connections", "Connections to the upstream.", "state", sources.upstream_connections()
        )
        yield _value("keyproxy_open_requests", "Requests under way.", sources.open_requests())
        yield _value("keyproxy_client_connections", "Open connections from clients.", sources.client_connections())
        dropped = CounterMetricFamily("keyproxy_access_log_dropped", "Access log lines that were dropped.")
        dropped.add_metric([], sources.access_log_dropped())
        yield dropped
        build = InfoMetricFamily("keyproxy_build", "What is running.")
        build.add_metric([], {"version": __version__, "python": platform.python_version()})
        yield build

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "keyproxy_requests", "Requests that have ended.", labels=("route", "status", "mode", "code")
        )
        refusals: dict[str, int] = {}
        for (route, status, mode, code), count in list(self._recorder.requests.items()):
            requests.add_metric((route, str(status), mode, code), count)
            if code in _CODES:
                refusals[code] = refusals.get(code, 0) + count
        yield requests
        yield _counter("keyproxy_refusals", "Requests that were not answered by the upstream.", "code", refusals)


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=(label,))
    for value, count in counts.items():
        family.add_metric((value,), count)
    return family


def _gauge(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family


def _value(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _histogram(
    name: str, text: str, labels: tuple[str, ...], cells: Iterable[tuple[tuple[str, ...], Histogram]]
) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, histogram in list(cells):
        seen = 0
        buckets = []
        for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
            seen += count
            buckets.append((bound, seen))
        family.add_metric(values, buckets, sum_value=histogram.total)
    return family
