"""No statement on the path of a request is JIT-compiled, and none depends on the planner's statistics of a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import cast

import asyncpg
import pytest

from keyproxy.limits.ledger_protocol import Pool, Window
from keyproxy.store.ledger.charge_dedup_postgres import PostgresClaims
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.postgres import queries
from keyproxy.store.postgres.array_text import array_text
from keyproxy.store.postgres.database import Database
from keyproxy.store.usage.usage_queries import DIMENSIONS
from tests.contracts import LEASE_SECONDS, line, window
from tests.store.harness import PlainDatabase, Sql
from tests.store.ledger.test_charge_dedup import claim
from tests.store.ledger.test_window_credits import credit

_PINS = (
    "enable_",
    "plan_cache_mode",
    "random_page_cost",
    "seq_page_cost",
    "cpu_",
    "join_collapse_limit",
    "from_collapse_limit",
)

#: Messages of a holder: a new lease, spending that is due an alert, the end of the lease; a token rate and its return.
_MESSAGES = (
    [line(want=5)],
    [line(granted=5, used=5, limit=5)],
    [line(granted=5, used=5, is_closing=True)],
    [line(2, window("token_rate"), want=5, interval_seconds=1.0)],
    [line(2, window("token_rate"), returned=2, interval_seconds=1.0)],
    [line(3, Window(Pool("user", "u_42", False), "spend_per_week", "model:gpt-4o"), want=5)],
    [line(4, Window(Pool("token", "agt_1", False), "tokens_total"), want=5)],
)

#: Tables that grow with users, replicas or requests.
_LARGE = "windows|leases|lease_holders|usage|idempotent_charges|limit_alerts|window_credits"


async def test_every_function_that_pins_the_planner_pins_jit(sql: Sql) -> None:
    rows = await sql.fetch(
        "SELECT proname, proconfig FROM pg_proc WHERE pronamespace = 'keyproxy'::regnamespace AND proconfig IS NOT NULL"
    )
    pinned = {
        row["proname"]: row["proconfig"] for row in rows if any(one.startswith(_PINS) for one in row["proconfig"])
    }
    assert "sync_leases" in pinned
    assert [name for name, settings in pinned.items() if "jit=off" not in settings] == []


async def test_every_function_of_the_ledger_and_of_usage_pins_jit(sql: Sql) -> None:
    rows = await sql.fetch(
        "SELECT proname, prosrc, coalesce(proconfig, '{}') AS settings FROM pg_proc"
        " WHERE pronamespace = 'keyproxy'::regnamespace AND prorettype <> 'trigger'::regtype"
    )
    about = re.compile(rf"keyproxy\.({_LARGE}|ledger_history|claim_batches)\b")
    found = {row["proname"]: "jit=off" in row["settings"] for row in rows if about.search(row["prosrc"])}
    assert len(found) > 10
    # Called by sync_leases only, whose settings apply.
    assert {name for name, is_pinned in found.items() if not is_pinned} == {"ledger_settles_until"}


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


_EXPLAIN = (
    "SET auto_explain.log_min_duration = 0; SET auto_explain.log_nested_statements = on;"
    "SET auto_explain.log_analyze = on; SET client_min_messages = log; SET jit = on"
)


@pytest.mark.parametrize("analyzed", [False, True])
async def test_no_part_of_a_message_is_jit_compiled_or_scans_a_table(
    sql: Sql, plans: list[str], analyzed: bool
) -> None:
    if analyzed:
        await sql.execute("ANALYZE")
    await sql.execute(_EXPLAIN)
    ledger = PostgresLedger(
        cast("Database", PlainDatabase(sql)), lease_seconds=LEASE_SECONDS, alert_percentages=(80, 100)
    )
    for serial, lines in enumerate(_MESSAGES, 1):
        assert await ledger.sync("a", serial, lines)
    await sql.execute("SET client_min_messages = notice")
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.limit_alerts") == 2
    assert any("ledger_history" in plan for plan in plans)
    assert [plan for plan in plans if "JIT:" in plan] == []
    assert [plan for plan in plans if re.search(r"Seq Scan on (?!pg_)", plan)] == []


@pytest.mark.parametrize("analyzed", [False, True])
async def test_claims_usage_credits_and_cleanup_scan_no_large_table_and_are_not_jit_compiled(
    sql: Sql, plans: list[str], analyzed: bool
) -> None:
    database = cast("Database", PlainDatabase(sql))
    if analyzed:
        await sql.execute("ANALYZE")
    await sql.execute(_EXPLAIN)
    claims = PostgresClaims(database)
    for batch in (1, 2):
        await claims.claim("p", batch, [claim(1, 5), claim(2, 6)])
    await claims.cover([claim(1).fingerprint])
    await claims.forget(10)
    await credit(database, window(), 10, 5)
    ledger = PostgresLedger(database, lease_seconds=LEASE_SECONDS, alert_percentages=(80, 100))
    await ledger.sync("a", 1, [line(want=5)])
    await ledger.end("a")
    await ledger.reap()
    await ledger.forget(10)
    await database.fetch("forget_windows", 0, 10)
    await database.fetch("tend_usage", 7, 400, 10)
    key = ([date(2026, 1, 31)], ["acme"], ["u_42"], ["key_1"], [False], ["r"], ["m"])
    columns: list[Sequence[object]] = [*key, *([[1]] * 9)]
    for batch in (1, 2):
        await database.fetch("record_usage", "p", batch, *map(array_text, columns), None)
    await sql.execute("SET client_min_messages = notice")
    assert len(plans) > 20
    assert [plan for plan in plans if "JIT:" in plan] == []
    assert [plan for plan in plans if re.search(rf"Seq Scan on ({_LARGE})\b", plan)] == []


_ALL_TIME = (None,) * 5
_FIRST = (date.min, "", "", "", False, "", "")
_LATER = (date(2026, 5, 1), "t_1", "u_1", "", False, "", "")

#: Reports of usage: the statement, its arguments, and how many rows it returns.
_REPORTS: dict[str, tuple[str, tuple[object, ...], int]] = {
    "all of it": ("usage_by", (["tenant"], *_ALL_TIME, 1_000), 7),
    "each row": ("usage_by", (list(DIMENSIONS), *_ALL_TIME, 1_000), 1_000),
    "a month": ("usage_by", (["day"], None, None, None, date(2026, 5, 1), date(2026, 6, 1), 1_000), 31),
    "since a day": ("usage_by", (["model"], None, None, None, date(2026, 5, 1), None, 1_000), 5),
    "until a day": ("usage_by", (["route"], None, None, None, None, date(2026, 2, 1), 1_000), 3),
    "a tenant": ("usage_by", (["mode"], "t_1", None, None, None, None, 1_000), 1),
    "a user": ("usage_by", (["key"], None, "u_1", None, None, None, 1_000), 2),
    "a key": ("usage_by", (["key"], None, None, "key_1_1", None, None, 1_000), 1),
    "the first page": ("usage_after", (*_FIRST, *_ALL_TIME, 1_000), 1_000),
    "a later page": ("usage_after", (*_LATER, *_ALL_TIME, 1_000), 1_000),
    "a page since a day": ("usage_after", (*_FIRST, None, None, None, date(2026, 5, 1), None, 1_000), 1_000),
    "a page until a day": ("usage_after", (*_FIRST, None, None, None, None, date(2026, 1, 3), 1_000), 200),
    "a page of a tenant": ("usage_after", (*_FIRST, "t_1", None, None, None, None, 1_000), 1_000),
    "a page of a user": ("usage_after", (*_FIRST, None, "u_1", None, None, None, 1_000), 207),
    "a page of a key": ("usage_after", (*_LATER, None, None, "key_1_1", None, None, 1_000), 42),
}


@pytest.mark.parametrize("analyzed", [False, True])
async def test_reports_scan_no_usage_and_are_not_jit_compiled_however_often_they_were_prepared(
    sql: Sql, plans: list[str], analyzed: bool
) -> None:
    await sql.execute(
        "INSERT INTO keyproxy.usage"
        " (day, tenant_id, user_id, key_id, is_test, route, model, requests, refusals, tokens_in, tokens_out,"
        "  tokens_estimated)"
        " SELECT date '2026-01-01' + n / 100, 't_' || n % 7, 'u_' || n % 97, 'key_' || n % 97 || '_' || n % 2, false,"
        "        'r' || n % 3, 'm' || n % 5, 1, 0, 9, 9, 0 FROM generate_series(0, 19999) AS n"
    )
    if analyzed:
        await sql.execute("ANALYZE")
    await sql.execute(_EXPLAIN)
    statements = queries.load()
    for statement in ("usage_by", "usage_after"):
        reports = [report for report in _REPORTS.values() if report[0] == statement]
        for _ in range(3):
            for _, arguments, count in reports:
                rows = await sql.fetch(statements[statement], *arguments)
                assert len(rows) == count
    await sql.execute("SET client_min_messages = notice")
    of_usage = [plan for plan in plans if "keyproxy.usage AS u" in plan]
    assert len(of_usage) == 3 * len(_REPORTS)
    assert [plan for plan in plans if "JIT:" in plan] == []
    assert [plan for plan in of_usage if "Seq Scan" in plan] == []


async def test_server_with_jit_compiles_costly_statements(sql: Sql) -> None:
    """The precondition of the other tests of this file."""
    if not await sql.fetchval("SELECT pg_jit_available()"):
        pytest.skip("this PostgreSQL is built without LLVM: make test-postgres")
    assert await sql.fetchval("SELECT current_setting('jit')") == "on"
    plan = await sql.fetch("EXPLAIN SELECT count(*) FROM generate_series(1, 100000000) AS a (n), keyproxy.tenants")
    assert any("JIT:" in row[0] for row in plan)
