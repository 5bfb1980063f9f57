"""A request's body is scanned once for all that determines its tokens, in small portions, and no two parsers disagree."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
import zlib
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyproxy.ai.dialects.table import DIALECTS
from keyproxy.ai.requests.request_facts import TOKENS_MAX
from keyproxy.ai.requests.request_reading import BodyBounds, ReadingRules, RequestReading, facts_of_form, is_collected
from keyproxy.ai.scanning.json_bounds import JsonBounds, JsonError, TooDenseError
from keyproxy.ai.scanning.member_meanings import MEANINGS
from keyproxy.ai.scanning.member_scope import NO_SCOPE, MemberScope, scope_of
from keyproxy.ai.scanning.request_parts import RequestParts
from keyproxy.ai.scanning.request_scanner import RequestScanner
from keyproxy.ai.text_estimate import TextEstimate
from keyproxy.reasons import Reason, Refusal
from tests.ai.requests_support import HELLO, PATHS, endpoint, facts, fields, reading

_MIB = 1 << 20
OPENAI = scope_of(DIALECTS["openai"])


def refused(body: bytes | dict[str, Any], dialect: str = "openai", **options: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        facts(body, dialect, **options)
    return caught.value


# -- members that count


@pytest.mark.parametrize(
    ("dialect", "path", "members", "maximum", "multiplier"),
    [
        ("openai", None, {}, None, 1),
        ("openai", None, {"max_tokens": None}, None, 1),
        ("openai", None, {"max_tokens": 0}, 0, 1),
        ("openai", None, {"max_completion_tokens": 7}, 7, 1),
        ("openai", None, {"max_tokens": 9, "max_completion_tokens": 7}, 9, 1),
        ("openai", None, {"max_output_tokens": 7}, None, 1),
        ("openai", None, {"max_tokens": TOKENS_MAX}, TOKENS_MAX, 1),
        ("openai", None, {"max_tokens": 5, "n": None}, 5, 1),
        ("openai", None, {"max_tokens": 5, "n": 0}, 5, 1),
        ("openai", None, {"max_tokens": 5, "n": 3}, 5, 3),
        ("openai", None, {"n": 3, "best_of": 7}, None, 3),
        ("openai", b"/v1/completions", {"n": 3, "best_of": 7, "prompt": "ab"}, None, 7),
        ("openai", b"/v1/completions", {"prompt": ["a", "b", "c"], "n": 2}, None, 6),
        ("openai", b"/v1/completions", {"prompt": [1, 2, 3]}, None, 1),
        ("openai", b"/v1/completions", {"prompt": [[1, 2], [3]]}, None, 2),
        ("openai", b"/v1/completions", {"prompt": []}, None, 1),
        ("openai", b"/v1/responses", {"max_output_tokens": 50, "n": 9}, 50, 1),
        ("openai", b"/v1/other", {"max_output_tokens": 5, "n": 3}, 5, 3),
        ("anthropic", None, {"max_tokens": 5, "n": "many"}, 5, 1),
        ("gemini", None, {"generationConfig": {"maxOutputTokens": 5, "candidateCount": 2}}, 5, 2),
        ("gemini", None, {"generation_config": {"max_output_tokens": 5, "candidate_count": 2}}, 5, 2),
        ("gemini", None, {"generation_config": {"maxOutputTokens": 5}}, 5, 1),
        ("gemini", None, {"generationConfig": None}, None, 1),
        ("ollama", None, {"options": {"num_predict": 5}}, 5, 1),
        ("ollama", None, {"options": {"num_predict": -1}}, None, 1),
        ("ollama", None, {"options": {"num_predict": -2, "temperature": 0}}, None, 1),
        ("bedrock", None, {"inferenceConfig": {"maxTokens": 5}}, 5, 1),
        ("header", None, {"max_tokens": "many", "n": 1.5}, None, 1),
    ],
)
def test_the_maximum_and_its_multipliers_are_those_of_the_endpoint(
    dialect: str, path: bytes | None, members: dict[str, Any], maximum: int | None, multiplier: int
) -> None:
    found = facts({"messages": [], **members}, dialect, path)
    assert (found.maximum, found.multiplier) == (maximum, multiplier)


@pytest.mark.parametrize(
    ("dialect", "template", "member"),
    [
        ("openai", '{"messages":[],"%s":%s}', "max_tokens"),
        ("openai", '{"messages":[],"%s":%s}', "max_output_tokens"),
        ("openai", '{"messages":[],"%s":%s}', "n"),
        ("openai", '{"messages":[],"%s":%s}', "best_of"),
        ("anthropic", '{"%s":%s}', "max_tokens"),
        ("gemini", '{"generationConfig":{"%s":%s}}', "maxOutputTokens"),
        ("gemini", '{"generationConfig":{"%s":%s}}', "candidateCount"),
        ("ollama", '{"options":{"%s":%s}}', "num_predict"),
        ("bedrock", '{"inferenceConfig":{"%s":%s}}', "maxTokens"),
    ],
)
@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("100.0", "has a fraction or an exponent"), ("1e3", "has a fraction or an exponent"),
        ('"100"', "is a string"), ("true", "is a boolean"), ("false", "is a boolean"), ("-1", "is negative"),
        ("-0.5", "is negative"), (str(TOKENS_MAX + 1), "is too large"), (str(2**64), "is too large"),
        ("1e400", "is too large"), ("9" * 1_000, "is too large"), ("[100]", "is an array"),
        ('{"value":100}', "is an object"),
    ],
)  # fmt: skip
def test_a_maximum_that_is_no_whole_number_is_refused_by_name(
    dialect: str, template: str, member: str, value: str, fault: str
) -> None:
    body = (template % (member, value)).encode()
    if member == "num_predict" and value == "-1":
        assert facts(body, dialect).maximum is None
        return
    refusal = refused(body, dialect)
    assert refusal.reason is Reason.REQUEST_MALFORMED
    assert refusal.field is not None
    assert refusal.field.split(".")[-1] == member
    assert refusal.caller_text == f"'{refusal.field}' {fault}; it must be a whole number from 0 to {TOKENS_MAX}."


@pytest.mark.parametrize("value", ['"true"', "1", "0", "[]", "{}"])
@pytest.mark.parametrize("dialect", ["openai", "anthropic", "ollama"])
def test_a_stream_that_is_no_boolean_is_refused(dialect: str, value: str) -> None:
    assert refused(f'{{"stream":{value}}}'.encode(), dialect).field == "stream"


@pytest.mark.parametrize(
    ("dialect", "path", "members", "streams"),
    [
        ("openai", None, {}, False),
        ("openai", None, {"stream": None}, False),
        ("openai", None, {"stream": True}, True),
        ("openai", None, {"stream": False}, False),
        ("anthropic", None, {"stream": True}, True),
        ("ollama", None, {}, True),
        ("ollama", None, {"stream": None}, True),
        ("ollama", None, {"stream": False}, False),
        ("gemini", None, {"stream": 5}, False),
        ("gemini", b"/v1beta/models/g:streamGenerateContent", {}, True),
        ("bedrock", b"/model/m/converse-stream", {}, True),
        ("header", None, {"stream": "yes"}, False),
    ],
)
def test_a_stream_is_recognised_by_the_dialect_s_switch(
    dialect: str, path: bytes | None, members: dict[str, Any], streams: bool
) -> None:
    assert facts(members, dialect, path).streams is streams


@pytest.mark.parametrize(
    ("dialect", "path", "members", "lacks"),
    [
        ("openai", None, {"stream": True}, True),
        ("openai", None, {"stream": True, "stream_options": None}, True),
        ("openai", None, {"stream": True, "stream_options": {}}, True),
        ("openai", None, {"stream": True, "stream_options": {"include_usage": False}}, True),
        ("openai", None, {"stream": True, "stream_options": {"include_usage": True}}, False),
        ("openai", None, {"stream": False}, False),
        ("openai", b"/v1/completions", {"stream": True, "prompt": "a"}, True),
        ("openai", b"/v1/responses", {"stream": True}, False),
        ("openai", b"/v1/other", {"stream": True}, False),
        ("anthropic", None, {"stream": True}, False),
    ],
)
def test_a_stream_lacks_usage_unless_it_requests_it_or_always_reports(
    dialect: str, path: bytes | None, members: dict[str, Any], lacks: bool
) -> None:
    assert facts(members, dialect, path).lacks_usage is lacks


@pytest.mark.parametrize(
    ("dialect", "members", "thinking"),
    [
        ("anthropic", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, 1024),
        ("anthropic", {"thinking": {"type": "disabled"}}, None),
        ("anthropic", {"thinking": None}, None),
        ("gemini", {"generationConfig": {"thinkingConfig": {"thinkingBudget": 9}}}, 9),
        ("gemini", {"generationConfig": {"thinking_config": {"thinking_budget": -1}}}, None),
        ("openai", {"reasoning": {"effort": "high"}}, None),
        ("openai", {"reasoning": {"max_tokens": 7}}, 7),
        ("bedrock", {"additionalModelRequestFields": {"thinking": {"budget_tokens": 8}}}, 8),
    ],
)
def test_a_stated_budget_for_reasoning_is_read(dialect: str, members: dict[str, Any], thinking: int | None) -> None:
    assert facts(members, dialect).thinking == thinking


@pytest.mark.parametrize(
    ("dialect", "body", "field"),
    [
        ("openai", b'{"max_tokens":1,"max_tokens":9}', "max_tokens"),
        ("openai", b'{"max_tokens":1,"max_tokens":1}', "max_tokens"),
        ("openai", b'{"max_tokens":1,"max\\u005ftokens":9}', "max_tokens"),
        ("openai", b'{"max\\u005ftokens":1,"max\\u005ftokens":9}', "max_tokens"),
        ("openai", b'{"Max_Tokens":9}', "max_tokens"),
        ("openai", b'{"max_tokens":1,"max_tokens\\u0000":9}', "max_tokens"),
        ("openai", b'{"max_tokens":1,"N\\u0000 ":9}', "n"),
        ("openai", b'{" n":9}', "n"),
        ("openai", b'{"max_token\xc5\xbf":9}', "max_tokens"),
        ("openai", b'{"max_to\xe2\x84\xaaens":9}', "max_tokens"),
        ("openai", b'{"be\xef\xac\x86_of":9}', "best_of"),
        ("openai", b'{"max_complet\xc4\xb1on_tokens":9}', "max_completion_tokens"),
        ("openai", b'{"MAX_COMPLET\xc4\xb0ON_TOKENS":9}', "max_completion_tokens"),
        ("openai", b'{"model":"a","Model":"b"}', "model"),
        ("openai", b'{"model":"a","model":"b"}', "model"),
        ("openai", b'{"model":"a","model\\u0000":"b"}', "model"),
        ("openai", b'{"STREAM":true}', "stream"),
        ("openai", b'{"stream":true,"stream":false}', "stream"),
        ("openai", b'{"stream_options":{},"stream_options":null}', "stream_options"),
        ("openai", b'{"stream_options":{"include_usage":false,"include_usage":true}}', "stream_options.include_usage"),
        ("openai", b'{"stream_options":{"include_usage":true,"INCLUDE_USAGE":false}}', "include_usage"),
        ("openai", b'{"stream_options":[]}', "stream_options"),
        ("openai", b'{"stream_options":"x"}', "stream_options"),
        ("openai", b'{"model":5}', "model"),
        ("gemini", b'{"generationConfig":{},"generation_config":{}}', "generationConfig"),
        ("gemini", b'{"generationconfig":{}}', "generationConfig"),
        ("gemini", b'{"generationConfig":{"maxOutputTokens":1,"max_output_tokens":2}}',
         "generationConfig.maxOutputTokens"),
        ("gemini", b'{"generationConfig":[{"maxOutputTokens":1}]}', "generationConfig"),
        ("ollama", b'{"options":{"num_predict":1,"Num_Predict":2}}', "num_predict"),
        ("ollama", b'{"options":{},"options":{}}', "options"),
        ("ollama", b'{"options":"x"}', "options"),
        ("bedrock", b'{"inferenceConfig":{"maxTokens":1,"maxtokens":2}}', "maxTokens"),
    ],
)  # fmt: skip
def test_a_member_that_counts_stands_once_in_one_spelling(dialect: str, body: bytes, field: str) -> None:
    refusal = refused(body, dialect)
    assert (refusal.reason, refusal.field) == (Reason.REQUEST_MALFORMED, field)


def test_a_name_that_was_met_with_escapes_is_not_taken_for_its_bytes() -> None:
    assert facts(b'{"max\\\\u005ftokens":"a","messages":[]}').maximum is None
    assert facts(b'{"max\\u005ftokens":5,"messages":[]}').maximum == 5
    assert refused(b'{"max_tokens":1,"max\\u005ftokens":5}').field == "max_tokens"


@pytest.mark.parametrize(
    "body",
    [
        b'{"max_tokens":5,"tools":[{"properties":{"n":{},"N":{},"max_tokens":1}},{"properties":{"n":{}}}]}',
        b'{"max_tokens":5,"messages":[{"content":"\\"max_tokens\\": 1, \\u00e4 max_tokens"}]}',
        b'{"max_tokens":5,"a":1,"a":2}',
        b' \n{ "max_tokens" :\t5 }\n',
        b'{"max\\u005ftokens":5}',
        b'{"max_tokens":5,"messages":[{"model":1},{"Model":2,"stream":"x"}]}',
    ],
)
def test_insignificant_content_is_not_restricted(body: bytes) -> None:
    assert facts(body).maximum == 5


def test_ever_new_names_fill_no_memory() -> None:
    for number in range(3_000):
        assert facts(b'{"name_%d":{"inner_%d":1},"max_tokens":%d}' % (number, number, number)).maximum == number
    assert len(NO_SCOPE.known) <= 1_024
    assert isinstance(OPENAI, MemberScope)


@pytest.mark.parametrize(
    ("body", "models"),
    [
        ({"model": "a"}, ()),
        ({"models": ["a", "b"]}, ("a", "b")),
        ({"models": "a"}, ("a",)),
        ({"fallbacks": None}, ()),
        ({"fallbacks": [{"model": "x", "max_tokens": 5}, "y"]}, ("x", "y")),
        ({"context_window_fallbacks": [{"a": ["b", "c"]}]}, ("a", "b", "c")),
        ({"models": ["a"], "content_policy_fallbacks": [{"a": ["d"]}]}, ("a", "d")),
    ],
)
def test_alternative_models_are_found_in_every_list(body: dict[str, Any], models: tuple[str, ...]) -> None:
    assert facts(body).alternatives == models


@pytest.mark.parametrize("value", [5, {}, [5], [{}], [{"a": "b"}], [["a"]], ["m"] * 30_000])
def test_a_list_of_models_of_another_shape_is_refused(value: Any) -> None:
    assert refused({"fallbacks": value}).field == "fallbacks"


# -- text, messages, numbers


def text(*strings: str) -> int:
    estimate = TextEstimate()
    for string in strings:
        estimate.add(string.encode())
    return estimate.tokens()


@pytest.mark.parametrize(
    ("dialect", "body", "strings", "objects", "numbers"),
    [
        ("openai", HELLO, ["gpt-4o", "user", "Hello, how are you?"], 1, 0),
        ("openai", {"input": "a b"}, ["a b"], 0, 0),
        ("openai", {"input": ["a", "b"]}, ["a", "b"], 0, 0),
        ("openai", {"input": [{"type": "message", "content": "x"}]}, ["message", "x"], 1, 0),
        ("openai", {"input": [1, 2, 3]}, [], 0, 3),
        ("openai", {"input": [[1, 2], [3], 4.5, -1]}, [], 0, 5),
        ("openai", {"temperature": 1, "stop": ["x"], "logit_bias": {"5": 6}}, ["x"], 0, 0),
        ("openai", {"tools": [{"function": {"name": "f", "parameters": {"properties": {"city": {}}}}}]},
         ["function", "name", "f", "parameters", "properties", "city"], 0, 0),
        ("openai", {"response_format": {"a": {"b": "c"}}, "x": {"y": "z"}}, ["a", "b", "c", "z"], 0, 0),
        ("openai", {"functions": [{"n": 1}], "text": {"format": {}}}, ["n", "format"], 0, 0),
        ("bedrock", {"toolConfig": {"tools": []}}, ["tools"], 0, 0),
        ("gemini", {"contents": {"parts": {"text": "Hi"}}}, ["Hi"], 1, 0),
        ("gemini", {"contents": [{"parts": [{"text": "Hi"}]}, {"parts": []}]}, ["Hi"], 2, 0),
        ("anthropic", {"messages": [{"content": [{"type": "tool_use", "input": {"messages": [{}]}}]}]},
         ["tool_use"], 1, 0),
        ("anthropic", {"messages": [{"content": [{"type": "redacted_thinking", "data": "abc"}]}]},
         ["redacted_thinking", "abc"], 1, 0),
    ],
)  # fmt: skip
def test_texts_messages_and_numbers_are_counted(
    dialect: str, body: dict[str, Any], strings: list[str], objects: int, numbers: int
) -> None:
    found = facts(body, dialect)
    assert found.text_tokens == text(*strings)
    assert (found.message_objects, found.array_numbers) == (objects, numbers)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12) | st.sampled_from(["Hello, how are you?", "가나다", "a" * 5_000, "\n😀\\" * 3_000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=25,
)  # fmt: skip
documents = st.dictionaries(
    st.text(max_size=6) | st.sampled_from(["messages", "input", "contents", "tools", "text", "response_format", "x"]),
    values,
    max_size=6,
)


class Oracle:
    """The same figures from the values of a parser."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.texts: list[str] = []
        self.numbers = 0
        self.objects = 0
        for name in ("messages", "input", "contents"):
            value = document.get(name)
            elements = value if isinstance(value, list) else [value]
            self.objects += sum(isinstance(element, dict) for element in elements)
        self._walk(document, has_names=False)

    def _walk(self, value: object, *, has_names: bool) -> None:
        if isinstance(value, str):
            self.texts.append(value)
        elif isinstance(value, list):
            self.numbers += sum(isinstance(one, int | float) and not isinstance(one, bool) for one in value)
            for one in value:
                self._walk(one, has_names=has_names)
        elif isinstance(value, dict):
            for name, one in value.items():
                if has_names:
                    self.texts.append(name)
                self._walk(one, has_names=has_names or name in ("tools", "functions", "text", "response_format"))


