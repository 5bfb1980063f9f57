"""`GET /oauth/authorize`: which errors are pages, and which go to the client."""

from __future__ import annotations

from urllib.parse import parse_qsl

from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from keyproxy.authorize.browser.authorization_request import response_location
from keyproxy.config.oauth.oauth_settings import KnownClientRow
from keyproxy.store.postgres.database import Database
from tests.authorize.authority import Authority, authorizing
from tests.authorize.browser.browser import REDIRECT_URI, STATE, Browser, forms_of
from tests.store.harness import Sql

#: What changes in a good request, and the error that the client gets.
SENT_TO_CLIENT: list[tuple[dict[str, str | None], str]] = [
    ({"response_type": None}, "invalid_request"),
    ({"response_type": "token"}, "unsupported_response_type"),
    ({"response_type": "code token"}, "unsupported_response_type"),
    ({"code_challenge": None}, "invalid_request"),
    ({"code_challenge": ""}, "invalid_request"),
    ({"code_challenge_method": None}, "invalid_request"),
    ({"code_challenge_method": "plain"}, "invalid_request"),
    ({"code_challenge": "c" * 42}, "invalid_request"),
    ({"code_challenge": "c" * 44}, "invalid_request"),
    ({"code_challenge": "c" * 42 + "="}, "invalid_request"),
    ({"resource": "https://other.example/mcp"}, "invalid_target"),
    ({"scope": "unknown"}, "invalid_scope"),
    ({"scope": "unknown other"}, "invalid_scope"),
    # The first fault wins.
    ({"response_type": "token", "code_challenge": None, "scope": "unknown"}, "unsupported_response_type"),
]


async def test_errors_after_client_and_redirect_uri_go_to_the_client(authority: Authority, sql: Sql) -> None:
    browser = Browser(authority)
    client_id = await browser.client()
    for changed, code in SENT_TO_CLIENT:
        reply = await browser.authorize(client_id, **changed)
        assert reply.status == 302, changed
        location = reply.location
        assert str(location.with_query(None)) == REDIRECT_URI
        assert (location.query["error"], location.query["state"]) == (code, STATE), changed
        assert location.query.getall("iss") == [authority.url]
        assert "code" not in location.query
    without_state = await browser.authorize(client_id, scope="unknown", state=None)
    assert "state" not in without_state.location.query
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_clients") == 0


async def test_errors_before_client_and_redirect_uri_are_pages_without_location(authority: Authority) -> None:
    browser = Browser(authority)
    client_id = await browser.client()
    for changed in (
        {"client_id": None},
        {"client_id": "unknown"},
        {"client_id": client_id + "A"},
        {"redirect_uri": None},
        {"redirect_uri": "https://evil.example/cb"},
        {"redirect_uri": REDIRECT_URI + "/"},
        {"redirect_uri": REDIRECT_URI + "?x=1"},
        {"redirect_uri": REDIRECT_URI.replace("https", "http")},
        {"redirect_uri": "https://acme.example:444/cb"},
        {"redirect_uri": "https://ACME.example/cb"},
        {"redirect_uri": "//acme.example/cb"},
        {"redirect_uri": "javascript:alert(1)"},
        {"redirect_uri": "https://[::1/cb"},
    ):
        # A later fault must not turn the page into a redirect.
        for later in ({}, {"response_type": "token"}):
            query = browser.parameters(client_id) | {"response_type": "code"} | later | changed
            reply = await browser.get("/oauth/authorize", query={k: v for k, v in query.items() if v is not None})
            assert reply.status == 400, changed
            assert "Location" not in reply.headers
            assert 'role="alert"' in reply.text


async def test_repeated_parameter_is_a_page(authority: Authority) -> None:
    browser = Browser(authority)
    parameters = browser.parameters(await browser.client()) | {"unknown": "1"}
    for name, value in parameters.items():
        reply = await browser.get("/oauth/authorize", query=[*parameters.items(), (name, value)])
        assert (reply.status, "Location" in reply.headers) == (400, False), name


