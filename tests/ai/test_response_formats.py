"""Every dialect's responses are read: usage, model, finish, and what was produced, in any pieces.

Member names are those of the public SDKs: openai 3.57, anthropic 2.14, google-genai 3.6, ollama 0.6, botocore 1.44.
"""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyproxy.ai.dialects.endpoint import StreamFormat
from keyproxy.ai.responses import json_meter
from keyproxy.ai.responses.json_strings import NAME_BYTES_MAX, StringCounter
from keyproxy.ai.responses.meter import Meter, ResponseUse
from keyproxy.ai.responses.produced_text import ProducedText
from keyproxy.ai.responses.streams import stream_reading
from keyproxy.ai.responses.streams.aws_event_stream import FrameError, make_message, message_bytes, read_message
from keyproxy.ai.responses.usage_objects import UsageReport
from tests.ai.test_meter import EVENTS, JSON, cut_at, fed, head, meter_of
from tests.ai.test_text_estimate import by_the_table, estimate_of, rounded_up, texts

LINES = b"Content-Type: application/x-ndjson\r\n"
AWS = b"Content-Type: application/vnd.amazon.eventstream\r\n"


def sse(*events: dict[str, Any]) -> bytes:
    named = [b"event: " + event["type"].encode() + b"\n" if "type" in event else b"" for event in events]
    return b"".join(
        [name + b"data: " + orjson.dumps(event) + b"\n\n" for name, event in zip(named, events, strict=True)]
    )


def lines(*documents: dict[str, Any]) -> bytes:
    return b"".join([orjson.dumps(document) + b"\n" for document in documents])


def array(*documents: dict[str, Any]) -> bytes:
    return b"[" + b"\n,\r\n".join([json.dumps(document, indent=2).encode() for document in documents]) + b"\n]\n"


def aws(*events: tuple[str, dict[str, Any]]) -> bytes:
    return b"".join(
        [
            make_message(
                {":event-type": kind, ":content-type": "application/json", ":message-type": "event"},
                orjson.dumps(payload),
            )
            for kind, payload in events
        ]
    )


def chat(text: str | None = None, *, finish: str | None = None, index: int = 0) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    return {"id": "c", "model": "gpt-4o-2024", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


CHAT = sse(
    chat("Hello"), chat(" world"), chat(finish="stop"),
    {
        "id": "c", "model": "gpt-4o-2024", "choices": [],
        "usage": {
            "prompt_tokens": 13, "completion_tokens": 9, "total_tokens": 22,
            "prompt_tokens_details": {"cached_tokens": 6, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 4},
        },
    },
)  # fmt: skip
RESPONSES = sse(
    {"type": "response.created", "response": {"id": "r", "model": "gpt-5", "usage": None}},
    {"type": "response.output_item.added", "item": {"type": "reasoning"}},
    {"type": "response.output_item.done", "item": {"type": "reasoning"}},
    {"type": "response.output_item.added", "item": {"type": "message"}},
    {"type": "response.output_text.delta", "delta": "Hello"},
    {"type": "response.output_text.done", "text": "Hello"},
    {"type": "response.output_item.done", "item": {"type": "message", "content": [{"text": "Hello"}]}},
    {
        "type": "response.incomplete",
        "response": {
            "model": "gpt-5",
            "usage": {
                "input_tokens": 37, "input_tokens_details": {"cached_tokens": 30}, "output_tokens": 11,
                "output_tokens_details": {"reasoning_tokens": 8}, "total_tokens": 48,
            },
        },
    },
)  # fmt: skip
MESSAGE = sse(
    {
        "type": "message_start",
        "message": {
            "model": "claude-x",
            "usage": {
                "input_tokens": 25, "cache_creation_input_tokens": 2, "cache_read_input_tokens": 5, "output_tokens": 1,
            },
        },
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
    {"type": "content_block_stop", "index": 0},
    {
        "type": "message_delta", "delta": {"stop_reason": "end_turn"},
        "usage": {"output_tokens": 15, "output_tokens_details": {"thinking_tokens": 3}},
    },
    {"type": "message_stop"},
)  # fmt: skip


def candidate(text: str, finish: str | None = None, **usage: int) -> dict[str, Any]:
    one: dict[str, Any] = {"content": {"parts": [{"text": text}], "role": "model"}}
    if finish:
        one["finishReason"] = finish
    return {"candidates": [one], "usageMetadata": usage, "modelVersion": "gemini-x"}


GEMINI = (
    candidate("Hello", promptTokenCount=100, totalTokenCount=100),
    candidate(
        " world", "STOP",
        promptTokenCount=100, toolUsePromptTokenCount=5, candidatesTokenCount=20, thoughtsTokenCount=30,
        cachedContentTokenCount=40, totalTokenCount=155,
    ),
)  # fmt: skip
OLLAMA = lines(
    {"model": "llama3.2", "message": {"role": "assistant", "content": "Hello"}, "done": False},
    {"model": "llama3.2", "message": {"role": "assistant", "content": " world"}, "done": False},
    {
        "model": "llama3.2", "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop",
        "total_duration": 5, "prompt_eval_count": 26, "eval_count": 298,
    },
)  # fmt: skip
CONVERSE = aws(
    ("messageStart", {"role": "assistant"}),
    ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "Hello"}}),
    ("contentBlockDelta", {"contentBlockIndex": 1, "delta": {"toolUse": {"input": "{}"}}}),
    ("contentBlockStop", {"contentBlockIndex": 0}),
    ("messageStop", {"stopReason": "end_turn"}),
    (
        "metadata",
        {
            "usage": {
                "inputTokens": 10, "outputTokens": 4, "totalTokens": 14, "cacheReadInputTokens": 3,
                "cacheWriteInputTokens": 2,
            },
            "metrics": {"latencyMs": 1},
        },
    ),
)  # fmt: skip

