"""Import of old keys by SQL, on a connection with the rights of keyproxy's admin role.

The statements do what `keyproxy key import` does: a key is found by its prefix when it is first presented, verified by
its old hash, and known by its SHA-256 digest from then on.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from django.db import DatabaseError, connections, transaction

from keyproxy_client import keys as key_format
from keyproxy_client.django.directory.errors import DirectoryRefused
from keyproxy_client.django.importing.key_hashes import why_unusable
from keyproxy_client.django.importing.old_keys import OldKey, Problem
from keyproxy_client.django.importing.report import ImportReport

ACTOR_IMPORT: Final = "django:import"

#: A key of an inactive owner does not begin to work because it was imported before `keyproxy_sync`.
_CREATE_USERS: Final = """
    INSERT INTO keyproxy.users (id, tenant_id, disabled_at)
    SELECT DISTINCT ON (w.id) w.id, w.tenant, CASE WHEN w.is_active THEN NULL ELSE now() END
    FROM jsonb_to_recordset(%s::jsonb) AS w (id text, tenant text, is_active boolean)
    JOIN keyproxy.tenants AS t ON t.id = w.tenant
    ORDER BY w.id
    ON CONFLICT (id) DO NOTHING
    RETURNING id
"""

_HOLD_USERS: Final = """
    SELECT id, tenant_id FROM keyproxy.users WHERE id = ANY (%s::text[]) ORDER BY id FOR NO KEY UPDATE
"""

_PRESENT: Final = """
    SELECT f.prefix, k.user_id FROM keyproxy.foreign_hashes AS f JOIN keyproxy.api_keys AS k ON k.id = f.key_id
    WHERE f.prefix = ANY (%s::text[])
"""

_IMPORT: Final = """
    WITH wanted AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(%s::jsonb) AS w (
            id text, user_id text, digest text, hint text, name text, scopes text[], is_test boolean,
            created_at timestamptz, expires_at timestamptz, is_revoked boolean, prefix text, hashed text
        )
    ), made AS (
        INSERT INTO keyproxy.api_keys (
            id, user_id, digest, hint, name, scopes, is_test, created_at, expires_at, revoked_at, revoke_reason
        )
        SELECT w.id, w.user_id, decode(w.digest, 'hex'), w.hint, w.name, w.scopes, w.is_test, w.created_at, w.expires_at,
               CASE WHEN w.is_revoked THEN now() END,
               CASE WHEN w.is_revoked THEN 'revoked before it was imported' END
        FROM wanted AS w
        RETURNING id
    )
    INSERT INTO keyproxy.foreign_hashes (prefix, key_id, hashed)
    SELECT w.prefix, made.id, w.hashed FROM wanted AS w JOIN made ON made.id = w.id
    RETURNING prefix
"""

_REVOKE: Final = """
    UPDATE keyproxy.api_keys AS k SET revoked_at = now(), revoke_reason = 'revoked in Django'
    FROM keyproxy.foreign_hashes AS f
    WHERE f.key_id = k.id AND f.prefix = ANY (%s::text[]) AND k.revoked_at IS NULL
    RETURNING k.id
"""


@dataclass(frozen=True, slots=True)
class SqlImport:
    """The import on the connection `alias`. A dry run does the same, and rolls back."""

    alias: str
    is_dry_run: bool

    def put(self, keys: Sequence[OldKey]) -> ImportReport:
        """Import keys in one transaction. Those that are there already stay; they are revoked if they are in Django."""
        try:
            with transaction.atomic(using=self.alias), connections[self.alias].cursor() as cursor:
                cursor.execute("SELECT set_config('keyproxy.actor', %s, true)", [ACTOR_IMPORT])
                report = _imported(cursor, keys)
                if self.is_dry_run:
                    transaction.set_rollback(True, using=self.alias)
        except DatabaseError as error:
            reason = str(error).partition("\n")[0]
            raise DirectoryRefused(f"the import failed on the connection {self.alias!r}: {reason}") from error
        return report


def _imported(cursor: Any, keys: Sequence[OldKey]) -> ImportReport:
    report = ImportReport()
    owners = [{"id": key.user, "tenant": key.tenant, "is_active": key.is_owner_active} for key in keys]
    cursor.execute(_CREATE_USERS, [json.dumps(owners)])
    report.users = len(cursor.fetchall())
    cursor.execute(_HOLD_USERS, [sorted({key.user for key in keys})])
    tenants = dict(cursor.fetchall())
    cursor.execute(_PRESENT, [[key.prefix for key in keys]])
    present = dict(cursor.fetchall())
    rows = []
    for key in keys:
        problem = _problem(key, tenants, present)
        if problem is not None:
            report.problems.append(Problem(key.place, problem))
        elif key.prefix in present:
            report.present += 1
        else:
            present[key.prefix] = key.user
            rows.append(_row(key))
    cursor.execute(_IMPORT, [json.dumps(rows)])
    report.imported = len(cursor.fetchall())
    # What was revoked in Django after an earlier import: its problems are not reported a second time.
    cursor.execute(_REVOKE, [[key.prefix for key in keys if key.is_revoked and present.get(key.prefix) == key.user]])
    report.revoked = len(cursor.fetchall())
    return report


def _problem(key: OldKey, tenants: dict[str, str], present: dict[str, str]) -> str | None:
    unusable = why_unusable(key.prefix, key.hashed_key)
    if unusable is not None:
        return unusable
    if key.user not in tenants:
        return f"there is no user {key.user!r} and no tenant {key.tenant!r}"
    if tenants[key.user] != key.tenant:
        return f"user {key.user!r} belongs to a tenant other than {key.tenant!r}"
    if present.get(key.prefix, key.user) != key.user:
        return f"the key exists and belongs to user {present[key.prefix]!r}"
    return None


def _row(key: OldKey) -> dict[str, Any]:
    return {
        "id": key_format.new_key_id(),
        "user_id": key.user,
        # A random placeholder until the first use: no key has this digest.
        "digest": secrets.token_bytes(32).hex(),
        "hint": f"{key.prefix}.…",
        "name": key.name,
        "scopes": list(key.scopes),
        "is_test": key.is_test,
        "created_at": key.created.isoformat(),
        "expires_at": None if key.expires_at is None else key.expires_at.isoformat(),
        "is_revoked": key.is_revoked,
        "prefix": key.prefix,
        "hashed": key.hashed_key,
    }
