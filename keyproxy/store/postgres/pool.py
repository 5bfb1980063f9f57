"""Connection pool of one part of the store: connections are opened on demand, reused, and replaced after a failover.

A server may grant fewer connections than are configured (`CONNECTION LIMIT`, `max_connections`). Then a pool uses the
connections that it has, and its users take turns. A pool without any borrows from the pool of the store's main part and
releases its own, so that the parts of a store do not starve each other. See `Shortage`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import asyncpg

from keyproxy.store.postgres.connecting import CONNECT_SECONDS, Connection, Target
from keyproxy.store.postgres.failures import NO_ANSWER, StoreUnavailable, first_line

_log = logging.getLogger(__name__)

_IDLE_CONNECTION_SECONDS: Final = 300.0

#: How long the store uses the existing connections before it tries to open another one.
_SHORT_SECONDS: Final = 10.0
_RETRY_SECONDS: Final = 0.1


class Shortage:
    """Whether the server refuses connections because there are too many. Shared by all parts of one store."""

    def __init__(self) -> None:
        self.because = ""
        #: Called when the server refuses a connection, so that parts that can do without one release it.
        self.relief: list[Callable[[], None]] = []
        self._until = 0.0

    @property
    def is_felt(self) -> bool:
        """Whether to avoid opening connections now."""
        return bool(self.because) and asyncio.get_running_loop().time() < self._until

    def note(self, error: Exception) -> None:
        """Record that the server refused a connection."""
        if not self.because:
            _log.warning("the server grants fewer connections than configured, continuing with fewer: %s", error)
        self.because = f"{first_line(error)} (SQLSTATE 53300)"
        self._until = asyncio.get_running_loop().time() + _SHORT_SECONDS
        for let_go in self.relief:
            let_go()

    def end(self) -> None:
        """Record that the server granted a connection."""
        if self.because and not self.is_felt:
            _log.warning("the server grants connections again")
            self.because = ""


class _Turns:
    """Admits at most `limit` at a time, in order of arrival."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._inside = 0
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()

    async def enter(self) -> None:
        """Wait for a turn."""
        if self._inside < self.limit and not self._waiting:
            self._inside += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # The turn was granted at the same moment: pass it on.
                self.leave()
            raise

    def leave(self) -> None:
        """End the turn."""
        self._inside -= 1
        while self._waiting and self._inside < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._inside += 1
                turn.set_result(None)


class Pool:
    """A pool of connections: see the module. `lender`: the pool to borrow from during a shortage."""

    def __init__(
        self, target: Target, size_max: int, command_seconds: float, *, shortage: Shortage, lender: Pool | None = None
    ) -> None:
        self._target = target
        self._size_max = size_max
        self._command_seconds = command_seconds
        self._shortage = shortage
        self._lender = lender
        self._turns = _Turns(size_max)
        self._connections: asyncpg.Pool[asyncpg.Record] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        if lender is not None:
            shortage.relief.append(self._let_go)

    async def open(self) -> None:
        """Create the pool, without connecting."""
        if self._connections is None:
            self._connections = await self._made()

    async def close(self) -> None:
        """Close all connections; those in use are cut after a moment."""
        connections, self._connections = self._connections, None
        if connections is not None:
            await _closed(connections)
        await asyncio.gather(*self._closing)

    async def drop(self) -> None:
        """Replace every connection before it is used again; those in use are closed when they come back."""
        if self._connections is not None:
            await self._connections.expire_connections()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """A connection to the primary. Raises StoreUnavailable, NotPrimaryError, or what asyncpg raises."""
        if self._lender is not None and self._shortage.is_felt:
            async with self._lender.connection() as borrowed:
                yield borrowed
            return
        try:
            taken = await self._take()
        except asyncpg.TooManyConnectionsError:
            if self._lender is None:
                raise
            async with self._lender.connection() as borrowed:
                yield borrowed
            return
        connections, connection = taken
        try:
            yield connection
        finally:
            try:
                await connections.release(connection)
            finally:
                self._turns.leave()

    async def _take(self) -> tuple[asyncpg.Pool[asyncpg.Record], Any]:
        """Wait for a turn and a connection. Raises TooManyConnectionsError if this pool has none and gets none."""
        refused: asyncpg.TooManyConnectionsError | None = None
        try:
            async with asyncio.timeout(self._target.seconds):
                while True:
                    try:
                        return await self._take_once()
                    except asyncpg.TooManyConnectionsError as error:
                        refused = error
                        await self._make_do(error)
        except TimeoutError:
            if refused is not None:
                raise refused from None
            raise

    async def _take_once(self) -> tuple[asyncpg.Pool[asyncpg.Record], Any]:
        if not self._shortage.is_felt:
            self._turns.limit = self._size_max
        await self._turns.enter()
        is_taken = False
        try:
            connections = self._connections
            if connections is None:
                raise StoreUnavailable("the store is closed")
            connection = await connections.acquire()
            is_taken = True
            return connections, connection
        finally:
            if not is_taken:
                self._turns.leave()

    async def _make_do(self, error: asyncpg.TooManyConnectionsError) -> None:
        """Continue with the existing connections, or wait briefly for one. Raises the error if the pool can borrow."""
        self._shortage.note(error)
        have = 0 if self._connections is None else self._connections.get_size()
        if have:
            self._turns.limit = have
        elif self._lender is not None:
            raise error
        else:
            # Other parts of the store release theirs now.
            await asyncio.sleep(_RETRY_SECONDS)

    async def _connect(self, *_: Any, **__: Any) -> Connection:
        connection = await self._target.connect(command_seconds=self._command_seconds)
        self._shortage.end()
        return connection

    async def _made(self) -> asyncpg.Pool[asyncpg.Record]:
        return await asyncpg.create_pool(
            min_size=0, max_size=self._size_max, max_inactive_connection_lifetime=_IDLE_CONNECTION_SECONDS,
            connection_class=Connection, connect=self._connect,
        )  # fmt: skip

    def _let_go(self) -> None:
        """Release the connections of this pool to the store's main part."""
        task = asyncio.get_running_loop().create_task(self._replace())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _replace(self) -> None:
        connections = self._connections
        if connections is not None and connections.get_size():
            self._connections = await self._made()
            await _closed(connections)


async def _closed(connections: asyncpg.Pool[asyncpg.Record]) -> None:
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await connections.close()
    except NO_ANSWER:
        connections.terminate()
