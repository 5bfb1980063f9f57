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
import hashlib
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Window
from keyproxy.store.ledger import redis_codec as wire
from keyproxy.store.ledger.backend import REAP_PORTION
from keyproxy.store.ledger.postgres_backend import PostgresLedger, WindowState
from keyproxy.store.postgres.database import Database, StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

_SCRIPT: Final = Path(__file__).with_suffix("").with_name("ledger.lua").read_bytes()
_SCRIPT_SHA: Final = hashlib.sha1(_SCRIPT, usedforsecurity=False).hexdigest()

#: Shares expire and are charged when their generation is silent for this long. It syncs at least every five minutes.
_SHARE_SECONDS: Final = 3600.0

#: Windows in one message to PostgreSQL.
_WINDOWS_MAX: Final = 200

#: Attempts to send a message that needs a larger share: other proxies may take what was fetched for it.
_ATTEMPTS: Final = 4

_BUSY_SECONDS: Final = 0.004
_CONNECTIONS_MAX: Final = 8


class _Lost(Exception):
    """The generation does not exist any more."""


class RedisLedger:
    """Leases from Redis, shares from PostgreSQL. Implements the port LedgerBackend."""

    def __init__(
        self,
        url: str,
        database: Database,
        *,
        lease_seconds: float,
        alert_percentages: Sequence[int] = (),
        timeout_seconds: float = 2.0,
    ) -> None:
        """`timeout_seconds` bounds one call to Redis. Opens no connection. Raises ValueError if the URL is invalid."""
        self._database = database
        self._shares = PostgresLedger(database, lease_seconds=_SHARE_SECONDS, alert_percentages=alert_percentages)
        self._lease_seconds = lease_seconds
        self._timeout_seconds = timeout_seconds
        # No retries: a repeated message is rejected as late. The ledger client sends a new one.
        self._client = Redis.from_url(
            url, protocol=2, retry=Retry(NoBackoff(), 0), max_connections=_CONNECTIONS_MAX,
            socket_timeout=timeout_seconds, socket_connect_timeout=timeout_seconds,
        )  # fmt: skip
        self._name = secrets.token_hex(8)
        self._key = ""
        self._generation = ""
        #: The generation that each holder of this process uses.
        self._spoken: dict[str, str] = {}
        self._stocking = asyncio.Lock()
        self._stock_task: asyncio.Task[None] | None = None

    async def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> Sequence[LeaseGrant] | None:
        """See the port."""
        generation = await self._present()
        try:
            if self._spoken.setdefault(holder, generation) != generation:
                # Its leases were paid for by a generation that has ended.
                raise _Lost
            answer = await self._said(generation, holder, serial, wire.packed_lines(lines))
        except _Lost:
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
        generation = await self._present()
        dead: list[str] = []
        with contextlib.suppress(_Lost):
            dead = await self._call("dead", generation)
            for holder in dead:
                await self._end(generation, holder, only_dead=True)
            await self._stock(generation, is_urgent=False)
        return await self._shares.reap(portion) or bool(dead)

    async def forget(self, portion: int) -> bool:
        """See the port. Keys in Redis have an expiry."""
        return await self._shares.forget(portion)

    async def end(self, holder: str) -> None:
        """See the port."""
        generation = self._spoken.pop(holder, "")
        if generation and generation == await self._present():
            with contextlib.suppress(_Lost):
                await self._end(generation, holder, only_dead=False)
                # The last holder to end returns the shares.
                await self._stock(generation, is_urgent=False, is_last=True)

    async def windows(self, windows: Sequence[Window]) -> Sequence[WindowState | None]:
        """The current state of windows, in their order; None for a window that was never used."""
        in_database = await self._shares.windows(windows)
        generation = await self._present()
        try:
            rows = await self._call(
                "stand", generation, windows=[(*window.pool, window.measure) for window in windows]
            )  # fmt: skip
        except _Lost:
            return in_database
        return [wire.window_state(row, known) for row, known in zip(rows, in_database, strict=True)]

    async def close(self) -> None:
        """Close connections to Redis. The store closes the database."""
        if self._stock_task is not None:
            self._stock_task.cancel()
            await asyncio.gather(self._stock_task, return_exceptions=True)
        await self._client.aclose()

    # -- leases, out of shares

    async def _said(self, generation: str, holder: str, serial: int, lines: bytes) -> tuple[bool, bytes] | None:
        """Send a message until it is processed with sufficient shares.

        Return whether a share has run low, and the replies; None if this holder has ended.
        """
        message = {"holder": holder, "serial": serial, "lease_seconds": self._lease_seconds}
        failure: StoreUnavailable | None = None
        for attempt in range(1, _ATTEMPTS + 1):
            is_final = attempt == _ATTEMPTS or failure is not None
            answer, replies = await self._run("sync", generation, lines, {**message, "is_final": is_final})
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
        cursor = await self._call("end", generation, holder=holder, cursor="0", only_dead=only_dead)
        while cursor:
            cursor = await self._call("end", generation, holder=holder, cursor=str(cursor), only_dead=only_dead)

    # -- shares, out of windows

    def _stock_soon(self, generation: str) -> None:
        if self._stock_task is None or self._stock_task.done():
            self._stock_task = asyncio.get_running_loop().create_task(self._stock_ahead(generation))

    async def _stock_ahead(self, generation: str) -> None:
        try:
            await self._stock(generation)
        except (StoreUnavailable, StoreConflict, _Lost) as error:
            # A request that needs the share gets the error itself: nothing is granted that was not fetched.
            _log.debug("could not prefetch shares: %s", error)
        except Exception:  # noqa: BLE001 - the outermost boundary of this task, which is never awaited
            _log.exception("prefetching shares failed")

    async def _stock(self, generation: str, *, is_urgent: bool = True, is_last: bool = False) -> None:
        """Fetch the shares that are needed; unless `is_urgent`, also send PostgreSQL the reports that are due.

        `is_last`: only if no holder is left. Raises StoreUnavailable, _Lost.
        """
        ask = {"by": self._name, "most": _WINDOWS_MAX, "is_urgent": is_urgent, "is_last": is_last}
        now = asyncio.get_running_loop().time
        async with self._stocking:
            give_up = now() + self._timeout_seconds
            while True:
                turn = await self._call("stock", generation, **ask)
                if turn == "done":
                    return
                if turn != "busy":
                    await self._exchange(generation, turn["serial"], turn["lines"])
                    if len(turn["lines"]) < _WINDOWS_MAX or now() >= give_up:
                        return
                elif now() >= give_up:
                    raise StoreUnavailable("timeout: another proxy has not finished its exchange with PostgreSQL")
                else:
                    await asyncio.sleep(_BUSY_SECONDS)

    async def _exchange(self, generation: str, serial: int, rows: Sequence[Sequence[Any]]) -> None:
        """Send one message of this generation to PostgreSQL, and store the reply in Redis."""
        lines = {row[1]: (row[0], wire.share_line(row[1:])) for row in rows}
        told: list[tuple[object, ...]] = []
        is_heard = False
        try:
            replies = await self._shares.sync(f"redis:{generation}", serial, [line for _, line in lines.values()])
            is_heard = True
            if replies is None:
                _log.warning("PostgreSQL has expired the shares of Redis after a silence; they are charged in full")
                await self._call("void", generation)
                self._forget(generation)
                raise _Lost
            if any(not reply.lease for reply in replies):
                # PostgreSQL now has our shares on record, and "could not ask" is not "used up".
                raise StoreUnavailable("PostgreSQL has failed over and waits for lease reports")
            told = [wire.told(*lines[reply.lease], reply) for reply in replies]
        finally:
            # Also when PostgreSQL has not responded: this ends the turn, so that another proxy can try.
            if told or not is_heard or not rows:
                await self._call("stocked", generation, by=self._name, rows=told, is_heard=is_heard)

    # -- the server

    async def _present(self) -> str:
        """The current generation; starts one if there is none."""
        if not self._key:
            (row,) = await self._database.fetch("ledger_id")
            self._key = f"keyproxy:{{{row['id']}}}:{wire.VERSION}"
        if not self._generation:
            await self._refuse_eviction()
            self._generation = await self._call("begin", secrets.token_hex(8))
        return self._generation

    def _forget(self, generation: str) -> None:
        if self._generation == generation:
            self._generation = ""

    async def _refuse_eviction(self) -> None:
        memory = await self._command("INFO", "memory")
        policy = memory.get("maxmemory_policy", "noeviction")
        if int(memory.get("maxmemory", 0)) and policy != "noeviction":
            raise StoreUnavailable(
                f"Redis may evict keys (maxmemory-policy {policy}): the ledger requires noeviction, or no maxmemory"
            )

    async def _call(self, operation: str, generation: str, /, **ask: object) -> Any:
        """Run one operation of ledger.lua. Raises StoreUnavailable; _Lost if the generation has ended."""
        answer, _ = await self._run(operation, generation, b"", ask)
        return answer

    async def _run(self, operation: str, generation: str, lines: bytes, ask: Mapping[str, object]) -> tuple[Any, bytes]:
        """As `_call`, with the lines of a message. Return the result, and the packed replies after it."""
        arguments = (1, self._key, operation, generation, orjson.dumps(ask), lines)
        try:
            answered = await self._command("EVALSHA", _SCRIPT_SHA, *arguments)
        except NoScriptError:
            answered = await self._command("EVAL", _SCRIPT, *arguments)
        head, _, replies = answered.partition(b"\n")
        answer = orjson.loads(head)
        if answer == "lost":
            _log.warning("Redis has lost its memory, or may have: starting a new generation, existing leases end")
            self._forget(generation)
            raise _Lost
        return answer, replies

    async def _command(self, *words: object) -> Any:
        try:
            # On cancellation or timeout redis-py closes the connection: its next reply would belong to this command.
            async with asyncio.timeout(self._timeout_seconds):
                return await self._client.execute_command(*words)  # type: ignore[no-untyped-call]
        except NoScriptError:
            raise
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreUnavailable(f"Redis: {type(error).__name__}: {error}") from error
