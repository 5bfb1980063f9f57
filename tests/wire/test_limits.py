"""Limits on the wire: refusals, response headers, and the charge at every kind of end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest

from keyproxy.ai.responses.streams.aws_event_stream import make_message, read_message
from keyproxy.http.routes import RouteTable
from keyproxy.limits.plan import Plan
from keyproxy.model import Ending, Missing, Route
from keyproxy.platform import clock
from keyproxy.reasons import Reason
from keyproxy.wire.parsing.head_templates import LEARNT_AFTER
from tests import fakes
from tests.rawhttp import OK, Message, Upstream, answer_with
from tests.waiting import until
from tests.wire.conftest import Start, Wire, request
from tests.wire.test_long import HANDSHAKE, tunnel

CHAT = "/v1/chat/completions"
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def delta(text: str) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % text.encode()


def usage_event() -> bytes:
    return b'data: {"choices":[],"usage":%b}\n\n' % json.dumps(USAGE).encode()


def answer(document: dict[str, Any], status: bytes = b"200 OK") -> Upstream:
    body = json.dumps(document).encode()
    return Upstream(answer_with((JSON % (len(body), body)).replace(b"200 OK", status)))


def chat(**more: Any) -> bytes:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **more}).encode()
    return request("POST", CHAT, "Content-Type: application/json", "Accept-Encoding: br", body=body)


def routes(shape: str = "openai", tokens: str = "openai") -> RouteTable:
    return RouteTable(
        [(f"POST {CHAT}", Route(f"POST {CHAT}", frozenset(), shape, tokens)), ("* /{rest...}", Route("any"))]
    )


async def limited(start: Start, plan: Plan, serving: Upstream | None = None) -> Wire:
    wire = await start(serving=serving, routes=routes())
    wire.identities.add(fakes.key(1), fakes.identity(plan=plan))
    return wire


def spent(wire: Wire, measure: str) -> tuple[int, int]:
    """What of the user's window was spent, and what is held in the process: free or in use."""
    wire.ledger._sync(clock.monotonic())
    (row,) = [row for (window, _), row in wire.ledger.reference.windows.items() if window.measure == measure]
    return row.spent, row.limit


async def test_the_quota_is_spent_to_the_last_request_and_not_beyond(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=3))
    async with wire.client() as client:
        for left in (2, 1, 0):
            await client.send(request())
            response = await client.answer()
            assert response.status == 200
            assert response.one("RateLimit-Policy") == '"user.requests_per_day";q=3;w=86400'
            assert (response.one("RateLimit") or "").startswith(f'"user.requests_per_day";r={left};t=')
        await client.send(request())
        refused = await client.answer()
    assert refused.status == 429
    problem = json.loads(refused.body)
    assert problem["code"] == "quota_exhausted"
    assert (problem["policy"], problem["limit"], problem["remaining"]) == ("user.requests_per_day", 3, 0)
    assert problem["retryable"] is True
    assert int(refused.one("Retry-After") or 0) == pytest.approx(problem["reset_seconds"], abs=1)
    assert len(wire.upstream.requests) == 3
    assert spent(wire, "requests_per_day") == (3, 3)


async def test_a_request_that_never_reached_the_upstream_costs_nothing(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=3))
    await wire.upstream.stop()
    async with wire.client() as client:
        for _ in range(5):
            await client.send(request())
            refused = await client.answer()
            assert refused.status == 502
            assert (refused.one("RateLimit") or "").startswith('"user.requests_per_day";r=')
    assert spent(wire, "requests_per_day") == (0, 3)
    assert [was_sent for _, was_sent, _ in wire.ledger.settled] == [False] * 5


