"""Roles: named sets of scopes, assigned to keys, and as ceilings to users and tenants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keyproxy.store.directory.access.authority import check_scopes
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import ENTITIES, Entity
from keyproxy.store.directory.errors import Conflict, NotFound


@dataclass(frozen=True, slots=True)
class RoleStore:
    """The operations on roles. A directory that is bound to a tenant can read roles but not change them."""

    _context: DirectoryContext

    async def set(self, name: str, scopes: Sequence[str], *, if_match: str | None = None) -> Entity:
        """Create a role, or replace all of its scopes. Takes effect within a second.

        `created`: whether it is new. Raises Invalid, also if a key would have too many effective scopes.
        """
        self._context.require_unbound("set a role")
        wanted = list(dict.fromkeys(scopes))
        async with self._context.transaction() as transaction:
            created = False
            try:
                before = await self._context.lock(transaction, "role", name, if_match)
            except NotFound:
                if if_match is not None:
                    raise
                created = await transaction.fetch_row("create_role", name, wanted) is not None
                # Not created: another transaction has created it in the meantime.
                before = await self._context.lock(transaction, "role", name)
            if before["scopes"] != wanted:
                await transaction.fetch("set_role", name, wanted)
            await check_scopes(transaction, role=name)
            row = await transaction.fetch_row("role", name)
        if row is None:
            raise NotFound(f"there is no role {name!r}")
        return {**ENTITIES["role"](row), "created": created}

    async def get(self, name: str) -> Entity:
        """Return one role, with its scopes and the numbers of its tenants, users, keys and agents."""
        return await self._context.get("role", name)

    async def list_by_id(self, after: str, limit: int) -> list[Entity]:
        """List roles, ordered by name."""
        return await self._context.list_entities("role", "roles", after, limit)

    async def delete(self, name: str, *, if_match: str | None = None) -> Entity:
        """Delete a role. Raises Conflict if a tenant, user, key or agent has it."""
        self._context.require_unbound("delete a role")
        async with self._context.transaction() as transaction:
            role = await self._context.lock(transaction, "role", name, if_match)
            counts = ((kind, role[f"{kind}s"]) for kind in ("tenant", "user", "key", "agent"))
            uses = " and ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts if count)
            if uses:
                raise Conflict(f"role {name!r} is assigned to {uses}: assign other roles first")
            await transaction.fetch("delete_role", name)
        return {"id": name, "deleted": True}
