"""Tenants, the customer organisations, and users, the accounts that keys belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keyproxy.store.directory.access.authority import ceiling_warnings
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import ENTITIES, Entity, KeyWish, lifetime, new_key_id, reveal, with_warnings
from keyproxy.store.directory.errors import Conflict, NotFound
from keyproxy.store.postgres.database import StoreConflict


@dataclass(frozen=True, slots=True)
class TenantStore:
    """The operations on tenants."""

    _context: DirectoryContext

    async def create(self, tenant_id: str, name: str, plan: str | None = None) -> Entity:
        """Create a tenant, or return the existing one unchanged."""
        if not self._context.includes_tenant(tenant_id):
            self._context.require_unbound("create a tenant")
        async with self._context.transaction(plan) as transaction:
            row = await transaction.fetch_row("create_tenant", tenant_id, name, plan)
        return {**await self.get(tenant_id), "created": row is not None}

    async def get(self, tenant_id: str) -> Entity:
        """Return one tenant, with the number of its users."""
        return await self._context.get("tenant", tenant_id)

    async def list_by_id(self, after: str, limit: int) -> list[Entity]:
        """List tenants, ordered by id."""
        bound_to = self._context.tenant_id
        if bound_to is not None:
            return [await self.get(bound_to)] if after < bound_to and limit > 0 else []
        return await self._context.list_entities("tenant", "tenants", after, limit)

    async def change(self, tenant_id: str, changes: Mapping[str, Any], *, if_match: str | None = None) -> Entity:
        """Change `name`, `plan`, `test_plan` (None removes it), `roles` or `disabled`, and return the changed tenant.

        `roles`: the ceiling of all keys of the tenant, None for none. A bound directory cannot change it.
        """
        if "roles" in changes:
            self._context.require_unbound("change the ceiling of its tenant")
        return await self._context.change("tenant", tenant_id, changes, if_match)

    async def delete(self, tenant_id: str, *, if_match: str | None = None) -> Entity:
        """Delete a tenant with its users and their keys."""
        self._context.require_unbound("delete a tenant")
        return await self._context.delete("tenant", tenant_id, if_match)


@dataclass(frozen=True, slots=True)
class UserStore:
    """The operations on users."""

    _context: DirectoryContext

    async def create(
        self, user_id: str, tenant_id: str, first_key: KeyWish | None, *, plan: str | None = None
    ) -> Entity:
        """Create a user, with a first key unless `first_key` is None; or return the existing user unchanged."""
        context = self._context
        if not context.includes_tenant(tenant_id):
            raise NotFound(f"there is no tenant {tenant_id!r}")
        secret = context.new_secret(is_test=False) if first_key is not None else None
        wish = first_key or KeyWish()
        key_id = new_key_id() if secret is not None else None
        digest = secret.digest() if secret is not None else None
        hint = context.key_format.hint(secret) if secret is not None else None
        key_values = (key_id, digest, hint, wish.name, list(wish.scopes), lifetime(wish.expires_in), wish.plan)
        try:
            async with context.transaction(plan or wish.plan) as transaction:
                row = await transaction.fetch_row("create_user", user_id, tenant_id, plan, *key_values)
                warnings = await ceiling_warnings(transaction, [] if key_id is None else [key_id])
        except StoreConflict as error:
            if error.constraint.startswith("users_tenant_id"):
                raise NotFound(f"there is no tenant {tenant_id!r}: create it first") from error
            raise
        user = await self._existing(user_id, tenant_id)
        key = None
        if row is not None and key_id is not None and secret is not None:
            key = {**await context.get("key", key_id), "secret": reveal(secret)}
        return with_warnings({**user, "created": row is not None, "key": key}, warnings)

    async def _existing(self, user_id: str, tenant_id: str) -> Entity:
        """Read a user, without the tenant binding. Raises Conflict if it belongs to another tenant."""
        found = await self._context.fetch_row("user", user_id)
        if found is None:
            raise NotFound(f"there is no user {user_id!r}")
        user = ENTITIES["user"](found)
        if user["tenant"] != tenant_id:
            owner = f"tenant {user['tenant']!r}" if self._context.tenant_id is None else "another tenant"
            raise Conflict(f"user {user_id!r} exists and belongs to {owner}")
        return user

    async def get(self, user_id: str) -> Entity:
        """Return one user, with the number of its keys."""
        return await self._context.get("user", user_id)

    async def list_by_id(self, after: str, limit: int, tenant_id: str | None) -> list[Entity]:
        """List users, ordered by id; only those of one tenant, if given."""
        may_be, tenant = self._context.tenant_filter(tenant_id)
        return await self._context.list_entities("user", "users", after, limit, tenant) if may_be else []

    async def change(self, user_id: str, changes: Mapping[str, Any], *, if_match: str | None = None) -> Entity:
        """Change `plan`, `test_plan` (None removes it), `roles` or `disabled`, and return the changed user.

        `roles`: the ceiling of the user's keys, None for none.
        """
        return await self._context.change("user", user_id, changes, if_match)

    async def delete(self, user_id: str, *, if_match: str | None = None) -> Entity:
        """Delete a user with all its keys."""
        return await self._context.delete("user", user_id, if_match)
