"""Requests are forwarded and responses relayed, reframed, in order, and whole."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import time

import pytest

from keyproxy.auth.api_key import SecretKey
from keyproxy.config.schema import RouteRow
from keyproxy.model import Ending
from keyproxy.reasons import Reason
from tests import fakes
from tests.auth.test_agent_token_format import HEADER, jwt
from tests.rawhttp import Message, Upstream, answer_with
from tests.wire.conftest import AUTHORIZATION, KEY, Start, Wire, request


async def test_a_known_key_is_forwarded_with_its_identity_and_without_the_key(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("POST", "/v1/ai/jobs?x=1", "X-Trace: 7", body=b'{"job": 1}'))
        answer = await client.answer()
    seen = wire.upstream.requests[0]
    assert (answer.status, answer.body) == (200, b"{}")
    assert seen.start == "POST /v1/ai/jobs?x=1 HTTP/1.1"
    assert seen.body == b'{"job": 1}'
    assert seen.one("X-Keyproxy-User") == "u_42"
    assert seen.one("X-Keyproxy-Tenant") == "acme"
    assert seen.one("X-Keyproxy-Scope") == "jobs:write"
    assert seen.one("X-Keyproxy-Test") == "false"
    assert seen.one("X-Keyproxy-Key-Id") == "key_of_u_42"
    assert seen.one("X-Forwarded-For") == "127.0.0.1"
    assert seen.one("X-Forwarded-Proto") == "http"
    assert seen.one("X-Forwarded-Host") == "proxy.test"
    assert seen.one("X-Request-Id") == answer.one("X-Request-Id")
    assert seen.one("Authorization") is None
    assert KEY.decode() not in json.dumps(seen.headers)


async def test_end_to_end_headers_arrive_in_the_order_they_were_sent(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("POST", "/", "B: 1", "A: 2", "B: 3", "Keep-Alive: 5", "Cookie: x=1", body=b"x"))
        await client.answer()
    names = [name for name, _ in wire.upstream.requests[0].headers]
    assert names[:6] == ["Host", "B", "A", "B", "Cookie", "Content-Length"]


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 1_000_000])
async def test_a_body_of_any_size_arrives_whole_both_ways(start: Start, size: int) -> None:
    body = bytes(index % 251 for index in range(size))

    async def echo(message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(message.body) + message.body)
        return True

    wire = await start(serving=Upstream(echo))
    async with wire.client() as client:
        for _ in range(2):
            await client.send(request("POST", "/", f"Content-Length: {size}") + body)
            answer = await client.answer()
            assert answer.body == body
    assert wire.upstream.connections == 1


async def test_a_chunked_body_arrives_whole_both_ways_without_its_trailers(start: Start) -> None:
    async def echo(message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for byte in message.body:
            writer.write(b"1;x=y\r\n%c\r\n" % byte)
        writer.write(b"0\r\nX-Keyproxy-User: root\r\nDigest: 1\r\n\r\n")
        return True

    wire = await start(serving=Upstream(echo))
    chunks = b'5\r\nhello\r\n1;ext="a b"\r\n \r\n005\r\nworld\r\n0\r\nX-Keyproxy-User: root\r\nX-Sum: 1\r\n\r\n'
    async with wire.client() as client:
        await client.send(request("POST", "/", "Transfer-Encoding: chunked") + chunks)
        answer = await client.answer()
        assert answer.body == b"hello world"
        assert answer.one("Transfer-Encoding") == "chunked"
        await client.send(request("POST", "/", "Transfer-Encoding: chunked") + chunks)
        assert (await client.answer()).body == b"hello world"
    seen = wire.upstream.requests[0]
    assert seen.body == b"hello world"
    assert seen.one("X-Keyproxy-User") == "u_42"
    assert seen.one("X-Sum") is None


@pytest.mark.parametrize("cut", [1, 3, 7, 20, 64])
async def test_requests_cut_into_pieces_anywhere_are_the_same_requests(wire: Wire, cut: int) -> None:
    whole = request("POST", "/a", body=b"12345") + request("POST", "/b", "Transfer-Encoding: chunked")
    whole += b"3\r\nabc\r\n0\r\n\r\n"
    async with wire.client() as client:
        for at in range(0, len(whole), cut):
            await client.send(whole[at : at + cut])
            await asyncio.sleep(0)
        assert [(await client.answer()).status, (await client.answer()).status] == [200, 200]
    assert [(one.start, one.body) for one in wire.upstream.requests] == [
        ("POST /a HTTP/1.1", b"12345"),
        ("POST /b HTTP/1.1", b"abc"),
    ]


async def test_pipelined_requests_get_their_responses_in_order(start: Start) -> None:
    async def slow_first(message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(0.1 if "/0" in message.start else 0)
        target = message.start.split(" ")[1].encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(target), target))
        return True

    wire = await start(serving=Upstream(slow_first))
    async with wire.client() as client:
        await client.send(b"".join(request("POST", f"/{number}", body=b"x") for number in range(20)))
        bodies = [(await client.answer()).body for _ in range(20)]
    assert bodies == [b"/%d" % number for number in range(20)]


async def test_a_refused_request_in_a_pipeline_does_not_disturb_the_others(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("GET", "/1") + request("GET", "/2", key=None) + request("GET", "/3"))
        assert [(await client.answer()).status for _ in range(3)] == [200, 401, 200]
    assert [one.start for one in wire.upstream.requests] == ["GET /1 HTTP/1.1", "GET /3 HTTP/1.1"]


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b'HTTP/1.1 304 Not Modified\r\nETag: "1"\r\n\r\n', b""),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x"),
    ],
)
async def test_responses_are_relayed_however_they_end(start: Start, raw: bytes, body: bytes) -> None:
    wire = await start(serving=Upstream(answer_with(raw, goes_on=False)))
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        answer = (await client.answers())[-1]
        assert (answer.body, answer.is_whole) == (body, True)
        await client.send(request("GET", "/"))
        assert (await client.answers())[-1].body == body


async def test_the_response_to_head_has_a_length_and_no_body(start: Start) -> None:
    wire = await start(serving=Upstream(answer_with(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")))
    async with wire.client() as client:
        for _ in range(2):
            await client.send(request("HEAD", "/"))
            answer = await client.answer(method="HEAD")
            assert (answer.status, answer.one("Content-Length")) == (200, "5")
    assert wire.upstream.connections == 1


async def test_an_http_10_client_gets_an_unchunked_response_that_ends_with_the_connection(start: Start) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    wire = await start(serving=Upstream(answer_with(chunked)))
    async with wire.client() as client:
        await client.send(b"GET / HTTP/1.0\r\n" + AUTHORIZATION + b"\r\n")
        answer = await client.answer()
        assert (answer.body, answer.one("Transfer-Encoding"), answer.one("Connection")) == (b"abc", None, "close")
    assert wire.upstream.requests[0].one("Host") == f"127.0.0.1:{wire.upstream.port}"


async def test_an_http_10_client_may_keep_its_connection(wire: Wire) -> None:
    async with wire.client() as client:
        for _ in range(2):
            await client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n" + AUTHORIZATION + b"\r\n")
            answer = await client.answer()
            assert (answer.status, answer.one("Connection")) == (200, "keep-alive")


async def test_a_request_with_expect_gets_100_continue(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("POST", "/", "Expect: 100-continue", "Content-Length: 3"))
        assert (await client.answer()).status == 100
        assert wire.upstream.heads == []
        await client.send(b"abc")
        assert (await client.answer()).status == 200
    assert wire.upstream.requests[0].one("Expect") is None


async def test_a_refused_request_with_expect_gets_no_100_continue(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("POST", "/", "Expect: 100-continue", "Content-Length: 3", key=None))
        assert (await client.answer()).status == 401


async def test_a_client_that_half_closes_still_gets_its_response(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("POST", "/", body=b"x"))
        client.half_close()
        assert (await client.answer()).status == 200
        assert await client.ends() == b""


async def test_nothing_goes_upstream_before_the_first_byte_of_an_announced_body(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("POST", "/", "Content-Length: 3"))
        await asyncio.sleep(0.1)
        assert wire.upstream.connections == 0
        await client.send(b"abc")
        assert (await client.answer()).status == 200


async def test_chunks_of_an_event_stream_arrive_one_by_one(start: Start) -> None:
    next_event = asyncio.Event()

    async def events(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(3):
            writer.write(b"9\r\ndata: %d\n\n\r\n" % number)
            await next_event.wait()
            next_event.clear()
        writer.write(b"0\r\n\r\n")
        return True

    wire = await start(serving=Upstream(events))
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        for number in range(3):
            async with asyncio.timeout(2):
                assert b"data: %d" % number in await client.reader.readuntil(b"data: %d\n\n" % number)
            next_event.set()


async def test_the_upstream_connection_closes_when_the_client_disconnects(start: Start) -> None:
    arrived = asyncio.Event()

    async def never(_message: Message, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> bool:
        arrived.set()
        await reader.read()
        return False

    wire = await start(serving=Upstream(never))
    async with wire.client() as client:
        await client.send(request("POST", "/", "Content-Length: 100") + b"x")
        await arrived.wait() if not wire.upstream.reads_bodies else await asyncio.sleep(0.1)
    async with asyncio.timeout(2):
        await wire.upstream.gone.wait()
    assert (
        wire.recorder.seen[0].reason is Reason.REQUEST_MALFORMED or wire.recorder.seen[0].ending is Ending.CLIENT_GONE
    )


async def test_a_missing_identity_is_fetched_once_and_the_body_waits(wire: Wire) -> None:
    wire.identities.slow.add(fakes.key(1).digest())
    wire.identities.may_bring.clear()
    async with wire.client() as client:
        await client.send(request("POST", "/", "Content-Length: 200000") + bytes(100_000))
        await asyncio.sleep(0.05)
        assert wire.upstream.heads == []
        wire.identities.may_bring.set()
        await client.send(bytes(100_000))
        assert (await client.answer()).status == 200
    assert len(wire.upstream.requests[0].body) == 200_000
    assert wire.identities.brought == 1


@pytest.mark.parametrize(("seconds_left", "result"), [(3600.4, "3600"), (0.9, "0")])
async def test_a_replaced_key_gets_its_remaining_lifetime_in_responses(
    wire: Wire, seconds_left: float, result: str
) -> None:
    # Made in advance: some of the time passes before it is rendered.
    identity = fakes.identity(expires_wall_seconds=time.time() + seconds_left)
    retiring = dataclasses.replace(identity, retiring_field=b"X-Keyproxy-Key-Expires-In: ")
    for known, expected in ((identity, None), (retiring, result)):
        wire.identities.add(fakes.key(1), known)
        async with wire.client() as client:
            await client.send(request("POST", "/v1/ai/jobs", body=b"x"))
            answer = await client.answer()
        assert answer.one("X-Keyproxy-Key-Expires-In") == expected
        assert wire.upstream.requests[-1].one("X-Keyproxy-Key-Expires-In") is None


BASIC = base64.b64encode(b"user:" + KEY).decode()
ELSEWHERE = [
    f"X-My-Key: {KEY.decode()}",
    f"Api-Key: {KEY.decode()}",
    f"Cookie: a=b; session={KEY.decode()}; c=d",
    f"Referer: https://a.example/?key={KEY.decode()}",
    f"Referer: https://a.example/?key={KEY.decode().replace('_', '%5F')}",
    f"Sec-WebSocket-Protocol: chat, key.{KEY.decode()}",
    f"X-Original-Authorization: Bearer {KEY.decode()}",
    f"X-Original-Authorization: Basic {BASIC}",
    f"X-Original-Authorization: basic {BASIC.rstrip('=')}",
    f"Proxy-Authorization: Basic {BASIC}",
    f"X-Keyproxy-User: {KEY.decode()}",
    f"X-Forwarded-For: {KEY.decode()}",
    f"X-Forwarded-Anything: {KEY.decode()}",
    f"X-Request-Id: {KEY.decode()}",
]


@pytest.mark.parametrize("line", ELSEWHERE)
@pytest.mark.parametrize("presented", ["Authorization: Bearer", "X-Api-Key:"])
async def test_no_field_carries_the_presented_key_upstream(start: Start, line: str, presented: str) -> None:
    wire = await start(listen={"trusted_proxies": ["127.0.0.1"]})
    own = f"{presented} {KEY.decode()}"
    async with wire.client() as client:
        for lines in ([own, "X: y", line, "Z: basic truth"], [line, own, "X: y"], [own, "X: y"]) * 10:
            await client.send(request("POST", "/", *lines, key=None, body=b"x"))
            assert (await client.answer()).status == 200
    for seen in wire.upstream.requests:
        result = json.dumps(seen.headers)
        assert KEY.decode().rpartition("_")[2] not in result
        assert BASIC.rstrip("=") not in result
        assert seen.one("X") == "y"
    assert wire.upstream.requests[0].one("Z") == "basic truth"


TOKEN = jwt(HEADER, b'{"sub":"u_42","jti":"agt_0"}', hashlib.sha512(b"1").digest()).decode()
OTHER_TOKEN = jwt(HEADER, b'{"sub":"u_43","jti":"agt_1"}', hashlib.sha512(b"2").digest()).decode()


@pytest.mark.parametrize("presented", ["Authorization: Bearer", "Authorization: Api-Key", "X-Api-Key:"])
async def test_no_field_carries_the_presented_agent_token_upstream_but_other_tokens_do_go_on(
    start: Start, presented: str
) -> None:
    wire = await start(listen={"trusted_proxies": ["127.0.0.1"]})
    wire.identities.add(SecretKey(TOKEN.encode()), fakes.identity())
    basic = base64.b64encode(f"user:{TOKEN}".encode()).decode()
    elsewhere = [
        f"Cookie: a=b; t={TOKEN}; c=d", f"Referer: https://a.example/?t={TOKEN.replace('.', '%2E')}", f"X-T: {TOKEN}",
        f"X-Original-Authorization: Basic {basic}", f"X-Forwarded-For: {TOKEN}", f"X-Request-Id: {TOKEN[:120]}",
        f"X-Keyproxy-Act-For-Token: {TOKEN}", f"X-Signature: {TOKEN.rpartition('.')[2]}",
    ]  # fmt: skip
    kept = [f"X-Child: {OTHER_TOKEN}", f"X-Header: {TOKEN.partition('.')[0]}", "X: y"]
    async with wire.client() as client:
        for lines in ([*elsewhere, *kept], [*kept, *elsewhere], kept, *([*kept, line] for line in elsewhere)) * 3:
            await client.send(request("POST", "/", *lines, f"{presented} {TOKEN}", key=None, body=b"x"))
            answer = await client.answer()
            assert (answer.status, TOKEN in str(answer.headers)) == (200, False)
    for seen in wire.upstream.requests:
        result = json.dumps(seen.headers)
        assert TOKEN.rpartition(".")[2] not in result
        assert basic not in result
        assert [f"{name}: {seen.one(name)}" for name in ("X-Child", "X-Header", "X")] == kept


async def test_an_agent_token_in_the_url_is_refused_and_not_logged(wire: Wire) -> None:
    escaped = "".join(f"%{sign:02x}" for sign in TOKEN.encode())
    for target in (f"/{TOKEN}", f"/?t={TOKEN}", f"/?t={escaped}", f"/{escaped}", f"/?t={escaped.replace('%', '%25')}"):
        async with wire.client() as client:
            await client.send(request("POST", target, body=b"x"))
            answer = await client.answer()
            assert (answer.status, json.loads(answer.body)["code"]) == (400, "key_in_url")
            assert TOKEN[110:] not in f"{answer.headers} {answer.body!r}"
    assert wire.upstream.heads == []
    for one in wire.recorder.seen:
        assert TOKEN[110:] not in one.detail
    theirs = jwt(b'{"alg":"HS256","typ":"JWT"}', b"{}", b"s" * 32).decode()
    async with wire.client() as client:
        for target in (f"/{theirs}", f"/?t={theirs}"):
            await client.send(request("POST", target, body=b"x"))
            assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    ("credential", "is_looked_up"),
    [
        (jwt(b'{"alg":1}', b"", b"")[:-1] + b"a" * (4096 - 14) + b".", True),
        (jwt(b'{"alg":1}', b"", b"")[:-1] + b"a" * (4097 - 14) + b".", False),
        (b"f" * 512, True),
        (b"f" * 513, False),
        (b"f" * 512 + b".a.b", False),
    ],
    ids=["token of 4096", "token of 4097", "key of 512", "key of 513", "no token of 516"],
)
async def test_a_credential_has_up_to_512_bytes_and_a_token_4096(
    wire: Wire, credential: bytes, is_looked_up: bool
) -> None:
    key = SecretKey(credential)
    wire.identities.slow.add(key.digest())
    wire.identities.add(key, fakes.identity())
    async with wire.client() as client:
        for _ in range(2):
            await client.send(request("POST", "/", key=credential, body=b"x"))
            answer = await client.answer()
            assert answer.status == (200 if is_looked_up else 401)
    assert wire.identities.brought == int(is_looked_up)


async def test_a_key_in_host_or_content_type_refuses_the_request(wire: Wire) -> None:
    async with wire.client() as client:
        await client.send(request("POST", "/", f"Content-Type: {KEY.decode()}", body=b"x"))
        assert json.loads((await client.answer()).body)["code"] == "request_malformed"
        await client.ends()
    async with wire.client() as client:
        await client.send(request("POST", "/", body=b"x").replace(b"proxy.test", KEY))
        assert (await client.answer()).status == 400
    assert wire.upstream.heads == []


@pytest.mark.parametrize("name", ["Content-Encoding", "Accept-Encoding", "Idempotency-Key", "Traceparent"])
async def test_a_field_with_the_key_has_no_effect(start: Start, name: str) -> None:
    wire = await start(rows=[RouteRow("POST /v1/chat/completions", tokens="openai")])
    body = b'{"model":"m","max_tokens":5,"messages":[]}'
    async with wire.client() as client:
        for value in (KEY.decode(), f"x, {KEY.decode()}"):
            await client.send(request("POST", "/v1/chat/completions", f"{name}: {value}", body=body))
            assert (await client.answer()).status == 200
    # Without Accept-Encoding a metered request asks for a response that can be read.
    expected = "identity" if name == "Accept-Encoding" else None
    assert [seen.one(name) for seen in wire.upstream.requests] == [expected, expected]
    assert [seen.body for seen in wire.upstream.requests] == [body, body]


FOREIGN = b"pk-1234.abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("key", [FOREIGN, b"a-b-c-d-e-f"])
async def test_a_foreign_key_is_found_in_other_fields_and_in_the_url(wire: Wire, key: bytes) -> None:
    wire.identities.add(SecretKey(key), fakes.identity())
    async with wire.client() as client:
        raw = request("POST", "/", f"Cookie: k={key.decode()}", f"X: a{key.decode()}b", key=key, body=b"x")
        await client.send(raw)
        assert (await client.answer()).status == 200
        await client.send(request("POST", f"/?k={key.decode()}", key=key, body=b"x"))
        assert json.loads((await client.answer()).body)["code"] == "key_in_url"
    (seen,) = wire.upstream.requests
    assert seen.one("Cookie") is None
    # A short key inside a longer word may be anything.
    assert (seen.one("X") is None) is (key == FOREIGN)


HINTS = (
    b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nConnection: x-hop\r\nX-Hop: 1\r\nX-Request-Id: far\r\n"
)
HINTS += b"X-Keyproxy-User: evil\r\nKeep-Alive: 5\r\n\r\n"
PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"
FINAL = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.mark.parametrize("cut", [None, 5])
async def test_interim_responses_are_relayed_as_they_arrive(start: Start, cut: int | None) -> None:
    go_on = asyncio.Event()

    async def hints(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        raw = PROCESSING + HINTS
        for at in range(0, len(raw), cut or len(raw)):
            writer.write(raw[at : at + (cut or len(raw))])
            await asyncio.sleep(0)
        await go_on.wait()
        go_on.clear()
        writer.write(FINAL)
        return True

    wire = await start(serving=Upstream(hints))
    async with wire.client() as client:
        for _ in range(2):
            await client.send(request("POST", "/", body=b"x"))
            assert (await client.answer()).status == 102
            hinted = await client.answer()
            assert hinted.start == "HTTP/1.1 103 Early Hints"
            request_id = hinted.one("X-Request-Id")
            assert hinted.headers == [("Link", "</a.css>; rel=preload"), ("X-Request-Id", request_id)]
            go_on.set()
            answer = await client.answer()
            assert (answer.status, answer.body, answer.one("X-Request-Id")) == (200, b"ok", request_id)
    assert wire.upstream.connections == 1


@pytest.mark.parametrize(
    ("raw", "relayed"),
    [
        (request("GET", "/"), [103, 100, 200]),
        (request("HEAD", "/"), [103, 100, 200]),
        (request("POST", "/", "Expect: 100-continue", body=b"x"), [103, 200]),
        (request("GET", "/", "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"), [200]),
        (request("GET", "/").replace(b"HTTP/1.1", b"HTTP/1.0"), [200]),
    ],
)
async def test_an_interim_response_is_relayed_only_to_clients_that_support_it_and_only_once(
    start: Start, raw: bytes, relayed: list[int]
) -> None:
    continued = b"HTTP/1.1 100 Continue\r\n\r\n"
    final = FINAL.removesuffix(b"ok") if raw.startswith(b"HEAD") else FINAL
    wire = await start(serving=Upstream(answer_with(HINTS + continued + final)))
    async with wire.client() as client:
        await client.send(raw)
        answers = await client.answers(method=raw.partition(b" ")[0].decode())
        assert [answer.status for answer in answers] == relayed


async def test_a_client_that_waits_for_100_gets_it_once(start: Start) -> None:
    continued = b"HTTP/1.1 100 Continue\r\n\r\n"
    wire = await start(serving=Upstream(answer_with(continued + FINAL)))
    async with wire.client() as client:
        await client.send(request("POST", "/", "Expect: 100-continue", "Content-Length: 3"))
        assert (await client.answer()).status == 100
        await client.send(b"abc")
        assert (await client.answer()).status == 200
    assert wire.upstream.requests[0].one("Expect") is None


async def test_an_interim_response_reaches_a_half_closed_client(start: Start) -> None:
    async def slowly(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(1.2)
        writer.write(HINTS)
        await asyncio.sleep(0.1)
        writer.write(FINAL)
        return True

    wire = await start(serving=Upstream(slowly))
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        client.half_close()
        assert [message.status for message in await client.answers()] == [103, 200]


@pytest.mark.parametrize(("number", "status"), [(16, 200), (17, 502)])
async def test_interim_responses_are_bounded_in_number(start: Start, number: int, status: int) -> None:
    wire = await start(serving=Upstream(answer_with(HINTS * number + FINAL)))
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        assert [message.status for message in await client.answers()] == [103] * 16 + [status]


async def test_a_request_with_an_interim_response_is_not_retried(start: Start) -> None:
    served = 0

    async def hints_and_goes(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        nonlocal served
        served += 1
        writer.write(FINAL if served == 1 else HINTS)
        return served == 1

    wire = await start(serving=Upstream(hints_and_goes))
    async with wire.client() as client:
        await client.send(request("GET", "/1"))
        assert (await client.answer()).status == 200
        await client.send(request("GET", "/2"))
        assert [message.status for message in await client.answers()] == [103, 502]
    assert served == 2
