"""The role of applications manages users and keys, and can do nothing else."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import AsyncIterator

import asyncpg
import pytest

from keyproxy.store.postgres import migrations, roles
from tests.server import as_role, may_log_in
from tests.store.agent_rows import add_agent_token
from tests.store.harness import Sql, add_key, add_user, migrated_up_to

_SIGN_UP = """
WITH created AS (
    INSERT INTO keyproxy.users (id, tenant_id) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING RETURNING id
)
INSERT INTO keyproxy.api_keys (id, user_id, digest, hint, name, scopes, is_test, expires_at)
SELECT $3, id, $4, 'kp_live_…abcd', 'first', '{jobs:write}', false, now() + interval '90 days' FROM created
ON CONFLICT (id) DO NOTHING
RETURNING id, expires_at
"""


@pytest.fixture
async def app(dsn: str, sql: Sql) -> AsyncIterator[Sql]:
    """A connection of an application's own role, which is a member of `<prefix>_app`."""
    prefix = f"kp_{secrets.token_hex(4)}"
    await roles.create(dsn, prefix)
    django = f"{prefix}_django"
    await sql.execute(f'CREATE ROLE "{django}" LOGIN; GRANT "{prefix}_app" TO "{django}"; {may_log_in(dsn, django)}')
    await add_user(sql)
    client: Sql = await asyncpg.connect(as_role(dsn, django))
    yield client
    await client.close()
    for role in (django, *roles.names(prefix)):
        await sql.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')


async def refused(client: Sql, statement: str, error: type[asyncpg.PostgresError]) -> asyncpg.PostgresError:
    """Execute in a savepoint; the error."""
    async with client.transaction():
        with pytest.raises(error) as caught:
            async with client.transaction():
                await client.execute(statement)
    return caught.value


async def test_applications_create_disable_and_delete_users_and_issue_and_revoke_keys(app: Sql, sql: Sql) -> None:
    digest, successor = secrets.token_bytes(32), secrets.token_bytes(32)
    assert await app.fetchval(_SIGN_UP, "u_1", "acme", "key_a", digest) == "key_a"
    assert await app.fetchval(_SIGN_UP, "u_1", "acme", "key_b", successor) is None
    await app.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest, hint, name, scopes, is_test, expires_at, replaces)"
        " VALUES ('key_c', 'u_1', $1, '', '', '{}', false, NULL, 'key_a')",
        successor,
    )
    await app.execute("UPDATE keyproxy.api_keys SET expires_at = now() + interval '1 hour' WHERE id = 'key_a'")
    await app.execute(
        "UPDATE keyproxy.api_keys SET revoked_at = now(), revoke_reason = 'rotated'"
        " WHERE id = 'key_a' AND revoked_at IS NULL"
    )
    await app.execute("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_1' AND disabled_at IS NULL")
    shown = await app.fetchrow(
        "SELECT id, user_id, hint, name, scopes, is_test, created_at, expires_at, revoked_at, revoke_reason, replaces,"
        " last_used_at FROM keyproxy.api_keys WHERE revoked_at IS NOT NULL"
    )
    assert shown is not None
    assert (shown["id"], shown["revoke_reason"]) == ("key_a", "rotated")
    # The proxies look a rotated key's limits up under the key that it descends from.
    assert await sql.fetchval("SELECT lineage FROM keyproxy.api_keys WHERE id = 'key_c'") == "key_a"
    await app.execute("DELETE FROM keyproxy.users WHERE id = 'u_1'")
    changed = {(row["kind"], row["subject"]) for row in await sql.fetch("SELECT kind, subject FROM keyproxy.changes")}
    assert {("key", digest.hex()), ("key", successor.hex()), ("user", "u_1")} <= changed
    rows = await sql.fetch("SELECT entity, action FROM keyproxy.audit_log")
    actions = {(row["entity"], row["action"]) for row in rows}
    assert {("user", "insert"), ("user", "update"), ("user", "delete"), ("key", "insert"), ("key", "delete")} <= actions


async def test_deletion_of_a_user_by_an_application_takes_all_that_the_user_owns(app: Sql, sql: Sql) -> None:
    await add_key(sql)
    await add_agent_token(sql)
    await app.execute("DELETE FROM keyproxy.users")
    for table in ("users", "api_keys", "agents", "agent_tokens"):
        assert await sql.fetchval(f"SELECT count(*) FROM keyproxy.{table}") == 0


