"""What a scan finds does not depend on its windows and portions: a window's whole tokens are read as any others."""

from __future__ import annotations

import json
import time

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyproxy.ai.dialects.table import DIALECTS
from keyproxy.ai.scanning.json_bounds import JsonBounds, JsonError, TooDenseError
from keyproxy.ai.scanning.member_scope import AmbiguousNameError, scope_of
from keyproxy.ai.scanning.request_parts import DoubledNameError, RequestParts
from keyproxy.ai.scanning.request_scanner import WINDOW_BYTES, RequestScanner
from tests.ai.requests_support import HELLO

SCOPES = {name: scope_of(dialect) for name, dialect in DIALECTS.items()}

PIECES = (
    *(bytes([byte]) for byte in b'{}[]",:-+.eE019 \n\t\\/u'), b"true", b"null", b'"a"', b'""', b'"\\u0074ype":',
    b'"\\ud83d"',
    b'"\\n\\"x"', "é😀".encode(), b"\xff", b"\xe0\x80", b"\xf0\x9f", b"\x00", b"\x7f", b'"model":"a",', b'"Model":1,',
    b'"model\\u0000":"b",', b'"mod\\u0065l":"b",', b'"model\x00":1', b'"max_tokens":5,', b'"max_tokens" : null ,',
    b"1e400",
    b'"n":2,', b'"stream":true,', b'"stream_options":{"include_usage":true},', b'"stream_options":[],',
    b'"tools":[{}],',
    b'"messages":[{"role":"user","content":"Hi, \\"you\\"."}],',
    b'{"type":"image_url","image_url":{"url":"data:image/x"}},',
    b'"input":[1,2,3,[4]],', b'"prompt":["a","b"],', b'"images":["QUJD"],', b'"previous_response_id":"r",', b'"id":"p"',
    b'"text":{"format":{"type":"json_schema"}},', b"01", b"-", b"12345678901234567890", b"  ", b"[[[[", b"]]]]",
    b"x" * 90,
    b'"source":{"type":"base64","media_type":"image/png","data":"QUJD"},', b'"file_id":"f",', b"[],", b"{},",
)  # fmt: skip
REQUESTS = (
    json.dumps(HELLO).encode(),
    json.dumps(
        {**HELLO, "stream": True, "stream_options": {"include_usage": True}, "n": 2, "tools": [{"a": []}]}
    ).encode(),
    json.dumps({"input": [{"type": "input_image", "image_url": "https://x/y", "detail": "low"}]}, indent=2).encode(),
    b'{"messages":[{"role":"user","content":"%b"}],"max_tokens":5}' % (b'\\"' * 70),
    json.dumps({"messages": [{"content": "가나다😀\n" * 3}]}, ensure_ascii=False).encode(),
)

joined = st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join)
mutated = st.tuples(
    st.sampled_from(REQUESTS), st.integers(0, 200), st.integers(0, 12), st.sampled_from([b"", *PIECES])
).map(lambda one: one[0][: one[1]] + one[3] + one[0][one[1] + one[2] :])
contents = joined | joined.map(b"{%b}".__mod__) | joined.map(b'{"a":[%b1]}'.__mod__) | mutated


def outcome(
    content: bytes, dialect: str, *, window: int = WINDOW_BYTES, bounds: JsonBounds | None = None, budget: int = 10**6
) -> object:
    """All that a scan finds, or its fault."""
    parts = RequestParts(content, has_image_arrays=dialect == "ollama")
    scanner = RequestScanner(content, SCOPES[dialect], bounds or JsonBounds(), parts, window_bytes=window)
    try:
        while scanner.advance(budget) <= 0:
            pass
    except (JsonError, TooDenseError, AmbiguousNameError, DoubledNameError) as fault:
        return type(fault), str(fault)
    media = parts.media
    return (
        parts.values, parts.spans, parts.empty, parts.is_object, parts.opening, parts.prompts, parts.message_objects,
        parts.array_numbers, parts.has_tools, parts.text.estimate.quarters, media.reference, media.count.images,
        media.count.low_detail_images, media.count.tokens,
    )  # fmt: skip


