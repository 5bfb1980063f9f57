"""Tokens of the admin API: created, listed and revoked on the host; looked up for each request.

A token has the format of a key but is not one: the proxied port refuses it without a lookup. Its scopes are its
permissions; the admin API defines them.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from keyproxy.auth.api_key import ALPHABET, ENTROPY_BYTES
from keyproxy.store.directory.base import DirectoryBase, Entity, NotFound, lifetime, reveal
from keyproxy.store.postgres.database import Row, StoreConflict
from keyproxy.store.postgres.times import time_text

_ID_DIGITS: Final = 20


class AdminTokens(DirectoryBase):
    """The operations on tokens. All methods raise DirectoryError, StoreConflict or StoreUnavailable."""

    async def create(
        self, name: str, scopes: Sequence[str], *, tenant_id: str | None, expires_in: timedelta | None
    ) -> Entity:
        """Create a token, and return it with its `secret`. `tenant_id`: the tenant it is bound to, if any."""
        secret = self._format.make_admin_token(secrets.token_bytes(ENTROPY_BYTES))
        token_id = "tok_" + "".join(chr(secrets.choice(ALPHABET)) for _ in range(_ID_DIGITS))
        try:
            async with self._acting() as transaction:
                await transaction.fetch(
                    "create_admin_token", token_id, secret.digest(), self._format.hint(secret), name, list(scopes),
                    tenant_id, lifetime(expires_in),
                )  # fmt: skip
                row = await transaction.fetch_row("admin_tokens", "", 1, token_id)
        except StoreConflict as error:
            if error.constraint != "admin_tokens_tenant_id_fkey":
                raise
            raise NotFound(f"there is no tenant {tenant_id!r}: create it first") from error
        if row is None:
            raise NotFound(f"there is no token {token_id!r}")
        return {**_token(row), "secret": reveal(secret)}

    async def tokens(self, after: str, limit: int) -> list[Entity]:
        """List tokens, ordered by id, without their secrets."""
        return [_token(row) for row in await self._database.fetch("admin_tokens", after, limit, None)]

    async def revoke(self, token_id: str) -> Entity:
        """Revoke a token permanently; the next request with it is refused. A revoked token stays unchanged."""
        async with self._acting() as transaction:
            done = await transaction.fetch_row("revoke_admin_token", token_id)
            row = await transaction.fetch_row("admin_tokens", "", 1, token_id)
        if done is None or row is None:
            raise NotFound(f"there is no token {token_id!r}")
        return _token(row)

    async def presented(self, digest: bytes) -> Entity | None:
        """The token with this SHA-256 digest, even if it does not work any more: see its `state`."""
        row = await self._one("present_admin_token", digest)
        return None if row is None else _token(row)

    async def are_there_any(self) -> bool:
        """Whether there is a working token."""
        row = await self._one("is_there_a_working_admin_token")
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
