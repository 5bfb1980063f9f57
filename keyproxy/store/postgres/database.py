"""The only access to PostgreSQL: named statements out, rows in; `failures` classifies every error.

A read-only server is never used: see `connecting`. When a server becomes read-only or shuts down, or a connection drops,
every connection is replaced, so that the database's name is resolved again; results read meanwhile are discarded.

Behind a pooler in transaction mode, a prepared statement may be executed on another server connection than the one it was
prepared on. The first error of this kind switches the mode: no statement is kept, and each runs in a transaction, which
such a pooler does not split. This needs no configuration. Until then a missing statement must cause an error rather than
run another client's statement of the same name, so names are unique.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import asyncpg

from keyproxy.store.outage import Outage
from keyproxy.store.postgres import queries
from keyproxy.store.postgres.connecting import CONNECT_SECONDS, NEEDED, Connector, limits, standing
from keyproxy.store.postgres.failures import (
    NO_RESPONSE,
    POOLER_SIGNS,
    TRY_AGAIN,
    NotPrimaryError,
    StoreConflict,
    StoreUnavailable,
    means_move,
    translated,
)
from keyproxy.store.postgres.pool import ConnectionPool, Shortage

__all__ = [
    "Database",
    "JoinedTransaction",
    "NotificationListener",
    "Row",
    "StatementRunner",
    "StoreConflict",
    "StoreUnavailable",
    "Transaction",
]

_log = logging.getLogger(__name__)

#: How often to retry a statement after a deadlock or a conflict with another transaction.
_ATTEMPTS_MAX: Final = 4
_RETRY_SECONDS: Final = 0.01

#: The start of each transaction on a connection without our settings. These settings end with the transaction.
_SETTLED: Final = """
SELECT pg_catalog.pg_is_in_recovery() AS is_standby, pg_catalog.current_setting('transaction_read_only') AS read_only,
    """


def _settling(timeout_seconds: float) -> str:
    """The statement that applies our settings to a transaction, overriding the role, the database or a pooler."""
    settings = {**NEEDED, **limits(timeout_seconds), "client_encoding": "UTF8"}
    # Skip settings that only matter outside a transaction.
    for name in ("default_transaction_isolation", "idle_session_timeout"):
        settings.pop(name)
    return _SETTLED + ", ".join(f"pg_catalog.set_config('{name}', '{value}', true)" for name, value in settings.items())


Row = asyncpg.Record


class Transaction:
    """Statements inside one transaction. The server keeps none of them prepared: see the module."""

    def __init__(self, connection: Any, statements: Mapping[str, str], where: str) -> None:
        self._connection = connection
        self._statements = statements
        self.where = where

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        """All rows of a named statement."""
        statement = await self._connection.prepare(self._statements[name], name="")
        rows: Sequence[Row] = await statement.fetch(*arguments)
        _check_standing(self._connection)
        return rows

    async def fetch_row(self, name: str, *arguments: object) -> Row | None:
        """The first row of a named statement, None if it has none."""
        rows = await self.fetch(name, *arguments)
        return rows[0] if rows else None

    @contextlib.asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """Roll back a failure inside and let the transaction continue. Raises StoreUnavailable or StoreConflict."""
        with translated(self.where):
            async with self._connection.transaction():
                yield

    async def settle(self, statement: str) -> None:
        """Apply our settings to this transaction. Raises NotPrimaryError on a read-only server."""
        prepared = await self._connection.prepare(statement, name="")
        row = await prepared.fetchrow()
        if row is not None and row["is_standby"]:
            raise NotPrimaryError("this server is a standby, not the primary")
        if row is not None and row["read_only"] == "on":
            raise NotPrimaryError("this server is read-only (default_transaction_read_only = on)")


class StatementRunner(Protocol):
    """Runs statements: the database itself, or one transaction of it, see `JoinedTransaction`."""

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        """All rows of one named statement. Raises StoreUnavailable or StoreConflict."""
        ...

    def transaction(self) -> contextlib.AbstractAsyncContextManager[Transaction]:
        """A transaction: its statements commit or roll back together. Raises StoreUnavailable or StoreConflict."""
        ...


class JoinedTransaction:
    """A transaction in place of the database: all statements through it commit or roll back together."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        """Run a named statement in the transaction: see `StatementRunner`."""
        with translated(self._transaction.where):
            return await self._transaction.fetch(name, *arguments)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """A savepoint in the joined transaction: see `StatementRunner`."""
        async with self._transaction.savepoint():
            yield self._transaction


class Database:
    """The database: see the module. Connections are made when first needed, so that opening never fails."""

    def __init__(
        self, dsn: str, *, pool_size_max: int, statement_timeout_seconds: float, main: Database | None = None
    ) -> None:
        """`main`: the main part of the same store; this part borrows its connections while the server grants no more."""
        self._connector = Connector(dsn)
        #: The shortage of connections, if the server grants fewer than configured; shared by all parts of one store.
        self.shortage: Shortage = Shortage() if main is None else main.shortage
        self.pool: ConnectionPool = ConnectionPool(
            self._connector,
            pool_size_max,
            statement_timeout_seconds,
            shortage=self.shortage,
            lender=None if main is None else main.pool,
        )
        self._statements = queries.load()
        self._settling = _settling(statement_timeout_seconds)
        self._keeps_statements = True
        #: How often every connection was replaced because the database may have moved.
        self.moves = 0
        #: Whether the last statement succeeded or failed; both are false before the first one.
        self.is_up = False
        self.is_down = False
        self.down_because = ""
        #: Logs outages; parts of one store share it. `is_main`: this part is used continuously.
        self.outage = Outage("the store")
        self.is_main = True

    @property
    def where(self) -> str:
        """The servers and the database, for messages."""
        return self._connector.where

    async def open(self) -> None:
        """Create the pool, without connecting."""
        await self.pool.open()

    async def close(self) -> None:
        """Close all connections; those in use are cut after a moment."""
        await self.pool.close()

    async def fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        """All rows of one named statement. Raises StoreUnavailable or StoreConflict."""
        try:
            rows = await self._fetch(name, *arguments)
        except StoreUnavailable as error:
            if self.is_down and isinstance(error.__cause__, TimeoutError):
                # Retry: this is how a connection to a stale address fails.
                await self._move()
            self._note_down(str(error))
            raise
        self._note_up()
        return rows

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """A transaction: its statements commit or roll back together. Raises StoreUnavailable or StoreConflict."""
        async with self._connection() as connection, self._begun(connection) as transaction:
            yield transaction

    @contextlib.asynccontextmanager
    async def _begun(self, connection: Any) -> AsyncIterator[Transaction]:
        # Set each time: the default of the role or the database must not apply.
        async with connection.transaction(isolation="read_committed"):
            transaction = Transaction(connection, self._statements, self._connector.where)
            if not connection.is_pinned:
                await transaction.settle(self._settling)
            yield transaction

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        try:
            with translated(self._connector.where):
                async with self.pool.connection() as connection:
                    yield connection
        except StoreUnavailable as error:
            if means_move(error.__cause__):
                await self._move()
            raise

    async def _move(self) -> None:
        self.moves += 1
        await self.pool.drop()

    async def _fetch(self, name: str, *arguments: object) -> Sequence[Row]:
        for attempt in range(_ATTEMPTS_MAX):
            try:
                return await self._fetch_once(name, *arguments, splits=attempt == 0)
            except StoreUnavailable as error:
                is_pooler = isinstance(error.__cause__, POOLER_SIGNS)
                if is_pooler and self._keeps_statements:
                    _log.info("the store is behind a pooler in transaction mode: prepared statements disabled")
                    self._keeps_statements = False
                elif not (isinstance(error.__cause__, TRY_AGAIN) or is_pooler) or attempt == _ATTEMPTS_MAX - 1:
                    raise
            await asyncio.sleep(_RETRY_SECONDS * random.uniform(0, 2**attempt))  # noqa: S311 - spreads retries
        raise AssertionError("the last attempt is final")

    async def _fetch_once(self, name: str, *arguments: object, splits: bool) -> Sequence[Row]:
        """`splits`: the statement may run outside a transaction if the connection has our settings."""
        async with self._connection() as connection:
            if self._keeps_statements and splits and connection.is_pinned:
                rows: Sequence[Row] = await connection.fetch(self._statements[name], *arguments)
                _check_standing(connection)
                return rows
            async with self._begun(connection) as transaction:
                return await transaction.fetch(name, *arguments)

    def _note_up(self) -> None:
        if self.is_main and self.outage.is_on:
            self.outage.responded()
        self.is_up, self.is_down, self.down_because = True, False, ""

    def _note_down(self, why: str) -> None:
        self.outage.met(f"the store is unavailable: {why}", is_main=self.is_main)
        self.is_up, self.is_down, self.down_because = False, True, why


class NotificationListener:
    """A dedicated connection that receives notifications. `lost` is called once, when it is closed."""

    def __init__(self, dsn: str, channel: str, *, shortage: Shortage | None = None) -> None:
        """`shortage`: during a shortage of connections, this one is released."""
        self._connector = Connector(dsn)
        self._channel = channel
        self._shortage = shortage
        self._connection: asyncpg.Connection[Row] | None = None
        if shortage is not None:
            shortage.release.append(self._end)

    async def open(self, notified: Callable[[], None], lost: Callable[[], None]) -> None:
        """Listen. Raises StoreUnavailable."""
        if self._shortage is not None and self._shortage.is_backing_off:
            raise StoreUnavailable(f"{self._connector.where}: {self._shortage.because}")
        with translated(self._connector.where):
            try:
                connection = await self._connector.connect(command_seconds=CONNECT_SECONDS, caches_statements=False)
                self._connection = connection
                connection.add_termination_listener(lambda _connection: lost())
                await connection.add_listener(self._channel, lambda *_: notified())
            except NO_RESPONSE:
                await self.close()
                raise

    async def close(self) -> None:
        """Stop listening."""
        self._end()

    def _end(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            connection.terminate()


def _check_standing(connection: Any) -> None:
    """Raises NotPrimaryError if the server has become read-only: its results must be discarded."""
    why = standing(connection) if connection.is_pinned else ""
    if why:
        raise NotPrimaryError(why)
