"""The login with an API key: what it grants, which keys and browsers are refused, and how failures are slowed."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.store.postgres.database import Database
from tests.authorize.authority import Authority, authorizing
from tests.authorize.browser.browser import Browser, forms_of
from tests.store.harness import Sql


async def test_login_grants_at_most_the_scopes_of_the_key(authority: Authority) -> None:
    user = await authority.user(scopes=["jobs:read", "other:read"])
    browser = Browser(authority)
    client_id = await browser.client()
    secret = user["key"]["secret"]
    consent = await browser.sign_in(await browser.authorize(client_id, scope="jobs:read jobs:write"), secret)
    assert "<li>jobs:read</li>" in consent.text
    assert "jobs:write" not in consent.text
    refused = await browser.sign_in(await browser.authorize(client_id, scope="jobs:write"), secret)
    assert (refused.status, "Location" in refused.headers) == (403, False)
    assert forms_of(refused)[0].action == "/oauth/login", "another key may grant it"


async def test_roles_of_user_and_tenant_bound_a_login(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    await sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('reader', '{jobs:read}')")
    await sql.execute("UPDATE keyproxy.users SET roles = '{reader}'")
    browser = Browser(authority)
    client_id = await browser.client()
    consent = await browser.sign_in(await browser.authorize(client_id, scope=None), user["key"]["secret"])
    assert "<li>jobs:read</li>" in consent.text
    assert "jobs:write" not in consent.text


async def test_live_keys_authorize_the_resource_and_test_keys_the_test_resource(authority: Authority, sql: Sql) -> None:
    secret = (await authority.user())["key"]["secret"]
    browser = Browser(authority)
    client_id = await browser.client()
    for is_test in (False, True):
        await sql.execute("UPDATE keyproxy.api_keys SET is_test = $1", is_test)
        for path, is_of_tests in (("/mcp", False), ("/test-mcp", True)):
            login = await browser.authorize(client_id, resource=authority.url + path)
            consent = await browser.sign_in(login, secret)
            assert consent.status == (200 if is_test is is_of_tests else 403)
            if consent.status == 200:
                await browser.decide(consent)
            else:
                assert f"Enter a {'test' if is_of_tests else 'live'} key." in consent.text
    rows = await sql.fetch("SELECT resource, is_test FROM keyproxy.oauth_grants ORDER BY is_test")
    assert [tuple(row) for row in rows] == [(f"{authority.url}/mcp", False), (f"{authority.url}/test-mcp", True)]


#: How a key stops working, and a word of the page that reports it.
ENDED = [
    ("UPDATE keyproxy.api_keys SET revoked_at = now()", "revoked"),
    ("UPDATE keyproxy.api_keys SET expires_at = now()", "expired"),
    ("UPDATE keyproxy.api_keys SET suspended_at = now()", "suspended"),
    ("UPDATE keyproxy.users SET disabled_at = now()", "disabled"),
    ("UPDATE keyproxy.tenants SET disabled_at = now()", "disabled"),
    ("DELETE FROM keyproxy.users", "not valid"),
]


async def test_key_that_does_not_work_signs_in_no_user(authority: Authority, sql: Sql) -> None:
    browser = Browser(authority)
    login = await browser.authorize(await browser.client())
    for number, (change, word) in enumerate(ENDED):
        secret = (await authority.user(f"u_{number}", f"t_{number}"))["key"]["secret"]
        await sql.execute(change)
        reply = await browser.sign_in(login, secret)
        assert reply.status == 403, change
        assert word in reply.text
        assert 'role="alert"' in reply.text
        assert secret not in reply.text
        assert forms_of(reply)[0].visible == ["key"], "the user can try another key"


async def test_tokens_and_secrets_of_other_kinds_sign_in_no_user(authority: Authority) -> None:
    browser = Browser(authority)
    login = await browser.authorize(await browser.client())
    key_format = authority.context.key_format
    makers = (
        key_format.make_access_token, key_format.make_refresh_token, key_format.make_client_secret,
        key_format.make_admin_token,
    )  # fmt: skip
    for secret in [
        "",
        " ",
        "\N{SNOWMAN}",
        "kp_live_" + "a" * 49,
        *(make(b"r" * 32).reveal().decode() for make in makers),
    ]:
        reply = await browser.sign_in(login, secret)
        assert reply.status == 403, secret
        assert "not valid" in reply.text
        assert 'aria-invalid="true" aria-describedby="problem hint" autofocus' in reply.text


async def test_ten_failures_are_free_and_a_good_key_is_never_slowed(authority: Authority) -> None:
    user = await authority.user()
    browser = Browser(authority)
    login = await browser.authorize(await browser.client())
    statuses = [(await browser.sign_in(login, "kp_live_wrong")).status for _ in range(11)]
    assert statuses == [403] * 10 + [429]
    slowed = await browser.sign_in(login, "kp_live_wrong")
    assert 1 <= int(slowed.headers["Retry-After"]) <= 12
    assert (await browser.sign_in(login, user["key"]["secret"])).status == 200
    authority.clock.advance(6)
    assert [(await browser.sign_in(login, "kp_live_wrong")).status for _ in range(2)] == [403, 429]


async def test_forms_of_other_sites_and_browsers_are_refused(authority: Authority) -> None:
    user = await authority.user()
    browser = Browser(authority)
    secret = user["key"]["secret"]
    login = await browser.authorize(await browser.client())
    consent = await browser.sign_in(login, secret)
    for page, button in ((login, None), (consent, ("decision", "allow"))):
        for site, status in (("same-origin", None), ("none", None), ("cross-site", 403), ("same-site", 403), ("", 403)):
            reply = await browser.submit(page, button, headers={"Sec-Fetch-Site": site}, key=secret)
            assert reply.status == status if status else reply.status in (200, 303), site
        stranger = Browser(authority)
        assert (await stranger.submit(page, button, key=secret)).status == 403, "without a cookie"
        await stranger.authorize(await browser.client())
        assert (await stranger.submit(page, button, key=secret)).status == 403, "with the cookie of another browser"


async def test_two_tabs_of_one_browser_work(authority: Authority) -> None:
    user = await authority.user()
    browser = Browser(authority)
    first, second = await browser.client(), await browser.client("https://other.example/cb")
    one = await browser.authorize(first)
    other = await browser.authorize(second, redirect_uri="https://other.example/cb")
    other = await browser.sign_in(other, user["key"]["secret"])
    one = await browser.sign_in(one, user["key"]["secret"])
    for page, host in ((one, "acme.example"), (other, "other.example")):
        assert (await browser.decide(page)).location.host == host


async def test_two_tabs_that_open_at_once_work(authority: Authority) -> None:
    user = await authority.user()
    browser, tab = Browser(authority), Browser(authority)
    client_id = await browser.client()
    pages = [await browser.authorize(client_id), await tab.authorize(client_id)]
    browser.cookies |= tab.cookies
    assert len(browser.cookies) == 2
    for page in pages:
        assert (await browser.decide(await browser.sign_in(page, user["key"]["secret"]))).status == 303
    await browser.authorize(client_id)
    assert len(browser.cookies) == 2, "later tabs share a cookie"


async def test_ticket_of_a_form_expires_and_cannot_be_altered(authority: Authority) -> None:
    user = await authority.user()
    browser = Browser(authority)
    login = await browser.authorize(await browser.client())
    consent = await browser.sign_in(login, user["key"]["secret"])
    ticket = forms_of(login)[0].fields["ticket"]
    swapped = await browser.submit(consent, ("decision", "allow"), ticket=ticket)
    assert (swapped.status, "Location" in swapped.headers) == (400, False), "a login is not a consent"
    assert (await browser.submit(login, key=user["key"]["secret"], ticket=ticket[:-2] + "AA")).status == 400
    assert (await browser.submit(consent, ("decision", "allow"), ticket="")).status == 400
    authority.clock.advance(600)
    for page, button in ((login, None), (consent, ("decision", "allow"))):
        reply = await browser.submit(page, button, key=user["key"]["secret"])
        assert (reply.status, "Location" in reply.headers) == (400, False)


async def test_key_appears_in_no_log(authority: Authority) -> None:
    user = await authority.user()
    browser = Browser(authority)
    code = await browser.code(await browser.client(), user["key"]["secret"])
    logged = json.dumps(authority.log)
    for secret in (user["key"]["secret"], code, *browser.cookies.values()):
        assert secret not in logged
    last = authority.log[-1]
    assert (last["route"], last["user"], last["client"][:4]) == ("/oauth/consent", "u_42", "cli_")


@pytest.fixture
async def secure(database: Database) -> AsyncIterator[Authority]:
    """A server behind a TLS proxy."""
    origin = "https://mcp.example.com"
    oauth = OAuthSettings(issuer=origin, resource=f"{origin}/mcp")
    async with authorizing(database, issuer=oauth.issuer, resource=oauth.resource, test_resource="") as authority:
        yield authority


async def test_cookie_belongs_to_this_origin_alone(secure: Authority, authority: Authority) -> None:
    for server, name, has_secure in ((secure, "__Host-keyproxy-login-", True), (authority, "keyproxy-login-", False)):
        browser = Browser(server)
        reply = await browser.authorize(await browser.client())
        (cookie,) = browser.cookies
        assert re.fullmatch(f"{name}[0-9a-f]{{8}}", cookie)
        attributes = {part.strip().lower() for part in reply.headers["Set-Cookie"].split(";")[1:]}
        assert {"httponly", "path=/", "samesite=lax"} <= attributes
        assert ("secure" in attributes) is has_secure
        assert not any(attribute.startswith("domain") for attribute in attributes)


async def test_value_of_another_cookie_never_becomes_the_cookie_of_a_login(secure: Authority) -> None:
    user = await secure.user()
    browser = Browser(secure)
    page = await browser.authorize(await browser.client())
    (own,) = (f"{name}={value}" for name, value in browser.cookies.items())
    form = {**forms_of(page)[0].fields, "key": user["key"]["secret"]}
    for header, status in (
        (own, 200),
        (f"a=1; {own}; b=2", 200),
        (f"a=1;{own}", 200),
        # What a site of a sibling domain can set: any value without a semicolon.
        (f"a=1 {own}", 403),
        (f"a=1\t{own}", 403),
        (f'a="1" {own}', 403),
        (f"a={own}", 403),
        (f"={own}", 403),
        (own.replace("=", '="') + '"', 403),
        (own.replace("__Host-", "__host-"), 403),
    ):
        reply = await secure.call("POST", "/oauth/login", form=form, headers={"Cookie": header})
        assert reply.status == status, header


async def test_grant_has_the_plan_of_the_key_that_signs_in_unless_it_has_one(authority: Authority, sql: Sql) -> None:
    await sql.execute("INSERT INTO keyproxy.plans (id) VALUES ('small'), ('large')")
    plan = "SELECT plan_id FROM keyproxy.oauth_grants"
    user = await authority.user()
    browser = Browser(authority)
    client_id = await browser.client()
    await browser.code(client_id, user["key"]["secret"])
    assert await sql.fetchval(plan) is None
    await sql.execute("UPDATE keyproxy.api_keys SET plan_id = 'small'")
    await browser.code(client_id, user["key"]["secret"])
    assert await sql.fetchval(plan) == "small", "else the holder of a limited key has tokens without its limits"
    await sql.execute("UPDATE keyproxy.oauth_grants SET plan_id = 'large'")
    await browser.code(client_id, user["key"]["secret"])
    assert await sql.fetchval(plan) == "large", "what an operator has decided stays"


async def test_session_of_a_login_ends_with_its_key(authority: Authority, sql: Sql) -> None:
    user = await authority.user(expires_in=timedelta(seconds=30))
    browser = Browser(authority)
    await browser.code(await browser.client(), user["key"]["secret"])
    ends = "SELECT c.expires_at = k.expires_at FROM keyproxy.oauth_codes AS c, keyproxy.api_keys AS k"
    assert await sql.fetchval(ends)