async def test_concurrency_counts_requests_under_way_and_no_others(start: Start) -> None:
    release = asyncio.Event()

    async def slow(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await release.wait()
        writer.write(OK)
        return True

    wire = await limited(start, Plan(concurrency=1), Upstream(slow))
    async with wire.client() as one, wire.client() as other:
        await one.send(request())
        while not wire.upstream.requests:
            await asyncio.sleep(0.01)
        await other.send(request())
        refused = await other.answer()
        assert refused.status == 429
        assert json.loads(refused.body)["code"] == "concurrency_limited"
        release.set()
        assert (await one.answer()).status == 200
        await other.send(request())
        assert (await other.answer()).status == 200


async def test_an_unavailable_ledger_is_503_and_never_429(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=3))
    wire.ledger.answers = False
    async with wire.client() as client:
        await client.send(request())
        refused = await client.answer()
    assert refused.status == 503
    assert json.loads(refused.body)["code"] == "ledger_unavailable"
    assert refused.one("Retry-After")


async def test_tokens_are_charged_as_the_response_reports(start: Start) -> None:
    wire = await limited(start, Plan(tokens_per_day=10_000), answer({"choices": [], "usage": USAGE}))
    async with wire.client() as client:
        await client.send(chat(max_tokens=50))
        assert (await client.answer()).status == 200
    ((hold, was_sent, tokens),) = wire.ledger.settled
    assert was_sent
    assert tokens == 12
    assert hold.tokens >= 50 + 10
    assert spent(wire, "tokens_per_day") == (12, 10_000)
    assert wire.upstream.requests[0].all("Accept-Encoding") == ["identity"]


async def test_a_body_in_pieces_is_read_whole_and_forwarded_unchanged(start: Start) -> None:
    wire = await limited(start, Plan(tokens_per_day=10_000), answer({"usage": USAGE}))
    raw = chat(max_tokens=5)
    head, _, body = raw.partition(b"\r\n\r\n")
    async with wire.client() as client:
        for piece in (head + b"\r\n\r\n", body[:10], body[10:]):
            await client.send(piece)
            await asyncio.sleep(0.02)
        assert (await client.answer()).status == 200
    assert wire.upstream.requests[0].body == body


async def test_expect_gets_100_continue_although_the_body_is_needed_for_the_decision(start: Start) -> None:
    wire = await limited(start, Plan(tokens_per_day=10_000), answer({"usage": USAGE}))
    head, _, body = chat(max_tokens=5).partition(b"\r\n\r\n")
    async with wire.client() as client:
        await client.send(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.answer()).status == 100
        await client.send(body)
        assert (await client.answer()).status == 200


async def test_a_request_that_may_use_more_than_is_left_is_refused_and_costs_nothing(start: Start) -> None:
    used = {"prompt_tokens": 100, "completion_tokens": 400, "total_tokens": 500}
    wire = await limited(start, Plan(tokens_per_day=1_500), answer({"usage": used}))
    async with wire.client() as client:
        await client.send(chat(max_tokens=400))
        assert (await client.answer()).status == 200
        await client.send(chat(max_tokens=1_200))
        refused = await client.answer()
        assert refused.status == 429
        error = json.loads(refused.body)["error"]
        assert (error["code"], error["retryable"]) == ("token_budget_exhausted", True)
        assert refused.one("x-should-retry") == "false"
        await client.send(chat(max_tokens=400))
        assert (await client.answer()).status == 200
    assert spent(wire, "tokens_per_day") == (1_000, 1_500)


