"""Fields of responses: Date in every one, and of limits ours alone where ours apply."""

from __future__ import annotations

import asyncio
import email.utils
import re
import socket
import time

import pytest

from keyproxy.limits.plan import Plan
from keyproxy.process.ops_listener import Check, OpsListener, Verdict
from keyproxy.wire.parsing.head_templates import LEARNT_AFTER
from keyproxy.wire.responses.response_heads import DateField
from tests import fakes
from tests.rawhttp import Message, Upstream, answer_with
from tests.wire.conftest import Start, Wire, request
from tests.wire.test_long import HANDSHAKE, tunnel

IMF_FIXDATE = re.compile(
    r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), [0-3]\d (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d{4}"
    r" [0-2]\d:[0-5]\d:[0-6]\d GMT"
)
LONG_AGO = "Sun, 06 Nov 1994 08:49:37 GMT"

#: Fields of an upstream that a client would take for the limits that apply to it.
LIKE_OURS = [
    "RateLimit", "ratelimit", "RateLimit-Policy", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset",
    "RATELIMIT_REMAINING", "ratelimit.reset", "RateLimit_Policy", "RateLimit-Anything", "X-RateLimit-Limit",
    "x-ratelimit-remaining", "X_RateLimit_Reset", "X-RateLimit-Used", "X-Rate-Limit-Remaining",
]  # fmt: skip

#: Fields about the account that the upstream has with its provider.
PROVIDERS = [
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
    "anthropic-ratelimit-requests-remaining",
    "anthropic-ratelimit-tokens-reset",
]


def is_now(date: str | None) -> bool:
    """Whether this is a Date of the last few seconds."""
    assert date is not None
    assert IMF_FIXDATE.fullmatch(date), date
    return abs(email.utils.parsedate_to_datetime(date).timestamp() - time.time()) < 5.0


def upstream(*lines: str, status: str = "200 OK") -> Upstream:
    block = "".join(f"{line}\r\n" for line in lines)
    return Upstream(answer_with(f"HTTP/1.1 {status}\r\n{block}Content-Length: 2\r\n\r\n{{}}".encode()))


async def exchange(wire: Wire, raw: bytes | None = None, *, method: str = "POST") -> Message:
    async with wire.client() as client:
        await client.send(request() if raw is None else raw)
        return await client.answer(method=method)


@pytest.mark.parametrize("second", [0, 1, 951_782_400, 1_709_164_800, 1_767_225_599, 4_102_444_800])
def test_a_date_is_written_as_rfc_9110_has_it_whatever_the_locale(second: int) -> None:
    assert DateField().line(second + 0.999) == f"Date: {email.utils.formatdate(second, usegmt=True)}\r\n".encode()


def test_a_date_is_made_once_for_all_responses_of_a_second() -> None:
    date = DateField()
    first = date.line(100.0)
    assert date.line(100.9) is first
    assert date.line(101.0) == b"Date: Thu, 01 Jan 1970 00:01:41 GMT\r\n"
    assert date.line(100.0) == first, "the clock was set back"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (request("GET", "/", key=None), 401),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"\x16\x03\x01 no HTTP at all\r\n\r\n", 400),
        (request("GET", "/", "A: " + "x" * 40_000), 431),
        (request("POST", "/", "Content-Length: 104857601"), 413),
        (request("HEAD", "/", key=None), 401),
    ],
)
async def test_every_response_of_ours_carries_one_date(wire: Wire, raw: bytes, status: int) -> None:
    refused = await exchange(wire, raw, method=raw[:4].decode("latin-1").strip())
    assert refused.status == status
    assert is_now(refused.one("Date"))


