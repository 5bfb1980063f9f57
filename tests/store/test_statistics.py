"""The work of a statement on many keys does not grow with the square of their number, whatever the statistics are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from keyproxy.store.postgres import queries
from tests.store.harness import Sql, add_keys, add_user, until_blocked

_KEYS = 1_000

#: Rows that a statement may look at, for each key. Comparing each key with every other makes it a thousand.
_ROWS_PER_KEY_MAX = 20


@pytest.fixture
async def stale(own_dsn: str) -> AsyncIterator[Sql]:
    """Keys of one user in a table whose statistics were collected when it had many pages and no rows.

    The database is this test's own: a bitmap index scan counts dead entries too, and a shared database has one for
    each earlier test that made the same user.
    """
    sql: Sql = await asyncpg.connect(own_dsn)
    await add_user(sql)
    await sql.execute("SET session_replication_role = replica")
    await sql.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest)"
        " SELECT 'gone_' || n, 'u_42', sha256(('gone ' || n)::bytea) FROM generate_series(1, 10000) AS n"
    )
    await sql.execute("DELETE FROM keyproxy.api_keys")
    await sql.execute("ANALYZE keyproxy.api_keys")
    await sql.execute(
        "INSERT INTO keyproxy.api_keys (id, user_id, digest, name)"
        f" SELECT 'key_' || n, 'u_42', sha256(n::text::bytea), 'n' || n FROM generate_series(1, {_KEYS}) AS n"
    )
    await sql.execute("RESET session_replication_role")
    yield sql
    await sql.close()


def _arguments(statement: str, tenant: str) -> tuple[object, ...]:
    if statement == "revoke_leaked":
        return [f"key_{number}" for number in range(1, _KEYS + 1)], "x", tenant
    if statement == "revoke_keys":
        return "", _KEYS, "x", None, tenant, None, None
    wishes: list[dict[str, object]] = [
        {"user_id": "u_42", "name": f"n{number}", "scopes": [], "is_test": False, "plan": None, "roles": []}
        for number in range(1, _KEYS + 1)
    ]
    return json.dumps(wishes), "x"


def _rows(plan: dict[str, Any]) -> float:
    """How many rows the nodes of a plan returned or rejected."""
    here = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Join Filter", 0)
    return float(plan["Actual Loops"] * here) + sum(_rows(part) for part in plan.get("Plans", ()))


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("statement", ["revoke_leaked", "revoke_keys", "revoke_unseen"])
async def test_no_key_is_compared_with_every_other(stale: Sql, statement: str, mode: str) -> None:
    tenant = await stale.fetchval("SELECT tenant_id FROM keyproxy.users WHERE id = 'u_42'")
    await stale.execute(f"SET plan_cache_mode = {mode}")
    explained = await stale.fetchval(
        f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {queries.load()[statement]}", *_arguments(statement, tenant)
    )
    revoked = await stale.fetchval("SELECT count(*) FROM keyproxy.api_keys WHERE revoke_reason = 'x'")
    assert revoked == _KEYS
    assert _rows(json.loads(explained)[0]["Plan"]) <= _ROWS_PER_KEY_MAX * _KEYS


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_no_wish_is_compared_with_every_key(stale: Sql, mode: str) -> None:
    await stale.execute(f"SET plan_cache_mode = {mode}")
    wishes: list[dict[str, object]] = [
        {
            "id": f"new_{number}",
            "user_id": "u_42",
            "digest": f"{number:064x}",
            "hint": "",
            "name": f"n{number}",
            "scopes": [],
            "is_test": False,
            "life_seconds": None,
            "plan": None,
            "roles": [],
        }
        for number in range(_KEYS // 2 + 1, _KEYS + _KEYS // 2 + 1)
    ]
    explained = await stale.fetchval(
        f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {queries.load()['issue_keys']}", json.dumps(wishes), None
    )
    made = await stale.fetch("SELECT name FROM keyproxy.api_keys WHERE id LIKE 'new%'")
    assert {row["name"] for row in made} == {f"n{number}" for number in range(_KEYS + 1, _KEYS + _KEYS // 2 + 1)}
    assert _rows(json.loads(explained)[0]["Plan"]) <= _ROWS_PER_KEY_MAX * _KEYS


@pytest.mark.parametrize("statement", ["revoke_leaked", "revoke_keys"])
async def test_a_key_that_is_revoked_or_changed_concurrently_is_revoked_once(
    dsn: str, sql: Sql, statement: str
) -> None:
    await add_user(sql)
    await add_keys(sql, [1, 2, 3])
    tenant = await sql.fetchval("SELECT tenant_id FROM keyproxy.users WHERE id = 'u_42'")
    other: Sql = await asyncpg.connect(dsn)
    try:
        async with sql.transaction():
            await sql.execute(
                "UPDATE keyproxy.api_keys SET revoked_at = now(), revoke_reason = 'theirs' WHERE id = 'key_1'"
            )
            await sql.execute("UPDATE keyproxy.api_keys SET name = 'other' WHERE id = 'key_2'")
            ours = asyncio.create_task(other.fetch(queries.load()[statement], *_arguments(statement, tenant)))
            watch: Sql = await asyncpg.connect(dsn)
            await until_blocked(watch, "FOR NO KEY UPDATE OF")
            await watch.close()
        assert {row["id"] for row in await ours} == {"key_2", "key_3"}
    finally:
        await other.close()
    reasons = await sql.fetch("SELECT id, name, revoke_reason FROM keyproxy.api_keys ORDER BY id")
    assert [row["revoke_reason"] for row in reasons] == ["theirs", "x", "x"]
    assert reasons[1]["name"] == "other"
