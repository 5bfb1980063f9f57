"""Guarantees of the tables themselves, for any SQL client that writes to them."""

from __future__ import annotations

import base64
import json
import secrets

import asyncpg
import pytest

from keyproxy.limits.plan import InvalidPlanError, Plan
from keyproxy.store.postgres import migrations
from tests.server import as_role, may_log_in
from tests.store.harness import Sql, add_key, add_keys, add_tenant, add_user, audit_rows, change_rows

DIGEST = bytes(range(32))

_INSERT_KEY = "INSERT INTO keyproxy.api_keys (id, user_id, digest, scopes) VALUES ($1, $2, $3, $4)"


@pytest.fixture
async def directory(sql: Sql) -> Sql:
    """One tenant, one user, one plan."""
    await add_user(sql)
    await sql.execute("INSERT INTO keyproxy.plans (id) VALUES ('basic')")
    return sql


# -- ids

GOOD_IDS = ["a", "Z", "0", "u_43", "a.b-c_d:e@f", "a" * 128, "0-._:@"]
BAD_IDS = [
    "", " ", "a b", " a", "a ", "a\n", "a\r\nX-Keyproxy-User: root", "\ta", "-a", ".a", "_a", "a" * 129, "a,b", "a;b",
    "a/b", 'a"b', "a\\b", "a*", "é", "aé", "a\u00a0b", "a\x7f", "\u2028", "a%0d", "a=b", "\uff21",
]  # fmt: skip


def _statement(table: str) -> str:
    return {
        "tenants": "INSERT INTO keyproxy.tenants (id) VALUES ($1)",
        "users": "INSERT INTO keyproxy.users (id, tenant_id) VALUES ($1, 'acme')",
        "plans": "INSERT INTO keyproxy.plans (id) VALUES ($1)",
        "api_keys": "INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ($1, 'u_42', sha256('x'))",
    }[table]


@pytest.mark.parametrize("table", ["tenants", "users", "plans", "api_keys"])
async def test_ids_are_safe_as_header_values(directory: Sql, table: str) -> None:
    for good in GOOD_IDS:
        async with directory.transaction():
            await directory.execute(_statement(table), good)
            await directory.execute(f"DELETE FROM keyproxy.{table} WHERE id = $1", good)
    for bad in BAD_IDS:
        with pytest.raises(asyncpg.CheckViolationError):
            await directory.execute(_statement(table), bad)
    with pytest.raises(asyncpg.NotNullViolationError):
        await directory.execute(_statement(table), None)


@pytest.mark.parametrize("table", ["tenants", "users", "api_keys"])
async def test_ids_stay_safe_when_they_are_changed(directory: Sql, table: str) -> None:
    await add_key(directory)
    with pytest.raises(asyncpg.CheckViolationError):
        await directory.execute(f"UPDATE keyproxy.{table} SET id = id || ' x'")


@pytest.mark.parametrize("table", ["tenants", "users", "plans", "api_keys"])
async def test_ids_are_unique(directory: Sql, table: str) -> None:
    await directory.execute(_statement(table), "once")
    with pytest.raises(asyncpg.UniqueViolationError):
        await directory.execute(_statement(table), "once")


# -- digests


@pytest.mark.parametrize("length", [0, 1, 20, 31, 33, 64])
async def test_digest_must_have_32_bytes(directory: Sql, length: int) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await directory.execute(_INSERT_KEY, "key_1", "u_42", b"x" * length, [])


async def test_digest_is_required_and_unique(directory: Sql) -> None:
    await directory.execute(_INSERT_KEY, "key_1", "u_42", DIGEST, [])
    with pytest.raises(asyncpg.UniqueViolationError):
        await directory.execute(_INSERT_KEY, "key_2", "u_42", DIGEST, [])
    with pytest.raises(asyncpg.NotNullViolationError):
        await directory.execute(_INSERT_KEY, "key_2", "u_42", None, [])


# -- scopes

