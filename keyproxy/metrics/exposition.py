"""Render the declared metrics of a process as a page for Prometheus, together with those of prometheus_client."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final, Generic, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from keyproxy import __version__
from keyproxy.metrics import recorder
from keyproxy.metrics.metric import Combine, Metric, MetricKind, Reading
from keyproxy.metrics.recorder import Histogram

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

#: How the metrics of prometheus_client's ProcessCollector combine, by family.
PROCESS_METRICS: Final[Mapping[str, Combine]] = {
    "process_virtual_memory_bytes": Combine.SUM,
    "process_resident_memory_bytes": Combine.SUM,
    "process_start_time_seconds": Combine.MIN,
    "process_cpu_seconds": Combine.SUM,
    "process_open_fds": Combine.SUM,
    "process_max_fds": Combine.MIN,
}

Source = TypeVar("Source")


def _build(_source: object) -> Mapping[tuple[str, ...], float]:
    kind = "pure" if recorder.__file__.endswith(".py") else "compiled"
    return {(__version__, platform.python_version(), kind): 1}


BUILD_INFO: Final[Metric[object]] = Metric(
    "keyproxy_build_info", MetricKind.GAUGE, "The running build.", ("version", "python", "build"), _build, Combine.MAX
)


class Catalogue(Collector, Generic[Source]):
    """The metrics of one process."""

    def __init__(self, metrics: Sequence[Metric[Source]], source: Callable[[], Source]) -> None:
        """`source`: the parts of the process that the metrics are read from, at the time of the scrape."""
        self._metrics = metrics
        self._source = source
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """The page in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Family]:
        """Called by the registry for every scrape."""
        source = self._source()
        for metric in self._metrics:
            reading = metric.read(source)
            if reading is not None:
                yield _family(metric, reading)


def _family(metric: Metric[Source], reading: Reading) -> Family:
    values = _by_labels(reading)
    if metric.kind is MetricKind.HISTOGRAM:
        histograms = HistogramMetricFamily(metric.family, metric.help, labels=metric.labels)
        for labels, value in values:
            assert isinstance(value, Histogram), f"{metric.name} is declared as a histogram"  # noqa: S101
            # Series with labels appear with their first observation.
            if any(value.counts) or not metric.labels:
                bounds = (*map(str, value.bounds), "+Inf")
                buckets = list(zip(bounds, accumulate(value.counts), strict=True))
                histograms.add_metric(labels, buckets, sum_value=value.total)
        return histograms
    kind = CounterMetricFamily if metric.kind is MetricKind.COUNTER else GaugeMetricFamily
    family = kind(metric.family, metric.help, labels=metric.labels)
    for labels, value in values:
        assert not isinstance(value, Histogram), f"{metric.name} is not declared as a histogram"  # noqa: S101
        family.add_metric(labels, value)
    return family


def _by_labels(reading: Reading) -> Iterator[tuple[tuple[str, ...], float | Histogram]]:
    if not isinstance(reading, Mapping):
        assert reading is not None  # noqa: S101 - for the type checker
        yield (), reading
        return
    for labels, value in reading.items():
        yield (labels,) if isinstance(labels, str) else labels, value
