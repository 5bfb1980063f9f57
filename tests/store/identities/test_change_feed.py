"""Changes by any SQL client take effect within a second, with or without notifications."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import cast
from urllib.parse import urlsplit

import asyncpg
import pytest

from keyproxy.auth.api_key import SecretKey
from keyproxy.config.schema import Cache
from keyproxy.model import Identity
from keyproxy.platform import clock
from keyproxy.reasons import Reason
from keyproxy.store.identities.cache import FeedState, IdentityCache
from keyproxy.store.identities.change_feed import ChangeFeed
from keyproxy.store.postgres import migrations, queries, scratch_databases
from keyproxy.store.postgres.database import Row, StoreUnavailable
from tests import fakes
from tests.server import Server
from tests.store.conftest import MakeRig, StartServer
from tests.store.harness import Bell, Relay, Rig, Sql, add_key, add_user, change_rows, until_row
from tests.waiting import until

#: Three keys: 1 and 2 of two users of one tenant, 3 of another tenant.
OWNERS = {1: ("u_1", "acme"), 2: ("u_2", "acme"), 3: ("u_3", "other")}
ALL = {1, 2, 3}


@pytest.fixture
async def keys(sql: Sql) -> dict[int, SecretKey]:
    """The three keys in the database, and an unused plan."""
    await sql.execute("INSERT INTO keyproxy.plans (id) VALUES ('basic')")
    made = {}
    for number, (user, tenant) in OWNERS.items():
        await add_user(sql, user, tenant)
        made[number] = await add_key(sql, number, user)
    return made


@pytest.fixture
async def fed(rig: Rig, keys: dict[int, SecretKey]) -> Rig:
    """A rig with the three keys in its cache and a feed that has delivered all changes."""
    await rig.feed.poll()
    for secret in keys.values():
        assert isinstance(await rig.resolve(secret), Identity)
    return rig


def not_served(rig: Rig, keys: dict[int, SecretKey]) -> set[int]:
    """The keys that are not served from the cache any more."""
    return {number for number, secret in keys.items() if not rig.is_served(secret)}


async def as_the_store_has_it(rig: Rig, secret: SecretKey) -> bool:
    """Whether a request with this key sees the current state of the tables."""
    row = await rig.sql.fetchrow(
        "SELECT k.id, k.user_id, u.tenant_id, k.scopes, k.is_test, k.revoked_at IS NOT NULL AS is_revoked,"
        " coalesce(u.disabled_at, t.disabled_at) IS NOT NULL AS is_disabled"
        " FROM keyproxy.api_keys AS k JOIN keyproxy.users AS u ON u.id = k.user_id"
        " JOIN keyproxy.tenants AS t ON t.id = u.tenant_id WHERE digest = $1",
        secret.digest(),
    )
    identity = await rig.resolve(secret)
    if row is None:
        return identity is Reason.KEY_INVALID
    assert isinstance(identity, Identity)
    standing = Reason.KEY_REVOKED if row["is_revoked"] else Reason.ACCOUNT_DISABLED if row["is_disabled"] else None
    return (
        identity.key_id,
        identity.user_id,
        identity.tenant_id,
        identity.scopes,
        identity.is_test,
        identity.standing,
    ) == (
        row["id"],
        row["user_id"],
        row["tenant_id"],
        frozenset(row["scopes"]),
        row["is_test"],
        standing,
    )


_UPSERT = """
INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('key_1', 'u_1', sha256('x'))
ON CONFLICT (id) DO UPDATE SET scopes = '{upserted}'
"""
_BOTH = """
WITH gone AS (DELETE FROM keyproxy.api_keys WHERE id = 'key_1' RETURNING 1)
UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_2'
"""

CHANGES = [
    ("UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'", {1}),
    ("UPDATE keyproxy.api_keys SET scopes = '{other}' WHERE id = 'key_1'", {1}),
    ("UPDATE keyproxy.api_keys SET expires_at = now() WHERE id = 'key_1'", {1}),
    ("UPDATE keyproxy.api_keys SET user_id = 'u_2' WHERE id = 'key_1'", {1}),
    ("UPDATE keyproxy.api_keys SET digest = sha256('x') WHERE id = 'key_1'", {1}),
    ("UPDATE keyproxy.api_keys SET id = 'key_9' WHERE id = 'key_1'", {1}),
    ("UPDATE keyproxy.api_keys SET is_test = true", ALL),
    ("UPDATE keyproxy.api_keys SET is_test = true WHERE id <> 'key_2'", {1, 3}),
    ("UPDATE keyproxy.api_keys SET is_test = true WHERE false", set()),
    ("UPDATE keyproxy.api_keys SET last_used_at = now()", set()),
    ("DELETE FROM keyproxy.api_keys WHERE id = 'key_1'", {1}),
    ("DELETE FROM keyproxy.api_keys", ALL),
    (_UPSERT, {1}),
    (_BOTH, {1, 2}),
    ("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_1'", {1}),
    ("UPDATE keyproxy.users SET tenant_id = 'other' WHERE id = 'u_1'", {1}),
    ("UPDATE keyproxy.users SET id = 'u_9' WHERE id = 'u_1'", {1}),
    ("UPDATE keyproxy.users SET plan_id = 'basic'", ALL),
    ("DELETE FROM keyproxy.users WHERE id = 'u_1'", {1}),
    ("UPDATE keyproxy.tenants SET disabled_at = now() WHERE id = 'acme'", {1, 2}),
    ("UPDATE keyproxy.tenants SET id = 'acme_2' WHERE id = 'acme'", {1, 2}),
    ("UPDATE keyproxy.tenants SET disabled_at = now()", ALL),
    ("DELETE FROM keyproxy.tenants WHERE id = 'acme'", {1, 2}),
    ("UPDATE keyproxy.plans SET limits = '{\"rate\": 1}'", ALL),
    ("DELETE FROM keyproxy.plans", ALL),
    ("TRUNCATE keyproxy.api_keys CASCADE", ALL),
    ("TRUNCATE keyproxy.users CASCADE", ALL),
    ("TRUNCATE keyproxy.tenants CASCADE", ALL),
    ("TRUNCATE keyproxy.plans CASCADE", ALL),
]  # fmt: skip


@pytest.mark.parametrize(("statement", "changed"), CHANGES)
async def test_exactly_the_changed_keys_are_looked_up_again(
    fed: Rig, keys: dict[int, SecretKey], statement: str, changed: set[int]
) -> None:
    await fed.sql.execute(statement)
    assert not_served(fed, keys) == set()
    await fed.feed.poll()
    assert not_served(fed, keys) == changed
    for secret in keys.values():
        assert await as_the_store_has_it(fed, secret)


#: One of each kind: without foreign keys and ordinary triggers, each trigger of the feed must work alone.
WITH_TRIGGERS_AT_REST = [
    (statement, changed)
    for statement, changed in CHANGES
    if statement.startswith(("DELETE", "TRUNCATE"))
    or "revoked_at" in statement
    or "limits" in statement
    or "SET disabled_at" in statement
    or "SET digest" in statement
]


@pytest.mark.parametrize(("statement", "changed"), WITH_TRIGGERS_AT_REST)
async def test_changes_in_a_replica_session_are_looked_up_again_too(
    fed: Rig, keys: dict[int, SecretKey], statement: str, changed: set[int]
) -> None:
    await fed.sql.execute("SET session_replication_role = replica")
    await fed.sql.execute(statement)
    await fed.feed.poll()
    assert not_served(fed, keys) == changed
    for secret in keys.values():
        assert await as_the_store_has_it(fed, secret)


INSERTS = [
    "INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('key_5', 'u_1', $1)",
    "UPDATE keyproxy.api_keys SET digest = $1 WHERE id = 'key_1'",
    _UPSERT.replace("sha256('x')", "$1").replace("scopes = '{upserted}'", "digest = excluded.digest"),
]


@pytest.mark.parametrize("role", ["origin", "replica"])
@pytest.mark.parametrize("statement", INSERTS)
async def test_key_cached_as_unknown_is_known_after_its_creation(fed: Rig, statement: str, role: str) -> None:
    stranger = fakes.key(5)
    assert await fed.resolve(stranger) is Reason.KEY_INVALID
    await fed.sql.execute(f"SET session_replication_role = {role}")
    await fed.sql.execute(statement, stranger.digest())
    assert fed.hot(stranger) is Reason.KEY_INVALID
    await fed.feed.poll()
    assert isinstance(await fed.resolve(stranger), Identity)


async def test_key_cached_as_unknown_is_known_after_a_copy(fed: Rig) -> None:
    stranger = fakes.key(5)
    assert await fed.resolve(stranger) is Reason.KEY_INVALID
    await fed.sql.copy_records_to_table(
        "api_keys",
        schema_name="keyproxy",
        columns=["id", "user_id", "digest"],
        records=[("key_5", "u_1", stranger.digest())],
    )
    await fed.feed.poll()
    assert isinstance(await fed.resolve(stranger), Identity)


@pytest.mark.parametrize("late", ["users", "tenants"])
async def test_key_cached_as_unknown_is_known_when_its_owner_arrives_after_it(fed: Rig, late: str) -> None:
    # Replication and restores load table by table, in any order, with foreign keys disabled.
    await fed.sql.execute("SET session_replication_role = replica")
    stranger = await add_key(fed.sql, 5, "u_5")
    first = "INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_5', 't_5')"
    second = "INSERT INTO keyproxy.tenants (id) VALUES ('t_5')"
    if late == "users":
        first, second = second, first
    await fed.sql.execute(first)
    await fed.feed.poll()
    assert await fed.resolve(stranger) is Reason.KEY_INVALID
    await fed.sql.execute(second)
    await fed.feed.poll()
    assert isinstance(await fed.resolve(stranger), Identity)


async def test_rolled_back_change_has_no_effect(fed: Rig, keys: dict[int, SecretKey]) -> None:
    rows = await change_rows(fed.sql)
    for statement, _ in CHANGES:
        transaction = fed.sql.transaction()
        await transaction.start()
        await fed.sql.execute(statement)
        await transaction.rollback()
        await fed.feed.poll()
        assert not_served(fed, keys) == set()
    assert await change_rows(fed.sql) == rows


async def test_change_rolled_back_to_a_savepoint_has_no_effect_and_the_rest_has(
    fed: Rig, keys: dict[int, SecretKey]
) -> None:
    async with fed.sql.transaction():
        savepoint = fed.sql.transaction()
        await savepoint.start()
        await fed.sql.execute("UPDATE keyproxy.api_keys SET is_test = true WHERE id = 'key_1'")
        await savepoint.rollback()
        async with fed.sql.transaction():
            await fed.sql.execute("UPDATE keyproxy.api_keys SET is_test = true WHERE id = 'key_2'")
    await fed.feed.poll()
    assert not_served(fed, keys) == {2}


async def test_late_commit_is_not_missed_after_later_changes_were_read(
    dsn: str, fed: Rig, keys: dict[int, SecretKey]
) -> None:
    late: Sql = await asyncpg.connect(dsn)
    transaction = late.transaction()
    await transaction.start()
    await late.execute("UPDATE keyproxy.api_keys SET is_test = true WHERE id = 'key_1'")
    async with late.transaction():  # a savepoint: a transaction id of its own
        await late.execute("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_3'")
    for round_number in range(3):
        await fed.sql.execute("UPDATE keyproxy.api_keys SET scopes = $1 WHERE id = 'key_2'", [f"round:{round_number}"])
        await fed.feed.poll()
        assert not_served(fed, keys) == {2}
        assert await as_the_store_has_it(fed, keys[2])
    await fed.feed.poll()
    assert not_served(fed, keys) == set()
    await transaction.commit()
    await fed.feed.poll()
    assert not_served(fed, keys) == {1, 3}
    await late.close()


async def test_change_is_delivered_once(fed: Rig, keys: dict[int, SecretKey]) -> None:
    await fed.sql.execute("UPDATE keyproxy.api_keys SET is_test = true WHERE id = 'key_1'")
    await fed.feed.poll()
    await fed.resolve(keys[1])
    for _ in range(3):
        await fed.feed.poll()
        assert not_served(fed, keys) == set()


@pytest.mark.parametrize(("count", "others_are_trusted"), [(20_000, True), (20_001, False)])
async def test_too_many_changes_make_the_cache_distrust_all_entries(
    fed: Rig, keys: dict[int, SecretKey], count: int, others_are_trusted: bool
) -> None:
    # The rows go to the feed table directly: the test is about how many it reads at once.
    await fed.sql.execute(
        "INSERT INTO keyproxy.changes (kind, subject) SELECT 'key', encode(sha256(n::text::bytea), 'hex')"
        " FROM generate_series(1, $1::int) AS n",
        count,
    )
    await fed.feed.poll()
    assert (not_served(fed, keys) == set()) is others_are_trusted
    for secret in keys.values():
        assert isinstance(await fed.resolve(secret), Identity)


_BULK = """
INSERT INTO keyproxy.changes (kind, subject)
SELECT $1, encode(sha256(n::text::bytea), 'hex') FROM generate_series(1, 20001) AS n
"""
_REVOKE = "UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'"

#: (a change of many rows, a change of one, the keys that may still be served in an outage right afterwards)
JUST_BEFORE_AN_OUTAGE = [
    (None, _REVOKE, {2, 3}),
    ("key", _REVOKE, set()),
    ("user", _REVOKE, set()),
    ("key_limits", _REVOKE, {2, 3}),
    ("user_limits", "UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_3'", {1, 2}),
    ("tenant_limits", "UPDATE keyproxy.plans SET limits = '{}'", ALL),
    (None, "TRUNCATE keyproxy.api_keys CASCADE", set()),
    (None, "TRUNCATE keyproxy.users CASCADE", set()),
    (None, "TRUNCATE keyproxy.tenants CASCADE", set()),
    (None, "UPDATE keyproxy.plans SET limits = '{\"rate\": 1}'", ALL),
    (None, "INSERT INTO keyproxy.changes (kind, subject) VALUES ('key', 'not hexadecimal')", set()),
]  # fmt: skip


@pytest.mark.parametrize(("bulk", "statement", "may_be_served"), JUST_BEFORE_AN_OUTAGE)
async def test_possible_revocation_survives_an_outage_right_after_it(
    fed: Rig, keys: dict[int, SecretKey], bulk: str | None, statement: str, may_be_served: set[int]
) -> None:
    if bulk is not None:
        await fed.sql.execute(_BULK, bulk)
    await fed.sql.execute(statement)
    await fed.feed.poll()
    await fed.goes_down()
    assert not_served(fed, keys) == ALL - may_be_served


async def test_timeout_while_reading_changes_does_not_stop_the_feed(fed: Rig, keys: dict[int, SecretKey]) -> None:
    async def take_too_long() -> None:
        if fed.door.arguments["changes_since"][-1][0] is not None:
            raise StoreUnavailable("timeout") from TimeoutError()

    await fed.sql.execute(_REVOKE)
    fed.door.before["changes_since"] = take_too_long
    with pytest.raises(StoreUnavailable):
        await fed.feed.poll()
    await fed.feed.poll()
    del fed.door.before["changes_since"]
    await fed.goes_down()
    assert not_served(fed, keys) == ALL
    await fed.comes_back()
    for secret in keys.values():
        assert await as_the_store_has_it(fed, secret)
    await fed.sql.execute("UPDATE keyproxy.api_keys SET is_test = true WHERE id = 'key_2'")
    await fed.feed.poll()
    assert not_served(fed, keys) == {2}


async def test_unresponsive_server_does_not_stop_the_service_of_cached_keys(
    fed: Rig, keys: dict[int, SecretKey]
) -> None:
    async def take_too_long() -> None:
        raise StoreUnavailable("timeout") from TimeoutError()

    fed.door.before["changes_since"] = take_too_long
    for _ in range(5):
        with pytest.raises(StoreUnavailable):
            await fed.feed.poll()
    del fed.door.before["changes_since"]
    await fed.feed.poll()
    assert not_served(fed, keys) == set()


async def test_duration_of_a_poll_does_not_grow_with_the_number_of_changes(fed: Rig) -> None:
    text = queries.load()["changes_since"]
    await fed.sql.execute(f"PREPARE look (text, int, text) AS {text}")
    plan = "\n".join(row[0] for row in await fed.sql.fetch("EXPLAIN EXECUTE look ('1:1:', 20001, '')"))
    assert not re.search("Sort|Aggregate|Unique", plan), plan


async def test_many_changes_that_affect_all_keys_visit_the_cache_once(rig: Rig) -> None:
    times = []

    class Cache:
        def distrust_all(self) -> None:
            times.append(1)

    feed = ChangeFeed(rig.door, None, cast("IdentityCache", Cache()), FeedState(), rig.clock)
    await feed.poll()
    times.clear()
    await rig.sql.execute(
        "INSERT INTO keyproxy.plans (id) SELECT 'p_' || n FROM generate_series(1, 50) AS n;"
        "UPDATE keyproxy.plans SET limits = '{\"rate\": 1}'"
    )
    await feed.poll()
    assert len(times) == 1


@pytest.mark.parametrize(("kind", "subject"), [("key", "not hexadecimal"), ("key", ""), ("key", "abc"), ("user", "")])
async def test_invalid_change_row_does_not_stop_the_feed(
    fed: Rig, keys: dict[int, SecretKey], kind: str, subject: str
) -> None:
    fed.feed.start()
    await fed.sql.execute("INSERT INTO keyproxy.changes (kind, subject) VALUES ($1, $2)", kind, subject)
    looks = fed.door.queries["changes_since"]
    await until(lambda: fed.door.queries["changes_since"] >= looks + 2, "the feed keeps polling", seconds=3)
    await fed.sql.execute("UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'")
    await until(lambda: not fed.is_served(keys[1]), "the revocation takes effect", seconds=3)


# -- possibly missed changes


async def test_entries_from_before_the_first_poll_are_looked_up_again(
    make_rig: MakeRig, keys: dict[int, SecretKey]
) -> None:
    rig = await make_rig()
    await rig.resolve(keys[1])
    assert not_served(rig, {1: keys[1]}) == set()
    await rig.feed.poll()
    assert not_served(rig, {1: keys[1]}) == {1}


async def test_changes_made_during_an_outage_are_delivered_afterwards(fed: Rig, keys: dict[int, SecretKey]) -> None:
    await fed.goes_down()
    await fed.sql.execute("UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'")
    fed.clock.advance(20)
    assert fed.is_served(keys[1])
    await fed.comes_back()
    assert not_served(fed, keys) == {1}


async def test_revocation_read_after_a_gap_survives_the_next_outage(
    make_rig: MakeRig, keys: dict[int, SecretKey]
) -> None:
    rig = await make_rig(cache=Cache(fresh_seconds=10_000.0, stale_seconds=10_000.0))
    await rig.feed.poll()
    for secret in keys.values():
        await rig.resolve(secret)
    await rig.sql.execute(_REVOKE)
    rig.clock.advance(1_000.0)
    await rig.feed.poll()
    await rig.goes_down()
    assert not_served(rig, keys) == {1}


@pytest.mark.parametrize(("seconds", "trusts"), [(599.0, True), (601.0, False)])
async def test_gap_is_also_detected_by_the_server_s_clock(
    fed: Rig, keys: dict[int, SecretKey], seconds: float, trusts: bool
) -> None:
    """The monotonic clock stops while a machine is suspended."""

    def later(rows: Sequence[Row]) -> Sequence[Row]:
        return cast("Sequence[Row]", [{**row, "server_seconds": row["server_seconds"] + seconds} for row in rows])

    await fed.feed.poll()
    fed.door.edit["changes_since"] = later
    await fed.feed.poll()
    assert (not_served(fed, keys) == set()) is trusts


@pytest.mark.parametrize(("gap_seconds", "trusts"), [(600.0, True), (600.5, False), (100_000.0, False)])
async def test_feed_that_has_not_polled_for_too_long_distrusts_all_entries(
    make_rig: MakeRig, keys: dict[int, SecretKey], gap_seconds: float, trusts: bool
) -> None:
    rig = await make_rig()
    await rig.feed.poll()
    rig.clock.advance(gap_seconds - 1)
    await rig.resolve(keys[1])
    rig.clock.advance(1)
    await rig.feed.poll()
    assert rig.is_served(keys[1]) is trusts


async def test_poll_after_a_failed_one_delivers_all_changes(fed: Rig, keys: dict[int, SecretKey]) -> None:
    await fed.sql.execute("UPDATE keyproxy.api_keys SET is_test = true WHERE id = 'key_1'")
    hold = fed.door.hold("changes_since")
    poll = asyncio.create_task(fed.feed.poll())
    await hold.arrived.wait()
    poll.cancel()
    with pytest.raises(asyncio.CancelledError):
        await poll
    hold.release()
    await fed.feed.poll()
    assert not_served(fed, keys) == {1}


async def test_poll_after_a_lost_connection_delivers_all_changes(fed: Rig, keys: dict[int, SecretKey]) -> None:
    async with fed.sql.transaction():
        await fed.sql.execute("LOCK TABLE keyproxy.changes IN ACCESS EXCLUSIVE MODE")
        await fed.sql.execute("UPDATE keyproxy.api_keys SET is_test = true WHERE id = 'key_1'")
        poll = asyncio.create_task(fed.feed.poll())
        watch: Sql = await asyncpg.connect(fed.dsn)
        await until_row(watch, "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'keyproxy.changes'::regclass")
        await watch.close()
        fed.relay.cut_connections()
        with pytest.raises(StoreUnavailable):
            await poll
    await fed.feed.poll()
    assert not_served(fed, keys) == {1}


async def test_older_history_makes_the_cache_distrust_all_entries(
    own_dsn: str, relay: Relay, make_rig: MakeRig, start_server: StartServer
) -> None:
    """A restored backup: the server's transaction numbers are lower than those of the previous poll."""
    seeded: Sql = await asyncpg.connect(own_dsn)
    await add_user(seeded)
    secret = await add_key(seeded)
    await seeded.execute("DO $$ BEGIN FOR turn IN 1..5000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$")
    await seeded.close()
    relay.lead_to(own_dsn)
    rig = await make_rig()
    await rig.feed.poll()
    assert isinstance(await rig.resolve(secret), Identity)
    await rig.goes_down()

    restored = start_server()
    name = urlsplit(own_dsn).path[1:]
    await scratch_databases.create(restored.dsn("postgres"), name)
    await migrations.migrate(restored.dsn(name))
    relay.lead_to(restored.dsn(name))
    await rig.comes_back()
    assert not rig.is_served(secret)
    assert await rig.resolve(secret) is Reason.KEY_INVALID
    await rig.relay.cut()
    await scratch_databases.drop(restored.dsn("postgres"), name)


