"""The record of a request for the log and the metrics: the refusal, the user, and the waits."""

from __future__ import annotations

import asyncio

import pytest

from keyproxy.auth import credentials
from keyproxy.auth.api_key import KeyFormat
from keyproxy.http.routes import RouteTable
from keyproxy.limits.plan import Plan
from keyproxy.model import Route
from keyproxy.reasons import Reason
from keyproxy.wire.parsing.head_beginnings import refused_line
from tests import fakes
from tests.fakes import Recorded
from tests.rawhttp import OK, Message, Upstream, answer_with
from tests.waiting import until
from tests.wire.conftest import KEY, Start, Wire, request

CHAT = "/v1/chat/completions"
SLOW_SECONDS = 0.4

#: Beyond what decides on a request takes, also on a machine that does other things.
BRISK_SECONDS = 0.2


async def recorded(wire: Wire, count: int = 1) -> list[Recorded]:
    """What was recorded, once so many requests have ended."""
    await until(lambda: len(wire.recorder.seen) >= count, f"{count} requests are recorded")
    return wire.recorder.seen


# -- why it was refused


@pytest.mark.parametrize(
    ("raw", "detail"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "more than one Host"),
        (b"GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 without a Host"),
        (b"nonsense\r\n\r\n", "llhttp"),
    ],
)
async def test_the_detail_of_a_malformed_request_is_recorded(wire: Wire, raw: bytes, detail: str) -> None:
    async with wire.client() as client:
        await client.send(raw)
        assert (await client.answer()).status == 400
    (one,) = await recorded(wire)
    assert one.reason is Reason.REQUEST_MALFORMED
    assert detail in one.detail


@pytest.mark.parametrize(
    ("raw", "status", "line"),
    [
        (request("TRACE", "/v1/x?a=1"), 405, (b"TRACE", b"/v1/x")),
        (request("BREW", "/v1/x"), 501, (b"BREW", b"/v1/x")),
        (request("get", "/v1/x"), 501, (b"get", b"/v1/x")),
        (request("POST", "/v1/x", "Expect: 200-ok", body=b"x"), 417, (b"POST", b"/v1/x")),
        (request("GET", "/v1/x", *["A: b"] * 300), 431, (b"GET", b"/v1/x")),
        (request("GET", "/v1/x", "A: " + "b" * 40_000), 431, (b"GET", b"/v1/x")),
        (b"GET /v1/x" + b"b" * 40_000, 431, (b"GET", b"")),
        (b"GET /v1/x HTTP/1.1\r\n\r\n", 400, (b"GET", b"/v1/x")),
        (request("GET", "/v1/../x"), 400, (b"GET", b"")),
        (b"nonsense\r\n\r\n", 400, (b"", b"")),
        (b"k" * 32 + b" / HTTP/1.1\r\nHost: a\r\n\r\n", 501, (b"", b"")),
    ],
)
async def test_method_and_path_of_a_refused_head_are_recorded_where_they_are_readable(
    wire: Wire, raw: bytes, status: int, line: tuple[bytes, bytes]
) -> None:
    async with wire.client() as client:
        await client.send(raw)
        assert (await client.answer()).status == status
    (one,) = await recorded(wire)
    assert (one.method, one.path) == line


@pytest.mark.parametrize("target", [f"/{KEY.decode()}", f"/x?k={KEY.decode()}", f"/%6b{KEY.decode()[1:]}"])
@pytest.mark.parametrize("method", ["TRACE", "BREW"])
def test_request_line_with_a_key_is_marked_so_that_no_log_shows_it(method: str, target: str) -> None:
    raw = f"{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    line = refused_line(raw, lambda text: credentials.holds_key(text, KeyFormat("kp")))
    assert line is not None
    assert line.holds_key


async def test_the_detail_of_an_invalid_response_is_recorded(start: Start) -> None:
    two = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx"
    wire = await start(serving=Upstream(answer_with(two)))
    async with wire.client() as client:
        await client.send(request())
        assert (await client.answer()).status == 502
    (one,) = await recorded(wire)
    assert (one.reason, bool(one.detail)) == (Reason.UPSTREAM_INVALID, True)


async def test_the_policy_of_the_limit_that_refused_is_recorded(start: Start) -> None:
    wire = await start()
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(requests_per_day=1)))
    async with wire.client() as client:
        for status in (200, 429):
            await client.send(request())
            assert (await client.answer()).status == status
    served, refused = await recorded(wire, 2)
    assert (served.policy, refused.policy) == ("", "user.requests_per_day")