def is_plain(value: object) -> bool:
    """Whether no name in it has a meaning of its own."""
    if isinstance(value, dict):
        return all(name not in MEANINGS and is_plain(one) for name, one in value.items())
    return all(is_plain(one) for one in value) if isinstance(value, list) else True


@given(documents, st.sampled_from([None, 1]), st.booleans())
@settings(max_examples=300)
def test_the_figures_are_those_of_a_parser(document: dict[str, Any], indent: int | None, is_ascii: bool) -> None:
    if not all(is_plain(value) for value in document.values()):
        return
    try:
        raw = json.dumps(document, indent=indent, ensure_ascii=is_ascii).encode()
        found = facts(raw)
    except (Refusal, UnicodeEncodeError):
        assert any(name.strip().casefold() in ("n", "model", "models", "prompt", "stream") for name in document) or any(
            0xD800 <= ord(character) < 0xE000 for character in json.dumps(document, ensure_ascii=False)
        )
        return
    oracle = Oracle(document)
    assert found.text_tokens == text(*oracle.texts)
    assert (found.array_numbers, found.message_objects) == (oracle.numbers, oracle.objects)


#: Text that JSON parsers find hard, from which documents are put together at random.
PIECES = (
    *'{}[]",:-+.eE0123456789 \n\t\\/u', "true", "false", "null", '""', '"a"', '"type"', '"\\u0074ype"',
    '"\\ud83d\\ude00"', '"\\ud83d"', '"\\n"', "é", "😀", '"input":', '"tools":', '"image_url"', '"url":', '"data":',
    '"source":', "{}", "[]", "[[1]]", '{"type":"image_url","image_url":{"url":"data:image/x"}}', "-0", "01",
    "\x00", "\x7f", "NaN", "'", '{"role":"user","content":"x"},', '"role":',
)  # fmt: skip


