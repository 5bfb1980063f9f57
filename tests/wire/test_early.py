"""An upstream that responds before the request has ended, and closes: its response still reaches the client."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import trustme

from keyproxy.model import Ending
from keyproxy.reasons import Reason
from keyproxy.wire.exchange import Exchange
from keyproxy.wire.tls import client_context, server_context
from tests.rawhttp import OK, Message, Upstream
from tests.wire.conftest import KEY, Start, Wire, request
from tests.wire.test_second_opinion import Play
from tests.wire.test_second_opinion import _Gate as ForwardingGate

#: More than all buffers on the way hold together.
BODY: Final = bytes(8_000_000)
PIECE_BYTES: Final = 50_000
TRIALS: Final = 12

TOO_LARGE: Final = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"


class Hasty:
    """Responds once the first bytes of a body have arrived, and closes with the rest unread: the kernel sends a reset."""

    def __init__(self, answer: bytes, context: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self.context = context
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.served = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                accepted, _ = self.listening.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                self._answer(accepted)

    def _answer(self, accepted: socket.socket) -> None:
        # As servers do. Otherwise the response waits behind TLS session tickets, and closing discards it.
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock = accepted if self.context is None else self.context.wrap_socket(accepted, server_side=True)
        with sock:
            seen = b""
            while b"\r\n\r\n" not in seen or seen.endswith(b"\r\n\r\n"):
                seen += sock.recv(1_000)
            self.served += 1
            sock.sendall(self.answer)


@contextlib.contextmanager
def hasty(answer: bytes, context: ssl.SSLContext | None = None) -> Iterator[Hasty]:
    """A Hasty upstream, until the end of the block."""
    upstream = Hasty(answer, context)
    try:
        yield upstream
    finally:
        upstream.listening.shutdown(socket.SHUT_RDWR)
        upstream.listening.close()


def pieces(*, is_chunked: bool) -> list[bytes]:
    """The body as it is sent, piece by piece."""
    parts = [BODY[at : at + PIECE_BYTES] for at in range(0, len(BODY), PIECE_BYTES)]
    return [b"%x\r\n%b\r\n" % (len(part), part) for part in parts] if is_chunked else parts


async def upload(wire: Wire, *, is_chunked: bool, expects: bool = False) -> tuple[Message, bytes]:
    """Upload as clients do that read while they send: (the response, the bytes after it)."""
    lines = ["Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(BODY)}"]
    async with wire.client() as client:
        await client.send(request("POST", "/", *lines, *(["Expect: 100-continue"] if expects else [])))
        if expects:
            assert (await client.answer()).status == 100

        async def send() -> None:
            with contextlib.suppress(ConnectionError):
                for piece in pieces(is_chunked=is_chunked):
                    await client.send(piece)

        sending = asyncio.create_task(send())
        answer = await client.answer()
        try:
            rest = await client.ends()
        except BrokenPipeError:
            rest = b""  # of its own writing
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    return answer, rest


@pytest.mark.parametrize("is_chunked", [False, True], ids=["counted", "chunked"])
@pytest.mark.parametrize("is_tls", [False, True], ids=["clear", "tls"])
async def test_an_early_response_is_relayed_while_the_request_is_still_being_sent(
    start: Start, tmp_path: Path, *, is_chunked: bool, is_tls: bool
) -> None:
    authority, context, trusting = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), None
    if is_tls:
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        trusting = client_context(str(tmp_path / "ca.pem"))
    with hasty(TOO_LARGE, context if is_tls else None) as upstream:
        url = f"http{'s' if is_tls else ''}://127.0.0.1:{upstream.port}"
        wire = await start(upstream={"url": url}, upstream_tls=trusting)
        result = [await upload(wire, is_chunked=is_chunked, expects=bool(trial % 2)) for trial in range(TRIALS)]
        assert [(answer.status, answer.body, rest) for answer, rest in result] == [(413, b"no", b"")] * TRIALS
        assert {answer.one("Connection") for answer, _ in result} == {"close"}
        assert [seen.ending for seen in wire.recorder.seen] == [Ending.COMPLETED] * TRIALS
        assert upstream.served == TRIALS
        assert wire.pool.counts()["idle"] == wire.pool.counts()["busy"] == 0


async def test_a_large_early_response_is_relayed_whole_or_cut(start: Start) -> None:
    """Bytes that the upstream's kernel has not sent before the reset are lost, visibly for the client."""
    size = 600_000
    with hasty(b"HTTP/1.1 413 Too Large\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)) as upstream:
        wire = await start(upstream={"url": f"http://127.0.0.1:{upstream.port}"})
        for _ in range(TRIALS):
            async with wire.client() as client:
                await client.send(request("POST", "/", "Content-Length: 200000") + bytes(100_000))
                with contextlib.suppress(ConnectionError):
                    answer = await client.answer()
                    assert answer.status == 413
                    assert answer.is_whole == (len(answer.body) == size)
    assert {seen.status for seen in wire.recorder.seen} == {413}


@pytest.mark.parametrize("closes", [b"", b"Connection: close\r\n"])
async def test_a_request_continues_after_its_response_has_begun(start: Start, closes: bytes) -> None:
    async def echo(_message: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\n%bContent-Length: 300000\r\n\r\n" % closes)
        left = 300_000
        while left:
            data = await reader.read(min(left, 10_000))
            left -= len(data)
            writer.write(data)
            await writer.drain()
        return True

    body = bytes(index % 251 for index in range(300_000))
    wire = await start(serving=Upstream(echo, reads_bodies=False))
    async with wire.client() as client:
        await client.send(request("POST", "/", "Content-Length: 300000") + body[:100])
        await client.reader.readuntil(b"\r\n\r\n" + body[:100])
        sending = asyncio.create_task(client.send(body[100:]))
        async with asyncio.timeout(5):
            assert await client.reader.readexactly(len(body) - 100) == body[100:]
        await sending


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(context of the server, context of a client that trusts it)."""
    authority, trusting = trustme.CA(), ssl.create_default_context()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    authority.configure_trust(trusting)
    return server_context(str(tmp_path / "server.pem"), ""), trusting


def send_then_read(address: tuple[str, int], raw: list[bytes], context: ssl.SSLContext | None) -> bytes:
    """What a client gets that reads only after it has sent everything."""
    with socket.create_connection(address, timeout=10) as plain:
        sock = plain if context is None else context.wrap_socket(plain, server_hostname="localhost")
        with sock:
            for piece in raw:
                sock.sendall(piece)
            got = b""
            while not got.endswith((b"no", b"}")) and (data := sock.recv(65_536)):
                got += data
            return got


@pytest.mark.parametrize("is_tls", [False, True], ids=["clear", "tls"])
@pytest.mark.parametrize("key", [KEY, None], ids=["by the upstream", "by the proxy"])
async def test_a_client_that_reads_only_after_sending_everything_gets_the_early_response(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext], key: bytes | None, *, is_tls: bool
) -> None:
    with hasty(TOO_LARGE) as upstream:
        tls = certificate[0] if is_tls else None
        wire = await start(upstream={"url": f"http://127.0.0.1:{upstream.port}"}, tls=tls)
        assert not isinstance(wire.address, str)
        for is_chunked in (False, True):
            framing = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(BODY)}"
            raw = [request("POST", "/", framing, key=key), *pieces(is_chunked=is_chunked)]
            got = await asyncio.to_thread(send_then_read, wire.address, raw, certificate[1] if is_tls else None)
            assert got.startswith(b"HTTP/1.1 413" if key else b"HTTP/1.1 401")
        async with asyncio.timeout(4):
            while wire.server.open_connections():
                await asyncio.sleep(0.02)


async def test_a_response_that_ends_with_the_connection_ends_over_tls_too(
    start: Start, certificate: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    with hasty(b"HTTP/1.1 200 OK\r\n\r\nthe end") as upstream:
        wire = await start(upstream={"url": f"http://127.0.0.1:{upstream.port}"}, tls=certificate[0])
        assert not isinstance(wire.address, str)
        raw = [request("POST", "/", "Content-Length: 1").replace(b"HTTP/1.1", b"HTTP/1.0") + b"x"]
        got = await asyncio.to_thread(send_then_read, wire.address, raw, certificate[1])
        assert got.endswith(b"\r\n\r\nthe end")


async def test_a_connection_is_not_used_again_while_a_part_of_its_request_is_unsent(wire: Wire) -> None:
    """The next request on it would be taken for that part."""
    wire.server.gate = ForwardingGate()
    sock, far = socket.socketpair()
    with sock, far:
        play = Play(wire, sock)
        play.client.data_received(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nab")
        before = play.far.written
        assert before.endswith(b"\r\n\r\nab")
        far.send(b"a response that has arrived and is not read yet")
        play.client.data_received(b"cd")
        assert play.far.written == before
        play.upstream.data_received(OK)
        assert play.near.written.endswith(b"\r\n\r\n{}")
        assert play.far.is_cut
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert play.far.written == before
        assert wire.pool.counts()["idle"] == 0
        play.end()


@contextlib.contextmanager
def deaf() -> Iterator[tuple[int, list[socket.socket]]]:
    """An upstream that reads the beginning of a request, ends its side, reads no more and stays: (port, accepted)."""
    accepted: list[socket.socket] = []
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                sock = listening.accept()[0]
                accepted.append(sock)
                sock.recv(1_000)
                time.sleep(0.3)
                sock.shutdown(socket.SHUT_WR)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield listening.getsockname()[1], accepted
        finally:
            for sock in accepted:
                sock.close()


async def test_an_upstream_that_ends_its_side_and_reads_no_more_fails_the_request_at_once(start: Start) -> None:
    with deaf() as (port, _):
        wire = await start(upstream={"url": f"http://127.0.0.1:{port}"})
        async with wire.client() as client:
            await client.send(request("POST", "/", f"Content-Length: {10 * len(BODY)}"))

            async def send() -> None:
                with contextlib.suppress(ConnectionError):
                    for piece in pieces(is_chunked=False) * 10:
                        await client.send(piece)

            sending = asyncio.create_task(send())
            assert (await client.answer()).status == 502
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    assert {seen.reason for seen in wire.recorder.seen} == {Reason.UPSTREAM_UNREACHABLE}


async def test_held_back_bytes_are_not_polled_repeatedly_once_the_upstream_has_half_closed(
    start: Start,
) -> None:
    with deaf() as (port, accepted):
        wire = await start(upstream={"url": f"http://127.0.0.1:{port}"})
        async with wire.client() as client:
            await client.send(request("POST", "/", f"Content-Length: {10 * len(BODY)}") + bytes(1_000))
            async with asyncio.timeout(5):
                while not wire.pool._open or not accepted:
                    await asyncio.sleep(0.01)
            (connection,) = wire.pool._open
            connection.eof_received = lambda: None  # type: ignore[method-assign]
            transport = connection._transport
            assert transport is not None
            while not transport.get_write_buffer_size():
                connection.writer.write(bytes(50_000))
            time.sleep(0.5)  # the upstream ends its side, which the loop has not seen yet
            connection.send(b"more", is_last=False)
            await asyncio.sleep(0.1)
            since = time.process_time()
            await asyncio.sleep(0.5)
            assert time.process_time() - since < 0.25


async def test_a_connection_that_was_lost_with_a_whole_response_unread_is_not_lent_again(start: Start) -> None:
    async def early(message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(OK)
        await asyncio.sleep(5.0 if message.start.startswith("POST /lost") else 0.0)
        return True

    wire = await start(upstream={"connections_max": 1}, serving=Upstream(early, reads_bodies=False))
    async with wire.client() as client, wire.client() as other:
        await client.send(request("POST", "/lost", "Content-Length: 2") + b"1")
        async with asyncio.timeout(5):
            while not wire.pool.counts()["busy"]:
                await asyncio.sleep(0)
        (connection,) = wire.pool._open
        transport, exchange = connection._transport, connection.exchange
        assert transport is not None
        assert isinstance(exchange, Exchange)
        transport.pause_reading()
        connection._is_paused = True
        await other.send(request("POST", "/", body=b"x"))
        await asyncio.sleep(0.2)
        assert len(wire.pool._turns) == 1
        exchange.body_arrived(b"2", is_complete=True)
        # What the event loop does when a write fails.
        transport.abort()
        connection.connection_lost(ConnectionResetError())
        assert [(await one.answer()).status for one in (client, other)] == [200, 200]


KEPT_413: Final = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"
KEPT_401: Final = KEPT_413.replace(b"413 Too Large", b"401 Unauthorized")


def refuses_large_bodies(answer: bytes, *, after_seconds: float) -> Upstream:
    """Refuses a body of more than 100 bytes without reading it, and closes without having announced it."""

    async def serve(message: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        size = int(message.one("Content-Length") or 0)
        if size <= 100:
            await reader.readexactly(size)
            writer.write(OK)
            return True
        writer.write(answer)
        await writer.drain()
        await asyncio.sleep(after_seconds)
        return False

    return Upstream(serve, reads_bodies=False)


@pytest.mark.parametrize(
    ("answer", "size", "after_seconds"),
    [(KEPT_413, 2_000, 0.0), (KEPT_413, 2_000, 0.02), (KEPT_401, 8_000_000, 0.02)],
    ids=["413", "413, closed later", "401 to a long body"],
)
@pytest.mark.parametrize("connections_max", [1, 8])
async def test_no_request_is_lost_on_a_connection_that_the_upstream_closes_without_reading_a_body(
    start: Start, answer: bytes, size: int, after_seconds: float, connections_max: int
) -> None:
    wire = await start(
        upstream={"connections_max": connections_max},
        serving=refuses_large_bodies(answer, after_seconds=after_seconds),
    )

    async def alternate() -> list[int]:
        found = []
        for _ in range(TRIALS):
            for body in (bytes(size), b"short"):
                async with wire.client() as client:
                    with contextlib.suppress(ConnectionError):
                        await client.send(request("POST", "/", body=body))
                    found.append((await client.answer()).status)
        return found

    expected = [int(answer.split()[1]), 200] * TRIALS
    for found in await asyncio.gather(alternate(), alternate()):
        assert found == expected


async def test_a_connection_is_not_reused_if_its_response_began_before_its_request_was_whole(start: Start) -> None:
    async def early(message: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        size = int(message.one("Content-Length") or 0)
        await reader.readexactly(1)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{")
        await reader.readexactly(size - 1)
        writer.write(b"}")
        return True

    wire = await start(serving=Upstream(early, reads_bodies=False))
    for is_whole in (False, True):
        async with wire.client() as client:
            await client.send(request("POST", "/", "Content-Length: 2") + (b"xx" if is_whole else b"x"))
            await client.reader.readuntil(b"{")
            await client.send(b"" if is_whole else b"x")
            assert await client.reader.readexactly(1) == b"}"
        assert wire.pool.counts()["idle"] == is_whole