GOOD_SCOPES = [[], ["a"], ["jobs:write"], ["jobs:write", "jobs:read"], ["a/b.c-d_e:f"], ["a" * 64], ["0"] * 64]
BAD_SCOPES = [
    [""], ["*"], ["jobs:*"], ["jobs write"], [" a"], ["a "], ["a\n"], ["a" * 65], ["a", "b c"], ["a", None], [None],
    ["é"], ["a,b"], ["-a"], [":a"], ["a\r\nX: y"], ["a"] * 65, ["?"], ["a%20b"],
]  # fmt: skip


async def test_scopes_are_single_words_without_wildcards(directory: Sql) -> None:
    for good in GOOD_SCOPES:
        async with directory.transaction():
            await directory.execute(_INSERT_KEY, "key_1", "u_42", DIGEST, good)
            await directory.execute("DELETE FROM keyproxy.api_keys")
    for bad in BAD_SCOPES:
        with pytest.raises(asyncpg.CheckViolationError):
            await directory.execute(_INSERT_KEY, "key_1", "u_42", DIGEST, bad)
    with pytest.raises(asyncpg.NotNullViolationError):
        await directory.execute(_INSERT_KEY, "key_1", "u_42", DIGEST, None)


async def test_multidimensional_scopes_are_rejected(directory: Sql) -> None:
    with pytest.raises(asyncpg.PostgresError):
        await directory.execute(_INSERT_KEY, "key_1", "u_42", DIGEST, [["a", "b"], ["c", "d e"]])


# -- owners


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u', 'nobody')",
        "INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u', NULL)",
        "INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('k', 'nobody', sha256('x'))",
        "INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('k', NULL, sha256('x'))",
        "UPDATE keyproxy.users SET tenant_id = NULL",
        "UPDATE keyproxy.users SET tenant_id = 'nobody'",
        "UPDATE keyproxy.api_keys SET user_id = NULL",
        "UPDATE keyproxy.api_keys SET user_id = 'nobody'",
    ],
)
async def test_every_row_needs_an_owner(directory: Sql, statement: str) -> None:
    await add_key(directory)
    with pytest.raises((asyncpg.ForeignKeyViolationError, asyncpg.NotNullViolationError)):
        await directory.execute(statement)


async def _ids(sql: Sql, table: str) -> list[str]:
    return [row["id"] for row in await sql.fetch(f"SELECT id FROM keyproxy.{table} ORDER BY id")]


async def test_deleting_a_tenant_or_user_deletes_exactly_its_rows(sql: Sql) -> None:
    for number, (user, tenant) in enumerate([("u_1", "acme"), ("u_2", "acme"), ("u_3", "other")], start=1):
        await add_user(sql, user, tenant)
        await add_key(sql, number, user)
    await sql.execute("DELETE FROM keyproxy.users WHERE id = 'u_2'")
    assert await _ids(sql, "api_keys") == ["key_1", "key_3"]
    await sql.execute("DELETE FROM keyproxy.tenants WHERE id = 'acme'")
    assert (await _ids(sql, "users"), await _ids(sql, "api_keys")) == (["u_3"], ["key_3"])


async def test_plan_in_use_cannot_be_deleted(directory: Sql) -> None:
    await add_key(directory)
    given = ("tenants", "plan_id"), ("users", "plan_id"), ("api_keys", "plan_id")
    for table, column in (*given, ("tenants", "test_plan_id"), ("users", "test_plan_id")):
        await directory.execute(f"UPDATE keyproxy.{table} SET {column} = 'basic'")
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await directory.execute("DELETE FROM keyproxy.plans WHERE id = 'basic'")
        await directory.execute(f"UPDATE keyproxy.{table} SET {column} = NULL")
    await directory.execute("DELETE FROM keyproxy.plans WHERE id = 'basic'")


async def test_deleting_a_replaced_key_keeps_its_successor(directory: Sql) -> None:
    await add_keys(directory, [1, 2])
    await directory.execute("UPDATE keyproxy.api_keys SET replaces = 'key_1' WHERE id = 'key_2'")
    await directory.execute("DELETE FROM keyproxy.api_keys WHERE id = 'key_1'")
    assert await directory.fetchval("SELECT replaces FROM keyproxy.api_keys WHERE id = 'key_2'") is None