STREAMS: dict[str, tuple[str, bytes, bytes, bytes, UsageReport, str | None]] = {
    "chat": ("openai", b"", EVENTS, CHAT, UsageReport(13, 9, cached=6, reasoning=4), "gpt-4o-2024"),
    "responses": (
        "openai", b"/v1/responses", EVENTS, RESPONSES, UsageReport(37, 11, cached=30, reasoning=8), "gpt-5",
    ),
    "message": (
        "anthropic", b"", EVENTS, MESSAGE, UsageReport(32, 15, cached=5, cache_write=2, reasoning=3), "claude-x",
    ),
    "gemini events": ("gemini", b"", EVENTS, sse(*GEMINI), UsageReport(105, 50, cached=40, reasoning=30), "gemini-x"),
    "gemini array": ("gemini", b"", JSON, array(*GEMINI), UsageReport(105, 50, cached=40, reasoning=30), "gemini-x"),
    "ollama": ("ollama", b"", LINES, OLLAMA, UsageReport(26, 298), "llama3.2"),
    "converse": ("bedrock", b"", AWS, CONVERSE, UsageReport(15, 4, cached=3, cache_write=2), None),
}  # fmt: skip


def stream(name: str) -> tuple[Meter, bytes]:
    kind, path, block, body, _, _ = STREAMS[name]
    return meter_of(kind, head(block), path=path), body


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_reports_usage_and_model_in_every_format(name: str) -> None:
    meter, body = stream(name)
    assert fed(meter, [body]) == body
    use = meter.result()
    assert (use.report, use.model) == STREAMS[name][4:]
    assert use.is_final
    assert use.is_finished


@pytest.mark.parametrize("name", STREAMS)
def test_a_compressed_stream_is_read_in_every_format(name: str) -> None:
    kind, path, block, body, report, model = STREAMS[name]
    raw = gzip.compress(body)
    meter = meter_of(kind, head(block + b"Content-Encoding: gzip\r\n"), path=path)
    assert fed(meter, cut_at(raw, [7, 50])) == raw
    assert (meter.result().report, meter.result().model) == (report, model)


@settings(max_examples=60)
@given(st.sampled_from(sorted(STREAMS)), st.lists(st.integers(0, 4_000), max_size=30), st.integers(0, 4_000))
@example("gemini array", list(range(1_000)), 4_000)
@example("converse", list(range(1_000)), 4_000)
@example("ollama", list(range(1_000)), 4_000)
def test_pieces_do_not_matter_in_any_format_even_of_a_stream_that_breaks_off(
    name: str, places: list[int], length: int
) -> None:
    body = stream(name)[1][:length]
    found = []
    for pieces in ([body], cut_at(body, places), [body[at : at + 1] for at in range(len(body))]):
        meter, _ = stream(name)
        assert fed(meter, pieces) == body
        found.append(repr(meter.result()))
    assert found[0] == found[1] == found[2]


FINISHED_AFTER = {
    "chat": b'"stop"',
    "message": b'"content_block_stop"',
    "gemini events": b"STOP",
    "gemini array": b"STOP",
    "ollama": b'"done":true',
    "converse": b"messageStop",
}


