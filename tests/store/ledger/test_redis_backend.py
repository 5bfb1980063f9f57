"""The Redis backend: lost units are never granted twice, and "could not ask" is never "no"."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import re
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest
from redis.asyncio import Redis

from keyproxy.config import schema
from keyproxy.limits.allowance import Allowance
from keyproxy.limits.ledger_protocol import Pool, Window
from keyproxy.limits.plan import Plan
from keyproxy.model import Missing, Moment
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.ledger import redis_codec
from keyproxy.store.ledger.ledger import Ledger
from keyproxy.store.ledger.redis_backend import RedisLedger
from keyproxy.store.postgres.database import StoreUnavailable
from tests.contracts import line, window
from tests.store.conftest import MakeRig
from tests.store.harness import Relay, Sql, credit, until_blocked, until_row
from tests.store.redis_harness import PAST_LIMIT, MakeLedger, MakeServer, granted, ledgers, make_due, make_idle
from tests.store.redis_server import RedisServer
from tests.waiting import until


@pytest.fixture
async def make_ledger(relay: Relay) -> AsyncIterator[MakeLedger]:
    """A proxy's backend, connected to PostgreSQL through `relay`."""
    async with ledgers(relay.dsn) as making:
        yield making


@pytest.fixture
def ledger(make_ledger: MakeLedger, server: RedisServer) -> RedisLedger:
    """One proxy's backend."""
    return make_ledger(server)


# -- loss of memory


async def flushed(server: RedisServer) -> None:
    """Delete all keys."""
    server.command("FLUSHALL")


async def killed(server: RedisServer) -> None:
    """Restart the server without any keys."""
    server.kill()
    server.file.unlink(missing_ok=True)
    server.start()


async def restored(server: RedisServer) -> None:
    """Restart the server with the keys from its file."""
    server.kill()
    server.start()


LOSSES = [flushed, killed, restored]


@pytest.mark.parametrize("lose", LOSSES)
async def test_after_memory_loss_holders_end_and_granted_units_stay_charged(
    ledger: RedisLedger, server: RedisServer, sql: Sql, lose: Callable[[RedisServer], Awaitable[None]]
) -> None:
    assert await granted(ledger, "a", 1, want=10) == 10
    server.command("SAVE")
    assert await granted(ledger, "a", 2, granted=10, used=10, want=90) == 100
    await lose(server)
    try:
        told = await granted(ledger, "a", 3, granted=100, used=100)
    except StoreUnavailable:  # the server's exit has closed the connection
        told = await granted(ledger, "a", 4, granted=100, used=100)
    assert told == -1
    assert await granted(ledger, "b", 1, want=1000, at_least=1) <= 900
    row = await sql.fetchrow("SELECT spent + held AS taken FROM keyproxy.windows")
    assert row is not None
    assert 100 < row["taken"] <= 1000


@pytest.mark.parametrize("seed", range(4))
async def test_no_unit_is_granted_twice_and_few_are_lost_whenever_memory_is_lost(
    server: RedisServer, make_ledger: MakeLedger, sql: Sql, seed: int
) -> None:
    chance, limit = random.Random(seed), 2000
    proxies = [make_ledger(server) for _ in range(3)]
    holders = [f"{number}" for number in range(3)]
    used = serial = losses = misses = 0
    held = [0, 0, 0]
    while misses < 12:
        number, serial = chance.randrange(3), serial + 1
        if chance.random() < 0.02 and losses < 6:
            losses += 1
            await chance.choice(LOSSES)(server)
        elif chance.random() < 0.05:
            server.command("SAVE")
        # It uses all its units at once, then asks for more. It notices a loss with its next message.
        lines = [line(limit=limit, granted=held[number], used=held[number], want=chance.choice([1, 5, 20]))]
        try:
            replies = await proxies[number].sync(holders[number], serial, lines)
        except StoreUnavailable:
            continue
        if replies is None:
            holders[number], held[number] = f"{serial}", 0
            continue
        used += replies[0].granted - held[number]
        misses = 0 if replies[0].granted > held[number] else misses + 1
        held[number] = replies[0].granted
        assert not await sql.fetch(PAST_LIMIT, limit)
    assert losses > 0
    assert used <= limit
    # A loss costs at most an eighth of what was left, plus the grants in lost replies.
    assert used >= limit * (7 / 8) ** losses - 20 * losses - 100


# -- shares from PostgreSQL


async def test_without_postgresql_fetched_shares_are_granted_then_requests_are_unavailable_not_refused(
    ledger: RedisLedger, relay: Relay
) -> None:
    assert await granted(ledger, "a", 1, want=10) == 10
    assert await granted(ledger, "a", 2, granted=10, used=10, want=1) == 11
    await relay.cut()
    fetched = 11
    for serial in range(3, 200):
        try:
            fetched = await granted(ledger, "a", serial, granted=fetched, used=fetched, want=1)
        except StoreUnavailable:
            break
    assert 11 < fetched < 150
    await relay.mend()
    assert await granted(ledger, "a", 500, granted=fetched, used=fetched, want=1) == fetched + 1


