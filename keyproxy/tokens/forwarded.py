"""The header lines of a request whose answer will be metered."""

from __future__ import annotations

import re
from typing import Final

_LENGTH: Final = re.compile(rb"(?im)^content-length:[^\r\n]*\r\n")
_ENCODINGS: Final = re.compile(rb"(?im)^accept-encoding:[^\r\n]*\r\n")


def for_metering(block: bytes, content_length: int | None) -> bytes:
    """Header lines, each ended by CR LF, that ask for an answer that can be read.

    `content_length`: the length of another body than the one that they came with; None: the body is as it was.
    """
    block = _ENCODINGS.sub(b"", block)
    if content_length is not None:
        block = _LENGTH.sub(b"", block) + b"Content-Length: %d\r\n" % content_length
    return block + b"Accept-Encoding: identity\r\n"
