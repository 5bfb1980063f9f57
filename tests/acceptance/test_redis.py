"""A proxy process with leases from Redis: Redis dies, restarts with an old file, and loses all data."""

from __future__ import annotations

import tempfile
from pathlib import Path

import asyncpg

from tests.acceptance.conftest import Configure, Site, until
from tests.store.redis_server import RedisServer, program

LIMIT = 120


async def test_a_redis_that_crashes_or_loses_data_overspends_nothing_and_requires_no_proxy_restart(
    configure: Configure, dsn: str
) -> None:
    server_program = program("valkey")
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory:
        server = RedisServer(server_program, Path(directory))
        server.start()
        try:
            site = configure(dsn, ledger={"backend": server.url, "lease_seconds": 1.0, "settle_seconds": 0.1})
            secret = (await site.key())["secret"]
            sql = await asyncpg.connect(dsn)
            await sql.execute(
                "INSERT INTO keyproxy.plans (id, limits) VALUES ('p', $1)", f'{{"requests_per_day": {LIMIT}}}'
            )
            await sql.execute("UPDATE keyproxy.users SET plan_id = 'p'")
            async with site.serving():
                await _lost_and_spent(site, secret, server)
                row = await sql.fetchrow("SELECT spent, held FROM keyproxy.windows WHERE measure = 'requests_per_day'")
            await sql.close()
        finally:
            server.stop()
    assert row is not None
    assert LIMIT / 2 < len(site.upstream.heads) <= row["spent"] + row["held"] == LIMIT


async def _lost_and_spent(site: Site, secret: str, server: RedisServer) -> None:
    async def is_answered(status: int, code: str) -> bool:
        return await site.call(secret) == (status, code)

    assert await is_answered(200, "")
    server.command("SAVE")
    assert await is_answered(200, "")
    server.kill()
    # Leases are spent until they expire. Then the remaining limit is unknown, which is not "exhausted".
    await until(lambda: is_answered(503, "ledger_unavailable"))
    _, page = await site.ops("/readyz")
    assert "ledger" in page
    server.start()
    await until(lambda: is_answered(200, ""))
    server.command("FLUSHALL")
    await until(lambda: is_answered(429, "quota_exhausted"))
