"""What the token endpoints ask of the store, and what they get."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from keyproxy.auth.api_key import SecretKey


@dataclass(frozen=True, slots=True)
class CodeExchange:
    """A presented authorization code. `digest`: SHA-256 of it. `challenge`: SHA-256 of the presented verifier.

    `redirect_uri`, `resource`: None if the request has none. `bound_to`: SHA-256 of the client's certificate, which the
    access token is bound to; None: there is none.
    """

    digest: bytes = field(repr=False)
    challenge: bytes = field(repr=False)
    redirect_uri: str | None = None
    resource: str | None = None
    bound_to: bytes | None = None


@dataclass(frozen=True, slots=True)
class RefreshExchange:
    """A presented refresh token. `digest`: SHA-256 of it. `scopes`: the requested ones, None: those of the session."""

    digest: bytes = field(repr=False)
    scopes: frozenset[str] | None = None
    resource: str | None = None
    bound_to: bytes | None = None


@dataclass(frozen=True, slots=True)
class ServiceRequest:
    """A request of a client for a token of its own grant. `scopes`: the requested ones, None: those of the grant."""

    scopes: frozenset[str] | None = None
    resource: str | None = None
    bound_to: bytes | None = None


@dataclass(frozen=True, slots=True)
class IssuedTokens:
    """Tokens that were issued just now. `refresh_token`: None for a client that acts for itself."""

    access_token: SecretKey
    refresh_token: SecretKey | None
    expires_in: int
    scopes: tuple[str, ...]
    session_id: str
    user_id: str


@dataclass(frozen=True, slots=True)
class TokenReader:
    """Which access tokens an introspection may see: those of one client, or of one tenant; both None: all."""

    client_row: str | None = None
    tenant_id: str | None = None


@dataclass(frozen=True, slots=True)
class AccessTokenState:
    """An access token that works now, as introspection shows it. `scopes`: those that the proxy grants."""

    scopes: tuple[str, ...]
    client_id: str
    user_id: str
    resource: str
    issued_at: datetime
    expires_at: datetime
    bound_to: bytes | None