def scanned(content: bytes) -> bool:
    scanner = RequestScanner(content, OPENAI, JsonBounds(), RequestParts(content, has_image_arrays=False))
    try:
        while scanner.advance(1_000) <= 0:
            pass
    except (JsonError, TooDenseError):
        return False
    return True


@given(
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join).map(lambda body: '{"a":' + body + "}")
    | st.lists(st.sampled_from(PIECES), max_size=14).map("".join).map(lambda body: "[" + body + "]")
    | st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
)
@settings(max_examples=500)
@example('{"a":1}}')
@example('{"a":1,}')
@example("[1,]")
@example("[,1]")
@example('{"role":"user","role":"user"x}')
@example('{"role":"user" "role":1}')
@example('{"role":"us\\er"}')
@example('{"role" :"user"}')
@example('{"role":  [  ]  }')
@example("[1 2]")
@example("[1,2 3,4]")
def test_a_document_is_well_formed_if_and_only_if_a_parser_accepts_it(body: str) -> None:
    content = body.encode()
    try:
        is_json = isinstance(orjson.loads(content), dict | list)
    except ValueError:
        is_json = False
    assert scanned(content) is is_json


@pytest.mark.parametrize("size", [0, 1, 15_000, 16_383, 16_384, 16_385, 32_768, 100_000])
@pytest.mark.parametrize("unit", ["a", "\\n", "가", "😀", "\\ud83d\\ude00", "ab ", "1", "\\\\"])
def test_a_long_text_counts_as_it_would_in_one_piece(unit: str, size: int) -> None:
    decoded = json.loads(f'"{unit}"') * (size // len(unit))
    body = f'{{"input":"{unit * (size // len(unit))}","b" : "x"}}'.encode()
    assert facts(body, path=b"/v1/responses").text_tokens == text(decoded, "x")


def test_a_number_may_exceed_the_range_of_a_double() -> None:
    assert facts(b'{"a":1e400,"b":[-1E+999,1e400]}').array_numbers == 2


@pytest.mark.parametrize("blank", [1, 16_380, 16_384, 40_000])
def test_space_of_any_length_is_read_over(blank: int) -> None:
    space = b" " * blank
    body = space.join([b"", b"{", b'"a"', b":", b"1", b",", b'"b"', b":", b"[", b"1", b",", b"true", b"]", b"}", b""])
    assert facts(body).array_numbers == 1


@pytest.mark.parametrize("fault", [b'{"n%b":1}' % (b"x" * 20_000), b'{"a":%b}' % (b"1" * 20_000)])
def test_a_name_or_number_beyond_the_window_is_refused(fault: bytes) -> None:
    assert refused(fault).reason is Reason.REQUEST_MALFORMED


# -- media and references


def part(part: dict[str, Any], dialect: str = "openai") -> tuple[int, int, int, str]:
    found = facts({"messages": [{"content": [part]}]}, dialect)
    media = found.media
    return media.images, media.low_detail_images, media.tokens, found.reference


B64 = "A" * 9_000
PNG = f"data:image/png;base64,{B64}"


@pytest.mark.parametrize(
    ("given_part", "counted"),
    [
        ({"type": "text", "text": "Hi"}, (0, 0, 0, "")),
        ({"type": "image_url", "image_url": {"url": "https://x/y.png"}}, (1, 0, 0, "")),
        ({"type": "image_url", "image_url": {"url": PNG}}, (1, 0, 0, "")),
        ({"type": "image_url", "image_url": {"detail": "low", "url": PNG}}, (0, 1, 0, "")),
        ({"type": "image_url", "image_url": {"url": PNG, "detail": "high"}}, (1, 0, 0, "")),
        ({"type": "input_image", "image_url": PNG, "detail": "low"}, (0, 1, 0, "")),
        ({"detail": "auto", "type": "input_image", "image_url": PNG}, (1, 0, 0, "")),
        ({"type": "input_image", "file_id": "file-1"}, (0, 0, 0, "file")),
        ({"type": "input_audio", "input_audio": {"data": B64, "format": "wav"}}, (0, 0, 27, "")),
        ({"type": "file", "file": {"file_data": "data:application/pdf;base64," + B64}}, (0, 0, 3_000, "")),
        ({"type": "file", "file": {"file_data": "A" * 40_000}}, (0, 0, 3_750, "")),
        ({"type": "input_file", "file_url": "https://x/y.pdf"}, (0, 0, 0, "file")),
        ({"type": "video_url", "video_url": {"url": "https://x/y.mp4"}}, (0, 0, 0, "url")),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + B64}}, (0, 0, 17, "")),
        ({"type": "audio_url", "audio_url": {"url": "data:audio/mp3;base64," + B64}}, (0, 0, 27, "")),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": B64}}, (1, 0, 0, "")),
        ({"source": {"data": B64, "type": "base64"}, "type": "image"}, (1, 0, 0, "")),
        ({"source": {"type": "url", "url": "https://x"}, "type": "image"}, (1, 0, 0, "")),
        ({"type": "document", "source": {"type": "url", "url": "https://x"}}, (0, 0, 0, "url")),
        ({"type": "document", "source": {"type": "file", "file_id": "f"}}, (0, 0, 0, "file")),
        ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "A" * 40_000}},
         (0, 0, 3_750, "")),
        ({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "abc"}}, (0, 0, 0, "")),
        ({"inlineData": {"mimeType": "image/png", "data": B64}}, (1, 0, 0, "")),
        ({"inline_data": {"data": B64, "mime_type": "audio/mp3"}}, (0, 0, 27, "")),
        ({"inlineData": {"mimeType": "video/mp4", "data": B64}}, (0, 0, 17, "")),
        ({"inlineData": {"mimeType": "application/pdf", "data": B64}}, (0, 0, 3_000, "")),
        ({"fileData": {"mimeType": "video/mp4", "fileUri": "gs://x"}}, (0, 0, 0, "file")),
        ({"file_data": {"file_uri": "gs://x"}}, (0, 0, 0, "file")),
        ({"image": {"format": "png", "source": {"bytes": B64}}}, (1, 0, 0, "")),
        ({"video": {"format": "mp4", "source": {"bytes": B64}}}, (0, 0, 17, "")),
        ({"audio": {"format": "mp3", "source": {"bytes": B64}}}, (0, 0, 27, "")),
        ({"document": {"name": "d", "source": {"bytes": B64}}}, (0, 0, 3_000, "")),
        ({"document": {"name": "d", "source": {"text": "abc"}}}, (0, 0, 0, "")),
        ({"video": {"source": {"s3Location": {"uri": "s3://b/k"}}}}, (0, 0, 0, "file")),
        ({"type": "image", "data": B64, "mimeType": "image/png"}, (1, 0, 0, "")),
        ({"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": "u"}}]}, (1, 0, 0, "")),
        ({"file_id": None}, (0, 0, 0, "")),
        ({"file_id": ""}, (0, 0, 0, "")),
    ],
)  # fmt: skip
def test_a_content_part_is_counted_by_its_kind(given_part: dict[str, Any], counted: tuple[int, int, int, str]) -> None:
    assert part(given_part) == counted


