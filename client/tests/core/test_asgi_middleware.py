"""The middleware of ASGI, without a server: scopes and messages as the specification defines them."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from keyproxy_client.acting import acting
from keyproxy_client.asgi import IdentityMiddleware, guard_of
from keyproxy_client.identity import Trust
from keyproxy_client.incoming.judge import Judge
from keyproxy_client.incoming.problems import IDENTITY_MISSING, insufficient_scope
from test_identity_headers import IDENTITY, STATED, pairs

TRUSTED = ("/run/app.sock", None)


class App:
    """Records its scopes and its acting user, and responds with `status`."""

    def __init__(self, status: int = 200) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.acting: Any = None
        self._status = status

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.acting = acting()
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": self._status, "headers": [(b"x-own", b"1")]})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await send({"type": "http.response.body", "body": b"b"})


def scope(headers: Any, *, server: Any = TRUSTED, kind: str = "http", **more: Any) -> dict[str, Any]:
    return {"type": kind, "server": server, "client": None, "headers": headers, **more}


def call(application: Any, given: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages that the application sends."""
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        raise AssertionError("the middleware receives nothing")

    async def send(message: Any) -> None:
        sent.append(dict(message))

    asyncio.run(application(given, receive, send))
    return sent


def problem(sent: list[dict[str, Any]]) -> dict[str, Any]:
    """The document of a response, after a check of its form."""
    start, body = sent
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"content-length"] == str(len(body["body"])).encode()
    content: dict[str, Any] = json.loads(body["body"])
    assert (content["status"], content["type"]) == (start["status"], f"urn:keyproxy:problem:{content['code']}")
    return content


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_identity_of_a_trusted_request_is_in_the_state(kind: str) -> None:
    app = App()
    given = scope(pairs(), kind=kind, state={"database": 1})
    call(IdentityMiddleware(app, trust=Trust.unix()), given)
    assert app.scopes[0]["state"] == {"database": 1, "identity": IDENTITY}
    assert app.scopes[0]["headers"] == pairs()
    assert (app.acting.user, app.acting.tenant, app.acting.is_test) == ("u_42", "acme", False)
    assert acting() is None


def test_identity_replaces_what_the_server_left_in_the_state() -> None:
    app = App()
    call(IdentityMiddleware(app, trust=Trust.unix()), scope([], state={"identity": IDENTITY}))
    assert app.scopes[0]["state"]["identity"] is None


