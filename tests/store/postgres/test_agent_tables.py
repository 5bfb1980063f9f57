"""Guarantees of the tables of agents, agent tokens and signing keys, for any SQL client that writes to them."""

from __future__ import annotations

import json

import asyncpg
import pytest

from tests.store.harness import Sql, add_key, add_keys, add_user, audit_rows
from tests.store.token_minting import SIGNING_KEY, add_agent, add_token, token_digest, token_id


@pytest.fixture
async def chain(sql: Sql) -> Sql:
    """Of `key_1`: tokens 1 (agent a) > 2 (b) > 3 (c) of `u_42`, and 4 (a) of `u_2`; of `key_2`: token 5 (a) of `u_42`."""
    for user in ("u_42", "u_2"):
        await add_user(sql, user)
    await add_keys(sql, [1, 2])
    await add_token(sql, 1, agent="a")
    await add_token(sql, 2, parent=1, agent="b")
    await add_token(sql, 3, parent=2, agent="c", depth=2)
    await add_token(sql, 4, user="u_2", actor="u_42", agent="a")
    await add_token(sql, 5, key="key_2", agent="a")
    await sql.execute("DELETE FROM keyproxy.changes")
    return sql


async def noted(sql: Sql, statement: str) -> dict[str, set[int | str]]:
    """The kinds of the changes that a statement leaves, and their subjects: of keys and tokens, their numbers."""
    await sql.execute("DELETE FROM keyproxy.changes")
    await sql.execute(statement)
    names: dict[str, int | str] = {token_digest(number).hex(): number for number in range(1, 10)}
    for row in await sql.fetch("SELECT id, digest FROM keyproxy.api_keys"):
        names[row["digest"].hex()] = row["id"]
    found: dict[str, set[int | str]] = {}
    for row in await sql.fetch("SELECT kind, subject FROM keyproxy.changes"):
        found.setdefault(row["kind"], set()).add(names.get(row["subject"], row["subject"]))
    return found


# -- values


@pytest.mark.parametrize("acts_for", ["", "user", "TENANT", "all"])
async def test_key_acts_for_none_or_its_tenant(sql: Sql, acts_for: str) -> None:
    await add_user(sql)
    await add_key(sql)
    assert await sql.fetchval("SELECT acts_for FROM keyproxy.api_keys") == "none"
    with pytest.raises(asyncpg.CheckViolationError):
        await sql.execute("UPDATE keyproxy.api_keys SET acts_for = $1", acts_for)
    with pytest.raises(asyncpg.NotNullViolationError):
        await sql.execute("UPDATE keyproxy.api_keys SET acts_for = NULL")
    await sql.execute("UPDATE keyproxy.api_keys SET acts_for = 'tenant'")


@pytest.mark.parametrize("agent", ["", "-a", ".a", "_a", "a b", "a\n", "a/b", "a:b", "a@b", "é", "a" * 65])
async def test_agent_names_are_words(sql: Sql, agent: str) -> None:
    await add_user(sql)
    for good in ("a", "A.b_c-9", "a" * 64):
        await add_agent(sql, good)
    with pytest.raises(asyncpg.CheckViolationError):
        await add_agent(sql, agent)


@pytest.mark.parametrize("roles", [["Not a role"], ["a"] * 17, ["a", None]])
async def test_ceiling_of_an_agent_has_at_most_16_names_of_roles(sql: Sql, roles: list[str | None]) -> None:
    await add_user(sql)
    await add_agent(sql)
    for good in (None, [], ["a"] * 16):
        await sql.execute("UPDATE keyproxy.agents SET roles = $1", good)
    with pytest.raises(asyncpg.CheckViolationError):
        await sql.execute("UPDATE keyproxy.agents SET roles = $1", roles)


async def test_agents_of_different_users_have_the_same_name(sql: Sql) -> None:
    for user in ("u_42", "u_2"):
        await add_user(sql, user)
        await add_agent(sql, "crawler", user)
    with pytest.raises(asyncpg.UniqueViolationError):
        await sql.execute("INSERT INTO keyproxy.agents (user_id, id) VALUES ('u_2', 'crawler')")


