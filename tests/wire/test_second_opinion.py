"""Bytes that a hostile client may send, read by the proxy and by a second reader of the tests' own.

Whatever the bytes are and however they arrive: the upstream gets the requests that the second reader finds, in order,
and no other; what is beyond doubt is forwarded; every response is well-formed, and none is an internal error. Nothing
here waits: the connections' other ends are objects, so that thousands of streams can be played.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from keyproxy.ai.dialects.header import HEADER
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.usage_reader import ResponseUsageReader
from keyproxy.http_messages import ResponseHead
from keyproxy.model import Grant, Permit, Route
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.gate import Gate
from keyproxy.wire.client.connection import ClientConnection
from keyproxy.wire.upstream.connection import UpstreamConnection
from tests import fakes, strict
from tests.rawhttp import OK
from tests.wire.conftest import Wire

_PERMIT = Permit(Grant(fakes.identity(), Route("any")))

SEEDS = [
    b"GET /a HTTP/1.1\r\nHost: h\r\nX-A: b\r\n\r\n",
    b"POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello",
    b"POST /c?d=e HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n",
    b"POST /d HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX-T: u\r\n\r\n",
    b"PUT /e HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi",
    b"OPTIONS * HTTP/1.1\r\nHost: h:80\r\nConnection: keep-alive\r\n\r\n",
    b"GET http://h/f HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /g HTTP/1.0\r\n\r\n",
]
LAST = b"GET /last HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"

#: What is put in, or in place of a byte, at every place.
INTRUDERS = [bytes([byte]) for byte in b'\x00\t\n\x0b\r "#%+,-./0:;=_\\x\x7f\x80\xff'] + [b"\r\n", b"\r\n ", b"\n\n"]

#: Lines that are put into heads, whole.
LINES = [
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", b"Transfer-Encoding:\x0bchunked",
    b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding: xchunked", b"Transfer-Encoding : chunked",
    b"Transfer-encoding: chunked\r\nTransfer-Encoding: x", b" Transfer-Encoding: chunked",
    b"Transfer_Encoding: chunked", b"X: y\rTransfer-Encoding: chunked", b"X: y\nTransfer-Encoding: chunked",
    b"X:\r\n Transfer-Encoding: chunked", b"Transfer-Encoding\x00: chunked", b"Transfer-Encoding: chunked\x00",
    b'Transfer-Encoding: "chunked"', b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: +5",
    b"Content-Length: 5, 5", b"Content-Length: 0x5", b"Content-Length: 5 5", b"Content-Length: -0",
    b"Content-Length: 99999999999999999999", b"Content-Length:", b"Content-Length: 00000000000000005",
    b"Content-Length: 5\x0b", b"Content-Length : 5", b"Content_Length: 5", b"Content-Length: \xd9\xa5",
    b"Content-Length: 5;",
    b"Content-Type: a\r\nContent-Type: a", b"Content-Type: a\r\nContent-Type: b", b"content-length:5",
    b"Content-Length: 1e1", b"CONTENT-LENGTH: 2", b"Host: h",
    b"Host: other", b"Host:", b"Host: h:", b"host: h", b"Host : h", b" Host: h", b"X-Host: h", b"Expect: 100-continue",
    b"Expect: 100-continue, x", b"Expect: 417", b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
    b"Upgrade: websocket\r\nConnection: upgrade", b"Connection: close", b"Connection: transfer-encoding",
    b"Connection: X-A", b"Trailer: Content-Length", b"TE: trailers, chunked", b": x", b"X", b"X y: z", b"\xc3\xa9: x",
    b"X: \xc3\xa9", b"X\t: y",
]  # fmt: skip

#: Bodies in chunks, on which servers have been known to differ.
CHUNKS = [
    b"5\r\nhello\r\n0\r\n\r\n", b"5\nhello\n0\n\n", b"5\r\nhello\r\n0\r\n\r\nX", b"05\r\nhello\r\n00\r\n\r\n",
    b"0x5\r\nhello\r\n0\r\n\r\n", b"+5\r\nhello\r\n0\r\n\r\n", b"5 \r\nhello\r\n0\r\n\r\n", b" 5\r\nhello\r\n0\r\n\r\n",
    b"5;\r\nhello\r\n0\r\n\r\n", b"5;a\nb\r\nhello\r\n0\r\n\r\n", b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    b"5;a=\"\r\n\"\r\nhello\r\n0\r\n\r\n", b"5\r\nhelloXX0\r\n\r\n", b"5\r\nhello0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n",
    b"5\r\nhello\r\n0\n\r\n", b"5\r\nhello\r\n0\r\n\n", b"5\r\nhello\r\n0\r\n\rX", b"5\r\nhello\r\n0\r\nX: y\r\n\r\n",
    b"5\r\nhello\r\n0\r\nContent-Length: 9\r\n\r\n", b"5\r\nhello\r\n0\r\nX: y\n\r\n",
    b"5\r\nhello\r\n0\r\n X: y\r\n\r\n", b"5\r\nhello\r\n\r\n0\r\n\r\n", b"5\r\nhello\r\n",
    b"FFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n", b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    b"5\x00\r\nhello\r\n0\r\n\r\n", b"5\r\nhello\r\n-0\r\n\r\n", b"\r\n5\r\nhello\r\n0\r\n\r\n",
    b"5\r\r\nhello\r\n0\r\n\r\n", b"g\r\n\r\n", b"\r\n\r\n", b"5_0\r\n", b"5,5\r\nhello\r\n0\r\n\r\n",
    b"5.0\r\nhello\r\n0\r\n\r\n", b"0\r\n\r\n", b"0;x\r\n\r\n", b"0\r\n\r\n\r\n", b"5\x0b\r\nhello\r\n0\r\n\r\n",
    b"2\r\nhello\r\n0\r\n\r\n", b"6\r\nhello\r\n0\r\n\r\n", b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
    b"5\r\nhello\r\n0\r\nX\r\n\r\n",
]  # fmt: skip


class _Gate(Gate):
    """Forwards everything: what is judged here is what the wire reads."""

    def begin(self, exchange: Exchange) -> None:
        exchange.forward(_PERMIT)

    def review(self, exchange: Exchange) -> None: ...

    def settle(self, exchange: Exchange) -> None: ...

    def meter(self, exchange: Exchange, answer: ResponseHead) -> Meter:
        return Meter(ResponseUsageReader(HEADER, HEADER.usual))

    def watch(self, exchange: Exchange) -> None: ...


class _Transport:
    """Keeps what is written, and notes how the connection ended."""

    def __init__(self, sock: socket.socket) -> None:
        self.written = b""
        self.is_closed = False
        self.is_cut = False
        self._sock = sock

    def write(self, data: bytes) -> None:
        self.written += data

    def get_extra_info(self, name: str) -> Any:
        return {"peername": ("127.0.0.1", 4), "socket": self._sock}.get(name)

    def is_closing(self) -> bool:
        return self.is_closed

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def write_eof(self) -> None:
        self.is_closed = True

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = self.is_cut = True


class Stage(NamedTuple):
    """What plays share: a proxy, and a socket that stays silent and stands for all of theirs."""

    wire: Wire
    sock: socket.socket


class Play:
    """One client connection and one to the upstream, which responds to every complete request."""

    def __init__(self, wire: Wire, sock: socket.socket) -> None:
        self.near, self.far = _Transport(sock), _Transport(sock)
        self.upstream = UpstreamConnection(wire.pool, wire.server.loop)
        self.upstream.connection_made(cast("Any", self.far))
        wire.pool.release(self.upstream, wire.pool.clock())
        self.client = ClientConnection(wire.server)
        self.client.connection_made(cast("Any", self.near))
        self._answered = 0

    def send(self, pieces: Sequence[bytes]) -> None:
        """What the client sends, piece by piece, before it closes its side."""
        for piece in pieces:
            self.client.data_received(piece)
            self._answer()
        self.client.eof_received()
        self._answer()

    def _answer(self) -> None:
        while not self.far.is_closed and len(strict.read(self.far.written).requests) > self._answered:
            is_head = strict.read(self.far.written).requests[self._answered].method == b"HEAD"
            self._answered += 1
            self.upstream.data_received(OK.removesuffix(b"{}") if is_head else OK)

    def end(self) -> None:
        """Both connections are lost."""
        self.client.connection_lost(None)
        self.upstream.connection_lost(None)

    def statuses(self, methods: Sequence[bytes]) -> list[int]:
        """Statuses of all final responses, to forwarded and to refused requests; all are well-formed."""
        found, left, forwarded = [], self.near.written, iter(methods)
        while left:
            head, end, left = left.partition(b"\r\n\r\n")
            start, *lines = head.split(b"\r\n")
            assert end, f"half a response: {head!r}"
            assert start.startswith(b"HTTP/1.1 "), f"no status line: {start!r}"
            status = int(start.split(b" ")[1])
            if status < 200:
                continue
            (length,) = (int(line[15:]) for line in lines if line.lower().startswith(b"content-length:"))
            found.append(status)
            if status == 200 and next(forwarded) == b"HEAD":
                continue
            assert len(left) >= length
            left = left[length:]
        return found


def wrong_with(stage: Stage, stream: bytes, pieces: Sequence[bytes]) -> str:
    """What is wrong with how the proxy handled a stream that came in these pieces; empty if nothing is."""
    play = Play(*stage)
    play.send(pieces)
    far = strict.read(play.far.written)
    statuses = play.statuses([one.method for one in far.requests])
    play.end()
    stage.wire.recorder.seen.clear()
    reading = strict.read(stream)
    expected = [(one.method, _as_sent(one.target, one.method), one.body) for one in reading.requests]
    forwarded = [(one.method, one.target, one.body) for one in far.requests]
    lengths = [value for one in far.requests for name, value in one.fields if name == b"content-length"]
    if any(value != b"%d" % int(value) for value in lengths):
        return f"forwarded lengths {lengths}"
    if forwarded != expected[: len(forwarded)] or far.ending == "malformed":
        return f"forwarded {forwarded}, expected {expected}"
    if any(status >= 500 and status != 501 for status in statuses):
        return f"got {statuses}"
    refused = len(statuses) - len(forwarded)
    if reading.ending in ("clean", "ignored"):
        if refused and all(one.is_certain for one in reading.requests):
            return f"refused what is beyond doubt: {statuses}, {forwarded}"
        if not refused and len(forwarded) != len(expected):
            return f"{len(expected)} requests, {len(forwarded)} forwarded, statuses {statuses}"
    elif not play.near.is_closed:
        return f"malformed, but left open after {statuses}"
    elif statuses[-1:] < [400] and not (far.requests and reading.requests[len(forwarded) - 1].is_last):
        # What came after the last request, by itself, was not looked at any more.
        return f"malformed, but got {statuses}"
    return ""


def _as_sent(target: bytes, method: bytes) -> bytes:
    """A target as it goes upstream."""
    if b"://" not in target.partition(b"?")[0] or target.startswith(b"/"):
        return target
    rest = target.partition(b"://")[2]
    place = min((rest.find(sign) for sign in (b"/", b"?") if sign in rest), default=len(rest))
    tail = rest[place:]
    if not tail and method == b"OPTIONS":
        return b"*"
    return tail if tail.startswith(b"/") else b"/" + tail


def mutants() -> Iterator[bytes]:
    """Every seed with every intruder at every place, with every line at every line, and every chunked body."""
    for seed in SEEDS:
        for place in range(len(seed) + 1):
            for intruder in INTRUDERS:
                yield seed[:place] + intruder + seed[place:]
                yield seed[:place] + intruder + seed[place + 1 :]
            yield seed[:place] + seed[place + 1 :]
            yield seed[:place]
        lines = seed.split(b"\r\n")
        for place in range(1, lines.index(b"") + 1):
            for line in LINES:
                yield b"\r\n".join([*lines[:place], line, *lines[place:]])
    for line in LINES:
        for body in (b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"0\r\n\r\n"):
            yield b"POST /x HTTP/1.1\r\nHost: h\r\n" + line + b"\r\n\r\n" + body
    for body in CHUNKS:
        yield b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + body


@pytest.fixture
async def stage(wire: Wire) -> AsyncIterator[Stage]:
    """A proxy that forwards whatever it can read."""
    wire.server.gate = _Gate()
    sock, other = socket.socketpair()
    with sock, other:
        yield Stage(wire, sock)


#: Which part of all mutants is played. `make soak` plays all of them, which takes minutes.
SHARE = float(os.environ.get("KEYPROXY_TEST_SHARE", "0.02"))


async def test_every_mutant_of_a_request_is_read_as_the_second_reader_does(stage: Stage) -> None:
    chance = random.Random(20261121)
    wrong = []
    for mutant in mutants():
        if chance.random() > SHARE:
            continue
        for stream in (mutant, mutant + LAST):
            fault = wrong_with(stage, stream, [stream])
            if fault:
                wrong.append((stream, fault))
    assert wrong[:5] == []


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """Several requests one after the other, some of them mutants, in pieces."""
    stream = b""
    for _ in range(draw(st.integers(1, 3))):
        request = draw(st.sampled_from(SEEDS))
        for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
            request = draw(_mutants_of(request))
        stream += request
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True) if start != end]


def _mutants_of(request: bytes) -> st.SearchStrategy[bytes]:
    places, lines = st.integers(0, len(request)), request.split(b"\r\n")
    return st.one_of(
        st.builds(
            lambda place, taken, put: request[:place] + put + request[place + taken :],
            places,
            st.integers(0, 3),
            st.sampled_from([*INTRUDERS, b"", b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"]),
        ),
        st.builds(
            lambda place, line: b"\r\n".join([*lines[:place], line, *lines[place:]]),
            st.integers(1, max(1, len(lines) - 1)),
            st.sampled_from(LINES),
        ),
        st.builds(lambda chunks: request.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + chunks, st.sampled_from(CHUNKS)),
    )


@given(pieces=streams())
@example(pieces=[SEEDS[2][:60], SEEDS[2][60:], SEEDS[0]])
@settings(max_examples=int(1_500 * SHARE), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_a_stream_in_pieces_is_read_as_the_second_reader_reads_it_whole(
    stage: Stage, pieces: list[bytes]
) -> None:
    assert wrong_with(stage, b"".join(pieces), pieces) == ""


# -- responses

ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX-T: u\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\nto the end",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
]


def answer_mutants() -> Iterator[bytes]:
    """Every response with every intruder at every place, with every line at every line, cut short, and doubled."""
    for answer in ANSWERS:
        for place in range(len(answer) + 1):
            for intruder in INTRUDERS:
                yield answer[:place] + intruder + answer[place:]
                yield answer[:place] + intruder + answer[place + 1 :]
            yield answer[:place] + answer[place + 1 :]
            yield answer[:place]
        lines = answer.split(b"\r\n")
        for place in range(1, lines.index(b"") + 1):
            for line in LINES:
                yield b"\r\n".join([*lines[:place], line, *lines[place:]])
        yield answer + answer
        yield answer + b"X"
    for body in CHUNKS:
        yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body


def wrong_with_answer(stage: Stage, method: bytes, stream: bytes, pieces: Sequence[bytes]) -> str:
    """The fault in relaying a response that arrived in these pieces before the upstream closed; empty if none."""
    play = Play(*stage)
    play.client.data_received(b"%b / HTTP/1.1\r\nHost: h\r\n\r\n" % method)
    for piece in pieces:
        if not play.far.is_closed:
            play.upstream.data_received(piece)
    is_reused = not play.far.is_closed and stage.wire.pool.counts()["idle"] > 0
    play.upstream.connection_lost(None)
    near, is_cut = play.near.written, play.near.is_cut
    play.end()
    stage.wire.recorder.seen.clear()
    try:
        relayed = strict.read_response(near, method)
    except (strict.Malformed, strict.Incomplete) as error:
        # Only a response that was cut off may look like this to the client, which can detect it.
        return "" if isinstance(error, strict.Incomplete) and is_cut else f"the client got {near!r}, cut: {is_cut}"
    if is_cut or relayed.rest:
        return f"a whole response was cut, or followed by something: {near!r}"
    if relayed.status == 502:
        is_certain = stream in ANSWERS
        return f"refused {stream!r}" if is_certain else ""
    try:
        sent_response = strict.read_response(stream, method)
    except (strict.Malformed, strict.Incomplete) as error:
        return f"{error!r} was relayed as {near!r}"
    if (relayed.status, relayed.body) != (sent_response.status, sent_response.body):
        return f"relayed as {near!r}"
    return "the connection is used again" if is_reused and not sent_response.is_clean else ""


async def test_every_mutant_of_a_response_is_relayed_as_the_second_reader_reads_it_or_not_at_all(
    stage: Stage,
) -> None:
    chance = random.Random(20261121)
    wrong = []
    for mutant in (*ANSWERS, *answer_mutants()):
        if chance.random() > SHARE and mutant not in ANSWERS:
            continue
        cut = chance.randrange(len(mutant) + 1)
        for method in (b"GET", b"HEAD"):
            for pieces in ([mutant], [mutant[:cut], mutant[cut:]]):
                fault = wrong_with_answer(stage, method, mutant, pieces)
                if fault:
                    wrong.append((method, mutant, pieces, fault))
    assert wrong[:5] == []
