"""Real processes, a real PostgreSQL, load and faults: compares the upstream's own count with the ledger's.

`make crash` runs it longer: KEYPROXY_TEST_CRASH_SECONDS.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path

import asyncpg
import pytest

from tests.acceptance.conftest import Configure, until
from tests.acceptance.fleet import Fleet, beside
from tests.rawhttp import Upstream, answer_with
from tests.store.harness import Relay

LEASE_SECONDS = 2.0
TOKENS_EACH = 7
SECONDS = float(os.environ.get("KEYPROXY_TEST_CRASH_SECONDS", "8"))

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Usage-Tokens: %d\r\n\r\nok" % TOKENS_EACH


@pytest.fixture
def commands() -> None:
    """Each process starts as users start it."""


@pytest.mark.parametrize(("requests", "tokens"), [(1_000_000, 10**9), (500, 2_800)])
async def test_crashes_pauses_and_partitions_overspend_and_lose_nothing(
    configure: Configure, dsn: str, requests: int, tokens: int
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        site = configure(
            dsn,
            routes=[{"match": "POST /v1/ai/jobs", "tokens": "header"}],
            ledger={"lease_seconds": LEASE_SECONDS},
            store={"statement_timeout_seconds": 1.0},
        )
        site.upstream.answering = answer_with(_ANSWER)
        secret = (await site.key())["secret"]
        sql = await asyncpg.connect(dsn)
        stack.push_async_callback(sql.close)
        limits = f'{{"requests_per_day": {requests}, "tokens_per_day": {tokens}, "tokens_per_request": 60}}'
        await sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('p', $1::text::jsonb)", limits)
        await sql.execute("UPDATE keyproxy.users SET plan_id = 'p'")
        sites, relays = [], []
        for _ in range(3):
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp"))
            Path(directory).chmod(0o755)
            relay = Relay(Path(directory), dsn)
            await relay.mend()
            stack.push_async_callback(relay.cut)
            sites.append(beside(site, relay.dsn))
            relays.append(relay)
        fleet = Fleet(sites, relays, secret)
        stack.push_async_callback(fleet.close)
        await asyncio.gather(*(fleet.start(number) for number in range(3)))
        await _storm(fleet, sql, requests, tokens)
        await fleet.close()
        await until(lambda: _is_quiet(sql), seconds=3 * LEASE_SECONDS + 10)
        await _compare(sql, site.upstream, requests, tokens, fleet)


async def _storm(fleet: Fleet, sql: asyncpg.Connection, requests: int, tokens: int) -> None:
    """Load and all faults, with continuous checks of the ledger."""
    now = asyncio.get_running_loop().time
    ends = now() + SECONDS
    clients = [asyncio.create_task(fleet.load(ends)) for _ in range(6)]
    watching = asyncio.create_task(_watch(sql, requests, tokens, ends))
    while now() < ends - LEASE_SECONDS:
        await asyncio.sleep(0.5)
        await asyncio.gather(
            fleet.stop_for(0, LEASE_SECONDS + 0.7), _killed(fleet, 1), fleet.lose_packets(2, LEASE_SECONDS + 0.5)
        )
        await asyncio.gather(fleet.cut(0, 0.5), fleet.cut(2, 0.2), fleet.stop_for(1, 0.3))
    await asyncio.gather(*clients, watching)


async def _killed(fleet: Fleet, number: int) -> None:
    await asyncio.sleep(0.4)
    await fleet.kill(number)
    await fleet.start(number)


async def _watch(sql: asyncpg.Connection, requests: int, tokens: int, ends: float) -> None:
    while asyncio.get_running_loop().time() < ends:
        for row in await sql.fetch("SELECT measure, spent, held FROM keyproxy.windows"):
            limit = {"requests_per_day": requests, "tokens_per_day": tokens}[row["measure"]]
            assert row["spent"] + row["held"] <= limit, dict(row)
        await asyncio.sleep(0.02)


async def _is_quiet(sql: asyncpg.Connection) -> bool:
    await sql.execute("SELECT keyproxy.reap_holders()")
    return bool(await sql.fetchval("SELECT coalesce(sum(held), 0) = 0 FROM keyproxy.windows"))


async def _compare(sql: asyncpg.Connection, upstream: Upstream, requests: int, tokens: int, fleet: Fleet) -> None:
    seen = len(upstream.heads)
    rows = {row["measure"]: row for row in await sql.fetch("SELECT * FROM keyproxy.windows")}
    spent, forfeited = (rows["requests_per_day"][name] for name in ("spent", "forfeited"))
    token_row = rows["tokens_per_day"]
    print(
        f"limit {requests} requests, {tokens} tokens; upstream saw {seen}; ledger {spent} spent, {forfeited} forfeited; "
        f"tokens {token_row['spent']} spent, {token_row['forfeited']} forfeited; answers {dict(fleet.answers)}"
    )
    assert fleet.answers[200] > 0
    assert seen <= requests
    assert spent - forfeited <= seen <= spent
    assert fleet.answers[200] * TOKENS_EACH <= token_row["spent"] <= tokens