async def test_any_client_creates_at_most_1000_agents_per_user(sql: Sql) -> None:
    for user in ("u_42", "u_2"):
        await add_user(sql, user)
    insert = "INSERT INTO keyproxy.agents (user_id, id) SELECT $1, 'a' || n FROM generate_series(1, $2::int) AS n"
    with pytest.raises(asyncpg.CheckViolationError, match="1000 agents"):
        await sql.execute(insert, "u_42", 1001)
    await sql.execute(insert, "u_42", 1000)
    await sql.execute(insert, "u_2", 1)
    # An agent that exists is no other one.
    await add_agent(sql, "a7")


@pytest.mark.parametrize(
    "assignment",
    [
        "id = 'agt_short'", "id = 'tok_0000000000000000000001'", "id = 'agt_000000000000000000000!'",
        "digest = '\\x00'", "scopes = '{*}'", "scopes = '{a,NULL}'", "audience = ''", "token_budget = -1",
        "request_budget = -1", "depth = 4", "depth = -1", "depth = 1", "revoke_reason = 'x'",
        "expires_at = created_at + interval '15 minutes 6 seconds'", "expires_at = 'infinity'",
        "parent_token_id = 'agt_0000000000000000000001', depth = 1",
        "revoked_at = now(), revoke_reason = repeat('x', 501)",
    ],
)  # fmt: skip
async def test_values_of_a_token_are_checked(sql: Sql, assignment: str) -> None:
    await add_user(sql)
    await add_key(sql)
    await add_token(sql, 1)
    await sql.execute(
        "UPDATE keyproxy.agent_tokens SET expires_at = created_at + interval '15 minutes 5 seconds', token_budget = 0,"
        " request_budget = 0, revoked_at = now(), revoke_reason = 'x'"
    )
    await sql.execute("UPDATE keyproxy.agent_tokens SET revoked_at = NULL, revoke_reason = NULL")
    with pytest.raises(asyncpg.CheckViolationError):
        await sql.execute(f"UPDATE keyproxy.agent_tokens SET {assignment}")


async def test_no_private_key_is_stored(sql: Sql) -> None:
    insert = "INSERT INTO keyproxy.signing_keys (kid, jwk, ends_at) VALUES ($1, $2::text::jsonb, now())"
    jwk = SIGNING_KEY.public_jwk()
    with pytest.raises(asyncpg.CheckViolationError):
        await sql.execute(insert, SIGNING_KEY.kid, json.dumps({**jwk, "d": "AAAA"}))
    await sql.execute(insert, SIGNING_KEY.kid, json.dumps(jwk))


# -- owners


@pytest.mark.parametrize(
    ("statement", "left"),
    [
        ("DELETE FROM keyproxy.api_keys WHERE id = 'key_1'", {5}),
        ("DELETE FROM keyproxy.api_keys WHERE id = 'key_2'", {1, 2, 3, 4}),
        ("DELETE FROM keyproxy.users WHERE id = 'u_2'", {1, 2, 3, 5}),
        ("DELETE FROM keyproxy.users WHERE id = 'u_42'", set()),
        ("DELETE FROM keyproxy.agents WHERE user_id = 'u_42' AND id = 'a'", {4}),
        ("DELETE FROM keyproxy.agents WHERE user_id = 'u_42' AND id = 'c'", {1, 2, 4, 5}),
        ("DELETE FROM keyproxy.tenants", set()),
        (f"DELETE FROM keyproxy.agent_tokens WHERE id = '{token_id(2)}'", {1, 4, 5}),
    ],
)
async def test_deleting_an_owner_deletes_exactly_the_tokens_below_it(
    chain: Sql, statement: str, left: set[int]
) -> None:
    await chain.execute(statement)
    rows = await chain.fetch("SELECT id FROM keyproxy.agent_tokens")
    assert {row["id"] for row in rows} == {token_id(number) for number in left}


async def test_audit_log_keeps_agents_and_tokens_of_a_deleted_user(chain: Sql) -> None:
    await chain.execute("DELETE FROM keyproxy.users WHERE id = 'u_42'")
    rows = await chain.fetch(
        "SELECT entity, entity_id, tenant_id FROM keyproxy.audit_log WHERE action = 'delete' AND entity LIKE 'agent%'"
    )
    assert {tuple(row) for row in rows} == {
        *(("agent", f"u_42/{agent}", "acme") for agent in "abc"),
        *(("agent_token", token_id(number), "acme") for number in range(1, 6)),
    }


