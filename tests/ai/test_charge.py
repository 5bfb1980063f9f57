"""A request is charged what its response reports, else a bounded estimate, by how it ended."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.ai.charge import NOTHING, Charge, Reserved, ResponseEnd, charge_of
from keyproxy.ai.dialects.endpoint import EndpointClass
from keyproxy.ai.responses.meter import ResponseUse
from keyproxy.ai.responses.usage_objects import UsageReport
from tests.ai.test_meter import EVENTS, JSON, head, meter_of
from tests.ai.test_response_formats import MESSAGE, array, candidate, chat, lines, sse

COMPLETE, BROKEN, ABORTED = ResponseEnd.COMPLETE, ResponseEnd.BROKEN, ResponseEnd.ABORTED
GENERATES, READS, MEDIA, UNKNOWN = (
    EndpointClass.GENERATES, EndpointClass.READS, EndpointClass.MEDIA, EndpointClass.UNKNOWN,
)  # fmt: skip
HELLO = Reserved(GENERATES, 18, 50)


def estimated(tokens_in: int, tokens_out: int, **parts: int) -> Charge:
    return Charge(UsageReport(tokens_in, tokens_out, **parts), is_estimated=True)


def reported(tokens_in: int, tokens_out: int, **parts: int) -> Charge:
    return Charge(UsageReport(tokens_in, tokens_out, **parts), is_estimated=False)


def charge(
    reserved: Reserved, end: ResponseEnd, use: ResponseUse | None, *, status: int | None = 200, whole: bool = True
) -> Charge:
    return charge_of(reserved, end, status=None if use is None else status, use=use, was_sent_whole=whole)


def use_of(kind: str, body: bytes, block: bytes = JSON, *, path: bytes = b"") -> ResponseUse:
    meter = meter_of(kind, head(block), path=path)
    meter.feed(body)
    meter.finish()
    return meter.result()


def chat_body(tokens_in: int, tokens_out: int) -> bytes:
    return orjson.dumps({"usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}})


HELLOS = orjson.dumps({"choices": [{"message": {"content": "Hello, world!"}}] * 3})
ONE_STRING = orjson.dumps({"choices": [{"message": {"content": "Hello world"}}]})
RESPONSE = orjson.dumps({"usage": {"input_tokens": 100_000, "output_tokens": 50, "total_tokens": 100_050}})
OLLAMA = lines({"message": {"content": "x"}, "done": False}, {"done": True, "prompt_eval_count": 26, "eval_count": 298})
GEMINI = array(
    candidate("x", promptTokenCount=100, toolUsePromptTokenCount=5, candidatesTokenCount=20, thoughtsTokenCount=30)
)
LINES = b"Content-Type: application/x-ndjson\r\n"


@pytest.mark.parametrize(
    ("reserved", "kind", "path", "block", "body", "wanted"),
    [
        (HELLO, "openai", b"", JSON, chat_body(13, 9), reported(13, 9)),
        (Reserved(GENERATES, 18, 150), "openai", b"", JSON, HELLOS, estimated(18, 12)),
        (Reserved(GENERATES, 18, 482), "openai", b"", JSON, chat_body(13, 9), reported(13, 9)),
        (Reserved(GENERATES, 20_012, 4096), "openai", b"", JSON, chat_body(20_005, 9), reported(20_005, 9)),
        (Reserved(GENERATES, 15_012, 4096), "openai", b"", JSON, ONE_STRING, estimated(15_012, 2)),
        (
            Reserved(READS, 17, 0), "anthropic", b"/v1/messages/count_tokens", JSON, b'{"input_tokens":14}',
            reported(14, 0),
        ),
        (
            Reserved(READS, 14, 0), "openai", b"/v1/moderations", JSON, b'{"id":"m","results":[{"flagged":true}]}',
            estimated(14, 0),
        ),
        (Reserved(GENERATES, 131_072, 50), "openai", b"/v1/responses", JSON, RESPONSE, reported(100_000, 50)),
        (Reserved(GENERATES, 18, 4096), "ollama", b"", LINES, OLLAMA, reported(26, 298)),
        (Reserved(GENERATES, 14, 4096), "gemini", b"", JSON, GEMINI, reported(105, 50, reasoning=30)),
    ],
)  # fmt: skip
def test_the_examples_are_charged_exactly(
    reserved: Reserved, kind: str, path: bytes, block: bytes, body: bytes, wanted: Charge
) -> None:
    assert charge(reserved, COMPLETE, use_of(kind, body, block, path=path)) == wanted


def test_an_aborted_stream_is_charged_its_reasoning_reservation() -> None:
    reserved = Reserved(GENERATES, 18, 8192, reasoning=8192)
    use = use_of("openai", sse(chat("Hello")), EVENTS)
    aborted = charge(reserved, ABORTED, use)
    assert (aborted, aborted.total) == (estimated(18, 8192, reasoning=8191), 8210)
    # A stated budget; and a model that does not reason.
    assert charge(Reserved(GENERATES, 18, 8192, reasoning=1000), ABORTED, use) == estimated(18, 1001, reasoning=1000)
    assert charge(Reserved(GENERATES, 18, 8192), ABORTED, use) == estimated(18, 1)


SOME = ResponseUse(produced=7, is_finished=False)
ALL = ResponseUse(produced=7)
INPUT = ResponseUse(
    reported_input=UsageReport(32, 0, cached=5, cache_write=2), produced=7, is_final=False, is_finished=False
)
REPORT = ResponseUse(UsageReport(30, 9, cached=4))
PROGRESS = ResponseUse(UsageReport(30, 9), is_final=False, is_finished=False, produced=11)
REASONING = Reserved(GENERATES, 18, 50, reasoning=20)
TUNNEL = Reserved(UNKNOWN, 0, 500, is_tunnel=True)


@pytest.mark.parametrize(
    ("reserved", "end", "use", "wanted"),
    [
        # A report, even above the reservation.
        (HELLO, COMPLETE, REPORT, reported(30, 9, cached=4)),
        (Reserved(GENERATES, 1, 1), COMPLETE, REPORT, reported(30, 9, cached=4)),
        (HELLO, BROKEN, REPORT, reported(30, 9, cached=4)),
        (HELLO, ABORTED, REPORT, reported(30, 9, cached=4)),
        (HELLO, COMPLETE, PROGRESS, reported(30, 9)),
        # No byte.
        (HELLO, BROKEN, None, NOTHING),
        (REASONING, BROKEN, None, NOTHING),
        (HELLO, COMPLETE, None, NOTHING),
        # No report.
        (HELLO, COMPLETE, ALL, estimated(18, 7)),
        (REASONING, COMPLETE, ALL, estimated(18, 7)),
        (Reserved(GENERATES, 18, 5), COMPLETE, ALL, estimated(18, 7)),
        (Reserved(READS, 18, 0), COMPLETE, ALL, estimated(18, 0)),
        (Reserved(MEDIA, 18, 4096), COMPLETE, ALL, estimated(18, 7)),
        (Reserved(UNKNOWN, 18, 4096), COMPLETE, ALL, estimated(18, 7)),
        (Reserved(EndpointClass.NONE, 0, 0), COMPLETE, ALL, NOTHING),
        (HELLO, BROKEN, SOME, estimated(18, 7)),
        (HELLO, BROKEN, PROGRESS, estimated(30, 11)),
        (HELLO, BROKEN, INPUT, estimated(32, 7, cached=5, cache_write=2)),
        # Aborted.
        (HELLO, ABORTED, None, estimated(18, 0)),
        (REASONING, ABORTED, None, estimated(18, 20, reasoning=20)),
        (HELLO, ABORTED, SOME, estimated(18, 7)),
        (HELLO, ABORTED, ALL, estimated(18, 7)),
        (HELLO, ABORTED, INPUT, estimated(32, 7, cached=5, cache_write=2)),
        (HELLO, ABORTED, PROGRESS, estimated(30, 11)),
        (REASONING, ABORTED, SOME, estimated(18, 27, reasoning=20)),
        (REASONING, ABORTED, ALL, estimated(18, 27, reasoning=20)),
        (Reserved(GENERATES, 18, 5), ABORTED, SOME, estimated(18, 5)),
        (Reserved(GENERATES, 18, 25, reasoning=25), ABORTED, SOME, estimated(18, 25, reasoning=18)),
        (Reserved(READS, 18, 0), ABORTED, SOME, estimated(18, 0)),
        (Reserved(READS, 18, 0), ABORTED, None, estimated(18, 0)),
        # A tunnel.
        (TUNNEL, COMPLETE, ALL, estimated(0, 500)),
        (TUNNEL, ABORTED, SOME, estimated(0, 500)),
        (TUNNEL, BROKEN, None, NOTHING),
        (TUNNEL, ABORTED, None, NOTHING),
    ],
)
def test_the_charge_follows_from_the_report_or_the_end(
    reserved: Reserved, end: ResponseEnd, use: ResponseUse | None, wanted: Charge
) -> None:
    assert charge(reserved, end, use) == wanted


@pytest.mark.parametrize("end", ResponseEnd)
@pytest.mark.parametrize("use", [SOME, ALL, INPUT, REPORT, PROGRESS])
@pytest.mark.parametrize(("status", "is_free"), [(200, False), (399, False), (400, True), (429, True), (503, True)])
def test_an_error_is_charged_nothing_even_if_it_reports_usage(
    status: int, is_free: bool, end: ResponseEnd, use: ResponseUse
) -> None:
    assert (charge(REASONING, end, use, status=status) == NOTHING) is is_free


@pytest.mark.parametrize("use", [None, SOME, ALL, INPUT, PROGRESS])
def test_a_client_that_leaves_before_its_request_was_sent_whole_is_charged_nothing(use: ResponseUse | None) -> None:
    assert charge(REASONING, ABORTED, use, whole=False) == NOTHING
    assert charge(REASONING, ABORTED, REPORT, whole=False) == reported(30, 9, cached=4)


def test_a_stream_is_charged_its_report_only_if_it_came_with_the_finish() -> None:
    before = MESSAGE.index(b"event: message_delta")
    aborted = charge(HELLO, ABORTED, use_of("anthropic", MESSAGE[:before], EVENTS))
    assert aborted == estimated(32, 1, cached=5, cache_write=2)
    report = MESSAGE[: MESSAGE.index(b"event: message_stop")]
    assert not charge(HELLO, ABORTED, use_of("anthropic", report, EVENTS)).is_estimated
    unfinished = report.replace(b"content_block_stop", b"ping")
    assert charge(HELLO, ABORTED, use_of("anthropic", unfinished, EVENTS)) == estimated(32, 15, cached=5, cache_write=2)
    assert not charge(HELLO, COMPLETE, use_of("anthropic", unfinished, EVENTS)).is_estimated


def test_an_unstreamed_response_that_is_aborted_is_charged_what_arrived() -> None:
    body = json.dumps({"choices": [{"message": {"content": "one two three four"}}]})
    assert charge(HELLO, ABORTED, use_of("openai", body[: body.index(" three")].encode())) == estimated(18, 2)


uses = st.builds(
    ResponseUse,
    st.none() | st.builds(UsageReport, st.integers(0, 99), st.integers(0, 99)),
    reported_input=st.none() | st.builds(UsageReport, st.integers(0, 99), st.just(0)),
    produced=st.integers(0, 99), is_final=st.booleans(), is_finished=st.booleans(),
)  # fmt: skip


@given(
    st.builds(
        Reserved, st.sampled_from(EndpointClass), st.integers(0, 99), st.integers(0, 99), reasoning=st.integers(0, 99)
    ),
    st.sampled_from(ResponseEnd), st.none() | uses, st.sampled_from([200, 500]), st.booleans(),
)  # fmt: skip
def test_no_charge_exceeds_the_report_or_the_bounded_estimate(
    reserved: Reserved, end: ResponseEnd, use: ResponseUse | None, status: int, whole: bool
) -> None:
    found = charge(reserved, end, use, status=status, whole=whole)
    if use is None:
        bounds: list[Any] = [(reserved.tokens_in, reserved.tokens_out)]
    else:
        known = use.reported_input
        bounds = [(reserved.tokens_in if known is None else known.tokens_in, use.produced + reserved.reasoning)]
        bounds += [(use.report.tokens_in, use.report.tokens_out)] if use.report is not None else []
    tokens = found.tokens
    assert any(tokens.tokens_in <= most_in and tokens.tokens_out <= most_out for most_in, most_out in bounds)
    assert tokens.cached + tokens.cache_write <= tokens.tokens_in
    assert 0 <= tokens.reasoning <= tokens.tokens_out
    if found.is_estimated and end is ABORTED:
        assert tokens.tokens_out <= reserved.tokens_out
