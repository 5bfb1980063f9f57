"""Reported usage is found in every form of response and in any pieces; unreported usage is not invented."""

from __future__ import annotations

import gc
import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import Iterable, Sequence

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keyproxy.ai.dialects.table import DIALECTS, endpoint_of
from keyproxy.ai.responses import inflating_meter, json_members, json_meter
from keyproxy.ai.responses.json_members import MemberScanner
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.select_meter import meter_for
from keyproxy.ai.responses.streams import sse_meter, stream_reading
from keyproxy.ai.responses.usage_objects import TOKENS_MAX, UsageReport, header_report
from keyproxy.http.headers import FieldNames
from keyproxy.http_messages import ResponseHead
from keyproxy.wire.parsing.head_cache import ResponseReader
from keyproxy.wire.parsing.head_templates import LEARNT_AFTER

JSON = b"Content-Type: application/json\r\n"
EVENTS = b"Content-Type: text/event-stream; charset=utf-8\r\n"

CHAT = (
    b'{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"\\"usage\\": {\\"prompt_tokens\\": 1}"},"finish_reason":"stop"}],"usage":{"prompt_tokens":11,'
    b'"completion_tokens":5,"total_tokens":16,"prompt_tokens_details":{"cached_tokens":3}},"system_fingerprint":"fp"}'
)
MESSAGE = (
    b'{"type":"message","content":[{"type":"text","text":"Hi"}],"usage":{"input_tokens":10,"cache_creation_input_tokens":4,'
    b'"cache_read_input_tokens":null,"output_tokens":7}}'
)


def head(block: bytes = JSON, *, status: int = 200, has_content_length: bool = False) -> ResponseHead:
    raw = b"HTTP/1.1 %d So\r\n%b%b\r\n" % (status, block, b"Content-Length: 9\r\n" if has_content_length else b"")
    return ResponseReader(FieldNames()).read(raw, len(raw) - 4)


PATHS = {
    "openai": b"/v1/chat/completions", "anthropic": b"/v1/messages", "gemini": b"/v1/models/g:streamGenerateContent",
    "ollama": b"/api/chat", "bedrock": b"/model/m/converse-stream", "header": b"/",
}  # fmt: skip


def meter_of(kind: str, head: ResponseHead, *, path: bytes = b"", choices: int = 1, hides_usage: bool = False) -> Meter:
    dialect = DIALECTS[kind]
    endpoint = endpoint_of(dialect, b"POST", path or PATHS[kind])
    return meter_for(dialect, endpoint, head, choices=choices, hides_usage=hides_usage)


def fed(meter: Meter, pieces: Iterable[bytes]) -> bytes:
    return b"".join([*map(meter.feed, pieces), meter.finish()])


def cut_at(content: bytes, places: Sequence[int]) -> list[bytes]:
    ends = sorted(place % (len(content) + 1) for place in places)
    return [content[start:end] for start, end in zip([0, *ends], [*ends, len(content)], strict=True)]


def use_of(kind: str, body: bytes, block: bytes = JSON, *, path: bytes = b"") -> UsageReport | None:
    meter = meter_of(kind, head(block), path=path)
    assert fed(meter, [body]) == body
    return meter.report


# -- documents


