"""A server with too few connections: when a shortage begins, how long it lasts, and what ends it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

import asyncpg
import pytest

from keyproxy.store.postgres import pool as pools
from keyproxy.store.postgres.connecting import Connector
from keyproxy.store.postgres.pool import ConnectionPool, Shortage
from tests.store.conftest import StartServer
from tests.store.harness import Sql
from tests.waiting import until

#: The smallest number that PostgreSQL accepts with its usual reserve for superusers, whom the tests are.
CONNECTIONS_MAX = 5

MakeParts: TypeAlias = "Callable[[int], Awaitable[Parts]]"


class Parts:
    """The pools of one store, on a server whose other connections are taken."""

    def __init__(self, dsn: str) -> None:
        target = Connector(dsn)
        self.shortage = Shortage()
        self.main = ConnectionPool(target, 3, 2.0, shortage=self.shortage)
        self.others = [ConnectionPool(target, 1, 2.0, shortage=self.shortage, lender=self.main) for _ in range(2)]
        self.taken: list[Sql] = []

    async def use(self) -> None:
        """Run one statement through each pool."""
        for pool in (self.main, *self.others):
            async with pool.connection() as connection:
                assert await connection.fetchval("SELECT 1") == 1

    async def lasts(self, seconds: float) -> bool:
        """Whether there is a shortage all this time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.shortage.because:
                return False
            await asyncio.sleep(0.005)
        return True


@pytest.fixture
async def make_parts(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MakeParts]:
    """Make the parts: `await make_parts(left)`, where the server has `left` connections left for them."""
    monkeypatch.setattr(pools, "_BACK_OFF_SECONDS", 0.5)
    monkeypatch.setattr(pools, "_PROBE_SECONDS", 0.3)
    server = start_server({"max_connections": str(CONNECTIONS_MAX)})
    async with contextlib.AsyncExitStack() as stack:

        async def making(left: int) -> Parts:
            parts = Parts(server.dsn())
            for _ in range(CONNECTIONS_MAX - left):
                taken = await asyncpg.connect(server.dsn())
                stack.push_async_callback(taken.close)
                parts.taken.append(taken)
            for pool in (*parts.others, parts.main):
                stack.push_async_callback(pool.close)
            for pool in (parts.main, *parts.others):
                await pool.open()
            await parts.use()
            return parts

        yield making


@pytest.mark.parametrize("is_used", [True, False], ids=["used", "idle"])
@pytest.mark.parametrize("left", [1, 2])
async def test_shortage_lasts_while_the_server_refuses_any_pool_a_connection(
    make_parts: MakeParts, left: int, is_used: bool
) -> None:
    parts = await make_parts(left)
    assert "too many clients" in parts.shortage.because
    observed = asyncio.create_task(parts.lasts(4.0))
    while is_used and not observed.done():
        await parts.use()
        await asyncio.sleep(0.01)
    assert await observed


async def test_shortage_ends_once_every_pool_has_a_connection_even_without_requests(make_parts: MakeParts) -> None:
    parts = await make_parts(1)
    sql, *released = parts.taken
    for connection in released:
        await connection.close()
    assert parts.shortage.because, "a free place alone is no connection"
    await until(lambda: not parts.shortage.because, "the shortage is over")
    assert await sql.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'keyproxy'") == 3


async def test_no_shortage_is_reported_while_there_are_enough_connections(make_parts: MakeParts) -> None:
    parts = await make_parts(3)
    assert not parts.shortage.because
