"""The page of a user's connections: what it shows, and what a user can end."""

from __future__ import annotations

import re

from tests.authorize.authority import Authority, Reply, pkce
from tests.authorize.browser.browser import REDIRECT_URI, Browser, forms_of
from tests.store.harness import Sql

PATH = "/oauth/connections"


async def connect(browser: Browser, secret: str, name: str = "Acme") -> str:
    """Connect a device of a program; returns its refresh token."""
    client_id = await browser.client(name=name)
    form = {
        "grant_type": "authorization_code",
        "code": await browser.code(client_id, secret),
        "client_id": client_id,
        "redirect_uri": REDIRECT_URI,
        "code_verifier": pkce()[0],
    }
    reply = await browser.authority.call("POST", "/oauth/token", form=form)
    assert reply.status == 200, reply.body
    return str(reply.json["refresh_token"])


async def opened(browser: Browser, secret: str) -> Reply:
    """The page after a login."""
    login = await browser.get(PATH)
    reply = await browser.sign_in(login, secret)
    assert (reply.status, reply.headers["Location"]) == (303, PATH)
    page = await browser.get(PATH)
    assert page.status == 200
    return page


def endings(page: Reply) -> list[str]:
    """What the buttons of the page end."""
    return [value for form in forms_of(page) for _, value in form.buttons]


async def test_user_ends_one_device_one_program_or_all(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    browser, secret = Browser(authority), user["key"]["secret"]
    for name in ("Acme", "Acme", "Other", "Third"):
        await connect(browser, secret, name)
    page = await opened(browser, secret)
    assert page.text.count("<h2>") == 3
    kinds = [ending.partition(":")[0] for ending in endings(page)]
    assert (kinds.count("session"), kinds.count("grant"), kinds.count("all")) == (4, 3, 1)
    times = re.findall(r'<time datetime="([^"]+)">([^<]+)</time>', page.text)
    assert len(times) == 8
    assert all(shown == f"{exact[:10]} {exact[11:16]} UTC" for exact, shown in times)

    async def end(wanted: str) -> tuple[int, int]:
        reply = await browser.submit(page, ("end", wanted))
        assert (reply.status, reply.headers["Location"]) == (303, f"{PATH}?ended=1")
        sessions = await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_sessions")
        return await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_grants"), sessions

    assert await end(endings(page)[0]) == (3, 3)
    page = await browser.get(PATH)
    grant = next(ending for ending in endings(page) if ending.startswith("grant:"))
    assert (await end(grant))[0] == 2
    assert await end("all") == (0, 0)
    assert 'role="status"' in (await browser.get(f"{PATH}?ended=1")).text
    assert endings(await browser.get(PATH)) == []
    assert authority.counts.sessions_ended["revoked"] == 4


async def test_refresh_token_of_an_ended_device_is_refused(authority: Authority) -> None:
    user = await authority.user()
    browser, secret = Browser(authority), user["key"]["secret"]
    token = await connect(browser, secret)
    page = await opened(browser, secret)
    await browser.submit(page, ("end", endings(page)[0]))
    form = {"grant_type": "refresh_token", "refresh_token": token, "client_id": await browser.client()}
    assert (await authority.call("POST", "/oauth/token", form=form)).error == "invalid_grant"


async def test_connections_of_other_users_are_neither_shown_nor_ended(authority: Authority, sql: Sql) -> None:
    user, other = await authority.user(), await authority.user("u_43", "other")
    browser = Browser(authority)
    await connect(browser, other["key"]["secret"])
    page = await opened(Browser(authority), user["key"]["secret"])
    assert endings(page) == []
    own = Browser(authority)
    await connect(own, user["key"]["secret"])
    page = await opened(own, user["key"]["secret"])
    rows = await sql.fetchrow(
        "SELECT g.id, s.id FROM keyproxy.oauth_grants AS g JOIN keyproxy.oauth_sessions AS s ON s.grant_id = g.id"
        " WHERE g.user_id = 'u_43'"
    )
    assert rows is not None
    for ending in (f"grant:{rows[0]}", f"session:{rows[1]}", "all"):
        assert (await own.submit(page, end=ending)).status == 303
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_sessions WHERE grant_id = $1", rows[0]) == 1
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_grants") == 1, "those of the user have ended"


async def test_login_by_a_test_key_shows_test_connections_alone(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    browser, secret = Browser(authority), user["key"]["secret"]
    await connect(browser, secret)
    await sql.execute("UPDATE keyproxy.oauth_grants SET is_test = true")
    page = await opened(browser, secret)
    assert endings(page) == []


async def test_user_page_is_open_for_15_minutes_and_to_this_browser_alone(authority: Authority) -> None:
    user = await authority.user()
    browser, secret = Browser(authority), user["key"]["secret"]
    await connect(browser, secret)
    page = await opened(browser, secret)
    stranger = Browser(authority, cookies={"keyproxy-user": browser.cookies["keyproxy-user"]})
    assert forms_of(await stranger.get(PATH))[0].action == "/oauth/login"
    assert (await Browser(authority).submit(page, ("end", "all"))).status == 403
    assert (await browser.submit(page, ("end", "all"), headers={"Sec-Fetch-Site": "cross-site"})).status == 403
    authority.clock.advance(899)
    assert endings(await browser.get(PATH))
    authority.clock.advance(1)
    assert forms_of(await browser.get(PATH))[0].action == "/oauth/login"
    assert (await browser.submit(page, ("end", "all"))).status == 400


async def test_user_page_closes_with_its_login(authority: Authority, sql: Sql) -> None:
    for number, change in enumerate(("api_keys SET revoked_at = now()", "users SET disabled_at = now()")):
        user = await authority.user(f"u_{number}")
        browser, secret = Browser(authority), user["key"]["secret"]
        await connect(browser, secret)
        page = await opened(browser, secret)
        await sql.execute(f"UPDATE keyproxy.{change}")
        assert (await browser.submit(page, ("end", "all"))).status == 403
        assert forms_of(await browser.get(PATH))[0].action == "/oauth/login"


async def test_login_of_the_user_page_grants_no_client_anything(authority: Authority, sql: Sql) -> None:
    user = await authority.user()
    browser = Browser(authority)
    await opened(browser, user["key"]["secret"])
    ticket = browser.cookies["keyproxy-user"]
    form = {"ticket": ticket, "decision": "allow"}
    reply = await browser.authority.call(
        "POST", "/oauth/consent", form=form,
        headers={"Cookie": "; ".join(f"{name}={value}" for name, value in browser.cookies.items())},
    )  # fmt: skip
    assert reply.status == 400
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_codes") == 0


async def test_page_opens_for_a_key_with_as_many_scopes_as_one_can_have(authority: Authority) -> None:
    user = await authority.user(scopes=[f"{number:02}:{'s' * 60}" for number in range(64)])
    browser = Browser(authority)
    await opened(browser, user["key"]["secret"])
    (cookie,) = (value for name, value in browser.cookies.items() if name.endswith("user"))
    assert len(cookie) < 4_000, "browsers drop a cookie of over 4 KiB"