@pytest.mark.parametrize(
    ("kind", "body", "use"),
    [
        ("openai", CHAT, UsageReport(11, 5, cached=3)),
        ("anthropic", MESSAGE, UsageReport(14, 7, cache_write=4)),
        ("openai", b'{"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}', UsageReport(0, 0)),
        ("anthropic", b'{"usage":{"input_tokens":0,"output_tokens":0}}', UsageReport(0, 0)),
        (
            "openai",
            b'{"usage":{"prompt_tokens":8,"total_tokens":8},"data":[{"embedding":[0.1,-2e-3]}]}',
            UsageReport(8, 0),
        ),
        ("openai", b'{"usage":{"prompt_tokens":8,"completion_tokens":2}}', UsageReport(8, 2)),
        ("openai", b'{"usage":{"prompt_tokens":8,"completion_tokens":2,"total_tokens":30}}', UsageReport(8, 22)),
        ("openai", b'{"usage":{"prompt_tokens":8,"completion_tokens":2,"total_tokens":3}}', UsageReport(8, 2)),
        ("openai", b'{"usage":{"total_tokens":9}}', UsageReport(0, 9)),
        ("openai", b'\xef\xbb\xbf {"usage" :\n {"prompt_tokens":1,"completion_tokens":2} }', UsageReport(1, 2)),
        ("openai", b'{"usage":null,"usage":{"prompt_tokens":1,"completion_tokens":2}}', UsageReport(1, 2)),
        ("openai", b'{"usage":{"prompt_tokens":1,"completion_tokens":2},"usage":null}', None),
        # Truncated after its usage: it was reported.
        ("openai", b'{"usage":{"prompt_tokens":1,"completion_tokens":2},"choices":[{"mess', UsageReport(1, 2)),
        # Not said, or nonsense.
        ("openai", b"", None),
        ("openai", b"{}", None),
        ("openai", b"null", None),
        ("openai", b'["usage",{"prompt_tokens":1}]', None),
        ("openai", b'{"usage":null}', None),
        ("openai", b'{"usage":"12"}', None),
        ("openai", b'{"usage":{}}', None),
        ("openai", b'{"usage":{"prompt_tokens":1}}', None),
        ("openai", b'{"usage":{"completion_tokens":1}}', None),
        ("openai", b'{"usage":{"prompt_tokens":-1,"completion_tokens":2}}', None),
        ("openai", b'{"usage":{"prompt_tokens":1.0,"completion_tokens":2}}', None),
        ("openai", b'{"usage":{"prompt_tokens":"1","completion_tokens":2}}', None),
        ("openai", b'{"usage":{"prompt_tokens":true,"completion_tokens":2}}', None),
        ("openai", b'{"usage":{"prompt_tokens":1,"completion_tokens":1e3}}', None),
        ("openai", b'{"usage":{"prompt_tokens":1,"completion_tokens":%d}}' % TOKENS_MAX, UsageReport(1, TOKENS_MAX)),
        ("openai", b'{"usage":{"prompt_tokens":1,"completion_tokens":%d}}' % (TOKENS_MAX + 1), None),
        ("openai", b'{"usage":{"prompt_tokens":1,"completion_tokens":' + b"9" * 5000 + b"}}", None),
        ("openai", b'{"a":' * 3000 + b"1" + b"}" * 3000, None),
        ("openai", b'{"usage":' * 3000, None),
        ("openai", b'{"usage":{"a":' + b"[" * 100_000, None),
        ("openai", b'{"usage":{"prompt_tokens":1,"completion_tok', None),
        ("openai", b'{"choices":[{"usage":{"prompt_tokens":1,"completion_tokens":2}}]}', None),
        ("openai", b'{"metadata":{"usage":{"prompt_tokens":0,"completion_tokens":0}}}', None),
        ("openai", b'{"x":"usage","y":"{\\"usage\\":{\\"total_tokens\\":0}}"}', None),
        ("anthropic", b'{"usage":{"input_tokens":10}}', None),
        ("anthropic", b'{"usage":{"output_tokens":10}}', None),
        ("anthropic", b'{"usage":{"input_tokens":1,"cache_read_input_tokens":-1,"output_tokens":10}}', None),
        ("anthropic", b'{"usage":[1,2]}', None),
    ],
)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "scanned"])
def test_a_document_has_the_usage_that_it_reports_or_none(
    kind: str, body: bytes, use: UsageReport | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(json_meter, "KEPT_BYTES_MAX", 0)
    assert use_of(kind, body) == use


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-10, 10**6)
    | st.text(max_size=8)
    | st.sampled_from(['"usage":{', "\\", '"']),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["usage", "a", '"', "\\", "usage\\"]) | st.text(max_size=4), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(values, st.integers(0, 2), st.lists(st.integers(0, 4000), max_size=12))
