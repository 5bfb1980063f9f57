"""The identity cache: which entries are served, when the store is queried, and which refusals must never happen."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from datetime import UTC, datetime

import asyncpg
import pytest

from keyproxy.auth import authorization
from keyproxy.auth.api_key import SecretKey
from keyproxy.config.schema import Cache
from keyproxy.model import Identity, Moment, Route
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.identities.cache import LookupCounts
from keyproxy.store.identities.identity_rows import BY_DIGEST
from keyproxy.store.identities.lookup_batcher import LookupBatcher
from keyproxy.store.postgres.database import Row
from tests import fakes
from tests.store.conftest import MakeRig
from tests.store.harness import Rig, add_key, add_keys, add_user
from tests.waiting import until

FRESH, STALE, UNKNOWN = 30.0, 600.0, 5.0
ROUTE = Route("*", frozenset())


@pytest.fixture
async def known(rig: Rig) -> SecretKey:
    """A key that has just been cached."""
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    await rig.feed.poll()
    assert isinstance(await rig.resolve(secret), Identity)
    return secret


# -- from row to identity


@pytest.mark.parametrize(("is_test", "mode"), [(False, b"false"), (True, b"true")])
async def test_identity_contains_the_values_of_the_tables(rig: Rig, is_test: bool, mode: bytes) -> None:
    await add_user(rig.sql, "u_42", "acme")
    secret = await add_key(rig.sql, 7)
    await rig.sql.execute("UPDATE keyproxy.api_keys SET is_test = $1, scopes = '{b:2,a:1}'", is_test)
    who = await rig.resolve(secret)
    assert isinstance(who, Identity)
    assert (who.key_id, who.user_id, who.tenant_id, who.is_test) == ("key_7", "u_42", "acme", is_test)
    assert (sorted(who.scopes), who.standing) == (["a:1", "b:2"], None)
    assert who.header_block == (
        b"X-Keyproxy-User: u_42\r\nX-Keyproxy-Tenant: acme\r\nX-Keyproxy-Scope: b:2 a:1\r\n"
        b"X-Keyproxy-Test: " + mode + b"\r\nX-Keyproxy-Key-Id: key_7\r\n"
    )


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE keyproxy.tenants SET name = 'x'", None),
        ("UPDATE keyproxy.api_keys SET revoked_at = now()", Reason.KEY_REVOKED),
        ("UPDATE keyproxy.users SET disabled_at = now()", Reason.ACCOUNT_DISABLED),
        ("UPDATE keyproxy.tenants SET disabled_at = now()", Reason.ACCOUNT_DISABLED),
        ("UPDATE keyproxy.api_keys SET expires_at = '-infinity'", Reason.KEY_EXPIRED),
        ("UPDATE keyproxy.api_keys SET expires_at = 'infinity'", None),
        ("UPDATE keyproxy.api_keys SET expires_at = '2000-01-01Z', revoked_at = now()", Reason.KEY_REVOKED),
        ("DELETE FROM keyproxy.api_keys", Reason.KEY_INVALID),
    ],
)
async def test_refusal_of_an_existing_key_has_the_actual_reason(
    rig: Rig, known: SecretKey, statement: str, expected: Reason | None
) -> None:
    await rig.sql.execute(statement)
    await rig.feed.poll()
    assert _admitted(await rig.resolve(known), rig.clock()) is expected


def _admitted(found: Identity | Reason, now: Moment) -> Reason | None:
    """The reason of a refusal, None if the request is accepted."""
    if isinstance(found, Reason):
        return found
    try:
        authorization.admit(found, ROUTE, now)
    except Refusal as refusal:
        return refusal.reason
    return None


@pytest.mark.parametrize(
    ("seconds", "expected"), [(-1.0, None), (-0.001, None), (0.0, Reason.KEY_EXPIRED), (0.001, Reason.KEY_EXPIRED)]
)
async def test_cached_key_stops_working_at_its_expiry(rig: Rig, seconds: float, expected: Reason | None) -> None:
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    expires = rig.clock.wall_seconds + 10
    await rig.sql.execute("UPDATE keyproxy.api_keys SET expires_at = $1", datetime.fromtimestamp(expires, UTC))
    await rig.resolve(secret)
    rig.clock.advance(10)
    served = rig.hot(secret)
    assert isinstance(served, Identity)
    assert _admitted(served, Moment(expires + seconds, rig.clock.mono_seconds)) is expected


# -- fresh, stale, changed

HIT, STALE_HIT, ASKS = "hit", "stale", "asks"

RULES = [
    # age, feed is current, store is down -> outcome
    (0.0, True, False, HIT),
    (0.0, False, True, HIT),
    (FRESH - 0.5, True, False, HIT),
    (FRESH - 0.5, False, False, HIT),
    (FRESH - 0.5, False, True, HIT),
    (FRESH, True, False, STALE_HIT),
    (FRESH, False, False, ASKS),
    (FRESH, False, True, STALE_HIT),
    (STALE - 0.5, True, False, STALE_HIT),
    (STALE - 0.5, False, False, ASKS),
    (STALE - 0.5, False, True, STALE_HIT),
    (STALE, True, False, ASKS),
    (STALE, False, False, ASKS),
    (STALE, False, True, Reason.STORE_UNAVAILABLE),
    (STALE * 10, False, True, Reason.STORE_UNAVAILABLE),
]


async def _bring_about(rig: Rig, *, is_current: bool, is_down: bool) -> None:
    """Set the state of feed and store now."""
    if is_down:
        await rig.goes_down()
    if is_current:
        await rig.feed.poll()
    assert rig.feed.is_current() is is_current
    assert rig.door.is_down is is_down


def _what(rig: Rig, secret: SecretKey) -> object:
    """The outcome of a request with this key, by its counter."""
    before = rig.cache.counts.by_name()
    found = rig.hot(secret)
    counted = [name for name, count in rig.cache.counts.by_name().items() if count != before[name]]
    if isinstance(found, Identity):
        return counted[0]
    return ASKS if found is None else found


@pytest.mark.parametrize(("age", "is_current", "is_down", "expected"), RULES)
async def test_how_long_an_entry_is_served(
    make_rig: MakeRig, age: float, is_current: bool, is_down: bool, expected: object
) -> None:
    rig = await make_rig()
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    await rig.feed.poll()
    rig.clock.advance(5)
    await rig.resolve(secret)
    # Poll in between, so that the feed has no gap after which it would distrust all entries.
    while age > 300:
        rig.clock.advance(300)
        await rig.feed.poll()
        age -= 300
    rig.clock.advance(age)
    await _bring_about(rig, is_current=is_current, is_down=is_down)
    assert _what(rig, secret) == expected


async def test_fresh_entry_is_served_without_a_query(rig: Rig, known: SecretKey) -> None:
    for _ in range(100):
        assert isinstance(rig.hot(known), Identity)
    assert rig.door.look_ups == 1


async def test_stale_entry_is_served_and_refreshed_once_in_the_background(rig: Rig, known: SecretKey) -> None:
    rig.clock.advance(FRESH)
    await rig.feed.poll()
    hold = rig.door.hold("identities_by_digest")
    for _ in range(100):
        assert _what(rig, known) == STALE_HIT
    hold.release()
    await rig.is_quiet()
    assert rig.door.look_ups == 2
    assert _what(rig, known) == HIT
    # The refresh restarts the whole span.
    rig.clock.advance(STALE - 0.5)
    await rig.goes_down()
    assert _what(rig, known) == STALE_HIT


async def test_failed_refresh_is_retried_and_removes_nothing(rig: Rig, known: SecretKey) -> None:
    rig.clock.advance(FRESH)
    await rig.feed.poll()
    await rig.relay.cut()
    assert _what(rig, known) == STALE_HIT
    await rig.is_quiet()
    assert _what(rig, known) == STALE_HIT
    await rig.comes_back()
    assert _what(rig, known) == STALE_HIT
    await rig.is_quiet()
    assert _what(rig, known) == HIT


async def test_request_after_a_failed_lookup_is_served_the_stale_entry(rig: Rig, known: SecretKey) -> None:
    rig.clock.advance(FRESH)
    await rig.relay.cut()
    # The feed is not current and the outage not noticed yet: the store is queried first, which detects the outage.
    assert rig.hot(known) is None
    assert isinstance(await rig.resolve(known), Identity)


CHANGED = [
    "UPDATE keyproxy.api_keys SET revoked_at = now()",
    "UPDATE keyproxy.users SET disabled_at = now()",
    "UPDATE keyproxy.tenants SET disabled_at = now()",
    "DELETE FROM keyproxy.api_keys",
    "DELETE FROM keyproxy.tenants",
]


@pytest.mark.parametrize("statement", CHANGED)
async def test_changed_key_is_never_served_even_while_the_store_is_down(
    rig: Rig, known: SecretKey, statement: str
) -> None:
    await rig.sql.execute(statement)
    await rig.feed.poll()
    assert rig.hot(known) is None
    await rig.goes_down()
    for seconds in (0.0, FRESH, STALE - FRESH - 0.5, STALE):
        rig.clock.advance(seconds)
        assert rig.hot(known) is Reason.STORE_UNAVAILABLE
        assert await rig.fetch_missing(known) is Reason.STORE_UNAVAILABLE


_NEW_PLAN = "INSERT INTO keyproxy.plans (id, limits) VALUES ('p', '{}'); "
HARMLESS = [
    _NEW_PLAN + "UPDATE keyproxy.tenants SET plan_id = 'p'",
    _NEW_PLAN + "UPDATE keyproxy.tenants SET test_plan_id = 'p', name = 'Acme'",
    _NEW_PLAN + "UPDATE keyproxy.users SET plan_id = 'p'",
    _NEW_PLAN + "UPDATE keyproxy.api_keys SET plan_id = 'p'",
    "INSERT INTO keyproxy.api_keys (id, user_id, digest, replaces) VALUES ('key_2', 'u_42', sha256('2'), 'key_1')",
]


@pytest.mark.parametrize("statement", HARMLESS)
async def test_key_with_limits_changed_just_before_an_outage_is_served_under_the_old_ones(
    rig: Rig, known: SecretKey, statement: str
) -> None:
    await rig.sql.execute(statement)
    await rig.feed.poll()
    assert rig.hot(known) is None
    await rig.goes_down()
    assert _what(rig, known) == STALE_HIT
    rig.clock.advance(STALE - 0.5)
    assert _what(rig, known) == STALE_HIT
    rig.clock.advance(0.5)
    assert rig.hot(known) is Reason.STORE_UNAVAILABLE


@pytest.mark.parametrize("ending", [*CHANGED, "UPDATE keyproxy.api_keys SET scopes = '{}', plan_id = 'p'"])
async def test_change_of_limits_hides_no_other_change_before_an_outage(rig: Rig, known: SecretKey, ending: str) -> None:
    await rig.sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('p', '{}'), ('q', '{}')")
    # Twice, so that the entry is two groups behind the newest one.
    for plan in ("p", "q"):
        for table in ("tenants", "users", "api_keys"):
            await rig.sql.execute(f"UPDATE keyproxy.{table} SET plan_id = $1", plan)
        await rig.feed.poll()
    await rig.sql.execute(ending)
    await rig.feed.poll()
    await rig.goes_down()
    assert rig.hot(known) is Reason.STORE_UNAVAILABLE


async def test_changed_limits_are_read_before_the_key_is_served_again(rig: Rig, known: SecretKey) -> None:
    for number, table in enumerate(("tenants", "users", "api_keys"), start=1):
        await rig.sql.execute(
            "INSERT INTO keyproxy.plans (id, limits) VALUES ($1, jsonb_build_object('requests_per_day', $2::int))",
            table,
            number,
        )
        await rig.sql.execute(f"UPDATE keyproxy.{table} SET plan_id = $1", table)
        await rig.feed.poll()
        assert rig.hot(known) is None
        found = await rig.resolve(known)
        assert isinstance(found, Identity)
        assert found.allowance is not None
        assert len(found.allowance.pools) == number
        assert _what(rig, known) == HIT


async def test_distrusted_entry_is_looked_up_first_and_served_if_the_store_is_down(rig: Rig, known: SecretKey) -> None:
    rig.cache.distrust_all()
    assert rig.feed.is_current()
    assert rig.hot(known) is None
    await rig.goes_down()
    assert _what(rig, known) == STALE_HIT
    rig.clock.advance(STALE)
    assert rig.hot(known) is Reason.STORE_UNAVAILABLE


async def test_key_of_a_changed_user_is_looked_up_and_fresh_again(rig: Rig, known: SecretKey) -> None:
    for change in ("x", "y"):
        await rig.sql.execute("UPDATE keyproxy.tenants SET name = $1", change)
        await rig.feed.poll()
        assert rig.hot(known) is None
        assert isinstance(await rig.resolve(known), Identity)
        assert _what(rig, known) == HIT


async def test_deleted_key_is_invalid_and_restored_key_is_known(rig: Rig, known: SecretKey) -> None:
    await rig.sql.execute("DELETE FROM keyproxy.api_keys")
    await rig.feed.poll()
    assert await rig.resolve(known) is Reason.KEY_INVALID
    assert rig.cache.sizes()["known"] == 0
    await add_key(rig.sql)
    await rig.feed.poll()
    assert isinstance(await rig.resolve(known), Identity)
    assert rig.cache.sizes() == {"known": 1, "unknown": 0, "acting": 0, "acting_refused": 0, "looking_up": 0}


# -- unknown keys


async def test_unknown_key_is_cached_for_its_span_and_then_looked_up_again(rig: Rig) -> None:
    stranger = fakes.key(9)
    assert await rig.resolve(stranger) is Reason.KEY_INVALID
    rig.clock.advance(UNKNOWN - 0.5)
    assert rig.hot(stranger) is Reason.KEY_INVALID
    assert rig.door.look_ups == 1
    rig.clock.advance(0.5)
    assert rig.hot(stranger) is None
    assert await rig.resolve(stranger) is Reason.KEY_INVALID
    assert rig.door.look_ups == 2


async def test_repeated_requests_do_not_extend_the_caching_of_an_unknown_key(rig: Rig) -> None:
    stranger = fakes.key(9)
    await rig.resolve(stranger)
    for _ in range(10):
        rig.clock.advance(0.5)
        rig.hot(stranger)
    assert rig.hot(stranger) is None


@pytest.mark.parametrize("was_known_to_be_unknown", [True, False])
async def test_unknown_key_is_never_called_invalid_while_the_store_is_down(
    rig: Rig, was_known_to_be_unknown: bool
) -> None:
    stranger = fakes.key(9)
    if was_known_to_be_unknown:
        await rig.resolve(stranger)
    rig.clock.advance(UNKNOWN)
    # Before the outage is noticed, and after.
    await rig.relay.cut()
    assert await rig.resolve(stranger) is Reason.STORE_UNAVAILABLE
    assert rig.door.is_down
    looks = rig.door.look_ups
    assert rig.hot(stranger) is Reason.STORE_UNAVAILABLE
    assert rig.door.look_ups == looks
    # Nothing was cached either.
    assert rig.cache.sizes()["unknown"] == 0


async def test_store_without_a_schema_is_unavailable_rather_than_empty(
    empty_dsn: str, make_rig: MakeRig, rig: Rig
) -> None:
    rig.relay.lead_to(empty_dsn)
    bare = await make_rig()
    assert await bare.resolve(fakes.key(9)) is Reason.STORE_UNAVAILABLE


async def test_service_recovers_with_the_store(rig: Rig) -> None:
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    await rig.goes_down()
    assert await rig.resolve(secret) is Reason.STORE_UNAVAILABLE
    await rig.comes_back()
    assert isinstance(await rig.resolve(secret), Identity)
    assert await rig.resolve(fakes.key(9)) is Reason.KEY_INVALID


# -- bounds


async def test_flood_of_unknown_keys_is_bounded_and_evicts_no_known_key(make_rig: MakeRig) -> None:
    rig = await make_rig(cache=Cache(entries_max=5, unknown_entries_max=10))
    await rig.feed.poll()
    await add_user(rig.sql)
    keys = await add_keys(rig.sql, range(5))
    await rig.feed.poll()
    for secret in keys:
        await rig.resolve(secret)
    for number in range(100, 400):
        assert await rig.resolve(fakes.key(number)) is Reason.KEY_INVALID
    assert rig.cache.sizes() == {"known": 5, "unknown": 10, "acting": 0, "acting_refused": 0, "looking_up": 0}
    assert all(rig.is_served(secret) for secret in keys)
    # The newest ones are cached.
    assert rig.hot(fakes.key(399)) is Reason.KEY_INVALID


@pytest.mark.parametrize("size", [1, 2, 10])
async def test_waiting_requests_get_their_result_with_any_table_size(make_rig: MakeRig, size: int) -> None:
    rig = await make_rig(cache=Cache(entries_max=size, unknown_entries_max=size))
    await add_user(rig.sql)
    keys = await add_keys(rig.sql, range(100))
    await rig.feed.poll()
    outcomes = await asyncio.gather(*(rig.resolve(fakes.key(number)) for number in range(100, 200)))
    assert set(outcomes) == {Reason.KEY_INVALID}
    found = await asyncio.gather(*(rig.resolve(secret) for secret in keys))
    assert [one for one in found if not isinstance(one, Identity)] == []


@pytest.mark.parametrize("entries_max", [1, 2, 7])
async def test_table_of_known_keys_is_bounded(make_rig: MakeRig, entries_max: int) -> None:
    rig = await make_rig(cache=Cache(entries_max=entries_max))
    await rig.feed.poll()
    await add_user(rig.sql)
    for secret in await add_keys(rig.sql, range(20)):
        assert isinstance(await rig.resolve(secret), Identity)
        assert rig.cache.sizes()["known"] <= entries_max
    assert rig.cache.sizes()["known"] == entries_max
    assert rig.is_served(secret)


async def test_full_table_keeps_keys_in_use_and_evicts_unused_ones(make_rig: MakeRig) -> None:
    rig = await make_rig(cache=Cache(entries_max=3))
    await rig.feed.poll()
    await add_user(rig.sql)
    used, *others = await add_keys(rig.sql, range(10))
    await rig.resolve(used)
    for secret in others:
        # Cached once, and never used again.
        await rig.fetch_missing(secret)
        assert rig.is_served(used)


async def test_refreshed_key_takes_no_second_place(make_rig: MakeRig) -> None:
    rig = await make_rig(cache=Cache(entries_max=2))
    await rig.feed.poll()
    await add_user(rig.sql)
    keys = await add_keys(rig.sql, range(2))
    for secret in [*keys, *keys, *keys]:
        rig.cache.forget_key(secret.digest())
        await rig.resolve(secret)
    assert all(rig.is_served(secret) for secret in keys)


async def test_too_many_waiting_unknown_keys_are_refused_while_known_keys_are_looked_up(
    make_rig: MakeRig,
) -> None:
    rig = await make_rig(look_ups_max=1)
    await rig.feed.poll()
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    await rig.feed.poll()
    await rig.resolve(secret)
    hold = rig.door.hold("identities_by_digest")
    first = asyncio.create_task(rig.resolve(fakes.key(1_000)))
    await hold.arrived.wait()
    crowd = [asyncio.create_task(rig.resolve(fakes.key(number))) for number in range(2_000, 12_001)]
    await until(lambda: crowd[-1].done(), "all waiting requests get a result")
    assert crowd[-1].result() is Reason.OVERLOADED
    assert [task.done() for task in crowd].count(True) == 1
    rig.cache.forget_key(secret.digest())
    customer = asyncio.create_task(rig.resolve(secret))
    await until(lambda: rig.cache.sizes()["looking_up"] == 10_002, "the known key is being looked up")
    hold.release()
    assert isinstance(await customer, Identity)
    assert set(await asyncio.gather(first, *crowd[:-1])) == {Reason.KEY_INVALID}
    assert rig.door.look_ups <= 2 + 10_001 / 500 + 2


# -- few queries


async def test_concurrent_requests_for_a_key_share_one_lookup(rig: Rig) -> None:
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    found = await asyncio.gather(*(rig.resolve(secret) for _ in range(300)))
    assert all(isinstance(one, Identity) for one in found)
    assert rig.door.look_ups == 1


@pytest.mark.parametrize("look_ups_max", [1, 3])
async def test_many_keys_need_few_queries_and_few_at_once(make_rig: MakeRig, look_ups_max: int) -> None:
    rig = await make_rig(look_ups_max=look_ups_max)
    await rig.feed.poll()
    await add_user(rig.sql)
    keys = await add_keys(rig.sql, range(1_200))
    running = most = 0

    async def counting() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)

    def counted(rows: Sequence[Row]) -> Sequence[Row]:
        nonlocal running
        running -= 1
        return rows

    rig.door.before["identities_by_digest"] = counting
    rig.door.edit["identities_by_digest"] = counted
    found = await asyncio.gather(*(rig.resolve(secret) for secret in keys))
    assert all(isinstance(one, Identity) for one in found)
    assert len({one.key_id for one in found if isinstance(one, Identity)}) == 1_200
    assert rig.door.look_ups == 3
    assert most <= look_ups_max


@pytest.mark.parametrize("feed_returns_first", [True, False])
async def test_recovery_with_5000_stale_keys_causes_no_stampede(make_rig: MakeRig, feed_returns_first: bool) -> None:
    rig = await make_rig()
    await rig.feed.poll()
    await add_user(rig.sql)
    keys = await add_keys(rig.sql, range(5_000))
    await rig.feed.poll()
    await asyncio.gather(*(rig.resolve(secret) for secret in keys))
    await rig.goes_down()
    rig.clock.advance(300)
    before = rig.door.look_ups
    assert all(rig.is_served(secret) for secret in keys)
    assert rig.door.look_ups == before
    await rig.comes_back()
    if not feed_returns_first:
        rig.clock.advance(2)
        assert not rig.feed.is_current()
    for _ in range(2):
        found = await asyncio.gather(*(rig.resolve(secret) for secret in keys))
        assert all(isinstance(one, Identity) for one in found)
    await rig.is_quiet()
    assert all(_what(rig, secret) == HIT for secret in keys)
    assert rig.door.look_ups - before <= 5_000 / 500 + 3


async def test_no_query_is_sent_while_the_store_is_known_to_be_down(rig: Rig, known: SecretKey) -> None:
    await rig.goes_down()
    before = rig.door.look_ups
    rig.clock.advance(FRESH)
    for number in range(50):
        await rig.resolve(known)
        await rig.resolve(fakes.key(100 + number))
    assert rig.door.look_ups == before


# -- cancellation and shutdown


async def test_cancelled_request_does_not_cancel_the_lookup_for_others(rig: Rig) -> None:
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    hold = rig.door.hold("identities_by_digest")
    tasks = [asyncio.create_task(rig.resolve(secret)) for _ in range(3)]
    await hold.arrived.wait()
    tasks[0].cancel()
    tasks[2].cancel()
    hold.release()
    assert isinstance(await tasks[1], Identity)
    assert rig.door.look_ups == 1
    for task in (tasks[0], tasks[2]):
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_result_is_cached_after_all_requests_were_cancelled(rig: Rig) -> None:
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    hold = rig.door.hold("identities_by_digest")
    task = asyncio.create_task(rig.resolve(secret))
    await hold.arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    hold.release()
    await rig.is_quiet()
    assert rig.is_served(secret)


async def test_close_refuses_all_waiting_requests_as_store_unavailable(make_rig: MakeRig) -> None:
    rig = await make_rig(look_ups_max=1)
    hold = rig.door.hold("identities_by_digest")
    looking_up = asyncio.create_task(rig.resolve(fakes.key(1)))
    await hold.arrived.wait()
    waiting = asyncio.create_task(rig.resolve(fakes.key(2)))
    await until(lambda: rig.cache.sizes()["looking_up"] == 2, "both wait")
    await rig.cache.close()
    assert set(await asyncio.gather(looking_up, waiting)) == {Reason.STORE_UNAVAILABLE}
    assert rig.cache.sizes()["looking_up"] == 0


async def test_lost_connection_during_a_lookup_refuses_all_waiting_requests(make_rig: MakeRig) -> None:
    rig = await make_rig(look_ups_max=1)
    await rig.feed.poll()
    async with rig.sql.transaction():
        await rig.sql.execute("LOCK TABLE keyproxy.api_keys IN ACCESS EXCLUSIVE MODE")
        waiting = [asyncio.create_task(rig.resolve(fakes.key(number))) for number in range(700)]
        await until(lambda: rig.cache.sizes()["looking_up"] == 700, "all wait")
        await until(lambda: rig.relay.accepted > 1 or rig.door.look_ups > 0, "the store is queried")
        await rig.relay.cut()
        outcomes = await asyncio.gather(*waiting)
    assert set(outcomes) == {Reason.STORE_UNAVAILABLE}
    assert rig.cache.sizes() == {"known": 0, "unknown": 0, "acting": 0, "acting_refused": 0, "looking_up": 0}


class ResponseWriter:
    """A store with a single response that the test controls."""

    def __init__(self) -> None:
        self.queries: list[Sequence[object]] = []
        self.answers: list[asyncio.Future[list[Row]]] = []

    async def fetch(self, _name: str, digests: Sequence[object]) -> list[Row]:
        """Wait for the test's response."""
        self.queries.append(digests)
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]