async def test_redirect_uri_with_a_parameter_of_responses_is_refused(authority: Authority) -> None:
    browser = Browser(authority)
    for name in ("iss", "code", "state", "error"):
        redirect_uri = f"{REDIRECT_URI}?{name}=1"
        client_id = await browser.client(redirect_uri)
        reply = await browser.authorize(client_id, redirect_uri=redirect_uri)
        assert (reply.status, "Location" in reply.headers) == (400, False), name
    redirect_uri = f"{REDIRECT_URI}?tenant=a%20b"
    client_id = await browser.client(redirect_uri)
    reply = await browser.authorize(client_id, redirect_uri=redirect_uri, scope="unknown")
    assert reply.headers["Location"].startswith(f"{redirect_uri}&error=invalid_scope&")


async def test_disabled_client_is_a_page(authority: Authority, sql: Sql) -> None:
    browser = Browser(authority)
    client_id = await browser.client()
    await sql.execute(
        "INSERT INTO keyproxy.oauth_clients (id, client_id, kind, disabled_at)"
        " SELECT 'cli_' || left(encode(sha256(convert_to($1, 'UTF8')), 'hex'), 32), $1, 'value', now()",
        client_id,
    )
    reply = await browser.authorize(client_id)
    assert (reply.status, "Location" in reply.headers) == (403, False)


async def test_scopes_of_a_request_are_those_that_are_offered(authority: Authority) -> None:
    user = await authority.user()
    browser = Browser(authority)
    client_id = await browser.client()
    for requested, shown in (
        ("jobs:write", ["jobs:write"]),
        ("jobs:write unknown", ["jobs:write"]),
        ("jobs:write jobs:read", ["jobs:read", "jobs:write"]),
        (None, ["jobs:read", "jobs:write"]),
        ("", ["jobs:read", "jobs:write"]),
    ):
        consent = await browser.sign_in(await browser.authorize(client_id, scope=requested), user["key"]["secret"])
        assert [scope for scope in ("jobs:read", "jobs:write") if f"<li>{scope}</li>" in consent.text] == shown


async def test_server_without_scopes_grants_access_without_any(database: Database, sql: Sql) -> None:
    async with authorizing(database, scopes=[]) as authority:
        user = await authority.user(scopes=["other"])
        browser = Browser(authority)
        client_id = await browser.client()
        assert (await browser.authorize(client_id, scope="jobs:write")).location.query["error"] == "invalid_scope"
        await browser.code(client_id, user["key"]["secret"], scope=None)
        assert await sql.fetchval("SELECT scopes FROM keyproxy.oauth_codes") == []


@settings(max_examples=100, deadline=None)
@given(state=st.none() | st.text(), query=st.sampled_from(["", "?a=1", "?a=%26&b"]))
def test_client_gets_its_state_back_and_exactly_one_iss(state: str | None, query: str) -> None:
    redirect_uri = f"com.acme.app:/cb{query}"
    location = response_location(redirect_uri, state, "https://mcp.example.com", {"code": "c"})
    assert location.startswith(redirect_uri)
    assert location.isascii()
    assert location.isprintable()
    pairs = parse_qsl(location.partition("?")[2], keep_blank_values=True)
    added = [("code", "c"), *([] if state is None else [("state", state)]), ("iss", "https://mcp.example.com")]
    assert pairs[-len(added) :] == added
    assert sum(name == "iss" for name, _ in pairs) == 1


