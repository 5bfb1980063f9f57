"""Guards for FastAPI: `Depends(identity)` and `Depends(needs("jobs:write"))`, behind `asgi.IdentityMiddleware`.

app.add_middleware(IdentityMiddleware, trust=Trust.unix())

@app.post("/v1/jobs")
async def create(caller: Annotated[Identity, Depends(needs("jobs:write"))]) -> None: ...
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NoReturn

from keyproxy_client import names
from keyproxy_client.asgi import guard_of
from keyproxy_client.identity import Identity
from keyproxy_client.incoming.problems import (
    IDENTITY_MISSING,
    WEBSOCKET_CLOSE_CODE,
    Problem,
    insufficient_scope,
    missing_scopes,
)
from keyproxy_client.missing_extra import missing_extra

try:
    from fastapi import HTTPException, WebSocketException
    from fastapi.requests import HTTPConnection
except ImportError as error:
    raise missing_extra("fastapi", error) from error

__all__ = ["identity", "needs"]


async def identity(connection: HTTPConnection) -> Identity:
    """The identity of the request or WebSocket. Without one it is refused."""
    outcome = guard_of(connection.scope).outcome
    if outcome.identity is None:
        _refuse(connection, outcome.problem or IDENTITY_MISSING)
    return outcome.identity


def needs(*scopes: str) -> Callable[[HTTPConnection], Awaitable[Identity]]:
    """A dependency that refuses requests whose identity lacks one of these scopes, and returns the identity."""
    if not scopes or not all(isinstance(scope, str) and names.is_scope(scope) for scope in scopes):
        raise ValueError("needs() takes one or more scopes, such as 'jobs:write'")

    async def identity_with_scopes(connection: HTTPConnection) -> Identity:
        found = await identity(connection)
        missing = missing_scopes(found, scopes)
        if missing:
            _refuse(connection, insufficient_scope(missing))
        return found

    return identity_with_scopes


def _refuse(connection: HTTPConnection, problem: Problem) -> NoReturn:
    if connection.scope["type"] == "websocket":
        raise WebSocketException(WEBSOCKET_CLOSE_CODE, problem.code)
    # FastAPI responds in its own form; the middleware replaces that with the problem.
    guard_of(connection.scope).refuse(problem)
    raise HTTPException(problem.status, problem.content(), dict(problem.headers))
