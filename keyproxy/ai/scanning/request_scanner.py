"""Scan a request's JSON once, in portions, for what determines its tokens.

A parser builds a value for every element, which for a hostile document is 35 times its size, and holds the event loop
until it is done. This scanner keeps the members that count, the open arrays and objects, and positions. It is strict:
it accepts what orjson accepts, except that a number may exceed the range of a double, so that no other parser sees a
different member.
"""

from __future__ import annotations

from typing import Final

import orjson

from keyproxy.ai.scanning.json_bounds import Density, EncodingCheck, JsonBounds, JsonError
from keyproxy.ai.scanning.json_grammar import (
    CHARACTERS,
    COLON,
    ELEMENT,
    MEMBER,
    NAME,
    NUMBERS,
    PLAIN,
    SPACE,
    WORD,
)
from keyproxy.ai.scanning.member_scope import NO_SCOPE, Name, Scope
from keyproxy.ai.scanning.open_frame import Frame
from keyproxy.ai.scanning.request_parts import RequestParts

#: One match sees at most this much: a longer string is read in portions. A name or number may not be longer.
_WINDOW_BYTES: Final = 16_384
#: Longer names are not known.
_SHORT_BYTES: Final = 80

#: What a step costs of the budget of a portion, which is in bytes of text.
_STEP_COST: Final = 48
#: Bytes that are only matched cost this fraction of bytes whose tokens are estimated.
_SCAN_SHARE: Final = 8

# What may come next.
_AT_START: Final = 0
_AT_FIRST: Final = 1  # the first member or element, or the end of what is open
_AT_NEXT: Final = 2  # a member or an element
_AFTER_VALUE: Final = 3  # a comma, or the end of what is open
_IN_STRING: Final = 4
_AT_END: Final = 5

_BLANK: Final = 0x20
_QUOTE: Final = 0x22
_COMMA: Final = 0x2C
_MINUS: Final = 0x2D
_ZERO: Final = 0x30
_NINE: Final = 0x39
_COLON_BYTE: Final = 0x3A
_OPEN_ARRAY: Final = 0x5B
_BACKSLASH: Final = 0x5C
_CLOSE_ARRAY: Final = 0x5D
_OPEN_OBJECT: Final = 0x7B
_CLOSE_OBJECT: Final = 0x7D

_MEMBER_OPEN: Final = 5
_ELEMENT_OPEN: Final = 4


