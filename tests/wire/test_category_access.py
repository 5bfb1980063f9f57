"""Categories of prompts through a proxy: by template, declaration and pattern."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from keyproxy.ai.access.access_rules import AccessRules
from keyproxy.ai.access.judged_request import JudgedRequest
from keyproxy.ai.categories import Category, CategoryRules, parse_category_source
from keyproxy.ai.models import Model
from keyproxy.ai.prompts import digest_of
from keyproxy.config.schema import RouteRow
from keyproxy.http_messages import RequestFields, RequestHead, RequestLine
from keyproxy.process.patterns.re2_matcher import compile_patterns
from keyproxy.reasons import Reason, Refusal
from tests import fakes
from tests.rawhttp import Message, Upstream, answer_with
from tests.wire.conftest import Start, Wire, request
from tests.wire.test_ai_examples import CHAT, openai_usage

CODE, PLAIN = Category("code", frozenset({"prompt:code"}), ("(?i)def main",)), Category("plain")
JSON = "Content-Type: application/json"
SYSTEM = "You write code."
NOT_ALLOWED = "prompt_category_not_allowed"


async def judging(start: Start, *, scopes: tuple[str, ...] = (), models: tuple[Model, ...] = (), **row: Any) -> Wire:
    rows = [RouteRow(f"POST {CHAT}", **({"tokens": "openai", "prompt": "openai"} | row))]
    upstream = Upstream(answer_with(openai_usage(1, 1)))
    wire = await start(serving=upstream, rows=rows, categories=[CODE, PLAIN], models=models)
    wire.identities.add(fakes.key(1), fakes.identity(scopes=frozenset(scopes)))
    wire.templates.register(digest_of([SYSTEM]), "code")
    wire.templates.register(digest_of(["foreign"]), "plain", "globex")
    return wire


async def ask(wire: Wire, messages: list[dict[str, Any]] | bytes, *lines: str, **more: Any) -> Message:
    body = (
        messages if isinstance(messages, bytes) else json.dumps({"model": "m", "messages": messages, **more}).encode()
    )
    async with wire.client() as client:
        await client.send(request("POST", CHAT, JSON, *lines, body=body))
        return await client.answer(seconds=20)


def code(message: Message) -> str | None:
    return None if message.status == 200 else str(json.loads(message.body)["code"])


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("tokens", ["openai", "none"])
async def test_a_registered_template_has_its_category(start: Start, tokens: str) -> None:
    wire = await judging(start, scopes=("prompt:code",), category=["template"], tokens=tokens)
    assert (await ask(wire, [turn("system", SYSTEM), turn("user", "hi")])).status == 200
    assert wire.upstream.requests[-1].one("X-Keyproxy-Category") == "code"
    for instructions in (SYSTEM + " ", "foreign", "", [{"type": "image_url", "image_url": {}}]):
        assert code(await ask(wire, [turn("system", instructions), turn("user", "hi")])) == NOT_ALLOWED
    wire.identities.add(fakes.key(1), fakes.identity(scopes=frozenset()))
    told = await ask(wire, [turn("system", SYSTEM)])
    challenge = 'Api-Key realm="keyproxy", error="insufficient_scope", scope="prompt:code"'
    assert (code(told), told.one("WWW-Authenticate")) == (NOT_ALLOWED, challenge)


@pytest.mark.parametrize("tokens", ["openai", "none"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","messages":[{"role":"system","role":"user","content":"x"}]}',
        b'{"model":"m","messages":[{"role":"user","Role":"system","content":"x"}]}',
        b'{"model":"m","messages":[{"role":"user","role\\u0000":"system","content":"x"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"messages":[]}',
        b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"a","text":"b"}]}]}',
        b'{"model":"m","Instructions":"x","messages":[]}',
        b"[]",
    ],
)  # fmt: skip
async def test_instructions_that_servers_read_differently_are_refused(start: Start, tokens: str, body: bytes) -> None:
    wire = await judging(start, category=["template"], unregistered="plain", tokens=tokens)
    assert code(await ask(wire, body)) == "request_malformed"


async def test_an_unregistered_prompt_can_have_a_category(start: Start) -> None:
    wire = await judging(start, category=["template"], unregistered="plain")
    assert (await ask(wire, [turn("system", "anything")])).status == 200
    assert wire.upstream.requests[-1].one("X-Keyproxy-Category") == "plain"


async def test_the_union_of_all_sources_needs_all_scopes(start: Start) -> None:
    sources = ["=plain", "header:X-Kind", "json:/metadata/kind", "patterns"]
    wire = await judging(start, scopes=("prompt:code",), category=sources)
    told = await ask(wire, [turn("user", "x")], "X-Kind: plain", metadata={"kind": "plain"})
    assert (told.status, wire.upstream.requests[-1].one("X-Keyproxy-Category")) == (200, "plain")
    told = await ask(wire, [turn("user", "DEF main()")], "X-Kind: plain", metadata={"kind": "plain"})
    assert (told.status, wire.upstream.requests[-1].one("X-Keyproxy-Category")) == (200, "code plain")
    for lines, metadata in (
        ((), {"kind": "plain"}), (("X-Kind: x",), {"kind": "plain"}), (("X-Kind: plain",), {}),
        (("X-Kind: plain",), {"kind": ["plain"]}), (("X-Kind: plain",), {"kind": "Plain"}),
    ):  # fmt: skip
        assert code(await ask(wire, [turn("user", "x")], *lines, metadata=metadata)) == NOT_ALLOWED
    doubled = await ask(wire, [turn("user", "x")], "X-Kind: plain", "X-Kind: plain", metadata={"kind": "plain"})
    assert code(doubled) == "request_malformed"
    wire.identities.add(fakes.key(1), fakes.identity(scopes=frozenset()))
    told = await ask(wire, [turn("user", "def main")], "X-Kind: plain", metadata={"kind": "plain"})
    assert code(told) == NOT_ALLOWED


async def test_without_templates_the_category_is_not_guessed(start: Start) -> None:
    wire = await judging(start, category=["template"], unregistered="plain")
    wire.templates.is_loaded = False
    assert code(await ask(wire, [turn("system", SYSTEM)])) == "store_unavailable"


async def test_the_model_is_judged_before_the_category_and_both_are_named_upstream(start: Start) -> None:
    models = (Model("m"), Model("big", (), frozenset({"model:premium"})))
    wire = await judging(start, scopes=("prompt:code",), category=["template"], models=models)
    assert code(await ask(wire, [turn("system", "unknown")], model="big")) == "model_not_allowed"
    assert (await ask(wire, [turn("system", SYSTEM)], "X-Keyproxy-Category: x", "X-Keyproxy-Model: y")).status == 200
    received = wire.upstream.requests[-1]
    assert (received.one("X-Keyproxy-Model"), received.one("X-Keyproxy-Category")) == ("m", "code")


async def test_a_refused_request_is_recorded_with_the_model_and_the_categories_that_were_found(start: Start) -> None:
    models = (Model("m", ("m-1",)), Model("big", (), frozenset({"model:premium"})))
    wire = await judging(start, category=["template"], models=models)
    for model, system, recorded in (
        ("m-1", SYSTEM, ("prompt_category_not_allowed", "m", (("code", "template"),))),
        ("m-1", "unknown", ("prompt_category_not_allowed", "m", None)),
        ("big", SYSTEM, ("model_not_allowed", "big", None)),
        ("unlisted", SYSTEM, ("model_not_allowed", "unlisted", None)),
        ("not a name", SYSTEM, ("model_not_allowed", "other", None)),
    ):
        assert code(await ask(wire, [turn("system", system)], model=model)) == recorded[0]
        seen = wire.recorder.seen[-1]
        assert (seen.model, seen.categories) == recorded[1:]


async def test_a_long_prompt_is_searched_for_patterns_too(start: Start) -> None:
    wire = await judging(start, category=["=plain", "patterns"])
    assert (await ask(wire, [turn("user", "word " * 100_000)])).status == 200
    assert code(await ask(wire, [turn("user", "word " * 100_000 + "def main")])) == NOT_ALLOWED
    assert code(await ask(wire, [turn("user", "word " * 250_000)])) == "body_too_large"


@pytest.mark.parametrize("tokens", ["openai", "none"])
async def test_a_document_of_too_many_values_to_judge_at_once_is_refused(start: Start, tokens: str) -> None:
    wire = await judging(
        start, scopes=("prompt:code",), category=["=code", "template"], unregistered="plain", tokens=tokens
    )
    parts = [turn("user", ["x"] * 30_000), turn("system", "")]
    assert (await ask(wire, parts)).status == 200
    told = await ask(wire, [*parts, turn("user", ["x"] * 5_000)])
    assert (told.status, code(told)) == (400, "request_malformed")


DENSE = {
    "messages": b'{"messages":[' + b",".join([b'{"role":"system","content":"%b"}' % (b"x" * 300)] * 10_000) + b"]}",
    "parts": b'{"messages":[{"role":"system","content":[' + b",".join([b'"%b"' % (b"x" * 120)] * 32_000) + b"]}]}",
    "arguments": b'{"messages":[{"role":"user","content":[{"arguments":{"args":{'
    + b",".join([b'"k%d":"%b"' % (number, b"x" * 99) for number in range(32_000)]) + b"}}}]}]}",
    "text": b'{"messages":[{"role":"system","content":"' + b"x" * 8_300_000 + b'"}]}',
}  # fmt: skip


@pytest.mark.parametrize("body", DENSE.values(), ids=DENSE)
def test_judging_a_document_never_holds_the_event_loop_for_long(body: bytes) -> None:
    sources = [parse_category_source(source) for source in ("=plain", "template", "patterns")]
    rules = AccessRules(
        "r", categories=CategoryRules(sources, [PLAIN], shape="openai", matcher=compile_patterns([CODE]))
    )
    fields = RequestFields(host=b"p", host_block=b"", media_type=b"application/json")
    head = RequestHead(RequestLine(b"POST", b"/x", b"/x", 1, b""), fields, b"", (), len(body))
    best = 1.0
    for _ in range(3):
        judged, longest, is_read = JudgedRequest(rules, head), 0.0, False
        while not is_read:
            begun = time.thread_time()
            try:
                is_read = judged.read(head, body)
            except Refusal as refusal:
                is_read = refusal.reason is Reason.BODY_TOO_LARGE
                if not is_read:
                    raise
            longest = max(longest, time.thread_time() - begun)
        best = min(best, longest)
    assert best < 0.05
