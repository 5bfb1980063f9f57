"""Count and log every exchange that has ended. A request pays for one list append.

Ended exchanges are kept for a fraction of a second and counted in batches, which costs less than counting one by one.
Every scrape counts the pending batch first, so the values are exact. No label value comes from a client: routes, modes
and codes are closed sets, statuses lie between 100 and 599.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Final

from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.metrics.access_log import AccessLog
from keyproxy.metrics.access_log_lines import LabelledExchange
from keyproxy.metrics.delegation_counts import DelegationCounts
from keyproxy.metrics.model_counts import ModelCounts
from keyproxy.metrics.tool_counts import ToolCounts
from keyproxy.model import COMPLETED, Ending
from keyproxy.ports import gate
from keyproxy.ports.exchange import Exchange
from keyproxy.reasons import Reason

NO_ROUTE: Final = "none"
NO_MODE: Final = "none"

REQUEST_BOUNDS: Final[tuple[float, ...]] = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
OVERHEAD_BOUNDS: Final[tuple[float, ...]] = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5,
)  # fmt: skip

_DELEGATION_REFUSED: Final = Reason.DELEGATION_REFUSED
_TOOL_NOT_ALLOWED: Final = Reason.TOOL_NOT_ALLOWED
_OK: Final = "ok"
_CODES: Final = {
    COMPLETED: _OK,
    Ending.REFUSED: "refused",
    Ending.CUT: "cut",
    Ending.CLIENT_GONE: "client_gone",
}

#: Outcomes of a request: relayed completely, refused, cut off in the middle of the response, or abandoned by its client.
OUTCOMES: Final = tuple(_CODES.values())

_PENDING_SECONDS: Final = 0.01

#: The log's lines are passed on after this number of batches.
_BATCHES_PER_FLUSH: Final = 5

#: A batch of this size is counted immediately, which bounds memory.
_PENDING_MAX: Final = 250


class Histogram:
    """Counts per bucket, not cumulative; the last bucket is for values above every bound. Seconds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, *seconds: float) -> None:
        """Count observations."""
        self.observe_all([*seconds])

    def observe_all(self, seconds: list[float]) -> None:
        """Count observations, and leave them sorted.

        Most batches are within the first few bounds, so that looking these up among the observations is cheaper than
        looking up each observation among the bounds.
        """
        seconds.sort()
        counts, below = self.counts, 0
        for place, bound in enumerate(self.bounds):
            if below == len(seconds):
                break
            upto = bisect_right(seconds, bound)
            counts[place] += upto - below
            below = upto
        counts[-1] += len(seconds) - below
        self.total += sum(seconds)


class Cell:
    """The exchanges that share all labels."""

    __slots__ = (
        "code",
        "count",
        "ended",
        "is_metered",
        "mode",
        "outcome",
        "request_seconds",
        "route",
        "status",
        "tokens_estimated",
        "tokens_held",
        "tokens_in",
        "tokens_out",
        "upstream_seconds",
    )

    def __init__(self, route: str, mode: str, status: int, code: str, outcome: str) -> None:
        self.route = route
        self.mode = mode
        self.status = status
        #: `ok`, the code of a Reason, or else the outcome.
        self.code = code
        #: One of OUTCOMES.
        self.outcome = outcome
        self.count = 0
        #: The exchanges to count in this batch.
        self.ended: list[Exchange] = []
        #: From the request's head to the end of its response.
        self.request_seconds = Histogram(REQUEST_BOUNDS)
        #: From the first byte sent upstream to the first byte of the response.
        self.upstream_seconds = Histogram(REQUEST_BOUNDS)
        #: Whether any of them was charged in tokens; the tokens reserved, charged, and charged by estimate.
        self.is_metered = False
        self.tokens_held = self.tokens_in = self.tokens_out = self.tokens_estimated = 0