# -- other columns


@pytest.mark.parametrize(
    ("column", "good", "bad"),
    [
        ("name", "x" * 200, "x" * 201),
        ("hint", "x" * 40, "x" * 41),
        ("revoke_reason", "x" * 500, "x" * 501),
    ],
)
async def test_free_texts_are_bounded(directory: Sql, column: str, good: str, bad: str) -> None:
    await add_key(directory)
    update = f"UPDATE keyproxy.api_keys SET revoked_at = now(), {column} = $1"
    await directory.execute(update, good)
    with pytest.raises(asyncpg.CheckViolationError):
        await directory.execute(update, bad)


async def test_only_a_revoked_key_has_a_revocation_reason(directory: Sql) -> None:
    await add_key(directory)
    with pytest.raises(asyncpg.CheckViolationError):
        await directory.execute("UPDATE keyproxy.api_keys SET revoke_reason = 'lost'")
    await directory.execute("UPDATE keyproxy.api_keys SET revoke_reason = 'lost', revoked_at = now()")


def _limit(**changes: object) -> dict[str, object]:
    return {"measure": "tokens", "per": "day", "amount": 10, **changes}


LIMITS: list[object] = [
    {}, {"requests_per_day": 1}, {"rate": 0.5, "burst": 2}, {"burst": 2}, {"a": 1}, {"rate": None},
    {"tokens_per_day": -1},
    {"tokens_per_day": 1.5}, {"tokens_per_day": 10**15}, {"tokens_per_day": 10**15 + 1}, {"concurrency": "1"}, 1,
    "x", None,
    True, [], [1], [[]], [None], [{}], [_limit()], [_limit(amount=0)], [_limit(amount=10**15 - 1)],
    [_limit(amount=10**15)],
    [_limit(amount=-1)], [_limit(amount=1.5)], [_limit(amount=2.0)], [_limit(amount="1")], [_limit(amount=True)],
    [_limit(amount=None)], [_limit(per=None)], [_limit(per=1)], [_limit(per="request")], [_limit(per="")],
    [_limit(per="second")], [_limit(per="year")], [_limit(burst=1)], [_limit(more=1)], [{"measure": "tokens",
    "per": "day"}],
    [{"per": "day", "amount": 1}], [_limit(measure="spend", per="week")], [_limit(measure="spend", per="request")],
    [_limit(measure="requests", per="minute")], [_limit(measure="requests", per="request")],
    [_limit(measure="requests_", per="day")],
    [_limit(measure=1)], [_limit(measure=None)], [_limit(measure="concurrency")], [_limit(measure="concurrency",
    per="")],
    [{"measure": "concurrency", "amount": 8}], [{"measure": "concurrency", "amount": 8.5}], [{"measure": "tokens",
    "amount": 8}],
    *([_limit(measure=measure, per=per, amount=amount)]
      for measure in ("request-rate", "token-rate") for per in ("second", "minute", "hour", "day", "week", "")
      for amount in (0, 0.4, 1, 2.5, 100, 10**6, 10**8, 6 * 10**7, 10**8 + 1, 36 * 10**8, 10**13, 10**14)),
    *([_limit(measure="request-rate", per="second", burst=burst)] for burst in (0, 1, 1.5, 10**15 - 1, 10**15, "1",
    None, True)),
    *([_limit(model=model)] for model in ("", "gpt-4o", "a/b:c@d_e.f", "a" * 128, "a" * 129, "a b", "a,b", "a\n",
    "é", 1, None)),
    *([_limit(route=route)] for route in (
        "", "chat", "POST /v1/{name}/x", "a" * 128, "a" * 129, "a,b", 'a"b', "a\\b", "a\n", "a\x7f", "a\tb", "é",
        "[a]-~", 1, None,
    )),
    *([_limit(mode=mode)] for mode in ("", "live", "test", "Live", "x", 1, None)),
    [_limit(), _limit()], [_limit(), _limit(model="x")], [_limit(), _limit(per="week")], [_limit(model=""),
    _limit(amount=9)],
    [_limit(measure="request-rate", per="second"), _limit(measure="request-rate", per="minute")],
    [_limit(measure="request-rate", per="second"), _limit(measure="token-rate", per="minute")],
    [_limit(model=f"m{number}") for number in range(32)], [_limit(model=f"m{number}") for number in range(33)],
]  # fmt: skip


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: json.dumps(limits)[:70])
async def test_limits_of_a_plan_are_those_that_the_program_reads(sql: Sql, limits: object) -> None:
    insert = "INSERT INTO keyproxy.plans (id, limits) VALUES ('p', $1::text::jsonb)"
    try:
        Plan.from_json(limits)
    except InvalidPlanError:
        with pytest.raises(asyncpg.CheckViolationError):
            await sql.execute(insert, json.dumps(limits))
    else:
        await sql.execute(insert, json.dumps(limits))


