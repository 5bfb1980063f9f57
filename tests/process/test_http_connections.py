"""The ops listener bounds its connections, and a probe always gets one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

import pytest

from keyproxy.platform import sockets
from keyproxy.process.http_connections import Bounds
from keyproxy.process.ops_listener import Check, OpsListener, Verdict
from tests.rawhttp import Client, connect

PROBE = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"


async def _checks() -> Mapping[str, Check]:
    return {"proxy": Check(Verdict.OK)}


async def _metrics() -> bytes:
    return b""


@contextlib.asynccontextmanager
async def _serving(bounds: Bounds) -> AsyncIterator[tuple[str, int]]:
    listener = OpsListener(
        checks=_checks, metrics=_metrics, metrics_content_type="text/plain", jwks=_metrics, bounds=bounds
    )
    sock = sockets.bind("127.0.0.1:0")
    await listener.start(sock)
    try:
        yield sock.getsockname()
    finally:
        await listener.close()


async def _probe(client: Client) -> int:
    await client.send(PROBE)
    return (await client.answer()).status


async def test_silent_clients_do_not_block_a_probe() -> None:
    async with _serving(Bounds(connections_max=3)) as address, contextlib.AsyncExitStack() as stack:
        prober = await stack.enter_async_context(connect(address))
        silent = []
        for _ in range(30):
            silent.append(await stack.enter_async_context(connect(address)))
            await asyncio.sleep(0.03)
            async with connect(address) as client:
                assert await _probe(client) == 200
        for client in silent[:27]:
            assert await client.ends() == b""
        assert await prober.ends() == b""


async def test_a_silent_connection_ends_after_its_time() -> None:
    async with _serving(Bounds(idle_seconds=0.2)) as address, connect(address) as client:
        assert await _probe(client) == 200
        assert await client.ends(seconds=3) == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /livez HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b\x00\r\n\r\n",
        b"GET /livez%b\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nX%b : a\r\n\r\n",
        b"POST /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nConnection: close\r\n\r\na%b",
        b"POST /livez HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%b\r\n",
        b"%b\r\n\r\n",
    ],
)
async def test_response_to_what_is_not_http_does_not_quote_it(sent: bytes) -> None:
    async with _serving(Bounds(idle_seconds=0.5)) as address, connect(address) as client:
        await client.send(sent % b"sk-secret")
        received = await client.ends(seconds=3)
        assert received
        assert b"sk-secret" not in received
