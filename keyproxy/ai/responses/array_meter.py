"""Read a stream that is one JSON array whose elements arrive one by one, as Gemini sends it, as they pass.

Elements are passed on whole, so that a stream can be ended between two. An unfinished one is held back up to
`ELEMENT_BYTES_MAX`, which is the memory of a stream; a longer one passes unread. A document that is one object instead,
as an error may be, is read as one element.
"""

from __future__ import annotations

import re
from typing import Final

from keyproxy.ai.dialects.endpoint import StreamFormat
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.stream_reading import StreamReading

ELEMENT_BYTES_MAX: Final = 262_144

#: The most strings and brackets of one piece that are read; with more, the response is read no further.
_STEPS_MAX: Final = 65_536

_TOKEN: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[{\[]|[}\]]', re.DOTALL)
_STRING_REST: Final = re.compile(rb'(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
_OPENING: Final = b"{["


class ArrayMeter(Meter):
    """For a response that is a stream as a JSON array."""

    def __init__(self, reading: StreamReading) -> None:
        super().__init__(reading.usage)
        self.format = StreamFormat.JSON_ARRAY
        self._reading: Final = reading
        #: What was not passed on yet, how much of it was scanned, and where its element begins.
        self._held = bytearray()
        self._at = 0
        self._start = 0
        self._depth = 0
        #: The depth at which elements are: 1 in an array.
        self._base = 0
        self._is_in_string = False
        self._is_oversize = False
        self._is_over = False
        self._has_passed = False

    @property
    def produced(self) -> int:
        """See Meter."""
        return self._reading.produced.tokens

    @property
    def produced_bound(self) -> int:
        """See Meter."""
        return self._reading.produced.bound

    def feed(self, content: bytes) -> bytes:
        """See Meter."""
        if self._is_over:
            return content
        self._held += content
        out: list[bytes] = []
        steps = 0
        while self._at < len(self._held) and steps < _STEPS_MAX and not self._is_over:
            steps += 1
            pattern = _STRING_REST if self._is_in_string else _TOKEN
            match = pattern.match(self._held, self._at) if self._is_in_string else pattern.search(self._held, self._at)
            if match is None:
                self._at = len(self._held)
                break
            token = match.group()
            self._at = match.end()
            if self._is_in_string or token.startswith(b'"'):
                self._is_in_string = not match.group(1)
                if self._is_in_string:
                    break  # a lone backslash may be left, which is read with what follows it
            elif token in _OPENING:
                self._open(token, match.start())
            else:
                self._close(out)
        if steps == _STEPS_MAX:
            self._is_over = True
            self._reading.produced.add_unread(len(self._held))
        if self._is_over or len(self._held) > ELEMENT_BYTES_MAX:
            self._pass_unfinished(out)
        return b"".join(out)

    def finish(self) -> bytes:
        """See Meter."""
        rest = bytes(self._held)
        self._held.clear()
        self._at = 0
        return rest

    def cut(self, event: bytes, *, exception: str = "") -> bytes:
        """See Meter."""
        self._held.clear()
        self._is_over = True
        return (b",\n" if self._has_passed else b"[") + event + b"]"

    def _open(self, token: bytes, start: int) -> None:
        if self._depth == 0 and token == b"[" and not self._has_passed:
            self._base = 1
        elif self._depth == self._base:
            self._start = start
        self._depth += 1

    def _close(self, out: list[bytes]) -> None:
        self._depth -= 1
        if self._depth == self._base and not (self._depth == 0 and self._base):
            element = bytes(self._held[self._start : self._at])
            if not self._is_oversize:
                self._read(element)
            self._pass(out, self._at)
            self._is_oversize = False
        self._is_over = self._depth <= 0

    def _read(self, element: bytes) -> None:
        reading = self._reading
        reading.count(element, 0, len(element))
        if not reading.has_begun or reading.notable(element) >= 0:
            reading.read(element)

    def _pass(self, out: list[bytes], end: int) -> None:
        out.append(bytes(self._held[:end]))
        del self._held[:end]
        self._at -= end
        self._start = 0
        self._has_passed = True

    def _pass_unfinished(self, out: list[bytes]) -> None:
        if not self._is_over:
            self._is_oversize = True
            self._reading.produced.add_unread(self._at)
        # A lone backslash stays: it is read with what follows it.
        self._pass(out, len(self._held) if self._is_over else self._at)
