"""A peer that takes what it is sent, however slowly, is kept; one that takes nothing is cut in bounded time.

What a peer takes is little against what the kernel holds for it: megabytes, of which a part has to go before more is
taken from the proxy. So the tests read so slowly that nothing moves in the proxy's own buffer for several time-outs.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from keyproxy.model import Ending
from keyproxy.reasons import Reason
from keyproxy.wire.tls import server_context
from tests.rawhttp import OK, Message, Upstream
from tests.wire.conftest import Start, Wire, request

IDLE_SECONDS = 0.4
LARGE = 24_000_000

#: How much a reader takes in one go, and how long it pauses then: a pause is shorter than the time-out.
STEP_BYTES, STEP_SECONDS = 200_000, 0.15


async def large(message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Respond with a large body."""
    closes = b"Connection: close\r\n" if "close" in message.start else b""
    writer.write(b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n" % (closes, LARGE) + bytes(LARGE))
    await writer.drain()
    return True


class Reader:
    """A client with blocking sockets, which reads exactly as much as requested, and only then."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.taken = 0

    def read(self, number: int) -> int:
        """Read so many bytes; fewer at the end of the connection."""
        got = 0
        while got < number:
            piece = self.sock.recv(min(65_536, number - got))
            if not piece:
                break
            got += len(piece)
        self.taken += got
        return got

    def dawdle(self, seconds: float) -> None:
        """Read slowly for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.read(STEP_BYTES) == STEP_BYTES, "the response ended early"
            time.sleep(STEP_SECONDS)

    def rest(self) -> None:
        """Read until the end of the connection."""
        while self.read(1 << 20):
            pass


@contextlib.asynccontextmanager
async def reader(wire: Wire, trusting: ssl.SSLContext | None = None) -> AsyncIterator[Reader]:
    """A client with a connection to the proxy."""

    def connected() -> socket.socket:
        if isinstance(wire.address, str):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(wire.address)
            return sock
        sock = socket.create_connection(wire.address)
        return sock if trusting is None else trusting.wrap_socket(sock, server_hostname="localhost")

    sock = await asyncio.to_thread(connected)
    sock.settimeout(20)
    try:
        yield Reader(sock)
    finally:
        sock.close()


@pytest.mark.parametrize("way", ["tcp", "unix", "tls"])
@pytest.mark.parametrize("path", ["/", "/close"])
async def test_a_slow_and_steady_reader_gets_all_of_a_large_response(
    start: Start, tmp_path: Path, way: str, path: str
) -> None:
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    listen = {"body_idle_timeout_seconds": IDLE_SECONDS, "header_timeout_seconds": IDLE_SECONDS}
    wire = await start(
        serving=Upstream(large),
        listen=listen | ({"address": f"unix:{tmp_path}/p.sock"} if way == "unix" else {}),
        tls=server_context(str(tmp_path / "server.pem"), "") if way == "tls" else None,
    )
    async with reader(wire, trusting if way == "tls" else None) as client:
        client.sock.sendall(request("GET", path, "Connection: close"))
        await asyncio.to_thread(client.dawdle, 6 * IDLE_SECONDS)
        # Its end too: the response is complete for the proxy long before it is for the client.
        await asyncio.to_thread(client.read, LARGE - client.taken - 3_000_000)
        await asyncio.to_thread(client.dawdle, 4 * IDLE_SECONDS)
        await asyncio.to_thread(client.rest)
    assert LARGE < client.taken < LARGE + 1_000
    assert [seen.ending for seen in wire.recorder.seen] == [Ending.COMPLETED]


@pytest.mark.parametrize("bytes_first", [1, 3_000_000])
@pytest.mark.parametrize("way", ["tcp", "unix"])
async def test_a_stalled_reader_is_cut_off_after_the_timeout(
    start: Start, tmp_path: Path, way: str, bytes_first: int
) -> None:
    listen = {"body_idle_timeout_seconds": IDLE_SECONDS}
    wire = await start(
        serving=Upstream(large), listen=listen | ({"address": f"unix:{tmp_path}/p.sock"} if way == "unix" else {})
    )
    async with reader(wire) as client:
        client.sock.sendall(request("GET", "/"))
        await asyncio.to_thread(client.read, bytes_first)
        began = time.monotonic()
        async with asyncio.timeout(10):
            while wire.server.open_connections():
                await asyncio.sleep(0.02)
        # What the kernels take at first is progress; then one time-out, and a sweep of deadlines.
        assert IDLE_SECONDS * 0.9 < time.monotonic() - began < 4 * IDLE_SECONDS
    assert [seen.ending for seen in wire.recorder.seen] == [Ending.CLIENT_GONE]


async def test_a_byte_now_and_then_does_not_hold_a_connection_for_ever(start: Start) -> None:
    """The window of such a client opens by single bytes, which is less than reading."""
    wire = await start(serving=Upstream(large), listen={"body_idle_timeout_seconds": 1.0})
    assert not isinstance(wire.address, str)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        await asyncio.get_running_loop().run_in_executor(None, sock.connect, wire.address)
        sock.sendall(request("GET", "/"))
        async with asyncio.timeout(20):
            while not wire.server.open_requests():
                await asyncio.sleep(0.01)
            while wire.server.open_connections():
                sock.settimeout(0.01)
                with contextlib.suppress(TimeoutError, ConnectionError):
                    sock.recv(1)
                await asyncio.sleep(0.2)
    assert [seen.ending for seen in wire.recorder.seen] == [Ending.CLIENT_GONE]


# -- an upstream that takes a request slowly


@contextlib.asynccontextmanager
async def slow_upstream(*, body_bytes: int, reads: bool = True) -> AsyncIterator[tuple[int, list[int]]]:
    """(port, bytes taken) of an upstream that reads slowly, if at all, and responds once it has a body of this size."""
    taken = [0]
    listening = socket.create_server(("127.0.0.1", 0))
    # What it has not read is not acknowledged either, but for a little.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * STEP_BYTES)
    is_over = asyncio.Event()
    loop = asyncio.get_running_loop()

    def serve(sock: socket.socket) -> None:
        sock.settimeout(20)
        with sock, contextlib.suppress(OSError):
            while reads and taken[0] < body_bytes:
                piece = sock.recv(65_536)
                if not piece:
                    return
                taken[0] += len(piece)
                time.sleep(STEP_SECONDS / 3 if taken[0] < 3_000_000 else 0)
            if reads:
                sock.sendall(OK)
            asyncio.run_coroutine_threadsafe(is_over.wait(), loop).result()

    async def accept() -> None:
        sock, _ = await loop.sock_accept(listening)
        sock.setblocking(True)
        await asyncio.to_thread(serve, sock)

    listening.setblocking(False)
    task = asyncio.create_task(accept())
    try:
        yield listening.getsockname()[1], taken
    finally:
        is_over.set()
        listening.close()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("body_bytes", [2_500_000, LARGE], ids=["as the kernel takes at once", "more than that"])
async def test_an_upstream_that_takes_a_body_slowly_and_steadily_gets_all_of_it(start: Start, body_bytes: int) -> None:
    async with slow_upstream(body_bytes=body_bytes) as (port, taken):
        wire = await start(
            upstream={
                "url": f"http://127.0.0.1:{port}",
                "idle_timeout_seconds": IDLE_SECONDS,
                "first_byte_timeout_seconds": 2 * IDLE_SECONDS,
            }
        )
        async with wire.client() as client:
            began = time.monotonic()
            await client.send(request("POST", "/", body=bytes(body_bytes)))
            assert (await client.answer(seconds=30)).status == 200
            assert time.monotonic() - began > 3 * IDLE_SECONDS
    assert taken[0] >= body_bytes


@pytest.mark.parametrize("body_bytes", [10, 1_000_000, LARGE])
async def test_an_upstream_that_reads_nothing_times_out(start: Start, body_bytes: int) -> None:
    async with slow_upstream(body_bytes=body_bytes, reads=False) as (port, _):
        wire = await start(
            upstream={
                "url": f"http://127.0.0.1:{port}",
                "idle_timeout_seconds": IDLE_SECONDS,
                "first_byte_timeout_seconds": IDLE_SECONDS,
            }
        )
        async with wire.client() as client:
            sending = asyncio.create_task(client.send(request("POST", "/", body=bytes(body_bytes))))
            began = time.monotonic()
            assert (await client.answer(seconds=10)).status == 504
            assert IDLE_SECONDS * 0.9 < time.monotonic() - began < 4 * IDLE_SECONDS
            await asyncio.gather(sending, return_exceptions=True)
    assert wire.recorder.seen[0].reason is Reason.UPSTREAM_TIMEOUT