async def test_malformed_requests_of_browsers_are_pages(authority: Authority) -> None:
    client_id = await Browser(authority).client()
    for query in ("%", "%zz=1", "client_id=%FF", "a&&b=%00", "=", f"client_id={client_id}&client_id=", "x" * 5_000):
        reply = await authority.call("GET", f"/oauth/authorize?{query}")
        assert (reply.status, "Location" in reply.headers) == (400, False), query
    cookies = (
        "keyproxy-login-=",
        "keyproxy-login-00000000=" + "a" * 43,
        "a b; =; ;;",
        'keyproxy-user="\\',
        "\xff=\xff",
    )
    for cookie in cookies:
        for path in ("/oauth/login", "/oauth/consent", "/oauth/connections/end"):
            form = {"ticket": "a.b", "key": "k", "decision": "allow", "end": "all"}
            reply = await authority.call("POST", path, form=form, headers={"Cookie": cookie})
            assert (reply.status, "Location" in reply.headers) == (403, False), cookie
    for path in ("/oauth/login", "/oauth/consent", "/oauth/connections/end"):
        for data, media in ((b"ticket=a&ticket=b", "application/x-www-form-urlencoded"), (b"{}", "application/json"),
                            (b"ticket=%ff", "application/x-www-form-urlencoded")):  # fmt: skip
            reply = await authority.call("POST", path, data=data, headers={"Content-Type": media})
            assert (reply.status, 'role="alert"' in reply.text) == (400, True), data


async def test_missing_resource_is_the_canonical_one_and_one_slash_is_forgiven(authority: Authority) -> None:
    browser = Browser(authority)
    client_id = await browser.client()
    for resource, status in (
        (None, 200), (authority.resource, 200), (authority.resource + "/", 200), (authority.resource + "//", 302),
        (authority.resource.upper(), 302), (authority.url, 302), (authority.url + "/test-mcp", 200),
    ):  # fmt: skip
        assert (await browser.authorize(client_id, resource=resource)).status == status, resource


async def test_loopback_redirect_uri_may_have_any_port(authority: Authority) -> None:
    user = await authority.user()
    browser = Browser(authority)
    client_id = await browser.client("http://127.0.0.1:1111/cb")
    redirect_uri = "http://127.0.0.1:2222/cb"
    login = await browser.authorize(client_id, redirect_uri=redirect_uri)
    reply = await browser.decide(await browser.sign_in(login, user["key"]["secret"]))
    assert reply.headers["Location"].startswith(f"{redirect_uri}?code=")
    for other in ("http://127.0.0.1:2222/other", "http://localhost:2222/cb", "https://127.0.0.1:2222/cb"):
        assert (await browser.authorize(client_id, redirect_uri=other)).status == 400, other


async def test_listed_client_needs_no_registration_and_keeps_any_id(database: Database, sql: Sql) -> None:
    known = KnownClientRow(name="Claude", redirect_uris=["https://claude.example/cb/{}"])
    async with authorizing(database, known_clients=(known,)) as authority:
        user = await authority.user()
        browser = Browser(authority)
        stale, redirect_uri = "an id of another server", "https://claude.example/cb/7"
        login = await browser.authorize(stale, redirect_uri=redirect_uri)
        reply = await browser.decide(await browser.sign_in(login, user["key"]["secret"]))
        assert URL(reply.headers["Location"]).with_query(None) == URL(redirect_uri)
        rows = await sql.fetch("SELECT client_id, kind, name FROM keyproxy.oauth_clients")
        assert [tuple(row) for row in rows] == [("listed:Claude", "listed", "Claude")]
        assert await sql.fetchval("SELECT client_id FROM keyproxy.oauth_codes") == stale


async def test_alias_of_the_endpoint_works_alike(authority: Authority) -> None:
    browser = Browser(authority)
    reply = await browser.get("/authorize", query=browser.parameters(await browser.client()))
    assert reply.status == 200
    assert forms_of(reply)[0].action == "/oauth/login"


async def test_more_than_60_requests_of_an_address_must_wait(authority: Authority) -> None:
    browser = Browser(authority)
    query = browser.parameters("unknown")
    statuses = [(await browser.get("/oauth/authorize", query=query)).status for _ in range(61)]
    assert statuses == [400] * 60 + [429]
    reply = await browser.get("/oauth/authorize", query=query)
    assert int(reply.headers["Retry-After"]) >= 1
    assert 'role="alert"' in reply.text
