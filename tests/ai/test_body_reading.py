"""A long body is read in portions with the same result as a short one, in little memory and short steps."""

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

from keyproxy.ai.requests import body_reading, request_bound
from keyproxy.ai.requests.body_reading import BodyReading
from keyproxy.ai.requests.outline_scanner import DEPTH_MAX, PIECE_BYTES, STEPS_MAX, JsonError, OutlineScanner
from keyproxy.ai.requests.request_bound import PARSED_BYTES_MAX, bound_of
from keyproxy.reasons import Reason, Refusal
from keyproxy.token_accounting import BODY_BYTES_MAX
from tests.ai.test_request_bound import JSON, head, read

_MIB = 1 << 20
GZIP = JSON + b"Content-Encoding: gzip\r\n"

#: Text that JSON parsers find hard, from which documents are put together at random.
PIECES = (
    *'{}[]",:-+.eE0123456789 \n\t\\/u',
    "true", "false", "null", '""', '"a"', '"type"', '"\\u0074ype"', '"\\ud83d\\ude00"', '"\\ud83d"', '"\\n"', "é", "😀",
    '"max_tokens":', '"n":', '"prompt":', '"stream":', '"messages":', '"input":', '"tools":', '"stream_options":',
    '"include_usage":', '"Max_Tokens":', '"image_url"', '"url":', '"data:image/png;base64,AAAA"', '"source":',
    '"base64"', '"data":', "{}", "[]", "[[1]]", '{"type":"image_url","image_url":{"url":"data:image/x"}}', "1e400", "-0",
    "01", "\x00", "\x7f", "NaN", "'",
)  # fmt: skip

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["image_url", "input_image", "base64", "data:image/png;base64,AAAA"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.text(max_size=6) | st.sampled_from(["type", "image_url", "url", "source", "data", "n"]), inner, max_size=4
    ),
    max_leaves=20,
)  # fmt: skip
members = st.dictionaries(
    st.text(max_size=6)
    | st.sampled_from(
        ["max_tokens", "n", "best_of", "prompt", "stream", "messages", "input", "tools", "type", "image_url", "source"]
    ),
    values,
    max_size=8,
)
options = st.fixed_dictionaries(
    {},
    optional={"stream_options": st.none() | st.dictionaries(st.sampled_from(["include_usage", "prompt", "x"]), values)},
)


def outcome(found: Any) -> Any:
    """Return the bounds found in a body, or the reason of its refusal."""
    try:
        asked = found()
    except Refusal as refusal:
        return refusal.reason, refusal.field
    return asked.prompt_bound, asked.maximum, asked.streams, asked.hides_usage, asked.body


def in_pieces(content: bytes, piece_bytes: int) -> OutlineScanner:
    scanner = request_bound.outline_scanner()
    for place in range(0, len(content), piece_bytes):
        scanner.feed(content[place : place + piece_bytes])
    scanner.finish()
    return scanner


@given(members, options, st.booleans(), st.sampled_from([None, 1]), st.sampled_from(["openai", "anthropic", "header"]))
@example({"tools": {"a": 1}}, {}, True, None, "anthropic")
@example({"tools": {}}, {}, True, None, "anthropic")
@example({"tools": [[]]}, {}, True, None, "anthropic")
@example({"tools": "x"}, {}, True, None, "anthropic")
@example({"stream": True, "messages": []}, {"stream_options": {"x": {"a": 1}}}, True, None, "openai")
def test_a_document_is_read_in_portions_as_it_is_at_once(
    others: dict[str, Any], given_options: dict[str, Any], is_ascii: bool, indent: int | None, kind: str
) -> None:
    body = json.dumps({**others, **given_options}, indent=indent, ensure_ascii=is_ascii).encode()
    at_once, portions = outcome(lambda: bound_of(kind, head(), body)), outcome(lambda: read(body, kind=kind))
    assert portions == at_once


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.sampled_from([JSON, b""]))
@example('{"a":1e400}', JSON)
@example('{"type":"image_url","type":"text"}', JSON)
def test_whatever_a_body_is_it_is_read_alike_or_refused_alike(text: str, block: bytes) -> None:
    body = text.encode("utf-8", "surrogatepass")
    at_once, portions = outcome(lambda: bound_of("openai", head(block), body)), outcome(lambda: read(body, block))
    if portions != at_once:
        # Only a number that no double holds, and a type that stands twice, may be read otherwise; never as less.
        assert "1e400" in text or text.count("type") > 1
        if isinstance(portions[0], int) and isinstance(at_once[0], int):
            assert portions[0] >= at_once[0]


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_a_document_is_well_formed_if_and_only_if_a_parser_takes_it(text: str) -> None:
    raw = text.replace("1e400", "1").encode()
    try:
        orjson.loads(raw)
    except ValueError:
        with pytest.raises(JsonError):
            in_pieces(raw, 3)
    else:
        in_pieces(raw, 3)