async def test_spent_units_are_reported_to_postgresql_and_unused_shares_are_returned(
    ledger: RedisLedger, server: RedisServer, sql: Sql
) -> None:
    assert await granted(ledger, "a", 1, want=100) == 100
    await granted(ledger, "a", 2, granted=100, used=60, returned=30)
    await make_due(server)
    await ledger.reap()
    row = await sql.fetchrow("SELECT spent, held FROM keyproxy.windows")
    assert row is not None
    assert row["spent"] == 60
    assert row["held"] >= 10
    await make_idle(server)
    await make_due(server)
    await ledger.reap()
    row = await sql.fetchrow("SELECT spent, held FROM keyproxy.windows")
    assert row is not None
    assert (row["spent"], row["held"]) == (60, 10)


async def test_last_proxy_to_end_returns_all_shares(ledger: RedisLedger, sql: Sql) -> None:
    lines = [line(number + 1, window(owner=f"u_{number}"), limit=1000, want=20) for number in range(250)]
    for holder in ("a", "b"):
        assert await ledger.sync(holder, 1, lines) is not None
    await ledger.sync("b", 2, [one._replace(granted=20, used=1, returned=19, want=0, at_least=0) for one in lines])
    await ledger.end("a")
    assert await sql.fetchval("SELECT sum(held) FROM keyproxy.windows") > 0
    await ledger.end("b")
    row = await sql.fetchrow("SELECT sum(spent) AS spent, sum(held) AS held FROM keyproxy.windows")
    assert row is not None
    assert (row["spent"], row["held"]) == (250 * 21, 0)


async def test_expired_shares_are_charged_and_end_their_generation(ledger: RedisLedger, sql: Sql) -> None:
    assert await granted(ledger, "a", 1, want=100) == 100
    async with sql.transaction():
        await sql.execute("UPDATE keyproxy.lease_holders SET expires_at = now() - interval '1 s'")
        await sql.fetch("SELECT keyproxy.reap_holders()")
    assert await granted(ledger, "a", 2, granted=100, used=100, want=500) == -1
    assert await granted(ledger, "b", 1, want=1000, at_least=1) < 900
    (state,) = await ledger.windows([window()])
    assert state is not None
    assert state.forfeited >= 100


async def test_two_servers_and_postgresql_itself_share_a_window_and_never_exceed_it(
    make_server: MakeServer, make_ledger: MakeLedger, sql: Sql
) -> None:
    ledgers = [make_ledger(make_server(name)) for name in ("a", "b")]
    held, serial = [0, 0], 0
    for _ in range(120):
        for number, ledger in enumerate(ledgers):
            serial += 1
            held[number] = await granted(ledger, f"h{number}", serial, granted=held[number], used=held[number], want=20)
    assert not await sql.fetch(PAST_LIMIT, 1000)
    assert 950 <= sum(held) <= 1000


async def test_many_leases_of_a_dead_holder_are_charged_in_slices(ledger: RedisLedger) -> None:
    for first in range(0, 1500, 150):
        lines = [line(number + 1, window(owner=f"u_{number}"), want=2) for number in range(first, first + 150)]
        assert await ledger.sync("a", first + 1, lines) is not None
    await ledger.end("a")
    states = await ledger.windows([window(owner=f"u_{number}") for number in range(1500)])
    assert all(state is not None and (state.spent, state.held, state.forfeited) == (2, 0, 2) for state in states)


# -- credits and alerts, which are PostgreSQL's


async def test_credit_reaches_redis_within_a_second(
    server: RedisServer, make_ledger: MakeLedger, make_rig: MakeRig, sql: Sql
) -> None:
    proxies = [make_ledger(server) for _ in range(3)]
    read: list[Window] = []
    for ledger in proxies:
        # Without notifications, so that each proxy polls.
        rig = await make_rig()
        rig.feed.window_changed = functools.partial(ledger.refresh_soon, then=read.append)
        await rig.feed.poll()
        rig.feed.start()
    assert await granted(proxies[0], "a", 1, want=1000) == 1000
    assert await granted(proxies[0], "a", 2, granted=1000, used=1000, want=5) == 1000
    await credit(sql, window(), 7)
    before, total, serial = time.monotonic(), 1000, 2
    while total < 1007 and time.monotonic() - before < 5.0:
        serial += 1
        total = await granted(proxies[0], "a", serial, granted=total, used=total, want=5)
        await asyncio.sleep(0.02)
    assert total == 1007
    assert time.monotonic() - before < 1.0
    # A process that remembers that the window was spent requests units again.
    await until(lambda: len(read) == 3, "every proxy knows", seconds=1.0)
    # Further ones, and those of windows that Redis does not have, are read too.
    await credit(sql, window("tokens_per_day"), 5)
    await credit(sql, window(), -7)
    await asyncio.sleep(1.0)
    assert await granted(proxies[0], "a", serial + 1, granted=1007, used=1005, returned=2, want=5) == 1007


