"""Clients and upstreams that break the rules: their memory is bounded, the responses to them are well-formed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import cast

import pytest

from keyproxy.ports.exchange import Exchange
from keyproxy.ports.gate import Gate
from tests.rawhttp import OK, Message, Upstream, answer_with
from tests.wire.conftest import KEY, Start, Wire, request

#: What a client may make this process hold for it beside the kernel's buffers.
HELD_BYTES_MAX = 2_000_000


# -- clients


async def test_requests_sent_before_a_half_close_all_get_responses(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("GET", "/1") + request("POST", "/2", body=b"two") + request("GET", "/3"))
        client.half_close()
        assert [(await client.answer()).status for _ in range(3)] == [200, 200, 200]
        assert await client.ends() == b""
    assert [one.start for one in wire.upstream.requests] == ["GET /1 HTTP/1.1", "POST /2 HTTP/1.1", "GET /3 HTTP/1.1"]


@pytest.mark.parametrize(
    "rest",
    [
        b"GET /2 HTTP/1.1\r\nHost: proxy.test\r\n",
        request("POST", "/2", "Content-Length: 4") + b"abc",
        request("POST", "/2", "Transfer-Encoding: chunked") + b"3\r\nabc\r\n",
    ],
    ids=["head", "counted body", "chunks"],
)
async def test_a_truncated_request_is_refused_after_the_complete_ones_got_responses(wire: Wire, rest: bytes) -> None:
    async with wire.client() as client:
        await client.send(request("GET", "/1") + rest)
        client.half_close()
        assert [(await client.answer()).status for _ in range(2)] == [200, 400]
        assert await client.ends() == b""
    assert [one.start for one in wire.upstream.requests] == ["GET /1 HTTP/1.1"]


@pytest.mark.parametrize("key", [None, "known"], ids=["refused", "forwarded"])
async def test_a_client_that_sends_requests_and_never_reads_is_paused(
    start: Start, tmp_path: Path, key: str | None
) -> None:
    # A unix socket: the kernel holds much less for one than for a TCP connection.
    wire = await start(listen={"address": f"unix:{tmp_path}/p.sock"})
    one = request("GET", "/") if key else request("GET", "/", key=None)
    async with wire.client() as client:
        cast("asyncio.Transport", client.writer.transport).pause_reading()

        async def pour() -> None:
            while True:
                await client.send(one * 200)

        task = asyncio.create_task(pour())
        handled = -1
        async with asyncio.timeout(20):
            while handled != len(wire.recorder.seen) or not handled:
                handled = len(wire.recorder.seen)
                await asyncio.sleep(0.3)
        (connection,) = wire.server._connections
        assert connection.transport.unsent_bytes < HELD_BYTES_MAX
        assert len(connection.stream.buffer) < HELD_BYTES_MAX
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        client.writer.transport.abort()


async def test_a_paused_client_gets_further_responses_once_it_reads(start: Start, tmp_path: Path) -> None:
    wire = await start(listen={"address": f"unix:{tmp_path}/p.sock"})
    number = 4_000
    async with wire.client() as client:
        transport = cast("asyncio.Transport", client.writer.transport)
        transport.pause_reading()
        sending = asyncio.create_task(client.send(request("GET", "/", key=None) * number))
        handled = -1
        async with asyncio.timeout(20):
            while handled != len(wire.recorder.seen) or not handled:
                handled = len(wire.recorder.seen)
                await asyncio.sleep(0.2)
        assert handled < number
        transport.resume_reading()
        async with asyncio.timeout(30):
            for _ in range(number):
                assert (await client.answer()).status == 401
        await sending


@pytest.mark.parametrize("raw", [b"\r\n", request("GET", "/") + b"\r\n"], ids=["nothing else", "after a request"])
async def test_an_empty_line_alone_does_not_keep_a_connection_open(start: Start, raw: bytes) -> None:
    wire = await start(listen={"keepalive_timeout_seconds": 0.3})
    async with wire.client() as client:
        await client.send(raw)
        if len(raw) > 2:
            assert (await client.answer()).status == 200
        assert await client.ends(seconds=3) == b""


async def test_an_empty_line_alone_does_not_hold_up_a_drain(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("GET", "/") + b"\r\n")
        assert (await client.answer()).status == 200
        async with asyncio.timeout(3):
            await wire.server.drain(30.0)


async def test_an_empty_line_after_a_body_that_ends_the_connection_is_tolerated(wire: Wire) -> None:
    """RFC 9112 section 2.2: old clients send one after a POST."""
    async with wire.client() as client:
        await client.send(request("POST", "/", "Connection: close", body=b"q=42") + b"\r\n")
        assert (await client.answer()).status == 200
        assert await client.ends() == b""


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\nHost: proxy.test\n\n",
        b"GET / HTTP/1.1\r\nHost: proxy.test\nX: y\r\nCookie: some more that follows\r\n",
        b"GET / HTTP/1.1\r\nHost : proxy.test\r\nCookie: some more that follows after that\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_bytes_that_cannot_become_a_request_are_refused_even_byte_by_byte(wire: Wire, raw: bytes) -> None:
    async with wire.client() as client:
        for byte in raw:
            await client.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await client.answer(seconds=2)).status == 400


@pytest.mark.parametrize(
    ("size", "body_bytes_max", "status"),
    [
        (b"1FFFFFFFFFFFFF", 1000, 413),
        (b"3e9", 1000, 413),
        (b"FFFFFFFFFFFFFFFF", 0, 400),
        (b"8000000000000000", 0, 400),
    ],
)
async def test_a_chunk_that_can_never_be_taken_is_refused_before_anything_is_forwarded(
    start: Start, size: bytes, body_bytes_max: int, status: int
) -> None:
    wire = await start(listen={"body_bytes_max": body_bytes_max})
    async with wire.client() as client:
        await client.send(request("POST", "/", "Transfer-Encoding: chunked") + size + b"\r\nabc")
        assert (await client.answer(seconds=2)).status == status
    assert wire.upstream.heads == []


@pytest.mark.parametrize("rest", [b"bcdefghij\r\n0\r\n\r\n", b"bcdefghij", b"bcdefghij\r\n"])
async def test_the_rest_of_a_chunk_counts_once_towards_the_largest_body(start: Start, rest: bytes) -> None:
    wire = await start(listen={"body_bytes_max": 10})
    async with wire.client() as client:
        await client.send(request("POST", "/", "Transfer-Encoding: chunked") + b"a\r\na")
        await asyncio.sleep(0.05)
        await client.send(rest)
        await asyncio.sleep(0.05)
        await client.send(b"\r\n0\r\n\r\n"[len(rest.removeprefix(b"bcdefghij")) :])
        assert (await client.answer()).status == 200


# -- upstreams


@pytest.mark.parametrize("status", [b"204 No Content", b"103 Early Hints"])
@pytest.mark.parametrize("framing", [b"Content-Length: 9", b"Content-Length: 0", b"Transfer-Encoding: chunked"])
async def test_a_length_on_a_bodiless_response_frames_nothing(start: Start, status: bytes, framing: bytes) -> None:
    """RFC 9110 section 8.6, RFC 9112 section 6.1: not to be sent. A client may take it at its word and wait."""
    raw = b"HTTP/1.1 %b\r\n%b\r\nX: y\r\n\r\n" % (status, framing)
    if status.startswith(b"1"):
        raw += OK
    wire = await start(serving=Upstream(answer_with(raw)))
    async with wire.client() as client:
        for _ in range(2):
            await client.send(request("GET", "/"))
            *interim, answer = await client.answers()
            assert answer.status == (200 if status.startswith(b"1") else 204)
            assert [one.headers[:-1] for one in interim] == [[("X", "y")]] * status.startswith(b"1")
            assert answer.one("Transfer-Encoding") is None
            assert answer.one("Content-Length") == ("2" if status.startswith(b"1") else None)
    # What it announced may still come: the connection is not used again.
    assert wire.upstream.connections == (1 if framing.endswith(b" 0") else 2)


async def test_a_response_head_that_trickles_is_504(start: Start) -> None:
    async def trickles(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        for byte in b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)
        return True

    wire = await start(serving=Upstream(trickles), upstream={"first_byte_timeout_seconds": 0.4})
    async with wire.client() as client:
        await client.send(request("POST", "/", body=b"x"))
        assert (await client.answer(seconds=3)).status == 504


async def test_a_slow_upload_is_ended_once_others_wait(start: Start) -> None:
    """slowhttptest -B with a key: a few bytes now and then, on as many connections as the upstream has."""
    wire = await start(upstream={"connections_max": 3, "connect_timeout_seconds": 0.3}, serving=Upstream())
    body = b"x" * 4096
    async with contextlib.AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(wire.client()) for _ in range(2)]
        for client in slow:
            await client.send(request("POST", "/slow", "Content-Length: 4096") + b"x")
        quick = await stack.enter_async_context(wire.client())
        await quick.send(request("POST", "/quick", "Content-Length: 8192") + body)
        async with asyncio.timeout(5):
            while len(wire.upstream.heads) < 3:
                await asyncio.sleep(0.01)
        # No other request needs their connection: they may take their time.
        await asyncio.sleep(0.5)
        assert wire.recorder.seen == []
        async with wire.client() as other:
            await other.send(request("GET", "/other"))
            assert (await other.answer()).status == 200
        assert [(await client.answer()).status for client in slow] == [408, 408]
        await quick.send(body)
        assert (await quick.answer()).status == 200


# -- internal errors


class _Defect(Gate):
    """A gate with a defect."""

    def begin(self, exchange: Exchange) -> None:
        values = [getattr(exchange, name) for name in dir(exchange) if not name.startswith("__")]
        raise RuntimeError(f"a defect while handling {exchange!r} {values!r}")


async def test_an_internal_error_is_reported_with_the_request_id_and_its_traceback_has_no_key(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    wire.server.gate = _Defect()
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        answer = await client.answer()
    assert answer.status == 500
    (record,) = caplog.records
    assert (record.exc_info or (None,))[0] is RuntimeError
    assert record.__dict__["request_id"] == answer.one("X-Request-Id")
    assert KEY.decode()[8:] not in caplog.text
    assert KEY.decode()[8:] not in answer.body.decode()
