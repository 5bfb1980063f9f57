"""Scan a request's JSON once, in portions, for what determines its tokens.

A parser builds a value for every element, which for a hostile document is 35 times its size, and holds the event loop
until it is done. This scanner keeps the members that count, the open arrays and objects, and positions. It is strict:
it accepts what orjson accepts, except that a number may exceed the range of a double, so that no other parser sees a
different member.

It reads a window of the document at a time. One call splits the window into its strings and what is between them, which
is read byte by byte. What a window does not hold whole, and what is malformed, is left to a step that reads one token.
"""

from __future__ import annotations

from typing import Final

from keyproxy.ai.scanning.json_bounds import Density, EncodingCheck, JsonBounds, JsonError
from keyproxy.ai.scanning.json_grammar import (
    CHARACTERS,
    CONTROLS,
    NUMBERS,
    PLAIN,
    SPACE,
    SPECIAL,
    STRING,
    STRINGS,
    WORD,
    decoded,
)
from keyproxy.ai.scanning.member_scope import MemberScope
from keyproxy.ai.scanning.open_frame import Frame
from keyproxy.ai.scanning.scan_events import ScanEvents
from keyproxy.mypyc_compat import i64, mypyc_attr

#: Split at a time, which bounds the copies.
WINDOW_BYTES: Final = 4_096
#: One match sees at most this much: a longer string is read in portions. A name or number may not be longer.
_MATCHED_BYTES: Final = 16_384
#: Longer numbers are left to a step.
_SHORT_BYTES: Final = 80

#: What a token costs of the budget of a portion, which is in bytes of text.
_TOKEN_COST: Final = 48
#: Bytes that are only matched cost this fraction of bytes whose tokens are estimated.
_SCAN_SHARE: Final = 8

# What may come next.
_AT_START: Final = 0
_AT_FIRST_ELEMENT: Final = 1  # or the end of the array
_AT_VALUE: Final = 2
_AT_FIRST_NAME: Final = 3  # or the end of the object
_AT_NAME: Final = 4
_AFTER_NAME: Final = 5
_AFTER_VALUE: Final = 6  # a comma, or the end of what is open
_IN_STRING: Final = 7
_AT_END: Final = 8

_FAULTS: Final = {
    _AT_START: "it is neither an object nor an array",
    _AT_FIRST_ELEMENT: "a value is missing or malformed",
    _AT_VALUE: "a value is missing or malformed",
    _AT_FIRST_NAME: "a name is missing or malformed",
    _AT_NAME: "a name is missing or malformed",
    _AFTER_NAME: "a colon is missing",
    _AFTER_VALUE: "a comma or the end of an array or object is missing",
}

_BLANK: Final = 0x20
_QUOTE: Final = 0x22
_COMMA: Final = 0x2C
_MINUS: Final = 0x2D
_ZERO: Final = 0x30
_ONE: Final = 0x31
_NINE: Final = 0x39
_COLON: Final = 0x3A
_OPEN_ARRAY: Final = 0x5B
_BACKSLASH: Final = 0x5C
_CLOSE_ARRAY: Final = 0x5D
_OPEN_OBJECT: Final = 0x7B
_CLOSE_OBJECT: Final = 0x7D

#: What may follow a number or literal.
_AFTER_PLAIN: Final = b",]} \t\r\n"


