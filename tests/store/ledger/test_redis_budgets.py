"""Budgets in Redis: their windows never end, so a share is closed when nothing uses it, and no use is lost or doubled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from keyproxy.limits.ledger_protocol import LeaseReport, Pool, Window
from keyproxy.store.ledger.redis_backend import RedisLedger
from tests.contracts import line
from tests.store.harness import Relay, Sql, until_blocked
from tests.store.redis_harness import MakeLedger, ledgers, make_due, make_idle
from tests.store.redis_server import RedisServer

BUDGET = Window(Pool("token", "agt_1", False), "tokens_total")
DAY_SECONDS = 86_400


@pytest.fixture
async def make_ledger(relay: Relay) -> AsyncIterator[MakeLedger]:
    """A proxy's backend."""
    async with ledgers(relay.dsn) as making:
        yield making


@pytest.fixture
def ledger(make_ledger: MakeLedger, server: RedisServer) -> RedisLedger:
    """One proxy's backend."""
    return make_ledger(server)


def of_budget(**figures: Any) -> list[LeaseReport]:
    return [line(of=BUDGET, limit=1000, **figures)]


async def granted(ledger: RedisLedger, serial: int, **figures: int) -> int:
    """Send one message of the holder `a`, and return what it was granted."""
    replies = await ledger.sync("a", serial, of_budget(**figures))
    assert replies is not None
    return replies[0].granted


async def account(sql: Sql) -> tuple[int, int, int]:
    """What PostgreSQL has as spent, as held, and its number of leases."""
    row = await sql.fetchrow(
        "SELECT w.spent, w.held, (SELECT count(*) FROM keyproxy.leases) AS leases FROM keyproxy.windows AS w"
    )
    assert row is not None
    return row["spent"], row["held"], row["leases"]


async def window_keys(server: RedisServer) -> dict[str, int]:
    """The keys of windows, and in how many seconds each expires."""
    async with Redis.from_url(server.url) as client:
        return {key.decode(): await client.ttl(key) async for key in client.scan_iter("*:w:*")}


async def report(ledger: RedisLedger, server: RedisServer, *, is_idle: bool = False) -> None:
    """Report to PostgreSQL, now or as after a pause in which nothing used the budget."""
    if is_idle:
        await make_idle(server)
    await make_due(server)
    await ledger.reap()


async def test_share_of_a_budget_that_is_not_used_is_closed_and_its_key_deleted(
    ledger: RedisLedger, server: RedisServer, sql: Sql
) -> None:
    assert await granted(ledger, 1, want=100) == 100
    await granted(ledger, 2, granted=100, used=60, returned=40)
    await report(ledger, server)
    assert (await account(sql))[0::2] == (60, 1)
    await report(ledger, server, is_idle=True)
    assert await account(sql) == (60, 0, 0)
    assert await window_keys(server) == {}
    # Its next use opens another share, and the lease goes on.
    assert await granted(ledger, 3, granted=100, used=60, returned=40, want=5) == 105
    await granted(ledger, 4, granted=105, used=65, returned=40)
    await report(ledger, server, is_idle=True)
    assert await account(sql) == (65, 0, 0)


async def test_share_of_a_budget_stays_open_while_a_lease_holds_units_of_it(
    ledger: RedisLedger, server: RedisServer, sql: Sql
) -> None:
    assert await granted(ledger, 1, want=100) == 100
    # After the share that is fetched ahead of need.
    await report(ledger, server)
    await report(ledger, server, is_idle=True)
    assert await account(sql) == (0, 100, 1)
    assert len(await window_keys(server)) == 1


@pytest.mark.parametrize("want", [0, 5])
async def test_use_of_a_budget_while_its_share_is_being_closed_counts_once(
    ledger: RedisLedger, make_ledger: MakeLedger, server: RedisServer, sql: Sql, dsn: str, want: int
) -> None:
    other = make_ledger(server)
    assert await granted(ledger, 1, want=100) == 100
    await granted(ledger, 2, granted=100, used=100)
    await report(ledger, server)
    await make_idle(server)
    await make_due(server)
    blocking = await asyncpg.connect(dsn)
    async with blocking.transaction():
        await blocking.execute("SELECT FROM keyproxy.windows FOR UPDATE")
        closing = asyncio.create_task(ledger.reap())
        await until_blocked(sql, "sync_leases")
        # A request used more than it held; another one may need more.
        using = asyncio.create_task(other.sync("b", 1, of_budget(used=7, granted=0, want=want)))
        await asyncio.sleep(0.1)
    await asyncio.gather(closing, using)
    await blocking.close()
    replies = await other.sync("b", 2, of_budget(granted=7 + want, used=7 + want))
    assert replies is not None
    assert replies[0].spent == 107 + want
    await report(ledger, server, is_idle=True)
    assert await account(sql) == (107 + want, 0, 0)
    assert await window_keys(server) == {}


async def test_key_of_a_budget_outlives_the_rows_of_its_token_and_expires(
    ledger: RedisLedger, server: RedisServer
) -> None:
    # A token lives 15 minutes, and its rows a day longer.
    assert await granted(ledger, 1, want=100) == 100
    (seconds,) = (await window_keys(server)).values()
    assert 40 * DAY_SECONDS <= seconds <= 41 * DAY_SECONDS
    await granted(ledger, 2, granted=100, used=100)
    (seconds,) = (await window_keys(server)).values()
    assert seconds > DAY_SECONDS + 15 * 60


async def test_budget_is_spent_to_its_last_unit_by_redis_and_postgresql_together(
    make_ledger: MakeLedger, server: RedisServer, sql: Sql
) -> None:
    proxies, held = [make_ledger(server) for _ in range(2)], [0, 0]
    limit = 10
    for serial in range(1, 20):
        for number, proxy in enumerate(proxies):
            lines = [line(of=BUDGET, limit=limit, granted=held[number], used=held[number], want=1)]
            replies = await proxy.sync(f"h{number}", serial, lines)
            assert replies is not None
            held[number] = replies[0].granted
    assert sum(held) == limit
    assert not await sql.fetch("SELECT FROM keyproxy.windows WHERE spent + held > $1", limit)
