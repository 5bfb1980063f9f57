"""Requests as keyproxy sends them, to both applications of the test project, without a server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django.test import Client

#: The identity headers of a request, and what a view sees of them.
HEADERS = {
    "X-Keyproxy-User": "u_7",
    "X-Keyproxy-Tenant": "acme",
    "X-Keyproxy-Scope": "jobs:read jobs:write",
    "X-Keyproxy-Test": "false",
    "X-Keyproxy-Key-Id": "key_1",
}
IDENTITY = {
    "user": "u_7",
    "tenant": "acme",
    "scopes": ["jobs:read", "jobs:write"],
    "is_test": False,
    "key_id": "key_1",
    "actor": None,
    "agent": None,
}
CHALLENGE = 'Api-Key realm="keyproxy"'


def headers_of(user: Any, **others: str) -> dict[str, str]:
    """The identity headers of a user of Django."""
    return {**HEADERS, "X-Keyproxy-User": f"u_{user.pk}", **others}


def wsgi_client(peer: str = "127.0.0.1", port: int | None = 40000) -> Client:
    """A client of the WSGI application, with this peer."""
    return Client(REMOTE_ADDR=peer, **({} if port is None else {"REMOTE_PORT": str(port)}))


def by_wsgi(
    path: str, headers: dict[str, str] | None = None, *, peer: str = "127.0.0.1", port: int | None = 40000
) -> Any:
    """The response of the WSGI application to a request of this peer."""
    return wsgi_client(peer, port).get(path, headers=headers)


def by_asgi(
    path: str,
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    *,
    peer: str = "127.0.0.1",
    port: int = 40000,
    server: tuple[str, int | None] = ("testserver", 80),
) -> Any:
    """The response of the ASGI application. Django's client has a peer without a port, and repeats no header."""
    pairs = headers if isinstance(headers, list) else list((headers or {}).items())
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": [(b"host", b"testserver"), *((name.lower().encode(), v.encode("latin-1")) for name, v in pairs)],
        "client": (peer, port) if peer else None,
        "server": server,
    }
    return asyncio.run(_response_of(scope))


async def _response_of(scope: dict[str, Any]) -> HttpResponse:
    sent: list[Any] = []
    received = iter([{"type": "http.request", "body": b""}])

    async def receive() -> Any:
        for message in received:
            return message
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await get_asgi_application()(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    response = HttpResponse(
        b"".join(one.get("body", b"") for one in sent[1:]), status=sent[0]["status"], headers=headers
    )
    response.json = lambda: json.loads(response.content)  # type: ignore[attr-defined]
    return response