# -- change rows


@pytest.mark.parametrize(
    ("assignment", "is_news"),
    [
        ("id = 'key_9'", True),
        ("user_id = 'u_2'", True),
        ("digest = sha256('x')", True),
        ("scopes = '{a}'", True),
        ("is_test = true", True),
        ("plan_id = 'basic'", True),
        ("expires_at = now()", True),
        ("revoked_at = now()", True),
        ("revoked_at = now(), last_used_at = now()", True),
        ("last_used_at = now()", False),
        ("name = 'x'", False),
        ("hint = 'x'", False),
        ("created_at = now()", False),
        ("replaces = 'key_2'", True),
        ("lineage = 'key_9'", True),
        ("id = id", False),
    ],
)
async def test_key_change_is_in_the_feed_exactly_if_proxies_cache_the_column(
    directory: Sql, assignment: str, is_news: bool
) -> None:
    await add_user(directory, "u_2")
    await add_keys(directory, [1, 2])
    before = await change_rows(directory)
    await directory.execute(f"UPDATE keyproxy.api_keys SET {assignment} WHERE id = 'key_1'")
    assert (await change_rows(directory) > before) is is_news


async def test_changed_digest_is_in_the_feed_for_the_old_and_the_new_one(directory: Sql) -> None:
    secret = await add_key(directory)
    await directory.execute("DELETE FROM keyproxy.changes")
    await directory.execute("UPDATE keyproxy.api_keys SET digest = $1", DIGEST)
    rows = await directory.fetch("SELECT kind, subject FROM keyproxy.changes")
    assert {tuple(row) for row in rows} == {("key", secret.digest().hex()), ("key", DIGEST.hex())}


@pytest.mark.parametrize("table", ["tenants", "users"])
async def test_change_of_a_test_plan_is_in_the_feed(directory: Sql, table: str) -> None:
    for plan in ("basic", None):
        before = await change_rows(directory)
        await directory.execute(f"UPDATE keyproxy.{table} SET test_plan_id = $1", plan)
        assert await change_rows(directory) == before + 1


async def test_creating_or_deleting_a_successor_is_in_the_feed_for_the_replaced_key(directory: Sql) -> None:
    old, new = await add_keys(directory, [1, 2])
    for change in ("replaces = 'key_1'", "replaces = NULL"):
        await directory.execute("DELETE FROM keyproxy.changes")
        await directory.execute(f"UPDATE keyproxy.api_keys SET {change} WHERE id = 'key_2'")
        rows = await directory.fetch("SELECT DISTINCT subject FROM keyproxy.changes")
        assert {row["subject"] for row in rows} == {old.digest().hex(), new.digest().hex()}
    await directory.execute("DELETE FROM keyproxy.changes")
    await directory.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest, replaces) VALUES ('key_3', 'u_42', $1, 'key_1')", DIGEST
    )
    rows = await directory.fetch("SELECT DISTINCT subject FROM keyproxy.changes")
    assert {row["subject"] for row in rows} == {old.digest().hex(), DIGEST.hex()}


# -- lineage


async def _rotated(sql: Sql, new: str, old: str, user: str = "u_42", *, is_test: bool = False) -> str | None:
    """The lineage of a new key that an SQL client inserts as the successor of an old one."""
    lineage: str | None = await sql.fetchval(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest, replaces, is_test)"
        " VALUES ($1, $3, sha256($1::text::bytea), $2, $4) RETURNING lineage",
        new,
        old,
        user,
        is_test,
    )
    return lineage


