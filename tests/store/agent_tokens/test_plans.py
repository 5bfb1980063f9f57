"""Nothing that mints, notes or deletes tokens scans a table that grows, or is JIT-compiled, whatever the statistics."""

from __future__ import annotations

import re
from typing import cast

import asyncpg
import pytest

from keyproxy.store.postgres.database import StatementRunner
from tests.store.harness import PlainDatabase, Sql, add_keys, add_user
from tests.store.token_minting import MINT, Minting, add_token, key_parent, request, token_id, token_parent

_LARGE = "agent_tokens|agents|api_keys|users|windows|leases|signing_keys"

_EXPLAIN = (
    "SET auto_explain.log_min_duration = 0; SET auto_explain.log_nested_statements = on;"
    "SET auto_explain.log_analyze = on; SET client_min_messages = log; SET jit = on"
)


@pytest.fixture
async def plans(sql: Sql) -> list[str]:
    """The plans of all statements from now on, also of those within functions."""
    plans: list[str] = []
    sql.add_log_listener(lambda _connection, message: plans.append(str(message)))
    try:
        await sql.execute("LOAD 'auto_explain'")
    except asyncpg.PostgresError:
        pytest.skip("this PostgreSQL comes without auto_explain")
    return plans


@pytest.mark.parametrize("analyzed", [False, True])
async def test_mints_notes_and_cleanup_scan_no_large_table_and_are_not_jit_compiled(
    sql: Sql, plans: list[str], analyzed: bool
) -> None:
    if analyzed:
        await sql.execute("ANALYZE")
    for user in ("u_42", "u_2"):
        await add_user(sql, user)
    await add_keys(sql, [1, 2])
    await sql.execute("UPDATE keyproxy.api_keys SET scopes = $1, acts_for = 'tenant'", ["jobs:write", MINT])
    await add_token(sql, 1, age="25 hours")
    await sql.execute(_EXPLAIN)
    mint = Minting(cast("StatementRunner", PlainDatabase(sql)))
    for _ in range(7):  # a prepared statement gets its generic plan at the sixth execution
        parent = await mint(key_parent(user="u_2"), request(scopes=("jobs:write", MINT)))
        await mint(token_parent(parent), request(agent="child"))
    await PlainDatabase(sql).fetch("tend_agent_tokens", 100)
    changes = (
        "UPDATE keyproxy.agents SET disabled_at = now() WHERE user_id = 'u_2' AND id = 'crawler'",
        f"UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE id = '{parent.id}'",
        "UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'",
        "INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_new', 'acme')",
        f"DELETE FROM keyproxy.agent_tokens WHERE id = '{token_id(1)}'",
        "DELETE FROM keyproxy.api_keys WHERE id = 'key_1'",
    )
    for statement in changes:
        await sql.execute(statement)
    await sql.execute("SET client_min_messages = notice")
    nested = [plan for plan in plans if re.search(rf"keyproxy\.({_LARGE})\b", plan)]
    assert len(nested) > 40
    assert [plan for plan in plans if "JIT:" in plan] == []
    # Not the changes themselves; and the tenant of an audit row, whose statement is planned anew each time.
    ours = [plan for plan in nested if not any(text in plan for text in (*changes, "SELECT coalesce("))]
    assert len(ours) > 30
    assert [plan for plan in ours if re.search(rf"Seq Scan on ({_LARGE})\b", plan)] == []
