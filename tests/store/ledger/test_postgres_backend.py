"""Behaviour that only the PostgreSQL backend has; test_contract.py covers what all backends share."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import cast

import pytest

from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.postgres.database import Database
from tests.contracts import LEASE_SECONDS, line, window
from tests.store.harness import PlainDatabase, Sql


@pytest.fixture
async def ledger(dsn: str) -> AsyncIterator[PostgresLedger]:
    """The backend over an empty database."""
    database = Database(dsn, pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    yield PostgresLedger(database, lease_seconds=LEASE_SECONDS)
    await database.close()


async def test_two_leases_of_one_window_in_one_message_share_what_is_available(ledger: PostgresLedger) -> None:
    replies = await ledger.sync("a", 1, [line(1, want=8), line(2, want=8)])
    assert replies is not None
    assert {reply.lease: reply.granted for reply in replies} == {1: 0, 2: 8}
    replies = await ledger.sync("a", 2, [line(1, want=8), line(2, granted=8, returned=3, want=8), line(3, want=1)])
    assert replies is not None
    assert {reply.lease: reply.granted for reply in replies} == {1: 0, 2: 8, 3: 1}
    (state,) = await ledger.windows([window()])
    assert state is not None
    assert (state.spent, state.held) == (0, 6)


async def test_two_lines_of_one_rate_in_one_message_share_its_burst(ledger: PostgresLedger) -> None:
    rate = window("rate")
    replies = await ledger.sync(
        "a", 1, [line(number, rate, limit=5, want=5, interval_seconds=60.0) for number in (1, 2)]
    )
    assert replies is not None
    assert sum(reply.granted for reply in replies) == 5


async def test_lease_whose_first_reply_was_lost_stays_in_its_window(ledger: PostgresLedger, sql: Sql) -> None:
    await ledger.sync("a", 1, [line(want=4)])
    await sql.execute("UPDATE keyproxy.windows SET starts = starts - 86400")
    replies = await ledger.sync("a", 2, [line(used=0, want=4)])
    assert replies is not None
    assert (replies[0].granted, replies[0].held) == (4, 4)
    assert replies[0].ends_seconds < 0
    assert await ledger.windows([window()]) == [None]


async def test_database_that_lost_history_grants_nothing_until_all_leases_are_reported(
    ledger: PostgresLedger, sql: Sql
) -> None:
    await ledger.sync("a", 1, [line(want=4)])
    await sql.execute("UPDATE keyproxy.ledger_history SET timeline = '0000000A'")
    await sql.execute("UPDATE keyproxy.lease_holders SET expires_at = clock_timestamp()")
    await ledger.reap()
    replies = await ledger.sync("b", 1, [line(want=4), line(2, window("rate"), interval_seconds=1.0, want=1)])
    assert replies is not None
    about_itself, requests, rate = sorted(replies)
    assert about_itself.lease == 0
    assert about_itself.wait_seconds == pytest.approx(60.0, abs=5)
    assert (requests.granted, rate.granted) == (0, 1)
    # Holders report the leases that it has lost, and it counts them.
    replies = await ledger.sync("c", 7, [line(granted=6, used=2, want=3)])
    assert replies is not None
    assert [reply.granted for reply in replies if reply.lease] == [6]
    (state,) = await ledger.windows([window()])
    assert state is not None
    assert (state.spent, state.held) == (2, 8)
    await sql.execute("UPDATE keyproxy.ledger_history SET settles_until = clock_timestamp()")
    replies = await ledger.sync("b", 2, [line(want=4, at_least=1)])
    assert replies is not None
    assert [reply.granted for reply in replies] == [0]
    replies = await ledger.sync("c", 8, [line(granted=6, used=2, returned=4)])
    replies = await ledger.sync("b", 3, [line(want=4, at_least=1)])
    assert replies is not None
    assert [reply.granted for reply in replies] == [1]


async def test_first_message_and_longer_leases_do_not_count_as_lost_history(ledger: PostgresLedger, dsn: str) -> None:
    assert await ledger.sync("a", 1, []) == []
    database = Database(dsn, pool_size_max=1, statement_timeout_seconds=5.0)
    await database.open()
    assert await PostgresLedger(database, lease_seconds=2 * LEASE_SECONDS).sync("b", 1, []) == []
    await database.close()


async def test_clock_that_is_set_back_does_not_block_a_rate(ledger: PostgresLedger, sql: Sql) -> None:
    rate = window("rate")
    await ledger.sync("a", 1, [line(1, rate, limit=5, want=5, interval_seconds=60.0)])
    await sql.execute("UPDATE keyproxy.windows SET theoretical = theoretical + 7200")
    replies = await ledger.sync("a", 2, [line(1, rate, limit=5, want=5, interval_seconds=60.0)])
    assert replies is not None
    assert replies[0].wait_seconds == pytest.approx(60.0, abs=1)


@pytest.mark.parametrize("analyzed", ["leases", "windows"])
@pytest.mark.parametrize("is_closing", [False, True])
async def test_message_reads_only_its_own_rows_even_if_tables_were_empty_when_analyzed(
    sql: Sql, is_closing: bool, analyzed: str
) -> None:
    ledger = PostgresLedger(cast("Database", PlainDatabase(sql)), lease_seconds=LEASE_SECONDS)
    # As autovacuum does in a quiet hour.
    await sql.execute(f"ANALYZE keyproxy.{analyzed}")
    held, told = 1_000, 20
    lines = [line(number, window(owner=f"u_{number}"), want=1) for number in range(1, held + 1)]
    replies = await ledger.sync("a", 1, lines)
    assert replies is not None
    ends = [
        one._replace(starts=reply.starts, granted=1, used=1, want=0, at_least=0, is_closing=is_closing)
        for one, reply in zip(lines[-told:], sorted(replies)[-told:], strict=True)
    ]
    before = await _rows_read(sql)
    await ledger.sync("a", 2, ends)
    read = await _rows_read(sql) - before
    assert read["leases"] <= 2 * told
    assert read["windows"] <= 5 * told
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.leases") == held - (told if is_closing else 0)


async def _rows_read(sql: Sql) -> Counter[str]:
    """The numbers of rows read so far, of leases and of windows."""
    await sql.execute("SELECT pg_stat_force_next_flush()")
    rows = await sql.fetch(
        "SELECT relname, coalesce(idx_tup_fetch, 0) + seq_tup_read AS rows FROM pg_stat_user_tables"
        " WHERE schemaname = 'keyproxy' AND relname IN ('leases', 'windows')"
    )
    return Counter({row["relname"]: row["rows"] for row in rows})


async def test_windows_are_locked_in_one_order_so_that_messages_do_not_deadlock(dsn: str) -> None:
    database = Database(dsn, pool_size_max=8, statement_timeout_seconds=20.0)
    await database.open()
    crowd = PostgresLedger(database, lease_seconds=LEASE_SECONDS)
    chance = random.Random(7)
    windows = [window(owner=f"u_{number}") for number in range(40)]

    async def speak(name: str) -> None:
        for serial in range(1, 16):
            chosen = chance.sample(windows, 25)
            await crowd.sync(name, serial, [line(serial * 100 + n, of, want=1) for n, of in enumerate(chosen)])
        await crowd.end(name)

    await asyncio.gather(*(speak(f"crowd{number}") for number in range(8)), *(crowd.reap() for _ in range(5)))
    states = [state for state in await crowd.windows(windows) if state is not None]
    assert sum(state.spent + state.held for state in states) <= 40 * 10
    assert sum(state.held for state in states) == 0
    await database.close()
