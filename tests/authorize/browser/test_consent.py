"""The decision of a user: what it stores, and what must still hold when it arrives."""

from __future__ import annotations

import asyncio

from tests.authorize.authority import Authority
from tests.authorize.browser.browser import Browser
from tests.store.harness import Sql, until_blocked

COUNTS = (
    "SELECT (SELECT count(*) FROM keyproxy.oauth_clients), (SELECT count(*) FROM keyproxy.oauth_grants),"
    " (SELECT count(*) FROM keyproxy.oauth_codes)"
)


async def counts(sql: Sql) -> tuple[int, ...]:
    row = await sql.fetchrow(COUNTS)
    assert row is not None
    return tuple(row)


#: What may happen between the page and the decision.
ENDED = [
    "UPDATE keyproxy.users SET disabled_at = now()",
    "UPDATE keyproxy.tenants SET disabled_at = now()",
    "DELETE FROM keyproxy.users",
    "UPDATE keyproxy.api_keys SET revoked_at = now()",
    "UPDATE keyproxy.api_keys SET expires_at = now()",
    "UPDATE keyproxy.api_keys SET suspended_at = now()",
    "UPDATE keyproxy.api_keys SET scopes = '{jobs:read}'",
    "DELETE FROM keyproxy.api_keys",
]


async def test_login_that_ends_before_the_decision_grants_nothing(authority: Authority, sql: Sql) -> None:
    browser = Browser(authority)
    client_id = await browser.client()
    for number, change in enumerate(ENDED):
        user = await authority.user(f"u_{number}", f"t_{number}")
        consent = await browser.sign_in(await browser.authorize(client_id), user["key"]["secret"])
        await sql.execute(change)
        reply = await browser.decide(consent)
        assert (reply.status, "Location" in reply.headers) == (403, False), change
        assert 'role="alert"' in reply.text
        assert await counts(sql) == (0, 0, 0)


async def test_key_that_is_revoked_during_the_decision_grants_nothing(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    browser = Browser(authority)
    consent = await browser.sign_in(await browser.authorize(await browser.client()), user["key"]["secret"])
    async with sql.transaction():
        await sql.execute("UPDATE keyproxy.api_keys SET revoked_at = now()")
        deciding = asyncio.create_task(browser.decide(consent))
        await until_blocked(sql, "hold_login_key")
    reply = await deciding
    assert (reply.status, "Location" in reply.headers) == (403, False)
    assert await counts(sql) == (0, 0, 0)


async def test_client_that_is_disabled_before_the_decision_gets_nothing(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    browser = Browser(authority)
    client_id = await browser.client()
    await browser.code(client_id, user["key"]["secret"])
    consent = await browser.sign_in(await browser.authorize(client_id), user["key"]["secret"])
    await sql.execute("UPDATE keyproxy.oauth_clients SET disabled_at = now()")
    reply = await browser.decide(consent)
    assert (reply.status, "Location" in reply.headers) == (403, False)
    assert await counts(sql) == (1, 1, 1)


async def test_scope_that_the_key_loses_before_the_decision_is_not_granted(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    browser = Browser(authority)
    login = await browser.authorize(await browser.client(), scope=None)
    consent = await browser.sign_in(login, user["key"]["secret"])
    await sql.execute("UPDATE keyproxy.api_keys SET scopes = '{jobs:read}'")
    assert (await browser.decide(consent)).status == 303
    assert await sql.fetchval("SELECT scopes FROM keyproxy.oauth_codes") == ["jobs:read"]
    assert await sql.fetchval("SELECT scopes FROM keyproxy.oauth_grants") == ["jobs:read"]


async def test_twenty_devices_at_once_share_one_client_and_one_grant(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    devices = [Browser(authority) for _ in range(20)]
    client_id = await devices[0].client()
    codes = await asyncio.gather(*(device.code(client_id, user["key"]["secret"]) for device in devices))
    assert len(set(codes)) == 20
    assert await counts(sql) == (1, 1, 20)
    assert authority.counts.clients["value"] == 1


async def test_grant_keeps_the_scopes_of_all_its_devices(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    browser = Browser(authority)
    client_id = await browser.client()
    for scope in ("jobs:write", "jobs:read", "jobs:write"):
        await browser.code(client_id, user["key"]["secret"], scope=scope)
    assert await sql.fetchval("SELECT scopes FROM keyproxy.oauth_grants") == ["jobs:read", "jobs:write"]
    assert await sql.fetch("SELECT scopes FROM keyproxy.oauth_codes WHERE cardinality(scopes) <> 1") == []


async def test_browser_cannot_widen_the_grant_of_a_service(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    await sql.execute(
        "WITH c AS (INSERT INTO keyproxy.oauth_clients (id, client_id, kind, redirect_uris)"
        " VALUES ('cli_' || left(encode(sha256('worker'), 'hex'), 32), 'worker', 'registered', '{https://acme.example/cb}')"
        " RETURNING id) INSERT INTO keyproxy.oauth_grants (id, user_id, client_id, resource, scopes, is_service)"
        " SELECT 'gra_' || repeat('a', 22), 'u_42', c.id, $1, '{jobs:read}', true FROM c",
        authority.resource,
    )
    browser = Browser(authority)
    consent = await browser.sign_in(await browser.authorize("worker"), user["key"]["secret"])
    reply = await browser.decide(consent)
    assert (reply.status, "Location" in reply.headers) == (403, False)
    assert await sql.fetchval("SELECT scopes FROM keyproxy.oauth_grants") == ["jobs:read"]
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_codes") == 0


async def test_consent_is_in_the_audit_log_as_an_act_of_the_user(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    browser = Browser(authority)
    await browser.code(await browser.client(), user["key"]["secret"])
    rows = await sql.fetch(
        "SELECT actor, action, entity, tenant_id FROM keyproxy.audit_log WHERE entity LIKE 'oauth%' ORDER BY id"
    )
    assert [tuple(row) for row in rows] == [
        ("user:u_42", "insert", "oauth_client", None),
        ("user:u_42", "insert", "oauth_grant", "acme"),
    ]


async def test_decision_must_be_one(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    browser = Browser(authority)
    consent = await browser.sign_in(await browser.authorize(await browser.client()), user["key"]["secret"])
    for decision in ("", "maybe", "ALLOW"):
        reply = await browser.submit(consent, None, decision=decision)
        assert (reply.status, "Location" in reply.headers) == (400, False)
    assert await counts(sql) == (0, 0, 0)


async def test_outage_before_the_decision_is_a_page_and_stores_nothing(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    browser = Browser(authority)
    client_id = await browser.client()
    consent = await browser.sign_in(await browser.authorize(client_id), user["key"]["secret"])
    await authority.database.close()
    for reply in (await browser.decide(consent), await browser.authorize(client_id)):
        assert (reply.status, "Location" in reply.headers) == (503, False)
        assert int(reply.headers["Retry-After"]) >= 1
        assert 'role="alert"' in reply.text
    assert await counts(sql) == (0, 0, 0)
