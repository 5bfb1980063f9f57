"""The browser flow from the request of a client to its code, over a real database and sockets."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest

from keyproxy.store.postgres import roles
from keyproxy.store.postgres.database import Database
from tests.authorize.authority import Authority, authorizing, pkce
from tests.authorize.browser.browser import REDIRECT_URI, STATE, Browser
from tests.server import as_role, may_log_in
from tests.store.harness import Sql


@pytest.fixture
async def prefix(dsn: str, sql: Sql) -> AsyncIterator[str]:
    """The prefix of roles that exist during the test."""
    prefix = f"kp_{secrets.token_hex(6)}"
    await roles.create(dsn, prefix)
    for role in roles.names(prefix):
        await sql.execute(may_log_in(dsn, role))
    yield prefix
    for role in roles.names(prefix):
        await sql.execute(f'DROP OWNED BY "{role}"')
        await sql.execute(f'DROP ROLE "{role}"')


async def test_code_of_a_consent_is_exchanged_for_tokens(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    browser = Browser(authority)
    client_id = await browser.client()
    login = await browser.authorize(client_id)
    assert login.status == 200
    consent = await browser.sign_in(login, user["key"]["secret"])
    assert consent.status == 200
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_clients") == 0, "nothing is stored before consent"
    reply = await browser.decide(consent)
    assert reply.status == 303
    location = reply.location
    assert str(location.with_query(None)) == REDIRECT_URI
    assert list(location.query) == ["code", "state", "iss"]
    assert location.query["state"] == STATE
    assert location.query["iss"] == authority.url
    code = location.query["code"]
    assert len(code) == 43
    assert code.isalnum()
    row = await sql.fetchrow(
        "SELECT g.user_id, g.is_test, g.resource, c.scopes, c.via_key, c.client_id, c.redirect_uri,"
        " extract(epoch FROM c.expires_at - clock_timestamp())::float8 AS seconds"
        " FROM keyproxy.oauth_codes AS c JOIN keyproxy.oauth_grants AS g ON g.id = c.grant_id WHERE c.digest = $1",
        hashlib.sha256(code.encode()).digest(),
    )
    assert row is not None
    assert (row["user_id"], row["is_test"], row["resource"]) == ("u_42", False, authority.resource)
    assert (row["scopes"], row["via_key"]) == (["jobs:write"], user["key"]["id"])
    assert (row["client_id"], row["redirect_uri"]) == (client_id, REDIRECT_URI)
    assert 58 < row["seconds"] <= 60

    form = {
        "grant_type": "authorization_code",
        "code": code,
        "client_id": client_id,
        "redirect_uri": REDIRECT_URI,
        "code_verifier": pkce()[0],
    }
    tokens = await authority.call("POST", "/oauth/token", form=form)
    assert tokens.status == 200, tokens.body
    assert tokens.json["scope"] == "jobs:write"
    assert authority.counts.clients["value"] == 1


async def test_denied_request_returns_to_the_client_with_its_state(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    browser = Browser(authority)
    consent = await browser.sign_in(await browser.authorize(await browser.client()), user["key"]["secret"])
    reply = await browser.decide(consent, "deny")
    assert reply.status == 303
    assert reply.location.query["error"] == "access_denied"
    assert (reply.location.query["state"], reply.location.query["iss"]) == (STATE, authority.url)
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_clients") == 0


async def test_role_of_the_authorization_server_suffices_for_every_step(
    database: Database, dsn: str, sql: Sql, prefix: str
) -> None:
    async with authorizing(database) as authority:
        user = await authority.user()
    limited = Database(as_role(dsn, f"{prefix}_authorize"), pool_size_max=2, statement_timeout_seconds=5.0)
    await limited.open()
    try:
        async with authorizing(limited) as authority:
            browser, secret = Browser(authority), user["key"]["secret"]
            client_id = await browser.client()
            await browser.code(client_id, secret)
            # Again, when all rows exist.
            form = {
                "grant_type": "authorization_code",
                "code": await browser.code(client_id, secret),
                "client_id": client_id,
                "redirect_uri": REDIRECT_URI,
                "code_verifier": pkce()[0],
            }
            assert (await authority.call("POST", "/oauth/token", form=form)).status == 200
            await browser.sign_in(await browser.get("/oauth/connections"), secret)
            page = await browser.get("/oauth/connections")
            assert (await browser.submit(page, ("end", "all"))).status == 303
    finally:
        await limited.close()
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_grants") == 0


async def test_each_step_of_a_login_may_reach_another_process(database: Database, sql: Sql) -> None:
    origin = "http://localhost:8082"
    same: dict[str, Any] = {"issuer": origin, "resource": f"{origin}/mcp", "test_resource": ""}
    async with authorizing(database, **same) as first, authorizing(database, **same) as second:
        user = await first.user()
        browser = Browser(first)
        login = await browser.authorize(await browser.client())
        browser.authority = second
        consent = await browser.sign_in(login, user["key"]["secret"])
        browser.authority = first
        reply = await browser.decide(consent)
        assert reply.location.query["iss"] == origin
        assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_codes") == 1