@pytest.mark.parametrize("look_ups_max", [1, 2])
async def test_key_requested_at_the_instant_a_lookup_ends_does_not_wait_forever(
    look_ups_max: int,
) -> None:
    store = ResponseWriter()
    look_ups = LookupBatcher(store, BY_DIGEST, lambda _digest, _row: None, look_ups_max=look_ups_max)  # type: ignore[arg-type]
    loop = asyncio.get_running_loop()
    begun = []
    for number in range(look_ups_max):
        begun.append(look_ups.enqueue(fakes.key(number).digest(), is_known=False))
        await until(lambda number=number: len(store.queries) == number + 1, "the store is queried")  # type: ignore[misc]
    late = fakes.key(9).digest()
    joined = []
    # All lookups end, and a request follows in the same iteration of the event loop.
    for answer in store.answers:
        answer.set_result([])
    loop.call_soon(lambda: joined.append(look_ups.enqueue(late, is_known=False)))
    try:
        await until(lambda: [late] in store.queries, "the late key is looked up", seconds=2)
    finally:
        for answer in store.answers:
            if not answer.done():
                answer.set_result([])
        await until(lambda: len(look_ups) == 0 or [late] not in store.queries, "all requests get a result")
        await look_ups.close()


async def test_lookups_end_at_the_close_although_the_database_s_client_loses_a_cancellation() -> None:
    class Deaf(ResponseWriter):
        async def fetch(self, _name: str, digests: Sequence[object]) -> list[Row]:
            self.queries.append(digests)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3_600)
            await asyncio.sleep(3_600)
            return []

    store = Deaf()
    look_ups = LookupBatcher(store, BY_DIGEST, lambda _digest, _row: None, look_ups_max=2)  # type: ignore[arg-type]
    flight = look_ups.enqueue(fakes.key(1).digest(), is_known=False)
    assert flight is not None
    await until(lambda: len(store.queries) == 1, "the store is queried")
    async with asyncio.timeout(10):
        await look_ups.close()
    refusal = await flight.result
    assert refusal is not None
    assert refusal.reason is Reason.STORE_UNAVAILABLE


