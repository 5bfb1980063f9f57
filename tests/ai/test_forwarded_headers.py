"""The header lines of a metered request: its length is that of the changed body, and its response can be read."""

from __future__ import annotations

import pytest

from keyproxy.ai.requests.forwarded_headers import for_metering, with_length


@pytest.mark.parametrize(
    ("block", "before", "new"),
    [
        (b"Content-Length: 12\r\n", 12, b"Content-Length: 345\r\n"),
        (b"A: b\r\nContent-Length: 12\r\nC: d\r\n", 12, b"A: b\r\nContent-Length: 345\r\nC: d\r\n"),
        (b"A: b\r\ncontent-length: 12\r\nC: d\r\n", 12, b"A: b\r\nC: d\r\nContent-Length: 345\r\n"),
        (b"Content-Length:12\r\n", 12, b"Content-Length: 345\r\n"),
        (b"Content-Length: 012\r\nA: b\r\n", 12, b"A: b\r\nContent-Length: 345\r\n"),
        (b"X-Content-Length: 12\r\ncontent-length: 12\r\n", 12, b"X-Content-Length: 12\r\nContent-Length: 345\r\n"),
        (b"X-Content-Length: 12\r\nContent-Length: 12\r\n", 12, b"X-Content-Length: 12\r\nContent-Length: 345\r\n"),
        (b"A: Content-Length: 12\r\nContent-Length: 12\r\n", 12, b"A: Content-Length: 12\r\nContent-Length: 345\r\n"),
    ],
)  # fmt: skip
def test_length_is_replaced_wherever_and_however_it_is_written(block: bytes, before: int, new: bytes) -> None:
    assert with_length(block, before, 345) == new


@pytest.mark.parametrize("name", [b"Accept-Encoding", b"accept-encoding", b"ACCEPT-Encoding"])
def test_response_is_requested_without_a_coding(name: bytes) -> None:
    block = b"A: b\r\n%b: gzip\r\nC: d\r\n%b: br\r\n" % (name, name)
    assert for_metering(block, accepts_codings=True) == b"A: b\r\nC: d\r\nAccept-Encoding: identity\r\n"
    assert for_metering(b"A: b\r\n", accepts_codings=False) == b"A: b\r\nAccept-Encoding: identity\r\n"
