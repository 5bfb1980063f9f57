"""Settings of a server, a role, a database or a pooler do not affect our statements."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta

import asyncpg
import pytest

from keyproxy.auth.api_key import KeyFormat
from keyproxy.limits.ledger_protocol import LeaseReport, Pool, Window
from keyproxy.store.directory.directory import Actor, Directory, KeyFilter, KeyWish
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.postgres.connecting import Connector
from keyproxy.store.postgres.database import StoreUnavailable
from tests.store.conftest import MakePooler
from tests.store.harness import Sql, StatementRunner, add_keys, add_user, until_blocked

HOLDERS, MESSAGES = 6, 20
_HOUR = timedelta(hours=1)

#: Settings that operators use for roles and databases, for good reasons.
SETTINGS = {
    "default_transaction_isolation": ("serializable", "'repeatable read'"),
    "default_transaction_deferrable": ("on",),
    "statement_timeout": ("'1ms'",),
    "lock_timeout": ("'1ms'",),
    "idle_in_transaction_session_timeout": ("'1ms'",),
    "idle_session_timeout": ("'20ms'",),
    "search_path": ("''", "public, pg_temp", '"$user"'),
    "TimeZone": ("'Asia/Kathmandu'", "'America/St_Johns'"),
    "DateStyle": ("'SQL, DMY'", "'German'"),
    "IntervalStyle": ("iso_8601",),
    "bytea_output": ("escape",),
    "row_security": ("off",),
    "client_encoding": ("'LATIN1'",),
    "standard_conforming_strings": ("off",),
    "extra_float_digits": ("-15",),
    "synchronous_commit": ("off",),
    "enable_indexscan": ("off",),
    "quote_all_identifiers": ("on",),
    "transform_null_equals": ("on",),
}
CASES = [(name, value) for name, values in SETTINGS.items() for value in values]


@contextlib.asynccontextmanager
async def opened(dsn: str) -> AsyncIterator[StatementRunner]:
    """A database that is open in the context."""
    door = StatementRunner(dsn, pool_size_max=4)
    await door.open()
    try:
        yield door
    finally:
        await door.close()


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}={value}" for name, value in CASES])
async def test_settings_of_the_database_break_nothing(own_dsn: str, name: str, value: str) -> None:
    admin: Sql = await asyncpg.connect(own_dsn)
    await _alter(admin, f"SET {name} = {value}")
    await admin.close()
    async with opened(own_dsn) as door:
        await _everything_works(door)


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}={value}" for name, value in CASES])
async def test_settings_of_the_database_break_nothing_behind_a_pooler(
    make_pooler: MakePooler, dsn: str, name: str, value: str
) -> None:
    if name == "idle_session_timeout":
        pytest.skip("a pooler replaces lost idle server connections")
    admin: Sql = await asyncpg.connect(dsn)
    # The limits of the database apply until a transaction has set its own.
    await _alter(admin, f"SET {name} = {value.replace('1ms', '50ms')}")
    try:
        pooler = await make_pooler(2)
        async with opened(pooler.dsn) as door:
            await _everything_works(door)
    finally:
        await _alter(admin, "RESET ALL")
        await admin.close()


async def _alter(sql: Sql, change: str) -> None:
    name = await sql.fetchval("SELECT current_database()")
    await sql.execute(f'ALTER DATABASE "{name}" {change}')


async def _everything_works(door: StatementRunner) -> None:
    """The directory, the ledger under load from several holders, the feed and pages of lists."""
    directory = Directory(door, KeyFormat(), Actor("test", "here"))
    await directory.tenants.create("acme", "Acme")
    await asyncio.gather(*(directory.users.create(f"u_{number}", "acme", KeyWish()) for number in range(5)))
    page = await directory.keys.list_by_time("created", None, 2, KeyFilter())
    assert page.next is not None
    rest = await directory.keys.list_by_time("created", page.next, 10, KeyFilter())
    assert len(page.items) + len(rest.items) == 5
    key = page.items[0]["id"]
    assert (await directory.keys.rotate(key, grace=_HOUR, expires_in=None))["replaces"] == key
    assert (await directory.keys.revoke(key, "it's \\ over"))["revoke_reason"] == "it's \\ over"
    assert await directory.audit.list_newest(None, 10) is not None
    rows = await door.fetch("changes_since", None, 10, "")
    await asyncio.sleep(0.05)
    assert await door.fetch("changes_since", rows[0]["snapshot"], 10, "")
    await asyncio.gather(*(_spend(door, f"holder_{number}") for number in range(HOLDERS)))


async def _spend(door: StatementRunner, holder: str) -> None:
    ledger = PostgresLedger(door, lease_seconds=10.0)
    window = Window(Pool("user", "u_1", False), "requests_per_day")
    granted, starts = 0, 0
    for serial in range(1, MESSAGES + 1):
        line = LeaseReport(1, window, starts, 10**6, 0.0, granted, granted, 0, 1, 1, False, False)
        replies: Sequence[object] | None = await ledger.sync(holder, serial, [line])
        assert replies is not None
        reply = replies[-1]
        granted, starts = getattr(reply, "granted"), getattr(reply, "starts")  # noqa: B009
    await ledger.end(holder)


async def test_statement_is_retried_after_a_deadlock(dsn: str, sql: Sql) -> None:
    await add_user(sql)
    await add_keys(sql, [1, 2])
    # Our connection detects the deadlock first, so its statement is aborted.
    await sql.execute("SET deadlock_timeout = '20s'")
    async with opened(dsn) as door:
        async with sql.transaction():
            await sql.execute("UPDATE keyproxy.api_keys SET name = 'x' WHERE id = 'key_2'")
            ours = asyncio.create_task(door.fetch("revoke_keys", "", 10, "", "u_42", None, None, None))
            watch: Sql = await asyncpg.connect(dsn)
            await until_blocked(watch, "UPDATE keyproxy.api_keys")
            await watch.close()
            await sql.execute("UPDATE keyproxy.api_keys SET name = 'x' WHERE id = 'key_1'")
        assert {row["id"] for row in await ours} == {"key_1", "key_2"}
        assert not door.moves


async def test_database_that_became_read_only_is_not_written_to(own_dsn: str) -> None:
    admin: Sql = await asyncpg.connect(own_dsn)
    await _alter(admin, "SET default_transaction_read_only = on")
    target = Connector(own_dsn)
    with pytest.raises(Exception, match="read-only"):
        await target.connect(command_seconds=1.0)
    await _alter_back(admin)
    connection = await target.connect(command_seconds=1.0)
    await connection.close()
    await admin.close()


async def test_read_only_database_behind_a_pooler_is_not_used_either(
    make_pooler: MakePooler, dsn: str, sql: Sql
) -> None:
    await _alter(sql, "SET default_transaction_read_only = on")
    try:
        pooler = await make_pooler(2)
        async with opened(pooler.dsn) as door:
            for _ in range(2):
                with pytest.raises(StoreUnavailable, match="read-only"):
                    await door.fetch("tenants", "", 1)
            assert door.moves >= 1
    finally:
        await _alter_back(sql)


async def _alter_back(sql: Sql) -> None:
    async with sql.transaction(readonly=False):
        await sql.execute("SET TRANSACTION READ WRITE")
        await _alter(sql, "RESET default_transaction_read_only")