# -- late results

_WITH_A_PLAN = """
INSERT INTO keyproxy.plans (id) VALUES ('p');
UPDATE keyproxy.plans SET limits = '{}';
UPDATE keyproxy.api_keys SET revoked_at = now()
"""

LATE_CHANGES = [
    ("UPDATE keyproxy.api_keys SET revoked_at = now()", Reason.KEY_REVOKED),
    ("UPDATE keyproxy.users SET disabled_at = now()", Reason.ACCOUNT_DISABLED),
    ("UPDATE keyproxy.tenants SET disabled_at = now()", Reason.ACCOUNT_DISABLED),
    ("DELETE FROM keyproxy.api_keys", Reason.KEY_INVALID),
    ("DELETE FROM keyproxy.users", Reason.KEY_INVALID),
    ("DELETE FROM keyproxy.tenants", Reason.KEY_INVALID),
    ("TRUNCATE keyproxy.api_keys CASCADE", Reason.KEY_INVALID),
    (_WITH_A_PLAN, Reason.KEY_REVOKED),
]


@pytest.mark.parametrize("is_refresh", [False, True])
@pytest.mark.parametrize(("statement", "expected"), LATE_CHANGES)
async def test_result_from_before_a_change_is_never_used_after_it(
    rig: Rig, statement: str, expected: Reason, is_refresh: bool
) -> None:
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    await rig.feed.poll()
    if is_refresh:
        await rig.resolve(secret)
        rig.clock.advance(FRESH)
        await rig.feed.poll()
    before = rig.door.look_ups
    hold = rig.door.hold("identities_by_digest")
    request = asyncio.create_task(rig.resolve(secret))
    await hold.arrived.wait()
    await rig.sql.execute(statement)
    await rig.feed.poll()
    hold.release()
    # A request served from the stale entry was served before the change; the next one is not.
    if isinstance(await request, Identity) and is_refresh:
        await rig.is_quiet()
        assert _admitted(await rig.resolve(secret), rig.clock()) is expected
    else:
        assert _admitted(await request, rig.clock()) is expected
    assert rig.door.look_ups - before == 2