@pytest.mark.parametrize("name", FINISHED_AFTER)
def test_the_finish_marker_shows_that_nothing_more_is_produced(name: str) -> None:
    meter, body = stream(name)
    before = body.index(FINISHED_AFTER[name])
    meter.feed(body[:before])
    assert not meter.is_finished
    assert not meter.result().is_final
    meter.feed(body[before:])
    meter.finish()
    assert meter.is_finished


def test_a_chat_has_finished_when_each_of_its_choices_has() -> None:
    meter = meter_of("openai", head(EVENTS), choices=2)
    meter.feed(sse(chat("a"), chat("b", index=1), chat(finish="stop", index=1), chat(finish="stop", index=1)))
    assert not meter.is_finished
    meter.feed(sse(chat(finish="length")))
    assert meter.is_finished


def test_a_message_has_not_finished_while_a_block_is_open() -> None:
    meter = meter_of("anthropic", head(EVENTS))
    start, stop = {"type": "content_block_start"}, {"type": "content_block_stop"}
    for event, is_finished in ((start, False), (stop, True), (start, False), (stop, True)):
        meter.feed(sse(event))
        assert meter.is_finished is is_finished


def test_a_report_before_the_finish_is_not_final() -> None:
    meter = meter_of("openai", head(EVENTS))
    meter.feed(sse({**chat("a"), "usage": {"prompt_tokens": 7, "completion_tokens": 5}}))
    meter.feed(sse(chat(" b c")))
    use = meter.result()
    assert (use.report, use.is_final, use.produced) == (UsageReport(7, 5), False, 7)


