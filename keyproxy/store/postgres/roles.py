"""Least-privilege PostgreSQL roles: for proxies, the admin API and commands, the authorization server, applications.

`<prefix>_proxy` reads keys, plans and changes, records when keys were last used, and writes the ledger and usage. It can
change no key, no plan and no audit row. `<prefix>_admin` changes the directory; it only reads the audit log, which
triggers write. `<prefix>_authorize` reads users and keys, and changes what belongs to OAuth alone. `<prefix>_app` is for
applications that create their users and keys themselves: it reads no digest, and sets neither plans nor roles. None owns
anything, so none can alter the schema or its triggers.

All may log in and have no password until one is set. Each run revokes all privileges and grants the lists below, so that
the roles have these and no others. A test fails if a table is missing from the list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from keyproxy.store.postgres import migrations
from keyproxy.store.postgres.failures import NO_RESPONSE
from keyproxy.store.postgres.migrations import MigrationError

_PREFIX = re.compile(r"[a-z_][a-z0-9_]{0,40}")
_ALL: Final = "SELECT, INSERT, UPDATE, DELETE"

#: Table: the privileges of proxies, those of the admin side. Empty: none.
RIGHTS: Final = {
    "migrations": ("SELECT", "SELECT"),
    "tenants": ("SELECT", _ALL),
    "users": ("SELECT", _ALL),
    "api_keys": ("SELECT, UPDATE (last_used_at)", _ALL),
    "plans": ("SELECT", _ALL),
    "roles": ("SELECT", _ALL),
    "owned": ("SELECT", _ALL),
    "prompt_templates": ("SELECT", _ALL),
    "agents": ("SELECT", _ALL),
    # Proxies mint by a function, which checks the authority of the parent.
    "agent_tokens": ("SELECT", _ALL),
    # Proxies learn habits; they report signals and suspend keys by functions.
    "key_habits": ("SELECT, INSERT (key_id, kind, value)", _ALL),
    "anomalies": ("", "SELECT"),
    "key_suspensions": ("", "SELECT"),
    # Proxies claim approvals and give them back by functions; they decide nothing and grant nothing.
    "approvals": ("SELECT", "SELECT, UPDATE, DELETE"),
    "released_claims": ("", ""),
    "consents": ("SELECT", _ALL),
    "events": ("SELECT, INSERT", _ALL),
    "signing_keys": ("SELECT, INSERT, UPDATE (ends_at)", _ALL),
    "provider_keys": ("SELECT", _ALL),
    "oauth_clients": ("SELECT", _ALL),
    "oauth_grants": ("SELECT", _ALL),
    "oauth_sessions": ("SELECT, UPDATE (last_used_at)", _ALL),
    "oauth_access_tokens": ("SELECT", "SELECT, DELETE"),
    "oauth_refresh_tokens": ("", "SELECT, DELETE"),
    "oauth_subjects": ("", _ALL),
    "oauth_codes": ("", ""),
    "oauth_assertions": ("", ""),
    # Proxies only use two functions: see the migration that created the table.
    "foreign_hashes": ("", _ALL),
    "changes": ("SELECT, DELETE", "SELECT"),
    "audit_log": ("", "SELECT"),
    "ledger": ("SELECT", "SELECT"),
    "ledger_history": ("SELECT, UPDATE", "SELECT"),
    "lease_holders": (_ALL, "SELECT"),
    "leases": (_ALL, "SELECT"),
    # Proxies account for windows, but only credit_window changes what was credited.
    "windows": (
        (
            "SELECT, DELETE, INSERT (pool_kind, pool_id, is_test, measure, starts, selector, carried, carried_until),"
            " UPDATE (spent, held, forfeited, theoretical, wanted_at, wanted_by, holders, alerted, recalled_at)"
        ),
        "SELECT",
    ),
    "window_credits": ("", "SELECT"),
    # Proxies only write alerts, by note_alerts.
    "limit_alerts": ("", "SELECT, UPDATE"),
    "idempotent_charges": (_ALL, ""),
    "claim_batches": (_ALL, ""),
    "usage": ("SELECT, INSERT, UPDATE", "SELECT"),
    "usage_writers": (_ALL, "SELECT"),
    "usage_event_batches": ("SELECT, INSERT", "SELECT"),
    "usage_events": ("", "SELECT"),
    "admin_tokens": ("", _ALL),
    "answered_requests": ("", _ALL),
    "reminders": ("", _ALL),
    "expiring_keys": ("", "SELECT"),
    "expiring_admin_tokens": ("", "SELECT"),
}

#: Functions that PUBLIC must not call: the privileges of proxies, those of the admin side.
_FUNCTIONS: Final = {
    "foreign_recipe(text)": ("EXECUTE", "EXECUTE"),
    "adopt_foreign(text, text, bytea)": ("EXECUTE", "EXECUTE"),
    "tend_usage(integer, integer, integer)": ("EXECUTE", "EXECUTE"),
    (
        "mint_agent_token(text, bytea, text, text, text, text, text, text[], text, bigint, bigint, double precision,"
        " integer, integer, boolean, text)"
    ): ("EXECUTE", "EXECUTE"),
    "tend_agent_tokens(integer)": ("EXECUTE", "EXECUTE"),
    "suspend_key(text, text, text, integer)": ("EXECUTE", ""),
    "note_anomaly(text, text, text, text, text, jsonb, integer, timestamp with time zone, bigint)": ("EXECUTE", ""),
    "tend_anomalies(integer)": ("EXECUTE", "EXECUTE"),
    (
        "claim_approval(text, bytea, text, text, text, text, text, text, jsonb, text, bytea, double precision, integer)"
    ): ("EXECUTE", ""),
    "release_approval(bytea, bytea)": ("EXECUTE", ""),
    "tend_approvals(integer)": ("EXECUTE", "EXECUTE"),
    "make_event_days()": ("EXECUTE", ""),
    "note_alerts(bigint, integer[], bigint, bigint)": ("EXECUTE", ""),
    "has_agent_token(text)": ("EXECUTE", ""),
    "credit_window(text, text, boolean, text, text, bigint, bigint, text)": ("", "EXECUTE"),
}

#: The privileges of the authorization server. Of keys it reads what a sign-in depends on, and not their names.
#: It locks a key by a function, because a lock needs the right to a change.
_AUTHORIZE: Final = {
    "migrations": "SELECT",
    "tenants": "SELECT",
    "users": "SELECT",
    "plans": "SELECT",
    "roles": "SELECT",
    "api_keys": (
        "SELECT (id, user_id, digest, scopes, roles, is_test, plan_id, created_at, expires_at, revoked_at, suspended_at,"
        " replaces, lineage, acts_for)"
    ),
    # Introspection accepts them.
    "admin_tokens": "SELECT, UPDATE (last_used_at)",
    "oauth_clients": _ALL,
    "oauth_grants": _ALL,
    "oauth_sessions": _ALL,
    "oauth_access_tokens": _ALL,
    "oauth_refresh_tokens": _ALL,
    "oauth_subjects": _ALL,
    "oauth_codes": _ALL,
    "oauth_assertions": _ALL,
}
_AUTHORIZE_FUNCTIONS: Final = {
    "tend_oauth(integer, integer, text[], timestamp with time zone)": "EXECUTE",
    "hold_login_key(text)": "EXECUTE",
}

#: What it also may do if it creates the users that the identity provider knows.
_PROVISIONS: Final = {"users": "SELECT, INSERT"}

#: The privileges of applications, which manage users and keys in their own transactions. Their keys have no plan of their
#: own and act for no other user. A trigger keeps revocations final.
_APP: Final = {
    "migrations": "SELECT",
    "users": "SELECT (id, tenant_id, disabled_at), INSERT (id, tenant_id), UPDATE (disabled_at), DELETE",
    "api_keys": (
        "SELECT (id, user_id, hint, name, scopes, is_test, created_at, expires_at, revoked_at, revoke_reason, replaces,"
        " last_used_at), INSERT (id, user_id, digest, hint, name, scopes, is_test, expires_at, replaces),"
        " UPDATE (revoked_at, revoke_reason, expires_at)"
    ),
}

_SEQUENCES: Final = {"audit_log_id_seq": ("", "SELECT"), "usage_event_serial": ("USAGE", "SELECT")}


def names(prefix: str) -> tuple[str, str, str, str]:
    """The roles of a prefix: for proxies, the admin side, the authorization server, applications.

    Raises MigrationError if the prefix is invalid.
    """
    if not _PREFIX.fullmatch(prefix):
        raise MigrationError(
            f"{prefix!r} is not a valid prefix for roles: lower-case letters, digits and _, 41 at most"
        )
    return f"{prefix}_proxy", f"{prefix}_admin", f"{prefix}_authorize", f"{prefix}_app"


async def create(dsn: str, prefix: str, *, provisions: bool = False) -> list[str]:
    """Create missing roles and set the privileges of all. Return the roles that were created.

    `provisions`: the authorization server creates users. All migrations must have been applied. Raises MigrationError or
    StoreUnavailable.
    """
    roles = names(prefix)
    if (await migrations.state(dsn)).pending:
        raise MigrationError("the schema has pending migrations: apply them before creating roles")
    connection = await migrations.connect(dsn, writes=True)
    try:
        async with connection.transaction(isolation="read_committed"):
            # One run at a time: concurrent grants of the same privileges conflict in the system catalogs.
            await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('keyproxy.roles', 0))")
            made = [role for role in roles if await _make(connection, role)]
            for role, privileges in zip(roles, _privileges(provisions=provisions), strict=True):
                await _grant(connection, role, privileges)
        return made
    except NO_RESPONSE as error:
        raise MigrationError(f"creating the roles failed, nothing was changed: {error}") from error
    finally:
        await connection.close()


class _Privileges(NamedTuple):
    """The privileges of one role, by the name of the table, sequence or function."""

    tables: Mapping[str, str]
    sequences: Mapping[str, str]
    functions: Mapping[str, str]


def _privileges(*, provisions: bool) -> tuple[_Privileges, ...]:
    """The privileges of the roles, in the order of `names`."""
    proxy, admin = (
        _Privileges(
            *({name: rights[place] for name, rights in table.items()} for table in (RIGHTS, _SEQUENCES, _FUNCTIONS))
        )
        for place in range(2)
    )
    authorize = _Privileges(_AUTHORIZE | (_PROVISIONS if provisions else {}), {}, _AUTHORIZE_FUNCTIONS)
    return proxy, admin, authorize, _Privileges(_APP, {}, {})


async def _make(connection: Any, role: str) -> bool:
    if await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", role):
        return False
    await connection.execute(f'CREATE ROLE "{role}" LOGIN')
    # No statement runs long enough for JIT to pay off, but on a large database the planner overestimates some.
    await connection.execute(f'ALTER ROLE "{role}" SET jit = off')
    return True


async def _grant(connection: Any, role: str, privileges: _Privileges) -> None:
    for what in ("ALL TABLES", "ALL SEQUENCES", "ALL FUNCTIONS"):
        await connection.execute(f'REVOKE ALL ON {what} IN SCHEMA keyproxy FROM "{role}"')
    await connection.execute(f'REVOKE ALL ON SCHEMA keyproxy FROM "{role}"')
    await connection.execute(f'GRANT USAGE ON SCHEMA keyproxy TO "{role}"')
    for kind, granted in (("SEQUENCE", privileges.sequences), ("TABLE", privileges.tables)):
        for name, rights in granted.items():
            is_there = await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", f"keyproxy.{name}")
            if rights and is_there:
                await connection.execute(f'GRANT {rights} ON {kind} keyproxy.{name} TO "{role}"')
    for function, rights in privileges.functions.items():
        if rights:
            await connection.execute(f'GRANT {rights} ON FUNCTION keyproxy.{function} TO "{role}"')