@given(members, options, st.integers(1, 40), st.booleans())
def test_what_is_found_does_not_depend_on_the_pieces(
    others: dict[str, Any], given_options: dict[str, Any], piece_bytes: int, is_ascii: bool
) -> None:
    body = json.dumps({**others, **given_options}, ensure_ascii=is_ascii).encode()
    whole, parts = in_pieces(body, len(body)), in_pieces(body, piece_bytes)
    assert (parts.document, parts.spans, parts.elements, parts.parts, parts.image_bytes) == (
        whole.document, whole.spans, whole.elements, whole.parts, whole.image_bytes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("document", "elements"),
    [
        (b'{"prompt":"a"}', 1),
        (b'{"prompt":[]}', 1),
        (b'{"prompt":["a"]}', 1),
        (b'{"prompt":["a",1,{},[2]]}', 4),
        (b'{"prompt":[[1],[2,3]]}', 2),
        (b'{"prompt":[1,2,3,"a"]}', 1),
        (b'{"a":{"prompt":["a","b"]}}', 1),
        (b'{"prompt":["a","b"],"stream_options":{"prompt":["a"]}}', 2),
        (b'{"stream_options":{"prompt":["a","b"]}}', 1),
        (b'{"prompt":[%b"z"]}' % (b'"a",' * 5_000), 5_001),
        (b'{"prompt":[%b[1]]}' % (b"[1,2]," * 5_000), 5_001),
    ],
)
def test_prompts_are_counted(document: bytes, elements: int) -> None:
    assert in_pieces(document, PIECE_BYTES).elements == elements


@pytest.mark.parametrize("depth", [DEPTH_MAX, DEPTH_MAX + 1])
def test_a_document_may_be_nested_as_deeply_as_a_parser_takes_it(depth: int) -> None:
    document = b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
    if depth <= DEPTH_MAX:
        orjson.loads(document)
        in_pieces(document, PIECE_BYTES)
    else:
        with pytest.raises(ValueError, match="depth"):
            orjson.loads(document)
        with pytest.raises(JsonError):
            in_pieces(document, PIECE_BYTES)


# -- long bodies


def long_chat(filler: str, **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": filler}], **more}).encode()


@pytest.mark.parametrize(
    "options", [{}, {"stream_options": None}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}]
)
@pytest.mark.parametrize("is_behind", [False, True])
@pytest.mark.parametrize("coding", ["", "gzip", "zlib", "bare"])
def test_a_long_stream_is_made_to_report_its_usage_and_nothing_else_changes(
    options: dict[str, Any], is_behind: bool, coding: str
) -> None:
    filler = "".join(f"{number} ä😀\n" for number in range(20_000))
    given_members = {"stream": True, **options}
    body = long_chat(filler, **given_members) if is_behind else json.dumps(
        {**given_members, "messages": [filler]}
    ).encode()  # fmt: skip
    assert len(body) > 4 * PARSED_BYTES_MAX
    bits = {"": 0, "gzip": 31, "zlib": 15, "bare": -15}[coding]
    compressor = zlib.compressobj(wbits=bits) if bits else None
    raw = compressor.compress(body) + compressor.flush() if compressor else body
    block = JSON + (b"Content-Encoding: %b\r\n" % (b"gzip" if coding == "gzip" else b"deflate") if bits else b"")
    one = BodyReading("openai", head(block), raw, bytes_max=BODY_BYTES_MAX)
    while not one.advance():
        pass
    assert one.asked is not None
    assert (one.asked.prompt_bound, one.asked.hides_usage) == (len(body), True)
    new = zlib.decompress(one.body, wbits=bits) if bits else one.body
    wanted = {**json.loads(body), "stream_options": {**(options.get("stream_options") or {}), "include_usage": True}}
    assert json.loads(new) == wanted
    assert len(new) - len(body) < 60


