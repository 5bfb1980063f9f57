"""Tenants, users and keys: what people change. Every change is one transaction, with its audit rows in it.

Provisioning is idempotent: who is created again is found, and gets no second key. The plaintext of a key exists in the
return value of the call that made it, and nowhere else.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import MAXYEAR, MINYEAR, UTC, datetime, timedelta
from typing import Any, Final

from keyproxy.keyformat import ALPHABET, ENTROPY_BYTES, KeyFormat, SecretKey
from keyproxy.store.database import Database, Row, StoreConflict

_ID_DIGITS: Final = 20

Entity = dict[str, Any]


class DirectoryError(Exception):
    """The change was refused, or there is no such thing. The text says it in one sentence."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, for the audit log: a name, and where they act from."""

    name: str
    origin: str


@dataclass(frozen=True, slots=True)
class KeyWish:
    """What a key is to be. `expires_in` None: never."""

    name: str = ""
    scopes: Sequence[str] = ()
    is_test: bool = False
    expires_in: timedelta | None = None


class Directory:
    """See the module. All methods raise DirectoryError, StoreConflict or StoreUnavailable."""

    def __init__(self, database: Database, key_format: KeyFormat, actor: Actor) -> None:
        self._database = database
        self._format = key_format
        self._actor = actor

    # -- tenants

    async def create_tenant(self, tenant_id: str, name: str) -> Entity:
        """The tenant, new or as it was."""
        row = await self._change("create_tenant", tenant_id, name)
        return {**(_tenant(row) if row is not None else await self.tenant(tenant_id)), "created": row is not None}

    async def tenant(self, tenant_id: str) -> Entity:
        """One tenant, with the number of its users."""
        row = await self._one("tenant", tenant_id)
        if row is None:
            raise DirectoryError(f"there is no tenant {tenant_id!r}")
        return {**_tenant(row), "users": row["users"]}

    async def tenants(self, after: str, limit: int) -> list[Entity]:
        """Tenants in the order of their ids."""
        return [_tenant(row) for row in await self._database.fetch("tenants", after, limit)]

    async def delete_tenant(self, tenant_id: str) -> Entity:
        """Delete a tenant with its users and their keys."""
        return await self._delete("delete_tenant", "tenant", tenant_id)

    # -- users

    async def create_user(self, user_id: str, tenant_id: str, first_key: KeyWish | None) -> Entity:
        """The user, new or as it was; a new one with its first key, unless `first_key` is None."""
        secret = self._new_secret(is_test=False) if first_key is not None else None
        wish = first_key or KeyWish()
        key_id = _new_id() if secret is not None else None
        try:
            row = await self._change(
                "create_user", user_id, tenant_id, key_id,
                secret.digest() if secret is not None else None,
                self._format.hint(secret) if secret is not None else None,
                wish.name, list(wish.scopes), _expiry(wish),
            )  # fmt: skip
        except StoreConflict as error:
            if error.constraint.startswith("users_tenant_id"):
                raise DirectoryError(f"there is no tenant {tenant_id!r}: create it first") from error
            raise
        if row is None:
            user = await self.user(user_id)
            if user["tenant"] != tenant_id:
                raise DirectoryError(f"user {user_id!r} exists and belongs to tenant {user['tenant']!r}")
            return {**user, "created": False, "key": None}
        key = None
        if key_id is not None and secret is not None:
            key = {**await self.key(key_id), "secret": secret.reveal().decode("ascii")}
        return {**_user(row), "created": True, "key": key}

    async def user(self, user_id: str) -> Entity:
        """One user, with the number of its keys."""
        row = await self._one("user", user_id)
        if row is None:
            raise DirectoryError(f"there is no user {user_id!r}")
        return {**_user(row), "keys": row["keys"]}

    async def users(self, after: str, limit: int, tenant_id: str | None) -> list[Entity]:
        """Users in the order of their ids."""
        return [_user(row) for row in await self._database.fetch("users", after, limit, tenant_id)]

    async def delete_user(self, user_id: str) -> Entity:
        """Delete a user with all keys."""
        return await self._delete("delete_user", "user", user_id)

    # -- keys

    async def issue_key(self, user_id: str, wish: KeyWish) -> Entity:
        """A new key, with its secret."""
        secret = self._new_secret(is_test=wish.is_test)
        row = await self._change(
            "issue_key", _new_id(), user_id, secret.digest(), self._format.hint(secret), wish.name,
            list(wish.scopes), wish.is_test, _expiry(wish),
        )  # fmt: skip
        if row is None:
            raise DirectoryError(f"there is no user {user_id!r}: create it first")
        return {**await self.key(row["id"]), "secret": secret.reveal().decode("ascii")}

    async def key(self, key_id: str) -> Entity:
        """One key, without its secret, which nobody has."""
        row = await self._one("key", key_id)
        if row is None:
            raise DirectoryError(f"there is no key {key_id!r}")
        return _key(row)

    async def keys(self, after: str, limit: int, *, user_id: str | None, tenant_id: str | None) -> list[Entity]:
        """Keys in the order of their ids."""
        return [_key(row) for row in await self._database.fetch("keys", after, limit, user_id, tenant_id)]

    async def revoke_key(self, key_id: str, reason: str) -> Entity:
        """Revoke a key for good. One that is revoked already stays as it is."""
        if await self._change("revoke_key", key_id, reason) is None:
            raise DirectoryError(f"there is no key {key_id!r}")
        return await self.key(key_id)

    async def delete_key(self, key_id: str) -> Entity:
        """Delete a key."""
        return await self._delete("delete_key", "key", key_id)

    # -- the rest

    async def _one(self, name: str, *arguments: object) -> Row | None:
        rows = await self._database.fetch(name, *arguments)
        return rows[0] if rows else None

    async def _change(self, name: str, *arguments: object) -> Row | None:
        async with self._database.transaction() as transaction:
            await transaction.fetch("say_who_acts", self._actor.name, self._actor.origin)
            return await transaction.fetch_row(name, *arguments)

    async def _delete(self, statement: str, kind: str, subject: str) -> Entity:
        if await self._change(statement, subject) is None:
            raise DirectoryError(f"there is no {kind} {subject!r}")
        return {"id": subject, "deleted": True}

    def _new_secret(self, *, is_test: bool) -> SecretKey:
        return self._format.make(secrets.token_bytes(ENTROPY_BYTES), is_test=is_test)