def test_the_strings_of_a_medium_are_no_text_and_others_are() -> None:
    image = {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}
    assert facts({"messages": [{"content": [image]}]}).text_tokens == 0
    document = {"type": "document", "title": "A b", "source": {"type": "base64", "media_type": "x/y", "data": B64}}
    assert facts({"messages": [{"content": [document]}]}, "anthropic").text_tokens == text("A b")
    source = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a b c"}}
    assert facts({"m": [source]}, "anthropic").text_tokens == text("document", "text", "text/plain", "a b c")


def test_a_prompt_cannot_pass_as_a_picture_by_a_second_type() -> None:
    words = "many words " * 500
    body = f'{{"type":"image","source":{{"type":"base64","data":"{words}","type":"text"}}}}'
    assert facts(b'{"messages":[%b]}' % body.encode(), "anthropic").text_tokens >= 1_000


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ollama_s_images_are_counted_and_other_dialects_arrays_are_text(count: int) -> None:
    body = {"messages": [{"images": [B64] * count}]}
    assert facts(body, "ollama").media.images == count
    assert facts(body, "openai").media.images == 0
    assert (facts(body, "openai").text_tokens > 0) == (count > 0)


@pytest.mark.parametrize(
    ("body", "reference"),
    [
        ({"previous_response_id": "resp_1"}, "conversation"),
        ({"previous_response_id": None}, ""),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"prompt": "a"}, ""),
        ({"cachedContent": "cachedContents/1"}, "conversation"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "conversation"),
        ({"metadata": {"conversation": "x", "previous_response_id": "y"}}, ""),
    ],
)
def test_a_reference_to_server_side_context_is_found(body: dict[str, Any], reference: str) -> None:
    assert facts(body, path=b"/v1/responses").reference == reference


