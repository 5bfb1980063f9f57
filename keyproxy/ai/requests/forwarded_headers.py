"""The header lines of a request whose response will be metered."""

from __future__ import annotations


def for_metering(block: bytes, *, accepts_codings: bool, content_length: int | None) -> bytes:
    """Return header lines, each ended by CR LF, that request a response with a readable encoding.

    `accepts_codings`: the lines may include Accept-Encoding. `content_length`: the length of the replaced body; None if
    the body is unchanged.
    """
    if accepts_codings:
        block = _without(block, b"\naccept-encoding:")
    if content_length is not None:
        block = _without(block, b"\ncontent-length:") + b"Content-Length: %d\r\n" % content_length
    return block + b"Accept-Encoding: identity\r\n"


def _without(block: bytes, start: bytes) -> bytes:
    """Return header lines without those that begin with `start` (lower case, with the preceding line's end)."""
    lines = b"\n" + block.lower()
    at = lines.rfind(start)
    while at >= 0:
        block = block[:at] + block[block.index(b"\n", at) + 1 :]
        at = lines.rfind(start, 0, at)
    return block
