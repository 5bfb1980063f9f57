"""Token requests for tests: a clock, a store of tokens, a code and its client."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

from keyproxy.auth.api_key import KeyFormat
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.oauth.client import AuthMethod, Client, ClientKind
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.store.oauth.token_values import CodeExchange, IssuedTokens, RefreshExchange
from keyproxy.store.oauth.tokens import TokenStore
from keyproxy.store.postgres.database import StatementRunner
from tests.store.oauth_rows import CLIENT_ID, RESOURCE, TEST_RESOURCE

REDIRECT_URI = "https://acme.example/cb"
CLIENT = Client(CLIENT_ID, CLIENT_ID, ClientKind.DOCUMENT, "Acme", (REDIRECT_URI,))
OTHER_CLIENT = Client("https://other.example/c", "https://other.example/c", ClientKind.DOCUMENT, "Other", ())
#: As `add_code` has it.
VERIFIER = "verifier"


class WallClock:
    """The time of a test, which begins now: triggers read the database's clock."""

    def __init__(self) -> None:
        self.time = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.time

    def advance(self, seconds: float) -> None:
        """Move on."""
        self.time += timedelta(seconds=seconds)


def settings(**changes: Any) -> OAuthSettings:
    """The configuration with changes."""
    values: dict[str, Any] = {
        "issuer": "https://mcp.example.com", "resource": RESOURCE, "test_resource": TEST_RESOURCE,
        "scopes": ["jobs:read", "jobs:write"],
    }  # fmt: skip
    return OAuthSettings(**(values | changes))


def token_store(
    database: StatementRunner,
    clock: WallClock,
    *,
    issued: Counter[str] | None = None,
    ended: Counter[str] | None = None,
    **changes: Any,
) -> TokenStore:
    """A store of tokens. `changes`: of the configuration."""
    return TokenStore(database, settings(**changes), KeyFormat(), now=clock, issued=issued, ended=ended)


def service(client_id: str = "worker", method: AuthMethod = AuthMethod.CLIENT_SECRET) -> Client:
    """A client with a credential of its own."""
    return Client(client_id, client_id, ClientKind.REGISTERED, "Worker", (), method)


def exchange(digest: bytes, verifier: str = VERIFIER, **changes: Any) -> CodeExchange:
    """The exchange of a code with the right values, with changes."""
    values: dict[str, Any] = {"redirect_uri": REDIRECT_URI, "resource": RESOURCE}
    return CodeExchange(digest, hashlib.sha256(verifier.encode()).digest(), **(values | changes))


def refreshed(issued: IssuedTokens, **changes: Any) -> RefreshExchange:
    """The use of the refresh token."""
    assert issued.refresh_token is not None
    return RefreshExchange(issued.refresh_token.digest(), **changes)


async def error_of(request: Any) -> str:
    """The code of the error that a request ends with; empty: it succeeds."""
    try:
        await request
    except OAuthError as error:
        return error.code
    return ""


async def outcomes(*requests: Any) -> list[str]:
    """The errors of requests that run at once, in order of their names."""
    return sorted(await asyncio.gather(*(error_of(request) for request in requests)))
