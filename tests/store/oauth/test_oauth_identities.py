"""An OAuth access token stands for its session, its grant and its user, for as long as all of them stand."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from keyproxy.config.schema import Cache
from keyproxy.limits.ledger_protocol import Pool
from keyproxy.model import Identity, Missing
from keyproxy.reasons import Reason
from keyproxy.store.directory.errors import NotFound
from keyproxy.store.identities.identity_rows import NO_RESOURCES, TokenResources
from keyproxy.store.postgres.database import Database
from keyproxy.store.usage.explained_credentials import key_credential
from tests.store.conftest import MakeRig
from tests.store.harness import Rig, Sql, add_key, add_keys, add_user, change_rows
from tests.store.oauth_rows import (
    CLIENT,
    RESOURCE,
    TEST_RESOURCE,
    access_token,
    add_access_token,
    add_client,
    add_code,
    add_grant,
    add_session,
    grant_id,
    session_id,
)
from tests.waiting import until

BOTH = TokenResources(RESOURCE, TEST_RESOURCE)


@pytest.fixture
async def rig(make_rig: MakeRig) -> Rig:
    """A proxy that accepts tokens, whose feed has polled once."""
    rig = await make_rig(resources=BOTH)
    await rig.feed.poll()
    return rig


async def resolved(rig: Rig, number: int = 1) -> Identity:
    """The identity behind an access token."""
    found = await rig.resolve(access_token(number))
    assert isinstance(found, Identity)
    return found


def _wall(identity: Identity) -> datetime:
    return datetime.fromtimestamp(identity.expires_wall_seconds, UTC)


async def test_identity_of_a_token_names_session_grant_client_and_user(rig: Rig) -> None:
    await rig.sql.execute("""INSERT INTO keyproxy.plans (id, limits) VALUES ('one', '{"requests_per_day": 1}')""")
    await add_grant(rig.sql, plan="one")
    await add_access_token(rig.sql, bound_to=bytes(32), scopes=("jobs:read", "jobs:write"))
    found = await resolved(rig)
    assert (found.key_id, found.lineage, found.user_id, found.tenant_id) == (session_id(), grant_id(), "u_42", "acme")
    assert found.oauth is not None
    assert (found.oauth.grant_id, found.oauth.client_id, found.oauth.bound_to) == (grant_id(), CLIENT, bytes(32))
    assert (sorted(found.scopes), found.is_test, found.standing) == (["jobs:read", "jobs:write"], False, None)
    assert (found.can_act, found.agent_token, found.retiring_field) == (False, None, None)
    assert found.allowance is not None
    assert [pool for pool, _ in found.allowance.pools] == [Pool("key", grant_id(), False)]
    assert f"X-Keyproxy-Key-Id: {session_id()}\r\n".encode() in found.header_block


@pytest.mark.parametrize("is_test", [False, True])
async def test_keys_and_tokens_of_a_user_share_the_pools_of_user_and_tenant(rig: Rig, is_test: bool) -> None:
    for plan in ("user", "tenant"):
        await rig.sql.execute(
            """INSERT INTO keyproxy.plans (id, limits) VALUES ($1, '{"requests_per_day": 9}')""", plan
        )
    await add_user(rig.sql)
    await rig.sql.execute("UPDATE keyproxy.users SET plan_id = 'user'")
    await rig.sql.execute("UPDATE keyproxy.tenants SET plan_id = 'tenant'")
    secret = await add_key(rig.sql)
    await rig.sql.execute("UPDATE keyproxy.api_keys SET is_test = $1", is_test)
    await add_grant(rig.sql, is_test=is_test, resource=TEST_RESOURCE if is_test else RESOURCE)
    await add_access_token(rig.sql)
    key, token = await rig.resolve(secret), await resolved(rig)
    assert isinstance(key, Identity)
    assert key.allowance is not None
    assert token.allowance is not None
    assert key.allowance.pools == token.allowance.pools
    assert [pool for pool, _ in token.allowance.pools] == [
        Pool("tenant", "acme", is_test),
        Pool("user", "u_42", is_test),
    ]
    assert key.owner == token.owner


@pytest.mark.parametrize(("token_minutes", "session_minutes"), [(5, 10), (10, 5)])
async def test_token_ends_with_its_session_at_the_latest(rig: Rig, token_minutes: int, session_minutes: int) -> None:
    await add_session(rig.sql, expires=f"date_trunc('second', now()) + interval '{session_minutes} minutes'")
    await add_access_token(rig.sql, expires=f"date_trunc('second', now()) + interval '{token_minutes} minutes'")
    earliest = await rig.sql.fetchval(
        "SELECT least(t.expires_at, s.expires_at) FROM keyproxy.oauth_access_tokens AS t, keyproxy.oauth_sessions AS s"
    )
    assert _wall(await resolved(rig)) == earliest


@pytest.mark.parametrize(
    ("resources", "resource", "is_test", "is_accepted"),
    [
        (BOTH, RESOURCE, False, True),
        (BOTH, TEST_RESOURCE, True, True),
        (BOTH, RESOURCE, True, False),
        (BOTH, TEST_RESOURCE, False, False),
        (BOTH, f"{RESOURCE}/", False, False),
        (BOTH, "https://other.example/mcp", False, False),
        (TokenResources(RESOURCE), RESOURCE, False, True),
        (TokenResources(RESOURCE), TEST_RESOURCE, True, False),
        (TokenResources(RESOURCE), RESOURCE, True, False),
        (NO_RESOURCES, RESOURCE, False, False),
    ],
)
async def test_token_for_another_resource_or_mode_is_invalid_whatever_else_is_wrong_with_it(
    make_rig: MakeRig, resources: TokenResources, resource: str, is_test: bool, is_accepted: bool
) -> None:
    rig = await make_rig(resources=resources)
    await add_grant(rig.sql, resource=resource, is_test=is_test)
    await add_access_token(rig.sql)
    assert (await resolved(rig)).standing == (None if is_accepted else Reason.KEY_INVALID)
    await rig.sql.execute("UPDATE keyproxy.users SET disabled_at = now()")
    rig.cache.forget_user("u_42")
    assert (await resolved(rig)).standing == (Reason.ACCOUNT_DISABLED if is_accepted else Reason.KEY_INVALID)


@pytest.mark.parametrize("table", ["users", "tenants", "oauth_clients"])
async def test_token_of_a_disabled_user_tenant_or_client_is_refused(rig: Rig, table: str) -> None:
    await add_access_token(rig.sql)
    await rig.sql.execute(f"UPDATE keyproxy.{table} SET disabled_at = now()")
    assert (await resolved(rig)).standing is Reason.ACCOUNT_DISABLED


async def test_ceilings_of_user_and_tenant_bound_the_scopes_of_a_token(rig: Rig) -> None:
    await add_grant(rig.sql)
    await add_access_token(rig.sql, scopes=("a", "b", "c"))
    await rig.sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('user', '{a,b}'), ('tenant', '{b,c}')")
    await rig.sql.execute("UPDATE keyproxy.users SET roles = '{user}'")
    assert (await resolved(rig)).scopes == {"a", "b"}
    await rig.sql.execute("UPDATE keyproxy.tenants SET roles = '{tenant}'")
    await rig.feed.poll()
    assert (await resolved(rig)).scopes == {"b"}


# -- changes


#: Changes after which no proxy may serve the token 1 before it looks it up again. Token 2 is of another grant.
_CHANGES = {
    "token": "DELETE FROM keyproxy.oauth_access_tokens WHERE session_id = 'ses_0000000000000000000001'",
    "scopes of the token": "UPDATE keyproxy.oauth_access_tokens SET scopes = '{}' WHERE session_id LIKE '%01'",
    "expiry of the token": "UPDATE keyproxy.oauth_access_tokens SET expires_at = now() WHERE session_id LIKE '%01'",
    "certificate": "UPDATE keyproxy.oauth_access_tokens SET bound_to = sha256('x') WHERE session_id LIKE '%01'",
    "session": "DELETE FROM keyproxy.oauth_sessions WHERE id LIKE '%01'",
    "expiry of the session": "UPDATE keyproxy.oauth_sessions SET expires_at = now() WHERE id LIKE '%01'",
    "grant": "DELETE FROM keyproxy.oauth_grants WHERE id LIKE '%01'",
    "user of the grant": "UPDATE keyproxy.oauth_grants SET user_id = 'u_43' WHERE id LIKE '%01'",
    "resource": "UPDATE keyproxy.oauth_grants SET resource = 'https://x.example' WHERE id LIKE '%01'",
    "mode": "UPDATE keyproxy.oauth_grants SET is_test = true WHERE id LIKE '%01'",
    "plan": "UPDATE keyproxy.oauth_grants SET plan_id = 'basic' WHERE id LIKE '%01'",
    "client": "DELETE FROM keyproxy.oauth_clients WHERE client_id = 'https://acme.example/client'",
    "client disabled": "UPDATE keyproxy.oauth_clients SET disabled_at = now() WHERE client_id LIKE '%/client'",
    "user": "DELETE FROM keyproxy.users WHERE id = 'u_42'",
    "user disabled": "UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_42'",
    "key of the sign-in": "DELETE FROM keyproxy.api_keys",
    "key revoked": "UPDATE keyproxy.api_keys SET revoked_at = now()",
    "key narrowed": "UPDATE keyproxy.api_keys SET scopes = '{}'",
    "key given away": "UPDATE keyproxy.api_keys SET user_id = 'u_43'",
    "key suspended": "UPDATE keyproxy.api_keys SET suspended_at = now()",
    "earlier expiry of the key": "UPDATE keyproxy.api_keys SET expires_at = now() + interval '1 minute'",
}
_ALL = {
    f"truncated {table}": f"TRUNCATE keyproxy.{table} CASCADE"
    for table in ("oauth_clients", "oauth_grants", "oauth_sessions", "oauth_access_tokens", "api_keys")
}


async def _two_tokens(sql: Sql) -> None:
    """Two tokens of different clients and users, the first one by a key."""
    await add_user(sql)
    await add_user(sql, "u_43")
    await add_key(sql)
    await sql.execute("INSERT INTO keyproxy.plans (id) VALUES ('basic')")
    await add_session(sql, via_key="key_1")
    await add_grant(sql, 2, user="u_43", client_id="https://other.example/client2")
    await add_session(sql, 2, grant=2)
    for number in (1, 2):
        await add_access_token(sql, number, session=number)


@pytest.mark.parametrize("change", [*_CHANGES, *_ALL])
async def test_change_by_any_sql_client_ends_the_cached_identity_of_its_tokens_alone(rig: Rig, change: str) -> None:
    await _two_tokens(rig.sql)
    await rig.feed.poll()
    for number in (1, 2):
        await resolved(rig, number)
    await rig.sql.execute((_CHANGES | _ALL)[change])
    await rig.feed.poll()
    assert [rig.is_served(access_token(number)) for number in (1, 2)] == [False, change in _CHANGES]


async def test_tokens_that_are_issued_or_have_expired_are_no_changes(sql: Sql) -> None:
    await _two_tokens(sql)
    await sql.execute("DELETE FROM keyproxy.changes")
    await add_access_token(sql, 3)
    await add_session(sql, 4)
    await sql.execute("UPDATE keyproxy.oauth_sessions SET last_used_at = now()")
    await sql.execute("UPDATE keyproxy.oauth_grants SET granted_at = now(), scopes = '{a}'")
    await sql.execute("UPDATE keyproxy.oauth_clients SET name = 'x'")
    assert await change_rows(sql) == 0
    await sql.execute("UPDATE keyproxy.oauth_access_tokens SET expires_at = clock_timestamp()")
    assert await change_rows(sql) == 3
    await sql.execute("DELETE FROM keyproxy.changes")
    await sql.execute("UPDATE keyproxy.oauth_grants SET plan_id = 'basic'")
    await sql.execute("DELETE FROM keyproxy.oauth_access_tokens WHERE session_id LIKE '%1'")
    await sql.execute("DELETE FROM keyproxy.oauth_clients")
    assert await change_rows(sql) == 0


@pytest.mark.parametrize("listener", ["real", None])
async def test_deleted_session_is_refused_within_a_second_with_and_without_notifications(
    make_rig: MakeRig, listener: str | None
) -> None:
    rig = await make_rig(resources=BOTH, listener=listener)
    await add_access_token(rig.sql)
    rig.feed.start()
    if listener is not None:
        await until(lambda: rig.feed.is_listening, "the feed listens")
    await until(lambda: rig.feed.is_current(), "the feed is current")
    await resolved(rig)
    await rig.sql.execute("DELETE FROM keyproxy.oauth_sessions")
    async with asyncio.timeout(1.0):
        await until(lambda: not rig.is_served(access_token()), "the token is not served")
    assert await rig.resolve(access_token()) is Reason.KEY_INVALID


async def test_changes_of_rows_that_arrive_by_replication_are_noted(rig: Rig) -> None:
    await _two_tokens(rig.sql)
    await rig.feed.poll()
    await resolved(rig)
    async with rig.sql.transaction():
        await rig.sql.execute("SET LOCAL session_replication_role = replica")
        await rig.sql.execute("UPDATE keyproxy.oauth_clients SET disabled_at = now()")
    await rig.feed.poll()
    assert (await resolved(rig)).standing is Reason.ACCOUNT_DISABLED


@pytest.mark.parametrize(
    "change",
    [
        *("token", "session", "grant", "client", "user", "user disabled", "client disabled"),
        *("key of the sign-in", "key revoked", "key narrowed", "key suspended"),
    ],
)
async def test_change_without_cascades_ends_the_cached_identity_of_its_tokens(rig: Rig, change: str) -> None:
    """A superuser that restores or repairs rows turns foreign keys off, and with them their cascades."""
    await _two_tokens(rig.sql)
    await rig.feed.poll()
    for number in (1, 2):
        await resolved(rig, number)
    async with rig.sql.transaction():
        await rig.sql.execute("SET LOCAL session_replication_role = replica")
        await rig.sql.execute(_CHANGES[change])
    await rig.feed.poll()
    assert [rig.is_served(access_token(number)) for number in (1, 2)] == [False, True]
    found = await rig.resolve(access_token())
    assert found is Reason.KEY_INVALID or (isinstance(found, Identity) and found.standing is not None)


async def test_use_of_tokens_and_keys_is_recorded_to_the_minute(rig: Rig) -> None:
    await add_user(rig.sql)
    secrets = await add_keys(rig.sql, [1, 2])
    await add_access_token(rig.sql)
    await add_session(rig.sql, 2)
    for secret in (secrets[0], access_token()):
        await rig.resolve(secret)
    await rig.last_used.flush()
    for table, used, unused in (
        ("api_keys", "key_1", "key_2"),
        ("oauth_sessions", session_id(), session_id(2)),
    ):
        query = f"SELECT extract(epoch FROM last_used_at)::float8 FROM keyproxy.{table} WHERE id = $1"
        assert await rig.sql.fetchval(query, used) == rig.clock.wall_seconds
        assert await rig.sql.fetchval(query, unused) is None


# -- sign-ins with a key


async def _sessions_and_codes(sql: Sql) -> tuple[int, int]:
    row = await sql.fetchrow(
        "SELECT (SELECT count(*) FROM keyproxy.oauth_sessions), (SELECT count(*) FROM keyproxy.oauth_codes)"
    )
    assert row is not None
    return row[0], row[1]


@pytest.fixture
async def signed_in(sql: Sql) -> Sql:
    """A session and a code by the key 1, which has a role; and by none."""
    await add_user(sql)
    await add_user(sql, "u_43")
    await add_key(sql)
    await sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('r', '{a,b}'), ('other', '{c}')")
    await sql.execute("UPDATE keyproxy.api_keys SET roles = '{r}', scopes = '{jobs:read,jobs:write}'")
    await add_client(sql)
    for number, key in enumerate(("key_1", None), 1):
        await add_session(sql, number, via_key=key, scopes=("jobs:write", "a"))
        await add_code(sql, number, via_key=key, scopes=("jobs:write", "a"))
    return sql


@pytest.mark.parametrize(
    ("change", "is_ended"),
    [
        ("DELETE FROM keyproxy.api_keys", True),
        ("UPDATE keyproxy.api_keys SET revoked_at = now()", True),
        ("UPDATE keyproxy.api_keys SET scopes = '{jobs:write}'", True),
        ("UPDATE keyproxy.api_keys SET roles = '{}'", True),
        ("UPDATE keyproxy.api_keys SET user_id = 'u_43'", True),
        ("UPDATE keyproxy.api_keys SET is_test = true", True),
        ("UPDATE keyproxy.roles SET scopes = '{b}' WHERE id = 'r'", True),
        ("DELETE FROM keyproxy.roles WHERE id = 'r'", True),
        ("TRUNCATE keyproxy.roles", True),
        ("UPDATE keyproxy.api_keys SET scopes = '{jobs:write,jobs:read,more}'", False),
        ("UPDATE keyproxy.api_keys SET name = 'x', last_used_at = now()", False),
        ("UPDATE keyproxy.api_keys SET suspended_at = now()", False),
        ("UPDATE keyproxy.api_keys SET expires_at = 'infinity'", False),
        ("UPDATE keyproxy.users SET id = 'u_44' WHERE id = 'u_42'", False),
        ("UPDATE keyproxy.roles SET scopes = '{a}' WHERE id = 'r'", False),
        ("UPDATE keyproxy.roles SET scopes = '{}' WHERE id = 'other'", False),
    ],
)
async def test_revoked_deleted_or_narrowed_key_ends_its_sessions_and_codes(
    signed_in: Sql, change: str, is_ended: bool
) -> None:
    await signed_in.execute(change)
    assert await _sessions_and_codes(signed_in) == ((1, 1) if is_ended else (2, 2))


async def test_earlier_expiry_of_a_key_shortens_its_sessions_and_codes(signed_in: Sql) -> None:
    query = (
        "SELECT s.expires_at = k.expires_at AND c.expires_at <= k.expires_at FROM keyproxy.api_keys AS k"
        " JOIN keyproxy.oauth_sessions AS s ON s.via_key = k.id JOIN keyproxy.oauth_codes AS c ON c.via_key = k.id"
    )
    for expiry in ("1 hour", "5 seconds"):
        await signed_in.execute(f"UPDATE keyproxy.api_keys SET expires_at = now() + interval '{expiry}'")
        assert await signed_in.fetchval(query) is True
    before = await signed_in.fetchval("SELECT expires_at FROM keyproxy.oauth_sessions WHERE via_key IS NOT NULL")
    await signed_in.execute("UPDATE keyproxy.api_keys SET expires_at = NULL")
    assert (
        await signed_in.fetchval("SELECT expires_at FROM keyproxy.oauth_sessions WHERE via_key IS NOT NULL") == before
    )
    lasting = await signed_in.fetchval(
        "SELECT expires_at > now() + interval '80 days' FROM keyproxy.oauth_sessions WHERE via_key IS NULL"
    )
    assert lasting is True


async def test_session_of_a_key_is_stored_with_the_expiry_of_the_key_at_the_latest(signed_in: Sql) -> None:
    await signed_in.execute("UPDATE keyproxy.api_keys SET expires_at = now() + interval '1 hour'")
    await add_session(signed_in, 3, via_key="key_1")
    await add_session(signed_in, 4, via_key="key_1", expires="now() + interval '1 minute'")
    query = (
        "SELECT s.expires_at < k.expires_at FROM keyproxy.oauth_sessions AS s, keyproxy.api_keys AS k WHERE s.id = $1"
    )
    assert [await signed_in.fetchval(query, session_id(number)) for number in (3, 4)] == [False, True]
    assert await signed_in.fetchval(
        "SELECT max(expires_at) FROM keyproxy.oauth_sessions WHERE via_key IS NOT NULL"
    ) == (await signed_in.fetchval("SELECT expires_at FROM keyproxy.api_keys"))


# -- explanations and credits


async def test_explanation_of_a_session_is_that_of_its_newest_token(database: Database, sql: Sql) -> None:
    await add_grant(sql)
    await sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('r', '{jobs:write}')")
    await sql.execute("UPDATE keyproxy.users SET roles = '{r}'")
    await add_session(sql, scopes=("jobs:read", "jobs:write"))
    with pytest.raises(NotFound, match="no session with an access token"):
        await key_credential(database, session_id(), None, "X-", resources=BOTH)
    await add_access_token(sql, 1, scopes=("jobs:read",), expires="now() + interval '1 minute'")
    await add_access_token(sql, 2, scopes=("jobs:read", "jobs:write"))
    found = await key_credential(database, session_id(), None, "X-", resources=BOTH)
    assert (found.identity.standing, sorted(found.identity.scopes)) == (None, ["jobs:write"])
    assert found.shown["key"] == session_id()
    assert found.shown["key_scopes"] == ["jobs:read", "jobs:write"]
    assert (found.shown["user_ceiling"], found.shown["tenant_ceiling"], found.shown["roles"]) == (
        ["jobs:write"],
        None,
        [],
    )
    acting = await key_credential(database, session_id(), "u_43", "X-", resources=BOTH)
    assert (acting.identity.standing, acting.why_refused[:16]) == (Reason.DELEGATION_REFUSED, "An OAuth session")
    elsewhere = await key_credential(database, session_id(), None, "X-")
    assert elsewhere.identity.standing is Reason.KEY_INVALID


@pytest.mark.parametrize("owner", [grant_id(), session_id()])
async def test_windows_of_a_grant_can_be_credited_by_the_id_of_the_grant_or_a_session(
    database: Database, sql: Sql, owner: str
) -> None:
    await sql.execute("""INSERT INTO keyproxy.plans (id, limits) VALUES ('one', '{"requests_per_day": 1}')""")
    await add_grant(sql, plan="one")
    await add_session(sql)
    (row,) = await database.fetch("limits_of_key_pool", owner, False)
    assert (row["pool_id"], row["tenant_id"], row["is_test"]) == (grant_id(), "acme", False)
    assert "requests_per_day" in row["limits"]


async def test_access_token_is_looked_up_among_tokens_only_and_a_key_among_keys_only(rig: Rig) -> None:
    await add_access_token(rig.sql)
    key = await add_key(rig.sql)
    assert isinstance(await rig.resolve(access_token(1)), Identity)
    assert isinstance(await rig.resolve(key), Identity)
    assert rig.door.arguments["access_token_identities"] == [([access_token(1).digest()],)]
    assert rig.door.arguments["identities_by_digest"] == [([key.digest()],)]
    # Also when its row is read again.
    rig.clock.advance(Cache().fresh_seconds)
    await rig.feed.poll()
    assert isinstance(await rig.resolve(access_token(1)), Identity)
    await until(lambda: len(rig.door.arguments["access_token_identities"]) == 2, "the token is refreshed")
    assert len(rig.door.arguments["identities_by_digest"]) == 1


async def test_evicted_access_token_of_a_request_in_flight_is_looked_up_as_a_token(make_rig: MakeRig) -> None:
    rig = await make_rig(resources=BOTH, cache=Cache(entries_max=1))
    await rig.feed.poll()
    await add_access_token(rig.sql)
    before = await resolved(rig)
    assert isinstance(await rig.resolve(await add_key(rig.sql)), Identity)
    with pytest.raises(Missing) as caught:
        rig.cache.reviewed(access_token(1).digest(), before, rig.now())
    await caught.value.fetch_missing()
    assert rig.cache.reviewed(access_token(1).digest(), before, rig.now()).oauth is not None


@pytest.mark.parametrize("is_refresh", [False, True])
@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM keyproxy.oauth_access_tokens",
        "DELETE FROM keyproxy.oauth_sessions",
        "UPDATE keyproxy.oauth_clients SET disabled_at = now()",
    ],
)
async def test_lookup_of_an_access_token_that_a_change_overtakes_is_repeated(
    rig: Rig, statement: str, *, is_refresh: bool
) -> None:
    await add_access_token(rig.sql)
    await rig.feed.poll()
    if is_refresh:
        assert (await resolved(rig)).standing is None
        rig.clock.advance(Cache().fresh_seconds)
        await rig.feed.poll()
    before = rig.door.queries["access_token_identities"]
    hold = rig.door.hold("access_token_identities")
    request = asyncio.create_task(rig.resolve(access_token(1)))
    await hold.arrived.wait()
    await rig.sql.execute(statement)
    await rig.feed.poll()
    hold.release()
    # A request served from the stale entry was served before the change; the next one is not.
    assert is_refresh or _is_refused(await request)
    await rig.is_quiet()
    assert _is_refused(await rig.resolve(access_token(1)))
    assert rig.door.queries["access_token_identities"] == before + 2


def _is_refused(found: Identity | Reason) -> bool:
    return isinstance(found, Reason) or found.standing is not None
