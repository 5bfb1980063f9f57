"""Keys that act for users of their tenant: who may, when the store is queried, and what a change takes effect on."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from keyproxy.auth import authorization
from keyproxy.auth.api_key import SecretKey
from keyproxy.config.schema import Cache
from keyproxy.model import Identity, Moment, Route
from keyproxy.reasons import Reason, Refusal
from tests import fakes
from tests.store.conftest import MakeRig
from tests.store.harness import Rig, add_key, add_user
from tests.waiting import until

FRESH, STALE, UNKNOWN = 30.0, 600.0, 5.0
ROUTE = Route("*", frozenset())


@pytest.fixture
async def service(rig: Rig) -> SecretKey:
    """`key_1` of `u_worker`, which may act for the users of `acme`: `u_42` and `u_43`. `u_other` is of `globex`."""
    await add_service(rig)
    return fakes.key(1)


async def add_service(rig: Rig) -> None:
    """Insert the rows of `service`."""
    for user in ("u_worker", "u_42", "u_43"):
        await add_user(rig.sql, user)
    await add_user(rig.sql, "u_other", "globex")
    await add_key(rig.sql, 1, "u_worker")
    await rig.sql.execute("UPDATE keyproxy.api_keys SET acts_for = 'tenant'")
    await rig.feed.poll()


def admitted(found: Identity | Reason | None, now: Moment) -> Reason | None:
    """The reason of a refusal, None if the request is admitted."""
    if not isinstance(found, Identity):
        return found
    try:
        authorization.admit(found, ROUTE, now)
    except Refusal as refusal:
        return refusal.reason
    return None


async def outcome(rig: Rig, secret: SecretKey, user: str | None) -> Reason | None:
    """The reason for which a request is refused, None if it is admitted."""
    return admitted(await rig.resolve(secret, user), rig.now())


# -- from row to identity


async def test_acting_identity_has_the_pools_of_the_tenant_the_user_and_the_key_but_not_of_the_owner(
    rig: Rig, service: SecretKey
) -> None:
    await rig.sql.execute(
        "INSERT INTO keyproxy.plans (id, limits) SELECT n, jsonb_build_object('requests_per_day', length(n))"
        " FROM unnest('{t,us,tst,owner,thekey}'::text[]) AS n"
    )
    await rig.sql.execute("UPDATE keyproxy.tenants SET plan_id = 't' WHERE id = 'acme'")
    await rig.sql.execute("UPDATE keyproxy.users SET plan_id = 'us', test_plan_id = 'tst' WHERE id = 'u_42'")
    await rig.sql.execute("UPDATE keyproxy.users SET plan_id = 'owner' WHERE id = 'u_worker'")
    await rig.sql.execute("UPDATE keyproxy.api_keys SET plan_id = 'thekey'")
    await rig.feed.poll()
    who = await rig.resolve(service, "u_42")
    assert isinstance(who, Identity)
    assert who.allowance is not None
    found = [(pool.kind, pool.owner, pool.is_test, plan.amounts()) for pool, plan in who.allowance.pools]
    assert found == [
        ("tenant", "acme", False, {"requests_per_day": 1}),
        ("user", "u_42", False, {"requests_per_day": 2}),
        ("key", "key_1", False, {"requests_per_day": 6}),
    ]
    await rig.sql.execute("UPDATE keyproxy.api_keys SET is_test = true")
    await rig.feed.poll()
    who = await rig.resolve(service, "u_42")
    assert isinstance(who, Identity)
    assert who.allowance is not None
    assert [(pool.owner, pool.is_test) for pool, _ in who.allowance.pools] == [
        ("acme", True), ("u_42", True), ("key_1", True),
    ]  # fmt: skip
    assert who.allowance.pools[1][1].amounts() == {"requests_per_day": 3}


@pytest.mark.parametrize(
    ("key", "key_roles", "owner", "tenant", "user", "expected"),
    [
        ("{a,b}", "{}", None, None, None, {"a", "b"}),
        ("{a,b}", "{}", None, None, "{A}", {"a"}),
        ("{a,b}", "{}", "{B}", None, None, {"b"}),
        ("{a,b}", "{}", "{B}", None, "{A}", set()),
        ("{a,b}", "{}", "{AB}", "{A}", "{AB}", {"a"}),
        ("{a}", "{B}", None, None, "{B}", {"b"}),
        ("{a}", "{B}", None, None, "{AB}", {"a", "b"}),
        ("{a}", "{B}", None, None, "{}", set()),
        ("{a}", "{B}", None, None, "{unknown}", set()),
        ("{a,c}", "{}", None, "{AB}", "{A,B}", {"a"}),
    ],
)
async def test_effective_scopes_of_an_acting_key_are_its_own_within_the_ceilings_of_owner_tenant_and_user(
    rig: Rig, service: SecretKey, key: str, key_roles: str, owner: str | None, tenant: str | None, user: str | None,
    expected: set[str],
) -> None:  # fmt: skip
    lower = str.lower
    await rig.sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('a', '{a}'), ('b', '{b}'), ('ab', '{a,b}')")
    await rig.sql.execute(
        "UPDATE keyproxy.api_keys SET scopes = $1::text::text[], roles = $2::text::text[]", key, lower(key_roles)
    )
    for table, name, roles in (("users", "u_worker", owner), ("tenants", "acme", tenant), ("users", "u_42", user)):
        await rig.sql.execute(
            f"UPDATE keyproxy.{table} SET roles = $1::text::text[] WHERE id = $2", roles and lower(roles), name
        )
    await rig.feed.poll()
    who = await rig.resolve(service, "u_42")
    assert isinstance(who, Identity)
    assert who.scopes == expected
    assert f"X-Keyproxy-Scope: {' '.join(sorted(expected))}\r\n".encode() in who.header_block


async def test_acting_for_the_own_owner_is_allowed_and_names_the_actor(rig: Rig, service: SecretKey) -> None:
    who = await rig.resolve(service, "u_worker")
    assert isinstance(who, Identity)
    assert (who.user_id, who.actor_user_id, who.standing) == ("u_worker", "u_worker", None)
    assert b"X-Keyproxy-Actor: u_worker\r\n" in who.header_block


# -- one refusal for all unusable users


@pytest.mark.parametrize(
    "user", ["u_unknown", "u_other", "u_disabled", "", "-x", "a b", "ü", "a" * 129, "u_42 ", "U_42"]
)
async def test_every_unusable_user_is_refused_in_the_same_way(rig: Rig, service: SecretKey, user: str) -> None:
    await add_user(rig.sql, "u_disabled")
    await rig.sql.execute("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_disabled'")
    await rig.feed.poll()
    who = await rig.resolve(service, user)
    assert isinstance(who, Identity)
    assert (who.standing, who.user_id, who.actor_user_id, who.header_block) == (
        Reason.DELEGATION_REFUSED, "u_worker", None, b"",
    )  # fmt: skip


@pytest.mark.parametrize("user", ["u_42", "u_unknown", "u_other"])
async def test_known_unknown_and_foreign_users_take_one_lookup_each(rig: Rig, service: SecretKey, user: str) -> None:
    for _ in range(3):
        await rig.resolve(service, user)
    assert (rig.door.acting_look_ups, rig.door.look_ups) == (1, 0)
    assert rig.door.arguments["acting_identities"] == [([service.digest()], [user])]


@pytest.mark.parametrize("is_cached", [True, False])
async def test_key_that_may_not_act_is_refused_with_at_most_one_lookup_however_many_users_it_names(
    rig: Rig, service: SecretKey, is_cached: bool
) -> None:
    await rig.sql.execute("UPDATE keyproxy.api_keys SET acts_for = 'none'")
    await rig.feed.poll()
    if is_cached:
        assert await outcome(rig, service, None) is None
    for number in range(20):
        assert await outcome(rig, service, f"u_{number}") is Reason.DELEGATION_REFUSED
    assert rig.door.acting_look_ups == (0 if is_cached else 1)
    assert rig.cache.sizes()["acting_refused"] == (0 if is_cached else 1)
    await rig.sql.execute("UPDATE keyproxy.api_keys SET acts_for = 'tenant'")
    await rig.feed.poll()
    assert await outcome(rig, service, "u_42") is None


async def test_invalid_user_takes_no_lookup_of_the_pair(rig: Rig, service: SecretKey) -> None:
    for user in ("", "a b", "x" * 200, "\xff"):
        assert await outcome(rig, service, user) is Reason.DELEGATION_REFUSED
    assert (rig.door.acting_look_ups, rig.door.look_ups) == (0, 1)


# -- bounds


async def test_acting_evicts_no_key_and_refused_users_evict_no_pair(make_rig: MakeRig) -> None:
    rig = await make_rig(cache=Cache(entries_max=2, acting_entries_max=5, unknown_entries_max=3))
    await rig.feed.poll()
    await add_service(rig)
    for number in range(10):
        await add_user(rig.sql, f"u_new_{number}")
    await rig.feed.poll()
    await rig.resolve(fakes.key(1))
    for number in range(10):
        assert await outcome(rig, fakes.key(1), f"u_new_{number}") is None
        assert await outcome(rig, fakes.key(1), f"u_nobody_{number}") is Reason.DELEGATION_REFUSED
    assert await outcome(rig, fakes.key(7), "u_42") is Reason.KEY_INVALID
    assert rig.cache.sizes() == {"known": 1, "unknown": 1, "acting": 5, "acting_refused": 3, "looking_up": 0}
    look_ups = rig.door.acting_look_ups
    assert isinstance(rig.hot(fakes.key(1), "u_new_9"), Identity)
    assert isinstance(rig.hot(fakes.key(1)), Identity)
    assert rig.door.acting_look_ups == look_ups


async def test_refused_user_is_looked_up_again_after_unknown_seconds(rig: Rig, service: SecretKey) -> None:
    await rig.resolve(service, "u_unknown")
    rig.clock.advance(UNKNOWN - 0.1)
    assert isinstance(rig.hot(service, "u_unknown"), Identity)
    rig.clock.advance(0.2)
    assert rig.hot(service, "u_unknown") is None


async def test_1000_users_of_one_key_wait_and_more_are_refused_as_overloaded(rig: Rig, service: SecretKey) -> None:
    await add_key(rig.sql, 2, "u_42")
    await rig.feed.poll()
    hold = rig.door.hold("acting_identities")
    waiting = [asyncio.create_task(rig.fetch_missing(service, f"u_{number}")) for number in range(1_000)]
    await until(lambda: rig.cache.sizes()["looking_up"] == 1_000, "all wait")
    for number in range(1_000, 1_010):
        assert await rig.fetch_missing(service, f"u_{number}") is Reason.OVERLOADED
    # Another request for a user that waits joins its lookup, and another key has a bound of its own.
    joined = asyncio.create_task(rig.fetch_missing(service, "u_7"))
    other = asyncio.create_task(rig.fetch_missing(fakes.key(2), "u_42"))
    plain = asyncio.create_task(rig.fetch_missing(fakes.key(2)))
    await until(lambda: rig.cache.sizes()["looking_up"] == 1_002, "the other key waits")
    hold.release()
    assert set(await asyncio.gather(*waiting, joined, other, plain)) == {None}
    assert await rig.fetch_missing(service, "u_1005") is None
    users = [user for _, users in rig.door.arguments["acting_identities"] for user in users]  # type: ignore[attr-defined]
    assert len(users) == 1_002


async def test_concurrent_requests_with_the_same_pair_share_one_lookup(rig: Rig, service: SecretKey) -> None:
    found = await asyncio.gather(*(rig.resolve(service, user) for user in ["u_42", "u_43", "u_nobody"] * 50))
    assert {id(who) for who in found} == {id(who) for who in found[:3]}
    assert sorted(user for _, users in rig.door.arguments["acting_identities"] for user in users) == [  # type: ignore[attr-defined]
        "u_42", "u_43", "u_nobody",
    ]  # fmt: skip


# -- changes

_WITHDRAWN = [
    ("UPDATE keyproxy.api_keys SET acts_for = 'none'", Reason.DELEGATION_REFUSED),
    ("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_42'", Reason.DELEGATION_REFUSED),
    ("UPDATE keyproxy.users SET tenant_id = 'globex' WHERE id = 'u_42'", Reason.DELEGATION_REFUSED),
    ("DELETE FROM keyproxy.users WHERE id = 'u_42'", Reason.DELEGATION_REFUSED),
    ("UPDATE keyproxy.users SET tenant_id = 'globex' WHERE id = 'u_worker'", Reason.DELEGATION_REFUSED),
    ("UPDATE keyproxy.api_keys SET user_id = 'u_other'", Reason.DELEGATION_REFUSED),
    ("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_worker'", Reason.ACCOUNT_DISABLED),
    ("UPDATE keyproxy.tenants SET disabled_at = now() WHERE id = 'acme'", Reason.ACCOUNT_DISABLED),
    ("UPDATE keyproxy.api_keys SET revoked_at = now()", Reason.KEY_REVOKED),
    ("UPDATE keyproxy.api_keys SET expires_at = '2000-01-01Z'", Reason.KEY_EXPIRED),
    ("DELETE FROM keyproxy.api_keys", Reason.KEY_INVALID),
    ("DELETE FROM keyproxy.users WHERE id = 'u_worker'", Reason.KEY_INVALID),
    ("DELETE FROM keyproxy.tenants WHERE id = 'acme'", Reason.KEY_INVALID),
    ("TRUNCATE keyproxy.users CASCADE", Reason.KEY_INVALID),
]


@pytest.mark.parametrize(("statement", "expected"), _WITHDRAWN)
async def test_withdrawn_delegation_ends_with_the_next_poll(
    rig: Rig, service: SecretKey, statement: str, expected: Reason
) -> None:
    assert await outcome(rig, service, "u_42") is None
    await rig.sql.execute(statement)
    await rig.feed.poll()
    assert rig.hot(service, "u_42") is None
    assert await outcome(rig, service, "u_42") is expected


@pytest.mark.parametrize(("statement", "expected"), [*_WITHDRAWN, ("SELECT", Reason.DELEGATION_REFUSED)])
async def test_key_that_ends_while_its_refusals_are_cached_is_refused_for_that(
    rig: Rig, service: SecretKey, statement: str, expected: Reason
) -> None:
    assert await outcome(rig, service, "u_nobody") is Reason.DELEGATION_REFUSED
    assert isinstance(rig.hot(service, "u_nobody"), Identity)
    await rig.sql.execute(statement)
    await rig.feed.poll()
    assert await outcome(rig, service, "u_nobody") is expected


_GRANTED = [
    ("UPDATE keyproxy.api_keys SET acts_for = 'none'", "UPDATE keyproxy.api_keys SET acts_for = 'tenant'"),
    (
        "DELETE FROM keyproxy.users WHERE id = 'u_42'",
        "INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_42', 'acme')",
    ),
    (
        "UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_42'",
        "UPDATE keyproxy.users SET disabled_at = NULL WHERE id = 'u_42'",
    ),
    (
        "UPDATE keyproxy.users SET tenant_id = 'globex' WHERE id = 'u_42'",
        "UPDATE keyproxy.users SET tenant_id = 'acme' WHERE id = 'u_42'",
    ),
    (
        "UPDATE keyproxy.users SET tenant_id = 'globex' WHERE id = 'u_worker'",
        "UPDATE keyproxy.users SET tenant_id = 'acme' WHERE id = 'u_worker'",
    ),
    (
        "UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_worker'",
        "UPDATE keyproxy.users SET disabled_at = NULL WHERE id = 'u_worker'",
    ),
    (
        "UPDATE keyproxy.tenants SET disabled_at = now() WHERE id = 'acme'",
        "UPDATE keyproxy.tenants SET disabled_at = NULL WHERE id = 'acme'",
    ),
    ("UPDATE keyproxy.api_keys SET revoked_at = now()", "UPDATE keyproxy.api_keys SET revoked_at = NULL"),
    (
        "UPDATE keyproxy.users SET id = 'u_41' WHERE id = 'u_42'",
        "UPDATE keyproxy.users SET id = 'u_42' WHERE id = 'u_41'",
    ),
]


@pytest.mark.parametrize(("before", "statement"), _GRANTED)
async def test_granted_delegation_begins_with_the_next_poll(
    rig: Rig, service: SecretKey, before: str, statement: str
) -> None:
    await rig.sql.execute(before)
    await rig.feed.poll()
    assert await outcome(rig, service, "u_42") is not None
    await rig.sql.execute(statement)
    await rig.feed.poll()
    assert await outcome(rig, service, "u_42") is None


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE keyproxy.tenants SET plan_id = 'p' WHERE id = 'acme'",
        "UPDATE keyproxy.users SET plan_id = 'p' WHERE id = 'u_42'",
        "UPDATE keyproxy.api_keys SET plan_id = 'p'",
    ],
)
async def test_changed_plan_applies_from_the_next_poll_and_the_old_one_while_the_store_is_down(
    rig: Rig, service: SecretKey, statement: str
) -> None:
    await rig.sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('p', '{\"requests_per_day\": 7}')")
    await rig.feed.poll()
    before = await rig.resolve(service, "u_42")
    assert isinstance(before, Identity)
    assert before.allowance is None
    await rig.sql.execute(statement)
    await rig.feed.poll()
    assert rig.hot(service, "u_42") is None
    await rig.goes_down()
    assert rig.hot(service, "u_42") is before
    await rig.comes_back()
    after = await rig.resolve(service, "u_42")
    assert isinstance(after, Identity)
    assert after.allowance is not None
    await rig.sql.execute("UPDATE keyproxy.plans SET limits = '{}'")
    await rig.feed.poll()
    assert rig.hot(service, "u_42") is None


async def test_changed_plan_of_the_owner_leaves_the_pairs_revocable(rig: Rig, service: SecretKey) -> None:
    await rig.sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('p', '{\"requests_per_day\": 7}')")
    for plan in ("'p'", "NULL", "'p'"):
        assert await outcome(rig, service, "u_42") is None
        await rig.sql.execute(f"UPDATE keyproxy.users SET plan_id = {plan} WHERE id = 'u_worker'")
        await rig.feed.poll()
    await rig.sql.execute("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_worker'")
    await rig.feed.poll()
    await rig.goes_down()
    assert rig.hot(service, "u_42") is Reason.STORE_UNAVAILABLE
    await rig.comes_back()
    assert await outcome(rig, service, "u_42") is Reason.ACCOUNT_DISABLED


@pytest.mark.parametrize(("statement", "expected"), _WITHDRAWN)
@pytest.mark.parametrize("user", ["u_42", "u_nobody"])
async def test_lookup_of_a_pair_that_a_change_overtakes_is_repeated(
    rig: Rig, service: SecretKey, user: str, statement: str, expected: Reason
) -> None:
    hold = rig.door.hold("acting_identities")
    task = asyncio.create_task(rig.resolve(service, user))
    await hold.arrived.wait()
    # The rows have been read; the change commits and the feed delivers it before they are used.
    await rig.sql.execute(statement)
    await rig.feed.poll()
    hold.release()
    assert admitted(await task, rig.now()) is expected
    is_concerned = user == "u_42" or "id = 'u_42'" not in statement
    assert rig.door.acting_look_ups == (2 if is_concerned else 1)


async def test_user_that_is_created_while_it_is_looked_up_is_found(rig: Rig, service: SecretKey) -> None:
    hold = rig.door.hold("acting_identities")
    task = asyncio.create_task(rig.resolve(service, "u_new"))
    await hold.arrived.wait()
    await add_user(rig.sql, "u_new")
    await rig.feed.poll()
    hold.release()
    assert admitted(await task, rig.now()) is None


async def test_key_that_is_created_while_its_pair_is_looked_up_is_found(rig: Rig, service: SecretKey) -> None:
    hold = rig.door.hold("acting_identities")
    task = asyncio.create_task(rig.resolve(fakes.key(5), "u_42"))
    await hold.arrived.wait()
    await add_key(rig.sql, 5, "u_worker")
    await rig.sql.execute("UPDATE keyproxy.api_keys SET acts_for = 'tenant' WHERE id = 'key_5'")
    await rig.feed.poll()
    hold.release()
    assert admitted(await task, rig.now()) is None


# -- fresh, stale, down


async def test_stale_pair_is_served_and_refreshed_once_in_the_background(rig: Rig, service: SecretKey) -> None:
    assert await outcome(rig, service, "u_42") is None
    rig.clock.advance(FRESH)
    await rig.feed.poll()
    hold = rig.door.hold("acting_identities")
    for _ in range(100):
        assert isinstance(rig.hot(service, "u_42"), Identity)
    hold.release()
    await rig.is_quiet()
    assert rig.door.acting_look_ups == 2


async def test_outage_serves_verified_pairs_and_nothing_else_of_the_key(rig: Rig, service: SecretKey) -> None:
    who = await rig.resolve(service, "u_42")
    assert await outcome(rig, service, "u_nobody") is Reason.DELEGATION_REFUSED
    assert await outcome(rig, service, None) is None
    await rig.goes_down()
    assert rig.hot(service, "u_42") is who
    # A refusal that was cached may be outdated: the store could not be asked.
    for user in ("u_43", "u_nobody", "u_other"):
        assert rig.hot(service, user) is Reason.STORE_UNAVAILABLE
    rig.clock.advance(STALE)
    assert rig.hot(service, "u_42") is Reason.STORE_UNAVAILABLE
    await rig.comes_back()
    assert await outcome(rig, service, "u_43") is None


async def test_gap_of_the_feed_makes_every_pair_be_looked_up_again(rig: Rig, service: SecretKey) -> None:
    assert await outcome(rig, service, "u_42") is None
    assert await outcome(rig, service, "u_nobody") is Reason.DELEGATION_REFUSED
    rig.clock.advance(601)
    await rig.feed.poll()
    assert rig.hot(service, "u_42") is None
    assert rig.hot(service, "u_nobody") is None


async def test_use_while_acting_counts_as_use_of_the_key(rig: Rig, service: SecretKey) -> None:
    await rig.resolve(service, "u_42")
    await rig.last_used.flush()
    assert await rig.sql.fetchval("SELECT last_used_at IS NOT NULL FROM keyproxy.api_keys WHERE id = 'key_1'")


# -- keys of another program


async def test_imported_key_acts_from_its_first_use(rig: Rig, service: SecretKey) -> None:
    plaintext = b"abcdefgh.0123456789abcdef"
    foreign = SecretKey(plaintext)
    await rig.sql.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest, acts_for) VALUES ('key_f', 'u_worker', $1, 'tenant')",
        hashlib.sha256(b"no key").digest(),
    )
    await rig.sql.execute(
        "INSERT INTO keyproxy.foreign_hashes (key_id, prefix, hashed) VALUES ('key_f', 'abcdefgh', $1)",
        "sha512$$" + hashlib.sha512(plaintext).hexdigest(),
    )
    await rig.feed.poll()
    assert await outcome(rig, foreign, "u_42") is None
    assert await outcome(rig, foreign, "u_nobody") is Reason.DELEGATION_REFUSED
    assert rig.door.acting_look_ups == 2
    assert await rig.sql.fetchval("SELECT digest = $1 FROM keyproxy.api_keys WHERE id = 'key_f'", foreign.digest())
