"""Applies schema migrations: numbered .sql files, forward only, each in a transaction of its own.

An applied file must never change: its checksum is stored and compared. Concurrent runs wait for each other on an advisory
lock of the transaction, so that a pooler cannot separate the two. A database that is newer than this program is left
unchanged.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from importlib import resources
from typing import Any, Final, NamedTuple

import asyncpg

from keyproxy.store.postgres.connecting import Connection, Connector
from keyproxy.store.postgres.failures import NO_RESPONSE, NotPrimaryError, StoreUnavailable, first_line

_FILE = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_LOCK: Final = 0x6B657970726F7879  # "keyproxy"

#: Lock conflicts of a migration with proxies that use the tables.
_IN_THE_WAY: Final = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)

#: How long a migration waits for one lock: well below any statement timeout, since proxies queue behind it.
_LOCK_MILLISECONDS: Final = 500

#: The pause before a migration is retried after that, and for how long it is retried.
_RETRY_SECONDS: Final = 0.5
_LOCKS_SECONDS: Final = 60.0

_BOOK: Final = """
CREATE SCHEMA IF NOT EXISTS keyproxy;
CREATE TABLE IF NOT EXISTS keyproxy.migrations (
    number      integer PRIMARY KEY,
    name        text NOT NULL,
    checksum    text NOT NULL,
    applied_at  timestamptz NOT NULL DEFAULT now()
);
"""


class MigrationError(Exception):
    """The migrations cannot be applied. The message states the reason."""


class Migration(NamedTuple):
    """A migration file: its number, name and statements."""

    number: int
    name: str
    checksum: str
    statements: str


class State(NamedTuple):
    """The migrations that a database has, and those that are pending."""

    applied: list[int]
    pending: list[Migration]


def available() -> list[Migration]:
    """Every migration of this program, in order."""
    found = []
    for file in resources.files(__package__).joinpath("migrations").iterdir():
        match = _FILE.fullmatch(file.name)
        if match is not None:
            text = file.read_text(encoding="utf-8")
            found.append(Migration(int(match[1]), match[2], hashlib.sha256(text.encode()).hexdigest(), text))
    return sorted(found)


async def state(dsn: str) -> State:
    """Read which migrations are applied and which are pending. Raises MigrationError or StoreUnavailable."""
    connection = await connect(dsn)
    try:
        if await connection.fetchval("SELECT to_regclass('keyproxy.migrations')") is None:
            return State([], available())
        return await _compare(connection)
    except NO_RESPONSE as error:
        raise MigrationError(f"reading the schema failed: {error}") from error
    finally:
        await connection.close()


async def migrate(dsn: str) -> list[Migration]:
    """Apply all pending migrations and return them. Raises MigrationError or StoreUnavailable."""
    connection = await connect(dsn, writes=True)
    done: list[Migration] = []
    try:
        while (step := await _advance(connection)) is not None:
            done.append(step)
        return done
    except NO_RESPONSE as error:
        raise MigrationError(f"the migration failed and was rolled back: {error}") from error
    finally:
        await connection.close()


async def _advance(connection: Connection) -> Migration | None:
    """Apply the next pending migration; None if nothing is pending.

    Proxies keep running meanwhile, and queue behind every lock that the migration waits for. So it times out a long wait,
    rolls back, lets them proceed, and retries.
    """
    give_up = asyncio.get_running_loop().time() + _LOCKS_SECONDS
    while True:
        try:
            return await _apply_next(connection)
        except _IN_THE_WAY as error:
            if asyncio.get_running_loop().time() > give_up:
                raise MigrationError(
                    "a long transaction, such as a dump, holds a lock on a table: "
                    f"{first_line(error)}; the migration was rolled back, retry later"
                ) from error
        await asyncio.sleep(_RETRY_SECONDS)


async def _apply_next(connection: Connection) -> Migration | None:
    async with connection.transaction(isolation="read_committed"):
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        # Read under the lock: a concurrent run may have been faster.
        if await connection.fetchval("SELECT to_regclass('keyproxy.migrations')") is None:
            await connection.execute(_BOOK)
        pending = (await _compare(connection)).pending
        if not pending:
            return None
        step = pending[0]
        await connection.execute(f"SET LOCAL lock_timeout = {_LOCK_MILLISECONDS}")
        await connection.execute(step.statements)
        await connection.execute(
            "INSERT INTO keyproxy.migrations (number, name, checksum) VALUES ($1, $2, $3)",
            step.number,
            step.name,
            step.checksum,
        )
    return step


async def _compare(connection: Any) -> State:
    migrations = available()
    rows = await connection.fetch("SELECT number, name, checksum FROM keyproxy.migrations ORDER BY number")
    applied = {row["number"]: row for row in rows}
    newest = migrations[-1].number
    unknown = [number for number in applied if number > newest]
    if unknown:
        raise MigrationError(
            f"the database has migration {max(unknown)}, newer than this program's {newest}: upgrade keyproxy"
        )
    for migration in migrations:
        row = applied.get(migration.number)
        if row is not None and row["checksum"] != migration.checksum:
            raise MigrationError(f"migration {migration.number:04}_{migration.name} was changed after it was applied")
    return State(sorted(applied), [one for one in migrations if one.number not in applied])


async def connect(dsn: str, *, writes: bool = False) -> Connection:
    """Connect. `writes`: to the primary only. Raises StoreUnavailable."""
    connector = Connector(dsn)
    try:
        # No statement timeout: a migration may take long.
        return await connector.connect(command_seconds=0, caches_statements=False, is_read_only_enough=not writes)
    except StoreUnavailable:
        raise
    except (NotPrimaryError, *NO_RESPONSE) as error:
        raise StoreUnavailable(f"cannot connect to {connector.where}: {first_line(error)}") from error
