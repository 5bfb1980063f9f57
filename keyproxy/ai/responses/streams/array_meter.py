"""Read a stream that is one JSON array whose elements arrive one by one, as Gemini sends it, as they pass.

Elements are passed on whole, so that a stream can be ended between two. An unfinished one is held back up to
`EVENT_BYTES_MAX`, which is the memory of a stream; a longer one is scanned as it passes. A document that
is one object instead, as an error may be, is read as one element.
"""

from __future__ import annotations

import re
from typing import Final

from keyproxy.ai.dialects.endpoint import StreamFormat
from keyproxy.ai.json_characters import INSIDE
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.streams.stream_reading import EVENT_BYTES_MAX, StreamReading

#: The most brackets and unfinished strings, and the most elements, of one piece; after one with more, the response is
#: read no further.
_STEPS_MAX: Final = 16_384
_ELEMENTS_MAX: Final = 1_024

#: Up to the next bracket, or the string that does not end here.
_TO_BRACKET: Final = re.compile(rb'(?:[^"{}\[\]]++|"(?:' + INSIDE + rb'++|\\.)*+")*+', re.DOTALL)
_STRING_REST: Final = re.compile(rb"(?:" + INSIDE + rb"++|\\.)*+", re.DOTALL)
_OPENING: Final = b"{["
_ARRAY: Final = ord("[")
_QUOTE: Final = ord('"')
_BACKSLASH: Final = ord("\\")


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
        self._is_over = False
        self._has_passed = False

    @property
    def produced(self) -> int:
        return self._reading.tokens

    @property
    def produced_bound(self) -> int:
        return self._reading.bound

    def feed(self, content: bytes) -> bytes:
        if self._is_over:
            return content
        self._held += content
        out: list[bytes] = []
        steps = 0
        while not self._is_over and steps < _STEPS_MAX and len(out) < _ELEMENTS_MAX:
            pattern = _STRING_REST if self._is_in_string else _TO_BRACKET
            match = pattern.match(self._held, self._at)
            self._at = self._at if match is None else match.end()
            if self._at == len(self._held):
                break
            token = self._held[self._at]
            if token == _BACKSLASH:
                break  # a lone one, which is read with what follows it
            self._at += 1
            steps += 1
            if token == _QUOTE:
                self._is_in_string = not self._is_in_string
            elif token in _OPENING:
                self._open(token)
            else:
                self._close(out)
        if steps == _STEPS_MAX or len(out) == _ELEMENTS_MAX:
            self._is_over = True
            self._reading.produced.add_unread(len(self._held))
        if self._is_over or self._at - self._start > EVENT_BYTES_MAX:
            self._pass_unfinished(out)
        return b"".join(out)

    def finish(self) -> bytes:
        rest = bytes(self._held)
        self._held.clear()
        self._at = 0
        return rest

    def cut(self, event: bytes, *, exception: str = "") -> bytes:
        self._held.clear()
        self._is_over = True
        return (b",\n" if self._has_passed else b"[") + event + b"]"

    def _open(self, token: int) -> None:
        if self._depth == 0 and token == _ARRAY and not self._has_passed:
            self._base = 1
        elif self._depth == self._base:
            self._start = self._at - 1
        self._depth += 1

    def _close(self, out: list[bytes]) -> None:
        self._depth -= 1
        if self._depth == self._base and not (self._depth == 0 and self._base):
            if self._reading.has_long or self._at - self._start > EVENT_BYTES_MAX:
                self._reading.feed_long(self._held, self._start, self._at)
                self._reading.end_long()
            else:
                self._read(bytes(self._held[self._start : self._at]))
            self._pass(out, self._at)
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
            self._reading.feed_long(self._held, self._start, self._at)
        # A lone backslash stays: it is read with what follows it.
        self._pass(out, len(self._held) if self._is_over else self._at)
