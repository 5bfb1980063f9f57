"""Rows of OAuth clients, grants, sessions and tokens, for tests of what reads them."""

from __future__ import annotations

import hashlib
from typing import Final

from keyproxy.auth.api_key import KeyFormat, SecretKey
from keyproxy.oauth.client import row_id
from tests.store.harness import Sql, add_user

RESOURCE: Final = "https://mcp.example.com/mcp"
TEST_RESOURCE: Final = "https://mcp.example.com/test"
CLIENT_ID: Final = "https://acme.example/client"
CLIENT: Final = row_id(CLIENT_ID)


def grant_id(number: int = 1) -> str:
    """The id of a grant."""
    return f"gra_{number:022d}"


def session_id(number: int = 1) -> str:
    """The id of a session."""
    return f"ses_{number:022d}"


def access_token(number: int = 1) -> SecretKey:
    """An access token."""
    return KeyFormat().make_access_token(hashlib.sha256(f"access {number}".encode()).digest())


async def add_client(sql: Sql, client_id: str = CLIENT_ID, kind: str = "document") -> str:
    """Insert a public client. Return the id of its row."""
    await sql.execute(
        "INSERT INTO keyproxy.oauth_clients (id, client_id, kind, name, redirect_uris, auth_method)"
        " VALUES ($1, $2, $3, 'Acme', '{https://acme.example/cb}', 'none') ON CONFLICT DO NOTHING",
        row_id(client_id), client_id, kind,
    )  # fmt: skip
    return row_id(client_id)


async def add_grant(
    sql: Sql, number: int = 1, *, user: str = "u_42", client_id: str = CLIENT_ID, resource: str = RESOURCE,
    is_test: bool = False, is_service: bool = False, plan: str | None = None, scopes: tuple[str, ...] = ("jobs:write",),
    granted: str = "now()",
) -> str:  # fmt: skip
    """Insert a grant; and its user and client if they are missing. `granted`: an SQL expression."""
    if not await sql.fetchval("SELECT count(*) FROM keyproxy.users WHERE id = $1", user):
        await add_user(sql, user)
    await sql.execute(
        "INSERT INTO keyproxy.oauth_grants (id, user_id, client_id, resource, scopes, is_test, is_service, plan_id,"
        f" granted_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, {granted})",
        grant_id(number), user, await add_client(sql, client_id), resource, list(scopes), is_test, is_service, plan,
    )  # fmt: skip
    return grant_id(number)


async def add_session(
    sql: Sql, number: int = 1, *, grant: int = 1, via_key: str | None = None, scopes: tuple[str, ...] = ("jobs:write",),
    expires: str = "now() + interval '90 days'",
) -> str:  # fmt: skip
    """Insert a session; and its grant if it is missing. `expires`: an SQL expression."""
    if not await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_grants WHERE id = $1", grant_id(grant)):
        await add_grant(sql, grant)
    await sql.execute(
        "INSERT INTO keyproxy.oauth_sessions (id, grant_id, presented_as, scopes, via_key, expires_at)"
        f" VALUES ($1, $2, $3, $4, $5, {expires})",
        session_id(number), grant_id(grant), CLIENT_ID, list(scopes), via_key,
    )  # fmt: skip
    return session_id(number)


async def add_access_token(
    sql: Sql, number: int = 1, *, session: int = 1, scopes: tuple[str, ...] = ("jobs:write",),
    expires: str = "now() + interval '15 minutes'", bound_to: bytes | None = None,
) -> SecretKey:  # fmt: skip
    """Insert an access token; and its session if it is missing. `expires`: an SQL expression."""
    if not await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_sessions WHERE id = $1", session_id(session)):
        await add_session(sql, session)
    await sql.execute(
        "INSERT INTO keyproxy.oauth_access_tokens (digest, session_id, scopes, expires_at, bound_to)"
        f" VALUES ($1, $2, $3, {expires}, $4)",
        access_token(number).digest(), session_id(session), list(scopes), bound_to,
    )  # fmt: skip
    return access_token(number)


async def add_refresh_token(
    sql: Sql, number: int = 1, *, session: int = 1, issued: str = "now()", expires: str = "now() + interval '30 days'"
) -> bytes:
    """Insert a refresh token. Return its digest. `issued`, `expires`: SQL expressions."""
    digest = hashlib.sha256(f"refresh {session} {number}".encode()).digest()
    await sql.execute(
        "INSERT INTO keyproxy.oauth_refresh_tokens (digest, session_id, issued_at, expires_at)"
        f" VALUES ($1, $2, {issued}, {expires})",
        digest, session_id(session),
    )  # fmt: skip
    return digest


async def add_code(
    sql: Sql, number: int = 1, *, grant: int = 1, via_key: str | None = None, scopes: tuple[str, ...] = ("jobs:write",),
    expires: str = "now() + interval '60 seconds'",
) -> bytes:  # fmt: skip
    """Insert a code of a grant; and the grant if it is missing. Return its digest. `expires`: an SQL expression."""
    if not await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_grants WHERE id = $1", grant_id(grant)):
        await add_grant(sql, grant)
    digest = hashlib.sha256(f"code {number}".encode()).digest()
    await sql.execute(
        "INSERT INTO keyproxy.oauth_codes (digest, grant_id, client_id, redirect_uri, challenge, scopes, via_key,"
        f" expires_at) VALUES ($1, $2, $3, 'https://acme.example/cb', sha256('verifier'), $4, $5, {expires})",
        digest, grant_id(grant), CLIENT_ID, list(scopes), via_key,
    )  # fmt: skip
    return digest
