"""Requests whose decision waits for a value that is not in memory: fetch it, and decide again.

An identity is fetched without a task: its lookup calls back. So a request with a key that is not cached costs little more
than its share of the query. Whatever else a decision misses is fetched in a task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine

from keyproxy.model import Missing, Permit
from keyproxy.ports.exchange import Exchange
from keyproxy.reasons import Reason, Refusal

_log = logging.getLogger(__name__)


class Undecided:
    """The undecided requests of one gateway, and its other tasks."""

    __slots__ = ("_admit", "_decide", "_idle", "_looking_up", "_tasks")

    def __init__(self, decide: Callable[[Exchange], Permit], admit: Callable[[Exchange, Permit], None]) -> None:
        """`decide`: raises Missing or a Refusal. `admit`: forwards the request, or serves it."""
        self._decide = decide
        self._admit = admit
        self._tasks: set[asyncio.Task[None]] = set()
        #: How many requests wait for a lookup without a task.
        self._looking_up = 0
        self._idle: asyncio.Future[None] | None = None

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._tasks) or self._looking_up > 0

    async def all_ended(self) -> None:
        """Wait until there are none."""
        while True:
            tasks = [task for task in self._tasks if not task.done()]
            if tasks:
                await asyncio.wait(tasks)
            elif self._looking_up:
                if self._idle is None:
                    self._idle = asyncio.get_running_loop().create_future()
                await asyncio.shield(self._idle)
            else:
                return

    def start(self, work: Coroutine[None, None, None]) -> None:
        """Run a coroutine that raises nothing."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def fetch(self, exchange: Exchange, missing: Missing) -> None:
        """Fetch a missing value and decide again, until the exchange is forwarded or refused, or is over."""
        begin = missing.begin
        if begin is None:
            self.start(self._fetch_and_decide(exchange, missing))
        else:
            self._looking_up += 1
            begin(self._continuation(exchange))

    def _continuation(self, exchange: Exchange) -> Callable[[Refusal | None], None]:
        return lambda failure: self._looked_up(exchange, failure)

    def _looked_up(self, exchange: Exchange, failure: Refusal | None) -> None:
        self._looking_up -= 1
        if not self._looking_up and self._idle is not None:
            self._idle.set_result(None)
            self._idle = None
        if exchange.is_over:
            return
        try:
            self._decide_again(exchange, failure)
        except Exception:  # noqa: BLE001 - the outermost boundary of this callback
            self._failed(exchange)

    def _decide_again(self, exchange: Exchange, failure: Refusal | None) -> None:
        try:
            permit = self._decide(exchange)
        except Missing as still:
            # A value that could not be fetched may no longer be needed: stale values are used while the store is down.
            if failure is None:
                self.start(self._fetch_and_decide(exchange, still))
            else:
                exchange.refuse(failure)
        except Refusal as refusal:
            exchange.refuse(refusal)
        else:
            self._admit(exchange, permit)

    async def _fetch_and_decide(self, exchange: Exchange, missing: Missing) -> None:
        try:
            permit = await missing.fetch_and_decide(lambda: self._decide(exchange), lambda: exchange.is_over)
            if permit is not None:
                self._admit(exchange, permit)
        except Refusal as refusal:
            exchange.refuse(refusal)
        except Exception:  # noqa: BLE001 - the outermost boundary of this task
            self._failed(exchange)

    def _failed(self, exchange: Exchange) -> None:
        _log.exception("request decision failed", extra={"request_id": exchange.request_id.decode("ascii")})
        exchange.refuse(Refusal(Reason.INTERNAL_ERROR))
