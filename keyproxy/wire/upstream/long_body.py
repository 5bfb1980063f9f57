"""A long request body, in portions that are written with other work between them.

TLS would encrypt 32 MiB for a tenth of a second.
"""

from __future__ import annotations

from typing import Final

from keyproxy.wire.parsing.framing import LAST_CHUNK

_PORTION_BYTES: Final = 262_144


class LongBody:
    """A body that was collected whole. `is_written`: all portions were taken."""

    __slots__ = ("_content", "_end", "_taken_bytes", "is_written")

    def __init__(self, content: bytes, *, is_chunked: bool) -> None:
        self.is_written = False
        self._content = content
        self._taken_bytes = 0
        self._end = b"\r\n" + LAST_CHUNK if is_chunked else b""

    def next_portion(self) -> bytes:
        """Take the next portion."""
        begin = self._taken_bytes
        end = self._taken_bytes = begin + _PORTION_BYTES
        portion = self._content[begin:end]
        if end < len(self._content):
            return portion
        self.is_written = True
        return portion + self._end