@given(contents, st.sampled_from(["openai", "gemini", "ollama", "anthropic"]), st.sampled_from([1, 2, 3, 7, 17, 64]))
@settings(max_examples=600)
@example(b'{"a":"' + b'\\"' * 40 + b'"}', "openai", 16)
@example(b'{"model":"a","mod\\u0065l":"b"}', "openai", 7)
@example(b'{"a":[1,2,3x]}', "openai", 3)
@example(b'{"a":tru', "openai", 3)
@example(b'{"a":1}  x', "openai", 2)
@example(b'{"a":1} "', "openai", 2)
@example(b'{"a" "b":1}', "openai", 64)
@example(b'{"a":"b""c":1}', "openai", 64)
@example(b'["a""b"]', "openai", 64)
@example(b'{"a":"\x01"}', "openai", 64)
@example(b'"a"', "openai", 1)
def test_windows_of_any_size_give_the_same_result(content: bytes, dialect: str, window: int) -> None:
    assert outcome(content, dialect, window=window) == outcome(content, dialect)


def _is_fault(found: object) -> bool:
    return isinstance(found, tuple) and isinstance(found[0], type)


@pytest.mark.parametrize("request_body", REQUESTS)
def test_a_body_that_ends_early_is_refused_wherever_it_ends(request_body: bytes) -> None:
    for end in range(len(request_body)):
        assert _is_fault(outcome(request_body[:end], "openai"))


def test_a_name_without_its_colon_is_no_member() -> None:
    assert outcome(b'{"model":"a","model" 1}', "openai") == (JsonError, "a colon is missing")


@pytest.mark.parametrize("follows", [b"}", b',"a":1}', b" }", b"\n}", b"]}", b"x}", b".5}", b"e1}", b""])
@pytest.mark.parametrize("digits", [b"0", b"1", b"9", b"50", b"01", b"-1", b"9" * 78, b"9" * 79, b"9" * 80, b"9" * 200])
def test_whole_numbers_are_read_as_a_parser_reads_them(digits: bytes, follows: bytes) -> None:
    content = b'{"max_tokens":' + digits + follows
    found = outcome(content, "openai")
    try:
        json.loads(content)
    except ValueError:
        assert _is_fault(found)
    else:
        assert isinstance(found, tuple)
        assert found[0]["max_tokens"] == (digits + follows).split(b",")[0].rstrip(b" \n}]")


@given(contents, st.sampled_from([1, 60, 500]))
def test_portions_of_any_size_give_the_same_result(content: bytes, budget: int) -> None:
    assert outcome(content, "openai", budget=budget) == outcome(content, "openai")


@given(contents, st.integers(1, 5), st.sampled_from(["values", "containers", "depth"]))
def test_bounds_hold_whatever_the_window(content: bytes, most: int, kind: str) -> None:
    bounds = JsonBounds(**{f"{kind}_max": most})
    assert outcome(content, "openai", bounds=bounds, window=1) == outcome(content, "openai", bounds=bounds)


@given(contents.filter(lambda content: b"1e400" not in content))
@settings(max_examples=300)
def test_what_is_read_is_what_a_parser_accepts(content: bytes) -> None:
    found = outcome(content, "header")
    try:
        document = orjson.loads(content)
    except ValueError:
        document = None
    is_not_json = isinstance(found, tuple) and found[0] is JsonError
    if isinstance(document, dict | list):
        assert not is_not_json
    else:
        assert _is_fault(found)


@pytest.mark.parametrize("unit", [b'\\"', b"\\q", b'"', b'"\\', b'"a"', b'"\\n",', b'"\\""', b"\\u00"])
def test_no_run_of_quotes_and_escapes_takes_long(unit: bytes) -> None:
    content = b'{"a":["' + unit * (2**19 // len(unit))
    begun = time.thread_time()
    outcome(content, "openai", budget=131_072)
    assert time.thread_time() - begun < 1.0