async def test_key_created_during_its_lookup_is_not_cached_as_unknown(rig: Rig) -> None:
    await add_user(rig.sql)
    hold = rig.door.hold("identities_by_digest")
    request = asyncio.create_task(rig.resolve(fakes.key(1)))
    await hold.arrived.wait()
    await add_key(rig.sql, 1)
    await rig.feed.poll()
    hold.release()
    assert isinstance(await request, Identity)
    assert rig.cache.sizes()["unknown"] == 0


async def test_only_changed_keys_are_looked_up_a_second_time(rig: Rig) -> None:
    await add_user(rig.sql, "u_1")
    await add_user(rig.sql, "u_2")
    changed, other = await add_key(rig.sql, 1, "u_1"), await add_key(rig.sql, 2, "u_2")
    await rig.feed.poll()
    hold = rig.door.hold("identities_by_digest")
    requests = [asyncio.create_task(rig.resolve(secret)) for secret in (changed, other)]
    await hold.arrived.wait()
    await rig.sql.execute("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_1'")
    await rig.feed.poll()
    hold.release()
    first, second = await asyncio.gather(*requests)
    assert (_admitted(first, rig.clock()), _admitted(second, rig.clock())) == (Reason.ACCOUNT_DISABLED, None)
    assert [len(digests) for (digests,) in rig.door.arguments["identities_by_digest"] if isinstance(digests, list)] == [
        2,
        1,
    ]