async def test_rotated_keys_share_a_lineage_whichever_sql_client_rotates(directory: Sql) -> None:
    await add_key(directory)
    assert await directory.fetchval("SELECT lineage FROM keyproxy.api_keys") is None
    assert await _rotated(directory, "key_2", "key_1") == "key_1"
    assert await _rotated(directory, "key_3", "key_2") == "key_1"
    await directory.execute("DELETE FROM keyproxy.api_keys WHERE id IN ('key_1', 'key_2')")
    assert await _rotated(directory, "key_4", "key_3") == "key_1"


async def test_keys_of_different_users_or_modes_never_share_a_lineage(directory: Sql) -> None:
    await add_user(directory, "u_2")
    await add_key(directory)
    assert await _rotated(directory, "key_2", "key_1", "u_2") is None
    assert await _rotated(directory, "key_3", "key_1", is_test=True) is None


@pytest.mark.parametrize("bad", BAD_IDS)
async def test_lineage_must_be_an_id(directory: Sql, bad: str) -> None:
    await add_key(directory)
    with pytest.raises(asyncpg.CheckViolationError):
        await directory.execute("UPDATE keyproxy.api_keys SET lineage = $1", bad)


# -- the audit log


async def _audit(sql: Sql) -> list[tuple[str, str, str]]:
    rows = await sql.fetch("SELECT action, entity, entity_id FROM keyproxy.audit_log ORDER BY id")
    return [(row["action"], row["entity"], row["entity_id"]) for row in rows]


async def test_every_change_by_any_sql_client_is_in_the_audit_log(sql: Sql) -> None:
    await sql.execute("INSERT INTO keyproxy.plans (id) VALUES ('basic')")
    await add_tenant(sql)
    await sql.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_42', 'acme')")
    await add_keys(sql, [1, 2])
    await sql.execute("UPDATE keyproxy.tenants SET disabled_at = now()")
    await sql.execute("UPDATE keyproxy.users SET plan_id = 'basic'")
    await sql.execute("UPDATE keyproxy.plans SET limits = '{\"rate\": 1}'")
    await sql.execute("UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_2'")
    await sql.execute("DELETE FROM keyproxy.api_keys WHERE id = 'key_1'")
    await sql.execute("DELETE FROM keyproxy.tenants")
    await sql.execute("DELETE FROM keyproxy.plans")
    log = await _audit(sql)
    assert log[:9] == [
        ("insert", "plan", "basic"),
        ("insert", "tenant", "acme"),
        ("insert", "user", "u_42"),
        ("insert", "key", "key_1"),
        ("insert", "key", "key_2"),
        ("update", "tenant", "acme"),
        ("update", "user", "u_42"),
        ("update", "plan", "basic"),
        ("update", "key", "key_2"),
    ]
    assert set(log[9:]) == {
        ("delete", "key", "key_1"),
        ("delete", "tenant", "acme"),
        ("delete", "user", "u_42"),
        ("delete", "key", "key_2"),
        ("delete", "plan", "basic"),
    }


@pytest.mark.parametrize("table", ["tenants", "users", "api_keys", "plans"])
async def test_emptying_a_table_is_in_the_audit_log(directory: Sql, table: str) -> None:
    await add_key(directory)
    before = await audit_rows(directory)
    await directory.execute(f"TRUNCATE keyproxy.{table} CASCADE")
    assert await audit_rows(directory) > before


async def test_audit_row_contains_actor_action_and_previous_values(directory: Sql) -> None:
    await directory.execute("UPDATE keyproxy.users SET disabled_at = '2030-01-01Z'")
    row = await directory.fetchrow(
        "SELECT actor, origin, before ->> 'disabled_at' AS was, after ->> 'disabled_at' AS becomes"
        " FROM keyproxy.audit_log ORDER BY id DESC LIMIT 1"
    )
    assert row is not None
    assert (row["actor"], row["origin"], row["was"]) == ("sql:keyproxy", await _here(directory), None)
    assert row["becomes"].startswith("2030-01-01")


