"""Refusals: the responses to them, and that nothing of a refused request reaches the upstream."""

from __future__ import annotations

import asyncio
import json

import pytest

from keyproxy.http.routes import RouteTable
from keyproxy.model import Ending, Route
from keyproxy.reasons import Reason
from tests import fakes
from tests.rawhttp import Upstream
from tests.wire.conftest import KEY, Start, Wire, request

UNKNOWN = fakes.key(999).reveal()
MISTYPED = KEY[:-1] + (b"0" if KEY[-1:] != b"0" else b"1")


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (request("GET", "/", key=None), 401, "api_key_missing"),
        (request("GET", "/", "Authorization: Basic eDp5", key=None), 401, "api_key_missing"),
        (request("GET", "/", key=UNKNOWN), 401, "api_key_invalid"),
        (request("GET", "/", key=MISTYPED), 401, "api_key_invalid"),
        (request("GET", "/", f"X-Api-Key: {UNKNOWN.decode()}"), 400, "credentials_ambiguous"),
        (request("GET", f"/?api_key={KEY.decode()}", key=None), 400, "key_in_url"),
        (request("GET", f"/{KEY.decode()}"), 400, "key_in_url"),
        (request("GET", "/a/../b"), 400, "request_malformed"),
        (request("GET", "/", "Content-Length: 1", "Content-Length: 2"), 400, "request_malformed"),
        (request("GET", "/", "A: " + "x" * 40_000), 431, "headers_too_large"),
        (request("GET", "/", *(f"A{number}: x" for number in range(300))), 431, "headers_too_large"),
        (request("POST", "/", "Content-Length: 104857601"), 413, "body_too_large"),
    ],
)
async def test_a_refusal_is_a_problem_document_with_its_code_and_a_request_id(
    wire: Wire, raw: bytes, status: int, code: str
) -> None:
    async with wire.client() as client:
        await client.send(raw)
        answer = await client.answer(method="GET")
    problem = json.loads(answer.body)
    assert (answer.status, problem["status"], problem["code"]) == (status, status, code)
    assert answer.one("Content-Type") == "application/problem+json"
    assert problem["request_id"] == answer.one("X-Request-Id")
    assert {"type", "title", "detail"} <= problem.keys()
    assert answer.one("WWW-Authenticate") == ('Api-Key realm="keyproxy"' if status == 401 else None)
    assert wire.upstream.heads == []
    assert wire.recorder.seen[0].ending is Ending.REFUSED


async def test_all_missing_scopes_are_named_in_the_challenge(start: Start) -> None:
    needed = frozenset({"jobs:admin", "jobs:delete"})
    routes = RouteTable([("POST /v1/ai/jobs", Route("POST /v1/ai/jobs", needed))])
    wire = await start(routes=routes)
    async with wire.client() as client:
        await client.send(request("POST", "/v1/ai/jobs"))
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["code"]) == (403, "insufficient_scope")
        assert answer.one("WWW-Authenticate") == (
            'Api-Key realm="keyproxy", error="insufficient_scope", scope="jobs:admin jobs:delete"'
        )
        await client.send(request("GET", "/other"))
        assert json.loads((await client.answer()).body)["code"] == "route_not_allowed"


@pytest.mark.parametrize(("shape", "path"), [("openai", ("error", "code")), ("anthropic", ("error", "code"))])
async def test_a_refusal_has_the_error_shape_of_its_route(start: Start, shape: str, path: tuple[str, ...]) -> None:
    routes = RouteTable([("POST /v1/{rest...}", Route("x", frozenset({"never"}), error_shape=shape))])
    wire = await start(routes=routes)
    async with wire.client() as client:
        for key, code in ((KEY, "insufficient_scope"), (UNKNOWN, "api_key_invalid")):
            await client.send(request("POST", "/v1/chat", key=key))
            content = json.loads((await client.answer()).body)
            for name in path:
                content = content[name]
            assert content == code


async def test_an_unavailable_store_is_503_with_retry_after(wire: Wire) -> None:
    wire.identities.is_down = True
    async with wire.client() as client:
        await client.send(request("GET", "/", key=UNKNOWN))
        answer = await client.answer()
        assert (answer.status, answer.one("Retry-After")) == (503, "2")
        await client.send(request("GET", "/"))
        assert (await client.answer()).status == 200


