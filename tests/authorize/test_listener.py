"""The boundary of the authorization server: paths, errors, CORS, addresses, rate limits, the log and the metrics."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from keyproxy.authorize.connections import Bounds
from keyproxy.authorize.endpoint import CLIENT, GRANT_TYPE, OUTCOME, USER, Endpoint, PageError
from keyproxy.authorize.form import BODY_BYTES_MAX, form_of
from keyproxy.authorize.metrics import AUTHORIZE_METRICS
from keyproxy.authorize.rate_limits import Rate
from keyproxy.config.schema import Log
from keyproxy.metrics.exposition import Catalogue
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.store.postgres.database import Database, StoreUnavailable
from tests.authorize.authority import Authority, Reply, authorizing
from tests.waiting import until

KEY = "kp_live_" + "a" * 49


async def _form(request: web.Request) -> web.Response:
    return web.json_response(dict(await form_of(request)))


async def _noted(request: web.Request) -> web.Response:
    request[CLIENT], request[USER], request[GRANT_TYPE] = "cli_1", "u_42", "refresh_token"
    request[OUTCOME] = "access_denied"
    return web.Response(status=303, headers={"Location": "https://acme.example/cb"})


async def _down(_request: web.Request) -> web.Response:
    raise StoreUnavailable("connection refused")


async def _broken(_request: web.Request) -> web.Response:
    raise ZeroDivisionError(KEY)


async def _refused(request: web.Request) -> web.Response:
    raise OAuthError("invalid_grant", f"The code {KEY} is unknown.", headers={"X-More": "1"})


async def _page(_request: web.Request) -> web.Response:
    raise PageError(403, "account_disabled", detail="u_42")


async def _fine(_request: web.Request) -> web.Response:
    return web.Response(text="fine")


async def _login(request: web.Request) -> web.Response:
    if request.query.get("key") != "right":
        raise OAuthError("invalid_client", "The secret is wrong.", status=401)
    return web.Response(text="fine")


ENDPOINTS = (
    Endpoint("form", ("/form", "/alias"), {"POST": _form}, is_cross_origin=True),
    Endpoint("noted", ("/noted",), {"GET": _noted}),
    Endpoint("down", ("/down",), {"GET": _down}),
    Endpoint("down_page", ("/down-page",), {"GET": _down}, shows_pages=True),
    Endpoint("broken", ("/broken",), {"GET": _broken}),
    Endpoint("broken_page", ("/broken-page",), {"GET": _broken}, shows_pages=True),
    Endpoint("refused", ("/refused",), {"GET": _refused}),
    Endpoint("page", ("/page",), {"GET": _page}, shows_pages=True),
    Endpoint("register_like", ("/limited",), {"GET": _fine}, limit=Rate.REGISTER),
    Endpoint("login_like", ("/login",), {"GET": _login}, failures=Rate.FAILED_TOKEN_REQUESTS),
)


@pytest.fixture
async def authority(database: Database) -> AsyncIterator[Authority]:
    """A server with endpoints that end in every way."""
    async with authorizing(database, endpoints=ENDPOINTS, trusted_proxies=["127.0.0.0/8"]) as authority:
        yield authority


FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.mark.parametrize(
    ("path", "data", "headers", "expected"),
    [
        ("/form", b"a=1&b=2+3&c=%C3%BC", FORM, {"a": "1", "b": "2 3", "c": "\u00fc"}),
        ("/form", b"a=1", {"Content-Type": "application/x-www-form-urlencoded; charset=UTF-8"}, {"a": "1"}),
        ("/alias", b"a=1&empty=&none", FORM, {"a": "1"}),
        ("/form", b"", FORM, {}),
        ("/form", b"a=1&a=1", FORM, 400),
        ("/form", b"a=&a=1", FORM, 400),
        ("/form?a=1", b"b=1", FORM, 400),
        ("/form", b"a=%FF", FORM, 400),
        ("/form", b"a=%00", FORM, 400),
        ("/form", b"a=\xc3\xbc", FORM, 400),
        ("/form", b"&".join(b"%d=1" % number for number in range(101)), FORM, 400),
        ("/form", b'{"a":"1"}', {"Content-Type": "application/json"}, 400),
        ("/form", b"a=1", {"Content-Type": "multipart/form-data"}, 400),
        ("/form", b"a=" + b"x" * BODY_BYTES_MAX, FORM, 413),
        # A compressed body is never expanded, so that a small one costs no more than its bytes.
        ("/form", gzip.compress(b"a=1", mtime=0), FORM | {"Content-Encoding": "gzip"}, 400),
        ("/form", gzip.compress(b"a" * (4 << 20), mtime=0), FORM | {"Content-Encoding": "gzip"}, 400),
        ("/form", b"a=1", FORM | {"Content-Encoding": "gzip"}, 400),
        ("/form", b"a=1", FORM | {"Content-Encoding": "deflate"}, 400),
        ("/form", b"a=1", FORM | {"Content-Encoding": "identity"}, {"a": "1"}),
    ],
)
async def test_form_is_read_strictly(
    authority: Authority, path: str, data: bytes, headers: dict[str, str], expected: object
) -> None:
    reply = await authority.call("POST", path, data=data, headers=headers)
    if isinstance(expected, int):
        assert (reply.status, reply.error) == (expected, "invalid_request")
        assert reply.json["error_description"]
    else:
        assert (reply.status, reply.json) == (200, expected)


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/refused", 400, "invalid_grant"),
        ("/down", 503, "temporarily_unavailable"),
        ("/broken", 500, "server_error"),
        ("/nowhere", 404, "not_found"),
        ("/form/", 404, "not_found"),
        ("//form", 404, "not_found"),
        ("/%66orm", 404, "not_found"),
        ("/x/../form", 404, "not_found"),
        ("/form", 405, "method_not_allowed"),
    ],
)
async def test_errors_are_json_that_no_cache_stores(authority: Authority, path: str, status: int, error: str) -> None:
    reply = await authority.call("GET", path)
    assert (reply.status, reply.error) == (status, error)
    assert set(reply.json) == {"error", "error_description"}
    assert reply.headers["Cache-Control"] == "no-store"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert len(reply.headers["X-Request-Id"]) == 32
    assert "Server" not in reply.headers
    assert KEY not in reply.text
    assert KEY not in str(authority.log)


async def test_errors_carry_the_fields_that_their_status_needs(authority: Authority) -> None:
    assert int((await authority.call("GET", "/down")).headers["Retry-After"]) > 0
    assert (await authority.call("GET", "/form")).headers["Allow"] == "OPTIONS, POST"
    assert (await authority.call("GET", "/refused")).headers["X-More"] == "1"


@pytest.mark.parametrize(("path", "status"), [("/page", 403), ("/down-page", 503), ("/broken-page", 500)])
async def test_browsers_get_errors_as_pages(authority: Authority, path: str, status: int) -> None:
    reply = await authority.call("GET", path)
    assert (reply.status, reply.headers["Content-Type"]) == (status, "text/html; charset=utf-8")
    assert 'role="alert"' in reply.text
    assert ("Retry-After" in reply.headers) == (status == 503)
    assert "script" not in reply.headers["Content-Security-Policy"]
    assert reply.headers["X-Frame-Options"] == "DENY"
    assert reply.headers["Referrer-Policy"] == "no-referrer"
    assert (await authority.call("POST", path)).headers["Allow"] == "GET, HEAD, OPTIONS"


async def test_only_endpoints_for_scripts_of_any_origin_allow_them(authority: Authority) -> None:
    origin = {"Origin": "https://inspector.example", "Access-Control-Request-Method": "POST"}
    preflight = await authority.call("OPTIONS", "/form", headers=origin)
    assert (preflight.status, preflight.body) == (204, b"")
    assert preflight.headers["Access-Control-Allow-Origin"] == "*"
    assert preflight.headers["Access-Control-Allow-Methods"] == "OPTIONS, POST"
    assert "Access-Control-Allow-Credentials" not in preflight.headers
    # An error is readable too: a script has to know why it was refused.
    assert (await authority.call("POST", "/form", headers=origin)).headers["Access-Control-Allow-Origin"] == "*"
    for method, path in (("OPTIONS", "/page"), ("GET", "/page"), ("OPTIONS", "/nowhere"), ("GET", "/noted")):
        reply = await authority.call(method, path, headers=origin)
        assert not [name for name in reply.headers if name.startswith("Access-Control")], path


async def test_log_line_names_the_parties_and_no_query(authority: Authority) -> None:
    await authority.call("GET", "/noted", query={"code": "secret"}, headers={"X-Forwarded-For": "192.0.2.7"})
    (line,) = authority.log
    assert line.pop("time").endswith("Z")
    assert line.pop("request_id")
    assert line == {
        "method": "GET", "path": "/noted", "route": "/noted", "status": 303, "code": "access_denied", "token": None,
        "grant_type": "refresh_token", "client": "cli_1", "user": "u_42", "peer": "192.0.2.7", "duration_seconds": 0.0,
    }  # fmt: skip


async def test_key_in_a_path_is_not_logged(authority: Authority) -> None:
    await authority.call("GET", f"/{KEY}")
    assert authority.log[0]["path"] == ""


async def test_code_or_cookie_in_a_path_is_not_logged(authority: Authority) -> None:
    secret = "Zk3" * 14 + "x"
    for path in (f"/oauth/token/{secret}", f"/{secret}/cb", f"/{'a/' * 250}{secret}", f"/x%2F{secret}"):
        await authority.call("GET", path)
    assert "Zk3" not in str(authority.log)
    assert authority.log[0]["path"] == "/oauth/token/..."


async def test_log_records_as_much_of_an_address_as_configured(database: Database) -> None:
    async with authorizing(database, log=Log(client_address="network")) as authority:
        await authority.call("GET", "/nowhere")
        assert authority.log[0]["peer"] == "127.0.0.0/24"


@pytest.mark.parametrize(
    ("forwarded", "peer"),
    [
        ([], "127.0.0.1"),
        (["192.0.2.7"], "192.0.2.7"),
        (["198.51.100.1, 192.0.2.7"], "192.0.2.7"),  # the left one may be forged
        (["192.0.2.7, 127.0.0.9"], "192.0.2.7"),
        (["192.0.2.7", "nonsense"], "127.0.0.1"),
    ],
)
async def test_client_is_the_rightmost_untrusted_address(authority: Authority, forwarded: list[str], peer: str) -> None:
    headers = [("X-Forwarded-For", value) for value in forwarded]
    async with authority.session.get(f"{authority.url}/nowhere", headers=headers):
        assert authority.log[0]["peer"] == peer


async def test_forwarded_address_of_an_untrusted_peer_is_ignored_with_one_warning(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with authorizing(database) as authority:
        for _ in range(2):
            await authority.call("GET", "/nowhere", headers={"X-Forwarded-For": "192.0.2.7"})
        assert authority.log[0]["peer"] == "127.0.0.1"
    assert [record.message[:46] for record in caplog.records if "X-Forwarded-For" in record.message] == [
        "X-Forwarded-For from 127.0.0.1 is ignored, bec"
    ]


async def _from(authority: Authority, address: str, path: str = "/limited") -> Reply:
    return await authority.call("GET", path, headers={"X-Forwarded-For": address})


async def test_requests_of_one_address_are_limited_and_those_of_others_are_not(authority: Authority) -> None:
    assert {(await _from(authority, "192.0.2.1")).status for _ in range(20)} == {200}
    refused = await _from(authority, "192.0.2.1")
    assert (refused.status, refused.error, refused.headers["Retry-After"]) == (429, "temporarily_unavailable", "3")
    assert (await _from(authority, "192.0.2.2")).status == 200
    authority.clock.advance(3)
    assert (await _from(authority, "192.0.2.1")).status == 200
    assert (await _from(authority, "192.0.2.1")).status == 429
    # A preflight is no request.
    assert (await authority.call("OPTIONS", "/limited", headers={"X-Forwarded-For": "192.0.2.1"})).status == 204


async def test_one_ipv6_network_is_one_address(authority: Authority) -> None:
    for number in range(20):
        await _from(authority, f"2001:db8::{number:x}")
    assert (await _from(authority, "2001:db8::ffff")).status == 429
    assert (await _from(authority, "2001:db8:0:1::1")).status == 200


async def test_failures_are_throttled_and_successes_never(authority: Authority) -> None:
    statuses = [(await _from(authority, "192.0.2.1", "/login")).status for _ in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    assert (await _from(authority, "192.0.2.1", "/login?key=right")).status == 200
    authority.clock.advance(6)
    assert [(await _from(authority, "192.0.2.1", "/login")).status for _ in range(2)] == [401, 429]


def test_limits_are_those_of_the_design() -> None:
    per_minute = {rate.name: (rate.value.burst, 60 / rate.value.seconds_each) for rate in Rate}
    assert per_minute == {
        "REGISTER": (20, 20), "AUTHORIZE": (60, 60), "CONSENT": (30, 30), "NEW_DOCUMENTS": (30, 30),
        "FAILED_LOGINS": (10, 10), "FAILED_TOKEN_REQUESTS": (10, 10),
    }  # fmt: skip


async def test_requests_are_counted_by_endpoint_and_outcome(authority: Authority) -> None:
    for path in ("/noted", "/refused", "/page", "/nowhere", "/limited", "/limited"):
        await authority.call("GET", path)
    await authority.call("PURGE", "/limited")
    assert authority.counts.requests["token", "ok"] == 0
    assert {key: count for key, count in authority.counts.requests.items() if count} == {
        ("noted", "access_denied"): 1, ("refused", "invalid_grant"): 1, ("page", "account_disabled"): 1,
        ("none", "not_found"): 1, ("register_like", "ok"): 2, ("register_like", "method_not_allowed"): 1,
    }  # fmt: skip
    page = Catalogue(AUTHORIZE_METRICS, lambda: authority.counts).render().decode()
    assert 'keyproxy_oauth_requests_total{endpoint="register_like",outcome="ok"} 2.0' in page


async def test_body_that_does_not_arrive_ends_with_408(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keyproxy.authorize.form._BODY_SECONDS", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        yield b"a="
        await asyncio.Event().wait()

    reading = authority.session.post(f"{authority.url}/form", data=slow(), headers=FORM)
    async with asyncio.timeout(5), reading as response:
        assert (response.status, (await response.json())["error"]) == (408, "invalid_request")


async def test_connection_beyond_the_bound_gets_a_refusal_that_can_be_repeated(database: Database) -> None:
    released = asyncio.Event()

    async def busy(_request: web.Request) -> web.Response:
        await released.wait()
        return web.Response()

    endpoint = Endpoint("busy", ("/busy",), {"GET": busy})
    async with authorizing(database, endpoints=[endpoint], bounds=Bounds(connections_max=1)) as authority:
        waiting = asyncio.create_task(authority.call("GET", "/busy"))
        await until(lambda: authority.listener.open_connections == 1)
        refused = await authority.call("GET", "/nowhere")
        assert (refused.status, refused.error) == (503, "temporarily_unavailable")
        assert int(refused.headers["Retry-After"]) > 0
        released.set()
        assert (await waiting).status == 200
