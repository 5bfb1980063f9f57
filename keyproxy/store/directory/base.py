"""The base of all directory operations: the actor, the tenant binding, and transactions that include their audit rows.

A directory may be bound to one tenant. Then nothing outside that tenant can be read or changed; it is reported as not
found. The rule is implemented once, here, so that callers cannot forget it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NamedTuple

from keyproxy.auth.api_key import ALPHABET, ENTROPY_BYTES, KeyFormat, SecretKey
from keyproxy.store.postgres.database import Door, Row, StoreConflict, Transaction
from keyproxy.store.postgres.json_values import read_json
from keyproxy.store.postgres.times import time_text

Entity = dict[str, Any]

_ID_DIGITS: Final = 20
_LIFE_MAX: Final = timedelta(days=36_525)

#: Fields that an ETag does not cover: those that traffic writes, and those that are computed on reading.
_NOT_VERSIONED: Final = frozenset(
    {"last_used_at", "users", "keys", "tenants", "state", "created", "changed", "secret", "key"}
)

_ID_RULE: Final = (
    "an id starts with a letter or digit, contains only those and . _ : @ | + -, and has at most 128 characters"
)
_RULES: Final = (
    (re.compile(r"tenants_id_check|users_id_check|api_keys_id_check"), _ID_RULE),
    (re.compile(r"plans_id_check"), _ID_RULE.replace(" | +", "")),
    (re.compile(r"\w+_name_check"), "a name has at most 200 characters"),
    (re.compile(r"api_keys_revoke_reason_check"), "a reason has at most 500 characters"),
    (
        re.compile(r"api_keys_scopes_check"),
        "a scope is one word such as jobs:write, without wildcards, and a key has at most 64 of them",
    ),
)
_PLAN_REFERENCE = re.compile(r"\w+_plan_id_fkey")


class DirectoryError(Exception):
    """The operation was refused, or its subject does not exist. The text explains it in one sentence."""


class NotFound(DirectoryError):
    """It does not exist, or is outside the tenant that this directory is bound to."""


class Invalid(DirectoryError):
    """An argument is invalid: an id, a name, a scope, a limit."""


class Conflict(DirectoryError):
    """Its state does not allow the operation: already revoked, in use, owned by another user or tenant."""


class Outdated(DirectoryError):
    """It has changed since the caller read it: its ETag differs."""


@dataclass(frozen=True, slots=True)
class Actor:
    """The author of changes, for the audit log: a name, and the origin of the request."""

    name: str
    origin: str


@dataclass(frozen=True, slots=True)
class KeyWish:
    """The properties of a new key. `expires_in` None: it never expires. `plan` None: it has no limits of its own."""

    name: str = ""
    scopes: Sequence[str] = ()
    is_test: bool = False
    expires_in: timedelta | None = None
    plan: str | None = None


class Page(NamedTuple):
    """A page of a list. `next` is the cursor of the next page; None after the last one."""

    items: list[Entity]
    next: str | None


class DirectoryBase:
    """Shared operations. All methods of the directory raise DirectoryError, StoreConflict or StoreUnavailable."""

    def __init__(self, database: Door, key_format: KeyFormat, actor: Actor, *, tenant_id: str | None = None) -> None:
        """`tenant_id`: the tenant that this directory is bound to; None: it is not bound."""
        self._database = database
        self._format = key_format
        self._actor = actor
        self._bound_to = tenant_id

    async def _one(self, name: str, *arguments: object) -> Row | None:
        rows = await self._database.fetch(name, *arguments)
        return rows[0] if rows else None

    @contextlib.asynccontextmanager
    async def _acting(self, plan: str | None = None) -> AsyncIterator[Transaction]:
        """Open a transaction with the actor set for the audit log. `plan`: the assigned plan, for the error text."""
        try:
            async with self._database.transaction() as transaction:
                await transaction.fetch("say_who_acts", self._actor.name, self._actor.origin)
                yield transaction
        except StoreConflict as error:
            told = _told(error, plan)
            if told is None:
                raise
            raise told from error

    async def _held(self, transaction: Transaction, kind: str, subject: str, if_match: str | None) -> Entity:
        """Lock an entity until the transaction ends, and read it. Raises NotFound, or Outdated if `if_match` differs."""
        # Not read without the lock: another transaction could change a row that was created between the two statements.
        is_held = await transaction.fetch(f"hold_{kind}", subject)
        row = await transaction.fetch_row(kind, subject) if is_held else None
        entity = None if row is None else ENTITIES[kind](row)
        if entity is None or not self._sees(kind, entity):
            raise NotFound(f"there is no {kind} {subject!r}")
        if if_match is not None and if_match != etag(entity):
            raise Outdated(f"{kind} {subject!r} has changed since it was read")
        return entity

    def _sees(self, kind: str, entity: Mapping[str, Any]) -> bool:
        # Plans are shared by all tenants.
        if self._bound_to is None or kind == "plan":
            return True
        return bool(entity["id" if kind == "tenant" else "tenant"] == self._bound_to)

    def _only_tenant(self, wanted: str | None) -> tuple[bool, str | None]:
        """Return whether a list for this tenant can have rows, and the tenant to filter by."""
        if self._bound_to is None or wanted == self._bound_to:
            return True, wanted
        return wanted is None, self._bound_to

    def _must_be_unbound(self, act: str) -> None:
        if self._bound_to is not None:
            raise Conflict(f"an actor bound to tenant {self._bound_to!r} cannot {act}")

    async def _thing(self, kind: str, subject: str) -> Entity:
        row = await self._one(kind, subject)
        entity = None if row is None else ENTITIES[kind](row)
        if entity is None or not self._sees(kind, entity):
            raise NotFound(f"there is no {kind} {subject!r}")
        return entity

    async def _list(self, kind: str, statement: str, *arguments: object) -> list[Entity]:
        return [ENTITIES[kind](row) for row in await self._database.fetch(statement, *arguments)]

    async def _change(self, kind: str, subject: str, changes: Mapping[str, Any], if_match: str | None) -> Entity:
        """Apply changes with `change_<kind>`, and return the changed entity."""
        unknown = set(changes) - CHANGEABLE[kind]
        if unknown:
            raise Invalid(f"{min(unknown)} of a {kind} cannot be changed; {', '.join(sorted(CHANGEABLE[kind]))} can")
        plan = changes.get("plan") or changes.get("test_plan")
        async with self._acting(plan) as transaction:
            await self._held(transaction, kind, subject, if_match)
            await transaction.fetch(f"change_{kind}", subject, json.dumps(dict(changes)))
            row = await transaction.fetch_row(kind, subject)
            if row is None:
                raise NotFound(f"there is no {kind} {subject!r}")
            return ENTITIES[kind](row)

    async def _delete(self, kind: str, subject: str, if_match: str | None) -> Entity:
        async with self._acting() as transaction:
            await self._held(transaction, kind, subject, if_match)
            await transaction.fetch(f"delete_{kind}", subject)
        return {"id": subject, "deleted": True}

    def _new_secret(self, *, is_test: bool) -> SecretKey:
        return self._format.make(secrets.token_bytes(ENTROPY_BYTES), is_test=is_test)


def etag(entity: Mapping[str, Any]) -> str:
    """The version of an entity, for If-Match: differs after every change to it."""
    kept = {name: value for name, value in entity.items() if name not in _NOT_VERSIONED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def new_key_id() -> str:
    """A new, random id for a key."""
    return "key_" + "".join(chr(secrets.choice(ALPHABET)) for _ in range(_ID_DIGITS))


def lifetime(expires_in: timedelta | None) -> timedelta | None:
    """Check that a lifetime is positive and at most 100 years. Raises Invalid."""
    if expires_in is not None and not timedelta(0) < expires_in <= _LIFE_MAX:
        raise Invalid("the lifetime of a key must be positive and at most 100 years")
    return expires_in


def reveal(secret: SecretKey) -> str:
    """The plaintext of a key that was just created, for the response to the caller."""
    return secret.reveal().decode("ascii")


def _told(error: StoreConflict, plan: str | None) -> DirectoryError | None:
    if _PLAN_REFERENCE.fullmatch(error.constraint) and plan is not None:
        return NotFound(f"there is no plan {plan!r}")
    for pattern, sentence in _RULES:
        if pattern.fullmatch(error.constraint):
            return Invalid(sentence)
    return None


def _tenant(row: Row) -> Entity:
    return {
        "id": row["id"],
        "name": row["name"],
        "plan": row["plan_id"],
        "test_plan": row["test_plan_id"],
        "disabled_at": time_text(row["disabled_at"]),
        "created_at": time_text(row["created_at"]),
        "users": row["users"],
    }


def _user(row: Row) -> Entity:
    return {
        "id": row["id"],
        "tenant": row["tenant_id"],
        "plan": row["plan_id"],
        "test_plan": row["test_plan_id"],
        "disabled_at": time_text(row["disabled_at"]),
        "created_at": time_text(row["created_at"]),
        "keys": row["keys"],
    }


def _key(row: Row) -> Entity:
    return {
        "id": row["id"],
        "user": row["user_id"],
        "tenant": row["tenant_id"],
        "state": row["state"],
        "hint": row["hint"],
        "name": row["name"],
        "scopes": list(row["scopes"]),
        "is_test": row["is_test"],
        "plan": row["plan_id"],
        "created_at": time_text(row["created_at"]),
        "expires_at": time_text(row["expires_at"]),
        "revoked_at": time_text(row["revoked_at"]),
        "revoke_reason": row["revoke_reason"],
        "replaces": row["replaces"],
        "replaced_by": row["replaced_by"],
        "last_used_at": time_text(row["last_used_at"]),
    }


def _plan(row: Row) -> Entity:
    return {
        "id": row["id"],
        "limits": read_json(row["limits"]),
        "created_at": time_text(row["created_at"]),
        "tenants": row["tenants"],
        "users": row["users"],
        "keys": row["keys"],
    }


#: Convert a row of each kind to an entity.
ENTITIES: Final = {"tenant": _tenant, "user": _user, "key": _key, "plan": _plan}

#: The fields of each kind that can be changed.
CHANGEABLE: Final = {
    "tenant": frozenset({"name", "plan", "test_plan", "disabled"}),
    "user": frozenset({"plan", "test_plan", "disabled"}),
    "key": frozenset({"name", "plan", "scopes"}),
}