async def test_rotated_key_keeps_plan_and_pool_of_its_user_and_neither_roles_nor_delegation(app: Sql, sql: Sql) -> None:
    await sql.execute(
        "INSERT INTO keyproxy.plans (id, limits) VALUES ('small', '{}'), ('other', '{}');"
        " INSERT INTO keyproxy.roles (id, scopes) VALUES ('writer', '{a:b}');"
        " INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_43', 'acme');"
        " INSERT INTO keyproxy.api_keys (id, user_id, digest, plan_id, roles, acts_for) VALUES"
        " ('key_1', 'u_42', sha256('1'), 'small', '{writer}', 'tenant'),"
        " ('key_o', 'u_43', sha256('o'), 'other', '{}', 'none')"
    )
    rotate = (
        "INSERT INTO keyproxy.api_keys (id, user_id, digest, replaces, is_test) VALUES ($1, $2, sha256($3), $4, $5)"
    )
    # Functions and tables of the application's own do not answer for the right.
    await app.execute(
        "CREATE FUNCTION pg_temp.has_column_privilege(text, text, text) RETURNS bool LANGUAGE sql AS 'SELECT true';"
        " CREATE TEMP TABLE api_keys (plan_id text); SET search_path = pg_temp, pg_catalog"
    )
    cases = (
        (app, "key_2", "u_42", "key_1", False, ("small", "key_1")),
        (app, "key_3", "u_42", "key_2", False, ("small", "key_1")),
        # Test traffic has a pool of its own; the plan restricts it all the same.
        (app, "key_4", "u_42", "key_1", True, ("small", None)),
        # The key of another user gives nothing away, and hides nothing either.
        (app, "key_5", "u_42", "key_o", False, (None, None)),
        (app, "key_6", "u_42", None, False, (None, None)),
        # A role that may set plans may also leave one out.
        (sql, "key_7", "u_42", "key_1", False, (None, "key_1")),
    )
    for client, key, user, replaces, is_test, expected in cases:
        await client.execute(rotate, key, user, key.encode(), replaces, is_test)
        row = await sql.fetchrow("SELECT plan_id, lineage, roles, acts_for FROM keyproxy.api_keys WHERE id = $1", key)
        assert row is not None
        assert tuple(row) == (*expected, [], "none"), key


async def test_audit_log_records_the_login_role_of_an_application_whatever_actor_it_names(app: Sql, sql: Sql) -> None:
    async with app.transaction():
        await app.execute("SELECT set_config('keyproxy.actor', 'django:signup', true)")
        await app.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_1', 'acme')")
    row = await sql.fetchrow("SELECT actor, db_role FROM keyproxy.audit_log ORDER BY id DESC LIMIT 1")
    assert row is not None
    assert (row["actor"], row["db_role"]) == ("django:signup", await app.fetchval("SELECT session_user"))