@pytest.mark.parametrize(
    ("content", "maximum"),
    [
        (b'{"max_tokens":5,"messages":["%b"]}' % (b"x" * 200_000), 5),
        (b'{"messages":["%b"],"max_tokens":5,"n":2}' % (b"x" * 200_000), 10),
        (b'{"messages":[%b1],"max_tokens":5}' % (b'{"max_tokens":9,"n":[7]},' * 10_000), 5),
        (b'{"messages":["%b"]}' % (b'\\"max_tokens\\":1,' * 20_000), None),
        (b"[%b1]" % (b"1," * 100_000), None),
        (b'"%b"' % (b"1," * 100_000), None),
    ],
)
def test_a_long_body_is_read_for_its_own_members(content: bytes, maximum: int | None) -> None:
    asked = _read(content)
    assert (asked.prompt_bound, asked.maximum) == (len(content), maximum)


@pytest.mark.parametrize(
    "types",
    [('"type":"image","type":"document"', '"type":"base64"'), ('"type":"document","type":"image"', '"type":"base64"'),
     ('"type":"image","type":"%s"' % ("x" * 300), '"type":"base64"'), ('"type":"image"', '"type":"base64","type":"text"'),
     ('"type":"image"', '"type":"text","type":"base64"')],
)  # fmt: skip
def test_a_part_of_two_types_counts_with_its_bytes(types: tuple[str, str]) -> None:
    outer, inner = (text.encode() for text in types)
    content = b'{"messages":[{%b,"source":{%b,"data":"%b"}}]}' % (outer, inner, b"A" * 200_000)
    assert _read(content).prompt_bound == len(content) + request_bound.MEDIA_TOKENS
    single = content.replace(types[0].encode(), b'"type":"image"').replace(types[1].encode(), b'"type":"base64"')
    assert _read(single).prompt_bound == len(single) + request_bound.MEDIA_TOKENS - 200_000


def _read(content: bytes, block: bytes = JSON) -> request_bound.TokenBound:
    one = BodyReading("openai", head(block), content, bytes_max=BODY_BYTES_MAX)
    while not one.advance():
        pass
    assert one.asked is not None
    return one.asked


FILLER = b'"a":"%b",' % (b"x" * 200_000)


