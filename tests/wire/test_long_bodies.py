"""Buffered bodies: limits come first, nothing blocks the event loop, and one user leaves memory for others."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trustme

from keyproxy.config.token_settings import Tokens
from keyproxy.limits.plan import Plan
from keyproxy.reasons import Reason
from keyproxy.wire import body_buffer
from tests import fakes
from tests.rawhttp import OK, Message, Upstream
from tests.waiting import until
from tests.wire.conftest import Start, Wire, request
from tests.wire.test_limits import CHAT, answer, limited, routes, spent

_MIB = 1 << 20
TYPE = "Content-Type: application/json"
KEY = "Idempotency-Key: 8e03978e-40d5-43dd-bc93-6894a57f9324"


def chat(body: bytes, *lines: str, **about: Any) -> bytes:
    return request("POST", CHAT, TYPE, *lines, body=body, **about)


def announced(count: int, *lines: str, **about: Any) -> bytes:
    """The head of a request whose body is still to come."""
    return request("POST", CHAT, TYPE, f"Content-Length: {count}", *lines, **about)


def code_of(answer: Message) -> str:
    """The code of a refusal in the shape of the route."""
    found: str = json.loads(answer.body)["error"]["code"]
    return found


@contextlib.asynccontextmanager
async def longest_hold() -> AsyncIterator[list[float]]:
    """How many seconds of work the event loop does between two of its turns, at most: [seconds] once it is over."""
    held = [0.0]
    loop = asyncio.get_running_loop()
    last = time.thread_time()
    is_over = False

    def turn() -> None:
        nonlocal last
        # Of this thread: other programs on the machine do not count.
        now = time.thread_time()
        held[0] = max(held[0], now - last)
        last = now
        if not is_over:
            loop.call_later(0.0005, turn)

    turn()
    try:
        yield held
    finally:
        is_over = True


def hostile(size: int) -> dict[str, bytes]:
    """Bodies that are hard to read."""
    return {
        "empty arrays": b'{"max_tokens":5,"messages":[%b1]}' % (b'{"a":[]},' * (size // 9)),
        "nested": b'{"max_tokens":5,"messages":[%b1]}' % (b"[[[[]]]]," * (size // 9)),
        "members": b'{"max_tokens":5,%b"b":1}' % (b'"a":1,' * (size // 6)),
        "texts": b'{"max_tokens":5,"prompt":[%b1]}' % (b'"a",' * (size // 4)),
        "one text": b'{"max_tokens":5,"input":"%b"}' % (b"a" * size),
        "stream": b'{"max_tokens":5,"stream":true,"messages":["%b"]}' % (b"a" * size),
        "names twice": b'{%b"a":1}' % (b'"max_tokens":5,' * (size // 15)),
        "a number": b'{"max_tokens":%b}' % (b"9" * size),
        "brackets": b'{"a":%b' % (b"[" * size),
        "no json": b"\xff" * size,
    }


@pytest.mark.parametrize("name", hostile(0))
@pytest.mark.parametrize("coding", ["identity", "gzip"])
async def test_no_body_holds_the_event_loop(start: Start, name: str, coding: str) -> None:
    wire = await limited(start, Plan(tokens_per_day=10**12))
    body = hostile(2 * _MIB)[name]
    raw = gzip.compress(body, 1) if coding == "gzip" else body
    packed = chat(raw, f"Content-Encoding: {coding}")
    async with wire.client() as client, longest_hold() as held:
        for place in range(0, len(packed), 65_536):
            await client.send(packed[place : place + 65_536])
        answer = await client.answer(seconds=60)
    assert answer.status in (200, 400, 413)
    assert held[0] < 0.05
    if answer.status == 200 and name != "stream":
        assert wire.upstream.requests[-1].body == raw
    await until(lambda: wire.server.room.held_bytes == 0, "the room is free")


async def test_a_long_stream_request_is_forwarded_whole_with_its_usage_requested(start: Start) -> None:
    wire = await limited(start, Plan(tokens_per_day=10**12))
    body = hostile(4 * _MIB)["stream"]
    new = b'{"stream_options":{"include_usage":true},' + body[1:]
    for framing in ("Content-Length", "Transfer-Encoding"):
        async with wire.client() as client:
            if framing == "Content-Length":
                await client.send(chat(body))
            else:
                head = request("POST", CHAT, TYPE, "Transfer-Encoding: chunked")
                await client.send(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            assert (await client.answer(seconds=20)).status == 200
        seen = wire.upstream.requests[-1]
        assert seen.body == new
        assert seen.one(framing) == (str(len(new)) if framing == "Content-Length" else "chunked")


async def test_many_long_bodies_at_once_hold_the_event_loop_no_longer_than_one(start: Start) -> None:
    wire = await limited(start, Plan(tokens_per_day=10**12))
    packed = chat(hostile(_MIB // 2)["members"])

    async def one() -> int:
        async with wire.client() as client:
            await client.send(packed)
            return (await client.answer(seconds=60)).status

    async with longest_hold() as held:
        assert await asyncio.gather(*(one() for _ in range(12))) == [200] * 12
    assert held[0] < 0.05


# -- limits come before bodies

#: Bounds for bodies of 32 MiB.
LARGE = {"body_bytes_max": 32 * _MIB, "body_memory_max": 256 * _MIB}

PLANS = {
    "rate": (Plan(rate=0.001, burst=1), "rate_limited"),
    "quota": (Plan(requests_per_day=1), "quota_exhausted"),
    "month": (Plan(requests_per_month=1), "quota_exhausted"),
    "tokens": (Plan(tokens_per_day=24), "token_budget_exhausted"),
}


async def used_up(start: Start, plan: Plan) -> Wire:
    """A proxy whose user has spent all there is."""
    wire = await limited(start, plan, answer({"usage": {"prompt_tokens": 20, "completion_tokens": 4}}))
    async with wire.client() as client:
        await client.send(chat(b'{"max_tokens":1,"n":1}'))
        assert (await client.answer()).status == 200
    return wire


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("lines", [(), ("Expect: 100-continue",), ("Content-Encoding: gzip",)])
async def test_a_limit_that_refuses_anyway_does_so_before_the_body_arrives(
    start: Start, name: str, lines: tuple[str, ...]
) -> None:
    plan, code = PLANS[name]
    wire = await used_up(start, plan)
    async with wire.client() as client:
        await client.send(announced(Tokens().body_bytes_max, *lines))
        refused = await client.answer()
    assert (refused.status, code_of(refused)) == (429, code)
    assert wire.server.room.held_bytes == 0
    assert wire.recorder.seen[-1].bytes_in == 0


async def test_concurrency_refuses_before_the_body_arrives(start: Start) -> None:
    release = asyncio.Event()

    async def slow(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await release.wait()
        writer.write(OK)
        return True

    wire = await limited(start, Plan(concurrency=1), Upstream(slow))
    async with wire.client() as one, wire.client() as other:
        await one.send(chat(b"{}"))
        await until(lambda: bool(wire.upstream.requests), "one is under way")
        await other.send(announced(1_000, "Expect: 100-continue"))
        refused = await other.answer()
        assert code_of(refused) == "concurrency_limited"
        release.set()
        assert (await one.answer()).status == 200


@pytest.mark.parametrize(
    ("body", "lines"),
    [(b"[" * 200_000, ()), (gzip.compress(b"[", mtime=0), ("Content-Encoding: gzip",)), (b"[", ())],
    ids=["long", "compressed", "short"],
)
async def test_a_body_is_not_read_for_a_user_with_a_spent_quota(
    start: Start, body: bytes, lines: tuple[str, ...]
) -> None:
    wire = await used_up(start, Plan(requests_per_day=1))
    if len(body) == 1:
        # What takes no time to read is read unless it is known in this process that a limit refuses.
        async with wire.client() as client:
            await client.send(chat(b"{}"))
            assert code_of(await client.answer()) == "quota_exhausted"
    async with wire.client() as client:
        await client.send(chat(body, *lines))
        assert code_of(await client.answer()) == "quota_exhausted"
    assert spent(wire, "requests_per_day") == (1, 1)


async def test_a_repeat_that_may_be_paid_is_collected_and_not_read_before_that_is_known(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=1))
    body = b'{"max_tokens":5,"messages":["%b"]}' % (b"a" * 200_000)
    async with wire.client() as client:
        await client.send(chat(body, KEY))
        assert (await client.answer()).status == 200
        await wire.claims.tell()
        await client.send(announced(len(body), KEY, "Expect: 100-continue"))
        assert (await client.answer()).status == 100
        await client.send(body)
        assert (await client.answer()).status == 200
        await client.send(chat(b"[" * 200_000, KEY))
        assert code_of(await client.answer()) == "quota_exhausted"
    await wire.claims.tell()
    assert spent(wire, "requests_per_day") == (1, 1)


async def test_a_repeat_that_is_too_fast_is_refused_before_its_body_arrives(start: Start) -> None:
    wire = await limited(start, Plan(rate=0.001, burst=1))
    async with wire.client() as client:
        await client.send(chat(b"{}", KEY))
        assert (await client.answer()).status == 200
        await client.send(announced(1_000, KEY, "Expect: 100-continue"))
        assert code_of(await client.answer()) == "rate_limited"


# -- the room that such bodies share


async def shared(start: Start, bytes_max: int, *users: str) -> Wire:
    wire = await start(routes=routes())
    wire.server.room.bytes_max = bytes_max
    for number, user in enumerate(users, 1):
        wire.identities.add(fakes.key(number), fakes.identity(user))
    return wire


async def test_one_user_leaves_room_for_others_however_many_connections_it_opens(start: Start) -> None:
    wire = await shared(start, 1_000_100, "u_1", "u_2", "u_3")
    room = wire.server.room
    async with contextlib.AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(wire.client()) for _ in range(8)]
        for client in slow:
            await client.send(announced(250_001) + b" " * 250_000)
        await until(lambda: len(wire.recorder.seen) == 7, "the others are refused")
        await until(lambda: room.held_bytes == 250_000, "one of them has come so far")
        refused = {(one.status, one.reason, one.limit_reason) for one in wire.recorder.seen}
        assert refused == {(429, Reason.CONCURRENCY_LIMITED, "body_memory")}
        other = await stack.enter_async_context(wire.client())
        await other.send(announced(250_001, key=fakes.key(2).reveal()) + b"{" + b" " * 249_999)
        await until(lambda: room.held_bytes == 500_000, "there is room for another user")
        third = await stack.enter_async_context(wire.client())
        body = b'{"max_tokens":5,"messages":["%b"]}' % (b"a" * 100_000)
        await third.send(chat(body, key=fakes.key(3).reveal()))
        assert (await third.answer()).status == 200
        await other.send(b"}")
        assert (await other.answer()).status == 200
    await until(lambda: room.held_bytes == 0, "all have left")


@pytest.mark.parametrize("lines", [(), ("Expect: 100-continue",)])
async def test_a_request_without_a_valid_key_takes_no_room(start: Start, lines: tuple[str, ...]) -> None:
    wire = await shared(start, 1_000_000, "u_1")
    unknown = fakes.key(9).reveal()
    for key in (None, unknown):
        async with wire.client() as client:
            await client.send(announced(500_000, *lines, key=key) + (b"" if lines else b"x" * 100_000))
            assert (await client.answer()).status == 401
            assert wire.server.room.held_bytes == 0


async def test_a_key_that_is_still_looked_up_takes_no_room(start: Start) -> None:
    wire = await shared(start, 2_000_000, "u_1")
    wire.identities.slow.add(fakes.key(1).digest())
    wire.identities.may_bring.clear()
    body = b'{"max_tokens":5,"messages":["%b"]}' % (b"a" * 400_000)
    async with wire.client() as client:
        sending = asyncio.ensure_future(client.send(chat(body)))
        await asyncio.sleep(0.1)
        assert wire.server.room.held_bytes == 0
        wire.identities.may_bring.set()
        await sending
        assert (await client.answer()).status == 200


async def test_room_is_free_once_the_body_is_on_its_way_upstream(start: Start) -> None:
    release = asyncio.Event()

    async def slow(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await release.wait()
        writer.write(OK)
        return True

    wire = await start(routes=routes(), serving=Upstream(slow))
    body = b'{"max_tokens":5,"messages":["%b"]}' % (b"a" * 4 * _MIB)
    async with wire.client() as client:
        await client.send(chat(body))
        await until(lambda: bool(wire.upstream.requests), "the upstream has the request")
        assert wire.server.room.held_bytes == 0
        release.set()
        assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    ("first", "later", "seconds"),
    [(150_000, 0, 0.0), (150_000, 1, 0.2), (1_000, 1, 0.2)],
    ids=["silence", "a byte now and then", "a small body"],
)
async def test_a_body_that_hardly_arrives_gives_its_room_back(
    start: Start, monkeypatch: pytest.MonkeyPatch, first: int, later: int, seconds: float
) -> None:
    monkeypatch.setattr(body_buffer, "PACE_SECONDS", 1.0)
    wire = await shared(start, 1_000_000, "u_1")
    async with wire.client() as client:
        await client.send(announced(200_000) + b" " * first)
        begun = time.monotonic()
        answering = asyncio.ensure_future(client.answer(seconds=10))
        while not answering.done():
            await asyncio.sleep(seconds or 0.05)
            with contextlib.suppress(ConnectionError):
                await client.send(b" " * later)
        refused = await answering
    assert (refused.status, code_of(refused)) == (408, "request_timeout")
    assert time.monotonic() - begun < 4
    assert wire.server.room.held_bytes == 0


async def test_a_steady_body_is_waited_for_and_at_a_higher_pace_while_the_room_is_short(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_buffer, "PACE_SECONDS", 1.0)
    wire = await shared(start, 2_000_000, "u_1", "u_2")
    body = b'{"max_tokens":5,"messages":["%b"]}' % (b"a" * 100_000)

    async def steadily() -> int:
        async with wire.client() as client:
            await client.send(announced(len(body)) + body[:70_000])
            for place in range(70_000, len(body), 1_000):
                with contextlib.suppress(ConnectionError):
                    await client.send(body[place : place + 1_000])
                await asyncio.sleep(0.08)
            return (await client.answer()).status

    assert await steadily() == 200
    wire.server.room.take(("acme", "u_2"), 500_000)
    wire.server.room.take(("acme", "u_3"), 500_000)
    assert await steadily() == 408


@pytest.mark.parametrize("framing", ["Content-Length", "Transfer-Encoding"])
async def test_a_connection_is_not_reused_after_a_response_before_the_whole_body(start: Start, framing: str) -> None:
    after = bytearray()

    async def early(request: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(OK)
        if request.start.startswith("GET"):
            return True
        await writer.drain()
        await asyncio.sleep(0.3)
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 20):
                after.extend(piece)
        return False

    serving = Upstream(early)
    serving.reads_bodies = False
    wire = await start(routes=routes(), serving=serving, tokens=LARGE)
    body = b'{"max_tokens":5,"messages":["%b"]}' % (b"a" * 16 * _MIB)
    if framing == "Content-Length":
        raw = chat(body)
    else:
        raw = request("POST", CHAT, TYPE, "Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    async with wire.client() as client:
        await client.send(raw)
        assert (await client.answer(seconds=20)).status == 200
        await client.send(request("GET", "/next"))
        assert (await client.answer()).status == 200
    assert wire.upstream.connections == 2
    assert len(after) < len(body)
    assert after.find(b"GET") < 0


async def test_a_long_body_to_an_upstream_behind_tls_does_not_hold_the_event_loop(start: Start) -> None:
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    body = b'{"max_tokens":5,"messages":["%b"]}' % (b"a" * 31_000_000)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        answering = asyncio.create_task(asyncio.to_thread(_read_all, listening, context))
        url = f"https://127.0.0.1:{listening.getsockname()[1]}"
        wire = await start(routes=routes(), upstream={"url": url}, upstream_tls=trusting, tokens=LARGE)
        async with wire.client() as client, longest_hold() as held:
            packed = chat(body)
            for place in range(0, len(packed), 65_536):
                await client.send(packed[place : place + 65_536])
            assert (await client.answer(seconds=60)).status == 200
        assert (await answering).endswith(body[-100:])
    assert held[0] < 0.05


def _read_all(listening: socket.socket, context: ssl.SSLContext) -> bytes:
    """Read one request to its end and respond."""
    accepted, _ = listening.accept()
    with context.wrap_socket(accepted, server_side=True) as tls:
        content = bytearray()
        while not content.endswith(b"]}"):
            content += tls.recv(262_144)
        tls.sendall(OK)
        tls.unwrap().close()
    return bytes(content)


async def test_the_dense_bodies_of_one_user_do_not_keep_those_of_another_waiting(start: Start) -> None:
    wire = await shared(start, 1 << 28, "u_1", "u_2")
    body = hostile(_MIB)["members"]
    dense, own = chat(body), chat(body, key=fakes.key(2).reveal())
    async with contextlib.AsyncExitStack() as stack:
        many = [await stack.enter_async_context(wire.client()) for _ in range(12)]
        for client in many:
            await client.send(dense)
        await until(lambda: "11 waiting" in repr(wire.server.turns), "all are being read", seconds=20)
        other = await stack.enter_async_context(wire.client())
        await other.send(own)
        assert (await other.answer(seconds=20)).status == 200
        # It was the last to come, and the first to have been read.
        assert len(wire.upstream.requests) == 1
        for client in many:
            assert (await client.answer(seconds=60)).status == 200
