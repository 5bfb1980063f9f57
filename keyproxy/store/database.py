"""The one door to PostgreSQL: named statements out, rows in, and every way of failing told in two words.

`StoreUnavailable` is "we could not ask": no connection, a timeout, a server that is starting or has failed over, a schema
that is not there. It is never an answer. `StoreConflict` is the server's "no" to a change: a constraint.

Behind a pooler in transaction mode a prepared statement may meet another server connection than the one it was prepared
on. The first time that happens the door changes its ways: no statement is kept, and each runs in a transaction, which
such a pooler does not split. Nobody has to configure that. Until then a statement that is not there must be noticed, and
never be another client's of the same name: names are unique.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import asyncpg

from keyproxy.store import queries
from keyproxy.store.outage import Outage

_log = logging.getLogger(__name__)

_ACQUIRE_SECONDS: Final = 2.0
_IDLE_CONNECTION_SECONDS: Final = 300.0

#: No answer. asyncpg says InternalClientError when a connection is lost in the middle of its own housekeeping.
_NO_ANSWER: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)

#: A prepared statement that is not there, or there already: signs of a pooler in transaction mode.
_POOLER_SIGNS: Final = (
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.DuplicatePreparedStatementError,
    asyncpg.ProtocolViolationError,
)

#: The server has heard the question and says no.
_CONFLICTS: Final = (
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
    asyncpg.RaiseError,
)

Row = asyncpg.Record


class StoreUnavailable(Exception):
    """The store could not be asked. Says nothing about the answer."""


class StoreConflict(Exception):
    """The store refused a change. `constraint` is the name of the constraint, if it was one."""

    def __init__(self, message: str, constraint: str) -> None:
        super().__init__(message)
        self.constraint = constraint


class _Connection(asyncpg.Connection):
    """Gives prepared statements names that no other client gives, as asyncpg's FAQ advises for poolers."""

    def _get_unique_id(self, prefix: str) -> str:
        return f"keyproxy_{prefix}_{secrets.token_hex(8)}"


class Transaction:
    """Statements inside one transaction. None of them is kept by the server: see the module."""

    def __init__(self, connection: Any, statements: dict[str, str]) -> None:
        self._connection = connection
        self._statements = statements

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        """All rows of a named statement."""
        statement = await self._connection.prepare(self._statements[name], name="")
        rows: Sequence[Row] = await statement.fetch(*arguments)
        return rows

    async def fetch_row(self, name: str, *arguments: object) -> Row | None:
        """The first row of a named statement, None if it has none."""
        rows = await self.fetch(name, *arguments)
        return rows[0] if rows else None

    @contextlib.asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """What fails inside is undone, and the transaction can go on. Raises StoreUnavailable or StoreConflict."""
        with _told_in_two_words():
            async with self._connection.transaction():
                yield


class Door(Protocol):
    """What takes statements: the database itself, or one transaction of it, see `Joined`."""

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        """All rows of one named statement. Raises StoreUnavailable or StoreConflict."""
        ...

    def transaction(self) -> contextlib.AbstractAsyncContextManager[Transaction]:
        """Statements that count together or not at all. Raises StoreUnavailable or StoreConflict."""
        ...


class Joined:
    """A transaction in place of the database: whatever is done through this door counts together with the rest of it."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        """As Database's."""
        with _told_in_two_words():
            return await self._transaction.fetch(name, *arguments)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """As Database's; it ends with the transaction that was joined."""
        async with self._transaction.savepoint():
            yield self._transaction


class Database:
    """See the module. A connection is made when it is first needed, so that opening never fails."""

    def __init__(self, dsn: str, *, pool_size_max: int, statement_timeout_seconds: float) -> None:
        self._dsn = dsn
        self._pool_size_max = pool_size_max
        self._timeout_seconds = statement_timeout_seconds
        self._statements = queries.load()
        self._pool: asyncpg.Pool[Row] | None = None
        self._keeps_statements = True
        #: Whether the last statement was answered; neither, as long as none was sent.
        self.is_up = False
        self.is_down = False
        self.down_because = ""
        #: Logs outages; parts of one store share it. `is_main`: this one is asked all the time.
        self.outage = Outage("the store")
        self.is_main = True

    async def open(self) -> None:
        """Make the pool, without connecting."""
        self._pool = await asyncpg.create_pool(
            self._dsn,
            min_size=0,
            max_size=self._pool_size_max,
            max_inactive_connection_lifetime=_IDLE_CONNECTION_SECONDS,
            connection_class=_Connection,
            timeout=_ACQUIRE_SECONDS,
            command_timeout=self._timeout_seconds,
        )

    async def close(self) -> None:
        """Close all connections; those in use are cut after a moment."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(_ACQUIRE_SECONDS):
                await pool.close()
        except _NO_ANSWER:
            pool.terminate()

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        """All rows of one named statement. Raises StoreUnavailable or StoreConflict."""
        try:
            rows = await self._fetch(name, *arguments)
        except StoreUnavailable as error:
            self._note_down(str(error))
            raise
        self._note_up()
        return rows

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """Statements that count together or not at all. Raises StoreUnavailable or StoreConflict."""
        async with self._connection() as connection, connection.transaction():
            yield Transaction(connection, self._statements)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        if self._pool is None:
            raise StoreUnavailable("the store is closed")
        with _told_in_two_words():
            async with self._pool.acquire(timeout=_ACQUIRE_SECONDS) as connection:
                yield connection

    async def _fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        if self._keeps_statements:
            try:
                async with self._connection() as connection:
                    rows: Sequence[Row] = await connection.fetch(self._statements[name], *arguments)
                    return rows
            except StoreUnavailable as error:
                if not isinstance(error.__cause__, _POOLER_SIGNS):
                    raise
            if self._keeps_statements:
                _log.info(
                    "the store is reached through a pooler that shares connections: no statement is kept any more"
                )
                self._keeps_statements = False
        async with self.transaction() as transaction:
            return await transaction.fetch(name, *arguments)

    def _note_up(self) -> None:
        if self.is_main and self.outage.is_on:
            self.outage.answered()
        self.is_up, self.is_down, self.down_because = True, False, ""

    def _note_down(self, why: str) -> None:
        self.outage.met(f"the store cannot be asked: {why}", is_main=self.is_main)
        self.is_up, self.is_down, self.down_because = False, True, why


class Listener:
    """A connection of its own that hears notifications. `lost` is called once, when it ends."""

    def __init__(self, dsn: str, channel: str) -> None:
        self._dsn = dsn
        self._channel = channel
        self._connection: asyncpg.Connection[Row] | None = None

    async def open(self, heard: Callable[[], None], lost: Callable[[], None]) -> None:
        """Listen. Raises StoreUnavailable."""
        try:
            connection = await asyncpg.connect(
                self._dsn, timeout=_ACQUIRE_SECONDS, command_timeout=_ACQUIRE_SECONDS, statement_cache_size=0
            )
            self._connection = connection
            connection.add_termination_listener(lambda _connection: lost())
            await connection.add_listener(self._channel, lambda *_: heard())
        except _NO_ANSWER as error:
            await self.close()
            raise StoreUnavailable(f"{type(error).__name__}: {_first_line(error)}") from error

    async def close(self) -> None:
        """Listen no more."""
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            connection.terminate()


@contextlib.contextmanager
def _told_in_two_words() -> Iterator[None]:
    try:
        yield
    except _CONFLICTS as error:
        raise StoreConflict(_first_line(error), getattr(error, "constraint_name", None) or "") from error
    except _NO_ANSWER as error:
        raise StoreUnavailable(f"{type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
