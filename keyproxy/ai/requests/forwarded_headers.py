"""The header lines of a request whose answer will be metered."""

from __future__ import annotations


def for_metering(block: bytes, *, accepts_codings: bool, content_length: int | None) -> bytes:
    """Header lines, each ended by CR LF, that ask for an answer that can be read.

    `accepts_codings`: an Accept-Encoding may be among them. `content_length`: the length of another body than the one
    that they came with; None: the body is as it was.
    """
    if accepts_codings:
        block = _without(block, b"\naccept-encoding:")
    if content_length is not None:
        block = _without(block, b"\ncontent-length:") + b"Content-Length: %d\r\n" % content_length
    return block + b"Accept-Encoding: identity\r\n"


def _without(block: bytes, start: bytes) -> bytes:
    """Header lines but for those that begin so. `start`: in lower case, with the end of the line before it."""
    lines = b"\n" + block.lower()
    at = lines.rfind(start)
    while at >= 0:
        block = block[:at] + block[block.index(b"\n", at) + 1 :]
        at = lines.rfind(start, 0, at)
    return block
