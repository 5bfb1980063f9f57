"""Budgets in Redis: their windows never end, so a share is closed when nothing uses it, and no use is lost or doubled."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from keyproxy.limits.ledger_protocol import LeaseReport, Pool, Window
from keyproxy.store.ledger.redis_backend import RedisLedger
from keyproxy.store.postgres.database import StoreUnavailable
from tests.contracts import LEASE_SECONDS, line
from tests.store.harness import Relay, Sql, StatementRunner, until_blocked
from tests.store.redis_harness import MakeLedger, ledgers, make_due, make_idle
from tests.store.redis_server import RedisServer
from tests.waiting import until

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


@pytest.fixture
async def door(dsn: str) -> AsyncIterator[StatementRunner]:
    """A database whose replies can be lost."""
    door = StatementRunner(dsn, pool_size_max=4)
    await door.open()
    yield door
    await door.close()


@pytest.fixture
async def make_lossy_ledger(door: StatementRunner, server: RedisServer) -> AsyncIterator[Callable[[], RedisLedger]]:
    """A proxy's backend over that database."""
    async with contextlib.AsyncExitStack() as stack:

        def making() -> RedisLedger:
            ledger = RedisLedger(server.url, door, lease_seconds=LEASE_SECONDS, alert_percentages=(80, 100))
            stack.push_async_callback(ledger.close)
            return ledger

        yield making


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


async def no_leases(sql: Sql) -> bool:
    return (await account(sql))[2] == 0


async def window_keys(server: RedisServer) -> dict[str, int]:
    """The keys of windows, and in how many seconds each expires."""
    async with Redis.from_url(server.url) as client:
        return {key.decode(): await client.ttl(key) async for key in client.scan_iter("*:w:*")}


async def report(ledger: RedisLedger, server: RedisServer, *, is_idle: bool = False) -> None:
    """Report to PostgreSQL, now or as after a pause in which nothing used the budget."""
    if is_idle:
        await make_idle(server)
    with contextlib.suppress(ValueError):  # nothing is due
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


@pytest.mark.parametrize("want", [0, 5])
async def test_use_of_a_budget_after_the_reply_to_the_close_of_its_share_was_lost_counts_once(
    ledger: RedisLedger, relay: Relay, server: RedisServer, sql: Sql, dsn: str, want: int
) -> None:
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
        await relay.cut()
        with pytest.raises(StoreUnavailable):
            await closing
    await blocking.close()
    await until(lambda: no_leases(sql), "PostgreSQL has closed the share")
    assert len(await window_keys(server)) == 1
    await relay.mend()
    replies = await ledger.sync("b", 1, of_budget(used=7, granted=0, want=want))
    assert replies is not None
    assert replies[0].granted == 7 + want
    await ledger.sync("b", 2, of_budget(granted=7 + want, used=7 + want))
    await report(ledger, server)
    assert (await account(sql))[0] == 107 + want
    await report(ledger, server, is_idle=True)
    assert await account(sql) == (107 + want, 0, 0)


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_lost_or_idle_a_budget_is_charged_for_what_was_used_exactly(
    door: StatementRunner, make_lossy_ledger: Callable[[], RedisLedger], server: RedisServer, sql: Sql, seed: int
) -> None:
    chance, limit, serial = random.Random(seed), 200, 0

    def lose(rows: Sequence[Any]) -> Sequence[Any]:
        if chance.random() < 0.15:
            raise StoreUnavailable("the response was lost")
        return rows

    door.edit["sync_leases"] = lose
    proxies = [make_lossy_ledger() for _ in range(2)]
    granted, used, returned = ([0, 0] for _ in range(3))
    for _ in range(70):
        number, serial = chance.randrange(2), serial + 1
        proxy = proxies[number]
        with contextlib.suppress(StoreUnavailable):
            if chance.random() < 0.3:
                await report(proxy, server, is_idle=chance.random() < 0.8)
                continue
            free = granted[number] - used[number] - returned[number]
            used[number] += chance.randint(0, free) + (chance.random() < 0.05)
            free = max(0, granted[number] - used[number] - returned[number])
            returned[number] += chance.choice([0, free])
            replies = await proxy.sync(f"h{number}", serial, [
                line(of=BUDGET, limit=limit, granted=granted[number], used=used[number], returned=returned[number],
                     want=chance.choice([0, 0, 1, 9])),
            ])  # fmt: skip
            assert replies is not None
            granted[number] = replies[0].granted
        # What was used beyond a grant is the only excess.
        assert not await sql.fetch("SELECT FROM keyproxy.windows WHERE spent + held > $1", limit + 20)
    del door.edit["sync_leases"]
    for number, proxy in enumerate(proxies):
        free = max(0, granted[number] - used[number] - returned[number])
        figures = {"granted": granted[number], "used": used[number], "returned": returned[number] + free}
        assert await proxy.sync(f"h{number}", serial + 1, [line(of=BUDGET, limit=limit, is_closing=True, **figures)])
    async with asyncio.timeout(30):
        while (await account(sql))[1:] != (0, 0):
            await report(proxies[0], server, is_idle=True)
    assert (await account(sql))[0] == sum(used)
    assert sum(used) > 0


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
