"""Recognise an event that repeats the last one but for its text.

Most events of a stream are the same bytes around another text. If the bytes before and after the text are those of an
event that has one text and nothing else that matters, and the text ends where it did, then so is this event: no quote in
the text could begin a name, and no name ends in it.
"""

from __future__ import annotations

import re
from typing import Final

from keyproxy.mypyc_compat import mypyc_attr

#: Longer events are not remembered.
_EVENT_BYTES_MAX: Final = 4_096
#: After so many other events in a row, no further one is remembered: each has a number or an id of its own.
_MISSES_MAX: Final = 8

_QUOTE: Final = 0x22
_BACKSLASH: Final = 0x5C
_LF: Final = 0x0A
_CR: Final = 0x0D


@mypyc_attr(acyclic=True)
class RepeatedEvent:
    """The event that was remembered last. `names`: those that make an event matter, which no text may be."""

    __slots__ = ("_after", "_before", "_misses", "_names")

    def __init__(self, names: frozenset[bytes]) -> None:
        self._names: Final = names
        self._before = self._after = b""
        self._misses = 0

    def text(self, content: bytes) -> bytes:
        """The text of an event like the one that is remembered; empty if it is another."""
        start, end = len(self._before), len(content) - len(self._after)
        if start == 0 or end <= start or content[:start] != self._before or content[end:] != self._after:
            return b""
        text = content[start:end]
        if _QUOTE in text or _BACKSLASH in text or _LF in text or _CR in text or text in self._names:
            return b""
        self._misses = 0
        return text

    def remember(self, content: bytes, pattern: re.Pattern[bytes]) -> None:
        """Remember an event that has been read, with one text and nothing else that matters."""
        self._misses += 1
        if self._misses > _MISSES_MAX or len(content) > _EVENT_BYTES_MAX:
            self._before = b""
            return
        match = pattern.search(content)
        if match is not None:
            self._before, self._after = content[: match.start(1)], content[match.end(1) :]
