"""Real processes, a real PostgreSQL, load, and what may happen to them: the upstream's own count beside the ledger's.

`make crash` runs it longer: KEYPROXY_TEST_CRASH_SECONDS.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import aiohttp
import asyncpg
import pytest

from tests.acceptance.conftest import Configure, Site, free_port, until
from tests.rawhttp import Upstream, answer_with
from tests.store.stage import Relay

LEASE_SECONDS = 2.0
TOKENS_EACH = 7
SECONDS = float(os.environ.get("KEYPROXY_TEST_CRASH_SECONDS", "8"))

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Usage-Tokens: %d\r\n\r\nok" % TOKENS_EACH


class Fleet:
    """Proxies over one ledger and one upstream, and load on all of them."""

    def __init__(self, sites: list[Site], relays: list[Relay], secret: str) -> None:
        self.sites, self.relays = sites, relays
        self.secret = secret
        self.answers: Counter[int] = Counter()
        self.processes: list[asyncio.subprocess.Process | None] = [None] * len(sites)
        self._stacks = [contextlib.AsyncExitStack() for _ in sites]

    async def start(self, number: int) -> None:
        """Start a process and wait until it serves."""
        try:
            self.processes[number] = await self._stacks[number].enter_async_context(self.sites[number].serving())
        except TimeoutError:
            print(number, b"".join(self.sites[number].printed)[-3000:].decode())
            raise

    async def kill(self, number: int) -> None:
        """As the kernel does when memory is gone."""
        process = self.processes[number]
        assert process is not None
        process.kill()
        await self._stacks[number].aclose()

    async def stop_for(self, number: int, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        process = self.processes[number]
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        process.send_signal(signal.SIGCONT)

    async def lose_packets(self, number: int, seconds: float) -> None:
        """A black hole between a process and the database."""
        self.relays[number].freeze()
        await asyncio.sleep(seconds)
        self.relays[number].thaw()

    async def cut(self, number: int, seconds: float) -> None:
        """No way to the database."""
        await self.relays[number].cut()
        await asyncio.sleep(seconds)
        await self.relays[number].mend()

    async def load(self, until_mono: float) -> None:
        """One client that asks again and again, whichever proxy there is."""
        now = asyncio.get_running_loop().time
        timeout = aiohttp.ClientTimeout(total=8.0)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while now() < until_mono:
                site = random.choice(self.sites)
                url = f"http://127.0.0.1:{site.proxy_port}/v1/ai/jobs"
                try:
                    async with session.post(url, data=b"{}", headers={"X-Api-Key": self.secret}) as answer:
                        self.answers[answer.status] += 1
                except (aiohttp.ClientError, TimeoutError):
                    self.answers[0] += 1
                    await asyncio.sleep(0.05)

    async def close(self) -> None:
        """SIGTERM to all: leases go back."""
        for stack in self._stacks:
            await stack.aclose()


@pytest.mark.parametrize(("requests", "tokens"), [(1_000_000, 10**9), (500, 2_800)])
async def test_whatever_dies_sleeps_or_is_cut_off_nothing_is_overspent_and_nothing_is_lost(
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
        limits = f'{{"requests_per_day": {requests}, "tokens_per_day": {tokens}, "tokens_per_request": 10}}'
        await sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('p', $1::text::jsonb)", limits)
        await sql.execute("UPDATE keyproxy.users SET plan_id = 'p'")
        sites, relays = [], []
        for _ in range(3):
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp"))
            Path(directory).chmod(0o755)
            relay = Relay(Path(directory), dsn)
            await relay.mend()
            stack.push_async_callback(relay.cut)
            sites.append(_beside(site, relay.dsn))
            relays.append(relay)
        fleet = Fleet(sites, relays, secret)
        stack.push_async_callback(fleet.close)
        await asyncio.gather(*(fleet.start(number) for number in range(3)))
        await _storm(fleet, sql, requests, tokens)
        await fleet.close()
        await until(lambda: _is_quiet(sql), seconds=3 * LEASE_SECONDS + 10)
        await _compare(sql, site.upstream, requests, tokens, fleet)


def _beside(site: Site, dsn: str) -> Site:
    """Another process of the same configuration, on ports and a wire of its own."""
    proxy_port, ops_port = free_port(), free_port()
    environment = site.environment | {
        "KEYPROXY_LISTEN__ADDRESS": f"127.0.0.1:{proxy_port}",
        "KEYPROXY_OPS__ADDRESS": f"127.0.0.1:{ops_port}",
        "KEYPROXY_STORE__DSN": dsn,
    }
    return replace(site, proxy_port=proxy_port, ops_port=ops_port, environment=environment, printed=[])


async def _storm(fleet: Fleet, sql: asyncpg.Connection, requests: int, tokens: int) -> None:
    """Load, everything that may happen, and a look at the ledger all the while."""
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
