"""The ledger in Redis or Valkey, for fleets whose lease traffic one database cannot carry. See docs/ledger-redis.md.

Windows are still accounted in PostgreSQL. Redis is a wholesaler: like any lease holder it reserves *shares* of windows in
PostgreSQL, in large steps, and grants leases to proxies in small steps, only out of its shares. So

    in PostgreSQL   spent + held <= limit, where held covers all that Redis may still grant or has granted
    in Redis        spent + held <= share, as long as its memory is intact

A *generation* is one lifetime of that memory. It ends when the memory is lost or may have lost a write: a restart (even
from a file), a failover, FLUSHALL. Its shares then expire in PostgreSQL and are charged in full; proxies go on spending
its leases, which are paid for; the next generation starts with nothing. So units that Redis forgets are never granted
twice. Callers lose what was left of the shares, which ledger.lua keeps small.

Rejected: copying the counts from Redis to PostgreSQL periodically and restoring them from there. What was granted between
the last copy and the loss would be granted twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Window
from keyproxy.platform.tasks import cancel_all
from keyproxy.store.ledger import redis_codec as wire
from keyproxy.store.ledger.backend import REAP_PORTION
from keyproxy.store.ledger.ledger_script import GenerationLost, LedgerScript
from keyproxy.store.ledger.postgres_backend import PostgresLedger, WindowState
from keyproxy.store.postgres.database import Database, StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

#: Shares expire and are charged when their generation is silent for this long. It syncs at least every five minutes.
_SHARE_SECONDS: Final = 3600.0

#: Windows in one message to PostgreSQL.
_WINDOWS_MAX: Final = 200

#: Attempts to send a message that needs a larger share: other proxies may take what was fetched for it.
_ATTEMPTS: Final = 4

_BUSY_SECONDS: Final = 0.004

#: Every proxy learns of a changed window at about the same time. One of them reads it again for all, if their calls are
#: spread over this time.
_SPREAD_SECONDS: Final = 0.2

#: Changed windows in one call. Further ones are read again within half a minute, as all windows in use are.
_CHANGED_MAX: Final = 1_000


class RedisLedger:
    """Leases from Redis, shares from PostgreSQL. Implements the port LedgerBackend."""

    def __init__(
        self,
        url: str,
        database: Database,
        *,
        lease_seconds: float,
        timeout_seconds: float = 2.0,
        alert_percentages: Sequence[int] = (),
    ) -> None:
        """`timeout_seconds` bounds one call to Redis. Opens no connection. Raises ValueError if the URL is invalid."""
        self._script = LedgerScript(url, database, timeout_seconds=timeout_seconds)
        self._shares = PostgresLedger(database, lease_seconds=_SHARE_SECONDS, alert_percentages=alert_percentages)
        self._alert_percentages = alert_percentages
        self._lease_seconds = lease_seconds
        self._timeout_seconds = timeout_seconds
        self._name = secrets.token_hex(8)
        #: The generation that each holder of this process uses.
        self._spoken: dict[str, str] = {}
        self._stocking = asyncio.Lock()
        #: Whether a share has run low, or an alert is due, since the last exchange began.
        self._is_low = False
        self._stock_task: asyncio.Task[None] | None = None
        self._refresh_task: asyncio.Task[None] | None = None
        #: Windows that have changed in PostgreSQL, with what to do then, and when this process noticed the latest change.
        self._changed: dict[Window, Callable[[Window], None]] = {}
        self._changed_at = 0.0
        self._is_closed = False

    async def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> Sequence[LeaseGrant] | None:
        generation = await self._script.generation()
        try:
            if self._spoken.setdefault(holder, generation) != generation:
                # Its leases were paid for by a generation that has ended.
                raise GenerationLost
            answer = await self._said(generation, holder, serial, wire.packed_lines(lines))
        except GenerationLost:
            answer = None
        if answer is None:
            del self._spoken[holder]
            return None
        is_low, replies = answer
        if is_low:
            self._stock_soon(generation)
        return wire.replies(replies)

    async def reap(self, portion: int = REAP_PORTION) -> bool:
        """See the port. Also sends PostgreSQL the reports that are due."""
        generation = await self._script.generation()
        dead: list[str] = []
        with contextlib.suppress(GenerationLost):
            dead = await self._script.call("dead", generation)
            for holder in dead:
                await self._end(generation, holder, only_dead=True)
            await self._stock(generation, is_urgent=False)
        return await self._shares.reap(portion) or bool(dead)

    async def forget(self, portion: int) -> bool:
        """See the port. Keys in Redis have an expiry."""
        return await self._shares.forget(portion)

    async def end(self, holder: str) -> None:
        generation = self._spoken.pop(holder, "")
        if generation and generation == await self._script.generation():
            with contextlib.suppress(GenerationLost):
                await self._end(generation, holder, only_dead=False)
                # The last holder to end returns the shares.
                await self._stock(generation, is_urgent=False, is_last=True)

    async def windows(self, windows: Sequence[Window]) -> Sequence[WindowState | None]:
        """The current state of windows, in their order; None for a window that was never used."""
        in_database = await self._shares.windows(windows)
        generation = await self._script.generation()
        try:
            rows = await self._script.call("stand", generation, windows=[wire.named(window) for window in windows])
        except GenerationLost:
            return in_database
        return [wire.window_state(row, known) for row, known in zip(rows, in_database, strict=True)]

    async def close(self) -> None:
        """Close connections to Redis. The store closes the database."""
        self._is_closed = True
        await cancel_all([task for task in (self._stock_task, self._refresh_task) if task is not None])
        await self._script.close()

    # -- leases, out of shares

    async def _said(self, generation: str, holder: str, serial: int, lines: bytes) -> tuple[bool, bytes] | None:
        """Send a message until it is processed with sufficient shares.

        Return whether a share has run low, and the replies; None if this holder has ended.
        """
        message = {"holder": holder, "serial": serial, "lease_seconds": self._lease_seconds}
        failure: StoreUnavailable | None = None
        for attempt in range(1, _ATTEMPTS + 1):
            is_final = attempt == _ATTEMPTS or failure is not None
            answer, replies = await self._script.run("sync", generation, lines, {**message, "is_final": is_final})
            if answer == "late":
                raise StoreUnavailable("a later message of this holder was processed already")
            if answer == "short":
                try:
                    await self._stock(generation)
                except StoreUnavailable as error:
                    # The final attempt still processes what does not need PostgreSQL.
                    failure = error
            elif answer == "ended":
                return None
            elif answer["short"]:
                # "Could not ask" is not "no": waiting requests fail with that reason. All lines are sent again.
                raise failure or StoreUnavailable("timeout: could not fetch shares of windows in time")
            else:
                return answer["is_low"], replies
        raise AssertionError("the last attempt is final")

    async def _end(self, generation: str, holder: str, *, only_dead: bool) -> None:
        cursor = await self._script.call("end", generation, holder=holder, cursor="0", only_dead=only_dead)
        while cursor:
            cursor = await self._script.call("end", generation, holder=holder, cursor=str(cursor), only_dead=only_dead)

    # -- shares, out of windows

    def refresh_soon(self, window: Window, then: Callable[[Window], None]) -> None:
        """Read a window again that was changed in PostgreSQL by a credit, and continue with `then`."""
        if self._is_closed or len(self._changed) >= _CHANGED_MAX:
            return
        self._changed[window] = then
        self._changed_at = asyncio.get_running_loop().time()
        if self._refresh_task is None or self._refresh_task.done():
            self._refresh_task = self._in_background(self._refresh())

    async def _refresh(self) -> None:
        now = asyncio.get_running_loop().time
        while self._changed:
            await asyncio.sleep(random.uniform(0.0, _SPREAD_SECONDS))  # noqa: S311 - spreads calls
            changed, self._changed = self._changed, {}
            await self.refresh(list(changed), seconds=now() - self._changed_at)
            for window, then in changed.items():
                then(window)

    async def refresh(self, windows: Sequence[Window], *, seconds: float = 0.0) -> None:
        """Read windows again, unless that was done in the last `seconds`. Raises StoreUnavailable, GenerationLost."""
        generation = await self._script.generation()
        asked = [wire.named(window) for window in windows]
        if await self._script.call("refresh", generation, windows=asked, seconds=seconds):
            await self._stock(generation)

    def _stock_soon(self, generation: str) -> None:
        self._is_low = True
        if self._stock_task is None or self._stock_task.done():
            self._stock_task = self._in_background(self._stock_while_low(generation))

    async def _stock_while_low(self, generation: str) -> None:
        while self._is_low:
            self._is_low = False
            await self._stock(generation)

    def _in_background(self, exchange: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self._attempt(exchange))

    async def _attempt(self, exchange: Coroutine[Any, Any, None]) -> None:
        try:
            await exchange
        except (StoreUnavailable, StoreConflict, GenerationLost) as error:
            # A request that needs the share gets the error itself: nothing is granted that was not fetched.
            _log.debug("could not prefetch shares: %s", error)
        except Exception:  # noqa: BLE001 - the outermost boundary of this task, which is never awaited
            _log.exception("prefetching shares failed")

    async def _stock(self, generation: str, *, is_urgent: bool = True, is_last: bool = False) -> None:
        """Fetch the shares that are needed; unless `is_urgent`, also send PostgreSQL the reports that are due.

        `is_last`: only if no holder is left. Raises StoreUnavailable, GenerationLost.
        """
        ask = {"by": self._name, "most": _WINDOWS_MAX, "is_urgent": is_urgent, "is_last": is_last}
        now = asyncio.get_running_loop().time
        async with self._stocking:
            give_up = now() + self._timeout_seconds
            while True:
                turn = await self._script.call("stock", generation, **ask)
                if turn == "done":
                    return
                if turn != "busy":
                    is_more = await self._exchange(generation, turn["serial"], turn["lines"])
                    if now() >= give_up or not (is_more or len(turn["lines"]) == _WINDOWS_MAX):
                        return
                elif now() >= give_up:
                    raise StoreUnavailable("timeout: another proxy has not finished its exchange with PostgreSQL")
                else:
                    await asyncio.sleep(_BUSY_SECONDS)

    async def _exchange(self, generation: str, serial: int, rows: Sequence[Sequence[Any]]) -> bool:
        """Send one message of this generation to PostgreSQL, and store the reply in Redis.

        Return whether there is more to report at once.
        """
        lines = {row[1]: (row[0], wire.share_line(row[1:])) for row in rows}
        stocked: list[tuple[object, ...]] = []
        is_heard = is_more = False
        try:
            replies = await self._shares.sync(f"redis:{generation}", serial, [line for _, line in lines.values()])
            is_heard = True
            if replies is None:
                _log.warning("PostgreSQL has expired the shares of Redis after a silence; they are charged in full")
                await self._script.call("void", generation)
                self._script.forget(generation)
                raise GenerationLost
            if any(not reply.lease for reply in replies):
                # PostgreSQL now has our shares on record, and "could not ask" is not "used up".
                raise StoreUnavailable("PostgreSQL has failed over and waits for lease reports")
            stocked = [wire.stocked(*lines[reply.lease], reply, self._alert_percentages) for reply in replies]
        finally:
            # Also when PostgreSQL has not responded: this ends the turn, so that another proxy can try.
            if stocked or not is_heard or not rows:
                is_more = await self._script.call("stocked", generation, by=self._name, rows=stocked, is_heard=is_heard)
        return is_more