async def test_a_refusal_of_a_request_that_is_all_there_keeps_the_connection(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("POST", "/", body=b"all of it", key=UNKNOWN))
        assert (await client.answer()).one("Connection") is None
        await client.send(request("POST", "/", body=b"x"))
        assert (await client.answer()).status == 200


@pytest.mark.parametrize("line", ["Content-Length: 5000000", "Transfer-Encoding: chunked"])
async def test_a_refusal_before_the_body_is_read_closes_and_the_client_still_gets_it(wire: Wire, line: str) -> None:
    async with wire.client() as client:
        await client.send(request("POST", "/", line, key=UNKNOWN))
        body = b"x" * 500_000
        await client.send(body if "Length" in line else b"%x\r\n" % len(body) + body)
        answer = await client.answer()
        assert (answer.status, answer.one("Connection")) == (401, "close")
        assert await client.ends() == b""
    assert wire.upstream.heads == []


async def test_a_chunked_body_past_the_bound_is_refused_and_its_upstream_ended(start: Start) -> None:
    wire = await start(listen={"body_bytes_max": 1000}, serving=Upstream(reads_bodies=True))
    async with wire.client() as client:
        await client.send(request("POST", "/", "Transfer-Encoding: chunked") + b"1\r\nx\r\n")
        await asyncio.sleep(0.05)
        await client.send(b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert (await client.answer()).status == 413
    assert wire.upstream.requests == []


async def test_bytes_that_begin_no_request_after_one_make_both_malformed(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("POST", "/", body=b"q=42") + b"\r\n\r\nGET / HTTP/1.1\r\n")
        assert (await client.answer()).status == 400
    assert wire.upstream.heads == []


@pytest.mark.parametrize("after", [request("GET", "/2"), b"\x00nonsense\n", b"\r\n\r\n", b"x" * 300_000])
@pytest.mark.parametrize("body", [b"", b"body"])
async def test_bytes_after_a_request_that_closes_are_ignored(wire: Wire, body: bytes, after: bytes) -> None:
    async with wire.client() as client:
        await client.send(request("POST", "/", "Connection: close", body=body) + after)
        answer = await client.answer()
        assert (answer.status, answer.one("Connection")) == (200, "close")
        assert await client.ends() == b""
    assert [one.start for one in wire.upstream.requests] == ["POST / HTTP/1.1"]


async def test_bytes_after_an_http_1_0_request_make_it_malformed(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("GET", "/").replace(b"HTTP/1.1", b"HTTP/1.0") + request("GET", "/2"))
        assert (await client.answer()).status == 400
    assert wire.upstream.heads == []


@pytest.mark.parametrize(
    ("raw", "status", "code", "allow"),
    [
        (request("TRACE", "/"), 405, "method_not_allowed", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
        (request("TRACE", "/", key=None), 405, "method_not_allowed", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
        (request("BREW", "/"), 501, "method_not_implemented", None),
        (request("get", "/"), 501, "method_not_implemented", None),
        (request("POST", "/", "Expect: 200-ok", body=b"x"), 417, "expectation_failed", None),
        (request("CONNECT", "proxy.test:443"), 400, "request_malformed", None),
        (request("CONNECT", "/"), 400, "request_malformed", None),
    ],
)
async def test_well_formed_requests_that_are_not_served_have_their_own_codes(
    wire: Wire, raw: bytes, status: int, code: str, allow: str | None
) -> None:
    async with wire.client() as client:
        await client.send(raw)
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["code"], answer.one("Allow")) == (status, code, allow)
        assert answer.one("Connection") == "close"
    assert wire.upstream.heads == []


async def test_a_method_that_a_route_names_is_forwarded(start: Start) -> None:
    wire = await start(routes=RouteTable([("BREW /pot", Route("brew")), ("* /{rest...}", Route("any"))]))
    async with wire.client() as client:
        for method, target, status in (("BREW", "/pot", 200), ("BREW", "/", 200), ("PROPFIND", "/", 200)):
            await client.send(request(method, target, body=b"x"))
            assert (await client.answer()).status == status
        await client.send(request("STEEP", "/pot"))
        assert (await client.answer()).status == 501
    assert [one.start for one in wire.upstream.requests] == [
        "BREW /pot HTTP/1.1",
        "BREW / HTTP/1.1",
        "PROPFIND / HTTP/1.1",
    ]


async def test_a_repeated_equal_content_type_is_forwarded_once(wire: Wire) -> None:
    async with wire.client() as client:
        for _ in range(12):
            await client.send(request("POST", "/", "Content-Type: a/b", "content-type:  a/b", "X: y", body=b"x"))
            assert (await client.answer()).status == 200
    assert {tuple(one.all("Content-Type")) for one in wire.upstream.requests} == {("a/b",)}


@pytest.mark.parametrize("gap", [b"\r\n", b""])
async def test_an_empty_line_between_requests_is_ignored_however_it_arrives(wire: Wire, gap: bytes) -> None:
    one = request("POST", "/", body=b"q=42")
    stream = one + gap + one + gap + one
    for cut in (len(one), len(one) + 1, len(one) + 2, 1_000):
        async with wire.client() as client:
            await client.send(stream[:cut])
            await asyncio.sleep(0.02)
            await client.send(stream[cut:])
            assert [(await client.answer()).status for _ in range(3)] == [200, 200, 200]
    assert {message.body for message in wire.upstream.requests} == {b"q=42"}


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "request_malformed"),
        (b"GET / HTTP/1.1\nHost: a\n\n", "request_malformed"),
        (b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "request_malformed"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "request_malformed"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: b\x00\r\n", "request_malformed"),
    ],
)
async def test_bytes_that_cannot_become_a_request_are_refused_without_waiting_for_more(
    wire: Wire, raw: bytes, code: str
) -> None:
    async with wire.client() as client:
        await client.send(raw)
        answer = await client.answer(seconds=2)
        assert json.loads(answer.body)["code"] == code
        assert answer.one("Connection") == "close"
        assert await client.ends() == b""


