"""A request reserves the figures of its design: input by estimate or by length, output by its maximum or a cap."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.ai.dialects.table import DIALECTS, TOKENLESS
from keyproxy.ai.models import Candidates, Model, price_of
from keyproxy.ai.requests.request_facts import RequestFacts
from keyproxy.ai.requests.request_reading import BodyBounds, ReadingRules, facts_of_form
from keyproxy.ai.reservation import (
    BYTES,
    OFF,
    REFUSE,
    MaximumRequiredError,
    TokenNeed,
    TokenRules,
    need_of,
    reasoning_reservation,
    tunnel_need,
)
from tests.ai.requests_support import HELLO, endpoint, facts, fields

RULES = TokenRules()
UNLISTED = Candidates(None)
LOREM = {"model": "gpt-4o", "messages": [{"role": "user", "content": "lorem " * 20_000}]}
GA = {"model": "gpt-4o", "messages": [{"role": "user", "content": "가" * 12_000}]}
GEMINI = {"contents": [{"role": "user", "parts": [{"text": "Hello, how are you?"}]}]}
OLLAMA = {"model": "llama3.2", "messages": [{"role": "user", "content": "why is the sky blue?"}]}


def reserved(found: RequestFacts, *, left: int = 10**9, **options: Any) -> tuple[int, int | None]:
    options.setdefault("candidates", UNLISTED)
    need = need_of(found, options.pop("rules", RULES), options.pop("candidates"), **options)
    return need.tokens_in, need.output_within(left - need.tokens_in)


@pytest.mark.parametrize(
    ("body", "dialect", "path", "options", "tokens_in", "output"),
    [
        ({**HELLO, "max_tokens": 50}, "openai", None, {}, 18, 50),
        ({**HELLO, "max_tokens": 50, "n": 3}, "openai", None, {}, 18, 150),
        (HELLO, "openai", None, {"tokens_per_request": 500}, 18, 482),
        (HELLO, "openai", None, {"left": 300}, 18, 282),
        (HELLO, "openai", None, {}, 18, 4_096),
        (LOREM, "openai", None, {}, 20_012, 4_096),
        (GA, "openai", None, {}, 15_012, 4_096),
        (json.dumps(GA, ensure_ascii=False).encode(), "openai", None, {}, 15_012, 4_096),
        ({**HELLO, "model": "claude-x"}, "anthropic", b"/v1/messages/count_tokens", {}, 17, 0),
        ({"model": "omni-moderation-latest", "input": "I want to hurt them"}, "openai", b"/v1/moderations", {}, 14, 0),
        ({"model": "gpt-4o", "input": "x", "previous_response_id": "resp_1", "max_output_tokens": 50}, "openai",
         b"/v1/responses", {}, 131_072, 50),
        (OLLAMA, "ollama", b"/api/chat", {}, 18, 4_096),
        (GEMINI, "gemini", None, {}, 14, 4_096),
        ({**HELLO, "stream": True, "max_tokens": 8192}, "openai", None, {}, 18, 8_192),
    ],
)  # fmt: skip
def test_a_request_reserves_the_figures_of_the_design(
    body: Any, dialect: str, path: bytes | None, options: dict[str, Any], tokens_in: int, output: int
) -> None:
    assert reserved(facts(body, dialect, path), **options) == (tokens_in, output)


@pytest.mark.parametrize(
    ("body", "dialect", "path", "tokens"),
    [
        (HELLO, "openai", None, len(json.dumps(HELLO))),
        ({"input": [1, 2]}, "openai", b"/v1/embeddings", len('{"input": [1, 2]}')),
        ({"x": {"image_url": "https://x"}}, "openai", None, len('{"x": {"image_url": "https://x"}}') + 1_500),
        ({"x": {"image_url": "https://x"}}, "gemini", None, len('{"x": {"image_url": "https://x"}}') + 1_300),
        ({"x": {"image_url": "https://x"}}, "anthropic", None, len('{"x": {"image_url": "https://x"}}') + 4_800),
    ],
)
def test_by_length_the_input_is_the_body_s_with_its_media(
    body: dict[str, Any], dialect: str, path: bytes | None, tokens: int
) -> None:
    rules = TokenRules(input_bound=BYTES)
    assert reserved(facts(body, dialect, path), rules=rules)[0] == tokens


IMAGE = {"type": "image_url", "image_url": {"url": "https://x"}}
LOW = {"type": "image_url", "image_url": {"url": "https://x", "detail": "low"}}


@pytest.mark.parametrize(
    ("dialect", "part", "image_tokens", "tokens"),
    [
        ("openai", IMAGE, 0, 1_500), ("openai", LOW, 0, 85), ("gemini", IMAGE, 0, 1_300), ("anthropic", IMAGE, 0, 4_800),
        ("bedrock", IMAGE, 0, 4_800), ("ollama", IMAGE, 0, 4_800), ("header", IMAGE, 0, 4_800),
        ("openai", IMAGE, 48_169, 48_169), ("openai", LOW, 48_169, 48_169),
    ],
)  # fmt: skip
def test_an_image_counts_by_its_dialect_or_its_model(
    dialect: str, part: dict[str, Any], image_tokens: int, tokens: int
) -> None:
    found = facts({"messages": [{"content": [part, part]}]}, dialect)
    candidates = Candidates(Model("m", image_tokens=image_tokens))
    assert reserved(found, candidates=candidates)[0] == 2 * tokens + 4 + 3


@pytest.mark.parametrize(
    ("dialect", "members", "tokens"),
    [
        ("anthropic", {"tools": [{"name": "t"}]}, 1_000),
        ("anthropic", {"tools": []}, 0),
        ("bedrock", {"toolConfig": {"tools": []}}, 1_000),
        ("openai", {"tools": [{"name": "t"}]}, 0),
        ("gemini", {"tools": [{"name": "t"}]}, 0),
    ],
)
def test_tools_add_what_the_provider_writes_before_them(dialect: str, members: dict[str, Any], tokens: int) -> None:
    found = facts(members, dialect)
    assert reserved(found)[0] == found.text_tokens + 3 + tokens


# -- output


@pytest.mark.parametrize(
    ("members", "model_max", "output"),
    [
        ({"max_tokens": 50}, 0, 50),
        ({"max_tokens": 0}, 0, 0),
        ({"max_tokens": 50}, 50, 50),
        ({"max_tokens": 51}, 50, 50),
        ({"max_tokens": 51, "n": 2}, 50, 100),
        ({}, 1_000, 1_000),
        ({"n": 3}, 1_000, 3_000),
        ({"n": 3}, 0, 12_288),
        ({}, 4_097, 4_096),
        ({}, 8, 8),
    ],
)
def test_the_output_is_at_most_the_model_s_maximum_for_each_choice(
    members: dict[str, Any], model_max: int, output: int
) -> None:
    candidates = Candidates(Model("m", output_tokens_max=model_max))
    assert reserved(facts({**HELLO, **members}), candidates=candidates)[1] == output


@pytest.mark.parametrize(
    ("members", "left", "output", "cap"),
    [
        ({}, 18 + 4_096, 4_096, 4_096),
        ({}, 18 + 4_095, 4_095, 4_095),
        ({}, 18 + 16, 16, 16),
        ({}, 18 + 15, None, 0),
        ({}, 18, None, 0),
        ({}, 0, None, 0),
        ({"n": 3}, 18 + 1_000, 999, 333),
        ({"n": 3}, 18 + 48, 48, 16),
        ({"n": 3}, 18 + 47, None, 0),
        ({"max_tokens": 50}, 18 + 50, 50, 50),
        ({"max_tokens": 50}, 18 + 49, None, 0),
        ({"max_tokens": 5}, 18 + 5, 5, 5),
        ({"max_tokens": 0}, 18, 0, 0),
    ],
)
def test_a_cap_is_what_is_left_for_each_choice_and_not_below_the_minimum(
    members: dict[str, Any], left: int, output: int | None, cap: int
) -> None:
    need = need_of(facts({**HELLO, **members}), RULES, UNLISTED)
    found = need.output_within(left - need.tokens_in)
    assert found == output
    assert found is None or need.cap(found) == cap
    assert need.inserts is ("max_tokens" not in members)


@pytest.mark.parametrize(
    ("per_request", "output", "fits"),
    [(18 + 5_000, 4_096, True), (18 + 16, 16, True), (18 + 15, 16, False), (1, 16, False)],
)
def test_a_limit_per_request_bounds_the_cap(per_request: int, output: int, fits: bool) -> None:
    need = need_of(facts(HELLO), RULES, UNLISTED, tokens_per_request=per_request)
    assert need.output_most == output
    assert (need.least <= per_request) is fits


@pytest.mark.parametrize(
    ("dialect", "path", "body", "output"),
    [
        ("openai", b"/v1/images/generations", {"prompt": "a cat", "n": 4}, 4_096),
        ("openai", b"/v1/audio/speech", {"input": "hi"}, 4_096),
        ("openai", b"/v1/elsewhere", {"a": 1, "n": 3}, 4_096),
        ("openai", b"/v1/elsewhere", {"max_tokens": 7, "n": 3}, 21),
        ("header", None, {"max_tokens": 7}, 4_096),
        ("header", None, b"", 4_096),
        ("openai", b"/v1/embeddings", {"input": "hi", "max_tokens": 9}, 0),
        ("gemini", b"/v1beta/models/g:countTokens", GEMINI, 0),
        ("ollama", b"/api/embed", {"input": "x"}, 0),
    ],
)
def test_other_endpoints_insert_nothing(dialect: str, path: bytes | None, body: Any, output: int) -> None:
    need = need_of(facts(body, dialect, path), RULES, UNLISTED, cap=REFUSE)
    assert (need.output_most, need.inserts) == (output, False)


def test_tokenless_endpoints_reserve_nothing() -> None:
    assert reserved(RequestFacts(DIALECTS["openai"], TOKENLESS, 0)) == (0, 0)


def test_a_form_reserves_input_by_its_length() -> None:
    rules = ReadingRules(DIALECTS["openai"], BodyBounds())
    row = endpoint(path=b"/v1/audio/transcriptions")
    assert reserved(facts_of_form(rules, row, 1_000_000)) == (4_000, 4_096)
    assert reserved(facts_of_form(rules, row, -1)) == (131_072, 4_096)


def test_a_route_that_refuses_uncapped_requests_needs_a_maximum() -> None:
    with pytest.raises(MaximumRequiredError):
        need_of(facts(HELLO), RULES, UNLISTED, cap=REFUSE)
    assert need_of(facts({**HELLO, "max_tokens": 9}), RULES, UNLISTED, cap=REFUSE).output_most == 9


def test_a_route_without_caps_reserves_alike_and_inserts_nothing() -> None:
    need = need_of(facts(HELLO), RULES, UNLISTED, cap=OFF, tokens_per_request=500)
    assert (need.output_most, need.inserts) == (482, False)


def test_a_body_into_which_no_cap_can_be_inserted_needs_a_maximum() -> None:
    with pytest.raises(MaximumRequiredError):
        need_of(facts(b"[1,2]"), RULES, UNLISTED)
    with pytest.raises(MaximumRequiredError):
        need_of(facts(b"a prompt", given=fields(b"text/plain")), RULES, UNLISTED)


@pytest.mark.parametrize("body", [b"", b" \r\n"])
def test_an_empty_body_reserves_like_any_other_into_which_no_cap_can_be_inserted(body: bytes) -> None:
    with pytest.raises(MaximumRequiredError):
        need_of(facts(body), RULES, UNLISTED)
    uncapped = need_of(facts(body), RULES, UNLISTED, cap=OFF)
    assert (uncapped.tokens_in, uncapped.output_most) == (3, 4_096)


@pytest.mark.parametrize("path", [b"/v1/responses/resp_1/cancel", b"/v1/embeddings", b"/v1/images/edits"])
def test_an_empty_body_on_an_endpoint_that_does_not_generate_text_reserves_nothing(path: bytes) -> None:
    assert reserved(facts(b"", "openai", path)) == (0, 0)


# -- content that is not in the request


@pytest.mark.parametrize(
    ("context_max", "per_request", "body", "expected"),
    [
        (0, None, {"max_output_tokens": 50}, (131_072, 50)),
        (200_000, None, {"max_output_tokens": 50}, (200_000, 50)),
        (200_000, 1_000, {"max_output_tokens": 50}, (950, 50)),
        (0, 1_000, {}, (0, 1_000)),
        (0, 10_000, {}, (5_904, 4_096)),
        (0, None, {}, (131_072, 4_096)),
    ],
)
def test_a_reference_reserves_the_context_or_the_limit_per_request(
    context_max: int, per_request: int | None, body: dict[str, Any], expected: tuple[int, int]
) -> None:
    found = facts({"previous_response_id": "resp_1", **body}, path=b"/v1/responses")
    candidates = Candidates(Model("m", context_tokens_max=context_max))
    assert reserved(found, candidates=candidates, tokens_per_request=per_request) == expected


@pytest.mark.parametrize(("per_request", "tokens"), [(None, 131_072), (500, 500)])
def test_a_tunnel_reserves_the_limit_per_request_or_the_unknown_input(per_request: int | None, tokens: int) -> None:
    assert tunnel_need(RULES, per_request).most == tokens


@pytest.mark.parametrize(
    ("reasons", "thinking", "tokens"), [(False, None, 0), (False, 100, 0), (True, None, 8_192), (True, 100, 100),
                                        (True, 9_000, 8_192)]
)  # fmt: skip
def test_an_aborted_stream_of_a_reasoning_model_is_charged_its_reasoning(
    reasons: bool, thinking: int | None, tokens: int
) -> None:
    members = {} if thinking is None else {"thinking": {"budget_tokens": thinking}}
    found = facts({**HELLO, "max_tokens": 8_192, **members}, "anthropic")
    candidates = Candidates(Model("m", reasons=reasons))
    assert reasoning_reservation(candidates, 8_192, found.thinking, found.multiplier) == tokens


@given(st.integers(0, 10**6), st.integers(0, 100), st.integers(1, 10), st.integers(0, 10_000), st.integers(16, 10_000))
def test_a_reservation_of_output_never_exceeds_what_is_left(
    left: int, least: int, multiplier: int, more: int, tokens_in: int
) -> None:
    need = TokenNeed(tokens_in, least * multiplier, (least + more) * multiplier, multiplier=multiplier)
    output = need.output_within(left)
    if output is None:
        assert left < need.output_least
    else:
        assert need.output_least <= output <= min(left, need.output_most)
        assert output % multiplier == 0
        assert left - output < multiplier or output == need.output_most


def test_the_prices_of_the_design() -> None:
    price = price_of(2_500_000, 10_000_000, cached_input=1_250_000)
    assert price is not None
    assert price.reservation(18, 4_096) == 41_005