class Recorder(gate.Recorder):
    """Counts and logs exchanges in batches. Implements the port Recorder."""

    def __init__(self, access_log: AccessLog | None, *sinks: Callable[[Sequence[LabelledExchange]], None]) -> None:
        """`access_log` None: requests are not logged. `sinks` receive all ended exchanges, in batches."""
        #: From the request's head to its first byte upstream, without waiting for its body or for a connection.
        self.overhead_seconds = Histogram(OVERHEAD_BOUNDS)
        #: For requests that had to wait for a connection to the upstream.
        self.connection_wait_seconds = Histogram(REQUEST_BOUNDS)
        #: Requests with a key that was replaced by another one.
        self.retiring_count = 0
        #: Metered and judged requests by model.
        self.models = ModelCounts()
        #: Requests of keys that act for users, refused delegation, and agent tokens.
        self.delegation = DelegationCounts()
        #: Calls of tools.
        self.tools = ToolCounts()
        #: Forwarded requests by the category of their prompt and its source.
        self.categories: dict[tuple[str, ...], int] = {}
        self._cells: dict[tuple[str, str, int, str, str], Cell] = {}
        self._pending: list[Exchange] = []
        self._others = sinks
        self._access_log = access_log
        self._sinks = self._all_sinks(access_log)
        self._batches = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start to count in batches."""
        self._loop = loop
        self._turn = loop.call_later(_PENDING_SECONDS, self._count_in_turns)

    def close(self) -> None:
        """Count the pending batch, and stop."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        self.count_pending()
        self._flush()

    def log_to(self, access_log: AccessLog | None) -> None:
        """Log further requests to this access log; None: do not log them."""
        self.count_pending()
        self._flush()
        self._access_log = access_log
        self._sinks = self._all_sinks(access_log)

    def record(self, exchange: Exchange) -> None:
        self._pending.append(exchange)
        if len(self._pending) >= _PENDING_MAX:
            self.count_pending()

    def cells(self) -> list[Cell]:
        """Everything counted so far."""
        self.count_pending()
        return list(self._cells.values())

    def count_pending(self) -> None:
        """Count and log the pending batch."""
        pending, self._pending = self._pending, []
        rows: list[LabelledExchange] = []
        cell: Cell | None = None
        last: Exchange | None = None
        for exchange in pending:
            # Requests that follow each other mostly share all labels.
            if cell is None or last is None or not _shares_labels(exchange, last):
                cell = self._cell(exchange)
            last = exchange
            identity, reason = exchange.identity, exchange.reason
            if identity is not None and identity.retiring_field is not None:
                self.retiring_count += 1
            if (
                exchange.is_minting
                or reason is _DELEGATION_REFUSED
                or (identity is not None and identity.actor_user_id is not None)
            ):
                self.delegation.add(exchange)
            if exchange.tool_call is not None or reason is _TOOL_NOT_ALLOWED:
                self.tools.add(exchange, cell.outcome)
            cell.ended.append(exchange)
            rows.append((exchange, cell.route, cell.mode, cell.code))
        for cell in self._cells.values():
            if cell.ended:
                self._count(cell)
        if rows:
            for sink in self._sinks:
                sink(rows)

    def _cell(self, exchange: Exchange) -> Cell:
        """The cell with the labels of an exchange."""
        identity, route, reason = exchange.identity, exchange.route, exchange.reason
        outcome = _CODES[exchange.ending]
        labels = (
            NO_ROUTE if route is None else route.name,
            NO_MODE if identity is None else identity.mode,
            exchange.status,
            outcome if reason is None else reason.code,
            outcome,
        )
        cell = self._cells.get(labels)
        if cell is None:
            cell = self._cells[labels] = Cell(*labels)
        return cell

    def _all_sinks(self, access_log: AccessLog | None) -> tuple[Callable[[Sequence[LabelledExchange]], None], ...]:
        # The log comes last: the other sinks bound the names of models.
        return self._others if access_log is None else (*self._others, access_log.write)

    def _count(self, cell: Cell) -> None:
        ended, cell.ended = cell.ended, []
        cell.count += len(ended)
        cell.request_seconds.observe_all([one.ended_mono - one.started_mono for one in ended])
        cell.upstream_seconds.observe_all(
            [one.responded_mono - one.sent_mono for one in ended if one.responded_mono and one.sent_mono]
        )
        self.overhead_seconds.observe_all(
            [
                one.sent_mono - one.started_mono - one.body_wait_seconds - one.connection_wait_seconds
                for one in ended
                if one.sent_mono
            ]
        )
        if waits := [one.connection_wait_seconds for one in ended if one.connection_wait_seconds]:
            self.connection_wait_seconds.observe_all(waits)
        for exchange in ended:
            if exchange.categories is not None and exchange.sent_mono:
                for category in exchange.categories:
                    self.categories[category] = self.categories.get(category, 0) + 1
            use = exchange.token_use
            if use is not None:
                _count_tokens(cell, exchange, use)
            if use is not None or (exchange.judged is not None and exchange.sent_mono):
                self.models.add(exchange, cell.mode)

    def _count_in_turns(self) -> None:
        assert self._loop is not None  # noqa: S101 - for the type checker
        self._turn = self._loop.call_later(_PENDING_SECONDS, self._count_in_turns)
        self.count_pending()
        self._batches += 1
        if self._batches >= _BATCHES_PER_FLUSH:
            self._flush()

    def _flush(self) -> None:
        self._batches = 0
        if self._access_log is not None:
            self._access_log.flush()


def _shares_labels(one: Exchange, other: Exchange) -> bool:
    """Whether two exchanges are surely counted in one cell."""
    if (
        one.route is not other.route
        or one.status != other.status
        or one.ending is not other.ending
        or one.reason is not other.reason
    ):
        return False
    first, second = one.identity, other.identity
    if first is None or second is None:
        return first is second
    return first.is_test == second.is_test


def _count_tokens(cell: Cell, exchange: Exchange, use: TokenUse) -> None:
    cell.is_metered = True
    cell.tokens_in += use.tokens_in
    cell.tokens_out += use.tokens_out
    if exchange.metered is not None:
        cell.tokens_held += exchange.metered.tokens_reserved
    if exchange.is_estimated:
        cell.tokens_estimated += use.total