@pytest.mark.parametrize(
    ("content", "reason", "field"),
    [
        (b'{"max_tokens":5,%b"max_tokens":9}' % FILLER, Reason.REQUEST_MALFORMED, "max_tokens"),
        (b'{"max_tokens":5,%b"max\\u005ftokens":9}' % FILLER, Reason.REQUEST_MALFORMED, "max_tokens"),
        (b'{"stream_options":{"include_usage":true,%b"include_usage":false}}' % FILLER, Reason.REQUEST_MALFORMED,
         "include_usage"),
        (b'{%b"Max_Tokens":5}' % FILLER, Reason.REQUEST_MALFORMED, None),
        (b'{%b"stream_options":{"INCLUDE_USAGE":true}}' % FILLER, Reason.REQUEST_MALFORMED, None),
        (b'{%b%b"a":1}' % (FILLER, b'"N":1,' * 5_000), Reason.REQUEST_MALFORMED, None),
        (b'{%b"max_tokens":5.0}' % FILLER, Reason.REQUEST_MALFORMED, "max_tokens"),
        (b'{%b"max_tokens":5' % FILLER, Reason.REQUEST_MALFORMED, None),
        (b'{%b"max_tokens":5}x' % FILLER, Reason.REQUEST_MALFORMED, None),
        (b'{%b"a":/*"*/1}' % FILLER, Reason.REQUEST_MALFORMED, None),
        (b'{%b"a":"\xff"}' % FILLER, Reason.REQUEST_MALFORMED, None),
        (b'{%b"a":%b}' % (FILLER, b"1" * 5_000), Reason.REQUEST_MALFORMED, None),
        (b'{%b"%b":1}' % (FILLER, b"n" * 20_000), Reason.REQUEST_MALFORMED, None),
        (b'{%b"stream_options":[],"stream":true,"messages":[]}' % FILLER, Reason.REQUEST_MALFORMED, "stream_options"),
        (b'{"messages":[%b1]}' % (b"[[[0]]]," * (STEPS_MAX // 6)), Reason.BODY_TOO_LARGE, None),
    ],
)  # fmt: skip
def test_a_long_body_that_has_two_readings_or_none_is_refused(content: bytes, reason: Reason, field: str) -> None:
    with pytest.raises(Refusal) as caught:
        _read(content)
    assert (caught.value.reason, caught.value.field) == (reason, field)


@pytest.mark.parametrize("grown", [body_reading.INFLATED_BYTES_MAX, body_reading.INFLATED_BYTES_MAX + 1])
def test_compressed_content_may_grow_to_the_bound(grown: int) -> None:
    raw = gzip.compress(b"{" + b" " * (grown - 2) + b"}", mtime=0)
    if grown <= body_reading.INFLATED_BYTES_MAX:
        assert _read(raw, GZIP).prompt_bound == grown
    else:
        with pytest.raises(Refusal) as caught:
            _read(raw, GZIP)
        assert caught.value.reason is Reason.BODY_TOO_LARGE


def test_content_that_grows_no_more_than_text_does_is_read_to_its_end() -> None:
    content = b'{"messages":["%b"]}' % b"".join(b"%d words and numbers, " % number for number in range(400_000))
    raw = gzip.compress(content, 1)
    assert body_reading.INFLATED_BYTES_MAX < len(content) < body_reading.INFLATED_TIMES_MAX * len(raw)
    assert _read(raw, GZIP).prompt_bound == len(content)


# -- what reading costs

SIZE = _MIB
HARD = {
    "empty arrays in objects": b'{"max_tokens":5,"messages":[%b1]}' % (b'{"a":[]},' * (SIZE // 9)),
    "nested arrays": b'{"messages":[%b1]}' % (b"[[[[]]]]," * (SIZE // 9)),
    "typed objects": b'{"messages":[%b1]}' % (b'{"type":"file"},' * (SIZE // 16)),
    "members": b'{%b"b":1}' % (b'"a":1,' * (SIZE // 6)),
    "numbers": b'{"input":[%b1]}' % (b"1," * (SIZE // 2)),
    "short texts": b'{"input":[%b1]}' % (b'"a",' * (SIZE // 4)),
    "prompts": b'{"prompt":[%b1]}' % (b'"a",' * (SIZE // 4)),
    "a long text": b'{"input":"%b"}' % (b"a" * SIZE),
    "a long text beyond Latin-1": b'{"input":"%b"}' % ("a" * 100 + "😀" * (SIZE // 4)).encode(),
    "escapes": b'{"input":"%b"}' % (b"\\n" * (SIZE // 2)),
    "spaces": b'{"input":%b1}' % (b" " * SIZE),
    "a huge number": b'{"max_tokens":%b}' % (b"9" * SIZE),
    "opening brackets": b'{"input":%b' % (b"[" * SIZE),
    "one name again and again": b'{%b"max_tokens":1}' % (b'"max_tokens":1,' * (SIZE // 15)),
    "many spellings": b"{%b}" % b",".join(b'"%bN":1' % (b"\xcc\x87" * (number % 99)) for number in range(SIZE // 100)),
    "deep and wide": b'{"input":[%b1]}' % ((b"[" + b"1," * 100) * 9 + b"1" + b"]" * 9 + b",") * (SIZE // 1_818),
    "a stream": b'{"stream":true,"messages":["%b"]}' % (b"a" * SIZE),
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("is_packed", [False, True])
def test_no_body_takes_long_portions_or_much_memory(name: str, is_packed: bool) -> None:
    body = HARD[name]
    block, raw = (GZIP, gzip.compress(body, 1)) if is_packed else (JSON, body)
    assert longest_portion(raw, block) < 0.025, "half of what one request may hold the event loop for"
    if name != "a stream":
        # Tracing takes long; a part shows as well whether anything is kept.
        raw = gzip.compress(body[:150_000], 1) if is_packed else body[:150_000]
    tracemalloc.start()
    longest_portion(raw, block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    copies = len(body) if name == "a stream" and not is_packed else 0
    assert peak < copies + 300_000


def longest_portion(raw: bytes, block: bytes) -> float:
    """Seconds of this thread: other work on the machine does not count."""
    longest = 0.0
    one = BodyReading("openai", head(block), raw, bytes_max=BODY_BYTES_MAX)
    try:
        is_done = False
        while not is_done:
            begun = time.thread_time()
            is_done = one.advance()
            longest = max(longest, time.thread_time() - begun)
    except Refusal as refusal:
        assert refusal.reason in (Reason.REQUEST_MALFORMED, Reason.BODY_TOO_LARGE)  # noqa: PT017
    return longest
