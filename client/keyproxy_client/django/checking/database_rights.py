"""What the project's database role may do in keyproxy's schema, for the system checks with `--database`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

#: The oldest schema with the role `<prefix>_app`.
OLDEST_MIGRATION: Final = 29

#: Table, privilege, and its columns; without columns, the privilege on the table.
RIGHTS: Final = (
    ("migrations", "SELECT", ()),
    ("users", "SELECT", ("id", "tenant_id", "disabled_at")),
    ("users", "INSERT", ("id", "tenant_id")),
    ("users", "UPDATE", ("disabled_at",)),
    ("users", "DELETE", ()),
    (
        "api_keys",
        "SELECT",
        (
            "id", "user_id", "hint", "name", "scopes", "is_test", "created_at", "expires_at", "revoked_at",
            "revoke_reason", "replaces", "last_used_at",
        ),
    ),
    (
        "api_keys",
        "INSERT",
        ("id", "user_id", "digest", "hint", "name", "scopes", "is_test", "expires_at", "replaces"),
    ),
    ("api_keys", "UPDATE", ("revoked_at", "revoke_reason", "expires_at")),
)  # fmt: skip

# The catalogs are readable without any right to the schema: an old one is recognised by a function that it lacks.
_ROLE: Final = """
SELECT has_schema_privilege(schema.oid, 'USAGE'), pg_has_role(schema.nspowner, 'USAGE'),
    EXISTS (SELECT FROM pg_catalog.pg_proc WHERE pronamespace = schema.oid AND proname = 'keep_revocation')
FROM pg_catalog.pg_namespace AS schema
WHERE schema.nspname = 'keyproxy'
"""

# has_column_privilege is also true by a privilege on the table. A superuser has all of them.
_TABLE: Final = """
SELECT has_table_privilege(class.oid, %s)
FROM pg_catalog.pg_class AS class JOIN pg_catalog.pg_namespace AS schema ON schema.oid = class.relnamespace
WHERE schema.nspname = 'keyproxy' AND class.relname = %s
"""
_ANY_COLUMN: Final = """
SELECT has_any_column_privilege(class.oid, %s)
FROM pg_catalog.pg_class AS class JOIN pg_catalog.pg_namespace AS schema ON schema.oid = class.relnamespace
WHERE schema.nspname = 'keyproxy' AND class.relname = %s
"""
_COLUMN: Final = """
SELECT has_column_privilege(class.oid, attribute.attnum, %s)
FROM pg_catalog.pg_class AS class JOIN pg_catalog.pg_namespace AS schema ON schema.oid = class.relnamespace
JOIN pg_catalog.pg_attribute AS attribute ON attribute.attrelid = class.oid
WHERE schema.nspname = 'keyproxy' AND class.relname = %s AND attribute.attname = %s
"""


class Access(NamedTuple):
    """The access of a database role to keyproxy's schema.

    `migration`: the newest that is applied; None if there is no schema, or if the role may not read it. `is_old`: the
    schema has no role for applications. `missing`: rights that this package needs. `excessive`: what the role could do
    beyond them that would undo keyproxy's guarantees.
    """

    has_schema: bool
    migration: int | None
    is_old: bool
    missing: tuple[str, ...]
    excessive: tuple[str, ...]


def access(connection: Any) -> Access:
    """The access of the role of a Django connection to PostgreSQL. Raises Django's DatabaseError."""
    with connection.cursor() as cursor:
        cursor.execute(_ROLE)
        row = cursor.fetchone()
        if row is None:
            return Access(has_schema=False, migration=None, is_old=False, missing=(), excessive=())
        may_use, owns, has_trigger = row
        missing = ("USAGE on the schema",) if not may_use else tuple(_missing(cursor))
        migration = None
        if may_use and _has(cursor, "migrations", "SELECT"):
            cursor.execute("SELECT max(number) FROM keyproxy.migrations")
            (migration,) = cursor.fetchone()
        return Access(
            has_schema=True,
            migration=migration,
            is_old=not has_trigger if migration is None else migration < OLDEST_MIGRATION,
            missing=missing,
            excessive=tuple(_excessive(cursor, owns=owns)),
        )


def _missing(cursor: Any) -> Iterator[str]:
    for table, privilege, columns in RIGHTS:
        if not columns:
            if not _has(cursor, table, privilege):
                yield f"{privilege} on {table}"
            continue
        absent = [column for column in columns if not _has(cursor, table, privilege, column)]
        if absent:
            yield f"{privilege} ({', '.join(absent)}) on {table}"


def _excessive(cursor: Any, *, owns: bool) -> Iterator[str]:
    if owns:
        yield "owns the schema"
    if _has(cursor, "api_keys", "SELECT", "digest"):
        yield "reads digests of keys"
    cursor.execute(_ANY_COLUMN, ["SELECT", "audit_log"])
    if any(may_read for (may_read,) in cursor.fetchall()):
        yield "reads the audit log"


def _has(cursor: Any, table: str, privilege: str, column: str = "") -> bool:
    """False also if the table or the column does not exist, as in an old schema."""
    if column:
        cursor.execute(_COLUMN, [privilege, table, column])
    else:
        cursor.execute(_TABLE, [privilege, table])
    row = cursor.fetchone()
    return row is not None and bool(row[0])