_DENIED = (
    # Digests
    "SELECT digest FROM keyproxy.api_keys",
    "SELECT * FROM keyproxy.api_keys",
    "SELECT k FROM keyproxy.api_keys AS k",
    "SELECT to_jsonb(k) FROM keyproxy.api_keys AS k",
    "SELECT id FROM keyproxy.api_keys WHERE digest > '\\x80'",
    "SELECT id FROM keyproxy.api_keys ORDER BY digest",
    "SELECT id FROM keyproxy.api_keys AS k NATURAL JOIN (SELECT NULL::bytea AS digest) AS d",
    "SELECT lineage, acts_for, plan_id, roles, suspended_at FROM keyproxy.api_keys",
    "UPDATE keyproxy.api_keys SET expires_at = NULL RETURNING digest",
    "UPDATE keyproxy.api_keys SET revoke_reason = encode(digest, 'hex')",
    "UPDATE keyproxy.api_keys SET expires_at = NULL WHERE digest < '\\x80'",
    "INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('key_x', 'u_42', sha256('x')) RETURNING digest",
    ("INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('key_1', 'u_42', sha256('x'))"
    " ON CONFLICT (id) DO UPDATE SET revoke_reason = encode(api_keys.digest, 'hex')"),
    ("INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('key_x', 'u_42', sha256('x'))"
    " ON CONFLICT (digest) DO NOTHING"),
    ("INSERT INTO keyproxy.api_keys (id, user_id, digest, replaces) VALUES ('key_1', 'u_42', sha256('x'), 'key_1')"
    " ON CONFLICT (id) DO UPDATE SET revoke_reason = excluded.plan_id"),
    ("INSERT INTO keyproxy.api_keys (id, user_id, digest, replaces) VALUES ('key_x', 'u_42', sha256('x'), 'key_1')"
    " RETURNING plan_id"),
    "EXPLAIN SELECT id FROM keyproxy.api_keys WHERE digest = sha256('x')",
    "EXPLAIN SELECT id FROM keyproxy.api_keys WHERE plan_id = 'x'",
    "SELECT xmin FROM keyproxy.api_keys",
    "UPDATE keyproxy.api_keys SET digest = sha256('x')",
    "COPY keyproxy.api_keys TO STDOUT",
    "COPY keyproxy.api_keys (digest) TO STDOUT",
    "CREATE TEMP TABLE copied (LIKE keyproxy.api_keys INCLUDING ALL); INSERT INTO copied SELECT * FROM keyproxy.api_keys",
    "SELECT * FROM keyproxy.foreign_hashes",
    "SELECT keyproxy.foreign_recipe('Ab3dE6gH')",
    "SELECT keyproxy.adopt_foreign('Ab3dE6gH', 'x', sha256('x'))",
    "SELECT * FROM keyproxy.changes",
    # The audit log
    "SELECT * FROM keyproxy.audit_log",
    "SELECT keyproxy.tenant_of_user('u_0')",
    "INSERT INTO keyproxy.audit_log (actor, action, entity, entity_id) VALUES ('a', 'insert', 'key', 'x')",
    "UPDATE keyproxy.audit_log SET actor = 'a'",
    "DELETE FROM keyproxy.audit_log",
    "SELECT nextval('keyproxy.audit_log_id_seq')",
    # Plans, roles, delegation
    "INSERT INTO keyproxy.users (id, tenant_id, plan_id) VALUES ('u_x', 'acme', NULL)",
    "INSERT INTO keyproxy.users (id, tenant_id, roles) VALUES ('u_x', 'acme', '{}')",
    "INSERT INTO keyproxy.users (id, tenant_id, disabled_at) VALUES ('u_x', 'acme', NULL)",
    "INSERT INTO keyproxy.users VALUES ('u_x', 'acme', NULL)",
    "UPDATE keyproxy.users SET plan_id = NULL",
    "UPDATE keyproxy.users SET test_plan_id = NULL",
    "UPDATE keyproxy.users SET roles = NULL",
    "UPDATE keyproxy.users SET tenant_id = 'globex'",
    "UPDATE keyproxy.users SET id = 'u_43'",
    "INSERT INTO keyproxy.api_keys (id, user_id, digest, acts_for) VALUES ('key_x', 'u_42', sha256('x'), 'tenant')",
    "INSERT INTO keyproxy.api_keys (id, user_id, digest, plan_id) VALUES ('key_x', 'u_42', sha256('x'), NULL)",
    "INSERT INTO keyproxy.api_keys (id, user_id, digest, roles) VALUES ('key_x', 'u_42', sha256('x'), '{}')",
    "INSERT INTO keyproxy.api_keys (id, user_id, digest, lineage) VALUES ('key_x', 'u_42', sha256('x'), 'key_1')",
    "INSERT INTO keyproxy.api_keys (id, user_id, digest, created_at) VALUES ('key_x', 'u_42', sha256('x'), '2001-01-01')",
    "INSERT INTO keyproxy.api_keys (id, user_id, digest, suspended_at) VALUES ('key_x', 'u_42', sha256('x'), NULL)",
    "INSERT INTO keyproxy.api_keys (id, user_id, digest, last_used_at) VALUES ('key_x', 'u_42', sha256('x'), now())",
    "INSERT INTO keyproxy.users (id, tenant_id, created_at) VALUES ('u_x', 'acme', '2001-01-01')",
    "INSERT INTO keyproxy.api_keys (id, user_id, digest, revoked_at) VALUES ('key_x', 'u_42', sha256('x'), now())",
    "UPDATE keyproxy.api_keys SET acts_for = 'tenant'",
    "UPDATE keyproxy.api_keys SET plan_id = NULL",
    "UPDATE keyproxy.api_keys SET roles = '{}'",
    "UPDATE keyproxy.api_keys SET scopes = '{a}'",
    "UPDATE keyproxy.api_keys SET user_id = 'u_42'",
    "UPDATE keyproxy.api_keys SET suspended_at = NULL",
    "UPDATE keyproxy.api_keys SET is_test = true",
    "UPDATE keyproxy.api_keys SET replaces = NULL",
    "DELETE FROM keyproxy.api_keys",
    # Everything else
    "SELECT * FROM keyproxy.tenants",
    "INSERT INTO keyproxy.tenants (id) VALUES ('mine')",
    "SELECT * FROM keyproxy.users",
    "SELECT * FROM keyproxy.plans",
    "SELECT * FROM keyproxy.agent_tokens",
    "SELECT * FROM keyproxy.admin_tokens",
    "SELECT * FROM keyproxy.provider_keys",
    "SELECT * FROM keyproxy.usage",
    "UPDATE keyproxy.migrations SET checksum = ''",
    "TRUNCATE keyproxy.users CASCADE",
    "TRUNCATE keyproxy.api_keys CASCADE",
    "ALTER TABLE keyproxy.api_keys DISABLE TRIGGER ALL",
    "DROP TRIGGER keep_revocation ON keyproxy.api_keys",
    "CREATE TRIGGER t BEFORE UPDATE ON keyproxy.users EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "CREATE INDEX ON keyproxy.api_keys (digest)",
    "CREATE TABLE keyproxy.mine (x int REFERENCES keyproxy.users (id))",
    "SET session_replication_role = replica",
    "SET ROLE keyproxy",
)  # fmt: skip