async def test_database_restored_in_place_makes_the_cache_distrust_all_entries(
    postgres: Server, own_dsn: str, relay: Relay, make_rig: MakeRig
) -> None:
    """`dropdb`, `createdb`, `pg_restore`: another history, although the server's transaction numbers continue."""
    seeded: Sql = await asyncpg.connect(own_dsn)
    await add_user(seeded)
    secret = await add_key(seeded)
    await seeded.close()
    relay.lead_to(own_dsn)
    rig = await make_rig()
    await rig.feed.poll()
    assert isinstance(await rig.resolve(secret), Identity)

    name = urlsplit(own_dsn).path[1:]
    await scratch_databases.drop(postgres.dsn("postgres"), name)
    await scratch_databases.create(postgres.dsn("postgres"), name)
    await migrations.migrate(own_dsn)
    await rig.feed.poll()
    assert not rig.is_served(secret)
    assert await rig.resolve(secret) is Reason.KEY_INVALID


# -- logical replication


async def test_changes_by_logical_replication_are_delivered(
    start_server: StartServer, relay: Relay, make_rig: MakeRig
) -> None:
    server = start_server({"wal_level": "logical"})
    for name in ("publisher", "subscriber"):
        await scratch_databases.create(server.dsn("postgres"), name)
        await migrations.migrate(server.dsn(name))
    publisher: Sql = await asyncpg.connect(server.dsn("publisher"))
    subscriber: Sql = await asyncpg.connect(server.dsn("subscriber"))
    try:
        await add_user(publisher)
        secret = await add_key(publisher)
        tables = "keyproxy.tenants, keyproxy.users, keyproxy.plans, keyproxy.api_keys"
        await publisher.execute(f"CREATE PUBLICATION kp FOR TABLE {tables}")
        # Both sides are on one server: without an existing slot they would wait for each other.
        await publisher.execute("SELECT pg_create_logical_replication_slot('kp', 'pgoutput')")
        conninfo = f"host={server.socket_directory} port=5432 user=keyproxy dbname=publisher"
        await subscriber.execute(
            f"CREATE SUBSCRIPTION kp CONNECTION '{conninfo}' PUBLICATION kp WITH (create_slot = false)"
        )
        await until_row(subscriber, "SELECT 1 FROM keyproxy.api_keys AS k JOIN keyproxy.users AS u ON u.id = k.user_id")
        await until_row(
            subscriber, "SELECT 1 HAVING NOT EXISTS (SELECT FROM pg_subscription_rel WHERE srsubstate <> 'r')"
        )
        relay.lead_to(server.dsn("subscriber"))
        rig = await make_rig()
        await rig.feed.poll()
        assert isinstance(await rig.resolve(secret), Identity)
        await publisher.execute("UPDATE keyproxy.api_keys SET revoked_at = now()")
        await until_row(subscriber, "SELECT 1 FROM keyproxy.api_keys WHERE revoked_at IS NOT NULL")
        await rig.feed.poll()
        assert not rig.is_served(secret)
        await rig.relay.cut()
    finally:
        await subscriber.execute("DROP SUBSCRIPTION IF EXISTS kp")
        await subscriber.close()
        await publisher.close()
        for name in ("publisher", "subscriber"):
            await scratch_databases.drop(server.dsn("postgres"), name)


