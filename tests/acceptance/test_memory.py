"""Memory with many or slow peers. `make soak` is the same at a larger scale."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
from pathlib import Path

import pytest

from tests.acceptance.conftest import Configure, Site
from tests.rawhttp import Client, Message, ResponseWriter
from tests.wire.conftest import request

_CHUNK = bytes(65_536)
_MIB = 1 << 20

#: Allowance for the interpreter: buffers of the loop, uncollected garbage.
_GROWTH_BYTES_MAX = 24 * _MIB
_IDLE_BYTES_MAX = 40 * 1024


_CHAT = "/v1/chat/completions"
_ROUTES = [{"match": f"POST {_CHAT}", "tokens": "openai"}, {"match": "* /{rest...}"}]


@pytest.fixture
def commands() -> None:
    """A process that is forked would have the peak of the one that it is forked from."""


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


async def _used_once(site: Site, stack: contextlib.AsyncExitStack, secret: bytes) -> None:
    client = await stack.enter_async_context(site.client())
    await client.send(request("GET", "/", key=secret))
    assert (await client.answer()).status == 200


async def test_an_idle_connection_costs_little_memory(site: Site) -> None:
    secret, number = (await site.key())["secret"].encode(), 500
    async with site.serving() as process, contextlib.AsyncExitStack() as stack:
        for _ in range(10):
            await _used_once(site, stack, secret)
        before = _peak_bytes(process.pid)
        for _ in range(number // 50):
            await asyncio.gather(*(_used_once(site, stack, secret) for _ in range(50)))
        assert _peak_bytes(process.pid) - before < number * _IDLE_BYTES_MAX


async def test_a_large_body_is_not_held_on_its_way_either_way(configure: Configure, dsn: str) -> None:
    """64 MiB each way, to an upstream and to a client that pause repeatedly."""
    count = 1024
    site = configure(dsn)
    site.upstream.reads_bodies = False
    site.upstream.answering = _slow_both_ways(count)
    secret = (await site.key())["secret"].encode()
    async with site.serving() as process:
        async with site.client() as client:
            await client.send(request("GET", "/", key=secret))
            await client.answer()
        before = _peak_bytes(process.pid)
        async with site.client() as client:
            await client.send(request("POST", "/", "Transfer-Encoding: chunked", key=secret))
            for _ in range(count):
                await client.send(b"%x\r\n%b\r\n" % (len(_CHUNK), _CHUNK))
            await client.send(b"0\r\n\r\n")
            async with asyncio.timeout(30):
                await client.reader.readuntil(b"\r\n\r\n")
                for place in range(count):
                    assert len(await client.reader.readexactly(len(_CHUNK))) == len(_CHUNK)
                    await asyncio.sleep(0.01 if place % 32 == 0 else 0)
        assert _peak_bytes(process.pid) - before < _GROWTH_BYTES_MAX


def _slow_both_ways(count: int) -> ResponseWriter:
    async def answer(message: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        taken = 0
        if message.one("Transfer-Encoding"):
            while size := int(await reader.readline(), 16):
                await reader.readexactly(size + 2)
                taken += 1
                await asyncio.sleep(0.01 if taken % 32 == 0 else 0)
            await reader.readline()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (count * len(_CHUNK) if taken else 0))
        for _ in range(count if taken else 0):
            writer.write(_CHUNK)
            await writer.drain()
        return True

    return answer


def _hostile(size: int) -> dict[str, bytes]:
    """Long documents: a parser needs 35 times the size of the first, and four times that of the last."""
    return {
        "empty arrays": b'{"max_tokens":5,"messages":[%b1]}' % (b'{"a":[]},' * (size // 9)),
        "members": b'{"max_tokens":5,%b"b":1}' % (b'"a":1,' * (size // 6)),
        "stream": b'{"max_tokens":5,"stream":true,"messages":["%b"]}' % (b"a" * size),
        "emoji": b'{"max_tokens":5,"messages":["%b"]}' % ("a" * 99 + "\U0001f600" * (size // 4)).encode(),
    }


@pytest.mark.parametrize("name", _hostile(0))
@pytest.mark.parametrize("coding", ["identity", "gzip"])
async def test_a_long_body_that_is_read_takes_no_more_than_three_times_its_size(
    configure: Configure, dsn: str, name: str, coding: str
) -> None:
    site = configure(dsn, routes=_ROUTES)
    secret = (await site.key())["secret"].encode()
    body = _hostile(31_000_000)[name]
    raw = gzip.compress(body, 9) if coding == "gzip" else body
    async with site.serving() as process:
        async with site.client() as client:
            await client.send(request("POST", _CHAT, "Content-Type: application/json", key=secret, body=b"{}"))
            assert (await client.answer()).status == 200
        before = _peak_bytes(process.pid)
        async with site.client() as client:
            lines = ("Content-Type: application/json", f"Content-Encoding: {coding}")
            await client.send(request("POST", _CHAT, *lines, key=secret, body=raw))
            answer = await client.answer(seconds=60)
        grown = _peak_bytes(process.pid) - before
        print(f"{name}, {coding}: {len(raw)} bytes of {len(body)}; {answer.status}; grew by {grown / _MIB:.1f} MiB")
        assert grown < 3 * len(raw) + 4 * _MIB
        if answer.status != 200:
            assert json.loads(answer.body)["code"] == "body_too_large"
        else:
            assert len(site.upstream.requests[-1].body) >= len(raw)


@pytest.mark.parametrize("seconds", [0.0, 1.5], ids=["at once", "when leases have gone back"])
async def test_a_user_with_an_exhausted_quota_is_refused_before_the_body(
    configure: Configure, dsn: str, seconds: float
) -> None:
    site = configure(dsn, routes=_ROUTES)
    secret = (await site.key())["secret"].encode()
    await site.run_json("plan", "set", "one", "--requests-per-day", "1")
    await site.run_json("user", "set-plan", "u_42", "one")
    raw = gzip.compress(_hostile(31_000_000)["empty arrays"])
    lines = ("Content-Type: application/json", "Content-Encoding: gzip", f"Content-Length: {len(raw)}")
    async with site.serving() as process:
        async with site.client() as client:
            await client.send(request("POST", _CHAT, lines[0], key=secret, body=b"{}"))
            assert (await client.answer()).status == 200
        before = _peak_bytes(process.pid)
        await asyncio.sleep(seconds)
        for expects, body in (("Expect: 100-continue", b""), ("X-None: 1", raw)):
            async with site.client() as client:
                await client.send(request("POST", _CHAT, *lines, expects, key=secret) + body)
                refused = await client.answer()
            assert (refused.status, json.loads(refused.body)["code"]) == (429, "quota_exhausted")
        assert _peak_bytes(process.pid) - before < 4 * _MIB
        assert len(site.upstream.requests) == 1


async def test_slow_bodies_of_one_user_leave_room_for_another_and_time_out(configure: Configure, dsn: str) -> None:
    """Requests of a user with an exhausted quota; their idempotency keys may have been charged before."""
    site = configure(dsn, routes=_ROUTES)
    secret, other = [(await site.key(user))["secret"].encode() for user in ("u_42", "u_43")]
    await site.run_json("plan", "set", "none", "--requests-per-day", "0")
    await site.run_json("user", "set-plan", "u_42", "none")
    size = 8_388_608
    async with site.serving() as process, contextlib.AsyncExitStack() as stack:
        before = _peak_bytes(process.pid)
        slow = [await stack.enter_async_context(site.client()) for _ in range(12)]
        for number, client in enumerate(slow):
            line = (f"Idempotency-Key: {number}", f"Content-Length: {size}")
            with contextlib.suppress(ConnectionError):
                await client.send(request("POST", "/v1/ai/jobs", *line, key=secret))
                for _ in range(size // len(_CHUNK) - 1):
                    await client.send(_CHUNK)
        begun = time.monotonic()
        answers = [asyncio.ensure_future(_status_of(client)) for client in slow]
        client = await stack.enter_async_context(site.client())
        body = b'{"messages":["%b"]}' % (b"a" * 8_000_000)
        await client.send(request("POST", _CHAT, "Content-Type: application/json", key=other, body=body))
        status = (await client.answer(seconds=20)).status
        print(f"another user's request: {status} after {time.monotonic() - begun:.1f} s")
        assert status == 200
        statuses = await asyncio.gather(*answers)
        seconds = time.monotonic() - begun
        grown = _peak_bytes(process.pid) - before
        print(f"slow ones: {statuses} after {seconds:.1f} s; the process grew by {grown / _MIB:.0f} MiB")
        # Clients that were refused while sending may have missed the response.
        assert statuses.count(408) in (7, 8)
        assert set(statuses) <= {408, 429, 0}
        assert seconds < 20
        assert grown < 1.3 * 8 * size


async def _status_of(client: Client) -> int:
    """The status for a client that sends a byte now and then; 0: the connection ended without a response."""
    answering = asyncio.ensure_future(client.answer(seconds=60))
    while not answering.done():
        await asyncio.wait([answering], timeout=1.0)
        if not client.writer.transport.is_closing():
            with contextlib.suppress(ConnectionError):
                await client.send(b" ")
    try:
        return (await answering).status
    except (AssertionError, ConnectionError):
        return 0
