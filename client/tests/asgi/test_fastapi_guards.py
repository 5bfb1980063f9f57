"""Guards of FastAPI, for requests and WebSockets, with the middleware inside and outside of the application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, WebSocket
from fastapi.middleware.cors import CORSMiddleware

from keyproxy_client.acting import acting
from keyproxy_client.asgi import IdentityMiddleware
from keyproxy_client.fastapi import identity, needs
from keyproxy_client.identity import Identity, Trust
from signing import STATED

HEADERS = {f"X-Keyproxy-{name}": value for name, value in STATED.items()}
PEER = ("127.0.0.1", 40_000)


def api() -> FastAPI:
    """An application with guarded and open routes."""
    app = FastAPI()

    @app.get("/me")
    async def me(caller: Annotated[Identity, Depends(identity)]) -> dict[str, str]:
        return {"user": caller.user}

    @app.post("/jobs", dependencies=[Depends(needs("jobs:write"))])
    async def jobs() -> None:
        """Nothing."""

    @app.get("/admin")
    async def admin(caller: Annotated[Identity, Depends(needs("jobs:read", "admin", "jobs:purge"))]) -> None:
        raise AssertionError("unreachable")

    @app.get("/open")
    def open_route() -> dict[str, str | None]:
        acts = acting()
        return {"user": None if acts is None else acts.user}

    @app.websocket("/ws")
    async def ws(socket: WebSocket, caller: Annotated[Identity, Depends(needs("jobs:read"))]) -> None:
        await socket.accept()
        await socket.send_text(caller.user)
        await socket.close()

    return app


def inside() -> Any:
    app = api()
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    app.add_middleware(IdentityMiddleware, trust=Trust.loopback())
    return app


def outside() -> Any:
    app = api()
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    return IdentityMiddleware(app, trust=Trust.loopback())


def request(app: Any, method: str, path: str, headers: Any = None, client: Any = PEER) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://compute") as http:
            return await http.request(method, path, headers={"Origin": "https://a.example", **(headers or {})})

    return asyncio.run(run())


BUILDS = pytest.mark.parametrize("build", [inside, outside])


@BUILDS
def test_guarded_route_gets_the_identity(build: Callable[[], Any]) -> None:
    app = build()
    assert request(app, "GET", "/me", HEADERS).json() == {"user": "u_42"}
    assert request(app, "POST", "/jobs", HEADERS).status_code == 200
    assert request(app, "GET", "/open", HEADERS).json() == {"user": "u_42"}
    assert request(app, "GET", "/open").json() == {"user": None}


REFUSALS = [
    ("GET", "/me", {}, PEER, "identity_missing", 401),
    ("GET", "/me", HEADERS, ("192.0.2.9", 40_000), "identity_missing", 401),
    ("GET", "/me", HEADERS, ("127.0.0.1", 0), "identity_missing", 401),
    ("POST", "/jobs", {}, PEER, "identity_missing", 401),
    ("POST", "/jobs", {**HEADERS, "X-Keyproxy-Scope": "jobs:read"}, PEER, "insufficient_scope", 403),
    ("POST", "/jobs", {**HEADERS, "X-Keyproxy-Scope": ""}, PEER, "insufficient_scope", 403),
    ("GET", "/me", {**HEADERS, "X-Keyproxy-User": "u_1,u_2"}, PEER, "identity_invalid", 400),
    ("GET", "/open", {"X-Keyproxy-User": "u_1"}, PEER, "identity_invalid", 400),
]


@BUILDS
@pytest.mark.parametrize(("method", "path", "headers", "client", "code", "status"), REFUSALS)
def test_refusal_is_a_problem_document(
    build: Callable[[], Any], method: str, path: str, headers: Any, client: Any, code: str, status: int
) -> None:
    response = request(build(), method, path, headers, client)
    content = response.json()
    assert (response.status_code, content["status"], content["code"]) == (status, status, code)
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["Content-Length"] == str(len(response.content))
    challenge = response.headers.get("WWW-Authenticate", "")
    assert challenge.startswith('Api-Key realm="keyproxy"') is (status in (401, 403))
    if code != "identity_invalid":
        # What other middlewares add to the response is kept.
        assert response.headers["Access-Control-Allow-Origin"] == "*"


@BUILDS
def test_missing_scopes_are_named_in_their_order(build: Callable[[], Any]) -> None:
    response = request(build(), "GET", "/admin", HEADERS)
    assert response.json()["detail"] == "The API key lacks the scopes 'admin', 'jobs:purge'."
    assert response.headers["WWW-Authenticate"].endswith('error="insufficient_scope", scope="admin jobs:purge"')


def websocket(app: Any, headers: dict[str, str], client: Any = PEER) -> list[Any]:
    """The messages that the application sends to a client that connects."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    found = {
        "type": "websocket",
        "path": "/ws",
        "raw_path": b"/ws",
        "root_path": "",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": client,
        "server": ("127.0.0.1", 80),
        "scheme": "ws",
        "subprotocols": [],
    }
    asyncio.run(app(found, receive, send))
    return sent


@BUILDS
def test_websocket_with_identity_is_accepted(build: Callable[[], Any]) -> None:
    sent = websocket(build(), HEADERS)
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.send", "websocket.close"]
    assert sent[1]["text"] == "u_42"


@BUILDS
@pytest.mark.parametrize(
    ("headers", "client", "reason"),
    [
        ({}, PEER, "identity_missing"),
        (HEADERS, ("192.0.2.9", 40_000), "identity_missing"),
        ({**HEADERS, "X-Keyproxy-Scope": "jobs:write"}, PEER, "insufficient_scope"),
        ({**HEADERS, "X-Keyproxy-Test": "maybe"}, PEER, "identity_invalid"),
    ],
)
def test_refused_websocket_is_closed_with_1008(
    build: Callable[[], Any], headers: Any, client: Any, reason: str
) -> None:
    sent = websocket(build(), headers, client)
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": reason}]


def test_application_without_the_middleware_refuses_no_request_silently() -> None:
    with pytest.raises(RuntimeError, match="IdentityMiddleware is not installed"):
        request(api(), "GET", "/me", HEADERS)


@pytest.mark.parametrize("scopes", [(), ("",), ("a b",), ("jobs:*",), (None,)])
def test_guard_for_no_valid_scope_cannot_be_made(scopes: Any) -> None:
    with pytest.raises(ValueError, match="scope"):
        needs(*scopes)


def test_problem_has_the_members_of_the_proxy() -> None:
    content = json.loads(request(inside(), "GET", "/me").content)
    assert content == {
        "type": "urn:keyproxy:problem:identity_missing",
        "title": "Identity missing",
        "status": 401,
        "detail": "The request has no verified identity. Send it through keyproxy, with an API key.",
        "code": "identity_missing",
    }