# -- P4, in real time

Live = Callable[[str], Awaitable[Rig]]


@pytest.fixture
async def live(make_rig: MakeRig, keys: dict[int, SecretKey]) -> Live:
    """A rig on the real clock with a running feed that has delivered all changes."""

    async def starting(listening: str) -> Rig:
        rig = await make_rig(listener=None if listening == "without LISTEN" else "real", now=clock.now)
        rig.feed.start()
        await until(rig.feed.is_current, "the feed is current")
        if listening != "without LISTEN":
            await until(lambda: rig.feed.is_listening, "the feed listens")
        if listening == "LISTEN connection ended":
            await rig.sql.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
            await until(lambda: not rig.feed.is_listening, "the feed has noticed the loss")
        return rig

    return starting


def served_now(rig: Rig, secret: SecretKey) -> bool:
    """Whether this key is served from the cache now, by the real clock."""
    try:
        rig.cache.known(secret.digest(), clock.now(), is_first_lookup=False)
    except Exception:  # noqa: BLE001 - a refusal or a cache miss: not served either way
        return False
    return True


async def resolved_now(rig: Rig, secret: SecretKey) -> None:
    """Bring this key into the cache."""
    now = clock.now()
    rig.clock.wall_seconds, rig.clock.mono_seconds = now.wall_seconds, now.mono_seconds
    assert isinstance(await rig.resolve(secret), Identity)
    assert served_now(rig, secret)