async def test_lookup_of_a_constantly_changing_key_gives_up_after_some_attempts(rig: Rig) -> None:
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    await rig.feed.poll()
    serial = itertools.count()

    def changing(rows: Sequence[Row]) -> Sequence[Row]:
        rig.cache.forget_key(secret.digest())
        next(serial)
        return rows

    rig.door.edit["identities_by_digest"] = changing
    assert await rig.resolve(secret) is Reason.STORE_UNAVAILABLE
    assert 2 <= next(serial) <= 10
    del rig.door.edit["identities_by_digest"]
    assert isinstance(await rig.resolve(secret), Identity)


async def test_change_before_the_query_starts_costs_no_second_query(
    make_rig: MakeRig,
) -> None:
    rig = await make_rig(look_ups_max=1)
    await rig.feed.poll()
    await add_user(rig.sql)
    secret = await add_key(rig.sql)
    hold = rig.door.hold("identities_by_digest")
    first = asyncio.create_task(rig.resolve(fakes.key(9)))
    await hold.arrived.wait()
    second = asyncio.create_task(rig.resolve(secret))
    await until(lambda: rig.cache.sizes()["looking_up"] == 2, "the key waits")
    await rig.sql.execute("UPDATE keyproxy.users SET disabled_at = now()")
    await rig.feed.poll()
    hold.release()
    await first
    assert _admitted(await second, rig.clock()) is Reason.ACCOUNT_DISABLED
    assert rig.door.look_ups == 2


