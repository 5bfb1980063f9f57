"""Issue, list, change, rotate, revoke and delete keys; report them as leaked."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from keyproxy.auth.api_key import SecretKey
from keyproxy.store.directory.base import (
    ENTITIES,
    Conflict,
    DirectoryBase,
    Entity,
    Invalid,
    KeyWish,
    NotFound,
    Page,
    lifetime,
    new_key_id,
    reveal,
)
from keyproxy.store.identities import drf_api_keys
from keyproxy.store.postgres.database import Row
from keyproxy.store.postgres.times import time_text

STATES: Final = ("active", "retiring", "disabled", "expired", "revoked")

#: The times that keys can be ordered by, oldest first. A key that was never used comes first, one that never expires
#: comes last.
ORDERS: Final = ("created", "used", "expires")

_NOBODYS: Final[Entity] = {"known": False, "revoked_now": False, "user": None, "tenant": None, "key": None}

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


class Keys(DirectoryBase):
    """The operations on single keys."""

    async def issue_key(self, user_id: str, wish: KeyWish) -> Entity:
        """Issue a key, and return it with its secret."""
        secret, key_id = self._new_secret(is_test=wish.is_test), new_key_id()
        async with self._acting(wish.plan) as transaction:
            if self._bound_to is not None:
                await self._held(transaction, "user", user_id, None)
            row = await transaction.fetch_row(
                "issue_key", key_id, user_id, secret.digest(), self._format.hint(secret), wish.name,
                list(wish.scopes), wish.is_test, lifetime(wish.expires_in), wish.plan,
            )  # fmt: skip
        if row is None:
            raise NotFound(f"there is no user {user_id!r}: create it first")
        return {**await self.key(key_id), "secret": reveal(secret)}

    async def key(self, key_id: str) -> Entity:
        """Return one key, without its secret, which is not stored."""
        return await self._thing("key", key_id)

    async def keys(self, after: str, limit: int, wanted: KeyFilter | None = None) -> list[Entity]:
        """List keys, ordered by id."""
        filters = self._filters(wanted or KeyFilter())
        if filters is None:
            return []
        return await self._list("key", "keys", after, limit, *filters)

    async def keys_by_time(self, order: str, cursor: str | None, limit: int, wanted: KeyFilter | None = None) -> Page:
        """List keys in one of ORDERS, oldest first. `cursor`: the previous page's `next`, None for the first page."""
        if order not in ORDERS:
            raise Invalid(f"unknown order of keys {order!r}; valid orders: {', '.join(ORDERS)}")
        match = _CURSOR.fullmatch("-infinity/" if cursor is None else cursor)
        if match is None:
            raise Invalid(f"invalid cursor {cursor!r} for a list of keys")
        filters = self._filters(wanted or KeyFilter())
        if filters is None:
            return Page([], None)
        rows = await self._database.fetch("keys_by_time", match[2], limit, *filters, order, match[1])
        following = None
        if len(rows) == limit > 0:
            following = f"{rows[-1]['cursor']}/{rows[-1]['id']}"
        return Page([ENTITIES["key"](row) for row in rows], following)

    async def change_key(self, key_id: str, changes: Mapping[str, Any], *, if_match: str | None = None) -> Entity:
        """Change `name`, `plan` (None removes it) or `scopes`, and return the changed key."""
        return await self._change("key", key_id, changes, if_match)

    async def rotate_key(
        self, key_id: str, *, grace: timedelta, expires_in: timedelta | None, if_match: str | None = None
    ) -> Entity:
        """Replace a key by a new one. The old key works for `grace` longer, or until its expiry if that is sooner.

        The new key takes over user, scopes, mode, plan and name, and both share one pool of limits. `expires_in`: the
        lifetime of the new key, None for ever; a key that never expires is replaced by one that never expires. Return the
        new key with its `secret` and the `old_expires_at` of the old one. Raises Conflict if the key is revoked, has
        expired, or has a working successor: of several concurrent rotations, exactly one succeeds.
        """
        if grace < timedelta(0):
            raise Invalid("the grace period must not be negative")
        new_id = new_key_id()
        async with self._acting() as transaction:
            old = await self._held(transaction, "key", key_id, if_match)
            if old["state"] in ("revoked", "expired"):
                told = "was revoked" if old["state"] == "revoked" else "has expired"
                raise Conflict(f"key {key_id!r} {told}: issue a new one")
            successor = await transaction.fetch_row("successor_of_key", key_id)
            if successor is not None:
                raise Conflict(f"key {key_id!r} was rotated already: {successor['id']!r} replaces it")
            secret = self._new_secret(is_test=old["is_test"])
            life = None if old["expires_at"] is None else lifetime(expires_in)
            await transaction.fetch(
                "replace_key", key_id, new_id, secret.digest(), self._format.hint(secret), life
            )  # fmt: skip
            retired = await transaction.fetch_row("retire_key", key_id, grace)
            row = await transaction.fetch_row("key", new_id)
        if row is None or retired is None:
            raise NotFound(f"there is no key {key_id!r}")
        return {
            **ENTITIES["key"](row),
            "secret": reveal(secret),
            "old_expires_at": time_text(retired["expires_at"]),
        }

    async def revoke_key(self, key_id: str, reason: str, *, if_match: str | None = None) -> Entity:
        """Revoke a key permanently. A revoked key stays unchanged."""
        async with self._acting() as transaction:
            await self._held(transaction, "key", key_id, if_match)
            await transaction.fetch("revoke_key", key_id, reason)
        return await self.key(key_id)

    async def report_leaked(self, digest: bytes, reason: str) -> Entity:
        """Revoke the leaked key with this SHA-256 digest (32 bytes), and return its owner.

        `known`: whether there is such a key. `revoked_now`: whether this call revoked it.
        """
        if len(digest) != 32:
            raise Invalid("the digest of a key must have 32 bytes (64 hexadecimal digits)")
        return await self._leaked(await self._one("key_of_digest", digest), reason)

    async def report_leaked_key(self, key: SecretKey, reason: str) -> Entity:
        """As `report_leaked`, for a key in plaintext: an imported key may not have its digest stored yet."""
        row = await self._one("key_of_digest", key.digest())
        prefix = drf_api_keys.prefix_of(key)
        if row is None and prefix is not None:
            recipe = await self._one("foreign_recipe", prefix)
            shown = None if recipe is None else await asyncio.to_thread(drf_api_keys.hashed, key, recipe["recipe"])
            row = None if shown is None else await self._one("key_of_foreign", prefix, shown)
        return await self._leaked(row, reason)

    async def _leaked(self, row: Row | None, reason: str) -> Entity:
        if row is None:
            return dict(_NOBODYS)
        try:
            async with self._acting() as transaction:
                before = await self._held(transaction, "key", row["id"], None)
                await transaction.fetch("revoke_key", row["id"], reason)
        except NotFound:
            # Deleted meanwhile, or another tenant's: this directory cannot see the key.
            return dict(_NOBODYS)
        key = await self.key(row["id"])
        return {
            "known": True,
            "revoked_now": before["revoked_at"] is None,
            "user": key["user"],
            "tenant": key["tenant"],
            "key": key,
        }

    async def delete_key(self, key_id: str, *, if_match: str | None = None) -> Entity:
        """Delete a key. Unlike a revoked one, a deleted key leaves no row in the table."""
        return await self._delete("key", key_id, if_match)

    def _filters(self, wanted: KeyFilter) -> tuple[object, ...] | None:
        may_be, tenant = self._only_tenant(wanted.tenant)
        if not may_be:
            return None
        return (
            wanted.user, tenant, wanted.is_test, wanted.state, wanted.older_than, wanted.unused_for,
            wanted.expires_within,
        )  # fmt: skip