LISTENING = ["with LISTEN", "without LISTEN", "LISTEN connection ended"]


@pytest.mark.parametrize("listening", LISTENING)
async def test_revocation_takes_effect_within_a_second_of_its_commit(
    live: Live, keys: dict[int, SecretKey], listening: str
) -> None:
    rig = await live(listening)
    for number, statement in [
        (1, "UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'"),
        (2, "UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_2'"),
        (3, "DELETE FROM keyproxy.tenants WHERE id = 'other'"),
    ]:
        await resolved_now(rig, keys[number])
        await rig.sql.execute(statement)
        committed = time.monotonic()
        await until(lambda secret=keys[number]: not served_now(rig, secret), "the change takes effect", seconds=2)  # type: ignore[misc]
        assert time.monotonic() - committed <= 1.0


async def test_notifications_resume_after_a_lost_connection(make_rig: MakeRig, keys: dict[int, SecretKey]) -> None:
    rig = await make_rig(listener="real", now=clock.now)
    rig.feed.start()
    await until(lambda: rig.feed.is_listening, "the feed listens")
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
    await rig.sql.execute(end)
    await until(lambda: not rig.feed.is_listening, "the feed has noticed the loss")
    await until(lambda: rig.feed.is_listening, "the feed listens again", seconds=8)


