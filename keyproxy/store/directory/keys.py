"""Keys: issue, list, change, rotate, suspend, resume, revoke and delete them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from keyproxy.store.directory.access.authority import check_scopes, hold_roles, key_warnings
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import (
    ENTITIES,
    Entity,
    EntityPage,
    KeyWish,
    lifetime,
    new_key_id,
    reveal,
    with_warnings,
)
from keyproxy.store.directory.errors import Conflict, Invalid, NotFound
from keyproxy.store.postgres.times import time_text

STATES: Final = ("active", "retiring", "suspended", "disabled", "expired", "revoked")

#: The times that keys can be ordered by, oldest first. A key that was never used comes first, one that never expires
#: comes last.
ORDERS: Final = ("created", "used", "expires")

_CURSOR = re.compile(r"(-?infinity|\d{4,6}-\d\d-\d\d \d\d:\d\d:\d\d[0-9.]*[+-][0-9:]+(?: BC)?)/(.*)")


@dataclass(frozen=True, slots=True)
class KeyFilter:
    """Which keys to list. All given conditions apply."""

    user: str | None = None
    tenant: str | None = None
    is_test: bool | None = None
    state: str | None = None
    older_than: timedelta | None = None
    unused_for: timedelta | None = None
    expires_within: timedelta | None = None

    def __post_init__(self) -> None:
        """Raises Invalid."""
        if self.state is not None and self.state not in STATES:
            raise Invalid(f"unknown key state {self.state!r}; valid states: {', '.join(STATES)}")


@dataclass(frozen=True, slots=True)
class KeyStore:
    """The operations on single keys."""

    _context: DirectoryContext

    async def issue(self, user_id: str, wish: KeyWish) -> Entity:
        """Issue a key, and return it with its `secret`, and with `warnings` if there are any."""
        secret, key_id = self._context.new_secret(is_test=wish.is_test), new_key_id()
        async with self._context.transaction(wish.plan) as transaction:
            if self._context.tenant_id is not None:
                await self._context.lock(transaction, "user", user_id)
            values = (key_id, user_id, secret.digest(), self._context.key_format.hint(secret), wish.name)
            await hold_roles(transaction, wish.roles)
            wanted = (list(wish.scopes), wish.is_test, lifetime(wish.expires_in), wish.plan, list(wish.roles))
            row = await transaction.fetch_row("issue_key", *values, *wanted, wish.acts_for)
            if row is None:
                raise NotFound(f"there is no user {user_id!r}: create it first")
            await check_scopes(transaction, keys=[key_id])
            warnings = await key_warnings(transaction, [key_id])
        return with_warnings({**await self.get(key_id), "secret": reveal(secret)}, warnings)

    async def get(self, key_id: str) -> Entity:
        """Return one key, without its secret, which is not stored."""
        return await self._context.get("key", key_id)

    async def list_by_id(self, after: str, limit: int, wanted: KeyFilter | None = None) -> list[Entity]:
        """List keys, ordered by id."""
        filters = self._filters(wanted or KeyFilter())
        if filters is None:
            return []
        return await self._context.list_entities("key", "keys", after, limit, *filters)

    async def list_by_time(
        self, order: str, cursor: str | None, limit: int, wanted: KeyFilter | None = None
    ) -> EntityPage:
        """List keys in one of ORDERS, oldest first. `cursor`: the previous page's `next`, None for the first page."""
        if order not in ORDERS:
            raise Invalid(f"unknown order of keys {order!r}; valid orders: {', '.join(ORDERS)}")
        match = _CURSOR.fullmatch("-infinity/" if cursor is None else cursor)
        if match is None:
            raise Invalid(f"invalid cursor {cursor!r} for a list of keys")
        filters = self._filters(wanted or KeyFilter())
        if filters is None:
            return EntityPage([], None)
        rows = await self._context.fetch("keys_by_time", match[2], limit, *filters, order, match[1])
        following = None
        if len(rows) == limit > 0:
            following = f"{rows[-1]['cursor']}/{rows[-1]['id']}"
        return EntityPage([ENTITIES["key"](row) for row in rows], following)

    async def change(self, key_id: str, changes: Mapping[str, Any], *, if_match: str | None = None) -> Entity:
        """Change `name`, `plan` (None removes it), `scopes`, `roles` or `acts_for`. Return the key, with `warnings`."""
        return await self._context.change("key", key_id, changes, if_match)

    async def rotate(
        self, key_id: str, *, grace: timedelta, expires_in: timedelta | None, if_match: str | None = None
    ) -> Entity:
        """Replace a key by a new one. The old key works for `grace` longer, or until its expiry if that is sooner.

        The new key takes over user, scopes, roles, acts_for, mode, plan and name, and both share one pool of limits.
        `expires_in`: the lifetime of the new key, None for ever; a key that never expires is replaced by one that never
        expires. Return the new key with its `secret` and the `old_expires_at` of the old one. Raises Conflict if the key
        is revoked, has expired, or has a working successor: of several concurrent rotations, exactly one succeeds.
        """
        if grace < timedelta(0):
            raise Invalid("the grace period must not be negative")
        new_id = new_key_id()
        async with self._context.transaction() as transaction:
            old = await self._context.lock(transaction, "key", key_id, if_match)
            if old["state"] in ("revoked", "expired"):
                end = "was revoked" if old["state"] == "revoked" else "has expired"
                raise Conflict(f"key {key_id!r} {end}: issue a new one")
            successor = await transaction.fetch_row("successor_of_key", key_id)
            if successor is not None:
                raise Conflict(f"key {key_id!r} was rotated already: {successor['id']!r} replaces it")
            secret = self._context.new_secret(is_test=old["is_test"])
            life = None if old["expires_at"] is None else lifetime(expires_in)
            hint = self._context.key_format.hint(secret)
            await transaction.fetch("replace_key", key_id, new_id, secret.digest(), hint, life)
            retired = await transaction.fetch_row("retire_key", key_id, grace)
            row = await transaction.fetch_row("key", new_id)
        if row is None or retired is None:
            raise NotFound(f"there is no key {key_id!r}")
        return {
            **ENTITIES["key"](row),
            "secret": reveal(secret),
            "old_expires_at": time_text(retired["expires_at"]),
        }

    async def revoke(self, key_id: str, reason: str, *, if_match: str | None = None) -> Entity:
        """Revoke a key permanently. A revoked key stays unchanged."""
        async with self._context.transaction() as transaction:
            await self._context.lock(transaction, "key", key_id, if_match)
            await transaction.fetch("revoke_key", key_id, reason)
        return await self.get(key_id)

    async def suspend(self, key_id: str, reason: str, *, if_match: str | None = None) -> Entity:
        """Suspend a key until it is resumed. A suspended key stays unchanged.

        Raises Conflict if it is revoked or has expired.
        """
        async with self._context.transaction() as transaction:
            key = await self._context.lock(transaction, "key", key_id, if_match)
            if key["state"] in ("revoked", "expired"):
                end = "was revoked" if key["state"] == "revoked" else "has expired"
                raise Conflict(f"key {key_id!r} {end}: it cannot be suspended")
            await transaction.fetch("suspend_key", key_id, reason)
        return await self.get(key_id)

    async def resume(self, key_id: str, *, if_match: str | None = None) -> Entity:
        """Resume a suspended key. A key that is not suspended stays unchanged."""
        async with self._context.transaction() as transaction:
            await self._context.lock(transaction, "key", key_id, if_match)
            await transaction.fetch("resume_key", key_id)
        return await self.get(key_id)

    async def delete(self, key_id: str, *, if_match: str | None = None) -> Entity:
        """Delete a key. Unlike a revoked one, a deleted key leaves no row in the table."""
        return await self._context.delete("key", key_id, if_match)

    def _filters(self, wanted: KeyFilter) -> tuple[object, ...] | None:
        may_be, tenant = self._context.tenant_filter(wanted.tenant)
        if not may_be:
            return None
        times = (wanted.older_than, wanted.unused_for, wanted.expires_within)
        return (wanted.user, tenant, wanted.is_test, wanted.state, *times)
