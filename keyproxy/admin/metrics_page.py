"""The metrics of an admin process, one row each, and the page: queried from the database and cached briefly.

Gauges are read from the store and so are the same in every admin process; counters are per process. Proxies do not
export them, because they would then be counted once per proxy.

A new metric is one row here and one in docs/metrics.md; a test compares the two. See `metrics.metric` for the columns.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from keyproxy.admin.webhooks import Webhooks
from keyproxy.metrics.delegation_counts import ADMIN
from keyproxy.metrics.exposition import BUILD_INFO, Catalogue
from keyproxy.metrics.metric import Combine, Metric, MetricKind
from keyproxy.store.postgres.database import StoreUnavailable

_WITHIN_DAYS: Final = (1, 7, 30)
_REMEMBERED_SECONDS: Final = 15.0

#: Maximum number of tokens with a series: those that expire first.
_TOKENS_MAX: Final = 100

#: Statuses of responses by their first digit.
STATUS_CLASSES: Final = ("2xx", "3xx", "4xx", "5xx")

#: The label of a request that matches no route.
NO_ROUTE: Final = "none"


@dataclass(frozen=True, slots=True)
class StoreFigures:
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
        self.requests: dict[tuple[str, ...], int] = {
            (*route, number): 0 for route in known for number in STATUS_CLASSES
        }

    def note(self, method: str, path: str, status: int, code: str) -> None:
        """Count one request that has ended. Unknown routes share one label."""
        key = (method, path, f"{status // 100}xx")
        if key not in self.requests:
            key = (NO_ROUTE, NO_ROUTE, key[2])
        self.requests[key] = self.requests.get(key, 0) + 1
        if code in self.failed_logins:
            self.failed_logins[code] += 1


class AdminScrape(NamedTuple):
    """What the metrics are read from at one scrape. `figures` None: the store is unavailable."""

    figures: StoreFigures | None
    #: Reminders by result.
    reminders: Mapping[str, int]
    #: Delivered alerts of limits by percentage.
    alerts: Mapping[str, int]
    #: Messages to webhooks by kind and result.
    webhooks: Mapping[tuple[str, ...], int]
    traffic: Traffic
    #: How many agent tokens were minted.
    minted: int


def _keys_expiring(scrape: AdminScrape) -> dict[tuple[str, ...], float] | None:
    if scrape.figures is None:
        return None
    keys = scrape.figures.keys.items()
    return {(f"{days}d", "test" if is_test else "live"): count for (days, is_test), count in keys}


def _tokens_expiring(scrape: AdminScrape) -> dict[str, float] | None:
    return None if scrape.figures is None else {f"{days}d": count for days, count in scrape.figures.tokens.items()}


def _token_expiries(scrape: AdminScrape) -> Mapping[str, float] | None:
    return None if scrape.figures is None else scrape.figures.token_expiries


def _reminders_waiting(scrape: AdminScrape) -> int | None:
    return None if scrape.figures is None else scrape.figures.reminders_waiting


COUNTER, GAUGE = MetricKind.COUNTER, MetricKind.GAUGE
SUM, MAX, MIN = Combine.SUM, Combine.MAX, Combine.MIN

ADMIN_METRICS: Final[tuple[Metric[AdminScrape], ...]] = (
    Metric("keyproxy_admin_requests_total", COUNTER, "Requests to the admin API that have ended.",
           ("method", "route", "class"), lambda scrape: scrape.traffic.requests, SUM),
    Metric("keyproxy_admin_failed_logins_total", COUNTER, "Requests to the admin API without a valid token.",
           ("code",), lambda scrape: scrape.traffic.failed_logins, SUM),
    Metric("keyproxy_agent_tokens_minted_total", COUNTER, "Agent tokens minted, by origin.",
           ("via",), lambda scrape: {ADMIN: scrape.minted}, SUM),
    Metric("keyproxy_admin_tokens_expiring", GAUGE,
           "Working tokens of the admin API that expire within this time.",
           ("within",), _tokens_expiring, MAX),
    Metric("keyproxy_admin_token_expires_timestamp_seconds", GAUGE,
           "Expiry of a working token of the admin API, in Unix time; only the tokens that expire soonest.",
           ("token",), _token_expiries, MAX),
    Metric("keyproxy_keys_expiring", GAUGE,
           "Working keys without a working successor that expire within this time.",
           ("within", "mode"), _keys_expiring, MAX),
    Metric("keyproxy_reminders_waiting", GAUGE, "Reminders still to be sent.",
           (), _reminders_waiting, MAX),
    Metric("keyproxy_reminders_total", COUNTER, "Reminders by result: sent, failed (one attempt), given_up.",
           ("result",), lambda scrape: scrape.reminders, SUM),
    Metric("keyproxy_limit_alerts_total", COUNTER, "Alerts of limits that were delivered, by percentage of the limit.",
           ("percentage",), lambda scrape: scrape.alerts, SUM),
    Metric("keyproxy_webhook_deliveries_total", COUNTER,
           "Messages to webhooks by kind and result: sent, failed (one attempt), given_up.",
           ("kind", "result"), lambda scrape: scrape.webhooks, SUM),
    Metric("keyproxy_store_up", GAUGE, "Whether the last request to the store succeeded.",
           (), lambda scrape: scrape.figures is not None, MIN),
    BUILD_INFO,
)  # fmt: skip


class MetricsPage:
    """The metrics page. It queries the database at most once every 15 seconds."""

    def __init__(
        self,
        webhooks: Webhooks,
        *,
        now_mono: Callable[[], float],
        traffic: Traffic,
        minted: Callable[[], int],
    ) -> None:
        """`minted`: how many agent tokens this process has minted."""
        self._webhooks = webhooks
        self._now_mono = now_mono
        self._traffic = traffic
        self._minted = minted
        self._catalogue = Catalogue(ADMIN_METRICS, self._scrape)
        self._querying = asyncio.Lock()
        self._figures: StoreFigures | None = None
        self._good_until_mono = 0.0

    async def page(self) -> bytes:
        """Return the page in the Prometheus text format."""
        async with self._querying:
            if self._figures is None or self._now_mono() >= self._good_until_mono:
                self._figures = await self._queried()
                self._good_until_mono = self._now_mono() + _REMEMBERED_SECONDS
        return self._catalogue.render()

    def _scrape(self) -> AdminScrape:
        webhooks = self._webhooks
        return AdminScrape(
            figures=self._figures,
            reminders=dataclasses.asdict(webhooks.reminding.total),
            alerts=webhooks.alerts.delivered,
            webhooks=webhooks.results,
            traffic=self._traffic,
            minted=self._minted(),
        )

    async def _queried(self) -> StoreFigures | None:
        reminders = self._webhooks.reminders
        try:
            return StoreFigures(
                keys=await reminders.expiring(_WITHIN_DAYS),
                tokens=await reminders.expiring_tokens(_WITHIN_DAYS),
                token_expiries=await reminders.token_expiries(_TOKENS_MAX),
                reminders_waiting=await reminders.count_waiting(),
            )
        except StoreUnavailable:
            return None
