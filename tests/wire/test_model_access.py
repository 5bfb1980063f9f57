"""Models that a request names, in every place, on metered and other routes: which are forwarded, and which refused."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest

from keyproxy.ai.models import Model
from keyproxy.config.schema import RouteRow
from keyproxy.model import Ending
from keyproxy.reasons import Reason
from tests import fakes
from tests.rawhttp import Message, Upstream, answer_with
from tests.waiting import until
from tests.wire.conftest import Start, Wire, request
from tests.wire.test_ai_examples import CHAT, MESSAGES, openai_usage, plan

SMALL, BIG = Model("small", ("small-1",)), Model("big", ("big-1",), frozenset({"model:premium", "model:beta"}))
PREMIUM = frozenset({"jobs:write", "model:premium", "model:beta"})
JSON, FORM = "Content-Type: application/json", "Content-Type: multipart/form-data; boundary=b"
PAIRS = "Content-Type: application/x-www-form-urlencoded"


async def judging(start: Start, *, scopes: frozenset[str] = frozenset(), limits: str = "", **row: Any) -> Wire:
    """A proxy with one route that judges the model, metered unless `tokens` is stated."""
    match = row.pop("match", f"POST {CHAT}")
    row = {"tokens": "openai"} | row
    rows = [RouteRow(match, name="chat", **row, cap="" if row["tokens"] == "none" else "off")]
    wire = await start(serving=Upstream(answer_with(openai_usage(1, 1))), rows=rows, models=[SMALL, BIG])
    wire.identities.add(fakes.key(1), fakes.identity(scopes=scopes, plan=plan(limits) if limits else None))
    return wire


async def ask(wire: Wire, body: bytes | dict[str, Any], *lines: str, target: str = CHAT) -> Message:
    raw = body if isinstance(body, bytes) else json.dumps({"messages": MESSAGES, **body}).encode()
    async with wire.client() as client:
        await client.send(request("POST", target, *(lines or (JSON,)), body=raw))
        return await client.answer(seconds=20)


def code(message: Message) -> str:
    return str(json.loads(message.body).get("code"))


def refusals(tokens: str, status: int) -> set[int]:
    """Metered routes refuse a second single place with another row as malformed, whatever its scopes."""
    return {400, 403} if (tokens, status) == ("openai", 403) else {status}


@pytest.mark.parametrize("tokens", ["openai", "none"])
@pytest.mark.parametrize(
    ("scopes", "body", "status", "named"),
    [
        (frozenset(), {"model": "small"}, 200, "small"), (frozenset(), {"model": "small-1"}, 200, "small"),
        (PREMIUM, {"model": "big-1"}, 200, "big"), (frozenset(), {"model": "big"}, 403, None),
        (frozenset({"model:premium"}), {"model": "big"}, 403, None), (PREMIUM, {"model": "SMALL"}, 403, None),
        (PREMIUM, {"model": "small "}, 403, None), (PREMIUM, {"model": "small\0"}, 403, None),
        (PREMIUM, {"model": "unlisted"}, 403, None), (PREMIUM, {"model": ""}, 403, None),
        (PREMIUM, {"model": "x" * 5_000}, 403, None),
        (PREMIUM, {}, 400, None), (PREMIUM, {"model": None}, 400, None), (PREMIUM, {"model": 1}, 400, None),
        (PREMIUM, {"model": ["small"]}, 400, None), (PREMIUM, b"[]", 400, None), (PREMIUM, b"", 400, None),
        (PREMIUM, b"  ", 400, None), (PREMIUM, b'{"model":"small"', 400, None),
        (PREMIUM, b'{"model":"small","model":"small"}', 400, None),
        (PREMIUM, b'{"model":"small","Model":"x"}', 400, None),
        (PREMIUM, b'{"model":"small","mo\\u0064el":"big"}', 400, None),
        (PREMIUM, b'{"model":"small","model\\u0000":"big"}', 400, None),
    ],
)  # fmt: skip
async def test_a_model_needs_a_row_and_all_its_scopes(
    start: Start, tokens: str, scopes: frozenset[str], body: Any, status: int, named: str | None
) -> None:
    wire = await judging(start, scopes=scopes, tokens=tokens, model="" if tokens == "openai" else "json:model")
    told = await ask(wire, body)
    assert told.status == status
    if status == 200:
        assert wire.upstream.requests[-1].one("X-Keyproxy-Model") == named
        assert wire.recorder.seen[-1].model == named
    else:
        assert code(told) == {400: "request_malformed", 403: "model_not_allowed"}[status]
        assert not wire.upstream.requests


async def test_a_missing_scope_of_a_model_is_named_in_the_challenge(start: Start) -> None:
    wire = await judging(start, error_shape="openai")
    told = await ask(wire, {"model": "big"})
    challenge = 'Api-Key realm="keyproxy", error="insufficient_scope", scope="model:beta"'
    assert (told.status, told.one("WWW-Authenticate")) == (403, challenge)
    error = json.loads(told.body)["error"]
    assert (error["code"], error["param"]) == ("model_not_allowed", "model")
    told = await ask(wire, {"model": "unlisted"})
    assert (told.status, told.one("WWW-Authenticate")) == (403, None)


@pytest.mark.parametrize("tokens", ["openai", "none"])
@pytest.mark.parametrize(
    ("more", "query", "status"),
    [
        ({"models": ["small-1", None]}, "", 400), ({"models": ["small-1"]}, "", 200), ({"models": ["big"]}, "", 403),
        ({"models": None}, "", 200), ({"models": "big"}, "", 403), ({"models": {"big": ["small"]}}, "", 400),
        ({"fallbacks": [{"model": "big"}]}, "", 403), ({"fallbacks": [{"model": "small"}]}, "", 200),
        ({"fallbacks": [{"big": ["small"]}]}, "", 403), ({"fallbacks": [{"small": ["big"]}]}, "", 403),
        ({"fallbacks": [{"small": ["small-1"]}]}, "", 200), ({"fallbacks": [1]}, "", 400),
        ({"fallbacks": [{"model": "small", "temperature": 1, "stop": []}]}, "", 200),
        ({"fallbacks": [{"small": ["big"], "model": "small"}]}, "", 400),
        ({"fallbacks": [{"model": "small", "fallbacks": [{"big": []}]}]}, "", 400),
        ({"__proto__": {"models": ["big"]}}, "", 400),
        ({"context_window_fallbacks": [{"small": ["big"]}]}, "", 403), ({"content_policy_fallbacks": ["x"]}, "", 403),
        ({}, "?model=big", 403), ({}, "?model=small-1", 200), ({}, "?models=big", 403), ({}, "?models=small", 200),
        ({}, "?model[]=small", 400), ({}, "?Model=small", 400), ({}, "?model=small&model=small", 400),
        ({}, "?x=1;model=big", 400), ({}, "?model=small;x", 400), ({}, "?modele=big", 200), ({}, "?mod%65l=big", 403),
        ({}, "?model%00=big", 400), ({}, "?fallbacks=small,big", 403),
    ],
)  # fmt: skip
async def test_every_other_place_that_names_a_model_is_judged_alike(
    start: Start, tokens: str, more: dict[str, Any], query: str, status: int
) -> None:
    wire = await judging(start, tokens=tokens, model="json:model")
    told = await ask(wire, {"model": "small", **more}, target=CHAT + query)
    assert told.status in refusals(tokens, status)
    assert len(wire.upstream.requests) == (status == 200)


@pytest.mark.parametrize(
    "value",
    [
        '[{"model":"small","model":"big"}]', '[{"model":"small","Model":"big"}]', '[{"MODEL":["small"]}]',
        '[{"small":["big"],"small":["small"]}]', '[{"small":["big"],"Small":["small"]}]',
    ],
)  # fmt: skip
async def test_doubled_names_within_a_list_of_models_are_refused(start: Start, value: str) -> None:
    wire = await judging(start, scopes=PREMIUM)
    body = b'{"model":"small","messages":[],"fallbacks":%b}' % value.encode()
    assert (await ask(wire, body)).status == 400


@pytest.mark.parametrize(
    ("row", "target", "lines", "body", "status"),
    [
        ({"model": "query:m"}, f"{CHAT}?m=small", (JSON,), {}, 200),
        ({"model": "query:m"}, f"{CHAT}?m=big", (JSON,), {}, 403),
        ({"model": "query:m"}, CHAT, (JSON,), {"m": "small"}, 400),
        ({"model": "query:m"}, f"{CHAT}?m=small", (JSON,), {"model": "big"}, 403),
        ({"model": "query:m"}, f"{CHAT}?m=small", (JSON,), b"", 200),
        ({"model": "query:m"}, f"{CHAT}?m=small", (JSON,), b"[]", 400),
        ({"model": "query:m"}, f"{CHAT}?m=small", ("Content-Type: text/plain",), b'{"model":"big"}', 403),
        ({"model": "query:m"}, f"{CHAT}?m=small", ("Content-Type: text/plain",), b'\xef\xbb\xbf{"model":"big"}', 400),
        ({"model": "query:m"}, f"{CHAT}?m=small", ("Content-Type: text/plain",), b"hello", 200),
        ({"model": "query:m"}, f"{CHAT}?m=small", (PAIRS,), b"model=big", 403),
        ({"model": "query:m"}, f"{CHAT}?m=small", (PAIRS,), b"model=small&x=%00", 200),
        ({"model": "query:m"}, f"{CHAT}?m=small", (PAIRS,), b'{"model":"big"}', 400),
        ({"model": "query:m"}, f"{CHAT}?m=small", ("Content-Type: text",), b"x", 400),
        ({"model": "header:X-Model"}, CHAT, (JSON, "X-Model: small"), {}, 200),
        ({"model": "header:X-Model"}, CHAT, (JSON, "x-model: big"), {}, 403),
        ({"model": "header:X-Model"}, CHAT, (JSON, "X-Model: small", "X-Model: small"), {}, 400),
        ({"model": "header:X-Model"}, CHAT, (JSON, "X-Model: small, big"), {}, 403),
        ({"model": "header:X-Model"}, CHAT, (JSON,), {}, 400),
        ({"model": "path:m", "match": "POST /v1/{m}/run"}, "/v1/small/run", (JSON,), {}, 200),
        ({"model": "path:m", "match": "POST /v1/{m}/run"}, "/v1/sm%61ll/run", (JSON,), {}, 200),
        ({"model": "path:m", "match": "POST /v1/{m}/run"}, "/v1/big/run", (JSON,), {}, 403),
        ({"model": "path:m", "match": "POST /v1/{m}/run"}, "/v1/small;x/run", (JSON,), {}, 403),
        ({"model": "json:engine", "match": "POST /v1/{model}/run"}, "/v1/big/run", (JSON,), {"engine": "small"}, 403),
        ({"model": "json:engine"}, CHAT, (JSON,), {"engine": "small", "model": "big"}, 403),
        ({"model": "json:engine"}, CHAT, (JSON,), {"engine": "small", "model": "small"}, 200),
        ({"model": "json:engine"}, CHAT, ("Content-Type: text/plain",), {"engine": "small"}, 400),
        ({"model": "json:engine"}, CHAT, ("Content-Type: application/x+json",), {"engine": "small"}, 200),
        ({"model": "json:engine"}, CHAT, ("X-None: 1",), {"engine": "small"}, 200),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokens", ["openai", "none"])
async def test_the_model_is_read_where_the_route_reads_it(
    start: Start, tokens: str, row: dict[str, Any], target: str, lines: tuple[str, ...], body: Any, status: int
) -> None:
    wire = await judging(start, **(row | {"tokens": tokens}))
    told = await ask(wire, body, *lines, target=target)
    assert told.status in refusals(tokens, status)
    if status == 200:
        assert wire.upstream.requests[-1].one("X-Keyproxy-Model") == "small"


@pytest.mark.parametrize("tokens", ["openai", "none"])
@pytest.mark.parametrize(
    ("parts", "status"),
    [
        (('name="model"\r\n\r\nsmall',), 200), (('name="model"\r\n\r\nbig',), 403), ((), 400),
        (('name="x"\r\n\r\nsmall',), 400), (('name="model"\r\n\r\nsmall', 'name="model"\r\n\r\nbig'), 400),
        (('name="model"\r\n\r\nsmall', 'name="models"\r\n\r\nbig'), 403),
        (('name="model"\r\n\r\nsmall', 'name="file"; filename="a.wav"\r\n\r\nRIFF\n\r\n\x00'), 200),
        (('name="model"; filename="m"\r\n\r\nsmall',), 400), (('name="model"\r\n\r\n\xff',), 400),
    ],
)  # fmt: skip
async def test_the_model_of_a_form_is_read_from_its_parts(
    start: Start, tokens: str, parts: tuple[str, ...], status: int
) -> None:
    wire = await judging(start, model="form:model", tokens=tokens)
    body = "".join(f"--b\r\nContent-Disposition: form-data; {part}\r\n" for part in parts) + "--b--\r\n"
    told = await ask(wire, body.encode("latin-1"), FORM)
    assert told.status == status
    if status == 200:
        assert wire.upstream.requests[-1].body == body.encode("latin-1")
        assert wire.upstream.requests[-1].one("X-Keyproxy-Model") == "small"
        assert wire.recorder.seen[-1].model == "small"


async def test_a_form_beside_another_source_is_judged_too(start: Start) -> None:
    wire = await judging(start, model="query:m")
    body = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nbig\r\n--b--\r\n'
    assert (await ask(wire, body, FORM, target=f"{CHAT}?m=small")).status == 403
    assert not wire.upstream.requests
    assert (await ask(wire, body.replace(b"big", b"small"), FORM, target=f"{CHAT}?m=small")).status == 200


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v1beta/models/small:generateContent", 200), ("/v1beta/models/big:generateContent", 403),
        ("/v1beta/models/small:generateContent?model=big", 400), ("/v1beta/models/big-1:generateContent", 403),
        ("/v1beta/models/small;x:generateContent", 403), ("/v1beta/models/x:small:generateContent", 403),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", ["", "path:model"])
async def test_the_model_before_a_verb_in_the_path_is_judged(
    start: Start, model: str, target: str, status: int
) -> None:
    match = "POST /v1beta/models/{model}:generateContent"
    wire = await judging(start, match=match, tokens="gemini", model=model)
    told = await ask(wire, b'{"contents":[{"parts":[{"text":"hi"}]}]}', target=target)
    assert told.status in refusals("openai", status)


@pytest.mark.parametrize("tokens", ["openai", "none"])
@pytest.mark.parametrize("value", ["%b", "[%b]", "-%b", '[{"small":[%b]}]', '[{"model":%b}]'])
async def test_a_number_of_any_length_is_no_model(start: Start, tokens: str, value: str) -> None:
    wire = await judging(start, tokens=tokens, model="json:model")
    for digits in (1, 4_300, 4_301, 16_000):
        number = value.encode() % (b"1" * digits)
        told = await ask(wire, b'{"model":"small","messages":[],"fallbacks":%b}' % number)
        assert (told.status, code(told)) == (400, "request_malformed")


async def test_an_owned_model_needs_no_row(start: Start) -> None:
    wire = await judging(start)
    wire.owned_ids.add("model", "ft:acme/small", "acme", is_slow=True)
    wire.owned_ids.add("model", "ft:globex/small", "globex")
    assert (await ask(wire, {"model": "ft:acme/small"})).status == 200
    assert wire.upstream.requests[-1].one("X-Keyproxy-Model") == "ft:acme/small"
    assert wire.owned_ids.brought == 1
    for foreign in ("ft:globex/small", "ft:unknown", "a/../b"):
        assert code(await ask(wire, {"model": foreign})) == "model_not_allowed"
    wire.owned_ids.is_down = True
    wire.owned_ids.add("model", "ft:acme/other", "acme", is_slow=True)
    assert (await ask(wire, {"model": "ft:acme/other"})).status == 503


async def test_without_scopes_of_models_a_metered_route_takes_any_model(start: Start) -> None:
    wire = await start(
        serving=Upstream(answer_with(openai_usage(1, 1))), rows=[RouteRow(f"POST {CHAT}", tokens="openai")],
        models=[SMALL],
    )  # fmt: skip
    assert (await ask(wire, {"model": "unlisted"})).status == 200


async def test_a_route_can_be_opened_again(start: Start) -> None:
    wire = await judging(start, model="none")
    assert (await ask(wire, {"model": "unlisted"})).status == 200
    assert (await ask(wire, {"model": "big"})).status == 200


async def test_the_client_cannot_set_the_model_header(start: Start) -> None:
    wire = await judging(start)
    lines = (JSON, "X-Keyproxy-Model: big", "x_keyproxy_model: big", "X-Keyproxy-Category: code")
    assert (await ask(wire, {"model": "small"}, *lines)).status == 200
    assert wire.upstream.requests[-1].one("X-Keyproxy-Model") == "small"
    assert wire.upstream.requests[-1].one("X-Keyproxy-Category") is None


async def test_a_websocket_handshake_is_judged_by_its_query_and_refused_where_the_body_is_read(start: Start) -> None:
    lines = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: " + "a" * 24)
    for model, target, status in (
        ("query:model", "/v1/realtime?model=small", 200), ("query:model", "/v1/realtime?model=big", 403),
        ("", "/v1/realtime?model=small", 400), ("form:model", "/v1/realtime?model=small", 400),
    ):  # fmt: skip
        wire = await judging(start, match="GET /v1/realtime", model=model)
        async with wire.client() as client:
            await client.send(request("GET", target, *lines))
            assert (await client.answer()).status == status


async def test_a_compressed_body_is_judged_by_its_content(start: Start) -> None:
    wire = await judging(start, tokens="none", model="json:model")
    coded = (JSON, "Content-Encoding: gzip")
    assert (await ask(wire, gzip.compress(b'{"model":"small"}'), *coded)).status == 200
    assert (await ask(wire, gzip.compress(b'{"model":"big"}'), *coded)).status == 403


async def test_a_large_body_is_judged_in_portions_and_forwarded_as_sent(start: Start) -> None:
    wire = await judging(start, tokens="none", model="json:model", limits="concurrency=4")
    body = json.dumps({"text": "word " * 400_000, "model": "small"}).encode()
    assert (await ask(wire, body)).status == 200
    assert wire.upstream.requests[-1].body == body
    assert (await ask(wire, body.replace(b"small", b"big"))).status == 403
    assert (await ask(wire, body * 5)).status == 413


async def test_a_refused_model_consumes_nothing_and_a_spent_window_refuses_before_the_body(start: Start) -> None:
    wire = await judging(start, tokens="none", model="json:model", limits="requests/day=1")
    assert (await ask(wire, {"model": "big"})).status == 403
    assert not wire.ledger.settled
    assert (await ask(wire, {"model": "small"})).status == 200
    async with wire.client() as client:
        await client.send(request("POST", CHAT, JSON, "Content-Length: 17"))
        assert (await client.answer()).status == 429


async def test_a_stream_ends_when_its_model_is_no_longer_allowed(start: Start) -> None:
    async def streaming(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await asyncio.sleep(30)
        return False

    wire = await start(
        serving=Upstream(streaming), models=[SMALL, BIG],
        rows=[RouteRow(f"POST {CHAT}", tokens="openai"), RouteRow("POST /plain", model="json:model")],
    )  # fmt: skip
    for target in (CHAT, "/plain"):
        wire.identities.add(fakes.key(1), fakes.identity(scopes=PREMIUM))
        async with wire.client() as client:
            await client.send(request("POST", target, JSON, body=b'{"model":"big","stream":true}'))
            await until(lambda: bool(wire.upstream.requests), "the stream has begun")
            wire.identities.add(fakes.key(1), fakes.identity(scopes=frozenset()))
            seen = len(wire.recorder.seen)
            await until(lambda seen=seen: len(wire.recorder.seen) > seen, "it was ended", seconds=3)  # type: ignore[misc]
        assert (wire.recorder.seen[-1].ending, wire.recorder.seen[-1].reason) == (Ending.CUT, Reason.MODEL_NOT_ALLOWED)
        wire.upstream.requests.clear()


async def test_owners_of_models_and_of_bound_ids_are_looked_up_in_one_round(start: Start) -> None:
    binds = [{"value": "query:id", "owned": "collection"}]
    wire = await judging(start, tokens="none", model="json:model", binds=binds)
    wire.owned_ids.add("model", "mine", "acme", is_slow=True)
    wire.owned_ids.add("collection", "c-1", "acme", is_slow=True)
    assert (await ask(wire, {"model": "mine"}, target=f"{CHAT}?id=c-1")).status == 200
    assert wire.owned_ids.brought == 2
    assert code(await ask(wire, {"model": "theirs"}, target=f"{CHAT}?id=c-2")) == "model_not_allowed"


UTF_7 = b'{"model":"small","a":"+ACI-,+ACI-model+ACI-:+ACI-big","messages":[]}'


@pytest.mark.parametrize("tokens", ["openai", "none"])
@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (UTF_7, "application/json; charset=utf-7", 400), (UTF_7, 'application/json; x=1; charset="UTF-7"', 400),
        (UTF_7, "application/json; charset=utf-8; charset=utf-7", 400), (UTF_7, "application/json; x=urlencoded", 400),
        (UTF_7, "application/vnd.x+json; charset=unicode_escape", 400), (UTF_7, "text/plain, a/b+json", 400),
        (UTF_7, "application/json; charset=UTF-8", 200), (UTF_7, "application/json; version=1", 200),
    ],
)  # fmt: skip
async def test_no_charset_or_second_type_makes_another_model_of_a_body(
    start: Start, tokens: str, body: bytes, content_type: str, status: int
) -> None:
    wire = await judging(start, tokens=tokens, model="json:model")
    told = await ask(wire, body, f"Content-Type: {content_type}")
    assert (told.status, len(wire.upstream.requests)) == (status, status == 200)


async def test_a_metered_body_is_read_in_the_charset_of_its_price(start: Start) -> None:
    wire = await judging(start, tokens="openai", model="none")
    assert (await ask(wire, UTF_7, "Content-Type: application/json; charset=utf-7")).status == 400
    assert (await ask(wire, UTF_7, "Content-Type: application/json; charset=utf-8")).status == 200


async def test_a_form_of_another_type_is_no_unread_body(start: Start) -> None:
    wire = await judging(start, tokens="none", model="query:model")
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nbig\r\n--b--\r\n'
    for media_type in ("multipart/mixed", "multipart/related", "Multipart/X"):
        told = await ask(wire, form, f"Content-Type: {media_type}; boundary=b", target=f"{CHAT}?model=small")
        assert (told.status, code(told)) == (400, "request_malformed")
    assert (
        await ask(wire, b"model=big", "Content-Type: text/x-urlencoded", target=f"{CHAT}?model=small")
    ).status == 400
    assert (await ask(wire, b"model: big", "Content-Type: text/plain", target=f"{CHAT}?model=small")).status == 200


FORM_IN_JSON = b'{"model":"small","messages":[],"x":"&model=big&"}'


@pytest.mark.parametrize("tokens", ["openai", "none"])
async def test_no_body_without_a_type_names_another_model_as_a_form(start: Start, tokens: str) -> None:
    wire = await judging(start, tokens=tokens, model="json:model")
    for part in (b"&model=big&", b"&mod%65l=big", b"&models[]=big", b"&[model]=big", b"a;model=big&b"):
        told = await ask(wire, FORM_IN_JSON.replace(b"&model=big&", part), "X: y")
        assert (told.status, code(told)) == (400, "request_malformed")
    assert (await ask(wire, gzip.compress(FORM_IN_JSON), "Content-Encoding: gzip")).status == 400
    assert not wire.upstream.requests
    assert (await ask(wire, FORM_IN_JSON.replace(b"&model", b"&mode"), "X: y")).status == 200
    assert (await ask(wire, FORM_IN_JSON)).status == 200


async def test_no_compressed_form_hides_another_one(start: Start) -> None:
    """gzip has room for a comment, which is a pair to a server that ignores Content-Encoding."""
    wire = await judging(start, tokens="none", model="query:model")
    packed = gzip.compress(b"x=1")
    commented = packed[:3] + bytes([packed[3] | 16]) + packed[4:10] + b"&model=big&\0" + packed[10:]
    for body in (packed, commented):
        told = await ask(wire, body, PAIRS, "Content-Encoding: gzip", target=f"{CHAT}?model=small")
        assert (told.status, code(told)) == (400, "request_malformed")
    assert (await ask(wire, b"x=1", PAIRS, target=f"{CHAT}?model=small")).status == 200