@example({"usage": {"usage": 1}}, 0, [3])
@example({"a": '\\"usage":', "usage": {"a": 1}}, 0, list(range(40)))
def test_the_scanner_finds_what_a_parser_finds_whatever_the_pieces(
    content: object, indent: int, places: list[int]
) -> None:
    raw = json.dumps(content, indent=indent or None, ensure_ascii=indent == 1).encode()
    scanner = MemberScanner(["usage", "a"])
    for piece in cut_at(raw, places):
        scanner.feed(piece)
    members = content if isinstance(content, dict) else {}
    for name in ("usage", "a"):
        value = members.get(name)
        is_read = isinstance(value, dict | str | int) and not isinstance(value, bool)
        assert scanner.found.get(name) == (value if is_read else None)


@given(st.binary(max_size=60) | st.text('{}[]":\\, usage1n', max_size=60).map(str.encode), st.lists(st.integers(0, 60)))
def test_what_the_scanner_finds_in_anything_does_not_depend_on_the_pieces(raw: bytes, places: list[int]) -> None:
    whole, parted = MemberScanner(["usage", "u"]), MemberScanner(["usage", "u"])
    whole.feed(raw)
    for piece in cut_at(raw, places):
        parted.feed(piece)
    assert whole.found == parted.found


def test_a_large_document_is_read_in_little_memory_and_time_wherever_its_usage_stands() -> None:
    usage = b'"usage":{"prompt_tokens":9,"total_tokens":9}'
    row = b'{"embedding":[' + b"0.0123456789," * 1000 + b'0],"text":"' + b'\\"{[' * 2000 + b'"},'
    rows = row * 400  # 8 MiB
    for body in (b"{" + usage + b',"data":[' + rows + b"0]}", b'{"data":[' + rows + b"0]," + usage + b"}"):
        pieces = [body[at : at + 65_536] for at in range(0, len(body), 65_536)]
        meter = meter_of("openai", head())
        tracemalloc.start()
        for piece in pieces:
            meter.feed(piece)
        meter.finish()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert meter.report == UsageReport(9, 0)
        assert peak < 1_000_000


@pytest.mark.parametrize(("padding", "use"), [(8000, UsageReport(1, 2)), (9000, None)])
def test_a_usage_that_is_too_long_is_not_read_in_a_large_document(padding: int, use: UsageReport | None) -> None:
    usage = {"x": "y" * padding, "prompt_tokens": 1, "completion_tokens": 2}
    assert padding < json_members.VALUE_BYTES_MAX or use is None
    body = json.dumps({"data": "z" * json_meter.KEPT_BYTES_MAX, "usage": usage}).encode()
    assert use_of("openai", body) == use


# -- which meter


@pytest.mark.parametrize(
    ("block", "use"),
    [
        (b"", UsageReport(11, 5, cached=3)),
        (b"content-type:application/json;charset=utf-8\r\n", UsageReport(11, 5, cached=3)),
        (b"Content-Type: application/vnd.x+json\r\n", UsageReport(11, 5, cached=3)),
        (b"X: y\r\nContent-Type: APPLICATION/JSON\r\n", UsageReport(11, 5, cached=3)),
        (b"Content-Encoding: identity\r\n", UsageReport(11, 5, cached=3)),
        (b"Content-Type: audio/mpeg\r\n", None),
        (b"Content-Type: text/plain\r\n", None),
        (JSON + b"Content-Encoding: br\r\n", None),
        (JSON + b"Content-Encoding: gzip, gzip\r\n", None),
    ],
)
def test_only_readable_responses_are_read(block: bytes, use: UsageReport | None) -> None:
    assert use_of("openai", CHAT, block) == use


