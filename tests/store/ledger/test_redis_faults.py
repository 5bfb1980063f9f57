"""Faults of Redis: no responses, errors, clock jumps. The ledger is unavailable, never grants too much, and recovers.

Servers are real. After each fault the ledger recovers by itself, and PostgreSQL's bound holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from keyproxy.store.ledger.ledger_script import GenerationLost
from keyproxy.store.ledger.redis_backend import RedisLedger
from keyproxy.store.postgres.database import StoreUnavailable
from tests.contracts import line, window
from tests.store.harness import Sql, until_blocked
from tests.store.redis_harness import PAST_LIMIT, MakeLedger, MakeServer, granted, ledgers, make_due
from tests.store.redis_server import RedisServer
from tests.waiting import until

#: Of the package faketime (libfaketime), where the system has it.
_FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


@pytest.fixture
async def make_ledger(dsn: str) -> AsyncIterator[MakeLedger]:
    """A proxy's backend."""
    async with ledgers(dsn) as making:
        yield making


@pytest.fixture
def ledger(make_ledger: MakeLedger, server: RedisServer) -> RedisLedger:
    """One proxy's backend."""
    return make_ledger(server)


async def spent_out(ledger: RedisLedger, sql: Sql, *, holder: str = "z") -> int:
    """Take units until none are left, and return how many. PostgreSQL's bound holds throughout."""
    got = serial = 0
    while True:
        serial += 1
        more = await granted(ledger, holder, serial, granted=got, used=got, want=100)
        assert not await sql.fetch(PAST_LIMIT, 1000)
        if more == got:
            return got
        got = more


async def test_a_paused_server_is_unavailable_in_bounded_time_and_right_when_it_wakes(
    server: RedisServer, make_ledger: MakeLedger
) -> None:
    ledger = make_ledger(server, timeout_seconds=0.3)
    assert await granted(ledger, "a", 1, want=10) == 10
    server.pause()
    before = time.monotonic()
    for serial in (2, 3):
        with pytest.raises(StoreUnavailable):
            await granted(ledger, "a", serial, granted=10, used=serial, want=5)
    assert time.monotonic() - before < 2.0
    server.resume()
    await answers(ledger, "a", first_serial=4, expected=25)
    (state,) = await ledger.windows([window()])
    assert state is not None
    assert (state.spent, state.held) == (3, 22)


async def answers(ledger: RedisLedger, holder: str, *, first_serial: int, expected: int) -> None:
    """A paused server may process messages late; each counts once: 10 units were granted, then 5 three times."""
    for serial in range(first_serial, first_serial + 20):
        try:
            assert (
                await granted(ledger, holder, serial, granted=10, used=3, want=5 if serial == first_serial else 0)
                <= expected
            )
        except StoreUnavailable:
            await asyncio.sleep(0.05)
    total = await granted(ledger, holder, first_serial + 20, granted=10, used=3)
    want = expected - total
    assert want % 5 == 0
    assert await granted(ledger, holder, first_serial + 21, granted=10, used=3, want=want, at_least=want) == expected


async def test_late_reply_to_an_abandoned_call_is_not_delivered_to_another_call(
    ledger: RedisLedger, server: RedisServer
) -> None:
    assert await granted(ledger, "a", 1, want=1) == 1
    server.pause()
    calls = [asyncio.create_task(granted(ledger, f"h{number}", 1, want=7)) for number in range(4)]
    await asyncio.sleep(0.1)
    for call in calls:
        call.cancel()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*calls, return_exceptions=True))
    server.resume()
    for number in range(20):
        replies = await ledger.sync(
            "a", 2 + number, [line(100 + number, window(owner=f"u_{number}"), limit=9, want=number % 3)]
        )
        assert replies is not None
        assert (replies[0].lease, replies[0].granted) == (100 + number, number % 3)


async def test_a_slow_server_is_waited_for(ledger: RedisLedger, server: RedisServer) -> None:
    assert await granted(ledger, "a", 1, want=10) == 10
    server.command("CLIENT", "PAUSE", "400", "ALL")
    before = time.monotonic()
    assert await granted(ledger, "a", 2, granted=10, want=5) == 15
    assert time.monotonic() - before > 0.2


