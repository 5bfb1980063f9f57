"""The declaration of a metric: everything about it in one row, including how the values of several processes combine.

The rows stand where the values are: `process.proxy_metrics` for a proxy and its supervisor, `admin.metrics_page` for an
admin process. `exposition` renders them, `fleet` combines the pages of workers by them, and a test compares
docs/metrics.md with them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from keyproxy.metrics.recorder import Histogram


class MetricKind(enum.Enum):
    """The type of a metric, as Prometheus names it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Combine(enum.Enum):
    """How the values of one series in several processes become one value."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"

    def both(self, one: float, other: float) -> float:
        """The combined value of two processes."""
        match self:
            case Combine.SUM:
                return one + other
            case Combine.MAX:
                return max(one, other)
            case Combine.MIN:
                return min(one, other)


#: The values of a metric: one value without labels, or a value by the value of its label, or by those of its labels in
#: their declared order. None: the metric is absent from this page.
Reading: TypeAlias = (
    float
    | Histogram
    | Mapping[str, float]
    | Mapping[tuple[str, ...], float]
    | Mapping[tuple[str, ...], Histogram]
    | None
)

Source = TypeVar("Source", contravariant=True)


@dataclass(frozen=True, slots=True)
class Metric(Generic[Source]):
    """One metric. `name` as exported, `read`: its values at a scrape.

    There is no default for `combine`: summing a gauge that is no amount, such as an age, gives a wrong value.
    """

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...]
    read: Callable[[Source], Reading]
    combine: Combine

    def __post_init__(self) -> None:
        if self.name.endswith("_total") != (self.kind is MetricKind.COUNTER):
            raise ValueError(f"{self.name}: the name of a counter, and of no other metric, ends with _total")
        if self.kind is not MetricKind.GAUGE and self.combine is not Combine.SUM:
            raise ValueError(f"{self.name}: counters and histograms are summed")

    @property
    def family(self) -> str:
        """The name that prometheus_client gives to the family."""
        return self.name.removesuffix("_total")