@pytest.mark.parametrize(
    ("block", "use"),
    [
        (b"X-Usage-Tokens: 12\r\n", UsageReport(0, 12)),
        (b"A: b\r\nx-usage-tokens:  0 \r\nC: d\r\n", UsageReport(0, 0)),
        (b"X-Usage-Tokens: %d\r\n" % TOKENS_MAX, UsageReport(0, TOKENS_MAX)),
        (b"X-Usage-Tokens: %d\r\n" % (TOKENS_MAX + 1), None),
        (b"X-Usage-Tokens: 12\r\nX-Usage-Tokens: 12\r\n", None),
        (b"", None),
        (b"X-Usage-Tokens:\r\n", None),
        (b"X-Usage-Tokens: -1\r\n", None),
        (b"X-Usage-Tokens: +1\r\n", None),
        (b"X-Usage-Tokens: 1.0\r\n", None),
        (b"X-Usage-Tokens: 1e3\r\n", None),
        (b"X-Usage-Tokens: 1 2\r\n", None),
        (b"X-Usage-Tokens: 1, 2\r\n", None),
        (b"X-Usage-Tokens: \xc2\xb2\r\n", None),
        (b"Y: X-Usage-Tokens: 12\r\n", None),
        (b"X_Usage_Tokens: 12\r\n", None),
        (b"Connection: x-usage-tokens\r\nX-Usage-Tokens: 12\r\n", None),
        (b"X-Usage-Tokens: " + b"9" * 5000 + b"\r\n", None),
    ],
)
def test_a_header_reports_one_whole_number_or_nothing(block: bytes, use: UsageReport | None) -> None:
    raw, reader = b"HTTP/1.1 200 OK\r\n%b\r\n" % block, ResponseReader(FieldNames())
    judged = reader.read(raw, len(raw) - 4)
    for _ in range(LEARNT_AFTER + 1):
        recognised = reader.read(raw, len(raw) - 4)
    assert header_report(judged.usage_tokens) == header_report(recognised.usage_tokens) == use
    meter = meter_of("header", judged)
    assert meter.report == use
    assert fed(meter, [b"any", b"thing"]) == b"anything"
    assert meter.report == use


# -- streams


def delta(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + orjson.dumps({"id": "c", "choices": [choice], "usage": None}) + b"\n\n"


USAGE_CHUNK = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":11,"completion_tokens":2,"total_tokens":13}}\n\n'
DONE = b"data: [DONE]\n\n"
MESSAGES = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","usage":{"input_tokens":25,'
    b'"cache_read_input_tokens":5,"output_tokens":1}}}\n\n'
    b'event: content_block_start\ndata: {"type":"content_block_start","content_block":{"type":"text","text":""}}\n\n'
    b'event: ping\ndata: {"type": "ping"}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"Hello"}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":6}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":15}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
RESPONSES = (
    b'event: response.created\ndata: {"type":"response.created","response":{"id":"r","usage":null,"tools":[{"parameters":'
    b'{"properties":{"usage":{"input_tokens":0,"output_tokens":0}}}}]}}\n\n'
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"Hi"}\n\n'
    b'event: response.output_text.done\ndata: {"type":"response.output_text.done","text":"Hi"}\n\n'
    b'event: response.completed\ndata: {"type":"response.completed","response":{"tools":[{"usage":{"input_tokens":0,'
    b'"output_tokens":0}}],"usage":{"input_tokens":37,"output_tokens":11,"total_tokens":48}}}\n\n'
)


def path_of(kind: str, body: bytes) -> bytes:
    return b"/v1/responses" if kind == "openai" and b'"response.' in body else b""


def stream_use(
    kind: str, body: bytes, *, hides_usage: bool = False, path: bytes = b""
) -> tuple[UsageReport | None, bytes]:
    meter = meter_of(kind, head(EVENTS), hides_usage=hides_usage, path=path or path_of(kind, body))
    out = fed(meter, [body])
    return meter.report, out


