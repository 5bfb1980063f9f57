"""Refusals of metered requests: codes, reasons, waits, and their order before and after the body."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from keyproxy.model import Ending
from tests import fakes
from tests.rawhttp import Client, Message, Upstream
from tests.waiting import until
from tests.wire.conftest import Start, Wire, request
from tests.wire.test_ai_examples import CHAT, GENERATE, HELLO, MESSAGES, ask, hello, metered, openai_usage, plan

NO_PRICE = "spend/month=50.00"


def error(message: Message) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(message.body)
    return content


async def refused(wire: Wire, body: object, *lines: str, path: str = CHAT) -> tuple[Message, dict[str, Any]]:
    told = await ask(wire, body, *lines, path=path)
    assert wire.recorder.seen[-1].ending is Ending.REFUSED
    return told, error(told)


@pytest.mark.parametrize(
    ("limits", "body", "code", "policy"),
    [
        (("tokens/request=33",), hello(), "token_limit_per_request", "user.tokens_per_request"),
        (("tokens/request=60",), hello(max_tokens=50), "token_limit_per_request", "user.tokens_per_request"),
        (("tokens/day=60",), hello(max_tokens=50), "token_limit_per_request", "user.tokens_per_day"),
        (("token-rate=60/min:60",), hello(max_tokens=50), "token_limit_per_request", "user.token_rate"),
        (("spend/request=0.0005",), hello(max_tokens=50), "spend_limit_per_request", "user.spend_per_request"),
        (("spend/day=0.0005",), hello(max_tokens=50), "spend_limit_per_request", "user.spend_per_day"),
    ],
)
async def test_what_never_fits_is_403_without_a_wait(
    start: Start, limits: tuple[str, ...], body: dict[str, Any], code: str, policy: str
) -> None:
    wire = await metered(start, openai_usage(13, 9), *limits)
    told, content = await refused(wire, body)
    assert (told.status, content["code"], content["reason"], content["policy"]) == (403, code, "never_fits", policy)
    assert (told.one("Retry-After"), told.one("x-should-retry"), content["retryable"]) == (None, "false", False)
    assert wire.recorder.seen[-1].limit_reason == "never_fits"
    assert not wire.ledger.settled
    assert not wire.upstream.requests


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        ("tokens/day=100", "token_budget_exhausted"),
        ("spend/day=0.0008", "spend_budget_exhausted"),
        ("requests/day=1", "quota_exhausted"),
    ],
)
async def test_what_no_longer_fits_is_spent_until_the_reset(start: Start, limit: str, code: str) -> None:
    wire = await metered(start, openai_usage(18, 50), limit)
    assert (await ask(wire, hello(max_tokens=50))).status == 200
    told, content = await refused(wire, hello(max_tokens=50))
    assert (told.status, content["code"], content["reason"], content["retryable"]) == (429, code, "spent", True)
    assert told.one("x-should-retry") == "false"
    assert int(told.one("Retry-After") or 0) == content["reset_seconds"] > 0


async def test_what_requests_in_flight_hold_is_held_for_moments(start: Start) -> None:
    release = asyncio.Event()

    async def slow(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await release.wait()
        writer.write(openai_usage(13, 9))
        return True

    wire = await metered(start, Upstream(slow), "tokens/day=100")
    first = asyncio.ensure_future(ask(wire, hello(max_tokens=50)))
    await until(lambda: bool(wire.upstream.requests), "one is under way")
    told, content = await refused(wire, hello(max_tokens=50))
    assert (told.status, content["code"], content["reason"]) == (429, "token_budget_exhausted", "held")
    assert 1 <= int(told.one("Retry-After") or 0) <= 5
    assert (told.one("x-should-retry"), content["retryable"]) == (None, True)
    release.set()
    assert (await first).status == 200
    assert (await ask(wire, hello(max_tokens=50))).status == 200


@pytest.mark.parametrize("limit", ["request-rate=1/h:1", "token-rate=68/h:68"])
async def test_an_empty_rate_is_a_matter_of_pace(start: Start, limit: str) -> None:
    wire = await metered(start, openai_usage(18, 50), limit)
    assert (await ask(wire, hello(max_tokens=50))).status == 200
    told, content = await refused(wire, hello(max_tokens=50))
    assert (told.status, content["code"], content["reason"], content["retryable"]) == (
        429,
        "rate_limited",
        "pace",
        True,
    )
    assert int(told.one("Retry-After") or 0) > 0


async def test_a_model_without_a_price_is_refused_under_a_spend_limit_only(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), NO_PRICE)
    told, content = await refused(wire, hello(model="unlisted"))
    assert (told.status, content["code"]) == (403, "model_unpriced")
    wire.identities.add(fakes.key(1), fakes.identity(plan=plan("tokens/day=100000")))
    assert (await ask(wire, hello(model="unlisted"))).status == 200
    assert wire.recorder.seen[-1].cost_micros == 0


async def test_a_limit_of_a_model_applies_to_requests_for_it_alone(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), "tokens/day@model:gpt-4o=60")
    told, content = await refused(wire, hello(max_tokens=50))
    assert (told.status, content["policy"]) == (403, "user.tokens_per_day@model:gpt-4o")
    assert (await ask(wire, hello(model="gpt-4r", max_tokens=50))).status == 200


async def test_a_limit_of_a_route_applies_to_its_requests(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), "requests/day@route:chat=1", "requests/day@route:other=0")
    assert (await ask(wire, hello())).status == 200
    _, content = await refused(wire, hello())
    assert (content["code"], content["policy"]) == ("quota_exhausted", "user.requests_per_day@route:chat")


async def test_a_route_may_require_a_maximum(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), cap="refuse")
    told, content = await refused(wire, hello())
    assert (told.status, content["code"]) == (400, "output_maximum_required")
    assert "max_completion_tokens" in content["detail"]
    assert (await ask(wire, hello(max_tokens=50))).status == 200


@pytest.mark.parametrize("header", ["Content-Digest: sha-256=:x:", "Digest: x", "X-Amz-Content-Sha256: x"])
async def test_a_body_under_a_digest_is_never_changed(start: Start, header: str) -> None:
    wire = await metered(start, openai_usage(13, 9))
    told, content = await refused(wire, hello(), header)
    assert (told.status, content["code"]) == (400, "output_maximum_required")
    sent = hello(max_tokens=50, stream=True)
    assert (await ask(wire, sent, header)).status == 200
    assert json.loads(wire.upstream.requests[-1].body) == sent


async def test_without_caps_the_request_is_reserved_alike_and_not_changed(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), cap="off")
    told = await ask(wire, hello())
    assert (told.one("X-Keyproxy-Tokens-Reserved"), told.one("X-Keyproxy-Output-Cap")) == ("4114", None)
    assert json.loads(wire.upstream.requests[-1].body) == hello()


async def test_two_places_with_models_of_different_rows_are_malformed(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), path="/v1/{rest...}")
    told, content = await refused(wire, hello(), path=f"{CHAT}?model=gpt-4r")
    assert (told.status, content["code"]) == (400, "request_malformed")


async def test_an_alternative_without_a_price_is_refused_under_a_spend_limit(start: Start) -> None:
    wire = await metered(start, openai_usage(1_000, 0), "spend/day=1.00")
    told, content = await refused(wire, hello(fallbacks=["gpt-4r"]))
    assert (told.status, content["code"]) == (403, "model_unpriced")


SHAPES = {
    "openai": ("openai", CHAT, hello(max_tokens=50)),
    "anthropic": ("anthropic", "/v1/messages", {"max_tokens": 50, "messages": MESSAGES}),
    "gemini": ("gemini", GENERATE, {"contents": [{"parts": [{"text": HELLO}]}]}),
    "ollama": ("ollama", "/api/chat", {"messages": MESSAGES}),
    "bedrock": ("bedrock", "/model/m/converse", {"messages": [{"content": [{"text": HELLO}]}]}),
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_refusal_has_the_format_of_the_dialect(start: Start, shape: str) -> None:
    dialect, path, body = SHAPES[shape]
    wire = await metered(start, openai_usage(13, 9), "tokens/day=1", path=path, tokens=dialect, error_shape=shape)
    told, content = await refused(wire, body, path=path)
    assert told.status == 403
    code = "token_limit_per_request"
    match shape:
        case "openai":
            assert content["error"]["code"] == code
        case "anthropic":
            assert (content["type"], content["error"]["code"]) == ("error", code)
        case "gemini":
            assert set(content["error"]) == {"code", "message", "status", "details"}
            assert (content["error"]["code"], content["error"]["status"]) == (403, "PERMISSION_DENIED")
            (detail,) = content["error"]["details"]
            assert (detail["reason"], detail["domain"]) == (code, "keyproxy")
        case "ollama":
            assert isinstance(content["error"], str)
            assert content["code"] == code
        case "bedrock":
            assert isinstance(content["message"], str)
            assert content["code"] == code
    assert told.one("x-amzn-ErrorType") == ("AccessDeniedException" if shape == "bedrock" else None)


# -- bounds of bodies

SMALL = {"body_bytes_max": 65_536, "body_memory_max": 262_144}


async def test_requests_for_which_repeats_are_off_are_charged_each_time(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), "requests/day=3", idempotency="off")
    for _ in range(3):
        assert (await ask(wire, hello(), "Idempotency-Key: 7")).status == 200
    assert wire.upstream.requests[-1].one("Idempotency-Key") == "7"
    _, content = await refused(wire, hello(), "Idempotency-Key: 7")
    assert content["code"] == "quota_exhausted"


@pytest.mark.parametrize(
    ("settings", "body", "lines", "expected"),
    [
        (SMALL, b"{%b}" % (b" " * 65_536), (), (413, "body_too_large")),
        (
            SMALL,
            gzip.compress(b"{%b}" % (b" " * 100_000), mtime=0),
            ("Content-Encoding: gzip",),
            (413, "body_too_large"),
        ),
        ({}, gzip.compress(b"{%b}" % (b" " * 500_000), mtime=0), ("Content-Encoding: gzip",), (413, "body_too_large")),
        ({"json_values_max": 3}, b"[1,2,3,4]", (), (400, "request_malformed")),
        ({"json_containers_max": 3}, b"[[],[],[]]", (), (400, "request_malformed")),
        ({"json_depth_max": 3}, b"[[[[1]]]]", (), (400, "request_malformed")),
    ],
    ids=["size", "inflated size", "ratio", "values", "containers", "depth"],
)
async def test_a_body_beyond_a_bound_is_refused(
    start: Start, settings: dict[str, int], body: bytes, lines: tuple[str, ...], expected: tuple[int, str]
) -> None:
    wire = await metered(start, openai_usage(13, 9), settings=settings)
    told, content = await refused(wire, body, *lines)
    assert (told.status, content["code"]) == expected
    await until(lambda: wire.server.room.held_bytes == 0, "its memory is free")


async def test_all_bodies_together_are_bounded_and_each_user_has_a_quarter(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), settings=SMALL)
    for number in range(2, 7):
        wire.identities.add(fakes.key(number), fakes.identity(f"u_{number}"))
    statuses, slow = [], []
    for number in (2, 2, 3, 4, 5, 6):
        context = wire.client()
        client = await context.__aenter__()
        slow.append(context)
        head = request("POST", CHAT, key=fakes.key(number).reveal())
        await client.send(head[:-2] + b"Content-Length: 65536\r\n\r\n" + b" " * 65_535)
        recorded = len(wire.recorder.seen)
        full = wire.server.room.held_bytes + 65_535
        while wire.server.room.held_bytes < full and len(wire.recorder.seen) == recorded:
            await asyncio.sleep(0.01)
        if len(wire.recorder.seen) > recorded:
            told = await client.answer()
            content = error(told)
            statuses.append((number, told.status, content["code"], content.get("reason")))
    for context in slow:
        await context.__aexit__(None, None, None)
    assert statuses == [(2, 429, "concurrency_limited", "body_memory"), (6, 503, "overloaded", None)]


def compressed(content_bytes: int) -> bytes:
    body = json.dumps(hello(max_tokens=50)).encode()
    return gzip.compress(body + b" " * (content_bytes - len(body)))


@contextlib.asynccontextmanager
async def inflated(wire: Wire, users: list[int], content_bytes: int) -> AsyncIterator[list[Client]]:
    """Requests whose bodies are inflated, while they wait for the ledger."""
    wire.ledger.may_reply.clear()
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for number in users:
            wire.identities.add(fakes.key(number), fakes.identity(f"u_{number}", plan=plan("tokens/day=100000")))
            client = await stack.enter_async_context(wire.client())
            wanted = wire.server.room.held_bytes + content_bytes
            recorded = len(wire.recorder.seen)
            await client.send(
                request(
                    "POST", CHAT, "Content-Encoding: gzip", body=compressed(content_bytes),
                    key=fakes.key(number).reveal(),
                )
            )  # fmt: skip
            await until(
                lambda: wire.server.room.held_bytes >= wanted or len(wire.recorder.seen) > recorded,  # noqa: B023
                "it is inflated or refused",
            )
            clients.append(client)
        yield clients


async def test_inflated_content_takes_memory_until_it_is_forwarded(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), settings=SMALL)
    async with inflated(wire, [2], 65_536) as (client,):
        assert wire.server.room.held_bytes == 65_536
        wire.ledger.may_reply.set()
        assert (await client.answer()).status == 200
    assert wire.server.room.held_bytes == 0


async def test_inflated_content_of_a_client_that_leaves_is_released(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), settings=SMALL)
    async with inflated(wire, [2, 3], 60_000):
        assert wire.server.room.held_bytes == 120_000
    await until(lambda: wire.server.room.held_bytes == 0, "the clients have left")


async def test_inflated_content_counts_towards_the_share_of_its_user(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), settings=SMALL)
    async with inflated(wire, [2, 2], 40_000) as (first, second):
        told = await second.answer()
        content = error(told)
        assert (told.status, content["code"], content["reason"]) == (429, "concurrency_limited", "body_memory")
        assert wire.server.room.held_bytes == 40_000
        wire.ledger.may_reply.set()
        assert (await first.answer()).status == 200
    assert len(wire.upstream.requests) == 1


async def test_inflated_content_counts_towards_the_memory_of_the_process(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), settings=SMALL)
    async with inflated(wire, [2, 3, 4, 5, 6], 60_000) as clients:
        told = await clients[-1].answer()
        assert (told.status, error(told)["code"]) == (503, "overloaded")
        assert wire.server.room.held_bytes == 240_000
        wire.ledger.may_reply.set()
        for client in clients[:-1]:
            assert (await client.answer()).status == 200
    assert wire.server.room.held_bytes == 0


async def test_the_only_body_of_a_user_may_exceed_the_share_by_its_content(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), settings=SMALL)
    body = json.dumps(hello(user=random.Random(1).randbytes(30_000).hex(), max_tokens=50)).encode()
    sent = gzip.compress(body)
    head = request("POST", CHAT, "Content-Encoding: gzip")[:-2] + b"Content-Length: %d\r\n\r\n" % len(sent)
    wire.ledger.may_reply.clear()
    async with wire.client() as client:
        await client.send(head + sent[:10])
        await until(lambda: wire.server.room.held_bytes == 10, "its body is awaited")
        await client.send(sent[10:])
        await until(lambda: wire.server.room.held_bytes > 65_536, "it is inflated")
        assert wire.server.room.held_bytes == len(sent) + len(body)
        wire.ledger.may_reply.set()
        assert (await client.answer()).status == 200


async def test_a_request_counts_as_concurrent_while_its_body_arrives(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), "concurrency=1")
    assert (await ask(wire, hello())).status == 200
    body = json.dumps(hello()).encode()
    head = request("POST", CHAT)[:-2] + b"Content-Length: %d\r\n\r\n" % len(body)
    async with wire.client() as slow, wire.client() as leaving:
        await slow.send(head + body[:10])
        await until(lambda: wire.server.room.held_bytes == 10, "its body is awaited")
        _, content = await refused(wire, hello())
        assert content["code"] == "concurrency_limited"
        await slow.send(body[10:])
        assert (await slow.answer()).status == 200
        await leaving.send(head + body[:10])
        await until(lambda: wire.server.room.held_bytes == 10, "its body is awaited")
    await until(lambda: wire.server.room.held_bytes == 0, "it has left")
    assert (await ask(wire, hello())).status == 200
