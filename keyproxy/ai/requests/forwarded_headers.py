"""The header lines of a request whose response will be metered."""

from __future__ import annotations


def for_metering(block: bytes, *, accepts_codings: bool) -> bytes:
    """Return header lines, each ended by CR LF, that request a response with a readable encoding.

    `accepts_codings`: the lines may include Accept-Encoding.
    """
    if accepts_codings:
        block = _without(block, b"\naccept-encoding:")
    return block + b"Accept-Encoding: identity\r\n"


def with_length(block: bytes, before: int, length: int) -> bytes:
    """Return header lines with another Content-Length than `before`."""
    # Nearly all clients write the line in this way: comparing it takes 2 % of a request less than looking for its name.
    start, found, rest = block.partition(b"Content-Length: %d\r\n" % before)
    if not found or (start and not start.endswith(b"\n")):
        return b"%bContent-Length: %d\r\n" % (_without(block, b"\ncontent-length:"), length)
    return b"%bContent-Length: %d\r\n%b" % (start, length, rest)


def _without(block: bytes, start: bytes) -> bytes:
    """Return header lines without those that begin with `start` (lower case, with the preceding line's end)."""
    lines = b"\n" + block.lower()
    at = lines.rfind(start)
    while at >= 0:
        block = block[:at] + block[block.index(b"\n", at) + 1 :]
        at = lines.rfind(start, 0, at)
    return block
