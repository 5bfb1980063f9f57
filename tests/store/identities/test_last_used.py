"""The time of last use is recorded, rarely and with a delay, and nothing else depends on it."""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from keyproxy.auth.api_key import SecretKey
from keyproxy.model import NEVER, Identity, Moment
from keyproxy.reasons import Reason
from keyproxy.store.identities.last_used import LastUsed
from keyproxy.store.postgres import queries
from tests import fakes
from tests.store.conftest import MakeRig
from tests.store.harness import Rig, Sql, add_key, add_keys, add_user, audit_rows, change_rows, until_row


@pytest.fixture
async def key(rig: Rig) -> SecretKey:
    """One unused key."""
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    await rig.feed.poll()
    return secret


async def noted(sql: Sql, key_id: str = "key_1") -> datetime | None:
    """The time of last use of this key in the store."""
    at: datetime | None = await sql.fetchval("SELECT last_used_at FROM keyproxy.api_keys WHERE id = $1", key_id)
    return at


def wall(rig: Rig) -> datetime:
    """This instant on the rig's clock."""
    return datetime.fromtimestamp(rig.clock.wall_seconds, UTC)


@dataclass
class Entry:
    """A cached key with the attributes that LastUsed needs."""

    identity: Identity
    mark_due: float = 0.0


def used_key(key_id: str) -> Entry:
    """A cached key with this id."""
    return Entry(Identity(key_id, "u_42", "acme", frozenset(), False, NEVER, None, b""))


def entries(count: int) -> list[Entry]:
    """Cached keys `key_of_<number>`."""
    return [used_key(f"key_of_{number}") for number in range(count)]


async def test_use_is_recorded_with_its_time(rig: Rig, key: SecretKey) -> None:
    assert await noted(rig.sql) is None
    used = wall(rig)
    await rig.resolve(key)
    rig.clock.advance(3)
    await rig.last_used.flush()
    assert await noted(rig.sql) == used


async def test_unused_or_refused_key_has_no_time_of_last_use(rig: Rig, key: SecretKey) -> None:
    await rig.resolve(fakes.key(2))
    await rig.last_used.flush()
    assert rig.door.queries["mark_used"] == 0
    assert await noted(rig.sql) is None


async def test_key_in_steady_use_is_recorded_once_a_minute(rig: Rig, key: SecretKey) -> None:
    await rig.resolve(key)
    first = wall(rig)
    for seconds, expected in [(0.0, first), (59.5, first), (0.5, None)]:
        rig.clock.advance(seconds)
        await rig.feed.poll()
        for _ in range(10):
            await rig.resolve(key)
        await rig.last_used.flush()
        assert await noted(rig.sql) == (expected or wall(rig))
    await rig.is_quiet()
    assert rig.door.queries["mark_used"] == 2


async def test_refresh_of_the_entry_does_not_restart_the_minute(rig: Rig, key: SecretKey) -> None:
    await rig.resolve(key)
    await rig.last_used.flush()
    rig.clock.advance(20)
    rig.cache.forget_key(key.digest())
    await rig.resolve(key)
    await rig.last_used.flush()
    assert rig.door.queries["mark_used"] == 1


async def test_older_use_does_not_replace_a_newer_one(rig: Rig, key: SecretKey) -> None:
    newer = wall(rig)
    await rig.sql.execute("UPDATE keyproxy.api_keys SET last_used_at = $1", newer)
    rig.clock.wall_seconds -= 600
    await rig.resolve(key)
    await rig.last_used.flush()
    assert await noted(rig.sql) == newer


@pytest.mark.parametrize("count", [1, 2, 5_001])
async def test_notes_of_many_keys_are_written_in_few_statements(rig: Rig, count: int) -> None:
    await add_user(rig.sql)
    await rig.sql.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest)"
        " SELECT 'key_of_' || n, 'u_42', sha256(n::text::bytea) FROM generate_series(0, $1::int - 1) AS n",
        count,
    )
    before = await change_rows(rig.sql), await audit_rows(rig.sql)
    for entry in entries(count):
        rig.last_used.mark(entry, rig.clock())
    await rig.last_used.flush()
    assert await rig.sql.fetchval("SELECT count(*) FROM keyproxy.api_keys WHERE last_used_at IS NOT NULL") == count
    assert rig.door.queries["mark_used"] == (count + 4_999) // 5_000
    assert (await change_rows(rig.sql), await audit_rows(rig.sql)) == before


