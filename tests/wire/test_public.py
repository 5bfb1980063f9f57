"""Public routes: forwarded without a key, without an identity, and within their own bound of connections."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Sequence

import pytest

from keyproxy.config.schema import RouteRow
from keyproxy.limits.plan import Plan
from keyproxy.reasons import Reason
from tests import fakes
from tests.rawhttp import OK, Client, Message, Upstream, answer_with
from tests.waiting import until
from tests.wire.conftest import KEY, Start, Wire, request
from tests.wire.test_long import HANDSHAKE, SWITCH
from tests.wire.test_sharing import holding

TEXT = KEY.decode()
UNKNOWN = fakes.key(9).reveal()
ROWS = [
    RouteRow("GET /healthz", access="public", name="health"),
    RouteRow("OPTIONS /{rest...}", access="public"),
    RouteRow("* /public/{rest...}", access="public", error_shape="openai"),
    RouteRow("* /private/{rest...}", ["never"]),
    RouteRow("POST /v1/ai/jobs"),
]


async def statuses(wire: Wire, *raws: bytes) -> list[tuple[int, str | None]]:
    """(status, code) of each response, on a connection of its own."""
    found = []
    for raw in raws:
        async with wire.client() as client:
            await client.send(raw)
            method = raw.partition(b" ")[0].decode()
            answer = await client.answer(method=method)
            is_json = b"json" in (answer.one("Content-Type") or "").encode()
            content = json.loads(answer.body) if is_json and answer.body else {}
            found.append((answer.status, content.get("code", content.get("error", {}).get("code"))))
    return found


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [f"Authorization: Api-Key {TEXT}"],
        [f"Authorization: Bearer {UNKNOWN.decode()}"],
        ["Authorization: Basic dXNlcjpwYXNzd29yZA=="],
        ["Authorization: Bearer"],
        ["X-Api-Key: "],
        [f"X-Api-Key: {TEXT}", f"Authorization: Bearer {UNKNOWN.decode()}"],
        ["Proxy-Authorization: Basic dXNlcjpwYXNzd29yZA=="],
    ],
    ids=["none", "known", "unknown", "basic", "empty", "empty name", "two", "proxy"],
)
async def test_a_public_request_is_forwarded_without_identity_and_credentials(start: Start, lines: list[str]) -> None:
    wire = await start(rows=ROWS)
    smuggled = ["X-Keyproxy-User: u_1", "x_keyproxy_tenant: t", "X.Keyproxy.Scope: s", "X-Custom: kept"]
    async with wire.client() as client:
        for _ in range(12):
            await client.send(request("POST", "/public/x?a=b", *lines, *smuggled, key=None, body=b"hello"))
            answer = await client.answer()
            assert answer.status == 200
            assert answer.one("X-Request-Id")
            assert answer.one("RateLimit") is None
    for seen in wire.upstream.requests:
        assert (seen.start, seen.body) == ("POST /public/x?a=b HTTP/1.1", b"hello")
        names = {name.lower() for name, _ in seen.headers}
        assert names == {
            "host", "x-custom", "content-length", "x-request-id", "x-forwarded-for", "x-forwarded-proto",
            "x-forwarded-host",
        }  # fmt: skip
    assert {(one.user, one.route) for one in wire.recorder.seen} == {(None, "* /public/{rest...}")}


async def test_only_the_routes_that_say_so_are_public(start: Start) -> None:
    wire = await start(rows=ROWS)
    assert await statuses(
        wire,
        request("GET", "/healthz", key=None),
        request("OPTIONS", "/v1/ai/jobs", key=None),
        request("POST", "/healthz", key=None),
        request("POST", "/v1/ai/jobs", key=None),
        request("GET", "/private/x", key=None),
        request("GET", "/elsewhere", key=None),
        request("GET", "/private/x"),
        request("GET", "/elsewhere"),
    ) == [
        (200, None), (200, None), (401, "api_key_missing"), (401, "api_key_missing"), (401, "api_key_missing"),
        (401, "api_key_missing"), (403, "insufficient_scope"), (403, "route_not_allowed"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "path", ["/%70ublic/x", "/public;a/x", "/public//x", "/private/%2e%2e/public/x", "/public/%2e%2e/private/x"]
)
async def test_a_path_that_servers_read_differently_is_not_public(start: Start, path: str) -> None:
    wire = await start(rows=[*ROWS, RouteRow("* /{rest...}", ["never"])])
    ((status, code),) = await statuses(wire, request("GET", path, key=None))
    # One that stays below the same route in every reading is public.
    assert (status, code) in (
        [(200, None)] if path == "/public//x" else [(401, "api_key_missing"), (400, "request_malformed")]
    )
    ((status, code),) = await statuses(wire, request("GET", path))
    assert (status, code) in ([(200, None)] if path == "/public//x" else [(400, "request_malformed")])


@pytest.mark.parametrize("target", [f"/public/{TEXT}", f"/public/x?k={TEXT}", "/public/x?api_key=secret"])
@pytest.mark.parametrize("key", [None, KEY], ids=["alone", "beside a header"])
async def test_a_key_in_the_url_of_a_public_route_is_refused(start: Start, target: str, key: bytes | None) -> None:
    wire = await start(rows=ROWS)
    assert await statuses(wire, request("GET", target, key=key)) == [(400, "key_in_url")]
    assert wire.upstream.heads == []


FOREIGN = "pk-1234.abcdefghijklmnopqrstuvwxyz"
IDS = "550e8400-e29b-41d4-a716-446655440000"
BASIC = base64.b64encode(b"user:" + FOREIGN.encode()).decode()


@pytest.mark.parametrize(
    ("presented", "secret"),
    [
        (f"Authorization: Api-Key {TEXT}", TEXT),
        (f"Authorization: Bearer {FOREIGN}", FOREIGN),
        (f"Authorization: {FOREIGN}", FOREIGN),
        (f"Authorization: Basic {BASIC}", BASIC.rstrip("=")),
        (f"X-Api-Key: {FOREIGN}", FOREIGN),
        (f"X-Api-Key: {FOREIGN} x", FOREIGN),
        (f"Authorization: Bearer {IDS}", IDS),
    ],
)
async def test_no_header_of_a_public_request_carries_a_presented_credential(
    start: Start, presented: str, secret: str
) -> None:
    wire = await start(rows=ROWS, listen={"trusted_proxies": ["127.0.0.1"]})
    elsewhere = [f"X-Mine: a {secret} b", f"Cookie: k={secret}", f"X-Forwarded-For: {secret}", "X-Kept: 1"]
    other = f"X-Api-Key: {UNKNOWN.decode()}"
    async with wire.client() as client:
        for _ in range(10):
            lines = [*elsewhere, presented, other, f"X-Other: {UNKNOWN.decode()}", f"X-Request-Id: {secret[:100]}"]
            await client.send(request("GET", "/public/x", *lines, key=None))
            answer = await client.answer(method="GET")
            assert (answer.status, secret in json.dumps(answer.headers)) == (200, False)
        await client.send(request("GET", f"/public/x?k={secret}", presented, key=None))
        assert (await client.answer(method="GET")).status == 400
    for seen in wire.upstream.requests:
        text = json.dumps(seen.headers)
        assert secret not in text
        assert UNKNOWN.decode().rpartition("_")[2] not in text
        assert seen.one("X-Kept") == "1"


async def test_a_short_credential_removes_no_other_header(start: Start) -> None:
    wire = await start(rows=ROWS)
    lines = ["Authorization: Basic dGVzdDp4", "X-Api-Key: test", "User-Agent: test dGVzdDp4", "Content-Type: test/x"]
    assert await statuses(wire, request("POST", "/public/x", *lines, key=None, body=b"x")) == [(200, None)]
    (seen,) = wire.upstream.requests
    assert seen.one("User-Agent") == "test dGVzdDp4"


async def test_a_credential_in_host_or_content_type_refuses_a_public_request(start: Start) -> None:
    wire = await start(rows=ROWS)
    in_type = request("POST", "/public/x", f"Content-Type: {TEXT}", body=b"x")
    in_host = request("GET", "/public/x").replace(b"proxy.test", KEY)
    assert await statuses(wire, in_type, in_host) == [(400, "request_malformed")] * 2


async def test_public_requests_do_not_look_at_the_store(start: Start) -> None:
    wire = await start(rows=ROWS)
    wire.identities.is_down = True
    wire.identities.slow = {fakes.key(1).digest(), fakes.key(9).digest()}
    raws = [request("GET", "/healthz", key=key) for key in (None, KEY, UNKNOWN)]
    assert await statuses(wire, *raws) == [(200, None)] * 3
    assert wire.identities.brought == 0


async def test_a_public_request_uses_no_limit(start: Start) -> None:
    wire = await start(rows=ROWS)
    wire.identities.add(fakes.key(1), fakes.identity(plan=Plan(requests_per_day=1)))
    assert await statuses(wire, *[request("GET", "/healthz")] * 3) == [(200, None)] * 3
    assert wire.ledger.settled == []
    assert await statuses(wire, *[request("POST", "/v1/ai/jobs")] * 2) == [(200, None), (429, "quota_exhausted")]


async def test_public_requests_go_to_the_live_upstream_even_with_a_test_key(start: Start) -> None:
    async with Upstream().serving() as testing:
        wire = await start(rows=ROWS, upstream={"test_url": f"http://127.0.0.1:{testing.port}"})
        wire.identities.add(fakes.key(1), fakes.identity(is_test=True))
        await statuses(wire, request("GET", "/healthz"), request("POST", "/v1/ai/jobs", body=b"x"))
        assert [seen.start for seen in wire.upstream.requests] == ["GET /healthz HTTP/1.1"]
        assert [seen.start for seen in testing.requests] == ["POST /v1/ai/jobs HTTP/1.1"]


@pytest.mark.parametrize("responds", [OK, SWITCH], ids=["plain", "switching"])
async def test_a_public_handshake_is_not_taken_up(start: Start, responds: bytes) -> None:
    wire = await start(rows=ROWS, serving=Upstream(answer_with(responds)))
    async with wire.client() as client:
        await client.send(request("GET", "/public/ws", *HANDSHAKE, "X-Custom: 1", key=None))
        answer = await client.answer(method="GET")
        assert answer.status == (200 if responds == OK else 502)
        assert answer.one("Upgrade") is None
    (seen,) = wire.upstream.heads
    assert (seen.one("Upgrade"), seen.one("Connection"), seen.one("X-Custom")) == (None, None, "1")


# -- bounds


async def by_path(message: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """A compute server that leaves some paths without a response."""
    path = message.start.split(" ")[1]
    if path.endswith("/never"):
        await reader.read()
        return False
    if path.endswith("/large"):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n" + bytes(100_000_000))
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        return False
    writer.write(OK)
    return True


@pytest.mark.parametrize(("connections_max", "public_max"), [(1, 1), (3, 1), (8, 2), (12, 3)])
async def test_public_requests_use_at_most_a_quarter_of_the_connections(
    start: Start, connections_max: int, public_max: int
) -> None:
    settings = {"connections_max": connections_max, "connect_timeout_seconds": 0.3}
    wire = await start(rows=ROWS, upstream=settings, serving=Upstream(by_path, reads_bodies=False))
    quick = request("GET", "/public/quick", key=None)
    async with holding(wire, public_max, request("GET", "/public/never", key=None)) as clients:
        assert await statuses(wire, quick, quick) == [(503, "overloaded")] * 2
        if connections_max > public_max:
            assert await statuses(wire, request("POST", "/v1/ai/jobs", key=KEY)) == [(200, None)]
        clients[0].writer.transport.abort()
        await until(lambda: wire.pool.counts()["busy"] < public_max)
        assert await statuses(wire, quick, quick) == [(200, None)] * 2
    assert wire.recorder.seen[0].reason is Reason.OVERLOADED


async def test_public_requests_that_wait_for_a_connection_count_as_well(start: Start) -> None:
    settings = {"connections_max": 4, "connect_timeout_seconds": 0.5}
    wire = await start(rows=ROWS, upstream=settings, serving=Upstream(by_path, reads_bodies=False))
    quick = request("GET", "/public/quick", key=None)
    async with (
        holding(wire, 4, request("POST", "/v1/ai/jobs/never".replace("/never", "") + "?x=/never")),
        wire.client() as client,
    ):
        await client.send(quick)
        await until(lambda: "waiting=1" in repr(wire.pool))
        assert await statuses(wire, quick) == [(503, "overloaded")]


async def test_the_retry_of_a_public_request_has_the_place_of_the_first_attempt(start: Start) -> None:
    seen: list[str] = []

    async def closing_once(message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        seen.append(message.start)
        if len(seen) == 2:
            return False
        writer.write(OK)
        return True

    wire = await start(rows=ROWS, upstream={"connections_max": 1}, serving=Upstream(closing_once))
    assert await statuses(wire, *[request("GET", "/healthz", key=None)] * 2) == [(200, None)] * 2
    assert len(seen) == 3


async def test_a_public_client_that_does_not_read_makes_room_for_others(start: Start) -> None:
    settings = {"connections_max": 4, "connect_timeout_seconds": 0.3}
    wire = await start(rows=ROWS, upstream=settings, serving=Upstream(by_path, reads_bodies=False))

    async def is_served() -> bool:
        return await statuses(wire, request("GET", "/public/quick", key=None)) == [(200, None)]

    async with holding(wire, 1, request("GET", "/public/large", key=None)), asyncio.timeout(10):
        while not await is_served():
            await asyncio.sleep(0.05)


async def test_sizes_and_times_apply_to_public_requests(start: Start) -> None:
    wire = await start(rows=ROWS, listen={"body_bytes_max": 10, "body_idle_timeout_seconds": 0.2})
    assert await statuses(wire, request("POST", "/public/x", key=None, body=bytes(11))) == [(413, "body_too_large")]
    async with wire.client() as client:
        await client.send(request("POST", "/public/x", "Content-Length: 10", key=None) + b"x")
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (408, "request_timeout")


async def test_a_public_request_whose_body_never_begins_takes_no_connection(start: Start) -> None:
    wire = await start(rows=ROWS, upstream={"connections_max": 1})
    async with wire.client() as client:
        await client.send(request("POST", "/public/x", "Content-Length: 10", key=None))
        assert await statuses(wire, request("GET", "/healthz", key=None)) == [(200, None)]


async def test_draining_lets_a_public_request_finish(start: Start) -> None:
    may_respond = asyncio.Event()

    async def later(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await may_respond.wait()
        writer.write(OK)
        return True

    wire = await start(rows=ROWS, serving=Upstream(later))
    async with wire.client() as client:
        await client.send(request("GET", "/healthz", key=None))
        await until(lambda: bool(wire.upstream.requests))
        draining = asyncio.create_task(wire.server.drain(5.0))
        await asyncio.sleep(0)
        may_respond.set()
        answer = await client.answer(method="GET")
        assert (answer.status, answer.one("Connection")) == (200, "close")
        await draining


async def test_a_long_public_response_is_not_ended_by_reviews(start: Start) -> None:
    async def drip(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n")
        for _ in range(12):
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.1)
        return True

    wire = await start(rows=ROWS, serving=Upstream(drip))
    wire.identities.is_down = True
    async with wire.client() as client:
        await client.send(request("GET", "/healthz", f"Authorization: Api-Key {UNKNOWN.decode()}", key=None))
        assert (await client.answer(method="GET")).body == b"." * 12


async def test_requests_of_one_connection_are_decided_one_by_one(start: Start) -> None:
    """The head before is compared first: what was decided on it says nothing about this one."""
    wire = await start(rows=ROWS)

    async def status(client: Client, raw: bytes) -> int:
        await client.send(raw)
        return (await client.answer()).status

    public, keyed = (request("POST", path, "X-Mine: " + TEXT) for path in ("/public/x", "/v1/ai/jobs"))
    stranger = [request("POST", path, key=None) for path in ("/public/x", "/v1/ai/jobs")]
    async with wire.client() as client:
        found: Sequence[int] = [
            await status(client, raw) for raw in [public, keyed, *stranger, public, keyed, *stranger] * 10
        ]
    assert found == [200, 200, 200, 401] * 20
    users = [seen.one("X-Keyproxy-User") for seen in wire.upstream.requests]
    assert users == [None, "u_42", None] * 20
    assert all(seen.one("X-Mine") is None for seen in wire.upstream.requests)
