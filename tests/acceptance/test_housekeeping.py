"""Housekeeping in the database: how an operator notices that it fails."""

from __future__ import annotations

import json

import asyncpg
import pytest

from tests.acceptance.conftest import Configure, until

_NAMES = {"reap", "holders", "changes", "usage", "windows", "claims"}


@pytest.mark.parametrize(
    ("function", "work", "check", "reason"),
    [
        ("reap_holders()", "reap", "ledger", "cannot end holders that have died"),
        ("forget_holders(int)", "holders", "housekeeping", "cannot delete holders that ended long ago"),
        ("tend_usage(int, int, int)", "usage", "housekeeping", "cannot delete old usage and windows"),
    ],
)
async def test_failed_housekeeping_shows_in_the_log_in_readiness_and_in_a_metric(
    configure: Configure, dsn: str, function: str, work: str, check: str, reason: str
) -> None:
    site = configure(dsn, ledger={"lease_seconds": 1.0})
    sql = await asyncpg.connect(dsn)
    name, _, arguments = function.partition("(")
    await sql.execute(f"ALTER FUNCTION keyproxy.{function} RENAME TO gone")

    async def verdict() -> str:
        status, page = await site.ops("/readyz")
        assert status in (200, 503)
        found = json.loads(page)["checks"][check]
        assert reason in found.get("reason", reason)
        return str(found["status"])

    async def is_degraded() -> bool:
        return await verdict() == "degraded"

    async def is_well() -> bool:
        return await verdict() == "ok"

    async with site.serving():
        assert {label for label in _NAMES if f'work="{label}"' in (await site.ops("/metrics"))[1]} == _NAMES
        await until(is_degraded, seconds=20.0)
        assert await site.metric("keyproxy_housekeeping_failures_total", work=work) >= 1
        await sql.execute(f"ALTER FUNCTION keyproxy.gone({arguments} RENAME TO {name}")
        await until(is_well, seconds=30.0)
    await sql.close()
    log = b"".join(site.printed).decode()
    assert log.count(reason) == 1
    assert "recovered, continuing to" in log
