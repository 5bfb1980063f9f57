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
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final

import asyncpg

from keyproxy.store.postgres.connecting import CONNECT_SECONDS, Connection, Connector
from keyproxy.store.postgres.failures import NO_RESPONSE, NotPrimaryError, StoreUnavailable, first_line

_log = logging.getLogger(__name__)

_IDLE_CONNECTION_SECONDS: Final = 300.0

#: How long the store uses the existing connections before it tries to open another one.
_BACK_OFF_SECONDS: Final = 10.0

#: How long no connection must be refused after that until a shortage is over. Every pool tries to get one at the start.
_PROBE_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 0.1


class Shortage:
    """Whether the server refuses connections because there are too many. Shared by all parts of one store.

    The end of the back-off does not end a shortage, since nothing has been granted yet. Then every pool reconnects, and
    the shortage ends only if at least one of them gets a connection and none is refused one.
    """

    def __init__(self) -> None:
        #: Why the server refused a connection; empty if there is no shortage.
        self.because = ""
        #: Called when the server refuses a connection, so that parts that can do without one release it.
        self.release: list[Callable[[], None]] = []
        #: Called at the end of the back-off, so that every pool tries to get a connection.
        self.reconnect: list[Callable[[], None]] = []
        self._back_off_until = 0.0
        self._is_granted = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_backing_off(self) -> bool:
        """Whether to avoid opening connections now."""
        return bool(self.because) and asyncio.get_running_loop().time() < self._back_off_until

    def refused(self, error: Exception) -> None:
        """Record that the server refused a connection."""
        if not self.because:
            _log.warning("the server grants fewer connections than configured, continuing with fewer: %s", error)
        self.because = f"{first_line(error)} (SQLSTATE 53300)"
        self._is_granted = False
        loop = asyncio.get_running_loop()
        self._back_off_until = loop.time() + _BACK_OFF_SECONDS
        self.close()
        self._timer = loop.call_at(self._back_off_until, self._probe)
        for release in self.release:
            release()

    def granted(self) -> None:
        """Record that a pool has a connection for its user."""
        if not self.is_backing_off:
            self._is_granted = True

    def close(self) -> None:
        """Stop probing."""
        if self._timer is not None:
            self._timer.cancel()

    def _probe(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_PROBE_SECONDS, self._review)
        for reconnect in self.reconnect:
            reconnect()

    def _review(self) -> None:
        if self._is_granted:
            _log.warning("the server grants connections again")
            self.because = ""
        else:
            self._probe()


class _Semaphore:
    """Admits at most `limit` at a time, in order of arrival."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._inside = 0
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()

    async def acquire(self) -> None:
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
                self.release()
            raise

    def release(self) -> None:
        """End the turn, and give it to the next one."""
        self._inside -= 1
        while self._waiting and self._inside < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._inside += 1
                turn.set_result(None)


class ConnectionPool:
    """A pool of connections: see the module. `lender`: the pool to borrow from during a shortage."""

    def __init__(
        self,
        connector: Connector,
        size_max: int,
        command_seconds: float,
        *,
        shortage: Shortage,
        lender: ConnectionPool | None = None,
    ) -> None:
        self._connector = connector
        self._size_max = size_max
        self._command_seconds = command_seconds
        self._shortage = shortage
        self._lender = lender
        self._semaphore = _Semaphore(size_max)
        self._connections: asyncpg.Pool[asyncpg.Record] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        shortage.reconnect.append(lambda: self._run(self._reconnect()))
        if lender is not None:
            shortage.release.append(lambda: self._run(self._replace()))

    async def open(self) -> None:
        """Create the pool, without connecting."""
        if self._connections is None:
            self._connections = await self._made()

    async def close(self) -> None:
        """Close all connections; those in use are cut after a moment."""
        connections, self._connections = self._connections, None
        if connections is not None:
            await _closed(connections)
        if self._lender is None:
            self._shortage.close()
        await asyncio.gather(*self._tasks)

    async def drop(self) -> None:
        """Replace every connection before it is used again; those in use are closed when they come back."""
        if self._connections is not None:
            await self._connections.expire_connections()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """A connection to the primary. Raises StoreUnavailable, NotPrimaryError, or what asyncpg raises."""
        if self._lender is not None and self._shortage.is_backing_off:
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
                self._semaphore.release()

    async def _take(self) -> tuple[asyncpg.Pool[asyncpg.Record], Any]:
        """Wait for a turn and a connection. Raises TooManyConnectionsError if this pool has none and gets none."""
        refused: asyncpg.TooManyConnectionsError | None = None
        try:
            async with asyncio.timeout(self._connector.seconds):
                while True:
                    try:
                        taken = await self._take_once()
                    except asyncpg.TooManyConnectionsError as error:
                        refused = error
                        await self._make_do(error)
                    else:
                        if self._shortage.because:
                            self._shortage.granted()
                        return taken
        except TimeoutError:
            if refused is not None:
                raise refused from None
            raise

    async def _take_once(self) -> tuple[asyncpg.Pool[asyncpg.Record], Any]:
        if not self._shortage.is_backing_off:
            self._semaphore.limit = self._size_max
        await self._semaphore.acquire()
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
                self._semaphore.release()

    async def _make_do(self, error: asyncpg.TooManyConnectionsError) -> None:
        """Continue with the existing connections, or wait briefly for one. Raises the error if the pool can borrow."""
        self._shortage.refused(error)
        have = 0 if self._connections is None else self._connections.get_size()
        if have:
            self._semaphore.limit = have
        elif self._lender is not None:
            raise error
        else:
            # Other parts of the store release theirs now.
            await asyncio.sleep(_RETRY_SECONDS)

    async def _connect(self, *_: Any, **__: Any) -> Connection:
        return await self._connector.connect(command_seconds=self._command_seconds)

    async def _made(self) -> asyncpg.Pool[asyncpg.Record]:
        return await asyncpg.create_pool(
            min_size=0,
            max_size=self._size_max,
            max_inactive_connection_lifetime=_IDLE_CONNECTION_SECONDS,
            connection_class=Connection,
            connect=self._connect,
        )

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reconnect(self) -> None:
        """Get a connection and return it, so that the shortage is noticed, or its end, without requests as well."""
        if self._connections is None:
            return
        with contextlib.suppress(*NO_RESPONSE, NotPrimaryError, StoreUnavailable):
            connections, connection = await self._take()
            try:
                await connections.release(connection)
            finally:
                self._semaphore.release()

    async def _replace(self) -> None:
        """Release the connections of this pool to the store's main part."""
        connections = self._connections
        if connections is not None and connections.get_size():
            self._connections = await self._made()
            await _closed(connections)


async def _closed(connections: asyncpg.Pool[asyncpg.Record]) -> None:
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await connections.close()
    except NO_RESPONSE:
        connections.terminate()
