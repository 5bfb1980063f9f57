"""Tokens of services: one session, no refresh token, and what the grant names."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from keyproxy.store.oauth.token_values import ServiceRequest
from keyproxy.store.oauth.tokens import SERVICE_TOKENS_MAX, TokenStore
from keyproxy.store.postgres.database import Database
from tests.store.harness import Sql
from tests.store.oauth.token_requests import WallClock, error_of, outcomes, service, token_store
from tests.store.oauth_rows import RESOURCE, TEST_RESOURCE, add_grant

WORKER = service()
SCOPES = ("jobs:read", "jobs:write")


@pytest.fixture
def clock() -> WallClock:
    return WallClock()


@pytest.fixture
def tokens(database: Database, clock: WallClock) -> TokenStore:
    return token_store(database, clock)


async def add_service(sql: Sql, number: int = 1, **changes: Any) -> str:
    """Insert the grant of the service."""
    return await add_grant(sql, number, client_id="worker", is_service=True, scopes=SCOPES, **changes)


async def test_service_gets_access_tokens_of_one_session_and_no_refresh_token(tokens: TokenStore, sql: Sql) -> None:
    await add_service(sql)
    first, second = [await tokens.client_credentials(WORKER, ServiceRequest()) for _ in range(2)]
    assert (first.refresh_token, first.expires_in, first.scopes, first.user_id) == (None, 900, SCOPES, "u_42")
    assert first.session_id == second.session_id
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_refresh_tokens") == 0
    assert await sql.fetchval("SELECT presented_as FROM keyproxy.oauth_sessions") == "worker"


async def test_first_tokens_at_once_share_one_session(
    tokens: TokenStore, database: Database, clock: WallClock, sql: Sql
) -> None:
    await add_service(sql)
    stores = (tokens, token_store(database, clock))
    both = await asyncio.gather(*(one.client_credentials(WORKER, ServiceRequest()) for one in stores))
    assert len({one.session_id for one in both}) == 1


async def test_session_of_a_service_lives_as_long_as_it_is_used(tokens: TokenStore, sql: Sql, clock: WallClock) -> None:
    await add_service(sql)
    sessions = set()
    for _ in range(4):
        sessions.add((await tokens.client_credentials(WORKER, ServiceRequest())).session_id)
        clock.advance(60 * 86_400)
    assert len(sessions) == 1


@pytest.mark.parametrize(
    ("wish", "error"),
    [
        (ServiceRequest(), ""),
        (ServiceRequest(resource=RESOURCE), ""),
        (ServiceRequest(resource=RESOURCE + "/"), ""),
        (ServiceRequest(resource=TEST_RESOURCE), "invalid_target"),
        (ServiceRequest(resource="https://elsewhere.example"), "invalid_target"),
        (ServiceRequest(scopes=frozenset({"jobs:read", "other"})), ""),
        (ServiceRequest(scopes=frozenset({"other"})), "invalid_scope"),
    ],
)
async def test_service_gets_only_what_its_grant_names(
    tokens: TokenStore, sql: Sql, wish: ServiceRequest, error: str
) -> None:
    await add_service(sql)
    assert await error_of(tokens.client_credentials(WORKER, wish)) == error


async def test_service_with_two_grants_gets_the_live_one_unless_it_names_the_other(
    tokens: TokenStore, sql: Sql
) -> None:
    await add_service(sql, 1, resource=TEST_RESOURCE, is_test=True)
    only = await tokens.client_credentials(WORKER, ServiceRequest())
    await add_service(sql, 2, resource=RESOURCE)
    live = await tokens.client_credentials(WORKER, ServiceRequest())
    test = await tokens.client_credentials(WORKER, ServiceRequest(resource=TEST_RESOURCE))
    assert only.session_id == test.session_id != live.session_id


async def test_client_without_a_grant_to_itself_gets_no_token(tokens: TokenStore, sql: Sql) -> None:
    await add_grant(sql, client_id="worker")
    assert await error_of(tokens.client_credentials(WORKER, ServiceRequest())) == "unauthorized_client"


async def test_service_of_a_disabled_user_gets_no_token(tokens: TokenStore, sql: Sql) -> None:
    await add_service(sql)
    await sql.execute("UPDATE keyproxy.users SET disabled_at = now()")
    assert await error_of(tokens.client_credentials(WORKER, ServiceRequest())) == "invalid_grant"


async def test_changed_scopes_of_a_service_apply_to_its_next_token(tokens: TokenStore, sql: Sql) -> None:
    await add_service(sql)
    await tokens.client_credentials(WORKER, ServiceRequest())
    await sql.execute("UPDATE keyproxy.oauth_grants SET scopes = '{jobs:read}'")
    assert (await tokens.client_credentials(WORKER, ServiceRequest())).scopes == ("jobs:read",)
    assert await sql.fetchval("SELECT scopes FROM keyproxy.oauth_sessions") == ["jobs:read"]


async def test_service_has_at_most_ten_thousand_access_tokens(tokens: TokenStore, sql: Sql, clock: WallClock) -> None:
    await add_service(sql)
    first = await tokens.client_credentials(WORKER, ServiceRequest())
    await sql.execute(
        "INSERT INTO keyproxy.oauth_access_tokens (digest, session_id, scopes, issued_at, expires_at)"
        " SELECT sha256(n::text::bytea), $1, '{}', $2::timestamptz + n * interval '1 ms', $2 + n * interval '1 ms'"
        "   + interval '900 s' FROM generate_series(2, $3) AS n",
        first.session_id, clock.time, SERVICE_TOKENS_MAX,
    )  # fmt: skip
    clock.advance(11)
    await tokens.client_credentials(WORKER, ServiceRequest())
    count = "SELECT count(*), bool_or(digest = $1) AS has_first FROM keyproxy.oauth_access_tokens"
    row = await sql.fetchrow(count, first.access_token.digest())
    assert row is not None
    assert tuple(row) == (SERVICE_TOKENS_MAX, False)


async def test_many_requests_at_once_all_succeed(tokens: TokenStore, sql: Sql) -> None:
    await add_service(sql)
    assert set(await outcomes(*(tokens.client_credentials(WORKER, ServiceRequest()) for _ in range(12)))) == {""}


async def test_token_of_a_certificate_is_bound_to_it(tokens: TokenStore, sql: Sql) -> None:
    await add_service(sql)
    await tokens.client_credentials(WORKER, ServiceRequest(bound_to=b"c" * 32))
    assert await sql.fetchval("SELECT bound_to FROM keyproxy.oauth_access_tokens") == b"c" * 32


async def test_assertion_is_used_once(tokens: TokenStore, database: Database, clock: WallClock) -> None:
    other_process = token_store(database, clock)
    used = await asyncio.gather(*(one.use_assertion(b"a" * 32, clock.time) for one in (tokens, other_process)))
    assert sorted(used) == [False, True]
    assert await tokens.use_assertion(b"b" * 32, clock.time)
