"""What tokens of the admin API may do.

A scope names a kind of thing and whether it may be read or changed. `admin:read` reads everything, `admin:write` may do
everything. Writing does not imply reading: a provisioning job that creates users need not see those of others.
`tenant:acme` is a bound rather than a right: the token sees and touches that tenant alone.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, NamedTuple


class Scope(enum.StrEnum):
    """What a token may do."""

    ADMIN_READ = "admin:read"
    ADMIN_WRITE = "admin:write"
    KEYS_READ = "keys:read"
    KEYS_WRITE = "keys:write"
    USERS_WRITE = "users:write"
    PLANS_WRITE = "plans:write"
    AUDIT_READ = "audit:read"
    USAGE_READ = "usage:read"
    LEAKS_WRITE = "leaks:write"
    METRICS_READ = "metrics:read"


TELLS: Final = {
    Scope.ADMIN_READ: "reads everything",
    Scope.ADMIN_WRITE: "may do everything",
    Scope.KEYS_READ: "reads tenants, users, keys and plans",
    Scope.KEYS_WRITE: "issues, imports, changes, rotates, revokes and deletes keys",
    Scope.USERS_WRITE: "creates users with their first key, changes and deletes them",
    Scope.PLANS_WRITE: "makes, changes and deletes plans",
    Scope.AUDIT_READ: "reads the audit log",
    Scope.USAGE_READ: "reads usage, how limits stand, and what would become of a request",
    Scope.LEAKS_WRITE: "reports leaked keys",
    Scope.METRICS_READ: "reads the metrics of the admin process",
}

_TENANT: Final = "tenant:"


class InvalidScopes(ValueError):
    """Scopes that no token can have. The text says why."""


class Granted(NamedTuple):
    """Scopes, and the tenant they are bound to."""

    scopes: list[str]
    tenant: str | None


def read(texts: Sequence[str]) -> Granted:
    """Scopes as they are written on the command line, each once. Raises InvalidScopes."""
    tenants = {text.removeprefix(_TENANT) for text in texts if text.startswith(_TENANT)}
    scopes = list(dict.fromkeys(text for text in texts if not text.startswith(_TENANT)))
    unknown = [text for text in scopes if text not in set(Scope)]
    if unknown:
        raise InvalidScopes(f"{unknown[0]!r} is not a scope; the scopes are {', '.join(Scope)} and tenant:ID")
    if len(tenants) > 1:
        raise InvalidScopes("a token is bound to one tenant at most")
    if not scopes:
        raise InvalidScopes("a token without any scope may do nothing")
    tenant = tenants.pop() if tenants else None
    if tenant == "":
        raise InvalidScopes("tenant: is followed by the id of a tenant")
    return Granted(scopes, tenant)


def allows(held: Sequence[str], needed: Scope) -> bool:
    """Whether who holds these scopes may do what needs that one."""
    if needed in held or Scope.ADMIN_WRITE in held:
        return True
    return needed.endswith(":read") and Scope.ADMIN_READ in held
