"""Act-For over sockets: obeyed or refused in any spelling, never ignored, never forwarded, never logged."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator

import pytest

from keyproxy.config.schema import IdentityHeaders, RouteRow, Settings
from keyproxy.http.headers import canonical
from keyproxy.process.terms import build_terms
from keyproxy.wire.parsing.head_templates import LEARNT_AFTER
from tests import fakes
from tests.rawhttp import Message, Upstream
from tests.wire.conftest import KEY, Start, Wire, request
from tests.wire.test_long import HANDSHAKE, tunnel

#: So often that a shape is learnt, and recognised once more.
OFTEN = LEARNT_AFTER + 3
USERS = [f"u_{number}" for number in range(5)]
OWNER = "u_42"
NAME = "X-Keyproxy-Act-For"
SPELLINGS = [
    NAME, NAME.lower(), NAME.upper(), NAME.replace("-", "_"), NAME.replace("-", "."), "X-Keyproxy-Act_For",
    "x.keyproxy_act-FOR", "X_KEYPROXY_ACT_FOR",
]  # fmt: skip


def let_act(wire: Wire) -> None:
    """Let the key act for all of USERS."""
    for user in USERS:
        wire.identities.let_act(fakes.key(1), user)


@pytest.fixture
async def acting(start: Start) -> AsyncIterator[Wire]:
    """A proxy whose key acts for users. In the end, no request was forwarded with an Act-For header."""
    wire = await start()
    let_act(wire)
    yield wire
    assert not any(mentions_act_for(seen) for seen in wire.upstream.heads)


def mentions_act_for(seen: Message) -> bool:
    return any(b"act-for" in canonical(f"{name}: {value}".encode("latin-1")) for name, value in seen.headers)


def users(wire: Wire) -> list[str | None]:
    """The user of each forwarded request."""
    return [seen.one("X-Keyproxy-User") for seen in wire.upstream.requests]


async def codes(wire: Wire, *raws: bytes) -> list[tuple[int, str | None]]:
    """(status, code) of each response, on a connection of its own."""
    found = []
    for raw in raws:
        async with wire.client() as client:
            await client.send(raw)
            answer = await client.answer()
            found.append((answer.status, None if answer.status < 400 else json.loads(answer.body)["code"]))
    return found


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_a_key_acts_for_the_user_of_the_header_in_any_spelling(acting: Wire, spelling: str, version: str) -> None:
    sent: list[str] = []
    async with acting.client() as client:
        for number in range(OFTEN * 2):
            user = USERS[number // 2 % len(USERS)]  # each twice: identical bytes
            raw = request("POST", "/", "Connection: keep-alive", f"{spelling}: {user}", "X-Kept: 1", body=b"x")
            await client.send(raw.replace(b"HTTP/1.1", b"HTTP/" + version.encode(), 1))
            assert (await client.answer()).status == 200
            sent.append(user)
    assert users(acting) == sent
    assert all(seen.one("X-Kept") == "1" for seen in acting.upstream.requests)


async def test_no_request_is_made_for_the_user_of_another_one(acting: Wire) -> None:
    choose = random.Random(5)

    async def requests(connection: int) -> None:
        async with acting.client() as client:
            for number in range(60):
                user = choose.choice([None, *USERS])
                mark = f"{connection}-{number}-{user or OWNER}"
                lines = (
                    [f"X-Mark: {mark}"] if user is None else [f"{choose.choice(SPELLINGS)}: {user}", f"X-Mark: {mark}"]
                )
                await client.send(request("POST", "/", *choose.sample(lines, len(lines)), body=b"x"))
                assert (await client.answer()).status == 200

    await asyncio.gather(*map(requests, range(4)))
    for seen in acting.upstream.requests:
        assert str(seen.one("X-Mark")).rpartition("-")[2] == seen.one("X-Keyproxy-User")
    assert len(acting.upstream.requests) == 240


async def test_pipelined_requests_act_each_for_its_own_user(acting: Wire) -> None:
    chosen = [None, *USERS, None, *USERS[::-1], USERS[0], USERS[0], None, None] * 2
    raws = [request("POST", "/", *([f"{NAME}: {user}"] if user else []), body=b"x") for user in chosen]
    async with acting.client() as client:
        await client.send(b"".join(raws))
        for _ in raws:
            assert (await client.answer()).status == 200
    assert users(acting) == [user or OWNER for user in chosen]


AMBIGUOUS = [
    [f"{NAME}: u_1", f"{NAME}: u_1"],
    [f"{NAME}: u_1", f"{NAME}: u_2"],
    [f"{NAME}:", f"{NAME}:"],
    [f"{NAME}: u_1", "X_Keyproxy_Act_For: u_1"],
    ["x.keyproxy.act.for: u_1", "X-Kept: 1", "X_KEYPROXY-ACT_FOR: u_1"],
    [f"{NAME}: u_1", f"Connection: {NAME}"],
    [f"{NAME}: u_1", "Connection: keep-alive, x_keyproxy.act_for"],
    ["X.Keyproxy.Act.For: u_1", "Connection: x-keyproxy-act-for"],
    [f"Connection: {NAME}"],
    [f"{NAME}: u_1\r\n u_2"],
    [f"{NAME}: u_1\x00"],
]


@pytest.mark.parametrize("lines", AMBIGUOUS)
@pytest.mark.parametrize("key", [KEY, None, fakes.key(9).reveal()], ids=["known", "none", "unknown"])
async def test_an_ambiguous_act_for_header_is_malformed_whatever_the_key(
    acting: Wire, lines: list[str], key: bytes | None
) -> None:
    single = request("POST", "/", f"{NAME}: u_1", "Connection: keep-alive", body=b"x")
    ambiguous = request("POST", "/", *lines, body=b"x", key=key)
    async with acting.client() as client:
        for _ in range(OFTEN):
            await client.send(single)
            assert (await client.answer()).status == 200
        await client.send(ambiguous)
        answer = await client.answer()
    assert (answer.status, json.loads(answer.body)["code"]) == (400, "request_malformed")
    assert await codes(acting, ambiguous) == [(400, "request_malformed")]
    assert len(acting.upstream.heads) == OFTEN
    details = [one.detail for one in acting.recorder.seen if one.status == 400]
    assert len(details) == 2
    assert not any("u_1" in detail for detail in details)


@pytest.mark.parametrize(
    "value", ["", " ", "\t", "u_1 ,", "u_1, u_2", "u 1", '"u_1"', "u_1;", "\xe9", "u_1\xa0", "U_1", "u_9", "u" * 4000]
)
async def test_a_value_that_names_no_user_is_refused_and_not_repeated(acting: Wire, value: str) -> None:
    async with acting.client() as client:
        for _ in range(OFTEN):
            await client.send(request("POST", "/", f"{NAME}: {value}", body=b"x"))
            answer = await client.answer()
            assert (answer.status, json.loads(answer.body)["code"]) == (403, "delegation_refused")
            shown = f"{answer.headers} {answer.body!r} {acting.recorder.seen[-1].detail}"
            assert not value.strip() or value.strip() not in shown
    assert acting.upstream.heads == []


async def test_act_for_in_a_trailer_is_dropped(acting: Wire) -> None:
    for trailer in (f"{NAME}: u_1", "x_keyproxy_act_for: u_1", f"{NAME}: u_1\r\n{NAME}: u_2"):
        body = b"1\r\nx\r\n0\r\n" + trailer.encode() + b"\r\n\r\n"
        async with acting.client() as client:
            raws = [
                request("POST", "/", "Transfer-Encoding: chunked", f"Trailer: {NAME}"),
                request("POST", "/", "Transfer-Encoding: chunked", f"{NAME}: u_2"),
            ]
            for raw in raws:
                await client.send(raw + body)
                assert (await client.answer()).status == 200
    assert users(acting) == [OWNER, "u_2"] * 3
    assert [seen.body for seen in acting.upstream.requests] == [b"x"] * 6


async def test_a_websocket_handshake_acts_for_a_user(start: Start) -> None:
    wire = await start(serving=Upstream(tunnel))
    let_act(wire)
    for lines in ([], [f"{NAME}: u_1"], ["x_keyproxy_act_for: u_2"]):
        async with wire.client() as client:
            await client.send(request("GET", "/ws", *HANDSHAKE, *lines))
            assert (await client.answer(method="GET")).status == 101
    assert [seen.one("X-Keyproxy-User") for seen in wire.upstream.heads] == [OWNER, "u_1", "u_2"]
    for lines in ([f"{NAME}: u_1"] * 2, [f"{NAME}: u_1", f"Connection: {NAME}"]):
        assert await codes(wire, request("GET", "/ws", *HANDSHAKE, *lines)) == [(400, "request_malformed")]
    assert await codes(wire, request("GET", "/ws", *HANDSHAKE, f"{NAME}: u_9")) == [(403, "delegation_refused")]
    assert len(wire.upstream.heads) == 3
    assert not any(mentions_act_for(seen) for seen in wire.upstream.heads)


async def test_the_header_has_the_configured_prefix(start: Start) -> None:
    wire = await start()
    server = wire.server
    settings = Settings(listen=server.listen, identity=IdentityHeaders(header_prefix="X-Acme-"))
    server.change(build_terms(settings, server.routes, wire.gateway, server.upstreams, tls=None), None)
    wire.identities.let_act(fakes.key(1), "u_1")
    async with wire.client() as client:
        for _ in range(OFTEN):
            await client.send(request("POST", "/", "X_Acme_Act_For: u_1", f"{NAME}: u_2", f"{NAME}: u_3", body=b"x"))
            assert (await client.answer()).status == 200
    for seen in wire.upstream.requests:
        assert seen.all(NAME) == ["u_2", "u_3"]
        assert "act_for" not in str(seen.headers).lower()
    assert {one.user for one in wire.recorder.seen} == {"u_1"}
    twice = request("POST", "/", "X-Acme-Act-For: u_1", "X.Acme.Act.For: u_1", body=b"x")
    assert await codes(wire, twice) == [(400, "request_malformed")]


async def test_on_a_public_route_act_for_is_dropped_and_must_be_unambiguous_too(start: Start) -> None:
    wire = await start(rows=[RouteRow("* /public/{rest...}", access="public")])
    let_act(wire)
    for _ in range(OFTEN):
        for spelling in SPELLINGS:
            assert await codes(wire, request("POST", "/public/x", f"{spelling}: u_9", key=None)) == [(200, None)]
    for seen in wire.upstream.requests:
        assert seen.one("X-Keyproxy-User") is None
        assert not mentions_act_for(seen)
    seen_before = len(wire.upstream.heads)
    for lines in AMBIGUOUS[:6]:
        assert await codes(wire, request("POST", "/public/x", *lines, key=None)) == [(400, "request_malformed")]
    assert len(wire.upstream.heads) == seen_before


async def test_an_act_for_header_of_an_upstream_does_not_reach_the_client(start: Start) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n{NAME}: u_1\r\nx_keyproxy_act_for: u_2\r\nX-Kept: 1\r\n\r\n"

    async def answer(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(head.encode())
        return True

    wire = await start(serving=Upstream(answer))
    async with wire.client() as client:
        for _ in range(OFTEN):
            await client.send(request("POST", "/", body=b"x"))
            answered = await client.answer()
            assert answered.one("X-Kept") == "1"
            assert not mentions_act_for(answered)