async def test_notification_triggers_a_poll_immediately(make_rig: MakeRig, keys: dict[int, SecretKey]) -> None:
    bell = Bell()
    rig = await make_rig(listener=bell)
    rig.feed.start()
    await until(rig.feed.is_current, "the feed has polled")
    started = time.monotonic()
    for _ in range(20):
        looks = rig.door.queries["changes_since"]
        bell.ring()
        await until(lambda looks=looks: rig.door.queries["changes_since"] > looks, "the feed polls")  # type: ignore[misc]
    # Polling alone would take 10 s.
    assert time.monotonic() - started < 4


async def test_notification_during_a_poll_causes_another_one(make_rig: MakeRig, keys: dict[int, SecretKey]) -> None:
    bell = Bell()
    rig = await make_rig(listener=bell)
    rig.feed.start()
    await until(rig.feed.is_current, "the feed has polled")
    await resolved_by(rig, keys[1])
    hold = rig.door.hold("changes_since")
    bell.ring()
    await hold.arrived.wait()
    # This poll has its result already; the change follows.
    await rig.sql.execute("UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'")
    bell.ring()
    released = time.monotonic()
    hold.release()
    await until(lambda: not rig.is_served(keys[1]), "the change takes effect")
    assert time.monotonic() - released < 0.4


