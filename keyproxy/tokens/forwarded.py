"""The header lines of a request whose answer will be metered."""

from __future__ import annotations

from keyproxy.tokens.lines import without_field


def for_metering(block: bytes, *, accepts_codings: bool, content_length: int | None) -> bytes:
    """Header lines, each ended by CR LF, that ask for an answer that can be read.

    `accepts_codings`: an Accept-Encoding may be among them. `content_length`: the length of another body than the one
    that they came with; None: the body is as it was.
    """
    if accepts_codings:
        block = without_field(block, b"\naccept-encoding:")
    if content_length is not None:
        block = without_field(block, b"\ncontent-length:") + b"Content-Length: %d\r\n" % content_length
    return block + b"Accept-Encoding: identity\r\n"
