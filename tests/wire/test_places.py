"""At the bound on client connections the one idle longest is evicted; one with a request in flight never is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from keyproxy.wire.tls import server_context
from tests.rawhttp import OK, Client, Message, Upstream
from tests.wire.conftest import AUTHORIZATION, Start, Wire, request

BOUND = 3

#: A connection with half a head keeps its place for so long.
SPARED_SECONDS = 1.0


@contextlib.asynccontextmanager
async def connected(wire: Wire, number: int) -> AsyncIterator[list[Client]]:
    """So many clients, one after the other."""
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for place in range(number):
            clients.append(await stack.enter_async_context(wire.client()))
            async with asyncio.timeout(5):
                while wire.server.open_connections() <= place:
                    await asyncio.sleep(0.002)
        yield clients


async def status(client: Client, raw: bytes | None = None) -> int:
    await client.send(request("GET", "/") if raw is None else raw)
    return (await client.answer()).status


async def one_more(wire: Wire) -> int:
    """The status of a request on a new connection."""
    async with wire.client() as client:
        return await status(client)


@pytest.mark.parametrize("used", [True, False])
async def test_the_connection_that_has_lain_idle_longest_leaves_for_a_new_one(start: Start, *, used: bool) -> None:
    wire = await start(listen={"connections_max": BOUND})
    async with connected(wire, BOUND) as (first, second, third):
        if used:
            for client in (second, first, third):
                assert await status(client) == 200
        leaves, *others = (second, first, third) if used else (first, second, third)
        assert await one_more(wire) == 200
        assert await leaves.ends() == b""
        for client in others:
            assert await status(client) == 200
    assert wire.server.failed_connections()["evicted"] == 1
    assert all(seen.status == 200 for seen in wire.recorder.seen)


async def test_a_request_in_flight_keeps_its_place_and_a_new_client_is_refused_as_overloaded(start: Start) -> None:
    release = asyncio.Event()

    async def held(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await release.wait()
        writer.write(OK)
        return True

    wire = await start(listen={"connections_max": BOUND}, serving=Upstream(held))
    async with connected(wire, BOUND) as clients:
        for client in clients:
            await client.send(request("GET", "/"))
        await asyncio.sleep(0.3)
        for _ in range(3):
            async with wire.client() as another:
                answer = await another.answer()
                assert (answer.status, json.loads(answer.body)["code"]) == (503, "overloaded")
                assert answer.one("Retry-After") == "1"
        release.set()
        assert [(await client.answer()).status for client in clients] == [200] * BOUND
        await asyncio.sleep(0.15)
        # One that was turned away takes no place from those that come later.
        assert await one_more(wire) == 200
    assert wire.server.failed_connections()["evicted"] == 1


@pytest.mark.parametrize(
    "half",
    [b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n" + AUTHORIZATION, request("POST", "/", "Content-Length: 5")],
    ids=["a line", "a head", "a body"],
)
async def test_half_a_request_is_refused_and_closed_after_a_moment(start: Start, half: bytes) -> None:
    wire = await start(listen={"connections_max": BOUND})
    async with connected(wire, BOUND) as clients:
        for client in clients:
            await client.send(half)
        began = time.monotonic()
        await asyncio.sleep(0.1)
        while await one_more(wire) != 200:
            await asyncio.sleep(0.05)
        assert SPARED_SECONDS * 0.9 < time.monotonic() - began < SPARED_SECONDS + 1.5
        assert json.loads((await clients[0].answer()).body)["code"] == "request_timeout"
        assert await clients[0].ends() == b""
    assert wire.upstream.heads[-1].start == "GET / HTTP/1.1"


async def test_requests_without_a_key_keep_no_connection_from_leaving(start: Start) -> None:
    wire = await start(listen={"connections_max": BOUND})
    async with connected(wire, BOUND) as (first, second, third):
        assert await status(second) == 200
        assert await status(third) == 200
        await asyncio.sleep(0.15)
        assert await status(first, request("GET", "/", key=None)) == 401
        assert await one_more(wire) == 200
        assert await first.ends() == b""
        assert await status(second) == 200


async def test_silent_connections_do_not_block_a_client_with_a_key(start: Start) -> None:
    wire = await start(listen={"connections_max": 20})
    assert not isinstance(wire.address, str)
    over = asyncio.Event()
    made = 0

    async def flood() -> None:
        nonlocal made
        held = []
        while not over.is_set():
            sock = socket.socket()
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(wire.address)
            held.append(sock)
            made += 1
            await asyncio.sleep(0.002)
        for sock in held:
            sock.close()

    task = asyncio.create_task(flood())
    await asyncio.sleep(0.3)
    waits: list[float] = []
    while made < 500 or len(waits) < 30:
        began = time.monotonic()
        assert await one_more(wire) == 200
        waits.append(time.monotonic() - began)
    over.set()
    await task
    assert made > 300
    assert max(waits) < 2.0
    assert wire.server.open_connections() <= 20 + 128


async def test_handshakes_that_go_no_further_leave_as_well(start: Start, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    wire = await start(
        listen={"connections_max": 2, "header_timeout_seconds": 60.0},
        tls=server_context(str(tmp_path / "server.pem"), ""),
    )
    assert not isinstance(wire.address, str)
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(wire.address, timeout=5))
        began = time.monotonic()
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection(*wire.address, ssl=trusting, server_hostname="localhost")
            client = Client(reader, writer)
            assert await status(client) == 200
            await client.close()
        assert time.monotonic() - began < 5
    counts = wire.server.failed_connections()
    assert counts["evicted"] > 0
    assert counts["handshake"] == 0


async def test_closed_connections_free_their_places(start: Start) -> None:
    wire = await start(listen={"connections_max": 1})
    for _ in range(5):
        assert await one_more(wire) == 200
        async with asyncio.timeout(5):
            while wire.server.open_connections():
                await asyncio.sleep(0.002)
    assert wire.server.failed_connections()["evicted"] == 0