def test_an_image_with_escaped_slashes_counts_alike() -> None:
    body = json.dumps({"x": {"video_url": {"url": "data:video/mp4;base64," + "A/" * 4_500}}}).replace("/", "\\/")
    assert facts(body.encode()).media.tokens == 17


# -- other content


@pytest.mark.parametrize(
    ("media_type", "body", "tokens"),
    [
        (b"application/json", b"", 0),
        (b"", b" \n", 0),
        (b"text/plain", b"", 0),
        (b"text/plain", b"Hello, how are you?", 6),
        (b"text/plain", b' {"max_tokens":', 7),
        (b"application/octet-stream", b"\xff\xfe", None),
    ],
)
def test_content_that_is_no_json_is_read_as_text(media_type: bytes, body: bytes, tokens: int | None) -> None:
    found = facts(body, given=fields(media_type))
    if tokens is None:
        assert found.input_override == len(body)
    else:
        assert (found.input_override or 0) + found.text_tokens == tokens
    assert found.parts is None


def test_json_is_read_whatever_its_type() -> None:
    assert facts(b' {"max_tokens":5}', given=fields(b"text/plain")).maximum == 5
    assert facts(b"\xff" * 1_000, given=fields(b"audio/mpeg")).media.tokens == 4


@pytest.mark.parametrize(
    "body",
    [
        b'{"max_tokens":1', b"{'max_tokens':1}", b'{"max_tokens":NaN}', b'{"a":"\xff"}', b'\xef\xbb\xbf{"max_tokens":1}',
        '{"max_tokens":1}'.encode("utf-16"), b'{"max_tokens":1} {"max_tokens":2}', b'{"max_tokens":1}x', b"12", b'"a"',
    ],
)  # fmt: skip
def test_a_malformed_body_is_refused(body: bytes) -> None:
    assert refused(body).reason is Reason.REQUEST_MALFORMED


