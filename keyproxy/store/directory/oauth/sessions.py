"""OAuth sessions: a program on one device, connected under a grant."""

from __future__ import annotations

from dataclasses import dataclass

from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import Entity
from keyproxy.store.directory.oauth.grants import REVOKED_MAX


@dataclass(frozen=True, slots=True)
class OAuthSessionStore:
    """The operations on sessions."""

    _context: DirectoryContext

    async def get(self, session_id: str) -> Entity:
        """Return one session."""
        return await self._context.get("session", session_id)

    async def list_by_id(self, after: str, limit: int, *, user_id: str | None = None) -> list[Entity]:
        """List sessions, ordered by id; only those of a user, if given. Raises NotFound for an unknown user."""
        if user_id is None:
            tenant = self._context.tenant_id
            return await self._context.list_entities("session", "sessions", after, limit, tenant)
        await self._context.get("user", user_id)
        return await self._context.list_entities("session", "sessions_of_user", user_id, after, limit)

    async def delete(self, session_id: str) -> Entity:
        """End a session: its tokens are refused within a second."""
        return await self._context.delete("session", session_id, None)

    async def delete_many(self, *, user_id: str | None = None) -> Entity:
        """End sessions of a user, or of all users, at most REVOKED_MAX. A bound directory ends those of its tenant.

        `revoked`: how many; `remaining`: how many there still are, of which at most 10,000 are counted.
        """
        selection = (user_id, self._context.tenant_id)
        async with self._context.transaction() as transaction:
            if user_id is not None:
                await self._context.lock(transaction, "user", user_id)
            deleted = await transaction.fetch("delete_sessions", *selection, REVOKED_MAX)
            remaining = await transaction.fetch("count_sessions", *selection)
        return {"revoked": len(deleted), "remaining": remaining[0]["sessions"]}