class RequestScanner:
    """Scans one complete document. `advance` does a bounded part of the work; the result is `parts`."""

    def __init__(self, content: bytes, scope: Scope, bounds: JsonBounds, *, has_image_arrays: bool) -> None:
        self.parts: Final = RequestParts(content, has_image_arrays=has_image_arrays)
        self._content: Final = content
        self._scope: Final = scope
        self._open: list[Frame] = []
        self._frame: Frame | None = None
        self._state = _AT_START
        self._at = 0
        self._end: Final = len(content)
        self._string_start = 0
        #: Numbers take about as long to match as text to estimate.
        self._numbers_cost = 0
        self._density: Final = Density(bounds)
        self._encoding: Final = EncodingCheck(content)
        self._is_checked = False

    def advance(self, budget: int) -> int:
        """Do work for `budget` bytes of text; return what is left of it, more than 0 once the document is read.

        Raises JsonError, TooDenseError and AmbiguousNameError.
        """
        while not self._is_checked:
            checked = self._encoding.advance()
            self._is_checked = checked == 0
            budget -= checked // _SCAN_SHARE
            if budget <= 0:
                return 0
        while budget > 0:
            if self._state == _AT_END:
                return self.parts.text.read(budget)
            start = self._at
            self._step()
            budget -= _STEP_COST + (self._at - start) // _SCAN_SHARE + self._numbers_cost
            self._numbers_cost = 0
            if self.parts.text.pending_bytes >= _WINDOW_BYTES:
                budget = self.parts.text.read(max(1, budget))
        return 0

    def _step(self) -> None:
        """Read one member or element, or a bracket, or a portion of a long string."""
        state, frame = self._state, self._frame
        if state == _IN_STRING:
            self._read_string()
        elif frame is None:
            self._begin()
        elif state == _AFTER_VALUE:
            self._read_comma(frame)
        elif state == _AT_FIRST and self._is_empty(frame):
            self._close(frame)
        elif frame.is_object:
            self._read_member(frame)
        else:
            self._read_element(frame)

    def _is_empty(self, frame: Frame) -> bool:
        return self._byte() == (_CLOSE_OBJECT if frame.is_object else _CLOSE_ARRAY)

    def _begin(self) -> None:
        if self._byte() == _OPEN_OBJECT:
            self.parts.is_object = True
            self.parts.opening = self._at
        elif self._byte() != _OPEN_ARRAY:
            raise JsonError("it is neither an object nor an array")
        self._open_container(None, self._content[self._at])

    def _byte(self) -> int:
        """Skip space and return the next byte."""
        at = self._at
        if at < self._end and self._content[at] <= 0x20:
            match = SPACE.match(self._content, at)
            if match is not None:
                self._at = at = match.end()
        if at >= self._end:
            raise JsonError("it ends early")
        return self._content[at]

    def _read_comma(self, frame: Frame) -> None:
        byte = self._byte()
        if byte == _COMMA:
            self._at += 1
            self._state = _AT_NEXT
        elif byte == (_CLOSE_OBJECT if frame.is_object else _CLOSE_ARRAY):
            self._close(frame)
        else:
            raise self._malformed("a comma or the end of an array or object is missing")

    def _read_member(self, frame: Frame) -> None:
        if self._encoding.is_on_one_line and self._read_known_member(frame):
            return
        content, at = self._content, self._at
        match = MEMBER.match(content, at, min(self._end, at + _WINDOW_BYTES))
        if match is None:
            self._read_long_member(frame)
            return
        self._name(frame, match.start(1), match.end(1))
        last = match.lastindex
        if last == _MEMBER_OPEN:
            self._at = match.start(5)
            self._open_container(frame, content[self._at])
            return
        start = match.start(2)
        if start >= 0:
            self._string(frame, start, match.end(2))
        else:
            self._plain(frame, match.start(3), match.end(3))
        self._at = match.end()
        self._state = _AT_NEXT if last == 4 else _AFTER_VALUE

    def _read_known_member(self, frame: Frame) -> bool:
        """Read a member with a known name the short way: a third of the time of a pattern. Return whether it is one."""
        content, at, last = self._content, self._at, self._end - 1
        if content[at] == _BLANK:
            at += 1
        if at >= last or content[at] != _QUOTE:
            return False
        stop = content.find(b'"', at + 1, at + _SHORT_BYTES)
        name = content[at + 1 : stop]
        known = frame.scope.known.get(name)
        if known is None or stop < 0 or stop + 2 > last or content[stop + 1] != _COLON_BYTE:
            return False
        at = stop + 2
        if content[at] == _BLANK and at < last:
            at += 1
        byte = content[at]
        if byte == _QUOTE:
            stop = content.find(b'"', at + 1, at + _WINDOW_BYTES)
            if stop < 0 or content.find(b"\\", at + 1, stop) >= 0:
                return False
            self._note_name(frame, known, name)
            self._string(frame, at + 1, stop)
            self._at = at = stop + 1
            self._state = _AFTER_VALUE
            if at <= last and content[at] == _COMMA:
                self._at = at + 1
                self._state = _AT_NEXT
            return True
        if byte in (_OPEN_OBJECT, _OPEN_ARRAY):
            self._note_name(frame, known, name)
            self._at = at
            self._open_container(frame, byte)
            return True
        match = PLAIN.match(content, at, at + _SHORT_BYTES)
        stop = at if match is None else match.end()
        if match is None or stop > last or content[stop] not in (_COMMA, _CLOSE_OBJECT):
            return False
        self._note_name(frame, known, name)
        self._plain(frame, at, stop)
        self._at = stop
        self._state = _AFTER_VALUE
        return True

    def _read_long_member(self, frame: Frame) -> None:
        """Read a member that does not fit into the window: its name here, its string in portions."""
        byte = self._byte()
        match = NAME.match(self._content, self._at, min(self._end, self._at + _WINDOW_BYTES))
        if byte != _QUOTE or match is None:
            raise self._malformed("a name is missing or malformed")
        self._at = match.end()
        colon = COLON.match(self._content, self._at)
        if colon is None:
            raise self._malformed("a colon is missing")
        self._name(frame, match.start(1), match.end(1))
        self._at = colon.end()
        self._read_long_value(frame)

    def _read_element(self, frame: Frame) -> None:
        content, at = self._content, self._at
        window = min(self._end, at + _WINDOW_BYTES)
        byte = self._byte()
        if byte <= _NINE and (byte >= _ZERO or byte == _MINUS):
            run = NUMBERS.match(content, self._at, window)
            if run is not None and run.end() > self._at:
                count = content.count(b",", self._at, run.end())
                self._density.add_values(count)
                self.parts.array_numbers += count
                frame.is_empty = False
                self._numbers_cost = run.end() - self._at
                self._at = run.end()
                self._state = _AT_NEXT
                return
        if byte in (_OPEN_OBJECT, _OPEN_ARRAY):
            self._open_container(frame, byte)
            return
        match = ELEMENT.match(content, self._at, window)
        if match is None:
            self._read_long_value(frame)
            return
        last = match.lastindex
        if last == _ELEMENT_OPEN:
            self._at = match.start(4)
            self._open_container(frame, content[self._at])
            return
        start = match.start(1)
        if start >= 0:
            self._string(frame, start, match.end(1))
        else:
            self._plain(frame, match.start(2), match.end(2))
        self._at = match.end()
        self._state = _AT_NEXT if last == 3 else _AFTER_VALUE

    def _read_long_value(self, frame: Frame) -> None:
        byte = self._byte()
        if byte == _QUOTE:
            self._at += 1
            self._string_start = self._at
            self._state = _IN_STRING
        elif byte in (_OPEN_ARRAY, _OPEN_OBJECT):
            self._open_container(frame, byte)
        else:
            word = WORD.match(self._content, self._at, min(self._end, self._at + _WINDOW_BYTES))
            stop = self._at if word is None else word.end()
            if stop - self._at >= _WINDOW_BYTES or PLAIN.fullmatch(self._content, self._at, stop) is None:
                raise self._malformed("a value is missing or malformed")
            self._plain(frame, self._at, stop)
            self._at = stop
            self._state = _AFTER_VALUE

    def _read_string(self) -> None:
        frame, content, at = self._frame, self._content, self._at
        match = CHARACTERS.match(content, at, min(self._end, at + _WINDOW_BYTES))
        stop = at if match is None else match.end()
        self._at = stop
        if stop < self._end and content[stop] == _QUOTE and frame is not None:
            self._string(frame, self._string_start, stop)
            self._at = stop + 1
            self._state = _AFTER_VALUE
        elif stop == at:
            raise self._malformed("a string is malformed or does not end")

    # -- values

    def _name(self, frame: Frame, start: int, end: int) -> None:
        name = self._content[start:end]
        if _BACKSLASH in name:
            name = str(orjson.loads(self._content[start - 1 : end + 1])).encode("utf-8")
        self._note_name(frame, frame.scope.name(name), name)

    def _note_name(self, frame: Frame, known: Name, name: bytes) -> None:
        frame.is_empty = False
        frame.meaning = known.meaning
        frame.slot = slot = known.slot
        if slot is not None:
            self.parts.note_slot(slot)
        if frame.counts_names:
            self.parts.text.add_name(name)

    def _string(self, frame: Frame, start: int, end: int) -> None:
        self._density.add_values(1)
        frame.is_empty = False
        self.parts.note_string(frame, start, end)

    def _plain(self, frame: Frame, start: int, end: int) -> None:
        self._density.add_values(1)
        frame.is_empty = False
        if frame.slot is not None:
            self.parts.note_plain(frame.slot, start, end)
        elif not frame.is_object and _MINUS <= self._content[start] <= _NINE:
            self.parts.array_numbers += 1

    def _open_container(self, parent: Frame | None, byte: int) -> None:
        self._density.add_container(len(self._open) + 1)
        frame = self.parts.open_frame(parent, self._at, is_object=byte == _OPEN_OBJECT)
        if parent is None:
            frame.scope = self._scope if frame.is_object else NO_SCOPE
        else:
            parent.is_empty = False
            if parent.slot is not None and frame.is_object:
                frame.scope = parent.slot.scope or NO_SCOPE
        self._open.append(frame)
        self._frame = frame
        self._at += 1
        self._state = _AT_FIRST

    def _close(self, frame: Frame) -> None:
        self._at += 1
        self._open.pop()
        parent = self._open[-1] if self._open else None
        self.parts.close_frame(frame, parent, self._at)
        self._frame = parent
        if parent is not None:
            self._state = _AFTER_VALUE
            return
        rest = SPACE.match(self._content, self._at)
        if rest is not None and rest.end() < self._end:
            raise self._malformed("something follows it")
        self._state = _AT_END

    def _malformed(self, fault: str) -> JsonError:
        return JsonError("it ends early" if self._at >= self._end else fault)