async def test_a_window_that_requests_in_flight_reserve_is_a_matter_of_pace(start: Start) -> None:
    may_answer = asyncio.Event()

    async def answering(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await may_answer.wait()
        writer.write(JSON % (2, b"{}"))
        return True

    wire = await limited(start, Plan(tokens_per_day=1_000), Upstream(answering))
    async with wire.client() as one, wire.client() as other:
        await one.send(chat(max_tokens=500))
        await until(lambda: bool(wire.upstream.requests), "the first request is in flight")
        await other.send(chat(max_tokens=500))
        refused = await other.answer()
        may_answer.set()
        assert (await one.answer()).status == 200
    error = json.loads(refused.body)["error"]
    assert (refused.status, error["code"], error["retryable"]) == (429, "token_budget_exhausted", True)
    assert 1 <= int(refused.one("Retry-After") or "0") <= 5
    assert refused.one("x-should-retry") is None


async def test_a_request_that_needs_more_than_the_whole_window_is_403(start: Start) -> None:
    wire = await limited(start, Plan(tokens_per_day=100))
    async with wire.client() as client:
        await client.send(chat(max_tokens=500))
        refused = await client.answer()
    error = json.loads(refused.body)["error"]
    assert (refused.status, error["code"], error["retryable"]) == (403, "token_limit_per_request", False)
    assert (error["policy"], error["limit"]) == ("user.tokens_per_day", 100)
    assert (refused.one("x-should-retry"), refused.one("Retry-After")) == ("false", None)
    assert not wire.upstream.requests


async def test_a_request_that_can_never_fit_is_403(start: Start) -> None:
    wire = await limited(start, Plan(tokens_per_request=100))
    async with wire.client() as client:
        await client.send(chat(max_tokens=500))
        refused = await client.answer()
    assert refused.status == 403
    assert json.loads(refused.body)["error"]["code"] == "token_limit_per_request"
    assert refused.one("Retry-After") is None
    assert not wire.upstream.requests


async def test_a_response_without_a_report_is_charged_the_input_and_what_was_produced(start: Start) -> None:
    wire = await limited(start, Plan(tokens_per_day=10_000), answer({"choices": []}))
    async with wire.client() as client:
        await client.send(chat(max_tokens=50))
        told = await client.answer()
    assert (told.status, told.one("X-Keyproxy-Tokens-Reserved")) == (200, "60")
    assert [tokens for _, _, tokens in wire.ledger.settled] == [10]
    assert wire.recorder.seen[-1].is_estimated


async def test_an_upstream_that_refuses_has_used_nothing(start: Start) -> None:
    wire = await limited(start, Plan(tokens_per_day=10_000), answer({"error": {}}, b"400 Bad Request"))
    async with wire.client() as client:
        await client.send(chat(max_tokens=50))
        assert (await client.answer()).status == 400
    assert spent(wire, "tokens_per_day") == (0, 10_000)


async def test_usage_that_a_client_did_not_request_is_requested_and_hidden(start: Start) -> None:
    events = [delta("Hel"), delta("lo"), usage_event(), b"data: [DONE]\n\n"]
    raw = STREAM + b"".join(chunk(event) for event in events) + b"0\r\n\r\n"
    wire = await limited(start, Plan(tokens_per_day=10_000), Upstream(answer_with(raw)))
    async with wire.client() as client:
        await client.send(chat(stream=True, max_tokens=50))
        response = await client.answer()
    assert response.body == b"".join([delta("Hel"), delta("lo"), b"data: [DONE]\n\n"])
    sent = wire.upstream.requests[0]
    assert json.loads(sent.body)["stream_options"] == {"include_usage": True}
    assert sent.all("Content-Length") == [str(len(sent.body))]
    assert spent(wire, "tokens_per_day") == (12, 10_000)


async def test_a_client_that_disconnects_in_mid_stream_is_charged_the_tokens_received(start: Start) -> None:
    async def endless(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(STREAM + b"".join(chunk(delta("word ")) for _ in range(10)))
        while not writer.is_closing():
            writer.write(chunk(b": still there\n\n"))
            await writer.drain()
            await asyncio.sleep(0.05)
        return False

    wire = await limited(start, Plan(tokens_per_day=10_000), Upstream(endless))
    async with wire.client() as client:
        await client.send(chat(stream=True, max_tokens=500))
        while b"word" not in await client.reader.read(65_536):
            pass
    while not wire.ledger.settled:
        await asyncio.sleep(0.01)
    ((hold, _, tokens),) = wire.ledger.settled
    assert 10 <= tokens < 100 < hold.tokens


async def test_a_stream_that_exhausts_its_budget_ends_with_an_error_event_and_is_charged(start: Start) -> None:
    async def endless(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(STREAM)
        while not writer.is_closing():
            writer.write(chunk(delta("and so on ")))
            await writer.drain()
            await asyncio.sleep(0.0005)
        return False

    wire = await limited(start, Plan(tokens_per_day=1_000, tokens_per_request=300), Upstream(endless))
    async with wire.client() as client:
        await client.send(chat(stream=True))
        response = await client.answer(seconds=20)
    last = response.body.rstrip(b"\n").rpartition(b"\n\n")[2]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "token_budget_exhausted"
    ((hold, _, tokens),) = wire.ledger.settled
    assert tokens == hold.tokens == 1_000
    assert spent(wire, "tokens_per_day") == (1_000, 1_000)
    assert wire.recorder.seen[-1].ending is Ending.CUT
    assert wire.recorder.seen[-1].reason is Reason.TOKEN_BUDGET_EXHAUSTED
    # Only its own reservation was left of the budget.
    assert wire.recorder.seen[-1].limit_reason == "spent"


def framed(payload: dict[str, Any]) -> bytes:
    headers = {":event-type": "contentBlockDelta", ":message-type": "event"}
    return make_message(headers, json.dumps(payload).encode())


@pytest.mark.parametrize(
    ("dialect", "path", "media_type", "begin", "event"),
    [
        ("ollama", "/api/chat", b"application/x-ndjson", b"", b'{"message":{"content":"and so on "},"done":false}\n'),
        ("gemini", "/v1/models/g:streamGenerateContent", b"application/json", b"[", b'{"text":"and so on "},'),
        (
            "bedrock", "/model/m/converse-stream", b"application/vnd.amazon.eventstream", b"",
            framed({"delta": {"text": "and so on "}}),
        ),
    ],
)  # fmt: skip
async def test_a_stream_of_any_format_without_budget_ends_with_the_reason_in_its_framing(
    start: Start, dialect: str, path: str, media_type: bytes, begin: bytes, event: bytes
) -> None:
    async def endless(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % media_type)
        writer.write(chunk(begin) if begin else b"")
        while not writer.is_closing():
            writer.write(chunk(event))
            await writer.drain()
            await asyncio.sleep(0.0005)
        return False

    routed = RouteTable([("POST /{rest...}", Route("any", frozenset(), "openai", dialect))])
    wire = await start(serving=Upstream(endless), routes=routed)
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(tokens_per_day=1_000, tokens_per_request=300)))
    async with wire.client() as client:
        await client.send(request("POST", path, "Content-Type: application/json", body=b'{"model":"m"}'))
        body = (await client.answer(seconds=20)).body
    if dialect == "ollama":
        last = json.loads(body.splitlines()[-1])
    elif dialect == "gemini":
        last = json.loads(body)[-1]
    else:
        while body.startswith(event):
            body = body.removeprefix(event)
        headers, payload = read_message(body)
        assert headers[":exception-type"] == "throttlingException"
        last = json.loads(payload)
    assert last["error"]["code"] == "token_budget_exhausted"
    assert spent(wire, "tokens_per_day") == (1_000, 1_000)


async def test_live_and_test_traffic_spend_from_pools_of_their_own(start: Start) -> None:
    wire = await limited(start, Plan(requests_per_day=1))
    test_key = fakes.key(2, is_test=True)
    wire.identities.add(test_key, fakes.identity(is_test=True, plan=Plan(requests_per_day=1)))
    async with wire.client() as client:
        for key in (None, test_key.reveal()):
            statuses = []
            for _ in range(2):
                await client.send(request() if key is None else request(key=key))
                statuses.append((await client.answer()).status)
            assert statuses == [200, 429]


async def test_a_tunnel_on_a_metered_route_is_charged_the_maximum_of_a_request(start: Start) -> None:
    routed = RouteTable([("GET /v1/realtime", Route("GET /v1/realtime", frozenset(), "openai", "openai"))])
    wire = await start(serving=Upstream(tunnel), routes=routed)
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(tokens_per_day=8_000, tokens_per_request=4_000)))
    for taken in (4_000, 8_000):
        async with wire.client() as client:
            await client.send(request("GET", "/v1/realtime", *HANDSHAKE))
            assert (await client.answer()).status == 101
        await until(lambda: wire.server.open_tunnels() == 0, "the tunnel is over")
        assert spent(wire, "tokens_per_day") == (taken, 8_000)
    async with wire.client() as client:
        await client.send(request("GET", "/v1/realtime", *HANDSHAKE))
        assert (await client.answer()).status == 429
    assert len(wire.upstream.requests) == 2


