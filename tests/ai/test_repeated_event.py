"""Events that repeat the last one but for their text are counted as any others are."""

from __future__ import annotations

import json
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.streams.repeated_event import RepeatedEvent
from tests.ai.test_meter import EVENTS, head, meter_of

CHAT = b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n'
MESSAGE = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"%b"}}\n\n'
)
SHAPES = (
    CHAT,
    MESSAGE,
    CHAT.replace(b"null", b'"stop"'),
    CHAT.replace(b'"delta"', b'"text":"x","delta"'),
    CHAT.replace(b'{"content":"%b"}', b'{"content":"","text":"%b"}'),
    CHAT.replace(b'"finish_reason":null', b'"usage":{"prompt_tokens":3,"completion_tokens":%b1,"total_tokens":5}'),
    b'data: {"type":"response.output_text.delta","delta":"%b"}\n\n',
    b'data: {"choices":[],"usage":null,"content" : "%b" , "%b":1}\n\n',
    b'data: {"content":"%b":"b"}\n\n',
    b'data: {"content":"%b"}\n',
    b'data: {"content":"%b"}\r\n\r\n',
    b': {"content":"%b"}\n\n' * 2,
)
TEXTS = (
    *(b"a", b" word", b"1", "가😀".encode(), b"", b"finish_reason", b"prompt_tokens", b"completion_tokens", b"content"),
    *(b"text", b'"', b'\\"', b"\\", b"\\n", b"\n", b"\n\n", b"\r", b"\x00", b"\xff", b'x","content":"y', b"a" * 5_000),
    *(b'x"},"usage":{"prompt_tokens":7,"completion_tokens":8},"a":{"', b"null", b":", b"message_delta", b" "),
)  # fmt: skip
events = st.tuples(st.sampled_from(SHAPES), st.sampled_from(TEXTS)).map(lambda one: one[0].replace(b"%b", one[1]))
#: Runs of one shape, so that most events repeat.
runs = st.tuples(st.sampled_from(SHAPES), st.lists(st.sampled_from(TEXTS), max_size=6)).map(
    lambda run: [run[0].replace(b"%b", text) for text in run[1]]
)


def read(kind: str, pieces: list[bytes], path: bytes, *, cut: int = 0) -> list[object]:
    """What each piece of a stream leads to. `cut`: so many of its bytes arrive before the others."""
    meter = meter_of(kind, head(EVENTS), path=path)
    found: list[object] = []
    for piece in pieces:
        passed = (meter.feed(piece[:cut]) if cut else b"") + meter.feed(piece[cut:])
        found.append((passed, state(meter)))
    return [*found, meter.finish(), state(meter)]


def state(meter: Meter) -> tuple[object, ...]:
    return (meter.report, meter.tokens_in, meter.is_finished, meter.is_reported, meter.produced, meter.usage.model)


@given(
    st.sampled_from(["openai", "anthropic", "gemini"]),
    st.sampled_from([b"", b"/v1/responses", b"/v1/audio/speech"]),
    st.lists(runs | st.lists(events, max_size=3), max_size=4).map(lambda found: [one for run in found for one in run]),
)
@settings(max_examples=500, deadline=None)
@example(
    "openai", b"", [CHAT.replace(b"%b", text) for text in (b"a", b"b", b"finish_reason", b'"', b"\\n", b"\n\n", b"c")]
)
@example(
    "openai",
    b"",
    [b'data: {"content":"%b":"b"}\n\n'.replace(b"%b", text) for text in (b"a", b"a", b"text", b"content")],
)
@example(
    "anthropic", b"", [MESSAGE.replace(b"%b", text) for text in (b"a", b"b", b"message_delta", b"content_block_stop")]
)
def test_a_repeated_event_counts_as_if_it_were_searched(kind: str, path: bytes, pieces: list[bytes]) -> None:
    assert read(kind, pieces, path) == read(kind, pieces, path, cut=1)


def test_an_event_is_recognised_by_what_is_around_its_text() -> None:
    repeated = RepeatedEvent(frozenset({b"usage"}))
    assert repeated.text(CHAT % b"a") == b""
    repeated.remember(CHAT % b"a", re.compile(rb'"content":"([^"]+)"'))
    assert [repeated.text(CHAT % text) for text in (b"b", b" c", b"usage", b'"', b"\\n", b"")] == [
        b"b",
        b" c",
        *[b""] * 4,
    ]
    assert repeated.text(CHAT.replace(b'"c"', b'"d"') % b"a") == b""
    assert repeated.text((CHAT % b"a")[:-1]) == b""


def test_a_stream_whose_events_all_differ_is_no_longer_compared() -> None:
    meter = meter_of("openai", head(EVENTS))
    for number in range(40):
        event = json.dumps({"choices": [{"delta": {"content": "word"}}], "number": number}).encode()
        assert meter.feed(b"data: %b\n\n" % event).endswith(b"\n\n")
    assert meter.produced == 40