async def resolved_by(rig: Rig, secret: SecretKey) -> None:
    """Bring this key into the cache."""
    assert isinstance(await rig.resolve(secret), Identity)


# -- lag and state of the feed


async def test_feed_is_current_from_its_first_poll_until_1_5_seconds_after_the_last(rig: Rig) -> None:
    assert rig.feed.is_current()
    rig.clock.advance(1.25)
    assert (rig.feed.is_current(), rig.feed.lag_seconds()) == (True, 1.25)
    rig.clock.advance(0.25)
    assert (rig.feed.is_current(), rig.feed.lag_seconds()) == (False, 1.5)
    await rig.feed.poll()
    assert (rig.feed.is_current(), rig.feed.lag_seconds()) == (True, 0.0)


async def test_feed_that_has_never_polled_is_not_current(make_rig: MakeRig) -> None:
    rig = await make_rig()
    assert not rig.feed.is_current()


async def test_currency_of_a_poll_counts_from_its_start(rig: Rig) -> None:
    hold = rig.door.hold("changes_since")
    poll = asyncio.create_task(rig.feed.poll())
    await hold.arrived.wait()
    rig.clock.advance(10)
    hold.release()
    await poll
    assert not rig.feed.is_current()
    assert rig.feed.lag_seconds() == 10