@mypyc_attr(acyclic=True)
class RequestScanner:
    """Scans one complete document. `advance` does a bounded part of the work, and reports it to `events`."""

    __slots__ = (
        "_at", "_content", "_cost", "_density", "_encoding", "_end", "_events", "_frame", "_open", "_scope", "_state",
        "_string_start", "_window_bytes",
    )  # fmt: skip

    def __init__(
        self,
        content: bytes,
        scope: MemberScope,
        bounds: JsonBounds,
        events: ScanEvents,
        *,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self._events: Final = events
        self._content: Final = content
        self._scope: Final = scope
        self._open: Final[list[Frame]] = []
        self._frame: Frame | None = None
        self._state = _AT_START
        self._at = 0
        self._end: Final = len(content)
        self._string_start = 0
        self._window_bytes: Final = window_bytes
        #: What was read since the budget was last reduced.
        self._cost = 0
        self._density: Final = Density(bounds)
        self._encoding: EncodingCheck | None = None if content.isascii() else EncodingCheck(content)

    def advance(self, budget: int) -> int:
        """Do work for `budget` bytes of text; return what is left of it, more than 0 once the document is read.

        Raises JsonError, TooDenseError and AmbiguousNameError.
        """
        while self._encoding is not None:
            checked = self._encoding.advance()
            if checked == 0:
                self._encoding = None
            budget -= checked // _SCAN_SHARE
            if budget <= 0:
                return 0
        events = self._events
        while budget > 0:
            if self._state == _AT_END:
                return events.read_text(budget)
            start, self._cost = self._at, 0
            if self._state == _IN_STRING:
                self._read_string()
            else:
                self._read_window()
                if self._at == start:
                    self._step()
            budget -= self._cost + _TOKEN_COST + (self._at - start) // _SCAN_SHARE
            if events.pending_bytes() >= _MATCHED_BYTES:
                budget = events.read_text(max(1, budget))
        return 0

    # -- whole tokens of a window

    def _read_window(self) -> None:
        """Read the next tokens, up to one that the window does not hold whole or that is malformed."""
        at, content = self._at, self._content
        window = content
        if at or self._end > self._window_bytes:
            window = window[at : at + self._window_bytes]
        has_controls = len(window.translate(None, CONTROLS)) != len(window)
        has_escapes = window.find(b"\\") >= 0
        pieces: list[bytes]
        if has_controls:
            pieces = STRINGS.split(window)
        elif has_escapes:
            # The backslash remains, to show which strings have escapes.
            pieces = window.replace(b"\\\\", b"\\.").replace(b'\\"', b"\\.").split(b'"')
        else:
            pieces = window.split(b'"')
        last = len(pieces) - 1
        number = 0
        while True:
            at += len(pieces[number])
            self._read_between(at)
            if self._at != at or number + 2 > last:
                return
            string = pieces[number + 1]
            stop = at + 1 + len(string)
            if stop >= self._end or content[stop] != _QUOTE:
                return
            if has_escapes and _BACKSLASH in string:
                try:
                    string = decoded(content, at + 1, stop)
                except ValueError:
                    return
            if not self._take_string(string, at + 1, stop):
                return
            self._at = at = stop + 1
            number += 2

    def _read_between(self, end: i64) -> None:
        """Read what is between two strings, up to `end` or the first character that may not come next."""
        content = self._content
        at: i64 = self._at
        while at < end:
            byte: i64 = content[at]
            state = self._state
            if byte == _COMMA:
                if state != _AFTER_VALUE or self._frame is None:
                    break
                self._state = _AT_NAME if self._frame.is_object else _AT_VALUE
            elif byte == _COLON:
                if state != _AFTER_NAME:
                    break
                self._state = _AT_VALUE
            elif byte in (_CLOSE_OBJECT, _CLOSE_ARRAY):
                frame = self._frame
                is_object = byte == _CLOSE_OBJECT
                if frame is None or frame.is_object != is_object:
                    break
                if state not in (_AFTER_VALUE, _AT_FIRST_NAME if is_object else _AT_FIRST_ELEMENT):
                    break
                self._at = at
                self._close(frame)
            elif byte <= _BLANK:
                if byte == _BLANK and (at + 1 == end or content[at + 1] > _BLANK):
                    at += 1
                    continue
                space = SPACE.match(content, at, end)
                stop: i64 = at if space is None else space.end()
                if stop == at:
                    break
                at = stop
                continue
            elif state > _AT_VALUE:
                break
            elif byte in (_OPEN_OBJECT, _OPEN_ARRAY):
                self._at = at
                self._open_container(is_object=byte == _OPEN_OBJECT)
            else:
                self._at = at
                if state == _AT_START or not self._take_plain():
                    return
                at = self._at
                continue
            at += 1
        self._at = at

    def _take_string(self, string: bytes, start: int, end: int) -> bool:
        """Take a decoded string of a window; return whether it may come next."""
        state, frame = self._state, self._frame
        if frame is None:
            return False
        if state in (_AT_NAME, _AT_FIRST_NAME):
            if not self._has_colon(end + 1):
                return False
            self._events.note_name(frame, frame.scope.name(string), string)
            self._state = _AFTER_NAME
        elif state in (_AT_VALUE, _AT_FIRST_ELEMENT):
            self._density.add_values(1)
            self._events.note_string(frame, start, end, string)
            self._state = _AFTER_VALUE
        else:
            return False
        self._cost += _TOKEN_COST
        return True

    def _take_plain(self) -> bool:
        """Take a short number or literal, or numbers in an array; return whether it is one."""
        content, at, frame = self._content, self._at, self._frame
        if frame is None:
            return False
        byte = content[at]
        is_number = byte == _MINUS or _ZERO <= byte <= _NINE
        if is_number and not frame.is_object:
            run = NUMBERS.match(content, at, min(self._end, at + _MATCHED_BYTES))
            if run is not None and run.end() > at:
                count = content.count(b",", at, run.end())
                self._density.add_values(count)
                self._events.note_numbers(count)
                frame.is_empty = False
                # Numbers take about as long to match as text to estimate.
                self._cost += run.end() - at
                self._at = run.end()
                self._state = _AT_VALUE
                return True
        stop: i64 = at
        if _ONE <= byte <= _NINE:
            # A small whole number, as nearly all are: two calls of a regular expression are 1 % of a request.
            end: i64 = min(self._end, at + _SHORT_BYTES)
            while stop < end and _ZERO <= content[stop] <= _NINE:
                stop += 1
            if stop < end and content[stop] in (_COMMA, _CLOSE_OBJECT, _CLOSE_ARRAY):
                self._plain(frame, at, stop)
                return True
        match = PLAIN.match(content, at, at + _SHORT_BYTES)
        stop = self._end if match is None else match.end()
        if stop >= self._end or content[stop] not in _AFTER_PLAIN:
            return False
        self._plain(frame, at, stop)
        return True

    # -- one token

    def _step(self) -> None:
        """Read the string, number or literal that comes next, in portions if it is long."""
        content, at, state = self._content, self._at, self._state
        frame, byte = self._frame, -1 if at >= self._end else content[at]
        if frame is None or state in (_AFTER_NAME, _AFTER_VALUE):
            raise self._malformed(_FAULTS[state])
        if state in (_AT_NAME, _AT_FIRST_NAME):
            match = STRING.match(content, at, min(self._end, at + _MATCHED_BYTES))
            if match is None:
                raise self._malformed(_FAULTS[state])
            self._at = match.end()
            if not self._has_colon(self._at):
                raise self._malformed(_FAULTS[_AFTER_NAME])
            name = decoded(content, match.start(1), match.end(1))
            self._events.note_name(frame, frame.scope.name(name), name)
            self._state = _AFTER_NAME
        elif byte == _QUOTE:
            self._at = self._string_start = at + 1
            self._state = _IN_STRING
        else:
            word = WORD.match(content, at, min(self._end, at + _MATCHED_BYTES))
            stop = at if word is None else word.end()
            if stop - at >= _MATCHED_BYTES or PLAIN.fullmatch(content, at, stop) is None:
                raise self._malformed(_FAULTS[state])
            self._plain(frame, at, stop)

    def _read_string(self) -> None:
        frame, content, at = self._frame, self._content, self._at
        end = min(self._end, at + _MATCHED_BYTES)
        stop = content.find(b'"', at, end)
        piece = content[at : end if stop < 0 else stop]
        if len(piece.translate(None, SPECIAL)) == len(piece):
            stop = at + len(piece)
        else:
            match = CHARACTERS.match(content, at, end)
            stop = at if match is None else match.end()
        self._at = stop
        if stop < self._end and content[stop] == _QUOTE and frame is not None:
            self._density.add_values(1)
            self._events.note_string(frame, self._string_start, stop, None)
            self._at = stop + 1
            self._state = _AFTER_VALUE
        elif stop == at:
            raise self._malformed("a string is malformed or does not end")

    # -- values

    def _has_colon(self, at: int) -> bool:
        """Whether a colon follows: a name counts only with its colon."""
        content = self._content
        if at < self._end and content[at] != _COLON:
            space = SPACE.match(content, at)
            at = at if space is None else space.end()
        return at < self._end and content[at] == _COLON

    def _plain(self, frame: Frame, start: int, end: int) -> None:
        self._density.add_values(1)
        self._cost += _TOKEN_COST
        self._events.note_plain(frame, start, end)
        self._at = end
        self._state = _AFTER_VALUE

    def _open_container(self, *, is_object: bool) -> None:
        self._density.add_container(len(self._open) + 1)
        self._cost += _TOKEN_COST
        frame = self._frame = self._events.open_frame(self._frame, self._at, self._scope, is_object=is_object)
        self._open.append(frame)
        self._state = _AT_FIRST_NAME if is_object else _AT_FIRST_ELEMENT

    def _close(self, frame: Frame) -> None:
        self._open.pop()
        parent = self._frame = self._open[-1] if self._open else None
        self._events.close_frame(frame, parent, self._at + 1)
        self._state = _AFTER_VALUE
        if parent is None:
            self._at += 1
            rest = SPACE.match(self._content, self._at) if self._at < self._end else None
            if rest is not None and rest.end() < self._end:
                raise self._malformed("something follows it")
            self._at = self._end
            self._state = _AT_END

    def _malformed(self, fault: str) -> JsonError:
        return JsonError("it ends early" if self._at >= self._end else fault)
