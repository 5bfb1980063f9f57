"""The entities of the directory: their rows as JSON values, their versions, and the values that requests pass."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NamedTuple

from keyproxy.auth.api_key import SecretKey
from keyproxy.auth.base62 import ALPHABET
from keyproxy.store.directory.errors import Invalid
from keyproxy.store.directory.oauth.oauth_entities import OAUTH_ENTITIES
from keyproxy.store.postgres.database import Row
from keyproxy.store.postgres.json_values import read_json
from keyproxy.store.postgres.times import time_text

Entity = dict[str, Any]

#: The users that a key may act for, besides its owner: none, or those of its tenant.
ACTS_FOR: Final = ("none", "tenant")
ACTS_FOR_NONE: Final = "none"

#: The length of the random part of an id.
_ID_DIGITS: Final = 20
_LIFE_MAX: Final = timedelta(days=36_525)

#: Fields that an ETag does not cover: those that traffic writes, and those that are computed on reading.
_NOT_VERSIONED: Final = frozenset(
    {
        "last_used_at",
        "users",
        "keys",
        "tenants",
        "agents",
        "tokens",
        "grants",
        "sessions",
        "state",
        "created",
        "changed",
        "previous",
        "secret",
        "key",
        "warnings",
    }
)


@dataclass(frozen=True, slots=True)
class Actor:
    """The author of changes, for the audit log: a name, and the origin of the request."""

    name: str
    origin: str


@dataclass(frozen=True, slots=True)
class KeyWish:
    """The properties of a new key. `expires_in` None: it never expires. `plan` None: it has no limits of its own.

    `acts_for`: one of ACTS_FOR.
    """

    name: str = ""
    scopes: Sequence[str] = ()
    is_test: bool = False
    expires_in: timedelta | None = None
    plan: str | None = None
    roles: Sequence[str] = ()
    acts_for: str = ACTS_FOR_NONE


class EntityPage(NamedTuple):
    """A page of a list. `next` is the cursor of the next page; None after the last one."""

    items: list[Entity]
    next: str | None


def etag(entity: Mapping[str, Any]) -> str:
    """The version of an entity, for If-Match: differs after every change to it."""
    kept = {name: value for name, value in entity.items() if name not in _NOT_VERSIONED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def with_warnings(entity: Entity, warnings: Sequence[str]) -> Entity:
    """The entity, with `warnings` if there are any."""
    return {**entity, "warnings": list(warnings)} if warnings else entity


def new_key_id() -> str:
    """A new, random id for a key."""
    return "key_" + random_digits()


def random_digits(count: int = _ID_DIGITS) -> str:
    """The random part of a new id."""
    return "".join(chr(secrets.choice(ALPHABET)) for _ in range(count))


def lifetime(expires_in: timedelta | None) -> timedelta | None:
    """Check that a lifetime is positive and at most 100 years. Raises Invalid."""
    if expires_in is not None and not timedelta(0) < expires_in <= _LIFE_MAX:
        raise Invalid("the lifetime of a key must be positive and at most 100 years")
    return expires_in


def reveal(secret: SecretKey) -> str:
    """The plaintext of a key that was just created, for the response to the caller."""
    return secret.reveal().decode("ascii")


def _tenant(row: Row) -> Entity:
    return {
        "id": row["id"],
        "name": row["name"],
        "plan": row["plan_id"],
        "test_plan": row["test_plan_id"],
        "roles": None if row["roles"] is None else list(row["roles"]),
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
        "roles": None if row["roles"] is None else list(row["roles"]),
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
        "roles": list(row["roles"]),
        "acts_for": row["acts_for"],
        "is_test": row["is_test"],
        "plan": row["plan_id"],
        "created_at": time_text(row["created_at"]),
        "expires_at": time_text(row["expires_at"]),
        "revoked_at": time_text(row["revoked_at"]),
        "revoke_reason": row["revoke_reason"],
        "suspended_at": time_text(row["suspended_at"]),
        "suspend_reason": row["suspend_reason"],
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
        "agents": row["agents"],
        "grants": row["grants"],
    }


def _role(row: Row) -> Entity:
    return {
        "id": row["id"],
        "scopes": list(row["scopes"]),
        "created_at": time_text(row["created_at"]),
        "tenants": row["tenants"],
        "users": row["users"],
        "keys": row["keys"],
        "agents": row["agents"],
    }


def _owned(row: Row) -> Entity:
    return {
        "kind": row["kind"],
        "id": row["id"],
        "tenant": row["tenant_id"],
        "created_at": time_text(row["created_at"]),
    }


def _template(row: Row) -> Entity:
    return {
        "digest": row["digest"].hex(),
        "category": row["category"],
        "name": row["name"],
        "tenant": row["tenant_id"],
        "created_at": time_text(row["created_at"]),
    }


def _agent(row: Row) -> Entity:
    return {
        "id": row["id"],
        "user": row["user_id"],
        "tenant": row["tenant_id"],
        "roles": None if row["roles"] is None else list(row["roles"]),
        "plan": row["plan_id"],
        "disabled_at": time_text(row["disabled_at"]),
        "created_at": time_text(row["created_at"]),
        "tokens": row["tokens"],
    }


def _agent_token(row: Row) -> Entity:
    return {
        "id": row["id"],
        "agent": row["agent_id"],
        "user": row["user_id"],
        "tenant": row["tenant_id"],
        "key": row["root_key_id"],
        "actor": row["actor_user_id"],
        "parent": row["parent_token_id"],
        "scopes": list(row["scopes"]),
        "token_budget": row["token_budget"],
        "request_budget": row["request_budget"],
        "audience": row["audience"],
        "is_test": row["is_test"],
        "depth": row["depth"],
        "created_at": time_text(row["created_at"]),
        "expires_at": time_text(row["expires_at"]),
        "revoked_at": time_text(row["revoked_at"]),
        "revoke_reason": row["revoke_reason"],
    }


def _approval(row: Row) -> Entity:
    return {
        "id": row["id"],
        "state": row["state"],
        "kind": row["kind"],
        "tool": row["tool"],
        "tenant": row["tenant_id"],
        "user": row["user_id"],
        "key": row["key_id"],
        "agent": row["agent_id"],
        "client": row["client"],
        "summary": read_json(row["summary"]),
        "call_digest": row["call_digest"].hex(),
        "created_at": time_text(row["created_at"]),
        "expires_at": time_text(row["expires_at"]),
        "decided_at": time_text(row["decided_at"]),
        "decided_by": row["decided_by"],
        "reason": row["reason"],
        "used_at": time_text(row["used_at"]),
    }


def _consent(row: Row) -> Entity:
    return {
        "id": row["id"],
        "state": row["state"],
        "user": row["user_id"],
        "tenant": row["tenant_id"],
        "tool": row["tool"],
        "agent": row["agent_id"],
        "granted_by": row["granted_by"],
        "created_at": time_text(row["created_at"]),
        "expires_at": time_text(row["expires_at"]),
        "revoked_at": time_text(row["revoked_at"]),
    }


def _provider_key(row: Row) -> Entity:
    return {
        "id": row["id"],
        "provider": row["provider"],
        "tenant": row["tenant_id"],
        "is_test": row["is_test"],
        "state": row["state"],
        "hint": row["hint"],
        "sealed_with": row["sealed_with"],
        "starts_at": time_text(row["starts_at"]),
        "ends_at": time_text(row["ends_at"]),
        "revoked_at": time_text(row["revoked_at"]),
        "checked_at": time_text(row["checked_at"]),
        "check_status": row["check_status"],
        "created_at": time_text(row["created_at"]),
    }


#: Convert a row of each kind to an entity.
ENTITIES: Final = {
    "tenant": _tenant,
    "user": _user,
    "key": _key,
    "plan": _plan,
    "role": _role,
    "owned": _owned,
    "template": _template,
    "agent": _agent,
    "agent_token": _agent_token,
    "approval": _approval,
    "consent": _consent,
    "provider_key": _provider_key,
    **OAUTH_ENTITIES,
}

#: The fields of each kind that can be changed.
CHANGEABLE: Final = {
    "tenant": frozenset({"name", "plan", "test_plan", "roles", "disabled"}),
    "user": frozenset({"plan", "test_plan", "roles", "disabled"}),
    "key": frozenset({"name", "plan", "scopes", "roles", "acts_for"}),
    "agent": frozenset({"plan", "roles", "disabled"}),
    "client": frozenset({"disabled"}),
    "grant": frozenset({"plan"}),
}