async def test_running_feed_survives_an_outage_and_is_current_soon_after_it(make_rig: MakeRig) -> None:
    rig = await make_rig(listener="real", now=clock.now)
    rig.feed.start()
    await until(rig.feed.is_current, "the feed is current")
    await rig.relay.cut()
    await until(lambda: not rig.feed.is_current(), "the feed is not current", seconds=3)
    await rig.relay.mend()
    await until(rig.feed.is_current, "the feed is current again", seconds=3)


async def test_running_feed_survives_terminated_backends_at_any_moment(
    make_rig: MakeRig, keys: dict[int, SecretKey]
) -> None:
    bell = Bell()
    rig = await make_rig(listener=bell, now=clock.now)
    rig.door.before["changes_since"] = _ringing(bell)
    rig.feed.start()
    await until(rig.feed.is_current, "the feed is current")
    for _ in range(150):
        await rig.sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await asyncio.sleep(0.003)
    await until(lambda: rig.door.is_up, "the store responds again", seconds=3)
    await resolved_now(rig, keys[1])
    await rig.sql.execute("UPDATE keyproxy.api_keys SET revoked_at = now()")
    await until(lambda: not served_now(rig, keys[1]), "the change takes effect", seconds=3)


async def test_feed_can_be_closed_during_a_poll(make_rig: MakeRig) -> None:
    rig = await make_rig(listener="real")
    hold = rig.door.hold("changes_since")
    rig.feed.start()
    await hold.arrived.wait()
    await rig.feed.close()
    assert len(await rig.door.fetch("tenants", "", 1)) == 0


