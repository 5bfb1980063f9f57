"""When a key was last used is noted, seldom and late, and nothing else depends on it."""

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
    """One key, which nobody has used."""
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    await rig.feed.look()
    return secret


async def noted(sql: Sql, key_id: str = "key_1") -> datetime | None:
    """When this key was last used, as far as the store knows."""
    at: datetime | None = await sql.fetchval("SELECT last_used_at FROM keyproxy.api_keys WHERE id = $1", key_id)
    return at


def wall(rig: Rig) -> datetime:
    """This instant on the rig's clock."""
    return datetime.fromtimestamp(rig.clock.wall_seconds, UTC)


@dataclass
class Entry:
    """A cached key, as far as a note of its use needs one."""

    identity: Identity
    mark_due: float = 0.0


def used_key(key_id: str) -> Entry:
    """A cached key with this id."""
    return Entry(Identity(key_id, "u_42", "acme", frozenset(), False, NEVER, None, b""))


def entries(count: int) -> list[Entry]:
    """Cached keys `key_of_<number>`."""
    return [used_key(f"key_of_{number}") for number in range(count)]


async def test_a_use_is_noted_with_its_time(rig: Rig, key: SecretKey) -> None:
    assert await noted(rig.sql) is None
    used = wall(rig)
    await rig.resolve(key)
    rig.clock.advance(3)
    await rig.last_used.flush()
    assert await noted(rig.sql) == used


async def test_a_key_that_was_not_used_or_not_let_in_has_no_note(rig: Rig, key: SecretKey) -> None:
    await rig.resolve(fakes.key(2))
    await rig.last_used.flush()
    assert rig.door.asked["mark_used"] == 0
    assert await noted(rig.sql) is None


async def test_a_key_in_steady_use_is_noted_once_a_minute(rig: Rig, key: SecretKey) -> None:
    await rig.resolve(key)
    first = wall(rig)
    for seconds, expected in [(0.0, first), (59.5, first), (0.5, None)]:
        rig.clock.advance(seconds)
        await rig.feed.look()
        for _ in range(10):
            await rig.resolve(key)
        await rig.last_used.flush()
        assert await noted(rig.sql) == (expected or wall(rig))
    await rig.is_quiet()
    assert rig.door.asked["mark_used"] == 2


async def test_a_refreshed_answer_does_not_begin_the_minute_anew(rig: Rig, key: SecretKey) -> None:
    await rig.resolve(key)
    await rig.last_used.flush()
    rig.clock.advance(20)
    rig.cache.forget_key(key.digest())
    await rig.resolve(key)
    await rig.last_used.flush()
    assert rig.door.asked["mark_used"] == 1


async def test_an_older_use_does_not_replace_a_newer_one(rig: Rig, key: SecretKey) -> None:
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
    assert rig.door.asked["mark_used"] == (count + 4_999) // 5_000
    assert (await change_rows(rig.sql), await audit_rows(rig.sql)) == before


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_the_work_of_a_note_does_not_grow_with_the_number_of_keys_whatever_statistics_say(
    sql: Sql, mode: str
) -> None:
    """Keys that were imported into a table whose statistics are of a time when it was empty, but not small."""
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
    # Nothing is compared with every other key.
    assert [line for line in plan if "Nested Loop" in line or "Join Filter" in line] == []


async def test_nothing_to_note_is_no_statement(rig: Rig) -> None:
    await rig.last_used.flush()
    assert rig.door.asked["mark_used"] == 0


async def test_a_key_that_went_before_its_use_was_written_keeps_no_other_note_back(rig: Rig) -> None:
    await add_user(rig.sql)
    gone, other = await add_keys(rig.sql, [1, 2])
    await rig.resolve(gone)
    await rig.resolve(other)
    await rig.sql.execute("DELETE FROM keyproxy.api_keys WHERE id = 'key_1'")
    await rig.last_used.flush()
    assert await noted(rig.sql, "key_2") == wall(rig)


async def test_notes_wait_while_the_store_is_down_and_the_newest_counts(rig: Rig, key: SecretKey) -> None:
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
    """An id of a key that can be seen to be in memory still."""

    __slots__ = ("__weakref__",)


async def test_notes_that_wait_are_bounded_and_the_oldest_go_first(rig: Rig) -> None:
    await rig.relay.cut()
    for number in range(200_001):
        rig.last_used.mark(used_key(str(number)), rig.clock())
    await rig.last_used.flush()
    (first,) = rig.door.arguments["mark_used"]
    ids = first[0]
    assert isinstance(ids, list)
    assert "0" not in ids
    assert "1" in ids


async def test_notes_that_come_while_a_write_fails_stay_within_the_bound(rig: Rig) -> None:
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


async def test_the_running_writer_writes_within_seconds(rig: Rig, key: SecretKey) -> None:
    rig.last_used.start()
    await rig.resolve(key)
    await until_row(rig.sql, "SELECT 1 FROM keyproxy.api_keys WHERE last_used_at IS NOT NULL", seconds=4)
    await rig.last_used.close()
    assert await noted(rig.sql) == wall(rig)


async def test_what_was_noted_is_written_at_the_end(rig: Rig, key: SecretKey) -> None:
    rig.last_used.start()
    await rig.resolve(key)
    await rig.last_used.close()
    assert await noted(rig.sql) == wall(rig)


async def test_the_end_does_not_wait_for_a_store_that_is_down(rig: Rig, key: SecretKey) -> None:
    rig.last_used.start()
    await rig.resolve(key)
    await rig.goes_down()
    await rig.last_used.close()
    assert rig.door.asked["mark_used"] == 0


async def test_the_end_in_the_middle_of_a_write_loses_no_note(rig: Rig, key: SecretKey) -> None:
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


async def test_a_use_that_cannot_be_noted_does_not_make_the_store_count_as_down(make_rig: MakeRig) -> None:
    """Somebody holds a row for long, say an open transaction in psql: the store answers all else."""
    rig = await make_rig(statement_timeout_seconds=0.3)
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    await rig.feed.look()
    await rig.resolve(secret)
    async with rig.sql.transaction():
        await rig.sql.execute("SELECT 1 FROM keyproxy.api_keys FOR UPDATE")
        await rig.last_used.flush()
        assert not rig.door.is_down
        assert await rig.resolve(fakes.key(9)) is Reason.KEY_INVALID


async def test_a_row_that_somebody_holds_keeps_no_other_note_back(make_rig: MakeRig) -> None:
    rig = await make_rig(statement_timeout_seconds=0.3)
    await add_user(rig.sql)
    for secret in await add_keys(rig.sql, [1, 2]):
        await rig.resolve(secret)
    async with rig.sql.transaction():
        await rig.sql.execute("SELECT 1 FROM keyproxy.api_keys WHERE id = 'key_1' FOR UPDATE")
        await rig.last_used.flush()
        assert await noted(rig.sql, "key_2") == wall(rig)


async def test_two_proxies_that_note_the_same_keys_at_once_both_succeed(make_rig: MakeRig) -> None:
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


async def test_the_minute_is_measured_on_the_clock_that_never_jumps(rig: Rig) -> None:
    entry, notes = Entry(fakes.identity()), LastUsed(rig.door)
    notes.mark(entry, Moment(1_800_000_000.0, 100.0))
    assert entry.mark_due == 160.0