async def test_a_head_that_does_not_end_is_a_timeout(start: Start) -> None:
    wire = await start(listen={"header_timeout_seconds": 0.2})
    async with wire.client() as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n")
        assert json.loads((await client.answer()).body)["code"] == "request_timeout"
        assert await client.ends() == b""


async def test_a_head_that_trickles_is_a_timeout_too(start: Start) -> None:
    wire = await start(listen={"header_timeout_seconds": 0.3})
    async with wire.client() as client:

        async def trickle() -> None:
            for byte in request("GET", "/"):
                await client.send(bytes([byte]))
                await asyncio.sleep(0.05)

        task = asyncio.create_task(trickle())
        assert (await client.answer()).status == 408
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert wire.upstream.heads == []


async def test_a_body_that_stops_is_a_timeout_and_its_upstream_is_ended(start: Start) -> None:
    wire = await start(listen={"body_idle_timeout_seconds": 0.2})
    async with wire.client() as client:
        await client.send(request("POST", "/", "Content-Length: 10") + b"half")
        assert json.loads((await client.answer()).body)["code"] == "request_timeout"
    async with asyncio.timeout(2):
        await wire.upstream.gone.wait()
    assert wire.upstream.requests == []


async def test_an_idle_connection_is_closed_after_the_keepalive_time(start: Start) -> None:
    wire = await start(listen={"keepalive_timeout_seconds": 0.2})
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        await client.answer()
        assert await client.ends(seconds=2) == b""
    async with wire.client() as client:
        assert await client.ends(seconds=2) == b""


async def test_a_client_may_set_a_valid_request_id_that_contains_no_key(wire: Wire) -> None:
    sent = {"7f3a": True, "a b": False, "x" * 129: False, KEY.decode(): False, '"': False}
    async with wire.client() as client:
        for request_id, is_kept in sent.items():
            await client.send(request("GET", "/", f"X-Request-Id: {request_id}"))
            answer = await client.answer()
            assert (answer.one("X-Request-Id") == request_id) is is_kept
            assert wire.upstream.requests[-1].one("X-Request-Id") == answer.one("X-Request-Id")


async def test_two_requests_never_get_the_same_id(wire: Wire) -> None:
    async with wire.client() as client:
        seen = set()
        for _ in range(50):
            await client.send(request("GET", "/", key=None))
            seen.add((await client.answer()).one("X-Request-Id"))
    assert len(seen) == 50


async def test_an_upstream_that_cannot_be_reached_is_502(start: Start) -> None:
    wire = await start()
    await wire.upstream.stop()
    async with wire.client() as client:
        for _ in range(3):
            await client.send(request("POST", "/", body=b"x"))
            assert json.loads((await client.answer()).body)["code"] == "upstream_unreachable"
    assert wire.recorder.seen[0].reason is Reason.UPSTREAM_UNREACHABLE