# -- retention of changes


async def _look_on(rig: Rig, bell: Bell, times: int) -> None:
    """Let a running feed poll once a minute."""
    for _ in range(times):
        rig.clock.advance(60)
        looks = rig.door.queries["changes_since"]
        bell.ring()
        await until(lambda looks=looks: rig.door.queries["changes_since"] > looks + 1, "the feed polls twice")  # type: ignore[misc]


@pytest.fixture
async def minded(make_rig: MakeRig, keys: dict[int, SecretKey]) -> tuple[Rig, Bell]:
    """A running feed that polls under the control of the test."""
    bell = Bell()
    rig = await make_rig(listener=bell)
    rig.door.before["changes_since"] = _ringing(bell)
    rig.feed.start()
    await until(rig.feed.is_current, "the feed has polled")
    return rig, bell


def _ringing(bell: Bell) -> Callable[[], Awaitable[None]]:
    async def ring() -> None:
        """Let the feed poll again without a pause."""
        bell.ring()

    return ring


async def test_changes_are_deleted_only_after_every_live_proxy_has_read_them(
    minded: tuple[Rig, Bell],
) -> None:
    rig, bell = minded
    assert await change_rows(rig.sql) > 0
    await _look_on(rig, bell, 19)
    assert rig.door.queries["forget_changes"] == 0
    await _look_on(rig, bell, 2)
    await until(lambda: rig.door.queries["forget_changes"] > 0, "old changes are deleted")
    await rig.feed.close()
    assert await change_rows(rig.sql) == 0


async def test_late_commit_is_not_deleted_before_it_was_delivered(
    dsn: str, minded: tuple[Rig, Bell], keys: dict[int, SecretKey]
) -> None:
    rig, bell = minded
    late: Sql = await asyncpg.connect(dsn)
    transaction = late.transaction()
    await transaction.start()
    await late.execute("UPDATE keyproxy.api_keys SET is_test = true WHERE id = 'key_1'")
    await rig.sql.execute("UPDATE keyproxy.api_keys SET is_test = true WHERE id = 'key_2'")
    await _look_on(rig, bell, 25)
    assert rig.door.queries["forget_changes"] > 0
    await rig.resolve(keys[1])
    await transaction.commit()
    await until(lambda: not rig.is_served(keys[1]), "the late change takes effect")
    await late.close()


async def test_snapshot_of_an_abandoned_history_deletes_no_unread_changes(
    make_rig: MakeRig, keys: dict[int, SecretKey]
) -> None:
    """After a restore, older snapshots do not show which changes have been read."""
    bell = Bell()
    rig = await make_rig(listener=bell, cache=Cache(fresh_seconds=10_000.0, stale_seconds=10_000.0))
    future = (1 << 40) + 1_000
    rig.door.edit["changes_since"] = lambda rows: [{**rows[0], "snapshot": f"{future}:{future}:"}]  # type: ignore[list-item]
    rig.feed.start()
    await until(lambda: rig.feed.is_current() and rig.door.queries["changes_since"] >= 1, "the feed has polled")
    await until(bell.is_open.is_set, "the feed listens")
    del rig.door.edit["changes_since"]
    rig.door.before["changes_since"] = _ringing(bell)
    bell.ring()
    await _look_on(rig, bell, 2)
    assert isinstance(await rig.resolve(keys[1]), Identity)

    async def revoke() -> None:
        await rig.sql.execute("UPDATE keyproxy.api_keys SET revoked_at = now() WHERE revoked_at IS NULL")

    rig.door.before["forget_changes"] = revoke
    await _look_on(rig, bell, 22)
    assert await rig.sql.fetchval("SELECT revoked_at IS NOT NULL FROM keyproxy.api_keys WHERE id = 'key_1'")
    assert not rig.is_served(keys[1])
