"""Test equipment for the ledger in Redis: private servers, and ledger backends that use them."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from keyproxy.store.ledger.redis_backend import RedisLedger
from keyproxy.store.postgres.database import Database
from tests.contracts import LEASE_SECONDS, line
from tests.store.redis_server import RedisServer, program

MakeServer = Callable[..., RedisServer]
MakeLedger = Callable[..., RedisLedger]

#: Windows in PostgreSQL that exceed the limit `$1`.
PAST_LIMIT = "SELECT pool_id, measure, spent, held FROM keyproxy.windows WHERE spent + held > $1"


@contextlib.contextmanager
def servers(directory: Path) -> Iterator[MakeServer]:
    """Start private Valkey servers by name: `make_server("a", "--port", "1234")`."""
    with contextlib.ExitStack() as stack:

        def making(name: str = "r", *options: str, environment: dict[str, str] | None = None) -> RedisServer:
            server = RedisServer(program("valkey"), directory, name, environment)
            stack.callback(server.stop)
            server.start(*options)
            return server

        yield making


@contextlib.asynccontextmanager
async def ledgers(dsn: str) -> AsyncIterator[MakeLedger]:
    """Make ledger backends over that database: `make_ledger(server)`."""
    async with contextlib.AsyncExitStack() as stack:
        database = Database(dsn, pool_size_max=4, statement_timeout_seconds=5.0)
        await database.open()
        stack.push_async_callback(database.close)

        def making(
            server: RedisServer, *, lease_seconds: float = LEASE_SECONDS, timeout_seconds: float = 2.0
        ) -> RedisLedger:
            ledger = RedisLedger(
                server.url, database, lease_seconds=lease_seconds, timeout_seconds=timeout_seconds,
                alert_percentages=(80, 100),
            )  # fmt: skip
            stack.push_async_callback(ledger.close)
            return ledger

        yield making


async def granted(ledger: RedisLedger, holder: str, serial: int, **settings: Any) -> int:
    """Send one message; return what the holder was granted of 1000 a day, or -1 if it has ended."""
    replies = await ledger.sync(holder, serial, [line(limit=1000, **settings)])
    return -1 if replies is None else replies[0].granted


async def make_idle(server: RedisServer) -> None:
    """Let all windows be unused for as long as a share is kept: the fifth of their values is the time of the last use."""
    async with Redis.from_url(server.url) as client:
        for key in [key async for key in client.scan_iter("*:w:*")]:
            packed = await client.getrange(key, 32, 39)
            assert isinstance(packed, bytes)
            (drawn_on,) = struct.unpack("<d", packed)
            await client.setrange(key, 32, struct.pack("<d", drawn_on - 31))


async def make_due(server: RedisServer) -> None:
    """Report to PostgreSQL now what would be reported within half a minute."""
    async with Redis.from_url(server.url) as client:
        (key,) = [key async for key in client.scan_iter("*:due")]
        assert await client.zunionstore(key, {key: 0}) > 0
