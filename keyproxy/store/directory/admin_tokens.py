"""Tokens of the admin API: made, listed, revoked on the host; looked up for each request.

A token is made like a key and is none: the proxied port refuses it without asking anyone. What it may do are its scopes;
which these are is the admin API's to say.
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
    """See the module. All methods raise DirectoryError, StoreConflict or StoreUnavailable."""

    async def create(
        self, name: str, scopes: Sequence[str], *, tenant_id: str | None, expires_in: timedelta | None
    ) -> Entity:
        """A new token, with its `secret`. `tenant_id`: the one tenant that it sees and touches; None: all."""
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
        """Tokens in the order of their ids, without their secrets."""
        return [_token(row) for row in await self._database.fetch("admin_tokens", after, limit, None)]

    async def revoke(self, token_id: str) -> Entity:
        """Revoke a token for good; the next request with it is refused. One that is revoked already stays as it is."""
        async with self._acting() as transaction:
            done = await transaction.fetch_row("revoke_admin_token", token_id)
            row = await transaction.fetch_row("admin_tokens", "", 1, token_id)
        if done is None or row is None:
            raise NotFound(f"there is no token {token_id!r}")
        return _token(row)

    async def presented(self, digest: bytes) -> Entity | None:
        """The token with this SHA-256 digest, whether or not it works: see its `state`."""
        row = await self._one("present_admin_token", digest)
        return None if row is None else _token(row)

    async def are_there_any(self) -> bool:
        """Whether some token works."""
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