async def test_responses_to_upstream_failures_and_overload_carry_a_date(start: Start) -> None:
    reached, release = asyncio.Event(), asyncio.Event()

    async def held(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        reached.set()
        await release.wait()
        writer.write(b"nonsense\r\n\r\n")
        return True

    wire = await start(listen={"connections_max": 1}, serving=Upstream(held))
    async with wire.client() as client:
        await client.send(request())
        await reached.wait()
        async with wire.client() as other:
            turned_away = await other.answer()
        release.set()
        invalid = await client.answer()
    assert (invalid.status, turned_away.status) == (502, 503)
    assert is_now(invalid.one("Date"))
    assert is_now(turned_away.one("Date"))


async def test_a_relayed_response_keeps_its_date_and_gets_one_if_it_has_none(start: Start) -> None:
    dated = await start(serving=upstream(f"date: {LONG_AGO}"))
    undated = await start(serving=upstream())
    for _ in range(LEARNT_AFTER + 2):
        assert (await exchange(dated)).all("Date") == [LONG_AGO]
        assert is_now((await exchange(undated)).one("Date"))


@pytest.mark.parametrize("name", LIKE_OURS)
async def test_limit_fields_of_the_upstream_are_removed_where_ours_apply(start: Start, name: str) -> None:
    wire = await start(serving=upstream(f"{name}: 7", "X-Kept: yes"))
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(requests_per_day=1_000)))
    for _ in range(LEARNT_AFTER + 2):
        answer = await exchange(wire)
        limits = [one for one, _ in answer.headers if "ratelimit" in re.sub(r"[^a-z]", "", one.lower())]
        assert limits == ["RateLimit-Policy", "RateLimit"]
        assert (answer.one("RateLimit-Policy") or "").startswith('"user.requests_per_day"')
        assert answer.one("X-Kept") == "yes"


@pytest.mark.parametrize("name", LIKE_OURS)
async def test_where_no_limit_of_ours_applies_the_upstream_s_go_through(start: Start, name: str) -> None:
    wire = await start(serving=upstream(f"{name}: 7"))
    assert (await exchange(wire)).all(name) == ["7"]


@pytest.mark.parametrize("name", PROVIDERS)
async def test_fields_about_a_provider_s_account_pass_through(start: Start, name: str) -> None:
    wire = await start(serving=upstream(f"{name}: 7"))
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(requests_per_day=1_000)))
    answer = await exchange(wire)
    assert answer.one(name) == "7"
    assert answer.one("RateLimit") is not None


@pytest.mark.parametrize("status", ["404 Not Found", "429 Too Many Requests", "503 Service Unavailable"])
async def test_also_an_upstream_that_refuses_states_no_limits_beside_ours(start: Start, status: str) -> None:
    wire = await start(serving=upstream("RateLimit: other;r=0;t=9", "Retry-After: 9", status=status))
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(requests_per_day=1_000)))
    answer = await exchange(wire)
    assert (answer.one("RateLimit") or "").startswith('"user.requests_per_day";r=999')
    assert answer.one("Retry-After") == "9"


async def test_the_response_that_begins_a_tunnel_states_the_limits_that_apply(start: Start) -> None:
    wire = await start(serving=Upstream(tunnel))
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(concurrency=3)))
    async with wire.client() as client:
        await client.send(request("GET", "/ws", *HANDSHAKE))
        answer = await client.answer(method="GET")
    assert answer.status == 101
    assert (answer.one("RateLimit") or "").startswith('"user.concurrency";r=2')


@pytest.mark.parametrize(
    "raw", [b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /none HTTP/1.1\r\nHost: a\r\n\r\n", b"nonsense\r\n\r\n"]
)
async def test_the_ops_listener_s_responses_carry_a_date(raw: bytes) -> None:
    async def checks() -> dict[str, Check]:
        return {"all": Check(Verdict.OK)}

    async def metrics() -> bytes:
        return b""

    ops = OpsListener(checks=checks, metrics=metrics, metrics_content_type="text/plain", jwks=metrics)
    sock = socket.create_server(("127.0.0.1", 0))
    await ops.start(sock)
    try:
        reader, writer = await asyncio.open_connection(*sock.getsockname())
        writer.write(raw)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        writer.close()
    finally:
        await ops.close()
    dates = re.findall(r"(?im)^date: (.*?)\r$", head)
    assert len(dates) == 1
    assert is_now(dates[0])