@pytest.mark.parametrize(
    ("kind", "body", "use"),
    [
        ("openai", delta("Hi") + delta("!") + USAGE_CHUNK + DONE, UsageReport(11, 2)),
        ("openai", b"\xef\xbb\xbf" + USAGE_CHUNK, UsageReport(11, 2)),
        ("openai", b": hello\n\n" + USAGE_CHUNK.replace(b"data: ", b"data:"), UsageReport(11, 2)),
        ("openai", USAGE_CHUNK.replace(b"\n", b"\r\n"), UsageReport(11, 2)),
        ("openai", USAGE_CHUNK.replace(b"\n", b"\r"), UsageReport(11, 2)),
        ("openai", USAGE_CHUNK.replace(b'"usage":', b'"usage":\ndata: '), UsageReport(11, 2)),
        ("openai", USAGE_CHUNK.rstrip(), UsageReport(11, 2)),
        ("openai", USAGE_CHUNK.replace(b"2", b"0").replace(b"13", b"11"), UsageReport(11, 0)),
        ("openai", USAGE_CHUNK + USAGE_CHUNK.replace(b":2,", b":3,").replace(b"13", b"14"), UsageReport(11, 3)),
        ("openai", RESPONSES, UsageReport(37, 11)),
        ("anthropic", MESSAGES, UsageReport(30, 15, cached=5)),
        (
            "anthropic",
            MESSAGES.replace(b'"output_tokens":15', b'"input_tokens":40,"output_tokens":15'),
            UsageReport(45, 15, cached=5),
        ),
        # Not said, or nonsense.
        ("openai", delta("Hi") + DONE, None),
        ("openai", RESPONSES[: RESPONSES.index(b"event: response.completed")], None),
        ("openai", USAGE_CHUNK.replace(b"11", b"-1"), None),
        ("openai", b"data: [" + b"[" * 5000 + b'"usage"\n\n', None),
        ("openai", b'data: {"usage":\n\n', None),
        ("openai", b'data: ["usage"]\n\n', None),
        ("openai", b': {"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n', None),
        ("anthropic", MESSAGES[: MESSAGES.index(b"event: message_delta")], None),
        ("anthropic", MESSAGES[MESSAGES.index(b"event: message_delta") :], None),
        ("anthropic", MESSAGES.replace(b":15", b":-15"), None),
        ("anthropic", MESSAGES.replace(b'"output_tokens":15', b'"output_tokens":null'), None),
    ],
)
def test_a_stream_has_the_usage_that_it_reported_last_or_none(kind: str, body: bytes, use: UsageReport | None) -> None:
    assert stream_use(kind, body) == (use, body)


def test_only_a_usage_chunk_that_the_client_did_not_request_is_left_out() -> None:
    use, out = stream_use("openai", delta("Hi") + USAGE_CHUNK + DONE, hides_usage=True)
    assert (use, out) == (UsageReport(11, 2), delta("Hi") + DONE)
    # Azure's first chunk has no choices either; some servers put the usage into the last chunk with a choice.
    first = b'data: {"choices":[],"prompt_filter_results":[]}\n\n'
    last = b'data: {"choices":[{"delta":{}}],"usage":{"prompt_tokens":11,"completion_tokens":2}}\n\n'
    assert stream_use("openai", first + last, hides_usage=True) == (UsageReport(11, 2), first + last)


def test_nothing_is_left_out_of_a_response_with_a_length_or_a_coding() -> None:
    body = delta("Hi") + USAGE_CHUNK + DONE
    meter = meter_of("openai", head(EVENTS, has_content_length=True), hides_usage=True)
    assert fed(meter, [body]) == body
    assert meter.report == UsageReport(11, 2)
    packed = gzip.compress(body)
    meter = meter_of("openai", head(EVENTS + b"Content-Encoding: gzip\r\n"), hides_usage=True)
    assert fed(meter, [packed]) == packed
    assert meter.report == UsageReport(11, 2)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_event_is_passed_on_with_the_piece_that_completes_it(end: bytes) -> None:
    events = [event.replace(b"\n", end) for event in (delta("Hi"), delta("!"), DONE)]
    meter = meter_of("openai", head(EVENTS), hides_usage=True)
    for event in events:
        assert meter.feed(event[:7]) == b""
        assert meter.feed(event[7:]) == event
    assert meter.feed(events[0]) == events[0]


pieces_of_streams = st.sampled_from(
    [delta("Hi"), delta('"usage":{'), delta("ä\\"), USAGE_CHUNK, DONE, b": ping\n\n", b"\n", b"data: x", b"\n\n", b"\r\n",
     b"event: error\ndata: {}\n\n", USAGE_CHUNK[:-2] + b"\r\r", USAGE_CHUNK.replace(b"\n", b"\r\n"), b"\r",
     b"\xef\xbb\xbf", *RESPONSES.splitlines(keepends=True), *MESSAGES.splitlines(keepends=True)]
)  # fmt: skip