async def test_applications_read_no_digest_or_audit_row_and_set_no_plan_role_or_delegation(app: Sql, sql: Sql) -> None:
    await add_key(sql)
    for statement in _DENIED:
        error = await refused(app, statement, asyncpg.InsufficientPrivilegeError)
        assert error.sqlstate == "42501", statement


async def test_error_messages_show_an_application_no_digest(app: Sql, sql: Sql) -> None:
    await add_key(sql)
    digest = (await sql.fetchval("SELECT digest FROM keyproxy.api_keys")).hex()
    mine = hashlib.sha256(b"x").hexdigest()
    values = f"VALUES ('key_x', 'u_42', '\\x{digest}')"
    cases = (
        ("UPDATE keyproxy.api_keys SET revoked_at = now(), revoke_reason = repeat('x', 501)",
         asyncpg.CheckViolationError),
        ("UPDATE keyproxy.api_keys SET revoke_reason = 'x'", asyncpg.CheckViolationError),
        (f"INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('key_1', 'u_42', '\\x{mine}')",
         asyncpg.UniqueViolationError),
        ("INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_x', 'missing')", asyncpg.ForeignKeyViolationError),
        (f"INSERT INTO keyproxy.api_keys (id, user_id, digest) {values}", asyncpg.UniqueViolationError),
    )  # fmt: skip
    for statement, expected in cases:
        error = await refused(app, statement, expected)
        assert digest not in json.dumps(error.as_dict(), default=str), statement


async def test_revocation_is_final_for_every_role_but_the_owner_of_the_schema(dsn: str, app: Sql, sql: Sql) -> None:
    await add_key(sql)
    admin = str(await app.fetchval("SELECT session_user")).removesuffix("_django") + "_admin"
    superuser = f"kp_{secrets.token_hex(4)}_root"
    await sql.execute(may_log_in(dsn, admin))
    await sql.execute(f'CREATE ROLE "{superuser}" LOGIN SUPERUSER; {may_log_in(dsn, superuser)}')
    await app.execute("UPDATE keyproxy.api_keys SET revoked_at = now()")
    changes = (
        "UPDATE keyproxy.api_keys SET revoked_at = NULL, revoke_reason = NULL",
        "UPDATE keyproxy.api_keys SET revoked_at = revoked_at + interval '1 second'",
        "UPDATE keyproxy.api_keys SET revoked_at = 'infinity'",
        (
            "INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('key_1', 'u_42', sha256('x'))"
            " ON CONFLICT (id) DO UPDATE SET revoked_at = excluded.expires_at"
        ),
    )
    try:
        for client in (app, await asyncpg.connect(as_role(dsn, admin)), await asyncpg.connect(as_role(dsn, superuser))):
            for statement in changes:
                error = await refused(client, statement, asyncpg.InsufficientPrivilegeError)
                assert error.sqlstate == "42501"
                assert "key_1 is revoked" in str(error) or "permission denied" in str(error)
            # The reason is not the revocation, and the same time is no change.
            await client.execute("UPDATE keyproxy.api_keys SET revoke_reason = 'leaked', revoked_at = revoked_at")
            if client is not app:
                await client.close()
        await sql.execute("UPDATE keyproxy.api_keys SET revoked_at = NULL, revoke_reason = NULL")
        assert await sql.fetchval("SELECT revoked_at IS NULL FROM keyproxy.api_keys") is True
    finally:
        await sql.execute(f'DROP ROLE "{superuser}"')


