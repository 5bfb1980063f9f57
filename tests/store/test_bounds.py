"""Growing tables have a bound, and enforcing it never blocks requests, however much is overdue."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import asyncpg
import pytest

from keyproxy.config.schema import Usage
from keyproxy.platform.clock import now
from keyproxy.store.housekeeping import Chore
from keyproxy.store.ledger.backend import REAP_PORTION
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.postgres.database import Database, StoreUnavailable
from keyproxy.store.usage.journal import UsageJournal
from tests.contracts import LEASE_SECONDS, line, window
from tests.store.conftest import MakeRig
from tests.store.harness import Sql, until_blocked

_TIMEOUT_SECONDS = 0.5

#: Slows deletes from a table down, so that a statement has time for about 20 rows.
_SLOW_DELETES = """
CREATE FUNCTION pg_temp.slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.02); RETURN OLD; END $$;
CREATE TRIGGER slow BEFORE DELETE ON keyproxy.{table} FOR EACH ROW EXECUTE FUNCTION pg_temp.slow();
"""


@pytest.fixture
async def door(dsn: str) -> AsyncIterator[Database]:
    """A database with a short statement timeout."""
    database = Database(dsn, pool_size_max=3, statement_timeout_seconds=_TIMEOUT_SECONDS)
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def slow_deletes(dsn: str) -> AsyncIterator[None]:
    """Make deletes of holders slow."""
    async with _slow(dsn, "lease_holders"):
        yield


@contextlib.asynccontextmanager
async def _slow(dsn: str, table: str) -> AsyncIterator[None]:
    other: Sql = await asyncpg.connect(dsn)
    await other.execute(_SLOW_DELETES.format(table=table))
    yield
    await other.execute(f"DROP TRIGGER slow ON keyproxy.{table}")
    await other.close()


async def _add_ended(sql: Sql, count: int, age: str) -> None:
    await sql.execute(
        "INSERT INTO keyproxy.lease_holders (id, serial, expires_at, ended_at)"
        f" SELECT '{age} ' || n, 1, ended, ended FROM generate_series(1, $1::int) AS n, (SELECT now() - interval '{age}')"
        " AS long_ago (ended)",
        count,
    )


async def _sums(sql: Sql) -> tuple[int, ...]:
    """The sums of spent, held and forfeited over all windows."""
    row = await sql.fetchrow("SELECT sum(spent), sum(held), sum(forfeited) FROM keyproxy.windows")
    assert row is not None
    return tuple(int(value) for value in row)


async def _reap(ledger: PostgresLedger) -> int:
    turns = 1
    while await ledger.reap():
        turns += 1
    return turns


# -- holders


@pytest.mark.usefixtures("slow_deletes")
async def test_expired_holders_end_in_time_even_if_deleting_old_ones_is_slow(door: Database, sql: Sql) -> None:
    await _add_ended(sql, 1_000, "70 days")
    ledger = PostgresLedger(door, lease_seconds=0.0)
    await ledger.sync("dead", 1, [line(1, window("concurrency"), want=5)])
    with pytest.raises(StoreUnavailable):
        await ledger.forget(1_000)
    await _reap(ledger)
    (state,) = await ledger.windows([window("concurrency")])
    assert state is not None
    assert state.held == 0


@pytest.mark.usefixtures("slow_deletes")
async def test_portion_that_times_out_is_reduced_until_it_succeeds(
    door: Database, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    name = "keyproxy.store.housekeeping"
    caplog.set_level(logging.WARNING, logger=name)
    await _add_ended(sql, 30, "70 days")
    chore = Chore("holders", "delete old holders", portion=100)
    ledger = PostgresLedger(door, lease_seconds=LEASE_SECONDS)
    for _ in range(6):
        await chore.finish(ledger.forget)
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.lease_holders") == 0
    assert chore.failures >= 1
    assert chore.failing_because == ""
    lines = [record.getMessage() for record in caplog.records if record.name == name]
    assert len(lines) == 2
    assert lines[0].startswith("cannot delete old holders, retrying: ")
    assert lines[1] == "recovered, continuing to delete old holders"


async def test_holders_that_ended_an_hour_ago_are_deleted_in_portions(database: Database, sql: Sql) -> None:
    await _add_ended(sql, 25, "60 minutes")
    await _add_ended(sql, 5, "50 minutes")
    ledger = PostgresLedger(database, lease_seconds=LEASE_SECONDS)
    await ledger.sync("alive", 1, [])
    assert [await ledger.forget(10) for _ in range(3)] == [True, True, False]
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.lease_holders") == 6


async def test_holder_with_many_leases_ends_immediately_and_is_charged_in_portions(
    database: Database, sql: Sql
) -> None:
    ledger = PostgresLedger(database, lease_seconds=0.0)
    patient = PostgresLedger(database, lease_seconds=LEASE_SECONDS)
    count = 2_500
    for first in range(1, count, 500):
        await ledger.sync("dead", first, [line(n, window(owner=f"u_{n}"), want=2) for n in range(first, first + 500)])
    assert await ledger.reap()
    # Leases that are not charged yet stay held, and messages of the holder are no longer accepted.
    assert await _sums(sql) == (2_000, 3_000, 2_000)
    assert await patient.sync("dead", count, [line(count, window(owner=f"u_{count}"), granted=2, used=1)]) is None
    await sql.execute("UPDATE keyproxy.lease_holders SET ended_at = now() - interval '2 days'")
    assert not await ledger.forget(10)
    assert await _reap(ledger) == 3
    assert await _sums(sql) == (5_000, 0, 5_000)
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.leases") == 0
    assert not await ledger.forget(10)
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.lease_holders") == 0


async def test_charging_expired_holders_reduces_its_portion_until_it_succeeds(
    door: Database, dsn: str, sql: Sql
) -> None:
    """On a slow server, 1,000 leases exceed the statement timeout. Slots must still become free."""
    dead = PostgresLedger(door, lease_seconds=0.0)
    await dead.sync("dead", 1, [line(n, window("concurrency", owner=f"u_{n}"), want=2) for n in range(60)])
    chore = Chore("reap", "end holders that have died", portion=REAP_PORTION)
    async with _slow(dsn, "leases"):
        for _ in range(10):
            if await chore.finish(dead.reap):
                break
    assert chore.failures > 1
    assert chore.failing_because == ""
    assert await _sums(sql) == (0, 0, 0)


async def test_restored_database_grants_nothing_for_the_duration_of_a_lease(database: Database, sql: Sql) -> None:
    ledger = PostgresLedger(database, lease_seconds=LEASE_SECONDS)
    await ledger.sync("a", 1, [line(limit=100, want=1)])
    # As after loading a dump: the restored table is a different one, while the server's timeline stays the same.
    await sql.execute("UPDATE keyproxy.ledger_history SET table_oid = 1")
    front, reply = await ledger.sync("b", 1, [line(limit=100, want=90)]) or ()
    assert front.lease == 0
    assert 0 < front.wait_seconds <= LEASE_SECONDS
    assert reply.granted == 0
    assert not await PostgresLedger(database, lease_seconds=0.0).reap()
    await ledger.sync("a", 2, [line(limit=100, granted=90, used=1)])
    assert await _sums(sql) == (1, 89, 0)


@pytest.mark.parametrize("column", ["table_oid = 1", "timeline = '0000000A'"])
async def test_restored_database_accepts_claims_of_unknown_leases_for_a_day(
    database: Database, sql: Sql, column: str
) -> None:
    ledger = PostgresLedger(database, lease_seconds=LEASE_SECONDS)
    await ledger.sync("a", 1, [])
    await PostgresLedger(database, lease_seconds=0.0).sync("rests", 1, [])
    await ledger.reap()
    for holder in ("b", "rests"):
        assert await ledger.sync(holder, 7, [line(granted=4, used=1)]) is None
    await sql.execute(f"UPDATE keyproxy.ledger_history SET {column}")
    for holder in ("b", "rests"):
        assert await ledger.sync(holder, 8, [line(granted=4, used=1)]) is not None
    (state,) = await ledger.windows([window()])
    assert state is not None
    assert (state.spent, state.held) == (2, 6)
    await sql.execute("UPDATE keyproxy.ledger_history SET changed_at = now() - interval '25 hours'")
    assert await ledger.sync("c", 7, [line(granted=4, used=1)]) is None


# -- windows


async def test_only_unused_rates_and_slots_are_deleted(database: Database, sql: Sql) -> None:
    ledger = PostgresLedger(database, lease_seconds=LEASE_SECONDS)
    rate, slots = window("rate"), window("concurrency")
    await ledger.sync("a", 1, [line(1, rate, interval_seconds=60.0, want=1), line(2, slots, want=1), line(3, want=1)])
    await sql.execute(
        "INSERT INTO keyproxy.windows (pool_kind, pool_id, is_test, measure, starts)"
        " SELECT 'user', 'gone_' || n, false, measure, 0"
        " FROM generate_series(1, 20) AS n, unnest(ARRAY['rate', 'concurrency']) AS measure"
    )
    journal = UsageJournal(database, Usage(), now, settle_seconds=0.5)
    assert [await journal.sweep(16) for _ in range(3)] == [True, True, False]
    rows = await sql.fetch("SELECT measure FROM keyproxy.windows ORDER BY measure")
    assert [row["measure"] for row in rows] == ["concurrency", "rate", "requests_per_day"]
    # The search wraps around: windows that become unused later are found in the next round.
    await ledger.sync("a", 2, [line(2, slots, granted=1, returned=1, is_closing=True)])
    await sql.execute("UPDATE keyproxy.windows SET theoretical = 0, wanted_at = 0")
    assert not await journal.sweep(16)
    assert await sql.fetchval("SELECT array_agg(measure) FROM keyproxy.windows") == ["requests_per_day"]


async def test_window_deleted_while_a_message_waits_for_it_is_created_again(database: Database, sql: Sql) -> None:
    ledger, slots = PostgresLedger(database, lease_seconds=LEASE_SECONDS), window("concurrency")
    await ledger.sync("a", 1, [line(1, slots, want=1)])
    await ledger.sync("a", 2, [line(1, slots, granted=1, returned=1, is_closing=True)])
    async with sql.transaction():
        await sql.execute("DELETE FROM keyproxy.windows")
        sending = asyncio.create_task(ledger.sync("a", 3, [line(2, slots, want=1), line(3, want=1)]))
        await until_blocked(sql, "sync_leases")
    replies = await sending
    assert replies is not None
    assert {reply.lease: reply.granted for reply in replies} == {2: 1, 3: 1}
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.windows") == 2


# -- other tables


async def test_old_changes_are_deleted_one_portion_between_two_polls(make_rig: MakeRig, sql: Sql) -> None:
    rig = await make_rig()
    await rig.feed.poll()
    await sql.execute("INSERT INTO keyproxy.changes (kind, subject) SELECT 'key', 'x' FROM generate_series(1, 50)")
    snapshot = await sql.fetchval("SELECT pg_current_snapshot()::text")
    assert len(await rig.door.fetch("forget_changes", snapshot, 30)) == 30
    assert len(await rig.door.fetch("forget_changes", snapshot, 30)) == 20
    assert await rig.door.fetch("forget_changes", snapshot, 30) == []


async def test_rows_of_exited_processes_are_deleted_in_portions(database: Database, sql: Sql) -> None:
    await sql.execute(
        "INSERT INTO keyproxy.claim_batches (process, batch, told_at)"
        " SELECT n, 1, now() - interval '2 days' FROM generate_series(1, 25) AS n;"
        "INSERT INTO keyproxy.claim_batches (process, batch, told_at) VALUES ('alive', 1, now());"
        "INSERT INTO keyproxy.usage_writers (process, batch, written_at)"
        " SELECT n, 1, now() - interval '31 days' FROM generate_series(1, 25) AS n;"
        "INSERT INTO keyproxy.usage_writers (process, batch, written_at) VALUES ('alive', 1, now())"
    )
    assert [len(await database.fetch("forget_claim_batches", 10)) for _ in range(4)] == [10, 10, 5, 0]
    assert [row["process"] for row in await sql.fetch("SELECT process FROM keyproxy.claim_batches")] == ["alive"]
    journal = UsageJournal(database, Usage(event_days=0), now, settle_seconds=0.5)
    assert [await journal.tend(10) for _ in range(3)] == [True, True, False]
    assert [row["process"] for row in await sql.fetch("SELECT process FROM keyproxy.usage_writers")] == ["alive"]


async def test_event_partitions_are_dropped_a_few_at_a_time(own_dsn: str) -> None:
    sql: Sql = await asyncpg.connect(own_dsn)
    database = Database(own_dsn, pool_size_max=1, statement_timeout_seconds=5.0)
    await database.open()
    try:
        for day in range(1, 11):
            await sql.execute(
                f"CREATE TABLE keyproxy.usage_event_batches_202001{day:02} PARTITION OF keyproxy.usage_event_batches"
                f" FOR VALUES FROM ('2020-01-{day:02}') TO ('2020-01-{day + 1:02}')"
            )
        journal = UsageJournal(database, Usage(), now, settle_seconds=0.5)
        assert [await journal.tend() for _ in range(3)] == [True, True, False]
        old = "SELECT count(*) FROM pg_class WHERE relname LIKE 'usage\\_event\\_batches\\_2020%' AND relkind = 'r'"
        assert await sql.fetchval(old) == 0
    finally:
        await database.close()
        await sql.close()
