"""The metrics of an admin process: keys and reminders in the store, and the work of this process.

Gauges are read from the store and so are the same in every admin process; counters are per process. Proxies do not
export them, because they would then be counted once per proxy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from keyproxy.metrics.build import build_info

CONTENT_TYPE = CONTENT_TYPE_LATEST


#: Statuses of responses by their first digit.
CLASSES: Final = ("2xx", "3xx", "4xx", "5xx")

#: The label of a request that matches no route.
NO_ROUTE: Final = "none"


@dataclass(frozen=True, slots=True)
class Standing:
    """Figures from the store: working keys and tokens that expire within given days, and reminders to be sent.

    `keys` by (days, whether test keys), `tokens` of the admin API by days; `token_expiries` in Unix time, by id.
    """

    keys: Mapping[tuple[int, bool], int]
    tokens: Mapping[int, int]
    token_expiries: Mapping[str, float]
    reminders_waiting: int


class Traffic:
    """Requests to the admin API. Series of all routes and login failures start at 0."""

    def __init__(self, routes: Iterable[tuple[str, str]], failures: Iterable[str]) -> None:
        """`routes`: (method, path). `failures`: codes of requests without a valid token."""
        self.failed_logins = dict.fromkeys(failures, 0)
        known = [*routes, (NO_ROUTE, NO_ROUTE)]
        self.requests = {(*route, number): 0 for route in known for number in CLASSES}

    def note(self, method: str, path: str, status: int, code: str) -> None:
        """Count one request that has ended. Unknown routes share one label."""
        key = (method, path, f"{status // 100}xx")
        if key not in self.requests:
            key = (NO_ROUTE, NO_ROUTE, key[2])
        self.requests[key] = self.requests.get(key, 0) + 1
        if code in self.failed_logins:
            self.failed_logins[code] += 1


class ControlCatalogue(Collector):
    """The metrics of an admin process."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._standing: Standing | None = None
        self._reminders: Mapping[str, int] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self, standing: Standing | None, reminders: Mapping[str, int]) -> bytes:
        """The page in the text format of Prometheus. `standing` None: the store is unavailable."""
        self._standing, self._reminders = standing, reminders
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for every scrape."""
        standing = self._standing
        yield GaugeMetricFamily(
            "keyproxy_store_up", "Whether the last request to the store succeeded.", value=float(standing is not None)
        )
        if standing is not None:
            yield from _expiring(standing)
        reminders = CounterMetricFamily(
            "keyproxy_reminders", "Reminders by result: sent, failed (one attempt), given_up.",
            labels=("result",),
        )  # fmt: skip
        for result, count in self._reminders.items():
            reminders.add_metric((result,), count)
        yield reminders
        requests = CounterMetricFamily(
            "keyproxy_admin_requests", "Requests to the admin API that have ended.", labels=("method", "route", "class")
        )
        for labels, count in self._traffic.requests.items():
            requests.add_metric(labels, count)
        yield requests
        failed = CounterMetricFamily(
            "keyproxy_admin_failed_logins", "Requests to the admin API without a valid token.", labels=("code",)
        )
        for code, count in self._traffic.failed_logins.items():
            failed.add_metric((code,), count)
        yield failed
        yield build_info()


def _expiring(standing: Standing) -> Iterator[Metric]:
    keys = GaugeMetricFamily(
        "keyproxy_keys_expiring", "Working keys without a working successor that expire within this time.",
        labels=("within", "mode"),
    )  # fmt: skip
    for (days, is_test), count in standing.keys.items():
        keys.add_metric((f"{days}d", "test" if is_test else "live"), count)
    yield keys
    tokens = GaugeMetricFamily(
        "keyproxy_admin_tokens_expiring", "Working tokens of the admin API that expire within this time.",
        labels=("within",),
    )  # fmt: skip
    for days, count in standing.tokens.items():
        tokens.add_metric((f"{days}d",), count)
    yield tokens
    expiries = GaugeMetricFamily(
        "keyproxy_admin_token_expires_timestamp_seconds",
        "Expiry of a working token of the admin API, in Unix time; only the tokens that expire soonest.",
        labels=("token",),
    )
    for token, seconds in standing.token_expiries.items():
        expiries.add_metric((token,), seconds)
    yield expiries
    yield GaugeMetricFamily(
        "keyproxy_reminders_waiting", "Reminders still to be sent.", value=standing.reminders_waiting
    )
