"""Records every exchange that has ended, in plain numbers that are rendered when somebody scrapes.

`record` is on the path of every request: dictionary look-ups, additions, one append. No label value comes from a
caller: routes, modes and codes are closed sets, statuses lie between 100 and 599.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from keyproxy.metrics.access_log import AccessLog
from keyproxy.model import Ending
from keyproxy.ports import Exchange

NO_ROUTE: Final = "none"
NO_MODE: Final = "none"

REQUEST_BOUNDS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
OVERHEAD_BOUNDS: Final = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5,
)  # fmt: skip

_CODES: Final = {
    Ending.ANSWERED: "ok", Ending.REFUSED: "refused", Ending.CUT: "cut", Ending.CLIENT_GONE: "client_gone",
}  # fmt: skip


class Histogram:
    """Counts per bucket, not yet cumulative; the last is for what is above every bound. Seconds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds


class Recorder:
    """See the module."""

    def __init__(self, access_log: AccessLog | None) -> None:
        """`access_log` None: nothing is logged per request."""
        #: (route, status, mode, code) -> requests
        self.requests: dict[tuple[str, int, str, str], int] = {}
        #: (route, mode) -> time from the request's head to the end of its answer
        self.request_seconds: dict[tuple[str, str], Histogram] = {}
        #: route -> time from the first byte sent upstream to the first byte of the answer
        self.upstream_seconds: dict[str, Histogram] = {}
        #: time from the request's head to its first byte upstream
        self.overhead_seconds = Histogram(OVERHEAD_BOUNDS)
        self._access_log = access_log

    def record(self, exchange: Exchange) -> None:
        """One exchange that has ended. Never waits."""
        identity, route, reason = exchange.identity, exchange.route, exchange.reason
        mode = NO_MODE if identity is None else identity.mode
        name = NO_ROUTE if route is None else route.name
        code = _CODES[exchange.ending] if reason is None else reason.code
        requests = self.requests
        cell = (name, exchange.status, mode, code)
        requests[cell] = requests.get(cell, 0) + 1
        self._observe(exchange, name, mode)
        if self._access_log is not None:
            self._access_log.add(exchange, name, mode, code)

    def _observe(self, exchange: Exchange, route: str, mode: str) -> None:
        try:
            histogram = self.request_seconds[route, mode]
        except KeyError:
            histogram = self.request_seconds[route, mode] = Histogram(REQUEST_BOUNDS)
        histogram.observe(exchange.ended_mono - exchange.started_mono)
        if exchange.sent_mono:
            self.overhead_seconds.observe(exchange.sent_mono - exchange.started_mono)
            if exchange.answered_mono:
                try:
                    histogram = self.upstream_seconds[route]
                except KeyError:
                    histogram = self.upstream_seconds[route] = Histogram(REQUEST_BOUNDS)
                histogram.observe(exchange.answered_mono - exchange.sent_mono)