# -- counters


async def test_each_request_is_counted_once_by_its_outcome(rig: Rig, known: SecretKey) -> None:
    rig.cache.counts = LookupCounts()
    counts = rig.cache.counts.by_name()

    def counted(**now: int) -> None:
        counts.update(now)
        assert rig.cache.counts.by_name() == counts

    rig.hot(known)
    counted(hit=1)
    stranger = fakes.key(9)
    await rig.resolve(stranger)
    counted(miss=1)
    rig.hot(stranger)
    counted(unknown=1)
    rig.clock.advance(FRESH)
    await rig.resolve(known)
    counted(miss=2)
    rig.clock.advance(FRESH)
    await rig.feed.poll()
    rig.hot(known)
    counted(stale=1)
    await rig.is_quiet()
    await rig.goes_down()
    rig.hot(fakes.key(10))
    counted(refused=1)
    rig.clock.advance(FRESH)
    rig.hot(known)
    counted(stale=2)
    rig.clock.advance(STALE)
    await rig.resolve(known)
    counted(refused=2)
    rig.hot(known, is_first_lookup=False)
    counted()


async def test_concurrent_requests_for_one_missing_key_are_each_counted(rig: Rig) -> None:
    await asyncio.gather(*(rig.resolve(fakes.key(9)) for _ in range(50)))
    assert sum(rig.cache.counts.by_name().values()) == rig.cache.counts.miss == 50


