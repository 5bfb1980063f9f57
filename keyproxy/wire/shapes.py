"""Shapes of heads: which lines are always the same, and where between them values stand that differ.

A shape is made from a head that was judged. Whether another head is of that shape is told by comparing bytes: all between
the values must be the same, byte for byte, and a value must hold nothing but field characters (a Content-Length: nothing
but digits). What is told of such a head is then what was judged, with its own values in their places.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

from keyproxy.headers import Kind
from keyproxy.wire.heads import CONTENT_LENGTH_DIGITS_MAX, JudgedFields

CRLF: Final = b"\r\n"

#: Deleting these from a value must leave nothing. RFC 9110 section 5.5: visible, space, tab, obs-text.
_FIELD_CHARACTERS: Final = bytes([0x09, *range(0x20, 0x7F), *range(0x80, 0x100)])


_Fields = TypeVar("_Fields")


class Meaning:
    """What any line with this name means, or (`is_whole_line`) what this very line does. Compared by identity."""

    __slots__ = ("is_whole_line", "kind")

    def __init__(self, kind: Kind, *, is_whole_line: bool) -> None:
        self.kind = kind
        self.is_whole_line = is_whole_line


class Hole:
    """Where a line of a shape differs from head to head. `before`: what stands between the last hole and this value."""

    __slots__ = ("before", "is_number", "length")

    def __init__(self, before: bytes, kind: Kind) -> None:
        self.before = before
        self.length = len(before)
        self.is_number = kind is Kind.CONTENT_LENGTH


class Shape(Generic[_Fields]):
    """A remembered judgement: the lines that are always the same, and between them the holes for values.

    The places of holes that mean something are counted from 0, -1 for none; of fields that may come several times the
    place and the name, in lower case.
    """

    __slots__ = (
        "_after", "_first", "_going", "_holes", "content_length", "credentials", "fields", "forwarded", "minor_version",
        "request_id",
    )  # fmt: skip

    def __init__(
        self, minor_version: int, fields: _Fields, lines: list[bytes], judged: JudgedFields, meanings: list[Meaning]
    ) -> None:
        self.minor_version = minor_version
        self.fields = fields
        self.content_length = self.request_id = -1
        self.credentials: list[tuple[int, bytes]] = []
        self.forwarded: list[tuple[int, bytes]] = []
        self._holes: list[Hole] = []
        before, going = b"", [b""]
        places = []
        for line, is_forwarded, meaning in zip(lines, judged.is_forwarded, meanings, strict=True):
            if meaning.is_whole_line:
                before += CRLF + line
                going[-1] += line + CRLF if is_forwarded else b""
                continue
            name = line.partition(b":")[0]
            self._say(meaning.kind, name.lower(), len(self._holes))
            if is_forwarded:
                places.append(len(self._holes))
                going[-1] += name + b": "
                going.append(CRLF)
            self._holes.append(Hole(before + CRLF + name + b": ", meaning.kind))
            before = b""
        self._after = before
        #: The lines that go on: what comes first, then the places of values and what follows each.
        self._first = going[0]
        self._going = list(zip(places, going[1:], strict=True))

    def _say(self, kind: Kind, name: bytes, place: int) -> None:
        if kind is Kind.CONTENT_LENGTH:
            self.content_length = place
        elif kind is Kind.REQUEST_ID:
            self.request_id = place
        elif kind is Kind.CREDENTIAL:
            self.credentials.append((place, name))
        elif kind is Kind.FORWARDED:
            self.forwarded.append((place, name))

    def values(self, buffer: bytes, at: int, end: int) -> list[bytes] | None:
        """What stands in the holes, for a head whose lines are from `at` to `end`; None if it is of another shape."""
        values = []
        for hole in self._holes:
            start = at + hole.length
            if buffer[at:start] != hole.before:
                return None
            at = buffer.find(CRLF, start)
            value = buffer[start:at]
            if hole.is_number:
                if not value.isdigit() or len(value) > CONTENT_LENGTH_DIGITS_MAX:
                    return None
            elif value.translate(None, _FIELD_CHARACTERS):
                return None
            values.append(value)
        return values if buffer[at:end] == self._after else None

    def block(self, values: list[bytes]) -> bytes:
        """The forwarded lines of a head with these values."""
        block = self._first
        for place, after in self._going:
            block += values[place] + after
        return block
