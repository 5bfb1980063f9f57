"""Scopes of admin API tokens.

A scope names a kind of object and read or write access. `admin:read` reads everything, `admin:write` grants everything.
Write access does not imply read access: a provisioning job that creates users need not see other users. It can list only
what it names and may change anyway: the users of one tenant, or the keys of one user.
`tenant:acme` restricts rather than grants: the token reads and changes that tenant only.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, NamedTuple


class Scope(enum.StrEnum):
    """A permission of a token."""

    ADMIN_READ = "admin:read"
    ADMIN_WRITE = "admin:write"
    KEYS_READ = "keys:read"
    KEYS_WRITE = "keys:write"
    USERS_WRITE = "users:write"
    PLANS_WRITE = "plans:write"
    ACCESS_WRITE = "access:write"
    APPROVALS_READ = "approvals:read"
    APPROVALS_WRITE = "approvals:write"
    APPROVALS_ADMIN = "approvals:admin"
    AUDIT_READ = "audit:read"
    USAGE_READ = "usage:read"
    LEAKS_WRITE = "leaks:write"
    PROVIDERS_READ = "providers:read"
    PROVIDERS_WRITE = "providers:write"
    OAUTH_READ = "oauth:read"
    OAUTH_WRITE = "oauth:write"
    METRICS_READ = "metrics:read"
    TOKENS_READ = "tokens:read"


DESCRIPTIONS: Final = {
    Scope.ADMIN_READ: "reads everything",
    Scope.ADMIN_WRITE: "grants all scopes",
    Scope.KEYS_READ: "reads tenants, users, keys, agents, plans, roles, owned ids and prompt templates",
    Scope.KEYS_WRITE: (
        "issues, imports, changes, rotates, suspends, revokes and deletes keys, and lists those of one user;"
        " changes agents; mints and revokes tokens"
    ),
    Scope.USERS_WRITE: "creates users with their first key, changes and deletes them, and lists those of one tenant",
    Scope.PLANS_WRITE: "creates, changes and deletes plans, and credits windows",
    Scope.ACCESS_WRITE: "changes roles, owned ids and prompt templates",
    Scope.APPROVALS_READ: "reads approvals of calls, and consents",
    Scope.APPROVALS_WRITE: "decides on calls of kind consent and human, and grants and revokes consents",
    Scope.APPROVALS_ADMIN: "decides on calls of kind admin too, on a token without tenant; includes approvals:write",
    Scope.AUDIT_READ: "reads the audit log",
    Scope.USAGE_READ: "reads usage, the state of limits, and explanations of requests",
    Scope.LEAKS_WRITE: "reports leaked keys and tokens",
    Scope.PROVIDERS_READ: "reads provider keys, without their secrets",
    Scope.PROVIDERS_WRITE: "adds, rotates, revokes, deletes and reseals provider keys",
    Scope.OAUTH_READ: "reads OAuth clients, grants, sessions and linked accounts",
    Scope.OAUTH_WRITE: "registers, disables and deletes OAuth clients; revokes grants and sessions; links accounts",
    Scope.METRICS_READ: "reads the metrics of the admin process",
    Scope.TOKENS_READ: "introspects OAuth access tokens at the authorization server",
}

_TENANT: Final = "tenant:"


class InvalidScopes(ValueError):
    """Invalid scopes for a token. The text is the reason."""


class Granted(NamedTuple):
    """Scopes, and the tenant that they are restricted to."""

    scopes: list[str]
    tenant: str | None


def read(texts: Sequence[str]) -> Granted:
    """Parse scopes from the command line and remove duplicates. Raises InvalidScopes."""
    tenants = {text.removeprefix(_TENANT) for text in texts if text.startswith(_TENANT)}
    scopes = list(dict.fromkeys(text for text in texts if not text.startswith(_TENANT)))
    unknown = [text for text in scopes if text not in set(Scope)]
    if unknown:
        raise InvalidScopes(f"{unknown[0]!r} is not a scope; the scopes are {', '.join(Scope)} and tenant:ID")
    if len(tenants) > 1:
        raise InvalidScopes("a token can be restricted to one tenant only")
    if not scopes:
        raise InvalidScopes("a token needs at least one scope besides tenant:ID")
    tenant = tenants.pop() if tenants else None
    if tenant == "":
        raise InvalidScopes("tenant: must be followed by a tenant's id")
    return Granted(scopes, tenant)


def allows(held: Sequence[str], needed: Scope) -> bool:
    """Whether these scopes include the required one."""
    if needed in held or Scope.ADMIN_WRITE in held:
        return True
    if needed == Scope.APPROVALS_WRITE and Scope.APPROVALS_ADMIN in held:
        return True
    return needed.endswith(":read") and Scope.ADMIN_READ in held
