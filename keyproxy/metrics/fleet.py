"""Combine the metrics pages of several processes into one.

Counters and histograms are summed, including those of processes that have exited, so that a crash never decreases a
sum. Gauges are summed over running processes, except for the few that are not amounts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

#: Gauges with a meaningless sum, and how to combine them.
_NOT_SUMMED: Final[Mapping[str, Callable[[float, float], float]]] = {
    "keyproxy_store_up": min,
    "keyproxy_change_feed_lag_seconds": max,
    "keyproxy_ledger_unsettled_seconds": max,
    "keyproxy_usage_unwritten_seconds": max,
    "keyproxy_build_info": max,
    "process_start_time_seconds": min,
    "process_max_fds": min,
}

_KEPT_OF_THE_DEAD: Final = frozenset({"counter", "histogram"})

_Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class _Family:
    """All samples of one name."""

    def __init__(self, name: str, text: str, kind: str) -> None:
        self.name = name
        self.text = text
        self.kind = kind
        self.samples: _Samples = {}

    def take(self, metric: Metric) -> None:
        """Add the samples of one process."""
        both = _NOT_SUMMED.get(self.name, _sum)
        for sample in metric.samples:
            key = (sample.name, tuple(sample.labels.items()))
            known = self.samples.get(key)
            self.samples[key] = sample.value if known is None else both(known, sample.value)


class Fleet(Collector):
    """The metrics of all workers. Keeps the counters of workers that have exited."""

    def __init__(self, workers: Callable[[], Mapping[str, int]], restarts: Callable[[], int]) -> None:
        """`workers`: the number of workers by state. `restarts`: the number of restarts after crashes."""
        self._workers = workers
        self._restarts = restarts
        self._ended: dict[str, _Family] = {}
        self._pages: list[str] = []
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def ended(self, page: str) -> None:
        """Keep the counters of a process that has exited, from its last known page."""
        _add(self._ended, (one for one in text_string_to_metric_families(page) if one.type in _KEPT_OF_THE_DEAD))

    def render(self, pages: Iterable[str]) -> bytes:
        """The combined page of these processes and those that have exited."""
        self._pages = list(pages)
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for every page."""
        families: dict[str, _Family] = {}
        for ended in self._ended.values():
            copy = families[ended.name] = _Family(ended.name, ended.text, ended.kind)
            copy.samples = dict(ended.samples)
        for page in self._pages:
            _add(families, text_string_to_metric_families(page))
        for family in families.values():
            metric = Metric(family.name, family.text, family.kind)
            for (name, labels), value in family.samples.items():
                metric.add_sample(name, dict(labels), value)
            yield metric
        states = GaugeMetricFamily("keyproxy_workers", "Processes that share the proxied port.", labels=("state",))
        for state, count in self._workers().items():
            states.add_metric((state,), count)
        yield states
        restarts = CounterMetricFamily("keyproxy_worker_restarts", "Workers that were restarted after a crash.")
        restarts.add_metric((), self._restarts())
        yield restarts


def _sum(one: float, other: float) -> float:
    return one + other


def _add(families: dict[str, _Family], metrics: Iterable[Metric]) -> None:
    for metric in metrics:
        family = families.get(metric.name)
        if family is None:
            family = families[metric.name] = _Family(metric.name, metric.documentation, metric.type)
        family.take(metric)