@pytest.mark.parametrize(
    ("kind", "path", "document", "report", "model"),
    [
        ("openai", b"/v1/embeddings", {"model": "e", "usage": {"prompt_tokens": 8}}, UsageReport(8, 0), "e"),
        ("openai", b"/v1/moderations", {"model": "m", "results": []}, None, "m"),
        (
            "openai", b"/v1/audio/transcriptions",
            {"text": "x", "usage": {"type": "tokens", "input_tokens": 14, "output_tokens": 45}}, UsageReport(14, 45),
            None,
        ),
        ("openai", b"/v1/audio/transcriptions", {"usage": {"type": "duration", "seconds": 9}}, None, None),
        ("openai", b"/v1/images/edits", {"usage": {"prompt_tokens": 8, "completion_tokens": 2}}, UsageReport(8, 2), None),
        ("openai", b"/v1/other", {"usage": {"input_tokens": 8, "output_tokens": 2, "total_tokens": 10}},
            UsageReport(8, 2), None),
        ("openai", b"/v1/other", {"usage": {"prompt_tokens": 8, "completion_tokens": 2}}, UsageReport(8, 2), None),
        ("anthropic", b"/v1/messages/count_tokens", {"input_tokens": 14}, UsageReport(14, 0), None),
        ("gemini", b"/v1/models/g:countTokens", {"totalTokens": 14}, UsageReport(14, 0), None),
        ("gemini", b"/v1/models/g:generateContent", GEMINI[1], UsageReport(105, 50, cached=40, reasoning=30),
            "gemini-x"),
        ("gemini", b"/v1/models/g:generateContent",
            {"usageMetadata": {"promptTokenCount": 5, "thoughtsTokenCount": 7, "totalTokenCount": 12}},
            UsageReport(5, 7, reasoning=7), None),
        ("ollama", b"/api/chat", {"model": "l", "prompt_eval_count": 26, "eval_count": 298}, UsageReport(26, 298), "l"),
        ("ollama", b"/api/embed", {"model": "l", "prompt_eval_count": 26}, UsageReport(26, 0), "l"),
        ("bedrock", b"/model/m/converse", {"usage": {"inputTokens": 3, "outputTokens": 4}}, UsageReport(3, 4), None),
        ("openai", b"", {"model": 5, "usage": {"prompt_tokens": 1, "completion_tokens": 2}}, UsageReport(1, 2), None),
        ("openai", b"", {"model": "m" * 257}, None, None),
        ("openai", b"", {"usage": {"prompt_tokens": 5, "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 9}}}, UsageReport(5, 2, cached=5), None),
        ("openai", b"", {"usage": {"prompt_tokens": 5, "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": -1}}}, None, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "scanned"])
def test_a_document_reports_usage_and_model_in_every_dialect(
    kind: str, path: bytes, document: dict[str, Any], report: UsageReport | None, model: str | None, kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if not kept:
        monkeypatch.setattr(json_meter, "KEPT_BYTES_MAX", 0)
    meter = meter_of(kind, head(JSON), path=path)
    raw = orjson.dumps(document)
    assert fed(meter, [raw]) == raw
    assert (meter.result().report, meter.result().model) == (report, model)


# -- what was produced


@given(st.lists(texts.filter(bool), max_size=6))
@example([" ", "é", " é", "  ", "   ", "\t"])
@example(["aB" * 8])
@example(['\u2028\x00"\\/\b\f\n\r\t'])
def test_each_piece_of_a_stream_counts_as_at_least_one_token_and_its_text_by_the_table(parts: list[str]) -> None:
    wanted = rounded_up(sum([max(by_the_table(part), Fraction(1)) for part in parts], Fraction(0)))
    for dumps in (json.dumps, lambda part: json.dumps(part, ensure_ascii=False)):
        produced = ProducedText()
        produced.add([dumps(part)[1:-1].encode() for part in parts])
        assert produced.bound >= wanted
        assert produced.tokens == wanted == produced.bound


values = st.recursive(
    texts | st.integers() | st.none() | texts.map(lambda text: text * 100),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(texts | st.sampled_from(["data", "b64_json", "a" * 1_024, "a" * 1_025]), inner, max_size=4)
    ),
    max_leaves=10,
)


def strings_of(value: object) -> tuple[list[str], int]:
    """The strings that count as text, and the characters of base64."""
    text: list[str] = []
    media = 0
    if isinstance(value, str):
        return [value], 0
    pairs: Sequence[tuple[str, object]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = [("", one) for one in value]
    for name, one in pairs:
        if len(json.dumps(name)) - 2 > NAME_BYTES_MAX:
            text.append(name)
        if name in ("data", "b64_json") and isinstance(one, str):
            raw = json.dumps(one)[1:-1]
            media += len(raw) - raw.count("=")
        else:
            found, more = strings_of(one)
            text += found
            media += more
    return text, media


@settings(max_examples=200)
@given(values, st.sampled_from([None, 1]), st.lists(st.integers(0, 20_000), max_size=20))
@example({"data": "x" * 50, "a": ["y", {"b64_json": "z" * 3_000}]}, None, list(range(4_000)))
@example({"a" * 1_023: "b", "a" * 1_024: "b", "a" * 1_025: "b"}, 1, list(range(4_000)))
@example({"a": '\\"\u00e9😀\\' * 400}, None, list(range(20_000)))
@example({"data": ["x"], "\\": "\\", '"': '"'}, None, list(range(60)))
def test_the_strings_of_a_document_are_counted_by_the_table_whatever_the_pieces(
    content: object, indent: int | None, places: list[int]
) -> None:
    raw = json.dumps(content, indent=indent).encode()
    text, media = strings_of(content)
    counter = StringCounter()
    for piece in cut_at(raw, places):
        counter.feed(piece)
    assert counter.tokens == estimate_of(text) + -(-(3 * media // 4) // 800)


@settings(max_examples=100)
@given(values, st.lists(st.integers(0, 9_000), max_size=20), st.integers(0, 9_000))
def test_the_strings_of_a_document_that_breaks_off_are_counted_whatever_the_pieces(
    content: object, places: list[int], length: int
) -> None:
    raw = json.dumps(content).encode()[:length]
    counts = []
    for pieces in ([raw], cut_at(raw, places), [raw[at : at + 1] for at in range(len(raw))]):
        counter = StringCounter()
        for piece in pieces:
            counter.feed(piece)
        counts.append(counter.tokens)
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize(
    ("block", "body", "produced"),
    [
        (b"Content-Type: audio/mpeg\r\n", b"x" * 801, 2),
        (b"Content-Type: image/png\r\nContent-Encoding: gzip\r\n", b"x" * 800, 1),
        (b"Content-Type: audio/mpeg\r\n", b"", 0),
        (b"Content-Type: text/plain\r\n", b"Hello, how are you?", 6),
        (JSON, b'{"data":[{"b64_json":"' + b"A" * 1_068 + b'="}]}', 2),
        (JSON, b'{"data":[{"b64_json":"' + b"A" * 80_000 + b'"}],"text":"Hello"}', 76),
        (JSON + b"Content-Encoding: br\r\n", b"x" * 40, 10),
        (EVENTS, sse({"type": "image_generation.partial_image", "b64_json": "A" * 1_600}), 2),
        (EVENTS, sse({"type": "transcript.text.delta", "delta": "Hello"}), 0),
    ],
)
def test_media_are_estimated_by_their_bytes(block: bytes, body: bytes, produced: int) -> None:
    meter = meter_of("openai", head(block), path=b"/v1/images/generations")
    assert fed(meter, cut_at(body, [3, 11])) == body
    assert meter.result().produced == produced


def test_a_large_document_without_a_report_is_counted_in_little_memory() -> None:
    body = b'{"a":"' + b"lorem " * 1_000_000 + b'"}'
    meter = meter_of("openai", head(JSON))
    tracemalloc.start()
    for place in range(0, len(body), 65_536):
        meter.feed(body[place : place + 65_536])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    meter.finish()
    assert meter.result().produced == 1_000_000
    assert peak < 2_000_000


# -- streams that are ended, or hostile


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("ollama", StreamFormat.NDJSON, lambda out: [json.loads(line) for line in out.splitlines()]),
        ("gemini array", StreamFormat.JSON_ARRAY, json.loads),
    ],
)
@pytest.mark.parametrize(("begun", "passed"), [(0, 0), (1, 0), (50, 0), (400, 1)])
def test_a_stream_of_documents_can_be_ended_by_one_of_ours(
    name: str, shape: StreamFormat, wanted: Callable[[bytes], list[object]], begun: int, passed: int
) -> None:
    meter, body = stream(name)
    body = body[: begun if name != "ollama" else begun // 3]
    out = meter.feed(body)
    assert meter.format is shape
    documents = wanted(out + (b"" if name == "ollama" else b"]")) if out else []
    assert len(documents) == passed
    assert wanted(out + meter.cut(b'{"error":1}')) == [*documents, {"error": 1}]


def test_an_aws_event_stream_is_ended_by_an_exception() -> None:
    meter, body = stream("converse")
    out = meter.feed(body[:200])
    end = meter.cut(b'{"message":"m"}', exception="throttlingException")
    assert body.startswith(out)
    assert read_message(end) == (
        {":exception-type": "throttlingException", ":content-type": "application/json", ":message-type": "exception"},
        b'{"message":"m"}',
    )


def test_a_frame_is_as_the_specification_s_examples() -> None:
    empty = bytes.fromhex("000000100000000005c248eb7d98c8ff")
    assert make_message({}, b"") == empty
    assert read_message(empty) == ({}, b"")
    assert message_bytes(empty[:12]) == 16
    payload = b"{'foo':'bar'}"
    with_payload = bytes.fromhex("0000001d00000000fd528c5a") + payload + bytes.fromhex("c3653936")
    assert make_message({}, payload) == with_payload
    assert read_message(with_payload) == ({}, payload)


@given(st.dictionaries(st.text("abc:-", min_size=1, max_size=9), st.text(max_size=20)), st.binary(max_size=200))
def test_frames_are_those_of_botocore(headers: dict[str, str], payload: bytes) -> None:
    eventstream = pytest.importorskip("botocore.eventstream", reason="botocore is not installed")
    message = make_message(headers, payload)
    buffer = eventstream.EventStreamBuffer()
    buffer.add_data(message)
    (found,) = list(buffer)
    assert (found.headers, found.payload) == (headers, payload)
    assert read_message(message) == (headers, payload)


@pytest.mark.parametrize("place", [0, 5, 9, 20, -1])
def test_a_frame_that_does_not_match_its_crc_reports_nothing(place: int) -> None:
    report = aws(("metadata", {"usage": {"inputTokens": 3, "outputTokens": 4}}))
    broken = bytearray(report)
    broken[place] ^= 1
    meter = meter_of("bedrock", head(AWS))
    assert fed(meter, [bytes(broken)]) == broken
    assert meter.result().report is None
    later = meter_of("bedrock", head(AWS))
    assert fed(later, [bytes(broken) + report]) == broken + report
    # If the lengths are sound, the next message is found.
    assert (later.result().report is not None) is (place not in (0, 5, 9))


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x00" * 3, b"\x03abc\x07\x00\x09x", b"\x01a\x63", b"\x01a\x07\x00", b"\x01\xff\x07\x00\x00"],
)
def test_malformed_headers_are_an_error_of_the_frame(raw: bytes) -> None:
    prelude = (16 + len(raw)).to_bytes(4, "big") + len(raw).to_bytes(4, "big")
    message = prelude + zlib.crc32(prelude).to_bytes(4, "big") + raw
    message += zlib.crc32(message).to_bytes(4, "big")
    if not raw:
        assert read_message(message) == ({}, b"")
        return
    with pytest.raises(FrameError):
        read_message(message)


@pytest.mark.parametrize(
    ("kind", "block", "begin", "filling", "end"),
    [
        ("ollama", LINES, b'{"x":"', b"y" * 65_536, b'"}\n' + OLLAMA),
        ("gemini", JSON, b'[{"x":"', b"y" * 65_536, b'"},' + array(*GEMINI)[1:]),
        (
            "bedrock", AWS, make_message({}, b"y" * 2_000_000)[:-65_536], b"",
            make_message({}, b"y" * 2_000_000)[-65_536:] + CONVERSE,
        ),
    ],
)  # fmt: skip
def test_an_event_that_is_too_long_passes_unread_in_bounded_memory_and_reading_goes_on(
    kind: str, block: bytes, begin: bytes, filling: bytes, end: bytes
) -> None:
    assert stream_reading.EVENT_BYTES_MAX < 1_000_000
    meter = meter_of(kind, head(block))
    pieces = [begin] + [filling] * 40 * bool(filling) + [end]
    tracemalloc.start()
    out = [len(meter.feed(piece)) for piece in pieces]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    out.append(len(meter.finish()))
    assert sum(out) == sum(map(len, pieces))
    assert meter.result().report is not None
    assert peak < 3_000_000


@pytest.mark.parametrize("size", [200_000, 400_000, 3_000_000])
@pytest.mark.parametrize("block", [EVENTS, JSON])
@pytest.mark.parametrize("pieces", [65_536, 1_000_000, 7_000_000])
def test_an_event_with_an_image_reports_its_usage_and_counts_by_its_bytes(size: int, block: bytes, pieces: int) -> None:
    image = {"candidates": [{"content": {"parts": [{"inlineData": {"mimeType": "image/png", "data": "A" * size}}]}}]}
    usage = {"usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 1_290, "totalTokenCount": 1_295}}
    for document, report in ((image | usage, UsageReport(5, 1_290)), (image, None)):
        body = sse(document) if block == EVENTS else array(document)
        meter = meter_of("gemini", head(block))
        out = b"".join([meter.feed(body[at : at + pieces]) for at in range(0, len(body), pieces)])
        assert meter.produced <= meter.produced_bound
        assert out + meter.finish() == body
        assert meter.report == report
        # The text of the event's other members; 800 bytes a token.
        assert meter.produced <= (1_290 if report else 10 + size // 1_000)


HARD: dict[str, tuple[str, bytes, bytes]] = {
    "lines": ("ollama", LINES, b"\n" * 262_144),
    "short lines": ("ollama", LINES, b"{}\n" * 87_000),
    "done lines": ("ollama", LINES, b'{"done":true}\n' * 18_000),
    "texts": ("ollama", LINES, b'{"content":"a"}\n' * 16_000),
    "brackets": ("gemini", JSON, b"[" + b"{}," * 87_000),
    "depth": ("gemini", JSON, b"[" * 262_144),
    "strings": ("gemini", JSON, b'["a",' * 52_000),
    "usages": ("gemini", JSON, b"[" + b'{"usageMetadata":{"promptTokenCount":1}},' * 6_000),
    "frames": ("bedrock", AWS, make_message({}, b"") * 16_000),
    "metadata": ("bedrock", AWS, aws(("metadata", {})) * 2_000),
}


@pytest.mark.parametrize("name", HARD)
def test_no_stream_of_any_format_takes_long_to_read(name: str) -> None:
    kind, block, body = HARD[name]
    best = 1.0
    for _ in range(3):
        meter = meter_of(kind, head(block))
        begun = time.thread_time()
        out = meter.feed(body)
        best = min(best, time.thread_time() - begun)
        assert out + meter.finish() == body
    assert best < 0.05


def test_what_is_known_of_a_response_is_readable_in_a_log() -> None:
    assert repr(ResponseUse(UsageReport(1, 2), model="m")) == (
        "ResponseUse(UsageReport(1, 2, cached=0, cache_write=0, reasoning=0), reported_input=UsageReport(1, 2, cached=0,"
        " cache_write=0, reasoning=0), produced=0, is_final=True, is_finished=True, model='m')"
    )
