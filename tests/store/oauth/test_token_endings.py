"""Revocation and introspection: a client ends and sees its own tokens alone."""

from __future__ import annotations

from collections import Counter

import pytest

from keyproxy.store.oauth.token_values import IssuedTokens, TokenReader
from keyproxy.store.oauth.tokens import TokenStore
from keyproxy.store.postgres.database import Database
from tests.store.harness import Sql, add_key, add_user
from tests.store.oauth.token_requests import CLIENT, OTHER_CLIENT, WallClock, exchange, refreshed, token_store
from tests.store.oauth_rows import RESOURCE, add_code

COUNTS = (
    "SELECT (SELECT count(*) FROM keyproxy.oauth_sessions), (SELECT count(*) FROM keyproxy.oauth_refresh_tokens),"
    " (SELECT count(*) FROM keyproxy.oauth_access_tokens)"
)
ALL = TokenReader()


@pytest.fixture
def clock() -> WallClock:
    return WallClock()


@pytest.fixture
def tokens(database: Database, clock: WallClock) -> TokenStore:
    return token_store(database, clock)


@pytest.fixture
async def issued(tokens: TokenStore, sql: Sql) -> IssuedTokens:
    await add_user(sql)
    return await tokens.redeem(CLIENT, exchange(await add_code(sql), bound_to=b"c" * 32))


def access(issued: IssuedTokens) -> bytes:
    return issued.access_token.reveal()


def refresh(issued: IssuedTokens) -> bytes:
    assert issued.refresh_token is not None
    return issued.refresh_token.reveal()


async def counts(sql: Sql) -> tuple[int, ...]:
    row = await sql.fetchrow(COUNTS)
    assert row is not None
    return tuple(row)


async def test_revoked_access_token_ends_alone(tokens: TokenStore, sql: Sql, issued: IssuedTokens) -> None:
    assert await tokens.revoke(CLIENT, access(issued)) == "u_42"
    assert await counts(sql) == (1, 1, 0)
    assert await tokens.revoke(CLIENT, access(issued)) is None


@pytest.mark.parametrize("is_old", [False, True], ids=["current", "used"])
async def test_revoked_refresh_token_ends_its_session(
    tokens: TokenStore, sql: Sql, issued: IssuedTokens, is_old: bool
) -> None:
    if is_old:
        await tokens.refresh(CLIENT, refreshed(issued))
    assert await tokens.revoke(CLIENT, refresh(issued)) == "u_42"
    assert await counts(sql) == (0, 0, 0)
    actor = await sql.fetchval("SELECT actor FROM keyproxy.audit_log WHERE action = 'delete'")
    assert actor == f"client:{CLIENT.row_id}"


@pytest.mark.parametrize("token", [b"", b"kp_access_x", b"\xff", b"kp_live_" + b"1" * 49])
async def test_what_is_no_token_of_the_client_is_not_revoked(
    tokens: TokenStore, sql: Sql, issued: IssuedTokens, token: bytes
) -> None:
    assert await tokens.revoke(CLIENT, token) is None
    for one in (access(issued), refresh(issued)):
        assert await tokens.revoke(OTHER_CLIENT, one) is None
    assert await counts(sql) == (1, 1, 1)


async def test_introspection_shows_what_the_proxy_grants(tokens: TokenStore, sql: Sql, issued: IssuedTokens) -> None:
    state = await tokens.introspect(access(issued), ALL)
    assert state is not None
    assert (state.scopes, state.client_id, state.user_id, state.resource, state.bound_to) == (
        ("jobs:write",), CLIENT.client_id, "u_42", RESOURCE, b"c" * 32,
    )  # fmt: skip
    assert (state.expires_at - state.issued_at).total_seconds() == 900
    await sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('narrow', '{jobs:read}')")
    await sql.execute("UPDATE keyproxy.users SET roles = '{narrow}'")
    narrowed = await tokens.introspect(access(issued), ALL)
    assert narrowed is not None
    assert narrowed.scopes == ()


@pytest.mark.parametrize(
    ("reader", "is_seen"),
    [
        (ALL, True),
        (TokenReader(client_row=CLIENT.row_id), True),
        (TokenReader(client_row=OTHER_CLIENT.row_id), False),
        (TokenReader(tenant_id="acme"), True),
        (TokenReader(tenant_id="globex"), False),
    ],
)
async def test_readers_see_the_tokens_of_their_client_or_tenant(
    tokens: TokenStore, issued: IssuedTokens, reader: TokenReader, is_seen: bool
) -> None:
    assert (await tokens.introspect(access(issued), reader) is not None) is is_seen


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE keyproxy.users SET disabled_at = now()",
        "UPDATE keyproxy.tenants SET disabled_at = now()",
        "UPDATE keyproxy.oauth_clients SET disabled_at = now()",
        "UPDATE keyproxy.oauth_sessions SET expires_at = now() - interval '1 s'",
        "UPDATE keyproxy.oauth_access_tokens SET expires_at = now() - interval '1 s'",
        "UPDATE keyproxy.oauth_grants SET resource = 'https://before.example'",
        "UPDATE keyproxy.oauth_grants SET is_test = true",
        "UPDATE keyproxy.oauth_sessions SET via_key = 'key_1'",
        "DELETE FROM keyproxy.oauth_sessions",
    ],
)
async def test_token_that_the_proxy_refuses_is_not_active(
    tokens: TokenStore, sql: Sql, issued: IssuedTokens, change: str
) -> None:
    await add_key(sql)
    await sql.execute("UPDATE keyproxy.api_keys SET suspended_at = now()")
    assert await tokens.introspect(access(issued), ALL) is not None
    await sql.execute(change)
    assert await tokens.introspect(access(issued), ALL) is None


async def test_infinite_times_of_an_sql_client_are_shown_as_far_ones(
    tokens: TokenStore, sql: Sql, issued: IssuedTokens
) -> None:
    await sql.execute("UPDATE keyproxy.oauth_sessions SET expires_at = 'infinity'")
    await sql.execute("UPDATE keyproxy.oauth_access_tokens SET issued_at = '-infinity', expires_at = 'infinity'")
    state = await tokens.introspect(access(issued), ALL)
    assert state is not None
    assert state.issued_at.timestamp() == 0
    assert state.expires_at.year > 2100
    await sql.execute("UPDATE keyproxy.oauth_refresh_tokens SET used_at = 'infinity'")
    assert (await tokens.refresh(CLIENT, refreshed(issued))).expires_in == 900


async def test_refresh_token_is_never_active(tokens: TokenStore, issued: IssuedTokens) -> None:
    assert await tokens.introspect(refresh(issued), ALL) is None


async def test_token_is_active_until_it_expires(tokens: TokenStore, clock: WallClock, issued: IssuedTokens) -> None:
    clock.advance(899.9)
    assert await tokens.introspect(access(issued), ALL) is not None
    clock.advance(0.1)
    assert await tokens.introspect(access(issued), ALL) is None


async def test_counts_of_tokens_and_endings_are_those_of_committed_requests(database: Database, sql: Sql) -> None:
    issued: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    clock = WallClock()
    tokens = token_store(database, clock, issued=issued, ended=ended)
    digest = await add_code(sql)
    first = await tokens.redeem(CLIENT, exchange(digest))
    await tokens.refresh(CLIENT, refreshed(first))
    await tokens.revoke(CLIENT, refresh(first))
    assert (dict(issued), dict(ended)) == ({"authorization_code": 1, "refresh_token": 1}, {"revoked": 1})
