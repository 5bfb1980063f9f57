"""Tokens of the admin API: created, listed and revoked on the host; looked up for each request.

A token has the format of a key but is not one: the proxied port refuses it without a lookup. Its scopes are its
permissions; the admin API defines them.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from keyproxy.auth.api_key import ENTROPY_BYTES, KeyFormat
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import Actor, Entity, lifetime, random_digits, reveal, with_warnings
from keyproxy.store.directory.errors import NotFound
from keyproxy.store.postgres.database import Row, StatementRunner, StoreConflict
from keyproxy.store.postgres.times import time_text

#: The scopes with which a token gives scopes to keys.
_ISSUES_KEYS: Final = frozenset({"admin:write", "keys:write", "users:write"})


class AdminTokens:
    """The operations on tokens. All methods raise DirectoryError, StoreConflict or StoreUnavailable."""

    def __init__(self, database: StatementRunner, key_format: KeyFormat, actor: Actor) -> None:
        self._context = DirectoryContext(database, key_format, actor)

    async def create(
        self, name: str, scopes: Sequence[str], *, tenant_id: str | None, expires_in: timedelta | None
    ) -> Entity:
        """Create a token, and return it with its `secret`, and `warnings` if any. `tenant_id`: what it is bound to."""
        secret = self._context.key_format.make_admin_token(secrets.token_bytes(ENTROPY_BYTES))
        token_id = "tok_" + random_digits()
        try:
            async with self._context.transaction() as transaction:
                values = (token_id, secret.digest(), self._context.key_format.hint(secret), name, list(scopes))
                await transaction.fetch("create_admin_token", *values, tenant_id, lifetime(expires_in))
                row = await transaction.fetch_row("admin_tokens", "", 1, token_id)
                tenant = await transaction.fetch_row("tenant", tenant_id)
        except StoreConflict as error:
            if error.constraint != "admin_tokens_tenant_id_fkey":
                raise
            raise NotFound(f"there is no tenant {tenant_id!r}: create it first") from error
        if row is None:
            raise NotFound(f"there is no token {token_id!r}")
        warnings = []
        if tenant is not None and tenant["roles"] is None and not _ISSUES_KEYS.isdisjoint(scopes):
            warnings.append(
                f"tenant {tenant_id!r} has no ceiling: this token can give its keys any scope; see `tenant set-roles`"
            )
        return with_warnings({**_token(row), "secret": reveal(secret)}, warnings)

    async def tokens(self, after: str, limit: int) -> list[Entity]:
        """List tokens, ordered by id, without their secrets."""
        return [_token(row) for row in await self._context.fetch("admin_tokens", after, limit, None)]

    async def revoke(self, token_id: str) -> Entity:
        """Revoke a token permanently; the next request with it is refused. A revoked token stays unchanged."""
        async with self._context.transaction() as transaction:
            done = await transaction.fetch_row("revoke_admin_token", token_id)
            row = await transaction.fetch_row("admin_tokens", "", 1, token_id)
        if done is None or row is None:
            raise NotFound(f"there is no token {token_id!r}")
        return _token(row)

    async def presented(self, digest: bytes) -> Entity | None:
        """The token with this SHA-256 digest, even if it does not work any more: see its `state`."""
        row = await self._context.fetch_row("present_admin_token", digest)
        return None if row is None else _token(row)

    async def are_there_any(self) -> bool:
        """Whether there is a working token."""
        row = await self._context.fetch_row("is_there_a_working_admin_token")
        return row is not None and row["is_there"]


def _token(row: Row) -> Entity:
    return {
        "id": row["id"],
        "name": row["name"],
        "state": row["state"],
        "hint": row["hint"],
        "scopes": list(row["scopes"]),
        "tenant": row["tenant_id"],
        "created_at": time_text(row["created_at"]),
        "expires_at": time_text(row["expires_at"]),
        "revoked_at": time_text(row["revoked_at"]),
        "last_used_at": time_text(row["last_used_at"]),
    }