async def is_stale(server: RedisServer) -> bool:
    """Whether Redis has marked its only window as changed in PostgreSQL: the thirteenth of its values."""
    async with Redis.from_url(server.url) as client:
        (key,) = [key async for key in client.scan_iter("*:w:*")]
        packed = await client.getrange(key, 96, 103)
        assert isinstance(packed, bytes)
        return struct.unpack("<d", packed) == (2.0,)


async def test_window_that_changes_during_an_exchange_with_postgresql_is_read_once_more(
    server: RedisServer, make_ledger: MakeLedger, sql: Sql, dsn: str
) -> None:
    ledger, other = make_ledger(server), make_ledger(server)
    assert await granted(ledger, "a", 1, want=10) == 10
    await other.windows([window()])
    before = await sql.fetchval("SELECT serial FROM keyproxy.lease_holders")
    blocking = await asyncpg.connect(dsn)
    async with blocking.transaction():
        await blocking.execute("SELECT FROM keyproxy.windows FOR UPDATE")
        reads = [asyncio.create_task(ledger.refresh([window()]))]
        await until_blocked(sql, "sync_leases")
        reads.append(asyncio.create_task(other.refresh([window()])))
        await until(lambda: is_stale(server), "Redis has marked the window")
    await asyncio.gather(*reads)
    await blocking.close()
    assert await sql.fetchval("SELECT serial FROM keyproxy.lease_holders") == before + 2


async def test_one_exchange_reads_a_credit_for_all_proxies(
    server: RedisServer, make_ledger: MakeLedger, sql: Sql
) -> None:
    proxies = [make_ledger(server) for _ in range(20)]
    assert await granted(proxies[0], "a", 1, want=1000) == 1000
    for proxy in proxies:
        await proxy.windows([window()])
    before = await sql.fetchval("SELECT serial FROM keyproxy.lease_holders")
    await credit(sql, window(), 7)
    for proxy in proxies:
        proxy.refresh_soon(window(), lambda _window: None)
    await asyncio.sleep(0.5)
    assert await granted(proxies[0], "a", 2, granted=1000, used=1000, want=5) == 1005
    assert await sql.fetchval("SELECT serial FROM keyproxy.lease_holders") <= before + 3


async def alerted(sql: Sql) -> list[tuple[int, int, int]]:
    """The alerts: percentage, amount, spent."""
    rows = await sql.fetch("SELECT percentage, amount, spent FROM keyproxy.limit_alerts ORDER BY percentage")
    return [tuple(row) for row in rows]


async def test_alert_is_written_when_redis_account_reaches_the_percentage(ledger: RedisLedger, sql: Sql) -> None:
    assert await granted(ledger, "a", 1, want=900) == 900
    await granted(ledger, "a", 2, granted=900, used=799)
    await asyncio.sleep(0.3)
    assert await alerted(sql) == []
    await granted(ledger, "a", 3, granted=900, used=800)
    await until_row(sql, "SELECT 1 FROM keyproxy.limit_alerts")
    assert await alerted(sql) == [(80, 1000, 800)]
    await granted(ledger, "a", 4, granted=900, used=900, want=100)
    await granted(ledger, "a", 5, granted=1000, used=999)
    await granted(ledger, "a", 6, granted=1000, used=1000)
    await until_row(sql, "SELECT 1 FROM keyproxy.limit_alerts WHERE percentage = 100")
    assert await alerted(sql) == [(80, 1000, 800), (100, 1000, 1000)]


async def test_refusal_because_units_are_spent_writes_the_alert_of_a_window_that_is_used_up(
    ledger: RedisLedger, sql: Sql
) -> None:
    assert await granted(ledger, "a", 1, want=995) == 995
    # Reserved is not spent.
    assert await granted(ledger, "b", 1, want=6, at_least=6) == 0
    await asyncio.sleep(0.3)
    assert await alerted(sql) == []
    await granted(ledger, "a", 2, granted=995, used=995)
    # More than the limit is refused for another reason.
    assert await granted(ledger, "b", 2, want=1001, at_least=1001) == 0
    await until_row(sql, "SELECT 1 FROM keyproxy.limit_alerts")
    assert await alerted(sql) == [(80, 1000, 995)]
    assert await granted(ledger, "b", 3, want=6, at_least=6) == 0
    await until_row(sql, "SELECT 1 FROM keyproxy.limit_alerts WHERE percentage = 100")
    assert await alerted(sql) == [(80, 1000, 995), (100, 1000, 995)]
    assert await granted(ledger, "b", 4, want=5, at_least=5) == 5


