"""Identity for ASGI applications: `IdentityMiddleware(app, trust=Trust.unix())`.

The identity is `scope["state"]["identity"]`, in Starlette and FastAPI `request.state.identity`; None if there is none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from keyproxy_client.acting import request_identity
from keyproxy_client.incoming.identity_headers import DEFAULT_PREFIX
from keyproxy_client.incoming.judge import Judge, Outcome
from keyproxy_client.incoming.problems import WEBSOCKET_CLOSE_CODE, Problem
from keyproxy_client.incoming.trust import Trust

__all__ = ["IdentityMiddleware", "RequestGuard", "guard_of"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_GUARD_KEY: Final = "keyproxy.guard"


class IdentityMiddleware:
    """Sets the identity of each request and WebSocket, and removes identity headers that are not trusted.

    It must see the connection as the server does: put it outside every middleware that changes `scope["client"]` or
    `scope["server"]`. `header_prefix`: as `identity.header_prefix` of the proxy.
    """

    def __init__(self, app: Application, *, trust: Trust, header_prefix: str = DEFAULT_PREFIX) -> None:
        self._app: Final = app
        self._judge: Final = Judge(trust, header_prefix=header_prefix)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of ASGI."""
        if scope["type"] not in ("http", "websocket"):
            # The lifespan has no headers. Other kinds of connections with headers get no identity.
            if "headers" in scope:
                self._remove_headers(scope)
            await self._app(scope, receive, send)
            return
        outcome = await self._judge.asgi(scope)
        if outcome.is_rejected and outcome.problem is not None:
            await _refuse(scope, send, outcome.problem)
            return
        if not outcome.is_trusted:
            self._remove_headers(scope)
        # In place, as routers do: what surrounds the application reads the scope after the request.
        scope.setdefault("state", {})["identity"] = outcome.identity
        guard = scope[_GUARD_KEY] = RequestGuard(outcome, send)
        with request_identity(outcome.identity):
            await self._app(scope, receive, guard.send if scope["type"] == "http" else send)

    def _remove_headers(self, scope: Scope) -> None:
        kept = self._judge.headers.without(scope["headers"])
        if len(kept) != len(scope["headers"]):
            scope["headers"] = kept
            peer = scope.get("client")
            self._judge.warn_of_removal(peer[1] if peer is not None and len(peer) == 2 else None)


class RequestGuard:
    """The outcome of one request for its guards, and their way to refuse it.

    A framework turns the exception of a guard into a response of its own form. `send` replaces that with the problem.
    """

    __slots__ = ("_is_replaced", "_refusal", "_send", "outcome")

    def __init__(self, outcome: Outcome, send: Send) -> None:
        self.outcome: Final = outcome
        self._send: Final = send
        self._refusal: Problem | None = None
        self._is_replaced = False

    def refuse(self, problem: Problem) -> None:
        """Respond with this problem, if the response of the application has its status."""
        self._refusal = problem

    async def send(self, message: Message) -> None:
        """Send a message of the response."""
        if self._is_replaced:
            return
        refusal = self._refusal
        if refusal is None or message["type"] != "http.response.start" or message["status"] != refusal.status:
            await self._send(message)
            return
        self._is_replaced = True
        await _send_problem(self._send, refusal, message.get("headers", ()))


def guard_of(scope: Scope) -> RequestGuard:
    """The guard of a request. Raises RuntimeError if IdentityMiddleware has not seen it."""
    guard: RequestGuard | None = scope.get(_GUARD_KEY)
    if guard is None:
        raise RuntimeError("keyproxy_client.asgi.IdentityMiddleware is not installed in this application")
    return guard


async def _refuse(scope: Scope, send: Send, problem: Problem) -> None:
    if scope["type"] == "http":
        await _send_problem(send, problem)
    else:
        await send({"type": "websocket.close", "code": WEBSOCKET_CLOSE_CODE, "reason": problem.code})


async def _send_problem(send: Send, problem: Problem, other_headers: Any = ()) -> None:
    """`other_headers`: of the response that this one replaces, such as those of CORS."""
    body = problem.body()
    headers = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in problem.all_headers(body)]
    own = {name for name, _ in headers}
    headers += [(name, value) for name, value in other_headers if bytes(name).lower() not in own]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
