"""OAuth grants: what a user, or an operator on behalf of a service, has allowed a client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import Entity, random_digits

#: How many rows one call revokes.
REVOKED_MAX: Final = 1_000

_ID_DIGITS: Final = 22


def new_grant_id() -> str:
    """A new, random id for a grant."""
    return "gra_" + random_digits(_ID_DIGITS)


@dataclass(frozen=True, slots=True)
class OAuthGrantStore:
    """The operations on grants."""

    _context: DirectoryContext

    async def get(self, grant_id: str) -> Entity:
        """Return one grant, with the number of its sessions."""
        return await self._context.get("grant", grant_id)

    async def list_by_id(self, after: str, limit: int, *, user_id: str | None = None) -> list[Entity]:
        """List grants, ordered by id; only those of a user, if given. Raises NotFound for an unknown user."""
        if user_id is None:
            tenant = self._context.tenant_id
            return await self._context.list_entities("grant", "grants", after, limit, tenant)
        await self._context.get("user", user_id)
        return await self._context.list_entities("grant", "grants_of_user", user_id, after, limit)

    async def change(self, grant_id: str, changes: Mapping[str, Any], *, if_match: str | None = None) -> Entity:
        """Change `plan` (None removes it), and return the changed grant. Its tokens are limited by the new plan.

        Takes effect within a second.
        """
        return await self._context.change("grant", grant_id, changes, if_match)

    async def delete(self, grant_id: str, *, if_match: str | None = None) -> Entity:
        """Revoke a grant with its sessions: its tokens are refused within a second. The user can consent again."""
        return await self._context.delete("grant", grant_id, if_match)

    async def delete_of_user(self, user_id: str) -> Entity:
        """Revoke grants of a user, at most REVOKED_MAX. `revoked`: how many; `remaining`: how many there still are."""
        async with self._context.transaction() as transaction:
            await self._context.lock(transaction, "user", user_id)
            deleted = await transaction.fetch("delete_grants_of_user", user_id, REVOKED_MAX)
            remaining = await transaction.fetch("count_grants_of_user", user_id)
        return {"revoked": len(deleted), "remaining": remaining[0]["grants"]}