# -- invalid rows


@pytest.mark.parametrize("bad_comes", ["first", "last"])
async def test_invalid_row_affects_only_its_own_key(own_dsn: str, rig: Rig, make_rig: MakeRig, bad_comes: str) -> None:
    """A restore with constraints disabled may load a scope or an id that is not a valid header value."""
    rig.relay.lead_to(own_dsn)
    odd = await make_rig()
    sql = await asyncpg.connect(own_dsn)
    await add_user(sql)
    good, bad = await add_keys(sql, [1, 2])
    await sql.execute("ALTER TABLE keyproxy.api_keys DROP CONSTRAINT api_keys_id_check")
    await sql.execute("UPDATE keyproxy.api_keys SET id = E'x\\r\\nX-Keyproxy-User: root' WHERE id = 'key_2'")
    await sql.close()
    keys = [bad, good] if bad_comes == "first" else [good, bad]
    outcomes = dict(
        zip(
            ["good", "bad"] if bad_comes == "last" else ["bad", "good"],
            await asyncio.gather(*(odd.resolve(secret) for secret in keys)),
            strict=True,
        )
    )
    assert isinstance(outcomes["good"], Identity)
    assert isinstance(outcomes["bad"], Reason)
    assert outcomes["bad"] is not Reason.KEY_INVALID


async def test_unexpected_error_in_a_query_leaves_no_request_waiting(rig: Rig) -> None:
    async def fail() -> None:
        raise RuntimeError("unforeseen")

    rig.door.before["identities_by_digest"] = fail
    assert await rig.resolve(fakes.key(1)) is Reason.INTERNAL_ERROR
    del rig.door.before["identities_by_digest"]
    assert await rig.resolve(fakes.key(1)) is Reason.KEY_INVALID
