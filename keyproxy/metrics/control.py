"""The metrics of an admin process: what the store says of keys and reminders, and what this process has sent.

Gauges are the store's, and so the same in every admin process; counters are this process's own. Only an admin process
tells them: counted by proxies they would be there as many times as there are proxies.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from keyproxy import __version__

CONTENT_TYPE = CONTENT_TYPE_LATEST


@dataclass(frozen=True, slots=True)
class Standing:
    """What the store says: working keys that end within so many days, by (days, whether test keys); reminders to send."""

    expiring: Mapping[tuple[int, bool], int]
    reminders_waiting: int


class ControlCatalogue(Collector):
    """See the module."""

    def __init__(self) -> None:
        self._standing: Standing | None = None
        self._reminders: Mapping[str, int] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self, standing: Standing | None, reminders: Mapping[str, int]) -> bytes:
        """The page in the text format of Prometheus. `standing` None: the store cannot be asked."""
        self._standing, self._reminders = standing, reminders
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for every scrape."""
        standing = self._standing
        yield GaugeMetricFamily(
            "keyproxy_store_up", "Whether the store answered last time.", value=float(standing is not None)
        )
        if standing is not None:
            keys = GaugeMetricFamily(
                "keyproxy_keys_expiring",
                "Keys that work, have no working successor, and expire within that time.",
                labels=("within", "mode"),
            )
            for (days, is_test), count in standing.expiring.items():
                keys.add_metric((f"{days}d", "test" if is_test else "live"), count)
            yield keys
            yield GaugeMetricFamily(
                "keyproxy_reminders_waiting", "Reminders that are to be sent, now or again.",
                value=standing.reminders_waiting,
            )  # fmt: skip
        reminders = CounterMetricFamily(
            "keyproxy_reminders", "Reminders by what came of sending: sent, failed (an attempt), given_up.",
            labels=("result",),
        )  # fmt: skip
        for result, count in self._reminders.items():
            reminders.add_metric((result,), count)
        yield reminders
        build = InfoMetricFamily("keyproxy_build", "What is running.")
        build.add_metric([], {"version": __version__, "python": platform.python_version()})
        yield build
