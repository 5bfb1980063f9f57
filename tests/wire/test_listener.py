"""Connections are accepted within the bound, also those that are not open yet; who cannot be taken waits."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from keyproxy.wire.tls import server_context
from tests.rawhttp import Client
from tests.wire.conftest import Start, Wire, request

#: Connections over the bound that are taken to be told so.
TURNED_AWAY_MAX = 128


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(context of the server, context of a client that trusts it)."""
    authority = trustme.CA()
    file = tmp_path / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(file))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return server_context(str(file), ""), trusting


async def tls_status(wire: Wire, trusting: ssl.SSLContext) -> int:
    """The status of one request over TLS."""
    assert not isinstance(wire.address, str)
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(*wire.address, ssl=trusting, server_hostname="localhost")
        client = Client(reader, writer)
        await client.send(request("GET", "/"))
        status = (await client.answer()).status
        await client.close()
    return status


@contextlib.contextmanager
def silent_clients(wire: Wire, number: int) -> Iterator[list[socket.socket]]:
    """Clients that connect and say nothing."""
    assert not isinstance(wire.address, str)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(wire.address, timeout=5)) for _ in range(number)]


async def test_handshakes_under_way_are_bounded_and_end_in_time(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    wire = await start(listen={"connections_max": 2, "header_timeout_seconds": 0.5}, tls=certificate[0])
    listener = wire.server._listener
    assert listener is not None
    with silent_clients(wire, 300):
        async with asyncio.timeout(5):
            while listener.opening() < 2 + TURNED_AWAY_MAX:
                await asyncio.sleep(0.01)
        most = 0
        asking = asyncio.create_task(tls_status(wire, certificate[1]))
        while not asking.done():
            most = max(most, listener.opening() + wire.server.open_connections())
            await asyncio.sleep(0.01)
        assert await asking == 200
    assert most <= 2 + TURNED_AWAY_MAX + 1
    assert wire.server.failed_connections()["handshake"] >= 300 - TURNED_AWAY_MAX


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b""])
async def test_who_does_not_speak_tls_is_let_go_and_counted(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext], said: bytes
) -> None:
    wire = await start(listen={"header_timeout_seconds": 0.3}, tls=certificate[0])
    async with wire.client() as client:
        await client.send(said)
        await client.ends(seconds=3)
    async with asyncio.timeout(3):
        while not wire.server.failed_connections()["handshake"]:
            await asyncio.sleep(0.01)
    assert await tls_status(wire, certificate[1]) == 200
    assert wire.recorder.seen[-1].status == 200


async def test_half_a_request_over_tls_is_refused_or_dropped_and_leaves_nothing(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext], caplog: pytest.LogCaptureFixture
) -> None:
    wire = await start(tls=certificate[0])
    assert not isinstance(wire.address, str)
    for half in (b"GET / HT", request("POST", "/", "Content-Length: 5") + b"x", request("GET", "/") * 2):
        reader, writer = await asyncio.open_connection(*wire.address, ssl=certificate[1], server_hostname="localhost")
        client = Client(reader, writer)
        await client.send(half)
        writer.close()
        await client.ends()
    async with asyncio.timeout(5):
        while wire.server.open_connections():
            await asyncio.sleep(0.01)
    assert caplog.records == []


async def test_who_has_connected_before_a_drain_is_served_though_the_handshake_comes_after(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    wire = await start(tls=certificate[0])
    assert not isinstance(wire.address, str)
    reader, writer = await asyncio.open_connection(*wire.address)
    draining = asyncio.create_task(wire.server.drain(5.0))
    await asyncio.sleep(0.05)
    await writer.start_tls(certificate[1], server_hostname="localhost")
    client = Client(reader, writer)
    await client.send(request("GET", "/"))
    answer = await client.answer()
    assert (answer.status, answer.one("Connection")) == (200, "close")
    await client.close()
    async with asyncio.timeout(5):
        await draining