async def test_ids_of_owners_change_with_their_tokens(chain: Sql) -> None:
    await chain.execute("UPDATE keyproxy.users SET id = id || '_new'")
    await chain.execute("UPDATE keyproxy.api_keys SET id = id || '_new'")
    await chain.execute("UPDATE keyproxy.agents SET id = id || '_new'")
    rows = await chain.fetch(
        "SELECT user_id, agent_id, root_key_id, actor_user_id FROM keyproxy.agent_tokens ORDER BY id"
    )
    assert [tuple(row) for row in rows] == [
        ("u_42_new", "a_new", "key_1_new", None),
        ("u_42_new", "b_new", "key_1_new", None),
        ("u_42_new", "c_new", "key_1_new", None),
        ("u_2_new", "a_new", "key_1_new", "u_42_new"),
        ("u_42_new", "a_new", "key_2_new", None),
    ]


async def test_plan_of_an_agent_cannot_be_deleted(chain: Sql) -> None:
    await chain.execute("INSERT INTO keyproxy.plans (id) VALUES ('p'); UPDATE keyproxy.agents SET plan_id = 'p'")
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await chain.execute("DELETE FROM keyproxy.plans")


# -- the change feed

_BELOW_KEY: set[int | str] = {"key_1", 1, 2, 3, 4}

NOTES: list[tuple[str, dict[str, set[int | str]]]] = [
    ("UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'", {"key": _BELOW_KEY}),
    ("UPDATE keyproxy.api_keys SET acts_for = 'tenant' WHERE id = 'key_1'", {"key": _BELOW_KEY}),
    ("UPDATE keyproxy.api_keys SET scopes = '{}' WHERE id = 'key_1'", {"key": _BELOW_KEY}),
    ("UPDATE keyproxy.api_keys SET plan_id = 'p' WHERE id = 'key_1'", {"key_limits": _BELOW_KEY}),
    ("UPDATE keyproxy.api_keys SET name = 'x' WHERE id = 'key_1'", {}),
    ("UPDATE keyproxy.api_keys SET last_used_at = now()", {}),
    ("DELETE FROM keyproxy.api_keys WHERE id = 'key_2'", {"key": {5, "deleted"}}),
    ("UPDATE keyproxy.agents SET disabled_at = now() WHERE user_id = 'u_42' AND id = 'a'", {"key": {1, 2, 3, 5}}),
    ("UPDATE keyproxy.agents SET roles = '{}' WHERE user_id = 'u_42' AND id = 'b'", {"key": {2, 3}}),
    ("UPDATE keyproxy.agents SET plan_id = 'p' WHERE user_id = 'u_42' AND id = 'b'", {"key_limits": {2, 3}}),
    ("UPDATE keyproxy.agents SET roles = '{}' WHERE user_id = 'u_2'", {"key": {4}}),
    ("UPDATE keyproxy.agents SET roles = roles", {}),
    ("DELETE FROM keyproxy.agents WHERE user_id = 'u_42' AND id = 'b'", {"key": {2, 3}}),
    (f"UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE id = '{token_id(1)}'", {"key": {1, 2, 3}}),
    (f"UPDATE keyproxy.agent_tokens SET scopes = '{{}}' WHERE id = '{token_id(2)}'", {"key": {2, 3}}),
    (f"UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE id = '{token_id(3)}'", {"key": {3}}),
    (f"DELETE FROM keyproxy.agent_tokens WHERE id = '{token_id(1)}'", {"key": {1, 2, 3}}),
    ("UPDATE keyproxy.agent_tokens SET depth = depth", {}),
    ("TRUNCATE keyproxy.agent_tokens CASCADE", {"all": {"agent_tokens"}}),
    ("TRUNCATE keyproxy.agents CASCADE", {"all": {"agents", "agent_tokens"}}),
    ("INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_new', 'acme')", {"user": {"u_new"}}),
    ("INSERT INTO keyproxy.signing_keys (kid, jwk, ends_at) VALUES (repeat('k', 43), '{}', now())",
     {"signing": {"k" * 43}}),
]  # fmt: skip