def test_a_form_is_not_collected_and_counts_by_its_length() -> None:
    form = fields(b"multipart/form-data")
    assert not is_collected(form)
    assert is_collected(fields())
    rules = ReadingRules(DIALECTS["openai"], BodyBounds())
    row = endpoint(path=b"/v1/audio/transcriptions")
    assert facts_of_form(rules, row, 250).input_override == 1
    assert facts_of_form(rules, row, 251).input_override == 2
    assert facts_of_form(rules, row, -1).reference == "body"


# -- bounds


@pytest.mark.parametrize(
    ("setting", "bounds", "fits", "exceeds"),
    [
        ("json_values_max", JsonBounds(values_max=5), b'{"a":[1,2,"c"]}', b'{"a":[1,2,"c",null]}'),
        ("json_values_max", JsonBounds(values_max=5), b"[1,2,3,4]", b"[1,2,3,4,5]"),
        ("json_containers_max", JsonBounds(containers_max=3), b'{"a":[{}]}', b'{"a":[{}],"b":[]}'),
        ("json_depth_max", JsonBounds(depth_max=3), b'{"a":[{}],"b":[[]]}', b'{"a":[{"c":[]}]}'),
    ],
)
def test_json_beyond_a_bound_is_refused_by_its_name(
    setting: str, bounds: JsonBounds, fits: bytes, exceeds: bytes
) -> None:
    limit = BodyBounds(json=bounds)
    facts(fits, bounds=limit)
    refusal = refused(exceeds, bounds=limit)
    assert refusal.reason is Reason.REQUEST_MALFORMED
    assert setting in refusal.caller_text