async def test_script_is_resent_to_a_server_that_has_forgotten_it(ledger: RedisLedger, server: RedisServer) -> None:
    assert await granted(ledger, "a", 1, want=10) == 10
    server.command("SCRIPT", "FLUSH")
    assert await granted(ledger, "a", 2, granted=10, want=5) == 15


async def test_full_server_changes_nothing_and_reports_an_error(ledger: RedisLedger, server: RedisServer) -> None:
    assert await granted(ledger, "a", 1, want=10) == 10
    server.command("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(StoreUnavailable, match=r"OOM|OutOfMemory"):
        await granted(ledger, "a", 2, granted=10, want=5)
    server.command("CONFIG", "SET", "maxmemory", "0")
    assert await granted(ledger, "a", 2, granted=10, want=5) == 15


async def test_server_that_may_evict_keys_is_rejected(ledger: RedisLedger, server: RedisServer) -> None:
    server.command("CONFIG", "SET", "maxmemory", "100mb")
    server.command("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    with pytest.raises(StoreUnavailable, match="noeviction"):
        await granted(ledger, "a", 1, want=10)
    server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert await granted(ledger, "a", 1, want=10) == 10


async def test_no_server_is_unavailable(ledger: RedisLedger, server: RedisServer) -> None:
    server.stop()
    with pytest.raises(StoreUnavailable):
        await granted(ledger, "a", 1, want=10)
    with pytest.raises(StoreUnavailable):
        await ledger.reap()


async def test_server_that_loads_its_file_is_unavailable_and_then_starts_a_new_generation(
    ledger: RedisLedger, server: RedisServer, sql: Sql
) -> None:
    assert await granted(ledger, "a", 1, want=10) == 10
    async with Redis.from_url(server.url) as client:
        await client.mset({f"another's:{number}": "x" * 100 for number in range(2_000)})
    server.command("SAVE")
    assert await granted(ledger, "a", 2, granted=10, used=10, want=90) == 100
    server.kill()
    # Half a second, in which it responds now and then.
    server.start("--key-load-delay", "250", "--loading-process-events-interval-bytes", "1024", until=b"-LOADING")
    with pytest.raises(StoreUnavailable):  # the connection is closed
        await granted(ledger, "a", 3, granted=100, used=100, want=5)
    with pytest.raises(StoreUnavailable, match="BusyLoading"):
        await granted(ledger, "a", 4, granted=100, used=100, want=5)
    server.wait()
    assert await granted(ledger, "a", 5, granted=100, used=100, want=5) == -1
    assert await spent_out(ledger, sql) <= 900


async def test_server_that_becomes_a_replica_and_a_primary_again_starts_a_new_generation(
    ledger: RedisLedger, server: RedisServer, sql: Sql
) -> None:
    assert await granted(ledger, "a", 1, want=100) == 100
    server.command("REPLICAOF", "127.0.0.1", "1")
    for may_write in ("no", "yes"):
        # A writable replica would have its primary's history and shares.
        server.command("CONFIG", "SET", "replica-read-only", may_write)
        with pytest.raises(StoreUnavailable, match="replica"):
            await granted(ledger, "a", 2, granted=100, used=100, want=5)
    server.command("REPLICAOF", "NO", "ONE")
    assert await granted(ledger, "a", 3, granted=100, used=100, want=5) == -1
    assert await spent_out(ledger, sql) <= 900


async def test_server_busy_with_another_client_s_script_is_unavailable_until_it_ends(
    ledger: RedisLedger, server: RedisServer
) -> None:
    assert await granted(ledger, "a", 1, want=10) == 10
    server.command("CONFIG", "SET", "lua-time-limit", "10")
    async with Redis.from_url(server.url) as another:
        busy = asyncio.ensure_future(another.eval("while true do end", 0))
        await is_busy(another)
        with pytest.raises(StoreUnavailable, match="BUSY"):
            await granted(ledger, "a", 2, granted=10, want=5)
        server.command("SCRIPT", "KILL")
        await asyncio.gather(busy, return_exceptions=True)
    # The repeated message was not processed before.
    assert await granted(ledger, "a", 3, granted=10, want=5) == 15


async def is_busy(client: Redis) -> None:
    """Wait until the server responds that it is busy with a script."""
    give_up = time.monotonic() + 10
    while time.monotonic() < give_up:
        try:
            await client.ping()
        except ResponseError as error:
            if str(error).startswith("BUSY"):
                return
            raise
    raise AssertionError("it is not busy")


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-lru"])
async def test_server_that_has_evicted_keys_is_rejected_until_reconfigured_and_grants_nothing_twice(
    ledger: RedisLedger, server: RedisServer, sql: Sql, policy: str
) -> None:
    assert await granted(ledger, "a", 1, want=100) == 100
    server.command("CONFIG", "SET", "maxmemory-policy", policy)
    server.command("CONFIG", "SET", "maxmemory", "1")
    assert await granted(ledger, "a", 2, granted=100, used=100, want=5) == -1
    with pytest.raises(StoreUnavailable, match=r"noeviction|OOM|OutOfMemory"):
        await granted(ledger, "b", 1, want=5)
    server.command("CONFIG", "SET", "maxmemory", "100mb")
    # The check for dead holders notices that a key is missing, whichever it is.
    with contextlib.suppress(StoreUnavailable):
        await ledger.reap()
    with pytest.raises(StoreUnavailable, match="noeviction"):
        await granted(ledger, "b", 2, want=5)
    server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert await spent_out(ledger, sql) <= 900


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("gone", ["*:h:*", "*:w:*", "*:holders", "*:due", "keyproxy:*}:?"])
async def test_nothing_is_granted_twice_whichever_key_is_missing(
    server: RedisServer, make_ledger: MakeLedger, sql: Sql, gone: str, seed: int
) -> None:
    chance = random.Random(seed)
    ledger = make_ledger(server)
    names, held, given, serial = ["a", "b"], [0, 0], 0, 0
    async with Redis.from_url(server.url) as client:
        for turn in range(30):
            number, serial = chance.randrange(2), serial + 1
            if turn % 10 == 5:
                keys = [key async for key in client.scan_iter(gone)]
                assert keys
                await client.delete(*chance.sample(keys, max(1, len(keys) // 2)))
            now = await granted(
                ledger, names[number], serial, granted=held[number], used=held[number], want=chance.choice([1, 30, 150])
            )
            if now < 0:
                names[number], held[number] = f"{serial}", 0
            else:
                given, held[number] = given + now - held[number], now
            assert not await sql.fetch(PAST_LIMIT, 1000)
    assert given + await spent_out(ledger, sql) <= 1000


async def delete(server: RedisServer, *patterns: str) -> None:
    """Delete all keys that match."""
    async with Redis.from_url(server.url) as client:
        for pattern in patterns:
            assert await client.delete(*[key async for key in client.scan_iter(pattern)])


@pytest.mark.parametrize("gone", [["*:w:*"], ["*:w:*", "*:due"]])
async def test_reply_about_the_share_of_a_deleted_window_grants_nothing_twice(
    server: RedisServer, make_ledger: MakeLedger, sql: Sql, dsn: str, gone: list[str]
) -> None:
    ledger, other = make_ledger(server), make_ledger(server)
    assert await granted(ledger, "a", 1, want=900) == 900
    assert await granted(other, "b", 1, want=100, at_least=100) == 100
    assert await granted(ledger, "a", 2, granted=900, used=900) == 900
    blocking = await asyncpg.connect(dsn)
    async with blocking.transaction():
        await blocking.execute("SELECT FROM keyproxy.windows FOR UPDATE")
        exchange = asyncio.create_task(ledger.refresh([window()]))
        await until_blocked(sql, "sync_leases")
        await delete(server, *gone)
        # A report of a holder that has no unused units. Unless the generation ends, it makes the window anew.
        has_ended = await granted(other, "c", 1) < 0
    await blocking.close()
    with contextlib.suppress(GenerationLost):
        await exchange
    assert has_ended == (len(gone) == 1)
    assert await spent_out(other, sql) == 0


async def holder_without_a_lease(ledger: RedisLedger) -> None:
    """Send the first message of another holder."""
    assert await granted(ledger, "b", 1, want=1) == -1


async def reporter(ledger: RedisLedger) -> None:
    """Send PostgreSQL the reports that are due."""
    await ledger.reap()


async def reader(ledger: RedisLedger) -> None:
    """Read the account of a holder that shuts down and has used all of its units."""
    await ledger.end("used")


@pytest.mark.parametrize("notices", [holder_without_a_lease, reporter, reader])
async def test_missing_window_ends_the_generation_whichever_call_notices(
    server: RedisServer, ledger: RedisLedger, sql: Sql, notices: Callable[[RedisLedger], Awaitable[None]]
) -> None:
    assert await granted(ledger, "used", 1, want=100) == 100
    assert await granted(ledger, "used", 2, granted=100, used=100) == 100
    assert await granted(ledger, "a", 1, want=100) == 100
    await ledger.refresh([window()])
    await make_due(server)
    await delete(server, "*:w:*")
    await notices(ledger)
    async with Redis.from_url(server.url) as client:
        assert [key async for key in client.scan_iter("keyproxy:*}:?")] == []
    assert await granted(ledger, "a", 2, granted=100, used=100) == -1
    assert await spent_out(ledger, sql) <= 800


async def test_promoted_replica_starts_its_own_generation(make_server: MakeServer, make_ledger: MakeLedger) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first = make_server("a", "--port", str(port), "--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0")
    second = make_server("b", "--replicaof", f"127.0.0.1 {port}")
    old, new = make_ledger(first), make_ledger(second)
    # The first replica changes the primary's history: the generation starts after that.
    async with Redis.from_url(second.url) as client:

        async def is_linked() -> bool:
            return bool((await client.info("replication"))["master_link_status"] == "up")

        await until(is_linked, "the replica is linked", seconds=20)
    assert await granted(old, "a", 1, want=10) == 10
    with pytest.raises(StoreUnavailable, match="replica"):
        await granted(new, "b", 1, want=1)
    # Whether or not it has received the ten, it does not grant them; both go on, each from its own share.
    second.command("REPLICAOF", "NO", "ONE")
    taken = 10 + await granted(new, "b", 2, want=1000, at_least=1)
    taken += max(0, await granted(old, "a", 2, granted=10, want=1000, at_least=1) - 10)
    assert taken <= 1000


# -- a clock that jumps


DAY = 86_400


#: Sets a server's clock ahead of ours by this many seconds.
Jump = Callable[[int], Awaitable[None]]


@pytest.fixture
def jumping(make_server: MakeServer, short_directory: Path) -> tuple[RedisServer, Jump]:
    """A server, and a function that makes its clock jump."""
    if not _FAKETIME:
        pytest.skip("libfaketime is not installed")
    file = short_directory / "ahead"
    file.write_text("+0")
    environment = {
        "LD_PRELOAD": str(_FAKETIME[0]), "FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    server = make_server("r", environment=environment)

    async def jump(seconds: int) -> None:
        file.write_text(f"{seconds:+d}")
        # libfaketime may use the previous offset for one more call.
        give_up = time.monotonic() + 5
        async with Redis.from_url(server.url) as client:
            while abs(int((await client.eval("return redis.call('TIME')", 0))[0]) - time.time() - seconds) > 2:
                assert time.monotonic() < give_up, "the server's clock does not jump"

    return server, jump


@pytest.mark.parametrize("ahead", [-3_600, 3 * DAY, -3 * DAY, 45 * DAY])
async def test_clock_that_jumps_and_returns_grants_nothing_twice_and_the_window_can_be_spent_completely(
    jumping: tuple[RedisServer, Jump], make_ledger: MakeLedger, sql: Sql, ahead: int
) -> None:
    server, jump = jumping
    ledger, other = make_ledger(server), make_ledger(server)
    assert await granted(ledger, "a", 1, want=100) == 100
    for step, seconds in enumerate((ahead, 0)):
        await jump(seconds)
        await other.reap()
        for holder in ("a", "b"):
            # Whichever day it is, each window's bound holds. A day that has ended grants nothing.
            with contextlib.suppress(StoreUnavailable):
                await ledger.sync(f"{holder}{step}", 2, [line(limit=1000, want=10)])
        await other.reap()
        assert not await sql.fetch(PAST_LIMIT, 1000)
    # The first holder has a hundred; what others were granted of this day meanwhile is charged to it.
    assert await spent_out(ledger, sql) <= 900
    (state,) = await ledger.windows([window()])
    assert state is not None
    assert state.spent + state.held == 1000


async def test_turn_and_rate_with_a_future_time_do_not_block(
    jumping: tuple[RedisServer, Jump], make_ledger: MakeLedger
) -> None:
    server, jump = jumping
    ledger, other = make_ledger(server), make_ledger(server)
    rate = line(1, window("rate"), limit=5, want=5, interval_seconds=0.01)
    await jump(7200)
    assert await granted(ledger, "a", 1, want=10) == 10
    assert await ledger.sync("a", 2, [rate]) is not None
    async with Redis.from_url(server.url) as client:
        # The state that a proxy leaves if it dies during its exchange with PostgreSQL.
        (marker,) = [key async for key in client.scan_iter("keyproxy:*}:?")]
        await client.hset(marker, mapping={"turn_by": "dead", "turn_since": str(time.time() + 7200)})
    await jump(0)
    assert await granted(other, "b", 1, want=400) > 10
    replies = await other.sync("b", 2, [rate])
    assert replies is not None
    assert replies[0].granted or replies[0].wait_seconds <= 0.05


async def test_due_windows_are_reported_although_the_set_of_them_is_missing(
    jumping: tuple[RedisServer, Jump], make_ledger: MakeLedger, sql: Sql
) -> None:
    server, jump = jumping
    ledger = make_ledger(server)
    assert await granted(ledger, "a", 1, want=10) == 10
    async with Redis.from_url(server.url) as client:
        assert await client.delete(*[key async for key in client.scan_iter("*:due")]) == 1
    await jump(70)
    assert await granted(ledger, "a", 2, granted=10, used=7) == 10
    await ledger.reap()
    assert await sql.fetchval("SELECT spent FROM keyproxy.windows") == 7


async def test_window_of_a_minute_is_reported_and_deleted_after_its_end(
    jumping: tuple[RedisServer, Jump], make_ledger: MakeLedger, sql: Sql
) -> None:
    server, jump = jumping
    ledger = make_ledger(server)
    minute = window("requests_per_minute", selector="model:gpt-4o")
    replies = await ledger.sync("a", 1, [line(1, minute, limit=1000, want=10), line(2, minute, limit=1000, want=5)])
    assert replies is not None
    starts = replies[0].starts
    await ledger.sync("a", 2, [line(2, minute, limit=1000, granted=5, used=3, returned=2, is_closing=True)])
    for ahead, used in ((70, 0), (140, 7)):
        # A request that began in its minute is still in flight, then it ends. Counted from the start of the minute.
        await jump(starts + ahead - int(time.time()))
        told = line(1, minute, limit=1000, granted=0, used=used, is_closing=bool(used))._replace(starts=starts)
        assert await ledger.sync("a", ahead, [told]) is not None
        # At once, also if an exchange that began earlier has just ended.
        await make_due(server)
        await ledger.reap()
        assert await sql.fetchval("SELECT spent FROM keyproxy.windows WHERE selector <> ''") == 3 + used
    await jump(starts + 240 - int(time.time()))
    await ledger.reap()
    async with Redis.from_url(server.url) as client:
        assert [key async for key in client.scan_iter("*:w:*")] == []
    assert await sql.fetchval("SELECT spent + held FROM keyproxy.windows WHERE selector <> ''") == 10
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.leases") == 0
