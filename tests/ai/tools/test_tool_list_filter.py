"""Filtered lists of tools do not depend on how a response is cut into pieces."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyproxy.ai.tools.tool_list_filter import ToolListFilter
from keyproxy.http_messages import ResponseFields

LIST = b'{"jsonrpc":"2.0","id":1,"result":{"tools":[{"name":"a"},{"name":"b"}]}}'
KEPT = {"jsonrpc": "2.0", "id": 1, "result": {"tools": [{"name": "a"}]}}
NOTE = b'{"jsonrpc":"2.0","method":"notifications/progress"}'


def data_of(stream: bytes) -> list[object]:
    """The data of the events, as a client reads them."""
    found, data = [], []
    for line in re.split(rb"\r\n|\n|\r", stream.removeprefix(b"\xef\xbb\xbf")):
        if line.startswith(b"data:"):
            data.append(line.removeprefix(b"data:").removeprefix(b" "))
        elif not line:
            if any(data):
                found.append(json.loads(b"\n".join(data)))
            data = []
    return found


events = st.sampled_from(
    [
        (b"event: message\ndata: " + NOTE + b"\n\n", json.loads(NOTE)),
        (b"data:" + LIST + b"\n\n", KEPT),
        (b"id: 1\ndata: " + LIST.replace(b",", b",\ndata: ") + b"\nretry: 5\n\n", KEPT),
        (b": comment\n\n", None),
        (b"id: 2\ndata:\n\n", None),
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(events, max_size=4), st.sampled_from([b"\n", b"\r\n", b"\r"]), st.booleans(),
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
)  # fmt: skip
def test_stream_is_filtered_alike_however_it_is_cut(
    parts: list[tuple[bytes, object]], end: bytes, has_mark: bool, lengths: list[int]
) -> None:
    stream = b"".join(block for block, _ in parts).replace(b"\n", end)
    if has_mark:
        stream = b"\xef\xbb\xbf" + stream
    one = ToolListFilter(frozenset({"a"}))
    one.begin(ResponseFields(media_type=b"text/event-stream"))
    out, at = b"", 0
    for length in lengths:
        out += one.feed(stream[at : at + length], is_last=False)
        at += length
    out += one.feed(stream[at:], is_last=True)
    assert data_of(out) == [expected for _, expected in parts if expected is not None]
    assert b'"b"' not in out


@pytest.mark.parametrize(
    "response",
    [
        b'{"id":1,"result":{"tools":[{"name":"b"}],"tools":[{"name":"a"}]}}',
        b'{"id":1,"result":{"tool\\u0073":[{"name":"b"}],"tools":[{"name":"a"}]}}',
        b'{"id":1,"result":{"tools":[{"name":"b"}]},"result":{}}',
        b'{"id":1,"result":{"tools":[{"name":"b","name":"a"}]}}',
        b'{"id":1,"note":"\\u0022\\u0022\\u0022\\u0022\\u0022\\u0022","result":{"tools":[{"name":"b"}],"tools":[]}}',
    ],
)
def test_tool_in_a_repeated_member_is_not_passed_on(response: bytes) -> None:
    one = ToolListFilter(frozenset({"a"}))
    one.begin(ResponseFields(media_type=b"application/json"))
    assert b'"b"' not in one.feed(response, is_last=True)


def test_other_messages_are_passed_on_unchanged() -> None:
    one = ToolListFilter(frozenset({"a"}))
    one.begin(ResponseFields(media_type=b"application/json"))
    message = b'{ "id":1, "error": {"code":-32603, "data": 12345678901234567890123} }'
    assert one.feed(message, is_last=True) == message