@given(
    st.lists(pieces_of_streams, max_size=8).map(b"".join) | st.binary(max_size=50),
    st.lists(st.integers(0, 4000), max_size=20),
    st.sampled_from(["openai", "anthropic"]),
    st.booleans(),
)
@example(USAGE_CHUNK.replace(b"\n", b"\r\n") + DONE, list(range(200)), "openai", True)
@example(delta("Hi") * 2 + b"\n" + USAGE_CHUNK, [], "openai", True)
@example(delta("Hi") + b"\r\n\n\r\n\n" + USAGE_CHUNK, [], "openai", True)
@example(b"\n" + USAGE_CHUNK[:-2] + b"\n\r\n\n", list(range(200)), "openai", True)
def test_a_stream_is_read_and_passed_on_alike_whatever_the_pieces(
    body: bytes, places: list[int], kind: str, hides_usage: bool
) -> None:
    found = []
    for pieces in ([body], cut_at(body, places), [body[at : at + 1] for at in range(len(body))]):
        meter = meter_of(kind, head(EVENTS), hides_usage=hides_usage, path=path_of(kind, body))
        out = fed(meter, pieces)
        found.append((out, repr(meter.result()), meter.report, meter.produced))
        assert meter.produced <= meter.produced_bound
        assert hides_usage or out == body
    assert found[0] == found[1] == found[2]


def test_what_was_produced_is_known_while_a_stream_runs() -> None:
    meter = meter_of("openai", head(EVENTS))
    produced = []
    for event in (delta(""), delta("a"), delta(" b"), delta(" "), delta("c" * 98), USAGE_CHUNK, delta("d")):
        meter.feed(event)
        assert meter.produced <= meter.produced_bound
        produced.append(meter.produced)
    assert produced == [0, 1, 2, 3, 54, 2, 3]
    assert meter.tokens_in == 11


def test_a_prompt_s_tokens_are_known_from_the_first_event_of_a_message() -> None:
    meter = meter_of("anthropic", head(EVENTS))
    meter.feed(MESSAGES[: MESSAGES.index(b"event: message_delta")])
    assert (meter.tokens_in, meter.report, meter.produced) == (30, None, 1)


def test_the_text_of_responses_is_counted_once_although_it_is_repeated_when_done() -> None:
    meter = meter_of("openai", head(EVENTS), path=b"/v1/responses")
    meter.feed(RESPONSES[: RESPONSES.index(b"event: response.completed")])
    assert meter.produced == 1


@pytest.mark.parametrize(("begun", "passed"), [(b"", b""), (b"data: {", b""), (b"data: " + b"x" * 70_000, b"\n\n")])
def test_a_stream_can_be_ended_between_two_events_whatever_had_begun(begun: bytes, passed: bytes) -> None:
    meter = meter_of("openai", head(EVENTS), hides_usage=True)
    assert meter.is_stream
    assert meter.feed(delta("Hi") + begun) == delta("Hi") + (begun if passed else b"")
    assert meter.cut(b"data: {}\n\n") == passed + b"data: {}\n\n"
    assert meter.finish() == b""


def test_what_is_no_plain_stream_cannot_be_ended_by_an_event() -> None:
    for block in (JSON, EVENTS + b"Content-Encoding: gzip\r\n", EVENTS + b"Content-Encoding: br\r\n"):
        meter = meter_of("openai", head(block))
        assert not meter.is_stream
        with pytest.raises(ValueError, match="no stream"):
            meter.cut(b"data: {}\n\n")