@pytest.mark.parametrize(("count", "statements"), [(20, 1), (1_000, 50), (6_000, 100)])
async def test_notes_are_written_in_small_portions_during_operation(rig: Rig, count: int, statements: int) -> None:
    await add_user(rig.sql)
    await rig.sql.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest)"
        " SELECT 'key_of_' || n, 'u_42', sha256(n::text::bytea) FROM generate_series(0, $1::int - 1) AS n",
        count,
    )
    for entry in entries(count):
        rig.last_used.mark(entry, rig.clock())
    await rig.last_used.flush(is_paced=True)
    assert await rig.sql.fetchval("SELECT count(*) FROM keyproxy.api_keys WHERE last_used_at IS NOT NULL") == count
    assert rig.door.queries["mark_used"] == statements


async def test_notes_that_a_cancelled_flush_has_not_written_are_written_by_the_next(rig: Rig) -> None:
    await add_user(rig.sql)
    await rig.sql.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest)"
        " SELECT 'key_of_' || n, 'u_42', sha256(n::text::bytea) FROM generate_series(0, 99) AS n"
    )
    for entry in entries(100):
        rig.last_used.mark(entry, rig.clock())
    flush = asyncio.create_task(rig.last_used.flush(is_paced=True))
    while rig.door.queries["mark_used"] < 2:
        await asyncio.sleep(0.001)
    flush.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flush
    await rig.last_used.flush()
    assert await rig.sql.fetchval("SELECT count(*) FROM keyproxy.api_keys WHERE last_used_at IS NOT NULL") == 100


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_cost_of_a_note_does_not_grow_with_the_number_of_keys_with_outdated_statistics(
    sql: Sql, mode: str
) -> None:
    """The keys are imported into a table with statistics collected when it was empty, but not small."""
    await add_user(sql)
    await sql.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest)"
        " SELECT 'gone_' || n, 'u_42', sha256(('gone ' || n)::bytea) FROM generate_series(1, 10000) AS n"
    )
    await sql.execute("DELETE FROM keyproxy.api_keys")
    await sql.execute("ANALYZE keyproxy.api_keys")
    await sql.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest)"
        " SELECT 'key_of_' || n, 'u_42', sha256(n::text::bytea) FROM generate_series(1, 2000) AS n"
    )
    statement = queries.load()["mark_used"]
    await sql.execute(f"SET plan_cache_mode = {mode}")
    await sql.execute(f"PREPARE mark_used (text[], text) AS {statement}")
    given = await sql.fetchval(
        "SELECT concat_ws(', ', quote_literal(array_agg(id)::text), quote_literal(json_object_agg(id, 1.8e9)))"
        " FROM keyproxy.api_keys"
    )
    rows = await sql.fetch(f"EXPLAIN (ANALYZE, TIMING OFF, SUMMARY OFF) EXECUTE mark_used ({given})")
    plan = [row[0] for row in rows]
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.api_keys WHERE last_used_at IS NOT NULL") == 2_000
    # The plan compares no key with every other one.
    assert [line for line in plan if "Nested Loop" in line or "Join Filter" in line] == []


async def test_nothing_to_record_sends_no_statement(rig: Rig) -> None:
    await rig.last_used.flush()
    assert rig.door.queries["mark_used"] == 0


async def test_deleted_key_does_not_block_the_notes_of_others(rig: Rig) -> None:
    await add_user(rig.sql)
    gone, other = await add_keys(rig.sql, [1, 2])
    await rig.resolve(gone)
    await rig.resolve(other)
    await rig.sql.execute("DELETE FROM keyproxy.api_keys WHERE id = 'key_1'")
    await rig.last_used.flush()
    assert await noted(rig.sql, "key_2") == wall(rig)


async def test_notes_wait_while_the_store_is_down_and_the_newest_is_written(rig: Rig, key: SecretKey) -> None:
    await rig.resolve(key)
    await rig.goes_down()
    await rig.last_used.flush()
    rig.clock.advance(120)
    assert isinstance(await rig.resolve(key), Identity)
    await rig.last_used.flush()
    used = wall(rig)
    await rig.comes_back()
    await rig.last_used.flush()
    assert await noted(rig.sql) == used


class KeyId(str):
    """A key id that supports weak references, to detect whether it is still in memory."""

    __slots__ = ("__weakref__",)


async def test_waiting_notes_are_bounded_and_the_oldest_are_dropped_first(rig: Rig) -> None:
    await rig.relay.cut()
    for number in range(200_001):
        rig.last_used.mark(used_key(str(number)), rig.clock())
    await rig.last_used.flush()
    (first,) = rig.door.arguments["mark_used"]
    ids = first[0]
    assert isinstance(ids, list)
    assert "0" not in ids
    assert "1" in ids


