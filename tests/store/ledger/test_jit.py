"""No statement on the path of a request is JIT-compiled, and none depends on the planner's statistics of a table."""

from __future__ import annotations

import re

import asyncpg
import pytest

from keyproxy.store.postgres import queries
from tests.contracts import LEASE_SECONDS
from tests.store.harness import Sql

_PINS = (
    "enable_",
    "plan_cache_mode",
    "random_page_cost",
    "seq_page_cost",
    "cpu_",
    "join_collapse_limit",
    "from_collapse_limit",
)

#: One message of a holder with a line about a new lease.
_MESSAGE = (
    ["user"],
    ["u_1"],
    [False],
    ["requests_per_day"],
    [0],
    [10],
    [0.0],
    [0],
    [0],
    [0],
    [5],
    [1],
    [False],
    [False],
)


async def test_every_function_that_pins_the_planner_pins_jit(sql: Sql) -> None:
    rows = await sql.fetch(
        "SELECT proname, proconfig FROM pg_proc WHERE pronamespace = 'keyproxy'::regnamespace AND proconfig IS NOT NULL"
    )
    pinned = {
        row["proname"]: row["proconfig"] for row in rows if any(one.startswith(_PINS) for one in row["proconfig"])
    }
    assert "sync_leases" in pinned
    assert [name for name, settings in pinned.items() if "jit=off" not in settings] == []


@pytest.mark.parametrize("analyzed", [False, True])
async def test_no_part_of_a_message_is_jit_compiled_or_scans_a_table(sql: Sql, analyzed: bool) -> None:
    if analyzed:
        await sql.execute("ANALYZE")
    plans: list[str] = []
    sql.add_log_listener(lambda _connection, message: plans.append(str(message)))
    try:
        await sql.execute("LOAD 'auto_explain'")
    except asyncpg.PostgresError:
        pytest.skip("this PostgreSQL comes without auto_explain")
    await sql.execute(
        "SET auto_explain.log_min_duration = 0; SET auto_explain.log_nested_statements = on;"
        "SET auto_explain.log_analyze = on; SET client_min_messages = log; SET jit = on"
    )
    statement = await sql.prepare(queries.load()["sync_leases"])
    for serial in (1, 2):
        await statement.fetch("a", serial, LEASE_SECONDS, [serial], *_MESSAGE)
    await sql.execute("SET client_min_messages = notice")
    assert any("ledger_history" in plan for plan in plans)
    assert [plan for plan in plans if "JIT:" in plan] == []
    assert [plan for plan in plans if re.search(r"Seq Scan on (?!pg_)", plan)] == []


async def test_server_with_jit_compiles_costly_statements(sql: Sql) -> None:
    """The precondition of the other tests of this file."""
    if not await sql.fetchval("SELECT pg_jit_available()"):
        pytest.skip("this PostgreSQL is built without LLVM: make test-postgres")
    assert await sql.fetchval("SELECT current_setting('jit')") == "on"
    plan = await sql.fetch("EXPLAIN SELECT count(*) FROM generate_series(1, 100000000) AS a (n), keyproxy.tenants")
    assert any("JIT:" in row[0] for row in plan)
