"""Combine the metrics pages of several processes into one, as each metric declares.

Counters and histograms include those of processes that have exited, so that a crash never decreases a sum. Gauges are
combined over running processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from keyproxy.metrics.exposition import PROCESS_METRICS, Catalogue
from keyproxy.metrics.metric import Combine, Metric

_KEPT_OF_THE_DEAD: Final = frozenset({"counter", "histogram"})

_Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class _Combined:
    """One family, with the samples of all processes."""

    def __init__(self, name: str, text: str, kind: str, combine: Combine) -> None:
        self.name = name
        self.text = text
        self.kind = kind
        self.combine = combine
        self.samples: _Samples = {}

    def add(self, family: Family) -> None:
        """Add the samples of one process."""
        for sample in family.samples:
            key = (sample.name, tuple(sample.labels.items()))
            known = self.samples.get(key)
            self.samples[key] = sample.value if known is None else self.combine.both(known, sample.value)

    def copy(self) -> _Combined:
        copy = _Combined(self.name, self.text, self.kind, self.combine)
        copy.samples = dict(self.samples)
        return copy


class Fleet(Collector):
    """The metrics of all workers. Keeps the counters of workers that have exited."""

    def __init__(self, metrics: Sequence[Metric[Any]], own: Catalogue[Any]) -> None:
        """`metrics`: the metrics of a worker; any others on its page are omitted. `own`: those of the supervisor."""
        self._combine = {metric.family: metric.combine for metric in metrics} | dict(PROCESS_METRICS)
        self._own = own
        self._ended: dict[str, _Combined] = {}
        self._pages: list[str] = []
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def ended(self, page: str) -> None:
        """Keep the counters of a process that has exited, from its last known page."""
        self._add(self._ended, (one for one in text_string_to_metric_families(page) if one.type in _KEPT_OF_THE_DEAD))

    def render(self, pages: Iterable[str]) -> bytes:
        """The combined page of these processes and those that have exited."""
        self._pages = list(pages)
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Family]:
        """Called by the registry for every page."""
        combined = {name: ended.copy() for name, ended in self._ended.items()}
        for page in self._pages:
            self._add(combined, text_string_to_metric_families(page))
        for one in combined.values():
            family = Family(one.name, one.text, one.kind)
            for (name, labels), value in one.samples.items():
                family.add_sample(name, dict(labels), value)
            yield family
        yield from self._own.collect()

    def _add(self, combined: dict[str, _Combined], families: Iterable[Family]) -> None:
        for family in families:
            combine = self._combine.get(family.name)
            if combine is None:
                continue  # of a worker of a newer version, which may declare more
            if family.name not in combined:
                combined[family.name] = _Combined(family.name, family.documentation, family.type, combine)
            combined[family.name].add(family)
