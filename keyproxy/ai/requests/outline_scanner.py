"""Read the outline of a request's JSON while it passes in pieces, without keeping the document.

A parser builds a value for every element, which for a hostile document is 35 times its size, and holds the event loop
until it is done. This scanner keeps the requested members of the outermost object, the depth, and one piece. The caller
feeds pieces of `PIECE_BYTES` and decides how many of them to read before other work runs.

It accepts what orjson accepts, with these differences: a number may exceed the range of a double, and numbers and names
have a maximum length (`_TOKEN_BYTES_MAX`). Strings, brackets and names are read strictly, so that no other parser can
see a different member at the top level.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import orjson

from keyproxy.ai.requests.content_parts import PART_NAMES, Container
from keyproxy.ai.scanning.json_grammar import CHARACTERS, COLON, NAME, PLAIN, RUN, SPACE, WORD, Utf8

#: The size of a piece, which bounds the work of one call.
PIECE_BYTES: Final = 8_192

#: The most steps that a document may take. A step reads one name, value or bracket, or a whole run of simple elements.
#: This many steps take one to two seconds.
STEPS_MAX: Final = 2_000_000

#: orjson rejects deeper nesting.
DEPTH_MAX: Final = 1_024

#: A name or a number that is longer is refused; a string has no bound.
_TOKEN_BYTES_MAX: Final = 4_096

#: A string up to this length is kept if it is the value of a requested member.
_KEPT_BYTES_MAX: Final = 256

#: If one of these occurs, a name may be `type`: its object is read member by member.
_TYPE: Final = b'"type"'
_ESCAPED_LETTER: Final = re.compile(rb"\\u00[67]")
#: An escape may be cut off by the end of a piece.
_ESCAPE_BYTES_MAX: Final = 12

# What may come next.
_AT_START: Final = 0
_AT_ELEMENT: Final = 1  # a value
_AT_FIRST_ELEMENT: Final = 2  # a value, or the end of the array
_AT_NAME: Final = 3
_AT_FIRST_NAME: Final = 4  # a name, or the end of the object
_IN_STRING: Final = 5
_AT_COMMA: Final = 6  # a comma, or the end of what is open
_AT_END: Final = 7  # nothing more
_AT_COLON: Final = 8

_QUOTE: Final = 0x22
_COMMA: Final = 0x2C
_COLON_BYTE: Final = 0x3A
_OPEN_ARRAY: Final = 0x5B
_BACKSLASH: Final = 0x5C
_CLOSE_ARRAY: Final = 0x5D
_OPEN_OBJECT: Final = 0x7B
_CLOSE_OBJECT: Final = 0x7D


class JsonError(Exception):
    """The document is not well-formed JSON in UTF-8; the text describes the fault."""


class TooManyStepsError(Exception):
    """The document has too many parts to read."""


class OutlineScanner:
    """Scans a document fed in pieces of at most `PIECE_BYTES`; `finish` ends it.

    `document`: None unless the document is an object; then those of its members that `watches` chose, the last one of
    each name. A container is represented by one of its kind that is empty, or has one element (true) if it is not
    empty; but the object named `expanded` appears with its own members that `watches` chose. A string that is longer
    than a few hundred bytes is shortened. `spans`: where the value of each member begins and ends; of members of
    `expanded` under (name, name). `doubled`: names that `watches` chose and that appeared twice in one object.
    """

    def __init__(
        self, watches: Callable[[str], bool], *, expanded: str, counted: str, media: frozenset[str],
        images: frozenset[str],
    ) -> None:  # fmt: skip
        """`counted`: the array whose texts and arrays are counted. `media`: types of objects that `parts` counts, with
        `image_bytes` of those among `images`."""
        self.document: dict[str, Any] | None = None
        self.spans: dict[tuple[str, str], tuple[int, int]] = {}
        self.doubled: list[str] = []
        #: The number of strings or arrays in the counted array; 1 if it has other elements, or is no array.
        self.elements = 1
        #: Objects whose type is one of `media`, and the bytes of images that came within them.
        self.parts = 0
        self.image_bytes = 0
        self.expanded_is_empty = True
        self.opening = 0
        self.read_bytes = 0
        self.is_blank = True
        self.steps = 0
        self._watches = watches
        self._expanded = expanded
        self._counted = counted
        self._media = media
        self._images = images
        self._open: list[Container] = []
        self._state = _AT_START
        self._buffer = b""
        self._at = 0
        #: The document's offset of the first byte of the buffer.
        self._base = 0
        self._text = Utf8()
        self._string_start = 0
        self._string_bytes = 0
        self._string_head = b""
        self._value_start = 0
        #: Before this place of the buffer no object has a type.
        self._run_end = 0
        self._is_last = False

    def feed(self, piece: bytes) -> None:
        """Read on. Raises JsonError and TooManyStepsError."""
        if not self._text.takes(piece):
            raise JsonError("it is not UTF-8")
        self._base += self._at
        self._buffer = self._buffer[self._at :] + piece if self._at < len(self._buffer) else piece
        self._at = 0
        self.read_bytes += len(piece)
        self._find_run_end()
        self._read()

    def finish(self) -> None:
        """The document is complete. Raises JsonError unless it is well-formed."""
        self._is_last = True
        if not self._text.is_whole:
            raise JsonError("a character is cut off")
        self._read()
        if self._state != _AT_END or self._at < len(self._buffer):
            raise JsonError("it ends early")

    def _find_run_end(self) -> None:
        found = self._buffer.find(_TYPE)
        end = len(self._buffer) if found < 0 else found
        if self._buffer.find(b"\\u00") >= 0:
            match = _ESCAPED_LETTER.search(self._buffer)
            end = end if match is None else min(end, match.start())
        self._run_end = end

    def _read(self) -> None:
        """Take steps until the buffer is used up, or ends within something."""
        buffer, steps = self._buffer, self.steps
        end = len(buffer)
        while True:
            state = self._state
            steps += 1
            if state == _IN_STRING:
                goes_on = self._read_string(end)
            else:
                space = SPACE.match(buffer, self._at)
                if space is not None:
                    self._at = space.end()
                if self._at >= end:
                    break
                byte = buffer[self._at]
                if state == _AT_COMMA:
                    self._read_comma(byte)
                    goes_on = True
                elif state in (_AT_NAME, _AT_FIRST_NAME):
                    goes_on = self._read_name(byte, end)
                elif state == _AT_COLON:
                    if byte != _COLON_BYTE:
                        raise JsonError("a colon is missing")
                    self._at += 1
                    self._state = _AT_ELEMENT
                    goes_on = True
                elif state == _AT_END:
                    raise JsonError("something follows it")
                else:
                    goes_on = self._read_value(byte, end)
            if not goes_on:
                break
        self.steps = steps
        if steps > STEPS_MAX:
            raise TooManyStepsError

    # -- steps; each returns False if the buffer ends within what it reads

    def _read_comma(self, byte: int) -> None:
        here = self._open[-1]
        if byte == _COMMA:
            self._at += 1
            self._state = _AT_NAME if here.is_object else _AT_ELEMENT
        elif byte == (_CLOSE_OBJECT if here.is_object else _CLOSE_ARRAY):
            self._close(here)
        else:
            raise JsonError("a comma or the end of an array or object is missing")

    def _read_name(self, byte: int, end: int) -> bool:
        here = self._open[-1]
        if byte == _CLOSE_OBJECT and self._state == _AT_FIRST_NAME:
            self._close(here)
            return True
        match = NAME.match(self._buffer, self._at)
        if match is None:
            return self._needs_more(end, "a name is missing or malformed")
        raw: bytes = match[1]
        here.is_empty = False
        here.name = self._name(here, raw)
        colon = COLON.match(self._buffer, match.end())
        self._at = match.end() if colon is None else colon.end()
        self._state = _AT_COLON if colon is None else _AT_ELEMENT
        return True

    def _name(self, here: Container, raw: bytes) -> str:
        """The member's name if it matters, else an empty one."""
        if _BACKSLASH not in raw:
            if here.kept is None:
                return PART_NAMES.get(raw, "")
            name = raw.decode("utf-8")
        else:
            name = str(orjson.loads(b'"%b"' % raw))
        if here.kept is not None and self._watches(name):
            if name in here.kept and name not in self.doubled:
                self.doubled.append(name)
            return name
        return PART_NAMES.get(name.encode("utf-8"), "")

    def _read_value(self, byte: int, end: int) -> bool:
        here = self._open[-1] if self._open else None
        if here is not None and not here.is_object and (not here.name or (here.count and not here.counts)):
            run = RUN.match(self._buffer, self._at, max(self._run_end, self._at))
            if run is not None and run.end() > self._at:
                self._at = run.end()
                self._state = _AT_ELEMENT
                here.is_empty = False
                return True
        self._value_start = self._base + self._at
        if byte == _QUOTE:
            self._at += 1
            self._string_start = self._value_start + 1
            self._string_bytes = 0
            self._string_head = b""
            self._state = _IN_STRING
            return True
        if byte in (_OPEN_OBJECT, _OPEN_ARRAY):
            self._begin(here, is_object=byte == _OPEN_OBJECT)
            return True
        if byte == _CLOSE_ARRAY and self._state == _AT_FIRST_ELEMENT and here is not None:
            self._close(here)
            return True
        word = WORD.match(self._buffer, self._at)
        stop = self._at if word is None else word.end()
        match = None if stop == end and not self._is_last else PLAIN.fullmatch(self._buffer, self._at, stop)
        if match is None:
            return self._needs_more(end, "a value is missing or malformed")
        self._at = match.end()
        if here is not None and here.kept is not None and here.name and self._watches(here.name):
            self._keep(here, _plain(match.group()))
        self._ended(here, "plain")
        return True

    def _read_string(self, end: int) -> bool:
        match = CHARACTERS.match(self._buffer, self._at)
        stop = self._at if match is None else match.end()
        if len(self._string_head) < _KEPT_BYTES_MAX:
            self._string_head += self._buffer[self._at : min(stop, self._at + _KEPT_BYTES_MAX)]
        self._string_bytes += stop - self._at
        self._at = stop
        if stop < end and self._buffer[stop] == _QUOTE:
            self._at = stop + 1
            self._end_string()
            return True
        is_cut = stop == end or (self._buffer[stop] == _BACKSLASH and end - stop < _ESCAPE_BYTES_MAX)
        if self._is_last or not is_cut:
            raise JsonError("a string is malformed or does not end")
        return False

    def _end_string(self) -> None:
        here = self._open[-1] if self._open else None
        if here is not None and here.is_object and here.name:
            self._note_string(here)
        self._ended(here, "text")

    def _note_string(self, here: Container) -> None:
        head, name = self._string_head, here.name
        is_short = self._string_bytes <= len(head)
        if here.kept is not None and self._watches(name):
            self._keep(here, str(orjson.loads(b'"%b"' % head)) if is_short else "…")
        here.note(head if is_short else b"", head, self._string_bytes, self._media)

    # -- containers

    def _begin(self, parent: Container | None, *, is_object: bool) -> None:
        kept: dict[str, Any] | None = None
        name = ""
        if parent is None:
            self.opening = self._value_start
            if is_object:
                kept = self.document = {}
        elif parent.kept is not None and parent.name and self._watches(parent.name):
            name = parent.name
            value: dict[str, Any] | list[bool] = {} if is_object else []
            if isinstance(value, dict) and name == self._expanded and parent.kept is self.document:
                kept = value
            self._keep(parent, value)
        if len(self._open) >= DEPTH_MAX:
            raise JsonError("it is nested too deeply")
        here = Container(self._value_start, kept, is_object=is_object)
        if not is_object and name == self._counted and parent is not None and parent.kept is self.document:
            here.name = name
        self._open.append(here)
        self._at += 1
        self._state = _AT_FIRST_NAME if is_object else _AT_FIRST_ELEMENT

    def _close(self, here: Container) -> None:
        self._at += 1
        self._open.pop()
        parent = self._open[-1] if self._open else None
        if here.type in self._media and here.is_object:
            self.parts += 1
            if here.types == 1 and here.type in self._images:
                self.image_bytes += here.inline_bytes
        if here.kept is not None and here.kept is not self.document:
            self.expanded_is_empty = here.is_empty
        if here.counts:
            self.elements = here.count
        if parent is not None and parent.is_object and parent.name:
            if here.is_object:
                parent.note_object(here)
            if parent.kept is not None and here.kept is None and not here.is_empty:
                kept = parent.kept.get(parent.name)
                if isinstance(kept, list):
                    kept.append(True)
                elif isinstance(kept, dict):
                    kept[""] = True
        self._value_start = here.start
        self._ended(parent, "object" if here.is_object else "array")

    def _ended(self, here: Container | None, kind: str) -> None:
        """A value has ended, in this container."""
        if here is None:
            self._state = _AT_END
            return
        self._state = _AT_COMMA
        if here.is_object:
            if here.kept is not None and here.name:
                path = (here.name, "") if here.kept is self.document else (self._expanded, here.name)
                self.spans[path] = (self._value_start, self._base + self._at)
            return
        here.is_empty = False
        if here.name:
            if here.count == 0:
                here.counts = kind in ("text", "array")
            here.count += 1

    def _keep(self, here: Container, value: Any) -> None:
        if here.kept is not None:
            here.kept[here.name] = value

    def _needs_more(self, end: int, otherwise: str) -> bool:
        if self._is_last or end - self._at > _TOKEN_BYTES_MAX:
            raise JsonError(otherwise)
        return False


def _plain(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except ValueError:
        return float("-inf" if raw.startswith(b"-") else "inf")  # no double holds it
