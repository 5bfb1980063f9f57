"""Authorization codes: redeemed once, by the client that they were issued to, within their time."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from typing import Any

import pytest

from keyproxy.oauth.client import Client
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.store.oauth.tokens import TokenStore
from keyproxy.store.postgres.database import Database, StoreUnavailable
from tests.store.harness import Relay, Sql, add_key, add_user, until_blocked
from tests.store.oauth.token_requests import (
    CLIENT,
    OTHER_CLIENT,
    WallClock,
    error_of,
    exchange,
    outcomes,
    token_store,
)
from tests.store.oauth_rows import TEST_RESOURCE, add_code, add_grant, grant_id

SESSIONS = "SELECT count(*) FROM keyproxy.oauth_sessions"


@pytest.fixture
def clock() -> WallClock:
    return WallClock()


@pytest.fixture
def tokens(database: Database, clock: WallClock) -> TokenStore:
    return token_store(database, clock)


async def test_code_is_redeemed_for_a_session_with_a_refresh_token_and_an_access_token(
    tokens: TokenStore, sql: Sql
) -> None:
    issued = await tokens.redeem(CLIENT, exchange(await add_code(sql)))
    assert (issued.expires_in, issued.scopes, issued.user_id) == (900, ("jobs:write",), "u_42")
    row = await sql.fetchrow(
        "SELECT s.presented_as, s.scopes, s.expires_at - s.created_at AS life, a.bound_to,"
        " r.expires_at - r.issued_at AS idle, a.expires_at - a.issued_at AS seconds, c.session_id, r.follows,"
        " c.redeemed_at = s.created_at AS is_redeemed"
        " FROM keyproxy.oauth_sessions AS s"
        " JOIN keyproxy.oauth_access_tokens AS a ON a.session_id = s.id AND a.digest = $1"
        " JOIN keyproxy.oauth_refresh_tokens AS r ON r.session_id = s.id AND r.digest = $2"
        " JOIN keyproxy.oauth_codes AS c ON c.grant_id = s.grant_id",
        issued.access_token.digest(), issued.refresh_token.digest() if issued.refresh_token else None,
    )  # fmt: skip
    assert row is not None
    assert (row["life"].days, row["idle"].days, row["seconds"].total_seconds()) == (90, 30, 900)
    assert (row["presented_as"], row["scopes"], row["bound_to"]) == (CLIENT.presented_as, ["jobs:write"], None)
    assert (row["session_id"], row["is_redeemed"], row["follows"]) == (issued.session_id, True, None)
    audited = await sql.fetchrow("SELECT actor, origin FROM keyproxy.audit_log WHERE entity = 'oauth_session'")
    assert audited is not None
    assert tuple(audited) == (f"client:{CLIENT.row_id}", "authorize")


@pytest.mark.parametrize(
    ("client", "changes", "code"),
    [
        (OTHER_CLIENT, {}, "invalid_grant"),
        (dataclasses.replace(CLIENT, client_id="listed:Acme"), {}, "invalid_grant"),
        (CLIENT, {"verifier": "another"}, "invalid_grant"),
        (CLIENT, {"redirect_uri": "https://acme.example/cb/"}, "invalid_grant"),
        (CLIENT, {"resource": "https://elsewhere.example"}, "invalid_target"),
        (CLIENT, {"resource": TEST_RESOURCE}, "invalid_target"),
    ],
    ids=["client", "row", "verifier", "redirect_uri", "unknown resource", "another resource"],
)
async def test_wrong_values_leave_the_code_good(
    tokens: TokenStore, sql: Sql, client: Client, changes: dict[str, Any], code: str
) -> None:
    digest = await add_code(sql)
    assert await error_of(tokens.redeem(client, exchange(digest, **changes))) == code
    assert await sql.fetchval(SESSIONS) == 0
    assert await error_of(tokens.redeem(CLIENT, exchange(digest))) == ""


@pytest.mark.parametrize("changes", [{"redirect_uri": None}, {"resource": None}])
async def test_redirect_uri_and_resource_may_be_absent(tokens: TokenStore, sql: Sql, changes: dict[str, Any]) -> None:
    assert await error_of(tokens.redeem(CLIENT, exchange(await add_code(sql), **changes))) == ""


@pytest.mark.parametrize(("seconds", "error"), [(59.9, ""), (60.0, "invalid_grant")])
async def test_code_works_for_sixty_seconds(
    tokens: TokenStore, sql: Sql, clock: WallClock, seconds: float, error: str
) -> None:
    digest = await add_code(sql)
    await sql.execute("UPDATE keyproxy.oauth_codes SET expires_at = $1", clock.time)
    clock.advance(seconds - 60)
    assert await error_of(tokens.redeem(CLIENT, exchange(digest))) == error


async def test_unknown_code_is_refused(tokens: TokenStore) -> None:
    assert await error_of(tokens.redeem(CLIENT, exchange(bytes(32)))) == "invalid_grant"


@pytest.mark.parametrize("seconds", [0, 300])
async def test_code_again_with_the_right_verifier_ends_its_session(
    tokens: TokenStore, sql: Sql, clock: WallClock, seconds: float
) -> None:
    digest = await add_code(sql)
    await tokens.redeem(CLIENT, exchange(digest))
    clock.advance(seconds)
    assert await error_of(tokens.redeem(CLIENT, exchange(digest))) == "invalid_grant"
    assert await sql.fetchval(SESSIONS) == await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_access_tokens") == 0
    actor = await sql.fetchval(
        "SELECT actor FROM keyproxy.audit_log WHERE entity = 'oauth_session' AND action = 'delete'"
    )
    assert actor == "oauth:reuse"


async def test_code_again_with_another_verifier_leaves_its_session(tokens: TokenStore, sql: Sql) -> None:
    digest = await add_code(sql)
    await tokens.redeem(CLIENT, exchange(digest))
    assert await error_of(tokens.redeem(CLIENT, exchange(digest, "another"))) == "invalid_grant"
    assert await sql.fetchval(SESSIONS) == 1


async def test_code_that_is_redeemed_twice_at_once_leaves_no_session(
    tokens: TokenStore, database: Database, sql: Sql, clock: WallClock
) -> None:
    digest, other_process = await add_code(sql), token_store(database, clock)
    both = await outcomes(*(one.redeem(CLIENT, exchange(digest)) for one in (tokens, other_process)))
    assert both == ["", "invalid_grant"]
    assert await sql.fetchval(SESSIONS) == 0


@pytest.mark.parametrize("table", ["users", "tenants"])
async def test_disabled_account_gets_no_tokens_and_its_code_stays(tokens: TokenStore, sql: Sql, table: str) -> None:
    digest = await add_code(sql)
    await sql.execute(f"UPDATE keyproxy.{table} SET disabled_at = now()")
    assert await error_of(tokens.redeem(CLIENT, exchange(digest))) == "invalid_grant"
    await sql.execute(f"UPDATE keyproxy.{table} SET disabled_at = NULL")
    assert await error_of(tokens.redeem(CLIENT, exchange(digest))) == ""


async def test_suspended_key_of_the_login_gets_no_tokens(tokens: TokenStore, sql: Sql) -> None:
    await add_user(sql)
    await add_key(sql)
    digest = await add_code(sql, via_key="key_1")
    await sql.execute("UPDATE keyproxy.api_keys SET suspended_at = now()")
    assert await error_of(tokens.redeem(CLIENT, exchange(digest))) == "invalid_grant"


async def test_session_ends_with_the_key_of_the_login(tokens: TokenStore, sql: Sql, clock: WallClock) -> None:
    await add_user(sql)
    await add_key(sql)
    await sql.execute("UPDATE keyproxy.api_keys SET expires_at = now() + interval '5 minutes'")
    issued = await tokens.redeem(CLIENT, exchange(await add_code(sql, via_key="key_1")))
    assert 280 <= issued.expires_in <= 300
    ends = await sql.fetchval("SELECT expires_at FROM keyproxy.oauth_refresh_tokens")
    assert ends == await sql.fetchval("SELECT expires_at FROM keyproxy.api_keys")


async def test_scope_that_the_grant_has_lost_is_not_granted(tokens: TokenStore, sql: Sql) -> None:
    await add_grant(sql, scopes=("jobs:read",))
    digest = await add_code(sql, scopes=("jobs:read", "jobs:write"))
    assert (await tokens.redeem(CLIENT, exchange(digest))).scopes == ("jobs:read",)


async def test_grant_for_a_resource_that_is_not_served_any_more_gets_no_tokens(tokens: TokenStore, sql: Sql) -> None:
    await add_grant(sql, resource="https://before.example/mcp")
    assert await error_of(tokens.redeem(CLIENT, exchange(await add_code(sql)))) == "invalid_grant"


async def test_deletion_of_the_grant_at_the_same_time_leaves_no_session(tokens: TokenStore, sql: Sql) -> None:
    digest = await add_code(sql)
    async with sql.transaction():
        await sql.execute("DELETE FROM keyproxy.oauth_grants WHERE id = $1", grant_id())
        redeeming = asyncio.create_task(error_of(tokens.redeem(CLIENT, exchange(digest))))
        await until_blocked(sql, "oauth_codes")
    assert await redeeming == "invalid_grant"
    assert await sql.fetchval(SESSIONS) == 0


@pytest.mark.parametrize("table", ["api_keys", "oauth_grants"])
async def test_redemption_that_waits_for_a_deletion_holds_nothing_that_the_deletion_needs(
    tokens: TokenStore, sql: Sql, table: str
) -> None:
    await add_user(sql)
    await add_key(sql)
    digest = await add_code(sql, via_key="key_1")
    async with sql.transaction():
        await sql.execute(f"SELECT FROM keyproxy.{table} FOR UPDATE")
        redeeming = asyncio.create_task(error_of(tokens.redeem(CLIENT, exchange(digest))))
        await until_blocked(sql, "login_key")
        await sql.execute("SELECT FROM keyproxy.oauth_codes FOR UPDATE NOWAIT")
    assert await redeeming == ""


async def test_outage_consumes_no_code(relay: Relay, sql: Sql, clock: WallClock) -> None:
    database = Database(relay.dsn, pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    tokens, digest = token_store(database, clock), await add_code(sql)
    await relay.cut()
    with pytest.raises(StoreUnavailable):
        await tokens.redeem(CLIENT, exchange(digest))
    await relay.mend()
    assert await error_of(tokens.redeem(CLIENT, exchange(digest))) == ""
    await database.close()


async def test_secret_is_in_no_table_and_no_representation(tokens: TokenStore, sql: Sql) -> None:
    shown = exchange(await add_code(sql))
    issued = await tokens.redeem(CLIENT, shown)
    assert issued.refresh_token is not None
    for secret in (issued.access_token, issued.refresh_token):
        plaintext = secret.reveal().decode()
        assert plaintext not in repr(issued)
        for table in ("oauth_sessions", "oauth_access_tokens", "oauth_refresh_tokens", "oauth_codes", "audit_log"):
            assert plaintext not in str(await sql.fetch(f"SELECT * FROM keyproxy.{table}")), table
    assert hashlib.sha256(b"verifier").hexdigest() not in repr(shown)


async def test_refusal_names_the_wrong_value(tokens: TokenStore, sql: Sql) -> None:
    with pytest.raises(OAuthError) as refusal:
        await tokens.redeem(CLIENT, exchange(await add_code(sql), "another"))
    assert (refusal.value.status, refusal.value.description) == (400, "'code_verifier' does not match the challenge.")
