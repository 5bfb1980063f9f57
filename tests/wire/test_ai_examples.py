"""The examples of docs/ai-traffic.md through a proxy: what is reserved, what the upstream receives, what is charged."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple

import pytest

from keyproxy.ai.models import Model, price_of
from keyproxy.config.schema import RouteRow
from keyproxy.limits.limit_text import parse_limit
from keyproxy.limits.plan import Plan
from tests import fakes
from tests.rawhttp import Message, Upstream, answer_with
from tests.wire.conftest import Start, Wire, request
from tests.wire.test_limits import STREAM, chunk

JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
CHAT, GENERATE = "/v1/chat/completions", "/v1beta/models/g:generateContent"
HELLO = "Hello, how are you?"
MESSAGES = [{"role": "user", "content": HELLO}]

GPT_4O = Model("gpt-4o", price=price_of(2_500_000, 10_000_000, cached_input=1_250_000))
THINKER = Model("gpt-4r", reasons=True)

DAY = "tokens/day=1000000"


def plan(*limits: str) -> Plan:
    found = [parse_limit(text)[1] for text in limits]
    return Plan([limit for limit in found if limit is not None])


def hello(**more: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": MESSAGES, **more}


def reports(document: object) -> bytes:
    body = json.dumps(document, ensure_ascii=False).encode()
    return JSON % (len(body), body)


def openai_usage(tokens_in: int, tokens_out: int) -> bytes:
    return reports({"usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}})


def strings(*texts: str) -> bytes:
    return reports({"choices": [{"message": {"content": text}} for text in texts]})


async def metered(start: Start, serving: bytes | Upstream, *limits: str, path: str = CHAT, **row: Any) -> Wire:
    """A proxy with one metered route and a user under these limits."""
    upstream = serving if isinstance(serving, Upstream) else Upstream(answer_with(serving))
    settings = row.pop("settings", {})
    match = row.pop("match", f"POST {path}")
    rows = [RouteRow(match, name="chat", **({"tokens": "openai"} | row))]
    wire = await start(serving=upstream, rows=rows, models=[GPT_4O, THINKER], tokens=settings)
    wire.identities.add(fakes.key(1), fakes.identity(plan=plan(*(limits or (DAY,)))))
    return wire


async def ask(wire: Wire, body: object, *lines: str, path: str = CHAT) -> Message:
    raw = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    async with wire.client() as client:
        await client.send(request("POST", path, "Content-Type: application/json", *lines, body=raw))
        return await client.answer(seconds=20)


class Example(NamedTuple):
    """One row: the request, what is reserved, the response, and what is charged."""

    body: Any
    reserved: int
    answer: bytes
    charged: tuple[int, int]
    cap: int | None = None
    is_estimated: bool = False
    dialect: str = "openai"
    path: str = CHAT
    limits: tuple[str, ...] = (DAY,)


EXAMPLES = {
    "a stated maximum": Example(hello(max_tokens=50), 68, openai_usage(13, 9), (13, 9)),
    "three choices": Example(
        hello(max_tokens=50, n=3), 168, strings(*["Hello, world!"] * 3), (18, 12), is_estimated=True
    ),
    "a limit per request": Example(
        hello(), 500, openai_usage(13, 9), (13, 9), cap=482, limits=(DAY, "tokens/request=500")
    ),
    "300 of the day are left": Example(
        hello(), 300, openai_usage(13, 9), (13, 9), cap=282, limits=("tokens/day=300",)
    ),
    "no maximum": Example(hello(), 4_114, openai_usage(13, 9), (13, 9), cap=4_096),
    "a long text": Example(
        hello(messages=[{"role": "user", "content": "lorem " * 20_000}]), 24_108, openai_usage(20_005, 9), (20_005, 9),
        cap=4_096,
    ),
    "Korean": Example(
        hello(messages=[{"role": "user", "content": "가" * 12_000}]), 19_108, reports("Hello world"), (15_012, 2),
        cap=4_096, is_estimated=True,
    ),
    "Korean in escapes": Example(
        json.dumps(hello(messages=[{"role": "user", "content": "가" * 12_000}])).encode(), 19_108,
        reports("Hello world"), (15_012, 2), cap=4_096, is_estimated=True,
    ),
    "a count": Example(
        {"model": "claude-x", "messages": MESSAGES}, 17, reports({"input_tokens": 14}), (14, 0),
        dialect="anthropic", path="/v1/messages/count_tokens",
    ),
    "a moderation": Example(
        {"model": "omni-moderation-latest", "input": "I want to hurt them"}, 14, reports({"results": []}), (14, 0),
        is_estimated=True, path="/v1/moderations",
    ),
    "a conversation that the server keeps": Example(
        {"model": "gpt-4o", "input": HELLO, "previous_response_id": "r_1", "max_output_tokens": 50}, 131_122,
        reports({"usage": {"input_tokens": 100_000, "output_tokens": 50}}), (100_000, 50), path="/v1/responses",
    ),
    "Ollama": Example(
        {"model": "llama3.2", "messages": [{"role": "user", "content": "why is the sky blue?"}], "stream": False},
        4_114, reports({"done": True, "prompt_eval_count": 26, "eval_count": 298}), (26, 298),
        cap=4_096, dialect="ollama", path="/api/chat",
    ),
    "Gemini": Example(
        {"contents": [{"role": "user", "parts": [{"text": HELLO}]}]}, 4_110,
        reports({"usageMetadata": {
            "promptTokenCount": 100, "toolUsePromptTokenCount": 5, "candidatesTokenCount": 20, "thoughtsTokenCount": 30,
        }}), (105, 50), cap=4_096, dialect="gemini", path=GENERATE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
async def test_an_example_is_reserved_and_charged_exactly(start: Start, name: str) -> None:
    one = EXAMPLES[name]
    wire = await metered(start, one.answer, *one.limits, path=one.path, tokens=one.dialect)
    told = await ask(wire, one.body, path=one.path)
    assert told.status == 200
    assert told.one("X-Keyproxy-Tokens-Reserved") == str(one.reserved)
    assert told.one("X-Keyproxy-Output-Cap") == (None if one.cap is None else str(one.cap))
    ((hold, was_sent, charged),) = wire.ledger.settled
    assert (hold.covers, was_sent, charged) == (one.reserved, True, sum(one.charged))
    (seen,) = wire.recorder.seen
    assert seen.use is not None
    assert (seen.use.tokens_in, seen.use.tokens_out) == one.charged
    assert (seen.is_estimated, seen.output_cap) == (one.is_estimated, one.cap or 0)


async def test_only_the_cap_is_inserted_and_the_length_follows(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9))
    sent = b'{"model":"gpt-4o","messages":[{"role":"user","content":"Hello, how are you?"}]}'
    await ask(wire, sent)
    (seen,) = wire.upstream.requests
    assert seen.body == b'{"max_completion_tokens":4096,' + sent[1:]
    assert seen.one("Content-Length") == str(len(seen.body))
    assert seen.one("X-Keyproxy-Model") == "gpt-4o"


@pytest.mark.parametrize(
    ("dialect", "path", "body", "expected"),
    [
        ("openai", "/v1/completions", {"prompt": HELLO}, {"max_tokens": 4_096}),
        ("openai", "/v1/responses", {"input": HELLO}, {"max_output_tokens": 4_096}),
        ("anthropic", "/v1/messages", {"messages": MESSAGES}, {"max_tokens": 4_096}),
        ("gemini", GENERATE, {"contents": []}, {"generationConfig": {"maxOutputTokens": 4_096}}),
        (
            "gemini", GENERATE, {"generationConfig": {"topK": 1}},
            {"generationConfig": {"maxOutputTokens": 4_096, "topK": 1}},
        ),
        ("ollama", "/api/generate", {"prompt": HELLO}, {"options": {"num_predict": 4_096}}),
        ("ollama", "/api/chat", {"options": {"num_predict": -1}}, {"options": {"num_predict": 4_096}}),
        ("bedrock", "/model/m/converse", {"messages": []}, {"inferenceConfig": {"maxTokens": 4_096}}),
    ],
)  # fmt: skip
async def test_the_cap_of_each_dialect_is_inserted_where_it_belongs(
    start: Start, dialect: str, path: str, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    wire = await metered(start, reports({}), path=path, tokens=dialect)
    assert (await ask(wire, body, path=path)).one("X-Keyproxy-Output-Cap") == "4096"
    assert json.loads(wire.upstream.requests[-1].body) == {**body, **expected}


async def test_gemini_s_thoughts_are_reserved_within_its_maximum(start: Start) -> None:
    usage = {"promptTokenCount": 13, "candidatesTokenCount": 10, "thoughtsTokenCount": 40, "totalTokenCount": 63}
    wire = await metered(start, reports({"usageMetadata": usage}), path=GENERATE, tokens="gemini")
    config = {"maxOutputTokens": 50, "thinkingConfig": {"thinkingBudget": 40}}
    told = await ask(wire, {"contents": [{"parts": [{"text": HELLO}]}], "generationConfig": config}, path=GENERATE)
    assert told.one("X-Keyproxy-Tokens-Reserved") == str(13 + 50)
    assert [charged for _, _, charged in wire.ledger.settled] == [63]


async def test_bedrock_s_cached_input_is_charged_beside_its_input(start: Start) -> None:
    usage = {"inputTokens": 4, "cacheReadInputTokens": 90, "cacheWriteInputTokens": 6, "outputTokens": 5}
    path = "/model/m/converse"
    wire = await metered(start, reports({"usage": usage}), path=path, tokens="bedrock")
    await ask(wire, {"messages": [{"content": [{"text": HELLO}]}]}, path=path)
    assert [charged for _, _, charged in wire.ledger.settled] == [105]


async def test_a_setting_selects_the_member_for_the_cap(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), cap_field="max_tokens")
    await ask(wire, hello())
    assert json.loads(wire.upstream.requests[-1].body) == hello(max_tokens=4_096)


async def test_a_reset_before_a_byte_costs_nothing(start: Start) -> None:
    async def resetting(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.transport.abort()
        return False

    wire = await metered(start, Upstream(resetting))
    assert (await ask(wire, hello())).status == 502
    ((hold, was_sent, charged),) = wire.ledger.settled
    assert (hold.covers, was_sent, charged) == (4_114, True, 0)


async def test_money_is_reserved_at_the_dearest_price_and_charged_by_use(start: Start) -> None:
    usage = {"prompt_tokens": 1_000, "completion_tokens": 200, "prompt_tokens_details": {"cached_tokens": 600}}
    wire = await metered(start, reports({"usage": usage}), DAY, "spend/month=50.00")
    await ask(wire, hello(max_tokens=50))
    ((hold, _, _),) = wire.ledger.settled
    assert hold.total_spend == 545
    assert wire.recorder.seen[-1].cost_micros == 3_750


CHEAP = Model("gpt-4o-mini", ("mini",), price=price_of(150_000, 600_000))
DEAR = Model("gpt-4", price=price_of(30_000_000, 60_000_000))
UNPRICED = Model("free")

ALTERNATIVES: dict[str, dict[str, Any]] = {
    "models": {"models": ["gpt-4", "mini"]},
    "fallbacks": {"fallbacks": ["gpt-4o-mini", {"model": "gpt-4"}]},
    "by name": {"context_window_fallbacks": [{"gpt-4o": ["gpt-4", "gpt-4o-mini"]}]},
}


async def several(start: Start, serving: bytes, *limits: str) -> Wire:
    rows = [RouteRow(f"POST {CHAT}", name="chat", tokens="openai")]
    models = [GPT_4O, CHEAP, DEAR, UNPRICED]
    wire = await start(serving=Upstream(answer_with(serving)), rows=rows, models=models)
    wire.identities.add(fakes.key(1), fakes.identity(plan=plan(*limits)))
    return wire


@pytest.mark.parametrize("lists", ALTERNATIVES)
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("named", "cost"),
    [
        ("gpt-4o", 3_000), ("gpt-4o-mini", 180), ("mini", 180), ("gpt-4", 24_000),
        ("gpt-4-0613", 24_000), ("free", 24_000), (None, 24_000),
    ],
)  # fmt: skip
async def test_one_of_several_models_is_charged_as_the_response_names_it_else_as_the_dearest(
    start: Start, lists: str, streams: bool, named: str | None, cost: int
) -> None:
    document: dict[str, Any] = {"usage": {"prompt_tokens": 400, "completion_tokens": 200}}
    if named is not None:
        document["model"] = named
    serving = reports(document)
    if streams:
        serving = STREAM + chunk(f"data: {json.dumps({**document, 'choices': []})}\n\n".encode()) + b"0\r\n\r\n"
    wire = await several(start, serving, DAY, "spend/month=50.00")
    await ask(wire, hello(max_tokens=50, stream=streams, **ALTERNATIVES[lists]))
    ((hold, _, tokens),) = wire.ledger.settled
    assert hold.total_spend == (hold.covers - 50) * 30 + 50 * 60
    seen = wire.recorder.seen[-1]
    assert (tokens, seen.cost_micros, seen.model) == (600, cost, "gpt-4o")


async def test_a_response_that_names_another_model_changes_nothing_without_alternatives(start: Start) -> None:
    document = {"model": "gpt-4o-mini", "usage": {"prompt_tokens": 400, "completion_tokens": 200}}
    wire = await several(start, reports(document), DAY, "spend/month=50.00")
    await ask(wire, hello(max_tokens=50))
    assert wire.recorder.seen[-1].cost_micros == 3_000


async def test_hello_costs_123_micro_units(start: Start) -> None:
    wire = await metered(start, openai_usage(13, 9), DAY, "spend/month=50.00")
    await ask(wire, hello())
    ((hold, _, _),) = wire.ledger.settled
    assert (hold.covers, hold.total_spend) == (4_114, 41_005)
    seen = wire.recorder.seen[-1]
    assert (seen.cost_micros, seen.model, seen.tokens_reserved) == (123, "gpt-4o", 4_114)