async def test_actor_can_be_set_for_one_transaction(directory: Sql) -> None:
    async with directory.transaction():
        await directory.execute(
            "SELECT set_config('keyproxy.actor', 'ann', true), set_config('keyproxy.origin', 'x', true)"
        )
        await directory.execute("UPDATE keyproxy.users SET disabled_at = now()")
    await directory.execute("UPDATE keyproxy.users SET disabled_at = NULL")
    rows = await directory.fetch("SELECT actor, origin FROM keyproxy.audit_log ORDER BY id DESC LIMIT 2")
    assert [tuple(row) for row in rows] == [("sql:keyproxy", await _here(directory)), ("ann", "x")]


async def _here(client: Sql) -> str:
    """The origin of this client in the audit log: a socket or an address."""
    return str(await client.fetchval("SELECT coalesce(host(inet_client_addr()), 'local')"))


async def test_audit_row_contains_the_login_role_whatever_actor_the_client_sets(dsn: str, directory: Sql) -> None:
    role = f"kp_client_{secrets.token_hex(4)}"
    await directory.execute(f'CREATE ROLE "{role}"')
    await directory.execute(may_log_in(dsn, role))
    await directory.execute(f'GRANT USAGE ON SCHEMA keyproxy TO "{role}"')
    await directory.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON keyproxy.plans TO "{role}"')
    await directory.execute(f'CREATE ROLE "{role}_other"')
    await directory.execute(f'GRANT "{role}" TO "{role}_other"')
    client = await asyncpg.connect(as_role(dsn, role))
    try:
        await client.execute("SET keyproxy.actor = 'cli:root'")
        await client.execute("INSERT INTO keyproxy.plans (id) VALUES ('p')")
        await client.execute("SET keyproxy.db_role = 'keyproxy'")
        await client.execute("DELETE FROM keyproxy.plans WHERE id = 'p'")
        await directory.execute(f'SET ROLE "{role}_other"')
        await directory.execute("INSERT INTO keyproxy.plans (id) VALUES ('q')")
        await directory.execute("RESET ROLE")
    finally:
        await client.close()
        rows = await directory.fetch("SELECT actor, db_role FROM keyproxy.audit_log ORDER BY id DESC LIMIT 3")
        for one in (f"{role}_other", role):
            await directory.execute(f'DROP OWNED BY "{one}"')
            await directory.execute(f'DROP ROLE "{one}"')
    assert [tuple(row) for row in rows] == [("sql:keyproxy", "keyproxy"), ("cli:root", role), ("cli:root", role)]


async def test_audit_rows_from_before_the_migration_have_no_role(own_dsn: str) -> None:
    client = await asyncpg.connect(own_dsn)
    try:
        await client.execute("ALTER TABLE keyproxy.audit_log DROP COLUMN db_role")
        await client.execute("DELETE FROM keyproxy.migrations WHERE name = 'audit_db_role'")
        await add_tenant(client, "before")
        await migrations.migrate(own_dsn)
        await add_tenant(client, "after")
        rows = await client.fetch("SELECT entity_id, db_role FROM keyproxy.audit_log ORDER BY id")
    finally:
        await client.close()
    assert [tuple(row) for row in rows] == [("before", None), ("after", "keyproxy")]


async def test_audit_rows_contain_no_digest(directory: Sql) -> None:
    secret = await add_key(directory)
    await directory.execute("UPDATE keyproxy.api_keys SET digest = $1", DIGEST)
    await directory.execute("DELETE FROM keyproxy.api_keys")
    rows = await directory.fetch("SELECT to_jsonb(a)::text AS text FROM keyproxy.audit_log AS a WHERE entity = 'key'")
    text = "\n".join(row["text"] for row in rows)
    # The change is recorded, but not the value.
    assert len(rows) == 3
    assert "digest" not in text
    for digest in (secret.digest(), DIGEST):
        assert digest.hex() not in text
        assert base64.b64encode(digest).decode() not in text


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE keyproxy.audit_log SET actor = 'nobody'",
        "UPDATE keyproxy.audit_log SET actor = 'nobody' WHERE false",
        "DELETE FROM keyproxy.audit_log",
        "DELETE FROM keyproxy.audit_log WHERE id = 1",
        "TRUNCATE keyproxy.audit_log",
        "TRUNCATE keyproxy.audit_log RESTART IDENTITY CASCADE",
        "TRUNCATE keyproxy.tenants, keyproxy.audit_log CASCADE",
    ],
)
async def test_audit_log_is_append_only(directory: Sql, statement: str) -> None:
    before = await directory.fetch("SELECT * FROM keyproxy.audit_log")
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
        await directory.execute(statement)
    assert await directory.fetch("SELECT * FROM keyproxy.audit_log") == before


