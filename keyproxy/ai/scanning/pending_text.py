"""The texts of a request that wait for their estimate, as positions: a batch of short ones, and long ones in slices."""

from __future__ import annotations

from typing import Final

import orjson

from keyproxy.ai.scanning.json_grammar import CHARACTERS, decoded
from keyproxy.ai.text_estimate import TextEstimate
from keyproxy.mypyc_compat import mypyc_attr

#: Texts up to this size are estimated together; longer ones in slices.
_SHORT_BYTES: Final = 4_096
_SLICE_BYTES: Final = 32_768
#: A pair of surrogates.
_ESCAPE_BYTES_MAX: Final = 12


@mypyc_attr(acyclic=True)
class PendingText:
    """Estimates strings of `content`. `pending_bytes`: about how much is noted and not estimated yet."""

    __slots__ = ("_content", "_long", "_long_at", "_short", "_short_bytes", "estimate", "pending_bytes")

    def __init__(self, content: bytes) -> None:
        self.estimate: Final = TextEstimate()
        self.pending_bytes = 0
        self._content: Final = content
        self._short: Final[list[bytes]] = []
        self._short_bytes = 0
        self._long: list[tuple[int, int, bool]] = []
        self._long_at = -1

    def add_decoded(self, text: bytes) -> None:
        """Note a short decoded text."""
        self._short.append(text)
        self._short_bytes += len(text)
        self.pending_bytes += len(text)

    def add(self, start: int, end: int) -> None:
        """Note a string, by where its characters stand."""
        size = end - start
        self.pending_bytes += size
        if size > _SHORT_BYTES:
            self._long.append((start, end, self._content.find(b"\\", start, end) >= 0))
            return
        self._short.append(decoded(self._content, start, end))
        self._short_bytes += size

    def read(self, budget: int) -> int:
        """Estimate pending texts of about `budget` bytes; return what is left of it, more than 0 if none is pending."""
        if self._short:
            self.estimate.add_all(self._short)
            self._short.clear()
            budget -= self._short_bytes
            self._short_bytes = 0
        while self._long and budget > 0:
            budget -= self._read_slice(*self._long[-1])
        if not self._long:
            self.pending_bytes = 0
            budget = max(1, budget)
        return budget

    def _read_slice(self, start: int, end: int, is_escaped: bool) -> int:
        at = start if self._long_at < 0 else self._long_at
        stop = min(end, at + _SLICE_BYTES)
        if not is_escaped:
            text = self._content[at:stop]
        else:
            if stop < end and self._content.find(b"\\", stop - _ESCAPE_BYTES_MAX, stop) >= 0:
                match = CHARACTERS.match(self._content, at, stop)  # not within an escape
                stop = stop if match is None else match.end()
            while stop < end and self._content[stop] & 0xC0 == 0x80:
                stop -= 1  # not within a character: the decoder needs whole ones
            text = str(orjson.loads(b'"%b"' % self._content[at:stop])).encode("utf-8")
        self.estimate.add(text, continues=at > start)
        if stop >= end:
            self._long.pop()
            self._long_at = -1
        else:
            self._long_at = stop
        return stop - at