HEADED = b"HTTP/1.1 %b\r\nX-Usage-Tokens: 12\r\n%b\r\n"


@pytest.mark.parametrize(
    ("raw", "charged"),
    [
        (HEADED % (b"204 No Content", b""), 12),
        (HEADED % (b"204 No Content", b"Content-Length: 0\r\n"), 12),
        (HEADED % (b"304 Not Modified", b"Content-Length: 5\r\n"), 12),
        (HEADED % (b"200 OK", b"Content-Length: 0\r\n"), 12),
        (HEADED % (b"500 Sorry", b"Content-Length: 0\r\n"), 0),
        (HEADED % (b"103 Early Hints", b"") + HEADED % (b"200 OK", b"Content-Length: 0\r\n"), 12),
        # Reported in an interim response, or twice, or hop-by-hop: no report.
        (HEADED % (b"103 Early Hints", b"") + OK, None),
        (HEADED % (b"200 OK", b"X-Usage-Tokens: 12\r\nContent-Length: 0\r\n"), None),
        (HEADED % (b"200 OK", b"x-usage-tokens: 13\r\nContent-Length: 0\r\n"), None),
        (HEADED % (b"200 OK", b"Connection: X-Usage-Tokens\r\nContent-Length: 0\r\n"), None),
    ],
)
async def test_usage_in_the_response_head_is_charged_and_no_other_is_trusted(
    start: Start, raw: bytes, charged: int | None
) -> None:
    routed = RouteTable([("* /{rest...}", Route("any", frozenset(), "problem", "header"))])
    wire = await start(serving=Upstream(answer_with(raw)), routes=routed)
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(tokens_per_day=10**6, tokens_per_request=4_000)))
    async with wire.client() as client:
        # Often enough for the response to be recognised by its shape, and by its bytes.
        for _ in range(LEARNT_AFTER + 2):
            await client.send(request("POST", "/v1/ai/jobs"))
            while (await client.answer()).status == 103:
                pass
    assert [tokens for _, _, tokens in wire.ledger.settled] == [charged or 0] * (LEARNT_AFTER + 2)
    assert {seen.is_estimated for seen in wire.recorder.seen} == {charged is None}


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("key", [(), ("Idempotency-Key: 7",)])
async def test_a_changed_body_is_reframed_and_all_else_is_forwarded_unchanged(
    start: Start, is_chunked: bool, key: tuple[str, ...]
) -> None:
    wire = await start(serving=answer({"usage": USAGE}), routes=routes(), listen={"trusted_proxies": ["127.0.0.0/8"]})
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(tokens_per_day=10_000, requests_per_day=9)))
    body = json.dumps({"messages": [], "stream": True, "max_tokens": 5}).encode()
    lines = (
        "Accept-Encoding: br", "A: Accept-Encoding: x", "accept-ENCODING:gzip", "X-Forwarded-For: 192.0.2.7",
        "X-Request-Id: mine", "X-Usage-Tokens: 1", "Connection: accept-encoding", *key,
    )  # fmt: skip
    if is_chunked:
        pieces = b"".join(chunk(body[at : at + 7]) for at in range(0, len(body), 7)) + b"0\r\n\r\n"
        raw = request("POST", CHAT, *lines, "Transfer-Encoding: chunked") + pieces
    else:
        raw = request("POST", CHAT, *lines, body=body)
    async with wire.client() as client:
        for _ in range(3):
            await client.send(raw[:-9])
            await asyncio.sleep(0.01)
            await client.send(raw[-9:])
            assert (await client.answer()).status == 200
    new = b'{"stream_options":{"include_usage":true},' + body[1:]
    assert len(wire.upstream.requests) == 3
    for sent in wire.upstream.requests:
        assert sent.body == new
        assert sent.all("Content-Length") == ([] if is_chunked else [str(len(new))])
        assert sent.all("Transfer-Encoding") == (["chunked"] if is_chunked else [])
        assert sent.all("Accept-Encoding") == ["identity"]
        assert sent.all("X-Forwarded-For") == ["192.0.2.7, 127.0.0.1"]
        assert [sent.one(name) for name in ("A", "X-Request-Id", "X-Usage-Tokens", "X-Keyproxy-User")] == [
            "Accept-Encoding: x",
            "mine",
            "1",
            "u_42",
        ]
    await wire.claims.tell()
    assert spent(wire, "requests_per_day")[0] == (1 if key else 3)
    assert spent(wire, "tokens_per_day")[0] == (12 if key else 36)


