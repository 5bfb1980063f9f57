"""Long exchanges: tunnels, streams, and clients that have half-closed or left."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from typing import cast

import pytest

from keyproxy.model import Ending, Identity
from keyproxy.reasons import Reason
from tests import fakes
from tests.rawhttp import Message, Upstream, answer_with
from tests.wire.conftest import KEY, Start, Wire, request

HANDSHAKE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version: 13",
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\nX-Far: 1\r\n\r\n"

#: P4 for what is open already: a second for the news, a second for the next look.
REVOKED_SECONDS = 2.0


async def tunnel(_request: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Accept the handshake, send `hello`, and echo."""
    writer.write(SWITCH + b"hello")
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    return False


async def stream(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Send events for ever."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
    while True:
        writer.write(b"data: 1\n\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def silence(_request: Message, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> bool:
    """Compute for ever, until the connection ends."""
    await reader.read(1)
    return False


@pytest.fixture
async def tunnelled(start: Start) -> Wire:
    """A proxy in front of an upstream that takes up every handshake."""
    return await start(serving=Upstream(tunnel), upstream={"idle_timeout_seconds": 0.6})


async def test_a_tunnel_response_reports_that_its_key_was_replaced(tunnelled: Wire) -> None:
    identity = fakes.identity(expires_wall_seconds=time.time() + 60.0)
    tunnelled.identities.add(fakes.key(1), dataclasses.replace(identity, retiring_field=b"X-Keyproxy-Key-Expires-In: "))
    async with tunnelled.client() as client:
        await client.send(request("GET", "/ws", *HANDSHAKE))
        answer = await client.answer()
    assert answer.status == 101
    assert int(answer.one("X-Keyproxy-Key-Expires-In") or -1) in range(50, 60)


async def test_a_tunnel_relays_bytes_both_ways_and_its_handshake_has_the_identity(tunnelled: Wire) -> None:
    async with tunnelled.client() as client:
        await client.send(request("GET", "/ws", *HANDSHAKE))
        answer = await client.answer()
        assert (answer.status, answer.one("Upgrade"), answer.one("Connection")) == (101, "websocket", "Upgrade")
        assert answer.one("X-Far") == "1"
        assert await client.reader.readexactly(5) == b"hello"
        sent = bytes(range(256)) * 4096
        sending = asyncio.create_task(client.send(sent))
        assert await client.reader.readexactly(len(sent)) == sent
        await sending
        assert tunnelled.server.open_tunnels() == 1
    head = tunnelled.upstream.heads[0]
    assert (head.one("X-Keyproxy-User"), head.one("Upgrade"), head.one("Connection")) == (
        "u_42",
        "websocket",
        "Upgrade",
    )


@pytest.mark.parametrize(
    "lines",
    [
        ("Connection: upgrade",),
        ("Connection: upgrade", "Upgrade: h2c"),
    ],
)
async def test_incomplete_upgrade_is_served_as_a_plain_request(wire: Wire, lines: tuple[str, ...]) -> None:
    async with wire.client() as client:
        await client.send(request("GET", "/", *lines))
        assert (await client.answer()).status == 200
    assert wire.upstream.requests[0].all("Upgrade") == wire.upstream.requests[0].all("Connection") == []


@pytest.mark.parametrize("left_out", [0, 2, 3])
async def test_a_websocket_handshake_without_one_of_its_fields_is_refused_by_name(
    tunnelled: Wire, left_out: int
) -> None:
    lines = [line for place, line in enumerate(HANDSHAKE) if place != left_out]
    async with tunnelled.client() as client:
        await client.send(request("GET", "/ws", *lines))
        answer = await client.answer()
    problem = json.loads(answer.body)
    assert (answer.status, problem["code"]) == (400, "request_malformed")
    assert problem["detail"].startswith("A WebSocket handshake must ")
    assert tunnelled.upstream.heads == []


@pytest.mark.parametrize("head", [SWITCH, SWITCH.replace(b"WebSocket", b"h2c")], ids=["unasked", "another protocol"])
async def test_an_unrequested_upgrade_is_an_invalid_response(start: Start, head: bytes) -> None:
    wire = await start(serving=Upstream(answer_with(head)))
    lines = () if head is SWITCH else HANDSHAKE
    async with wire.client() as client:
        await client.send(request("GET", "/", *lines))
        assert (await client.answer()).status == 502


async def test_a_connection_stays_open_after_the_upstream_refuses_a_handshake(wire: Wire) -> None:
    async with wire.client() as client:
        for _ in range(2):
            await client.send(request("GET", "/ws", *HANDSHAKE))
            assert (await client.answer()).status == 200
    assert wire.upstream.connections == 1


async def test_bytes_that_come_with_a_handshake_are_refused(tunnelled: Wire) -> None:
    async with tunnelled.client() as client:
        await client.send(request("GET", "/ws", *HANDSHAKE) + request("GET", "/other"))
        assert (await client.answer()).status == 400
    assert tunnelled.upstream.heads == []


async def test_a_silent_tunnel_is_closed_after_its_idle_timeout_and_a_busy_one_is_not(tunnelled: Wire) -> None:
    async with tunnelled.client() as client:
        await client.send(request("GET", "/ws", *HANDSHAKE))
        assert (await client.answer()).status == 101
        await client.reader.readexactly(5)
        for _ in range(8):
            await client.send(b"x")
            assert await client.reader.readexactly(1) == b"x"
            await asyncio.sleep(0.1)
        began = time.monotonic()
        assert await client.ends() == b""
        assert 0.5 <= time.monotonic() - began < 2.0
    assert tunnelled.recorder.seen[0].ending is Ending.COMPLETED


async def test_either_end_of_a_tunnel_ends_the_other(tunnelled: Wire) -> None:
    async with tunnelled.client() as client:
        await client.send(request("GET", "/ws", *HANDSHAKE))
        assert (await client.answer()).status == 101
    async with asyncio.timeout(2):
        await tunnelled.upstream.gone.wait()
    async with tunnelled.client() as client:
        await client.send(request("GET", "/ws", *HANDSHAKE))
        assert (await client.answer()).status == 101
        await tunnelled.upstream.stop()
        assert await client.ends(seconds=2) in (b"hello", b"")


async def test_draining_closes_tunnels_at_once(tunnelled: Wire) -> None:
    async with tunnelled.client() as client:
        await client.send(request("GET", "/ws", *HANDSHAKE))
        assert (await client.answer()).status == 101
        began = time.monotonic()
        await tunnelled.server.drain(10)
        assert time.monotonic() - began < 1.5
        assert await client.ends() == b"hello"


NO_MORE = {
    "revoked": dataclasses.replace(fakes.identity(), standing=Reason.KEY_REVOKED),
    "disabled": dataclasses.replace(fakes.identity(), standing=Reason.ACCOUNT_DISABLED),
    "expired": fakes.identity(expires_wall_seconds=1.0),
}


@pytest.mark.parametrize("why", NO_MORE)
@pytest.mark.parametrize("kind", ["tunnel", "stream"])
async def test_an_open_exchange_ends_when_its_key_is_no_longer_valid(start: Start, why: str, kind: str) -> None:
    wire = await start(serving=Upstream(tunnel if kind == "tunnel" else stream))
    async with wire.client() as client:
        await client.send(request("GET", "/", *(HANDSHAKE if kind == "tunnel" else ())))
        async with asyncio.timeout(5):
            await client.reader.readuntil(b"hello" if kind == "tunnel" else b"data: 1")
        wire.identities.add(fakes.key(1), NO_MORE[why])
        began = time.monotonic()
        await client.ends()
        assert time.monotonic() - began < REVOKED_SECONDS
    assert wire.recorder.seen[0].ending is Ending.CUT
    async with asyncio.timeout(2):
        await wire.upstream.gone.wait()


async def test_an_exchange_is_cut_if_its_review_fails_and_no_other_is(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    wire = await start(serving=Upstream(stream))
    wire.identities.add(fakes.key(2), fakes.identity("u_other"))
    async with wire.client() as client, wire.client() as other:
        for one, key in ((client, fakes.key(1)), (other, fakes.key(2))):
            await one.send(request("GET", "/").replace(KEY, key.reveal()))
            await one.reader.readuntil(b"data: 1")
        wire.identities.table[fakes.key(1).digest()] = cast("Identity", "a defect")
        async with asyncio.timeout(5):
            await client.ends()
        assert "reviewing a connection failed" in caplog.text
        for _ in range(3):
            await asyncio.wait_for(other.reader.readuntil(b"data: 1"), 2)


async def test_open_exchanges_continue_while_the_store_is_unavailable(start: Start) -> None:
    wire = await start(serving=Upstream(stream))
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        await client.reader.readuntil(b"data: 1")
        wire.identities.table.clear()
        wire.identities.is_down = True
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            await asyncio.wait_for(client.reader.readuntil(b"data: 1"), 2)
    assert wire.identities.brought == 0


async def test_a_client_that_only_closed_its_sending_side_gets_its_response(start: Start) -> None:
    async def slow(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(1.2)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        return True

    wire = await start(serving=Upstream(slow))
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        client.half_close()
        answer = await client.answer()
    assert (answer.start, answer.body) == ("HTTP/1.1 200 OK", b"ok")


async def test_a_refusal_reaches_a_client_that_closed_its_side_while_it_waited(start: Start) -> None:
    wire = await start()
    wire.identities.slow.add(fakes.key(2).digest())
    wire.identities.may_bring.clear()
    async with wire.client() as client:
        await client.send(request("GET", "/", key=fakes.key(2).reveal()))
        client.half_close()
        async with asyncio.timeout(2):
            assert await client.reader.readexactly(9) == b"HTTP/1.1 "
        wire.identities.may_bring.set()
        assert (await client.ends()).startswith(b"401 ")


async def test_an_exchange_ends_when_its_client_has_left(start: Start) -> None:
    wire = await start(serving=Upstream(silence))
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        async with asyncio.timeout(2):
            while not wire.upstream.heads:
                await asyncio.sleep(0.01)
    async with asyncio.timeout(3):
        await wire.upstream.gone.wait()
    assert wire.recorder.seen[0].ending is Ending.CLIENT_GONE