async def test_notes_made_during_a_failing_write_stay_within_the_bound(rig: Rig) -> None:
    in_memory: weakref.WeakSet[KeyId] = weakref.WeakSet()

    def use(first: int, last: int) -> None:
        for number in range(first, last):
            key_id = KeyId(number)
            in_memory.add(key_id)
            rig.last_used.mark(used_key(key_id), rig.clock())

    async def meanwhile() -> None:
        use(150_000, 250_000)
        await rig.relay.cut()

    use(0, 150_000)
    rig.door.before["mark_used"] = meanwhile
    await rig.last_used.flush()
    rig.door.arguments.clear()
    assert len(in_memory) <= 200_000
    assert "249999" in set(in_memory)


async def test_periodic_flush_writes_within_seconds(rig: Rig, key: SecretKey) -> None:
    rig.last_used.start()
    await rig.resolve(key)
    await until_row(rig.sql, "SELECT 1 FROM keyproxy.api_keys WHERE last_used_at IS NOT NULL", seconds=4)
    await rig.last_used.close()
    assert await noted(rig.sql) == wall(rig)


async def test_close_flushes_waiting_notes(rig: Rig, key: SecretKey) -> None:
    rig.last_used.start()
    await rig.resolve(key)
    await rig.last_used.close()
    assert await noted(rig.sql) == wall(rig)


async def test_close_does_not_wait_for_a_store_that_is_down(rig: Rig, key: SecretKey) -> None:
    rig.last_used.start()
    await rig.resolve(key)
    await rig.goes_down()
    await rig.last_used.close()
    assert rig.door.queries["mark_used"] == 0


async def test_close_during_a_write_loses_no_note(rig: Rig, key: SecretKey) -> None:
    writing = asyncio.Event()

    async def hang() -> None:
        del rig.door.before["mark_used"]
        writing.set()
        await asyncio.Event().wait()

    rig.door.before["mark_used"] = hang
    rig.last_used.start()
    await rig.resolve(key)
    await writing.wait()
    await rig.last_used.close()
    assert await noted(rig.sql) == wall(rig)


async def test_failing_note_does_not_mark_the_store_as_down(make_rig: MakeRig) -> None:
    """A row is locked for long, for example by an open transaction in psql, while all else works."""
    rig = await make_rig(statement_timeout_seconds=0.3)
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    await rig.feed.poll()
    await rig.resolve(secret)
    async with rig.sql.transaction():
        await rig.sql.execute("SELECT 1 FROM keyproxy.api_keys FOR UPDATE")
        await rig.last_used.flush()
        assert not rig.door.is_down
        assert await rig.resolve(fakes.key(9)) is Reason.KEY_INVALID


async def test_locked_row_does_not_block_the_notes_of_others(make_rig: MakeRig) -> None:
    rig = await make_rig(statement_timeout_seconds=0.3)
    await add_user(rig.sql)
    for secret in await add_keys(rig.sql, [1, 2]):
        await rig.resolve(secret)
    async with rig.sql.transaction():
        await rig.sql.execute("SELECT 1 FROM keyproxy.api_keys WHERE id = 'key_1' FOR UPDATE")
        await rig.last_used.flush()
        assert await noted(rig.sql, "key_2") == wall(rig)


async def test_two_proxies_recording_the_same_keys_concurrently_both_succeed(make_rig: MakeRig) -> None:
    one, two = await make_rig(), await make_rig()
    await add_user(one.sql)
    await one.sql.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest)"
        " SELECT 'key_of_' || n, 'u_42', sha256(n::text::bytea) FROM generate_series(0, 999) AS n"
    )
    for turn in range(5):
        at = Moment(1_800_000_000.0 + 60 * turn, 0.0)
        for entry in entries(1_000):
            one.last_used.mark(entry, at)
        for entry in reversed(entries(1_000)):
            two.last_used.mark(entry, at)
        await asyncio.gather(one.last_used.flush(), two.last_used.flush())
        assert (one.door.is_down, two.door.is_down) == (False, False)


async def test_minute_is_measured_with_the_monotonic_clock(rig: Rig) -> None:
    entry, notes = Entry(fakes.identity()), LastUsed(rig.door)
    notes.mark(entry, Moment(1_800_000_000.0, 100.0))
    assert entry.mark_due == 160.0