async def test_a_metered_request_retried_after_a_lost_connection_is_the_same_and_charged_once(
    start: Start,
) -> None:
    async def once(message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if len(wire.upstream.requests) == 2:
            return False  # the connection that lay in the pool is lost as it is used
        body = json.dumps({"usage": USAGE}).encode()
        writer.write(JSON % (len(body), body))
        return True

    routed = RouteTable([("* /{rest...}", Route("any", frozenset(), "problem", "openai"))])
    wire = await start(serving=Upstream(once), routes=routed)
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(tokens_per_day=10_000, requests_per_day=9)))
    async with wire.client() as client:
        for _ in range(2):
            await client.send(request("PUT", "/v1/models", "Accept-Encoding: br", "B: c"))
            assert (await client.answer()).status == 200
    _, lost, again = wire.upstream.requests
    assert (lost.start, lost.headers) == (again.start, again.headers)
    assert again.all("Accept-Encoding") == ["identity"]
    assert again.one("B") == "c"
    assert spent(wire, "requests_per_day")[0] == 2
    assert spent(wire, "tokens_per_day")[0] == 24


async def test_a_stream_is_cut_and_does_not_hang_if_its_extension_fails(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_patience: object) -> None:
        raise RuntimeError("a defect")

    def missing(_hold: object, _tokens: int, _spend: int) -> None:
        raise Missing("lease", broken)

    raw = STREAM + b"".join(chunk(delta("and so on ")) for _ in range(400))
    plan = Plan(tokens_per_day=1_000, tokens_per_request=300)
    wire = await limited(start, plan, Upstream(answer_with(raw)))
    monkeypatch.setattr(wire.ledger, "extend", missing)
    async with wire.client() as client:
        await client.send(chat(stream=True))
        with contextlib.suppress(ConnectionResetError):
            assert not (await client.answer()).is_whole
    assert wire.recorder.seen[-1].reason is Reason.INTERNAL_ERROR
    assert [was_sent for _, was_sent, _ in wire.ledger.settled] == [True]
    assert "a defect" in caplog.text


@pytest.mark.parametrize("shape", ["problem", "openai", "anthropic"])
async def test_a_fault_in_a_request_s_json_is_named_in_every_shape(start: Start, shape: str) -> None:
    wire = await start(routes=routes(shape))
    async with wire.client() as client:
        await client.send(chat(max_tokens=100.0))
        refused = await client.answer()
    content = json.loads(refused.body)
    error = content if shape == "problem" else content["error"]
    assert (refused.status, error["code"]) == (400, "request_malformed")
    text = error["detail" if shape == "problem" else "message"]
    assert text.startswith("'max_tokens' has a fraction or an exponent; it must be a whole number")
    assert "HTTP" not in text
    if shape == "openai":
        assert error["param"] == "max_tokens"