async def test_the_client_s_address_is_recorded_by_the_rule_of_trusted_proxies(start: Start) -> None:
    for trusted, client_address in (([], b"127.0.0.1"), (["127.0.0.0/8"], b"198.51.100.7")):
        wire = await start(listen={"trusted_proxies": trusted})
        async with wire.client() as client:
            await client.send(request("GET", "/", "X-Forwarded-For: 1.1.1.1, 198.51.100.7"))
            assert (await client.answer()).status == 200
        (one,) = await recorded(wire)
        assert one.client == client_address


# -- what it waited for


async def test_a_slow_upload_is_not_our_time(wire: Wire) -> None:
    head, _, body = request(body=b"0123456789").partition(b"\r\n\r\n")
    async with wire.client() as client:
        await client.send(head + b"\r\n\r\n")
        await asyncio.sleep(SLOW_SECONDS)
        await client.send(body)
        assert (await client.answer()).status == 200
    (one,) = await recorded(wire)
    assert one.body_wait_seconds >= SLOW_SECONDS * 0.9
    assert 0.0 < one.overhead_seconds < BRISK_SECONDS


@pytest.mark.parametrize("expects", [False, True])
async def test_a_slow_upload_of_a_buffered_body_is_not_our_time(start: Start, *, expects: bool) -> None:
    wire = await start(routes=RouteTable([(f"POST {CHAT}", Route("chat", tokens="openai"))]))
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(tokens_per_day=100_000)))
    body = b'{"model": "m", "max_tokens": 5, "messages": []}'
    lines = ("Content-Type: application/json", *(("Expect: 100-continue",) if expects else ()))
    head = request("POST", CHAT, *lines, body=body).partition(b"\r\n\r\n")[0]
    async with wire.client() as client:
        await client.send(head + b"\r\n\r\n")
        if expects:
            assert (await client.answer()).status == 100
        for part in (body[:20], body[20:]):
            await asyncio.sleep(SLOW_SECONDS / 2)
            await client.send(part)
        assert (await client.answer()).status == 200
    (one,) = await recorded(wire)
    assert one.body_wait_seconds >= SLOW_SECONDS * 0.9
    assert 0.0 < one.overhead_seconds < BRISK_SECONDS


async def test_waiting_for_a_connection_to_the_upstream_is_not_our_time(start: Start) -> None:
    may_answer = asyncio.Event()

    async def answering(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await may_answer.wait()
        writer.write(OK)
        return True

    wire = await start(serving=Upstream(answering), upstream={"connections_max": 1})
    async with wire.client() as one, wire.client() as other:
        await one.send(request("GET"))
        await until(lambda: bool(wire.upstream.heads), "the first request is in flight")
        await other.send(request("GET"))
        await asyncio.sleep(SLOW_SECONDS)
        may_answer.set()
        assert [(await client.answer()).status for client in (one, other)] == [200, 200]
    first, second = await recorded(wire, 2)
    assert first.connection_wait_seconds < BRISK_SECONDS
    assert second.connection_wait_seconds >= SLOW_SECONDS * 0.9
    assert max(first.overhead_seconds, second.overhead_seconds) < BRISK_SECONDS


async def test_an_attempt_on_a_connection_that_was_closed_meanwhile_is_not_our_time(start: Start) -> None:
    async def answering(message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if message.start.startswith("GET /again") and wire.upstream.connections == 1:
            await asyncio.sleep(SLOW_SECONDS)
            return False
        writer.write(OK)
        return True

    wire = await start(serving=Upstream(answering))
    async with wire.client() as client:
        for path in ("/", "/again"):
            await client.send(request("GET", path))
            assert (await client.answer()).status == 200
    _, again = await recorded(wire, 2)
    assert again.connection_wait_seconds >= SLOW_SECONDS * 0.9
    assert again.overhead_seconds < BRISK_SECONDS


async def test_a_request_that_waits_for_nothing_has_no_wait(wire: Wire) -> None:
    async with wire.client() as client:
        for _ in range(2):
            await client.send(request(body=b"{}"))
            assert (await client.answer()).status == 200
    _, second = await recorded(wire, 2)
    assert (second.body_wait_seconds, second.connection_wait_seconds) == (0.0, 0.0)
    assert 0.0 < second.before_sent_seconds < BRISK_SECONDS
