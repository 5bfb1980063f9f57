"""A request that has used an approval gets a new upstream connection, within the bounds of the pool."""

from __future__ import annotations

import asyncio
import socket
import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.rawhttp import OK, Client, Message, Upstream
from tests.waiting import until
from tests.wire.conftest import Start, Wire, request
from tests.wire.test_approval_claims import PAY, answer, approved, begin, code


def held_until(event: asyncio.Event) -> Upstream:
    async def respond(seen: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if " /held " in seen.start:
            await event.wait()
        writer.write(OK)
        return True

    return Upstream(answering=respond)


async def test_approved_call_replaces_an_idle_connection_within_the_bound(start: Start) -> None:
    wire = await begin(start, upstream={"connections_max": 1})
    for number in range(3):
        await approved(wire, PAY)
        assert (await answer(wire, request("GET", "/other"))).status == 200
        assert wire.pool.counts()["idle"] == 1
        assert (await answer(wire, PAY)).status == 200
        assert wire.upstream.connections == number + 2
    await until(lambda: wire.upstream.open_connections == 1)


async def test_approved_call_that_waits_gets_a_new_connection_when_one_becomes_free(start: Start) -> None:
    event = asyncio.Event()
    wire = await begin(start, serving=held_until(event), upstream={"connections_max": 1})
    await approved(wire, PAY)
    async with wire.client() as holding, wire.client() as client, wire.client() as last:
        await holding.send(request("GET", "/held"))
        await until(lambda: len(wire.upstream.requests) == 1)
        await client.send(PAY)
        await until(lambda: _waiting(wire) == 1)
        await last.send(request("GET", "/other"))
        await until(lambda: _waiting(wire) == 2)
        event.set()
        assert (await holding.answer()).status == 200
        assert (await client.answer()).status == 200
        # The one behind it uses the new connection.
        assert (await last.answer()).status == 200
    assert wire.upstream.connections == 2
    assert wire.pool.counts() == {"idle": 1, "busy": 0, "connecting": 0}


@pytest.mark.parametrize("leaves", [False, True], ids=["refused", "client leaves"])
async def test_g3_connection_that_cannot_be_replaced_burns_no_approval(start: Start, leaves: bool) -> None:
    wire = await begin(start, upstream={"connections_max": 1, "connect_timeout_seconds": 0.5})
    await approved(wire, PAY)
    assert (await answer(wire, request("GET", "/other"))).status == 200
    connector, loop, is_opening = wire.pool._connector, asyncio.get_running_loop(), asyncio.Event()

    async def create_connection(*arguments: Any, **options: Any) -> object:
        is_opening.set()
        if not leaves:
            raise ConnectionRefusedError
        await asyncio.sleep(0.3)
        return await loop.create_connection(*arguments, **options)

    # Not the connector's method: that of a compiled class cannot be replaced.
    connector._loop = cast("asyncio.AbstractEventLoop", SimpleNamespace(create_connection=create_connection))
    async with wire.client() as client:
        await client.send(PAY)
        await is_opening.wait()
        if leaves:
            reset(client)
        else:
            assert code(await client.answer()) == "upstream_unreachable"
    await until(lambda: len(wire.approvals.approved) == 1)
    connector._loop = loop
    await until(lambda: not wire.pool.counts()["connecting"])
    assert (await answer(wire, PAY)).status == 200
    assert (await answer(wire, request("GET", "/other"))).status == 200
    assert [seen.start.split(" ")[1] for seen in wire.upstream.requests] == ["/other", "/pay", "/other"]


def reset(client: Client) -> None:
    """Close the connection so that the proxy sees a reset: an end of input alone could be a half-close."""
    sock: socket.socket = client.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


def _waiting(wire: Wire) -> int:
    return len(wire.pool._turns)
