"""Connections to the upstream are shared between users: no user can block the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import cast

import pytest

from keyproxy.model import Ending
from keyproxy.reasons import Reason
from keyproxy.wire.pace import WINDOW_SECONDS
from tests import fakes
from tests.rawhttp import OK, Client, Message, Upstream
from tests.waiting import until
from tests.wire.conftest import Start, Wire, request
from tests.wire.test_long import HANDSHAKE, SWITCH

PLACES = 4
SETTINGS = {"connections_max": PLACES, "connect_timeout_seconds": 1.0}

OTHER = fakes.key(2).reveal()
SECOND_KEY = fakes.key(3).reveal()


async def by_path(message: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """A compute server: what it does is in the path."""
    path = message.start.split(" ")[1]
    if path == "/quick":
        writer.write(OK)
        return True
    if path == "/tunnel":
        writer.write(SWITCH)
    elif path == "/drip":
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"data: 1\n\n")
                await writer.drain()
                await asyncio.sleep(0.05)
    elif path == "/large":
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n" + bytes(100_000_000))
        with contextlib.suppress(ConnectionError):
            await writer.drain()
    await reader.read()
    return False


@pytest.fixture
async def shared(start: Start) -> Wire:
    """A proxy with few connections to its upstream, and three keys: the first and the third are of one user."""
    wire = await start(upstream=SETTINGS, serving=Upstream(by_path, reads_bodies=False))
    wire.identities.add(fakes.key(2), fakes.identity("u_other"))
    wire.identities.add(fakes.key(3), fakes.identity())
    return wire


@contextlib.asynccontextmanager
async def holding(wire: Wire, number: int, *raws: bytes) -> AsyncIterator[list[Client]]:
    """This many clients with a request in flight, each with an upstream connection."""
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for place in range(number):
            client = await stack.enter_async_context(wire.client())
            cast("asyncio.Transport", client.writer.transport).set_write_buffer_limits(0)
            clients.append(client)
            await client.send(raws[place % len(raws)])
            async with asyncio.timeout(5):
                while len(wire.upstream.heads) <= place:
                    await asyncio.sleep(0.005)
        yield clients
        for client in clients:
            client.writer.transport.abort()


async def quick(wire: Wire, key: bytes = OTHER) -> tuple[int, float]:
    """(status, seconds) of a request to which the upstream responds at once."""
    began = time.monotonic()
    async with wire.client() as client:
        await client.send(request("GET", "/quick", key=key))
        return (await client.answer()).status, time.monotonic() - began


#: What one user can do to hold a connection: the raw request.
HELD = {
    "a response that is awaited": request("GET", "/never"),
    "a post without a response": request("POST", "/never", body=b"{}"),
    "a response that arrives slowly": request("GET", "/drip"),
    "a large response that is not read": request("GET", "/large"),
    "a body that is on its way": request("POST", "/slow", "Content-Length: 9999999") + bytes(60_000),
}


@pytest.mark.parametrize("name", HELD)
async def test_a_user_with_all_connections_loses_one_to_another_user(shared: Wire, name: str) -> None:
    raw = HELD[name]
    async with holding(shared, PLACES, raw, raw.replace(fakes.key(1).reveal(), SECOND_KEY)):
        assert "busy=4" in repr(shared.pool)
        status, seconds = await quick(shared)
        assert status == 200
        assert seconds < SETTINGS["connect_timeout_seconds"]
        # No more than was needed, and the next one finds a connection at once.
        assert len(shared.recorder.seen) == 2
        status, seconds = await quick(shared)
        assert (status, len(shared.recorder.seen)) == (200, 3)
        assert seconds < 0.3
    ended = shared.recorder.seen[0]
    assert ended.user == "u_42"
    assert ended.reason in (Reason.OVERLOADED, Reason.REQUEST_TIMEOUT)


async def test_a_request_that_is_ended_for_others_is_refused_and_not_resent(shared: Wire) -> None:
    raw = request("POST", "/never", body=b"{}")
    async with holding(shared, PLACES, raw) as clients:
        assert (await quick(shared))[0] == 200
        # The one that has begun last.
        answer = await clients[-1].answer()
        assert (answer.status, json.loads(answer.body)["code"]) == (503, "overloaded")
        assert answer.one("Retry-After") == "1"
    assert [head.start for head in shared.upstream.heads] == ["POST /never HTTP/1.1"] * 4 + ["GET /quick HTTP/1.1"]


async def test_a_response_that_is_ended_for_others_is_visibly_truncated(shared: Wire) -> None:
    async with holding(shared, PLACES, request("GET", "/drip")) as clients:
        assert (await quick(shared))[0] == 200
        with pytest.raises(ConnectionResetError):
            await clients[-1].answer()
    assert shared.recorder.seen[0].ending is Ending.CUT


async def test_a_moving_request_within_its_user_s_share_is_not_ended_for_others(shared: Wire) -> None:
    drip = request("GET", "/drip")
    async with holding(shared, PLACES, drip, request("GET", "/drip", key=OTHER)) as clients:
        shared.identities.add(fakes.key(4), fakes.identity("u_third"))
        status, seconds = await quick(shared, fakes.key(4).reveal())
        assert status == 503
        assert seconds >= 1.0
        assert len(shared.recorder.seen) == 1
        for client in clients:
            assert b"200 OK" in await client.reader.readline()


async def test_requests_of_one_user_alone_may_take_all_and_wait_in_turn_for_each_other(shared: Wire) -> None:
    drip = request("GET", "/drip")
    async with holding(shared, PLACES, drip):
        assert (await quick(shared, SECOND_KEY))[0] == 503
        assert len(shared.recorder.seen) == 1


async def test_a_positive_bound_applies_even_if_no_other_user_waits(start: Start) -> None:
    settings = SETTINGS | {"connections_per_user_max": 2}
    wire = await start(upstream=settings, serving=Upstream(by_path, reads_bodies=False))
    wire.identities.add(fakes.key(2), fakes.identity("u_other"))
    wire.identities.add(fakes.key(3), fakes.identity())
    async with holding(wire, 2, request("GET", "/drip")) as clients:
        # Another key of the same user does not help; another user finds a connection at once.
        waiting = asyncio.create_task(quick(wire, SECOND_KEY))
        status, seconds = await quick(wire)
        assert status == 200
        assert seconds < 0.3
        assert (await waiting)[0] == 503
        # One of its own that ends makes room, although others lie idle.
        waiting = asyncio.create_task(quick(wire, SECOND_KEY))
        while "waiting=1" not in repr(wire.pool):
            await asyncio.sleep(0.01)
        clients[0].writer.transport.abort()
        assert (await waiting)[0] == 200


@pytest.mark.parametrize("per_tick", [1, 60])
async def test_an_initial_burst_does_not_hide_a_stalled_body(start: Start, per_tick: int) -> None:
    wire = await start(
        upstream=SETTINGS | {"connect_timeout_seconds": 0.5}, serving=Upstream(by_path, reads_bodies=False)
    )
    raw = request("POST", "/slow", "Content-Length: 9999999") + bytes(60_000)
    async with holding(wire, PLACES, raw) as clients:
        async with asyncio.timeout(20):
            for _ in range(60):
                for client in clients:
                    await client.send(bytes(per_tick))
                await asyncio.sleep(0.1)
        # The waiter is of the same user: within a share, too, a body that hardly comes gives way.
        status, seconds = await quick(wire, fakes.key(1).reveal())
        assert status == 200
        assert seconds < 0.5
        assert [(await client.answer()).status for client in clients] == [408] * PLACES


async def test_a_waiting_request_takes_the_connection_of_one_that_becomes_slow_later(start: Start) -> None:
    """No other request has to arrive for the connections to be looked through again."""
    wire = await start(upstream=SETTINGS | {"connections_max": 1}, serving=Upstream(by_path, reads_bodies=False))
    raw = request("POST", "/slow", "Content-Length: 9999999") + b"x"
    async with holding(wire, 1, raw) as clients:
        await asyncio.sleep(0.3)
        # When it arrives the other has not been slow for long enough.
        status, seconds = await quick(wire, fakes.key(1).reveal())
        assert status == 200
        assert 0.4 < seconds < 1.0
        assert (await clients[0].answer()).status == 408


async def test_a_slow_reader_gives_way_once_others_wait(start: Start) -> None:
    wire = await start(
        upstream=SETTINGS | {"connections_max": 1, "connect_timeout_seconds": 0.5},
        serving=Upstream(by_path, reads_bodies=False),
    )
    async with holding(wire, 1, request("GET", "/large")) as clients:
        cast("asyncio.Transport", clients[0].writer.transport).pause_reading()
        # The response continues until the buffers of both kernels are full.
        await asyncio.sleep(WINDOW_SECONDS + 1.5)
        assert wire.recorder.seen == []
        assert (await quick(wire, fakes.key(1).reveal()))[0] == 200
    assert wire.recorder.seen[0].ending is Ending.CUT
    assert wire.recorder.seen[0].reason is Reason.REQUEST_TIMEOUT


# -- tunnels


async def test_idle_tunnels_leave_half_of_the_connections_to_requests(shared: Wire) -> None:
    handshake = request("GET", "/tunnel", *HANDSHAKE)
    async with holding(shared, 2, handshake) as clients:
        for client in clients:
            assert (await client.answer()).status == 101
        async with shared.client() as third:
            await third.send(handshake)
            answer = await third.answer()
            assert (answer.status, json.loads(answer.body)["code"]) == (503, "overloaded")
        for key in (OTHER, SECOND_KEY):
            status, seconds = await quick(shared, key)
            assert status == 200
            assert seconds < 0.3
        assert shared.server.open_tunnels() == 2


async def test_at_the_bound_the_tunnel_that_was_silent_longest_ends_for_another_user_s(shared: Wire) -> None:
    handshake = request("GET", "/tunnel", *HANDSHAKE)
    async with holding(shared, 2, handshake) as clients:
        for client in clients:
            assert (await client.answer()).status == 101
        await clients[0].send(b"hello")
        async with shared.client() as other:
            await other.send(request("GET", "/tunnel", *HANDSHAKE, key=OTHER))
            assert (await other.answer()).status == 101
            # Ended as a tunnel ends: cleanly.
            assert await clients[1].ends() == b""
            assert shared.server.open_tunnels() == 2
            # Both have a share now: a third one of either is refused.
            async with shared.client() as third:
                await third.send(request("GET", "/tunnel", *HANDSHAKE, key=OTHER))
                assert (await third.answer()).status == 503


async def test_handshakes_that_wait_count_as_tunnels(start: Start) -> None:
    settings = SETTINGS | {"connect_timeout_seconds": 5.0}
    wire = await start(upstream=settings, serving=Upstream(by_path, reads_bodies=False))
    async with holding(wire, PLACES, request("GET", "/drip")), contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(wire.client()) for _ in range(5)]
        for client in clients:
            await client.send(request("GET", "/tunnel", *HANDSHAKE))
        assert [(await client.answer()).status for client in clients[2:]] == [503] * 3
        assert "waiting=2" in repr(wire.pool)


# -- what is left of it


async def test_nothing_is_kept_of_requests_that_are_over(shared: Wire) -> None:
    async with holding(shared, PLACES, request("GET", "/never")):
        assert (await quick(shared))[0] == 200
    await until(lambda: not shared.server.open_requests() and "busy=0" in repr(shared.pool))
    turns = shared.pool._turns
    assert (len(turns), turns.users(), turns.most_held()) == (0, 0, 0)


async def test_the_pool_reports_waiting_requests_for_a_few_seconds(
    shared: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shared.pool.congestion() == ""
    async with holding(shared, PLACES, request("GET", "/drip")):
        waiting = asyncio.create_task(quick(shared, SECOND_KEY))
        await until(lambda: bool(shared.pool.congestion()))
        why = shared.pool.congestion()
        assert why == "all 4 connections are in use, 1 requests wait; one user holds 4"
        assert (await waiting)[0] == 503
        clock = shared.pool.clock
        monkeypatch.setattr(shared.pool, "clock", lambda: clock() + 10.0)
        assert shared.pool.congestion() == ""
