"""What a request is charged for every way in which its response can end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time

import pytest

from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.model import Ending
from keyproxy.wire.usage_reads import NOT_REPORTED, REPORTED, TIMED_OUT
from tests import fakes
from tests.rawhttp import Client, Message, Upstream
from tests.waiting import until
from tests.wire.conftest import Start, Wire, request
from tests.wire.test_ai_examples import CHAT, DAY, ask, hello, metered, openai_usage, reports
from tests.wire.test_limits import STREAM, chunk, delta
from tests.wire.test_long import HANDSHAKE, tunnel

FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":13,"completion_tokens":9}}\n\n'
DONE = b"data: [DONE]\n\n"


class Streaming:
    """An upstream that streams `before`, then waits for `goes_on`, and streams `after`. Notes when it was aborted."""

    def __init__(self, before: bytes, after: bytes = b"") -> None:
        self.before, self.after = before, after
        self.goes_on = asyncio.Event()
        self.aborted_mono = 0.0
        self.upstream = Upstream(self.respond)

    async def respond(self, _request: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(self.before)
        await writer.drain()
        leaving = asyncio.ensure_future(self._note_abort(reader))
        await self.goes_on.wait()
        leaving.cancel()
        writer.write(self.after)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        return False

    async def _note_abort(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read(1)
        self.aborted_mono = time.monotonic()
        self.goes_on.set()


def stream(*events: bytes) -> bytes:
    return STREAM + b"".join(map(chunk, events))


async def left_after(wire: Wire, body: dict[str, object], marker: bytes) -> None:
    """Ask, and leave once this part of the response has arrived."""
    async with wire.client() as client:
        await client.send(request("POST", CHAT, "Content-Type: application/json", body=json.dumps(body).encode()))
        seen = b""
        while marker not in seen:
            seen += await client.reader.read(65_536)
        reset(client)


def reset(client: Client) -> None:
    """Leave without reading on: the proxy sees a reset."""
    sock = client.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


async def charged(wire: Wire) -> int:
    await until(lambda: bool(wire.ledger.settled), "it is settled")
    return wire.ledger.settled[-1][2]


@pytest.mark.parametrize("status", [b"400 Bad Request", b"429 Too Many", b"500 Sorry", b"503 Busy"])
async def test_an_error_status_is_charged_nothing_even_with_a_report(start: Start, status: bytes) -> None:
    wire = await metered(start, openai_usage(13, 9).replace(b"200 OK", status))
    await ask(wire, hello())
    assert await charged(wire) == 0
    assert wire.recorder.seen[-1].use == TokenUse(0, 0)


async def test_a_report_above_the_reservation_is_charged_exactly(start: Start) -> None:
    wire = await metered(start, openai_usage(500, 400))
    assert (await ask(wire, hello(max_tokens=50))).one("X-Keyproxy-Tokens-Reserved") == "68"
    assert await charged(wire) == 900


async def test_parts_of_the_usage_are_recorded(start: Start) -> None:
    usage = {
        "prompt_tokens": 100, "completion_tokens": 50,
        "prompt_tokens_details": {"cached_tokens": 60}, "completion_tokens_details": {"reasoning_tokens": 30},
    }  # fmt: skip
    wire = await metered(start, reports({"usage": usage}))
    await ask(wire, hello())
    assert wire.recorder.seen[-1].use == TokenUse(100, 50, cached=60, reasoning=30)


async def test_after_the_finish_marker_the_usage_is_awaited_although_the_client_has_left(start: Start) -> None:
    streaming = Streaming(stream(delta("Hello"), FINISH), b"".join(map(chunk, (USAGE, DONE))))
    wire = await metered(start, streaming.upstream)
    await left_after(wire, hello(stream=True), b"finish_reason")
    await asyncio.sleep(0.2)
    assert not wire.ledger.settled
    streaming.goes_on.set()
    assert await charged(wire) == 22
    seen = wire.recorder.seen[-1]
    assert (seen.is_estimated, seen.ending) == (False, Ending.CLIENT_GONE)
    assert wire.server.usage_reads.outcomes == {REPORTED: 1, NOT_REPORTED: 0, TIMED_OUT: 0}


async def test_the_wait_for_the_usage_ends_in_time_and_the_charge_is_estimated(start: Start) -> None:
    streaming = Streaming(stream(delta("Hello"), FINISH))
    wire = await metered(start, streaming.upstream, settings={"usage_wait_seconds": 0.3})
    await left_after(wire, hello(stream=True), b"finish_reason")
    left = time.monotonic()
    assert await charged(wire) == 19
    assert 0.2 < time.monotonic() - left < 2.0
    assert wire.recorder.seen[-1].is_estimated
    assert wire.server.usage_reads.outcomes == {REPORTED: 0, NOT_REPORTED: 0, TIMED_OUT: 1}


async def test_a_stream_that_ends_without_the_awaited_usage_is_estimated(start: Start) -> None:
    streaming = Streaming(stream(delta("Hello"), FINISH), chunk(DONE) + b"0\r\n\r\n")
    wire = await metered(start, streaming.upstream)
    await left_after(wire, hello(stream=True), b"finish_reason")
    streaming.goes_on.set()
    assert await charged(wire) == 19
    assert wire.server.usage_reads.outcomes == {REPORTED: 0, NOT_REPORTED: 1, TIMED_OUT: 0}


async def test_a_client_that_leaves_earlier_aborts_the_upstream_at_once_and_is_charged_what_came(start: Start) -> None:
    streaming = Streaming(stream(delta("Hello"), delta(" world")))
    wire = await metered(start, streaming.upstream)
    await left_after(wire, hello(stream=True), b"world")
    left = time.monotonic()
    assert await charged(wire) == 18 + 2
    await until(lambda: streaming.aborted_mono > 0, "the upstream is aborted")
    assert streaming.aborted_mono - left < 1.0
    assert wire.recorder.seen[-1].is_estimated


async def test_a_client_that_closes_its_connection_in_a_pause_of_the_stream_is_noticed_at_once(start: Start) -> None:
    streaming = Streaming(stream(delta("Hello")))
    wire = await metered(start, streaming.upstream)
    async with wire.client() as client:
        body = json.dumps(hello(stream=True)).encode()
        await client.send(request("POST", CHAT, "Content-Type: application/json", body=body))
        assert b"Hello" in await client.reader.readuntil(b"\n\n\r\n")
    assert await charged(wire) == 19
    await until(lambda: streaming.aborted_mono > 0, "the upstream is aborted", seconds=2)


async def test_a_client_that_closes_only_its_sending_side_gets_the_whole_stream(start: Start) -> None:
    streaming = Streaming(stream(delta("Hello")), b"".join(map(chunk, (FINISH, USAGE, DONE))) + b"0\r\n\r\n")
    wire = await metered(start, streaming.upstream)
    async with wire.client() as client:
        body = json.dumps(hello(stream=True)).encode()
        await client.send(request("POST", CHAT, "Content-Type: application/json", body=body))
        client.half_close()
        await until(lambda: bool(wire.upstream.requests), "it is under way")
        await asyncio.sleep(0.2)
        streaming.goes_on.set()
        told = await client.answer()
    assert told.is_whole
    assert told.body.endswith(DONE)
    assert await charged(wire) == 22


async def test_a_client_that_leaves_before_the_first_byte_is_charged_the_input(start: Start) -> None:
    streaming = Streaming(b"")
    wire = await metered(start, streaming.upstream)
    async with wire.client() as client:
        await client.send(
            request("POST", CHAT, "Content-Type: application/json", body=json.dumps(hello(stream=True)).encode())
        )
        await until(lambda: bool(wire.upstream.requests), "it is under way")
        reset(client)
    assert await charged(wire) == 18
    assert (wire.recorder.seen[-1].status, wire.recorder.seen[-1].use) == (499, TokenUse(18, 0))


async def test_a_client_that_leaves_before_its_request_was_sent_whole_is_charged_nothing(start: Start) -> None:
    wire = await metered(start, Streaming(b"").upstream, path="/v1/audio/transcriptions")
    head = request("POST", "/v1/audio/transcriptions", "Content-Type: multipart/form-data; boundary=b")
    async with wire.client() as client:
        await client.send(head[:-2] + b"Content-Length: 25000\r\n\r\n" + b"x" * 1_000)
        await until(lambda: wire.pool.counts()["busy"] == 1, "it is under way")
        reset(client)
    await until(lambda: bool(wire.ledger.settled), "it is settled")
    ((hold, was_sent, tokens),) = wire.ledger.settled
    assert (hold.tokens, was_sent, tokens) == (100 + 4_096, True, 0)


async def test_an_aborted_stream_of_a_reasoning_model_is_charged_its_whole_reservation(start: Start) -> None:
    streaming = Streaming(stream(delta("Hello")))
    wire = await metered(start, streaming.upstream)
    await left_after(wire, hello(model="gpt-4r", stream=True, max_tokens=8_192), b"Hello")
    assert await charged(wire) == 8_210
    assert wire.recorder.seen[-1].is_estimated


async def test_a_tunnel_that_its_client_resets_is_charged_in_full(start: Start) -> None:
    wire = await metered(start, Upstream(tunnel), "tokens/request=500", DAY, match="GET /v1/realtime")
    async with wire.client() as client:
        await client.send(request("GET", "/v1/realtime", *HANDSHAKE))
        assert (await client.answer()).status == 101
        reset(client)
    assert await charged(wire) == 500


async def test_a_stream_that_the_upstream_breaks_off_is_charged_what_came(start: Start) -> None:
    async def broken(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(stream(delta("Hello"), delta(" world")))
        await writer.drain()
        return False

    wire = await metered(start, Upstream(broken))
    async with wire.client() as client:
        body = json.dumps(hello(model="gpt-4r", stream=True)).encode()
        await client.send(request("POST", CHAT, "Content-Type: application/json", body=body))
        with contextlib.suppress(ConnectionError):
            await client.answer()
    assert await charged(wire) == 20


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("POST", "/v1/files"), ("DELETE", "/v1/files/f"), ("POST", "/v1/batches")],
)
async def test_what_uses_no_tokens_reserves_none_and_is_forwarded_unchanged(
    start: Start, method: str, path: str
) -> None:
    wire = await metered(start, openai_usage(13, 9), "tokens/day=1", path="/{rest...}", match="* /{rest...}")
    async with wire.client() as client:
        await client.send(
            request(method, path, "Content-Type: application/json", "Accept-Encoding: br", body=b'{"n":0}')
        )
        told = await client.answer(method=method)
    assert (told.status, told.one("X-Keyproxy-Tokens-Reserved")) == (200, None)
    assert wire.upstream.requests[-1].body == b'{"n":0}'
    assert wire.upstream.requests[-1].one("Accept-Encoding") == "br"
    assert [tokens for _, _, tokens in wire.ledger.settled] == [0]


async def test_a_form_is_not_collected_and_its_input_follows_from_its_length(start: Start) -> None:
    wire = await metered(start, reports({"text": "Hello"}), path="/v1/audio/transcriptions")
    body = b"x" * 25_000
    async with wire.client() as client:
        await client.send(
            request("POST", "/v1/audio/transcriptions", "Content-Type: multipart/form-data; boundary=b", body=body)
        )
        told = await client.answer()
    assert told.one("X-Keyproxy-Tokens-Reserved") == str(100 + 4_096)
    assert wire.upstream.requests[-1].body == body
    assert wire.server.room.held_bytes == 0
    assert await charged(wire) == 101


async def test_a_draining_proxy_charges_what_it_still_waits_for(start: Start) -> None:
    wire = await metered(start, Streaming(stream(delta("Hello"), FINISH)).upstream)
    await left_after(wire, hello(stream=True), b"finish_reason")
    await asyncio.sleep(0.1)
    assert not wire.ledger.settled
    await wire.server.drain(0.2)
    assert await charged(wire) == 19


async def test_keys_without_limits_are_metered_and_capped_too(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9))
    wire.identities.add(fakes.key(1), fakes.identity())
    told = await ask(wire, hello())
    assert (told.one("X-Keyproxy-Tokens-Reserved"), told.one("X-Keyproxy-Output-Cap")) == ("4114", "4096")
    assert wire.recorder.seen[-1].use == TokenUse(13, 9)
