"""The directory of tenants, users, keys and plans, and its audit log.

Every change is one transaction that includes its audit rows. Provisioning is idempotent: creating an existing user again
returns it, without a second key. The plaintext of a key exists in the return value of the call that created it, and
nowhere else.

One class made of parts: each part handles one kind of entity; `DirectoryBase` is what they share. The command line and
the admin API use nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keyproxy.store.directory.audit import AuditFilter, AuditTrail
from keyproxy.store.directory.base import (
    ENTITIES,
    Actor,
    Conflict,
    DirectoryBase,
    DirectoryError,
    Entity,
    Invalid,
    KeyWish,
    NotFound,
    Outdated,
    Page,
    etag,
    lifetime,
    new_key_id,
    reveal,
)
from keyproxy.store.directory.bulk import Bulk, Revocation
from keyproxy.store.directory.import_keys import Import, ImportedKey, ImportReport
from keyproxy.store.directory.keys import KeyFilter, Keys
from keyproxy.store.directory.leaked_keys import Leaks
from keyproxy.store.directory.plans import Plans
from keyproxy.store.postgres.database import StoreConflict

__all__ = [
    "Actor", "AuditFilter", "Conflict", "Directory", "DirectoryError", "Entity", "ImportReport", "ImportedKey",
    "Invalid", "KeyFilter", "KeyWish", "NotFound", "Outdated", "Page", "Revocation", "etag",
]  # fmt: skip


class Tenants(DirectoryBase):
    """The customer organisations."""

    async def create_tenant(self, tenant_id: str, name: str, plan: str | None = None) -> Entity:
        """Create a tenant, or return the existing one unchanged."""
        if self._bound_to != tenant_id:
            self._must_be_unbound("create a tenant")
        async with self._acting(plan) as transaction:
            row = await transaction.fetch_row("create_tenant", tenant_id, name, plan)
        return {**await self.tenant(tenant_id), "created": row is not None}

    async def tenant(self, tenant_id: str) -> Entity:
        """Return one tenant, with the number of its users."""
        return await self._thing("tenant", tenant_id)

    async def tenants(self, after: str, limit: int) -> list[Entity]:
        """List tenants, ordered by id."""
        if self._bound_to is not None:
            return [await self.tenant(self._bound_to)] if after < self._bound_to and limit > 0 else []
        return await self._list("tenant", "tenants", after, limit)

    async def change_tenant(self, tenant_id: str, changes: Mapping[str, Any], *, if_match: str | None = None) -> Entity:
        """Change `name`, `plan`, `test_plan` (None removes it) or `disabled`, and return the changed tenant."""
        return await self._change("tenant", tenant_id, changes, if_match)

    async def delete_tenant(self, tenant_id: str, *, if_match: str | None = None) -> Entity:
        """Delete a tenant with its users and their keys."""
        self._must_be_unbound("delete a tenant")
        return await self._delete("tenant", tenant_id, if_match)


class Users(DirectoryBase):
    """The accounts that keys belong to."""

    async def create_user(
        self, user_id: str, tenant_id: str, first_key: KeyWish | None, *, plan: str | None = None
    ) -> Entity:
        """Create a user, with a first key unless `first_key` is None; or return the existing user unchanged."""
        if self._bound_to not in (None, tenant_id):
            raise NotFound(f"there is no tenant {tenant_id!r}")
        secret = self._new_secret(is_test=False) if first_key is not None else None
        wish = first_key or KeyWish()
        key_id = new_key_id() if secret is not None else None
        try:
            async with self._acting(plan or wish.plan) as transaction:
                row = await transaction.fetch_row(
                    "create_user", user_id, tenant_id, plan, key_id,
                    secret.digest() if secret is not None else None,
                    self._format.hint(secret) if secret is not None else None,
                    wish.name, list(wish.scopes), lifetime(wish.expires_in), wish.plan,
                )  # fmt: skip
        except StoreConflict as error:
            if error.constraint.startswith("users_tenant_id"):
                raise NotFound(f"there is no tenant {tenant_id!r}: create it first") from error
            raise
        found = await self._one("user", user_id)
        if found is None:
            raise NotFound(f"there is no user {user_id!r}")
        user = ENTITIES["user"](found)
        if user["tenant"] != tenant_id:
            whose = f"tenant {user['tenant']!r}" if self._bound_to is None else "another tenant"
            raise Conflict(f"user {user_id!r} exists and belongs to {whose}")
        key = None
        if row is not None and key_id is not None and secret is not None:
            key = {**await self._thing("key", key_id), "secret": reveal(secret)}
        return {**user, "created": row is not None, "key": key}

    async def user(self, user_id: str) -> Entity:
        """Return one user, with the number of its keys."""
        return await self._thing("user", user_id)

    async def users(self, after: str, limit: int, tenant_id: str | None) -> list[Entity]:
        """List users, ordered by id; only those of one tenant, if given."""
        may_be, tenant = self._only_tenant(tenant_id)
        return await self._list("user", "users", after, limit, tenant) if may_be else []

    async def change_user(self, user_id: str, changes: Mapping[str, Any], *, if_match: str | None = None) -> Entity:
        """Change `plan`, `test_plan` (None removes it) or `disabled`, and return the changed user."""
        return await self._change("user", user_id, changes, if_match)

    async def delete_user(self, user_id: str, *, if_match: str | None = None) -> Entity:
        """Delete a user with all its keys."""
        return await self._delete("user", user_id, if_match)


class Directory(Tenants, Users, Keys, Leaks, Plans, AuditTrail, Bulk, Import):
    """All operations. Every method raises DirectoryError, StoreConflict or StoreUnavailable."""