@pytest.mark.parametrize("role", ["origin", "replica"])
@pytest.mark.parametrize(("statement", "expected"), NOTES)
async def test_change_is_in_the_feed_for_every_live_token_below_it(
    chain: Sql, statement: str, expected: dict[str, set[int | str]], role: str
) -> None:
    await chain.execute("INSERT INTO keyproxy.plans (id) VALUES ('p')")
    deleted = await chain.fetchval("SELECT encode(digest, 'hex') FROM keyproxy.api_keys WHERE id = 'key_2'")
    await chain.execute(f"SET session_replication_role = {role}")
    found = await noted(chain, statement)
    assert found == {kind: {deleted if one == "deleted" else one for one in who} for kind, who in expected.items()}


async def test_signing_key_that_is_cut_or_deleted_is_in_the_feed(sql: Sql) -> None:
    await sql.execute("INSERT INTO keyproxy.signing_keys (kid, jwk, ends_at) VALUES (repeat('k', 43), '{}', now())")
    for statement in (
        "UPDATE keyproxy.signing_keys SET ends_at = now() - interval '1 hour'",
        "DELETE FROM keyproxy.signing_keys",
    ):
        assert await noted(sql, statement) == {"signing": {"k" * 43}}
    assert await noted(sql, "UPDATE keyproxy.signing_keys SET ends_at = ends_at") == {}


async def test_expired_tokens_are_not_noted(chain: Sql) -> None:
    await add_token(chain, 6, agent="a", age="13 minutes", lifetime="10 minutes")
    await add_token(chain, 7, agent="a", age="10 minutes 30 seconds", lifetime="10 minutes")
    found = await noted(chain, "UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'")
    # A token counts as live for a minute longer: the clock of a proxy may be behind.
    assert found == {"key": {*_BELOW_KEY, 7}}


async def test_token_that_arrives_before_its_owners_is_noted_with_each_of_them(chain: Sql) -> None:
    await chain.execute("SET session_replication_role = replica")
    tables = {"tenants": "id = 'acme'", "users": "id = 'u_42'", "agents": "id = 'a'", "api_keys": "id = 'key_2'"}
    for table, condition in tables.items():
        await chain.execute(f"CREATE TEMP TABLE kept AS SELECT * FROM keyproxy.{table} WHERE {condition}")
        await chain.execute(f"DELETE FROM keyproxy.{table} WHERE {condition}")
        found = await noted(chain, f"INSERT INTO keyproxy.{table} SELECT * FROM kept")
        assert 5 in found["key"]
        await chain.execute("DROP TABLE kept")


async def test_new_token_is_noted_without_waking_every_proxy(chain: Sql, dsn: str) -> None:
    woken: list[object] = []
    listening: Sql = await asyncpg.connect(dsn)
    try:
        await listening.add_listener("keyproxy_changes", lambda *arguments: woken.append(arguments))
        await add_token(chain, 6, agent="a")
        assert await chain.fetchval("SELECT subject FROM keyproxy.changes") == token_digest(6).hex()
        await listening.execute("SELECT 1")
        assert woken == []
        await chain.execute("UPDATE keyproxy.agent_tokens SET revoked_at = now()")
        await listening.execute("SELECT 1")
        assert len(woken) == 1
    finally:
        await listening.close()


# -- the audit log


async def test_every_change_of_an_agent_or_token_is_in_the_audit_log_without_its_digest(chain: Sql) -> None:
    await chain.execute("UPDATE keyproxy.agents SET disabled_at = now() WHERE user_id = 'u_2'")
    await chain.execute("UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE user_id = 'u_2'")
    rows = await chain.fetch(
        "SELECT action, entity, entity_id, tenant_id, actor, before, after FROM keyproxy.audit_log"
        " ORDER BY id DESC LIMIT 2"
    )
    assert [tuple(row)[:5] for row in rows] == [
        ("update", "agent_token", token_id(4), "acme", "sql:keyproxy"),
        ("update", "agent", "u_2/a", "acme", "sql:keyproxy"),
    ]
    for row in rows:
        assert "digest" not in row["before"] + row["after"]
    before = await audit_rows(chain)
    await chain.execute("UPDATE keyproxy.agents SET id = id; UPDATE keyproxy.agent_tokens SET depth = depth")
    assert await audit_rows(chain) == before
    for table in ("agent_tokens", "agents"):
        await chain.execute(f"TRUNCATE keyproxy.{table} CASCADE")
    rows = await chain.fetch("SELECT entity FROM keyproxy.audit_log WHERE action = 'truncate'")
    assert {row["entity"] for row in rows} == {"agent_token", "agent"}