def test_an_endless_event_is_counted_in_bounded_memory() -> None:
    meter = meter_of("openai", head(EVENTS), hides_usage=True)
    piece = b'data: {"usage":{"x":"' + b"x" * 65_515
    tracemalloc.start()
    sent = sum(len(meter.feed(piece)) for _ in range(64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * stream_reading.EVENT_BYTES_MAX
    end = b'","usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'
    sent += len(meter.feed(end))
    assert sent == 64 * len(piece) + len(end)
    assert meter.report is None
    assert meter.produced > stream_reading.EVENT_BYTES_MAX // 4
    assert meter.feed(USAGE_CHUNK) == b""
    assert meter.report == UsageReport(11, 2)


# -- compressed


def packed(body: bytes, encoding: str) -> bytes:
    if encoding == "gzip":
        return gzip.compress(body)
    bits = zlib.MAX_WBITS if encoding == "zlib" else -zlib.MAX_WBITS
    compressor = zlib.compressobj(wbits=bits)
    return compressor.compress(body) + compressor.flush()


@given(st.sampled_from(["gzip", "zlib", "bare"]), st.lists(st.integers(0, 4000), max_size=9), st.booleans())
def test_a_compressed_response_is_read_and_passed_on_unchanged(
    encoding: str, places: list[int], is_stream: bool
) -> None:
    body = delta("Hi") + USAGE_CHUNK + DONE if is_stream else CHAT
    raw = packed(body, encoding)
    field = b"Content-Encoding: " + (b"GZip" if encoding == "gzip" else b"deflate") + b"\r\n"
    meter = meter_of("openai", head((EVENTS if is_stream else JSON) + field))
    assert fed(meter, cut_at(raw, places)) == raw
    assert meter.report == (UsageReport(11, 2) if is_stream else UsageReport(11, 5, cached=3))


GZIPPED = JSON + b"Content-Encoding: gzip\r\n"


@pytest.mark.parametrize(
    ("raw", "use"),
    [
        (gzip.compress(CHAT[:50], mtime=0) + gzip.compress(CHAT[50:], mtime=0), UsageReport(11, 5, cached=3)),
        (gzip.compress(CHAT, mtime=0) + b"\0\0garbage", UsageReport(11, 5, cached=3)),
        (gzip.compress(CHAT, mtime=0)[:-9], UsageReport(11, 5, cached=3)),
        (gzip.compress(CHAT, mtime=0)[:40], None),
        (CHAT, None),
        (b"", None),
        (b"\x1f\x8b", None),
    ],
)
def test_what_is_broken_in_compression_costs_what_comes_after_it(raw: bytes, use: UsageReport | None) -> None:
    assert use_of("openai", raw, GZIPPED) == use


def test_a_bomb_is_read_no_further_than_the_bound_and_in_little_memory() -> None:
    bomb = gzip.compress(b"{" + b" " * 50_000_000 + CHAT[1:], mtime=0)
    assert 2 * inflating_meter.INFLATED_BYTES_MAX < 50_000_000
    meter = meter_of("openai", head(GZIPPED))
    tracemalloc.start()
    assert fed(meter, [bomb]) == bomb
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert meter.report is None


def test_a_bomb_of_empty_members_is_read_no_further_than_the_bound() -> None:
    bomb = gzip.compress(b"", mtime=0) * 200 + gzip.compress(CHAT, mtime=0)
    assert use_of("openai", bomb, GZIPPED) is None


# -- what reading costs

_READ_BYTES = 262_144


def filled(piece: bytes, before: bytes = b"", after: bytes = b"", size: int = 2 * _READ_BYTES) -> bytes:
    return before + piece * ((size - len(before) - len(after)) // len(piece)) + after


HARD = {
    "usages": (JSON, filled(b'"usage":{},', b"{")),
    "whole usages": (JSON, filled(b'"usage":{"prompt_tokens":1,"completion_tokens":1},', b"{")),
    "usages elsewhere": (JSON, filled(b'"usage":', b'{"a":{')),
    "usages without one": (JSON, filled(b'"usage":null,', b"{")),
    "open usages": (JSON, filled(b'"usage":{"a":[', b"{")),
    "texts": (JSON, filled(b'"a",', b'{"a":[')),
    "quotes": (JSON, filled(b'"', b'{"a":')),
    "keys within texts": (JSON, filled(b'"\\"usage\\":",', b'{"a":[')),
    "a short document": (JSON, filled(b'{"a":[]},', b'{"usage":[', b"1]}", size=65_000)),
    "empty events": (EVENTS, filled(b"\n\n")),
    "events that end in CR": (EVENTS, filled(b"data: x\r\r", b"data: {}\n\n", b'"usage":{}')),
    "events with a usage": (EVENTS, filled(b'data: {"usage":{"prompt_tokens":1}}\n\n', b"data: {}\n\n")),
    "events with a usage that end in CR": (EVENTS, filled(b'data: {"usage":{}}\r\r', b"data: {}\n\n")),
    "texts of a stream": (EVENTS, filled(b'"content":"a"', b"data: {}\n\n", b"\n\n")),
    "a long event": (EVENTS, filled(b'{"a":[]},', b'data: {}\n\ndata: {"usage":[', b"1]}\n\n", size=1_000_000)),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("is_packed", [False, True])
def test_no_response_takes_long_to_read_and_all_of_it_is_passed_on(name: str, is_packed: bool) -> None:
    block, body = HARD[name]
    raw = gzip.compress(body * 8, 1) if is_packed else body
    meter = meter_of("openai", head(block + b"Content-Encoding: gzip\r\n" * is_packed))
    longest, out = 0.0, []
    gc.collect()
    gc.freeze()  # as in a running proxy: what the tests have made is not looked through meanwhile
    # As much as is read from a socket at once.
    for place in range(0, len(raw) + _READ_BYTES, _READ_BYTES):
        piece = raw[place : place + _READ_BYTES]
        # Of this thread: other work on the machine does not count.
        begun = time.thread_time()
        out.append(meter.feed(piece) if piece else meter.finish())
        longest = max(longest, time.thread_time() - begun)
    gc.unfreeze()
    assert longest < 0.05
    assert b"".join(out) == raw


def test_a_document_with_too_many_usages_or_keys_reports_no_usage() -> None:
    usage = b'"usage":{"prompt_tokens":1,"completion_tokens":1}'
    for count, use in ((100, UsageReport(1, 1)), (300, None)):
        assert use_of("openai", b"{%b%b}" % (b'"a":"%b",' % (b"x" * 70_000), b",".join([usage] * count))) == use
    nested = b'{"a":{%b"b":1},%b}' % (b'"usage":1,' * 9_000, usage)
    assert use_of("openai", nested) is None


def test_a_stream_with_too_many_events_in_one_piece_is_charged_by_its_bytes_and_read_on_after_it() -> None:
    meter = meter_of("openai", head(EVENTS), hides_usage=True)
    piece = delta("a") + b'data: {"usage":{}}\n\n' * 4_000
    assert meter.feed(piece) == piece
    assert meter.produced > len(piece) // 8
    assert meter.feed(b"\n\n" + USAGE_CHUNK) == b"\n\n"
    assert meter.report == UsageReport(11, 2)


def test_a_compressed_response_that_arrives_faster_than_it_is_read_is_read_later() -> None:
    words = b"".join(b'"%d words and numbers",' % number for number in range(20_000))
    body = b'{"a":[%b1],"usage":{"prompt_tokens":11,"completion_tokens":5}}' % words
    assert inflating_meter.INFLATED_BYTES_MAX < len(body) < 2 * inflating_meter.INFLATED_BYTES_MAX
    assert use_of("openai", gzip.compress(body), GZIPPED) == UsageReport(11, 5)


@given(st.text("\r\nd:", max_size=60).map(str.encode), st.lists(st.integers(0, 60), max_size=9), st.booleans())
def test_unread_content_is_passed_on_once_whatever_the_pieces(raw: bytes, places: list[int], has_begun: bool) -> None:
    body = (b"data: {}\n\n" if has_begun else b"") + raw
    meter = meter_of("openai", head(EVENTS))
    before, sse_meter._EVENTS_MAX = sse_meter._EVENTS_MAX, 2  # type: ignore[misc]
    try:
        assert fed(meter, cut_at(body, places)) == body
    finally:
        sse_meter._EVENTS_MAX = before  # type: ignore[misc]
