"""Lookups of credentials read a bounded number of rows each, whatever the statistics are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest

from keyproxy.store.postgres import queries
from tests.store.harness import Sql

_SUBJECTS = 500

#: Rows that a statement may look at for each subject. Comparing each with every other makes it hundreds.
_ROWS_PER_SUBJECT_MAX = 60

#: From this cost on PostgreSQL compiles a plan, which takes longer than the lookup: its default `jit_above_cost`.
_JIT_COST = 100_000

#: One chain of two tokens for each number, cut from a key of `u_n` that acts for `v_n`; both have agents and ceilings.
_ROWS = """
INSERT INTO keyproxy.users (id, tenant_id, roles) SELECT 'u_' || n, 'acme', '{r}' FROM generate_series(1, $1::int) AS n;
INSERT INTO keyproxy.users (id, tenant_id, roles) SELECT 'v_' || n, 'acme', '{r}' FROM generate_series(1, $1::int) AS n;
INSERT INTO keyproxy.api_keys (id, user_id, digest, scopes, acts_for, expires_at)
SELECT 'key_' || n, 'u_' || n, sha256(('key ' || n)::bytea), '{a}', 'tenant', 'infinity'
FROM generate_series(1, $1::int) AS n;
INSERT INTO keyproxy.agents (user_id, id, roles) SELECT 'v_' || n, a, '{r}'
FROM generate_series(1, $1::int) AS n, unnest('{a0,a1}'::text[]) AS a;
INSERT INTO keyproxy.agent_tokens
    (id, digest, user_id, agent_id, root_key_id, actor_user_id, parent_token_id, scopes, audience, depth, expires_at)
SELECT 'agt_' || lpad(n::text, 20, '0') || '_' || d, sha256(('token ' || n || ' ' || d)::bytea), 'v_' || n, 'a' || d,
       'key_' || n, 'u_' || n, CASE WHEN d = 1 THEN 'agt_' || lpad(n::text, 20, '0') || '_0' END, '{a}', 'keyproxy', d,
       now() + interval '10 minutes'
FROM generate_series(1, $1::int) AS n, unnest('{0,1}'::int[]) AS d;
INSERT INTO keyproxy.oauth_clients (id, client_id, kind)
SELECT 'cli_' || left(encode(sha256(n::text::bytea), 'hex'), 32), n::text, 'document'
FROM generate_series(1, $1::int) AS n;
INSERT INTO keyproxy.oauth_grants (id, user_id, client_id, resource, scopes, plan_id)
SELECT 'gra_' || lpad(n::text, 22, '0'), 'u_' || n, 'cli_' || left(encode(sha256(n::text::bytea), 'hex'), 32), 'r',
       '{a}', 'p'
FROM generate_series(1, $1::int) AS n;
INSERT INTO keyproxy.oauth_sessions (id, grant_id, presented_as, scopes, expires_at, via_key)
SELECT 'ses_' || lpad(n::text, 22, '0'), 'gra_' || lpad(n::text, 22, '0'), 'c', '{a}', 'infinity', 'key_' || n
FROM generate_series(1, $1::int) AS n;
INSERT INTO keyproxy.oauth_access_tokens (digest, session_id, scopes, expires_at)
SELECT sha256(('access ' || n)::bytea), 'ses_' || lpad(n::text, 22, '0'), '{a}', 'infinity'
FROM generate_series(1, $1::int) AS n;
"""


async def fill(sql: Sql, rows: int) -> None:
    """Insert the rows."""
    for statement in _ROWS.replace("|| '_' || d", "|| 'x' || d").replace("|| '_0'", "|| 'x0'").split(";"):
        if statement.strip():
            await sql.execute(statement, rows)


@pytest.fixture
async def stale(own_dsn: str) -> AsyncIterator[Sql]:
    """Tables whose statistics were collected when they had many pages and no rows."""
    sql: Sql = await asyncpg.connect(own_dsn)
    tables = (
        "users", "api_keys", "agents", "agent_tokens", "oauth_clients", "oauth_grants", "oauth_sessions",
        "oauth_access_tokens",
    )  # fmt: skip
    for table in tables:
        await sql.execute(f"ALTER TABLE keyproxy.{table} DISABLE TRIGGER ALL")
    await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ('acme')")
    await sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('r', '{a}')")
    await sql.execute("INSERT INTO keyproxy.plans (id) VALUES ('p')")
    await fill(sql, 5_000)
    for table in tables:
        await sql.execute(f"DELETE FROM keyproxy.{table}")
        await sql.execute(f"ANALYZE keyproxy.{table}")
    await fill(sql, _SUBJECTS)
    yield sql
    await sql.close()


def arguments_of(statement: str) -> tuple[object, ...]:
    """A batch of known subjects."""
    numbers = range(1, _SUBJECTS + 1)
    if statement == "acting_identities":
        keys = [hashlib.sha256(f"key {number}".encode()).digest() for number in numbers]
        return keys, [f"v_{number}" for number in numbers]
    names = {
        "identities_by_digest": "key {}",
        "access_token_identities": "access {}",
        "agent_token_identities": "token {} 1",
    }
    name = names[statement]
    return ([hashlib.sha256(name.format(number).encode()).digest() for number in numbers],)


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from _nodes(part)


def _looked_at(node: dict[str, Any]) -> float:
    here = node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Join Filter", 0)
    return float(node["Actual Loops"] * here)


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan", "auto"])
@pytest.mark.parametrize(
    "statement",
    ["access_token_identities", "acting_identities", "agent_token_identities", "identities_by_digest"],
)
async def test_lookup_reads_a_bounded_number_of_rows_per_subject_whatever_the_statistics_are(
    stale: Sql, statement: str, mode: str
) -> None:
    arguments = arguments_of(statement)
    await stale.execute(f"SET plan_cache_mode = {mode}; SET jit = on")
    explained = await stale.fetchval(
        f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {queries.load()[statement]}", *arguments
    )
    found = json.loads(explained)[0]
    nodes = list(_nodes(found["Plan"]))
    assert found["Plan"]["Actual Rows"] == _SUBJECTS
    assert found["Plan"]["Total Cost"] < _JIT_COST
    assert "JIT" not in found
    assert sum(map(_looked_at, nodes)) <= _ROWS_PER_SUBJECT_MAX * _SUBJECTS
    rows = await stale.fetch(queries.load()[statement], *arguments)
    assert {row["is_disabled"] or row["is_revoked"] for row in rows} == {False}