async def test_audit_row_contains_the_tenant_even_for_cascading_deletes(directory: Sql) -> None:
    await add_key(directory)
    await add_user(directory, "u_2", "other")
    await directory.execute("UPDATE keyproxy.api_keys SET name = 'x'")
    await directory.execute("DELETE FROM keyproxy.tenants WHERE id = 'acme'")
    rows = await directory.fetch("SELECT entity, entity_id, action, tenant_id FROM keyproxy.audit_log")
    whose = {(row["entity"], row["entity_id"], row["action"]): row["tenant_id"] for row in rows}
    assert whose == {
        ("tenant", "acme", "insert"): "acme",
        ("user", "u_42", "insert"): "acme",
        ("key", "key_1", "insert"): "acme",
        ("key", "key_1", "update"): "acme",
        ("plan", "basic", "insert"): None,
        ("tenant", "other", "insert"): "other",
        ("user", "u_2", "insert"): "other",
        ("tenant", "acme", "delete"): "acme",
        ("user", "u_42", "delete"): "acme",
        ("key", "key_1", "delete"): "acme",
    }


async def test_deleted_objects_stay_in_the_audit_log(directory: Sql) -> None:
    await add_key(directory)
    await directory.execute("DELETE FROM keyproxy.tenants")
    assert ("insert", "key", "key_1") in await _audit(directory)


async def test_use_of_a_key_writes_neither_a_change_nor_an_audit_row(directory: Sql) -> None:
    await add_keys(directory, [1, 2])
    before = await change_rows(directory), await audit_rows(directory)
    await directory.execute("UPDATE keyproxy.api_keys SET last_used_at = now()")
    assert (await change_rows(directory), await audit_rows(directory)) == before


async def test_rolled_back_change_leaves_neither_a_change_nor_an_audit_row(directory: Sql) -> None:
    before = await change_rows(directory), await audit_rows(directory)
    transaction = directory.transaction()
    await transaction.start()
    await add_key(directory)
    await transaction.rollback()
    assert (await change_rows(directory), await audit_rows(directory)) == before


async def test_client_needs_no_privileges_on_the_feed_and_the_audit_log(dsn: str, directory: Sql) -> None:
    role = f"kp_client_{secrets.token_hex(4)}"
    await directory.execute(f'CREATE ROLE "{role}"')
    await directory.execute(may_log_in(dsn, role))
    await directory.execute(f'GRANT USAGE ON SCHEMA keyproxy TO "{role}"')
    await directory.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON keyproxy.api_keys TO "{role}"')
    await directory.execute(f'GRANT SELECT ON keyproxy.users TO "{role}"')
    before = await change_rows(directory)
    client = await asyncpg.connect(as_role(dsn, role))
    try:
        await add_key(client)
        await client.execute("UPDATE keyproxy.api_keys SET revoked_at = now()")
        for table in ("changes", "audit_log"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await client.execute(f"SELECT * FROM keyproxy.{table}")
    finally:
        await client.close()
        actors = await directory.fetch("SELECT actor FROM keyproxy.audit_log WHERE entity = 'key'")
        changes = await change_rows(directory)
        await directory.execute(f'DROP OWNED BY "{role}"')
        await directory.execute(f'DROP ROLE "{role}"')
    assert [row["actor"] for row in actors] == [f"sql:{role}"] * 2
    assert changes == before + 2