async def test_replication_and_restores_may_carry_any_revocation(dsn: str, app: Sql, sql: Sql) -> None:
    await add_key(sql)
    await sql.execute("UPDATE keyproxy.api_keys SET revoked_at = now()")
    superuser = f"kp_{secrets.token_hex(4)}_root"
    await sql.execute(f'CREATE ROLE "{superuser}" LOGIN SUPERUSER; {may_log_in(dsn, superuser)}')
    client: Sql = await asyncpg.connect(as_role(dsn, superuser))
    await client.execute("SET session_replication_role = replica; UPDATE keyproxy.api_keys SET revoked_at = NULL")
    await client.close()
    await sql.execute(f'DROP ROLE "{superuser}"')
    assert await sql.fetchval("SELECT revoked_at IS NULL FROM keyproxy.api_keys") is True


async def test_functions_that_run_as_their_owner_are_not_public(sql: Sql) -> None:
    public = await sql.fetch(
        "SELECT p.oid::regprocedure::text AS name FROM pg_proc AS p"
        " WHERE p.pronamespace = 'keyproxy'::regnamespace AND p.prosecdef"
        " AND (p.proacl IS NULL OR EXISTS (SELECT FROM aclexplode(p.proacl) AS a WHERE a.grantee = 0))"
    )
    assert [row["name"] for row in public] == []


async def test_roles_of_proxies_keep_the_functions_that_they_call_while_the_schema_is_migrated(
    empty_dsn: str,
) -> None:
    proxy = f"kp_{secrets.token_hex(4)}_proxy"
    await migrated_up_to(empty_dsn, 28)
    owner: Sql = await asyncpg.connect(empty_dsn)
    await owner.execute(f'CREATE ROLE "{proxy}" LOGIN; GRANT INSERT ON keyproxy.leases TO "{proxy}"')
    await migrations.migrate(empty_dsn)
    for function in ("make_event_days()", "note_alerts(bigint, int[], bigint, bigint)", "has_agent_token(text)"):
        assert await owner.fetchval("SELECT has_function_privilege($1, $2, 'EXECUTE')", proxy, f"keyproxy.{function}")
    await owner.execute(f'DROP OWNED BY "{proxy}"; DROP ROLE "{proxy}"')
    await owner.close()


async def test_application_cannot_forge_audit_rows_with_a_trigger_of_its_own(app: Sql) -> None:
    await app.execute("CREATE TEMP TABLE mine (id text, digest bytea, lineage text, replaces text)")
    for function in ("audit('key')", "note_key_change()", "end_key_logins()", "inherit_lineage()", "inherit_plan()"):
        await refused(
            app,
            f"CREATE TRIGGER mine AFTER INSERT ON mine FOR EACH ROW EXECUTE FUNCTION keyproxy.{function}",
            asyncpg.InsufficientPrivilegeError,
        )


async def test_each_run_resets_the_rights_of_the_role(dsn: str, app: Sql, sql: Sql) -> None:
    role = str(await app.fetchval("SELECT session_user")).removesuffix("_django") + "_app"
    await sql.execute(f'GRANT SELECT ON keyproxy.audit_log, keyproxy.api_keys TO "{role}"')
    await sql.execute(f'GRANT UPDATE (acts_for) ON keyproxy.api_keys TO "{role}"')
    await roles.create(dsn, role.removesuffix("_app"))
    for statement in (
        "SELECT 1 FROM keyproxy.audit_log",
        "SELECT digest FROM keyproxy.api_keys",
        "UPDATE keyproxy.api_keys SET acts_for = 'tenant'",
    ):
        await refused(app, statement, asyncpg.InsufficientPrivilegeError)