SPELLINGS = [
    b"x-keyproxy-user", b"X-Keyproxy-User", b"x_keyproxy_user", b"X_Keyproxy-User", b"x.keyproxy.user",
    b"X-KEYPROXY-ASSERTION", b"x-keyproxy-anything", b"x-keyproxy-", b"x_keyproxy.model",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_header_under_the_prefix_of_an_untrusted_request_is_removed(name: bytes, kind: str) -> None:
    app = App()
    other = [(b"host", b"a"), (b"x-key", b"1"), (b"x-keyprox", b"2"), (b"y-x-keyproxy-user", b"3")]
    given = scope([*other, (name, b"u_1"), (name, b"u_2")], server=("127.0.0.1", 80), kind=kind)
    call(IdentityMiddleware(app, trust=Trust.unix()), given)
    assert app.scopes[0]["headers"] == other
    assert app.scopes[0]["state"]["identity"] is None
    assert app.acting is None


def test_anonymous_requests_reach_the_application() -> None:
    app = App()
    for server in (TRUSTED, ("127.0.0.1", 80)):
        assert [one["type"] for one in call(IdentityMiddleware(app, trust=Trust.unix()), scope([], server=server))] == [
            "http.response.start",
            "http.response.body",
            "http.response.body",
        ]
    assert [one["state"]["identity"] for one in app.scopes] == [None, None]


def test_invalid_headers_of_a_trusted_peer_are_refused_with_400() -> None:
    app = App()
    sent = call(IdentityMiddleware(app, trust=Trust.unix()), scope(pairs(None, (b"x-keyproxy-user", b"u_2"))))
    content = problem(sent)
    assert (content["code"], sent[0]["status"], app.scopes) == ("identity_invalid", 400, [])
    assert "u_2" not in json.dumps(content)


def test_refused_websocket_is_closed_with_1008() -> None:
    app = App()
    given = scope(pairs({**STATED, "User": "u_1,u_2"}), kind="websocket")
    sent = call(IdentityMiddleware(app, trust=Trust.unix()), given)
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": "identity_invalid"}]
    assert app.scopes == []


def test_lifespan_reaches_the_application_unchanged() -> None:
    app = App()
    given = {"type": "lifespan", "state": {}}
    call(IdentityMiddleware(app, trust=Trust.unix()), given)
    assert app.scopes == [{"type": "lifespan", "state": {}}]


def test_scope_of_an_unknown_type_has_neither_identity_nor_identity_headers() -> None:
    app = App()
    call(IdentityMiddleware(app, trust=Trust.unix()), scope(pairs(), kind="webtransport"))
    assert [name for name, _ in app.scopes[0]["headers"]] == [b"host", b"x-forwarded-for"]
    assert "state" not in app.scopes[0]


def test_other_prefix_of_the_proxy_is_read_and_removed() -> None:
    app = App()
    middleware = IdentityMiddleware(app, trust=Trust.unix(), header_prefix="X-Gate-")
    call(middleware, scope(pairs(prefix="X-Gate-")))
    call(middleware, scope([(b"x_gate_user", b"u_1")], server=None))
    assert [one["state"]["identity"] for one in app.scopes] == [IDENTITY, None]
    assert app.scopes[1]["headers"] == []


def test_problem_of_a_guard_replaces_the_response_of_the_framework() -> None:
    refused = insufficient_scope(["jobs:write"])

    async def app(given: Any, receive: Any, send: Any) -> None:
        guard_of(given).refuse(refused)
        await App(status=403)(given, receive, send)

    sent = call(IdentityMiddleware(app, trust=Trust.unix()), scope(pairs()))
    assert problem(sent)["code"] == "insufficient_scope"
    assert "jobs:write" in problem(sent)["detail"]
    assert (b"x-own", b"1") in sent[0]["headers"]


def test_response_that_an_application_makes_of_a_refusal_is_kept() -> None:
    async def app(given: Any, receive: Any, send: Any) -> None:
        guard_of(given).refuse(IDENTITY_MISSING)
        await App(status=302)(given, receive, send)

    sent = call(IdentityMiddleware(app, trust=Trust.unix()), scope([]))
    assert [one.get("status") for one in sent] == [302, None, None]


def test_guard_without_the_middleware_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="IdentityMiddleware is not installed"):
        guard_of(scope(pairs()))


def test_removal_is_logged_once_a_minute_with_the_number_of_requests(caplog: pytest.LogCaptureFixture) -> None:
    now = [1000.0]
    judge = Judge(Trust.unix(), now=lambda: now[0])
    with caplog.at_level(logging.WARNING, "keyproxy_client"):
        for seconds in (0.0, 1.0, 58.9, 0.1, 60.0):
            now[0] += seconds
            judge.warn_of_removal()
    counts = [record.args[0] for record in caplog.records if isinstance(record.args, tuple)]
    assert counts == [1, 3, 1]


@pytest.mark.parametrize(("port", "is_named"), [(0, True), (5555, False)])
def test_removal_behind_a_server_that_rewrites_addresses_names_the_option(
    port: int, is_named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "keyproxy_client"):
        call(IdentityMiddleware(App(), trust=Trust.unix()), scope(pairs(), server=None, client=("127.0.0.1", port)))
    assert ("--no-proxy-headers" in caplog.text) is is_named


def test_removal_is_logged_without_values_and_only_if_something_was_removed(caplog: pytest.LogCaptureFixture) -> None:
    middleware = IdentityMiddleware(App(), trust=Trust.loopback())
    with caplog.at_level(logging.WARNING, "keyproxy_client"):
        call(middleware, scope([], server=None))
        assert caplog.records == []
        for _ in range(3):
            call(middleware, scope(pairs({**STATED, "User": "u_spoofed"}), server=None))
    assert [record.name.split(".")[0] for record in caplog.records] == ["keyproxy_client"]
    assert "u_spoofed" not in caplog.text