def _new_id() -> str:
    return "key_" + "".join(chr(secrets.choice(ALPHABET)) for _ in range(_ID_DIGITS))


def _expiry(wish: KeyWish) -> datetime | None:
    return None if wish.expires_in is None else datetime.now(UTC) + wish.expires_in


def _time(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    if moment.year in (MINYEAR, MAXYEAR):
        # How asyncpg shows the timestamps that are infinite.
        return "infinity" if moment.year == MAXYEAR else "-infinity"
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _tenant(row: Row) -> Entity:
    return {
        "id": row["id"],
        "name": row["name"],
        "plan": row["plan_id"],
        "disabled_at": _time(row["disabled_at"]),
        "created_at": _time(row["created_at"]),
    }


def _user(row: Row) -> Entity:
    return {
        "id": row["id"],
        "tenant": row["tenant_id"],
        "plan": row["plan_id"],
        "disabled_at": _time(row["disabled_at"]),
        "created_at": _time(row["created_at"]),
    }


def _key(row: Row) -> Entity:
    return {
        "id": row["id"],
        "user": row["user_id"],
        "tenant": row["tenant_id"],
        "hint": row["hint"],
        "name": row["name"],
        "scopes": list(row["scopes"]),
        "is_test": row["is_test"],
        "plan": row["plan_id"],
        "created_at": _time(row["created_at"]),
        "expires_at": _time(row["expires_at"]),
        "revoked_at": _time(row["revoked_at"]),
        "revoke_reason": row["revoke_reason"],
        "replaces": row["replaces"],
        "last_used_at": _time(row["last_used_at"]),
    }