@pytest.mark.parametrize("depth", [64, 65])
def test_the_default_depth_is_64(depth: int) -> None:
    body = b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
    if depth <= 64:
        facts(body)
    else:
        assert "json_depth_max" in refused(body).caller_text


def test_a_body_up_to_the_bound_is_read() -> None:
    bounds = BodyBounds(bytes_max=len(json.dumps(HELLO)))
    facts(HELLO, bounds=bounds)
    assert refused({**HELLO, "a": 1}, bounds=bounds).reason is Reason.BODY_TOO_LARGE


@pytest.mark.parametrize(("coding", "bits"), [(b"gzip", 31), (b"x-gzip", 31), (b"deflate", 15), (b"deflate", -15)])
def test_a_compressed_body_is_read_inflated(coding: bytes, bits: int) -> None:
    compressor = zlib.compressobj(wbits=bits)
    raw = compressor.compress(json.dumps({**HELLO, "max_tokens": 5}).encode()) + compressor.flush()
    found = reading(raw, given=fields(codings=(coding,)))
    assert found.facts is not None
    assert (found.facts.maximum, found.bits) == (5, bits)
    assert json.loads(found.content) == {**HELLO, "max_tokens": 5}


@pytest.mark.parametrize(
    ("codings", "body", "reason"),
    [
        ((b"br",), b"x", Reason.REQUEST_MALFORMED),
        ((b"gzip", b"gzip"), b"x", Reason.REQUEST_MALFORMED),
        ((b"gzip",), json.dumps(HELLO).encode(), Reason.REQUEST_MALFORMED),
        ((b"gzip",), gzip.compress(b"{}", mtime=0)[:-1], Reason.REQUEST_MALFORMED),
        ((b"gzip",), gzip.compress(b"{}", mtime=0) + b"x", Reason.REQUEST_MALFORMED),
        ((b"gzip",), gzip.compress(b"{}", mtime=0) + gzip.compress(b"x", mtime=0), Reason.REQUEST_MALFORMED),
    ],
)
def test_a_compressed_body_that_cannot_be_bounded_is_refused(
    codings: tuple[bytes, ...], body: bytes, reason: Reason
) -> None:
    assert refused(body, given=fields(codings=codings)).reason is reason


def test_a_compressed_body_that_grows_beyond_all_bounds_is_refused() -> None:
    body = gzip.compress(b" " * 50_000_000, mtime=0)
    assert refused(body, given=fields(codings=(b"gzip",))).reason is Reason.BODY_TOO_LARGE


def test_content_that_is_in_the_zlib_and_in_the_raw_format_is_refused() -> None:
    """A server that expects the raw format would read other content: a stored block that begins with zlib's header."""
    other = b'\n{"model":"big"}'.ljust(0xAA19)
    body = b"\x18\x19\xaa\xe6\x55" + other + b"\x03\x00"
    assert zlib.decompressobj(wbits=-15).decompress(body) == other
    refusal = refused(body, given=fields(codings=(b"deflate",)))
    assert (refusal.reason, "two formats" in refusal.detail) == (Reason.REQUEST_MALFORMED, True)


