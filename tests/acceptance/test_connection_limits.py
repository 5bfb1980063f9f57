"""A server with fewer connections than a proxy would use: the proxy works with those and reports the shortage."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import AsyncIterator

import asyncpg
import pytest

from keyproxy.store.postgres import roles
from tests.acceptance.conftest import Configure, Site, until
from tests.rawhttp import answer_with
from tests.server import as_role, may_log_in

CLIENTS, REQUESTS_EACH = 8, 25

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture
async def role(dsn: str, sql: asyncpg.Connection) -> AsyncIterator[str]:
    """A proxy role for this test only."""
    prefix = f"kp_{secrets.token_hex(4)}"
    await roles.create(dsn, prefix)
    await sql.execute(may_log_in(dsn, f"{prefix}_proxy"))
    yield f"{prefix}_proxy"
    for name in roles.names(prefix):
        await sql.execute(f'DROP OWNED BY "{name}"')
        await sql.execute(f'DROP ROLE "{name}"')


@pytest.mark.parametrize("limit", [1, 2, 4])
async def test_no_request_fails_with_few_connections_and_readiness_reports_the_shortage(
    configure: Configure, dsn: str, sql: asyncpg.Connection, role: str, limit: int
) -> None:
    site = configure(dsn)
    keys = [(await site.key(f"u_{number}"))["secret"] for number in range(CLIENTS * REQUESTS_EACH // 2)]
    await sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('p', '{\"requests_per_day\": 1000000}')")
    await sql.execute("UPDATE keyproxy.users SET plan_id = 'p'")
    await sql.execute(f'ALTER ROLE "{role}" CONNECTION LIMIT {limit}')
    site = configure(as_role(dsn, role), ledger={"lease_seconds": 2.0})
    site.upstream.answering = answer_with(_ANSWER)
    answers: Counter[tuple[int, str]] = Counter()

    async def ask(number: int) -> None:
        for turn in range(REQUESTS_EACH):
            # Half of the requests use a key that is not cached.
            answers[await site.call(keys[(number * REQUESTS_EACH + turn) // 2])] += 1

    async with site.serving():
        await until(lambda: _has_store(site))
        # A database that is slow for a moment: lookups overlap, so the proxy needs more connections than it may have.
        async with sql.transaction():
            await sql.execute("LOCK TABLE keyproxy.api_keys, keyproxy.changes IN ACCESS EXCLUSIVE MODE")
            slow = asyncio.gather(*(site.call(key) for key in keys[:64]))
            await asyncio.sleep(0.5)
        assert set(await slow) == {(200, "")}
        for _ in range(3):
            await asyncio.gather(*(ask(number) for number in range(CLIENTS)))
            await asyncio.sleep(1.0)
        page = json.loads((await site.ops("/readyz"))[1])
        print(limit, dict(answers), page["checks"]["store"])
        assert set(answers) == {(200, "")}
        assert page["status"] == "degraded"
        assert "53300" in page["checks"]["store"]["reason"]
        used = await sql.fetchval("SELECT count(*) FROM pg_stat_activity WHERE usename = $1", role)
        assert used <= limit
    assert await sql.fetchval("SELECT sum(requests)::int8 FROM keyproxy.usage") == len(site.upstream.heads)


async def test_a_proxy_takes_more_connections_once_they_are_granted(
    configure: Configure, dsn: str, sql: asyncpg.Connection, role: str
) -> None:
    site = configure(dsn)
    key = await site.key()
    await sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('p', '{\"requests_per_day\": 1000000}')")
    await sql.execute("UPDATE keyproxy.users SET plan_id = 'p'")
    await sql.execute(f'ALTER ROLE "{role}" CONNECTION LIMIT 1')
    site = configure(as_role(dsn, role))
    site.upstream.answering = answer_with(_ANSWER)
    async with site.serving():
        await until(lambda: _has_store(site))
        assert await site.call(key["secret"]) == (200, "")
        assert json.loads((await site.ops("/readyz"))[1])["status"] == "degraded"
        await sql.execute(f'ALTER ROLE "{role}" CONNECTION LIMIT -1')
        await until(lambda: _is_ok(site, key["secret"]), seconds=30)


async def _has_store(site: Site) -> bool:
    page = json.loads((await site.ops("/readyz"))[1])
    return bool(page["checks"]["change_feed"]["status"] == "ok")


async def _is_ok(site: Site, secret: str) -> bool:
    await asyncio.sleep(0.3)
    assert await site.call(secret) == (200, "")
    return bool(json.loads((await site.ops("/readyz"))[1])["status"] == "ok")