async def test_first_refusal_under_a_limit_of_zero_requests_writes_the_alert_of_100(
    ledger: RedisLedger, sql: Sql
) -> None:
    replies = await ledger.sync("a", 1, [line(1, window("requests_per_day"), limit=0, want=5)])
    assert replies is not None
    assert replies[0].granted == 0
    await until_row(sql, "SELECT 1 FROM keyproxy.limit_alerts")
    assert await alerted(sql) == [(100, 0, 0)]


async def test_refusals_of_a_spent_window_send_postgresql_one_message_in_half_a_minute(
    ledger: RedisLedger, sql: Sql
) -> None:
    assert await granted(ledger, "a", 1, want=1000) == 1000
    await granted(ledger, "a", 2, granted=1000, used=1000)
    await until_row(sql, "SELECT 1 FROM keyproxy.limit_alerts WHERE percentage = 100")
    before = await sql.fetchval("SELECT serial FROM keyproxy.lease_holders")
    for serial in range(1, 200):
        assert await granted(ledger, "b", serial, want=1) == 0
    await asyncio.sleep(0.1)
    assert await sql.fetchval("SELECT serial FROM keyproxy.lease_holders") <= before + 2


# -- two releases


async def test_proxies_of_two_storage_formats_share_a_server_and_read_only_their_own_values(
    server: RedisServer, make_ledger: MakeLedger, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_codec, "VERSION", redis_codec.VERSION - 1)
    old = make_ledger(server)
    assert await granted(old, "a", 1, want=10) == 10
    monkeypatch.undo()
    new = make_ledger(server)
    # The new release's proxies are other holders, and the old one's go on with their leases.
    assert await granted(new, "a", 1, want=5) == 5
    assert await granted(old, "a", 2, granted=10, used=10, want=5) == 15
    held, serial = [15, 5], 2
    for _ in range(100):
        serial += 1
        for number, ledger in enumerate((old, new)):
            held[number] = await granted(ledger, "a", serial, granted=held[number], used=held[number], want=20)
        assert not await sql.fetch(PAST_LIMIT, 1000)
    assert 950 <= sum(held) <= 1000
    async with Redis.from_url(server.url) as client:
        keys = [key.decode() async for key in client.scan_iter("keyproxy:*")]
    markers = {re.sub(r"^(keyproxy:\{.*?\}:\d+).*", r"\1", key) for key in keys}
    assert {marker.rpartition(":")[2] for marker in markers} == {f"{redis_codec.VERSION - 1}", f"{redis_codec.VERSION}"}


# -- the complete ledger on this backend


@pytest.mark.parametrize("lose", LOSSES)
async def test_proxies_admit_no_more_than_the_limit_while_redis_loses_its_memory(
    server: RedisServer, make_ledger: MakeLedger, sql: Sql, lose: Callable[[RedisServer], Awaitable[None]]
) -> None:
    limit = 3000
    pool, plan = Pool("user", "u_42", False), Plan(requests_per_day=limit)

    def now() -> Moment:
        return Moment(time.time(), time.monotonic())

    proxies = [
        Ledger(make_ledger(server), schema.LedgerSettings(settle_seconds=0.05, lease_seconds=5.0), now)
        for _ in range(2)
    ]
    for proxy in proxies:
        proxy.start()
    admitted = 0
    is_spent = False

    async def work(proxy: Ledger) -> None:
        nonlocal admitted, is_spent
        allowance = Allowance(((pool, plan),))
        while not is_spent:
            await asyncio.sleep(0)
            try:
                hold = proxy.take(allowance, now())
            except Missing as missing:
                with contextlib.suppress(Refusal):
                    await missing.fetch_missing()
                continue
            except Refusal as refusal:
                is_spent = refusal.reason is Reason.QUOTA_EXHAUSTED
                await asyncio.sleep(0.01)
                continue
            admitted += 1
            proxy.settle(hold, was_sent=True)

    workers = [asyncio.create_task(work(proxy)) for proxy in proxies for _ in range(4)]
    for mark in (300, 900, 1500):
        while admitted < mark and not is_spent:
            await asyncio.sleep(0.001)
        server.command("SAVE")
        await lose(server)
    await asyncio.wait_for(asyncio.gather(*workers), 40.0)
    # Units in leases are lost together with the memory; at this pace that is a lot.
    assert 300 <= admitted <= limit
    assert not await sql.fetch(PAST_LIMIT, limit)
    for proxy in proxies:
        await proxy.close()