@pytest.mark.parametrize("grown", [65_536, 65_537])
def test_any_ratio_is_allowed_up_to_64_kib(grown: int) -> None:
    raw = gzip.compress(b"{" + b" " * (grown - 2) + b"}", mtime=0)
    assert 64 * len(raw) < 65_536
    given_fields = fields(codings=(b"gzip",))
    if grown == 65_536:
        facts(raw, given=given_fields)
    else:
        assert refused(raw, given=given_fields).reason is Reason.BODY_TOO_LARGE


# -- what reading costs

SIZE = _MIB
WIDE = BodyBounds(json=JsonBounds(values_max=10**9, containers_max=10**9))
HARD = {
    "empty arrays in objects": b'{"max_tokens":5,"messages":[%b1]}' % (b'{"a":[]},' * (SIZE // 9)),
    "nested arrays": b'{"messages":[%b1]}' % (b"[[[[]]]]," * (SIZE // 9)),
    "typed objects": b'{"messages":[%b1]}' % (b'{"type":"file"},' * (SIZE // 16)),
    "members": b'{%b"b":1}' % (b'"a":1,' * (SIZE // 6)),
    "numbers": b'{"input":[%b1]}' % (b"1," * (SIZE // 2)),
    "short texts": b'{"input":[%b1]}' % (b'"a",' * (SIZE // 4)),
    "prompts": b'{"prompt":[%b1]}' % (b'"a",' * (SIZE // 4)),
    "a long text": b'{"input":"%b"}' % (b"a" * 8 * SIZE),
    "a long text beyond Latin-1": b'{"input":"%b"}' % ("a" * 100 + "😀" * (2 * SIZE)).encode(),
    "escapes": b'{"input":"%b"}' % (b"\\n" * (4 * SIZE)),
    "unicode escapes": b'{"input":"%b"}' % (b"\\uac00" * SIZE),
    "spaces": b'{"input":%b1}' % (b" " * 8 * SIZE),
    "an image": b'{"input":[{"type":"input_image","image_url":"data:image/png;base64,%b"}]}' % (b"A" * 8 * SIZE),
    "a document": b'{"x":[{"type":"document","source":{"data":"%b","type":"text"}}]}' % (b"A\\/" * (2 * SIZE)),
    "a huge number": b'{"max_tokens":%b}' % (b"9" * SIZE),
    "opening brackets": b'{"input":%b' % (b"[" * SIZE),
    "one name again and again": b'{%b"max_tokens":1}' % (b'"max_tokens":1,' * (SIZE // 15)),
    "many spellings": b"{%b}" % b",".join(b'"%bN":1' % (b"\xcc\x87" * (number % 99)) for number in range(SIZE // 100)),
    "plain text": b"words and words " * (SIZE // 16),
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("is_packed", [False, True])
def test_no_body_takes_long_portions(name: str, is_packed: bool) -> None:
    body = HARD[name]
    given_fields = fields(b"" if name == "plain text" else b"application/json", (b"gzip",) if is_packed else ())
    bounds = BodyBounds(bytes_max=9 * _MIB, inflate_ratio_max=10_000, json=WIDE.json)
    raw = gzip.compress(body, 1) if is_packed else body
    # Twice: the collector may run within a portion.
    assert min(longest_portion(raw, given_fields, bounds) for _ in range(2)) < 0.035


def longest_portion(raw: bytes, given_fields: Any, bounds: BodyBounds) -> float:
    """Seconds of this thread: other work on the machine does not count."""
    longest = 0.0
    rules = ReadingRules(DIALECTS["openai"], bounds)
    one = RequestReading(rules, endpoint(path=b"/v1/responses"), given_fields, raw)
    try:
        is_done = False
        while not is_done:
            begun = time.thread_time()
            is_done = one.advance()
            longest = max(longest, time.thread_time() - begun)
    except Refusal as refusal:
        assert refusal.reason in (Reason.REQUEST_MALFORMED, Reason.BODY_TOO_LARGE)  # noqa: PT017
    return longest


LARGE = {
    "emoji": b'{"input":"%b"}' % ("a" + "😀" * (SIZE // 4 - 8)).encode(),
    "escapes": b'{"input":"%b"}' % (b"\\n" * (SIZE // 2 - 8)),
    "unicode escapes": b'{"input":"%b"}' % (b"\\uac00" * (SIZE // 6 - 4)),
    "short texts": b'{"input":[%b1]}' % (b'"a",' * (SIZE // 4 - 8)),
    "objects": b'{"input":[%b1]}' % (b'{"type":"x"},' * 30_000),
    "an image": b'{"input":[{"type":"input_image","image_url":"%b"}]}' % (b"A" * (SIZE - 80)),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("is_packed", [False, True])
def test_reading_a_body_takes_at_most_three_times_its_allowed_size(name: str, is_packed: bool) -> None:
    body = LARGE[name]
    raw = gzip.compress(body, 1) if is_packed else body
    bounds = BodyBounds(bytes_max=SIZE, inflate_ratio_max=10_000)
    given_fields = fields(codings=(b"gzip",) if is_packed else ())
    tracemalloc.start()
    longest_portion(raw, given_fields, bounds)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak + len(raw) < 3 * SIZE


def test_every_dialect_reads_its_own_request() -> None:
    for name in PATHS:
        assert facts(HELLO, name).model == (None if name in ("gemini", "bedrock", "header") else "gpt-4o")
