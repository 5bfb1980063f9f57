"""The hot path waits for nothing; slow peers hold back what they are slow for, within bounded memory; drain."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from typing import Any, ClassVar, cast

import pytest

from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.limits.allowance import Allowance, Hold, Need
from keyproxy.limits.plan import Plan
from keyproxy.model import PATIENCE_SECONDS, Missing, Moment, OAuthSession, TimeBudget
from keyproxy.wire.client.connection import ClientConnection
from keyproxy.wire.upstream.connection import UpstreamConnection
from tests import fakes
from tests.rawhttp import OK, Message, Upstream
from tests.wire.conftest import Start, Wire, request


class _Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 4) if name == "peername" else None

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None: ...


TOKEN = fakes.FORMAT.make_access_token(bytes(32))
BEARING = request("GET", "/", f"Authorization: Bearer {TOKEN.reveal().decode()}", key=None)


@pytest.mark.parametrize("raw", [request("GET", "/"), request("POST", "/", body=b"x" * 90), BEARING])
async def test_a_known_credential_makes_no_task_and_waits_for_nothing_on_its_way_upstream(
    start: Start, raw: bytes
) -> None:
    """The request is written upstream before `data_received` returns, and so is the response."""
    wire = await start(oauth=OAuthSettings(issuer="https://a.example", resource="https://a.example/mcp"))
    session = OAuthSession("gra_1", "cli_1")
    wire.identities.add(TOKEN, dataclasses.replace(fakes.identity(), key_id="ses_1", oauth=session))
    loop = asyncio.get_running_loop()
    near, far = _Transport(), _Transport()
    upstream = UpstreamConnection(wire.pool, loop)
    upstream.connection_made(cast("asyncio.Transport", far))
    wire.pool.release(upstream, wire.pool.clock())
    client = ClientConnection(wire.server)
    client.connection_made(cast("asyncio.Transport", near))
    made: list[object] = []

    def make(loop: asyncio.AbstractEventLoop, coro: Any, **rest: Any) -> asyncio.Task[Any]:
        made.append(coro)
        return asyncio.Task(coro, loop=loop, **rest)

    loop.set_task_factory(make)
    handles_before = _scheduled(loop)
    try:
        for _ in range(3):
            client.data_received(raw)
            assert b"X-Keyproxy-User: u_42" in far.written
            assert far.written.endswith(raw.partition(b"\r\n\r\n")[2])
            upstream.data_received(OK)
            assert near.written.startswith(b"HTTP/1.1 200 OK\r\n")
            assert near.written.endswith(b"{}")
            near.written = far.written = b""
    finally:
        loop.set_task_factory(None)
    assert made == []
    assert _scheduled(loop) == handles_before
    client.connection_lost(None)


def _scheduled(loop: asyncio.AbstractEventLoop) -> int:
    return len(asyncio.all_tasks(loop))


async def test_a_missing_identity_makes_one_task_and_then_decides_the_same_way(wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    wire.identities.slow.add(fakes.key(1).digest())
    before = len(asyncio.all_tasks(loop))
    wire.identities.may_bring.clear()
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        async with asyncio.timeout(2):
            while len(asyncio.all_tasks(loop)) == before:
                await asyncio.sleep(0)
        wire.identities.may_bring.set()
        assert (await client.answer()).status == 200


class Hesitant(fakes.FakeLedger):
    """It misses something three times before it gives a request anything, and each time a second of patience goes."""

    seen: ClassVar[list[float]] = []

    def take(self, allowance: Allowance, now: Moment, tokens: Need | None = None, *, may_be_paid: bool = False) -> Hold:
        async def fetch_missing(patience: TimeBudget) -> None:
            self.seen.append(patience.seconds_left)
            patience.seconds_left -= 1.0

        if len(self.seen) % 4 < 3:
            raise Missing("lease", fetch_missing)
        self.seen.append(0.0)
        return super().take(allowance, now, tokens, may_be_paid=may_be_paid)


async def test_all_rounds_of_one_decision_draw_on_one_patience_and_each_request_has_its_own(wire: Wire) -> None:
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(requests_per_day=9)))
    wire.ledger.__class__ = Hesitant
    Hesitant.seen.clear()
    async with wire.client() as client:
        for _ in range(2):
            await client.send(request("GET", "/"))
            assert (await client.answer()).status == 200
    assert Hesitant.seen == [PATIENCE_SECONDS, PATIENCE_SECONDS - 1.0, PATIENCE_SECONDS - 2.0, 0.0] * 2


async def test_a_client_that_does_not_read_holds_the_upstream_back(start: Start) -> None:
    sent = 0

    async def endless(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            writer.write(bytes(100_000))
            await writer.drain()
            sent += 100_000

    wire = await start(serving=Upstream(endless))
    async with wire.client() as client:
        # As below: this buffer alone could exceed the bound.
        client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        cast("asyncio.Transport", client.writer.transport).pause_reading()
        await client.send(request("GET", "/"))
        last = -1
        async with asyncio.timeout(10):
            while sent != last or not sent:
                last = sent
                await asyncio.sleep(0.2)
    # Everything beyond is in the kernel's buffers of two connections.
    assert sent < 30_000_000


async def test_an_upstream_that_does_not_read_holds_the_client_back(start: Start) -> None:
    async def never(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        # Otherwise the kernel may let this buffer alone grow to tcp_rmem, 32 MB on some machines.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        await asyncio.Event().wait()
        return False

    wire = await start(serving=Upstream(never, reads_bodies=False), listen={"body_bytes_max": 0})
    sent = 0
    async with wire.client() as client:
        await client.send(request("POST", "/", "Content-Length: 1000000000"))

        async def pour() -> None:
            nonlocal sent
            while True:
                await client.send(bytes(100_000))
                sent += 100_000

        task = asyncio.create_task(pour())
        last = -1
        async with asyncio.timeout(10):
            while sent != last or not sent:
                last = sent
                await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        client.writer.transport.abort()
    assert sent < 30_000_000


async def test_a_client_that_stops_reading_for_good_is_cut(start: Start) -> None:
    async def much(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n" + bytes(100_000_000))
        await writer.drain()
        return True

    wire = await start(serving=Upstream(much), listen={"body_idle_timeout_seconds": 0.3})
    async with wire.client() as client:
        cast("asyncio.Transport", client.writer.transport).pause_reading()
        await client.send(request("GET", "/"))
        async with asyncio.timeout(5):
            while not wire.recorder.seen:
                await asyncio.sleep(0.05)
    assert wire.server.open_connections() == 0


async def test_drain_finishes_requests_in_flight_and_accepts_no_more(start: Start) -> None:
    arrived, release = asyncio.Event(), asyncio.Event()

    async def held(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        arrived.set()
        await release.wait()
        writer.write(OK)
        return True

    wire = await start(serving=Upstream(held))
    async with wire.client() as busy, wire.client() as idle:
        await busy.send(request("GET", "/"))
        await arrived.wait()
        draining = asyncio.create_task(wire.server.drain(5.0))
        assert await idle.ends() == b""
        with pytest.raises(ConnectionError):
            async with wire.client():
                pass
        release.set()
        answer = await busy.answer()
        assert (answer.status, answer.one("Connection")) == (200, "close")
        await draining


async def test_drain_cuts_requests_that_exceed_the_drain_time(start: Start) -> None:
    async def never(_message: Message, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> bool:
        await reader.read()
        return False

    wire = await start(serving=Upstream(never))
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        await asyncio.sleep(0.05)
        await wire.server.drain(0.1)
        with pytest.raises((AssertionError, ConnectionResetError)):
            await client.answer()
