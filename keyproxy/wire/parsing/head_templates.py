"""Shapes of heads: the constant lines, and the places of the values that differ between them.

A shape is created from a parsed head. Another head has the same shape if everything between the values is equal, byte
for byte, and each value consists of field characters only (a Content-Length: of digits only). The parse result of such a
head is the cached one, with its own values in their places.

The lines are compared one by one: a regular expression for a whole shape takes twice as long, and to compile it as long
as to parse ten heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Generic, TypeVar

from keyproxy.http.headers import Kind
from keyproxy.wire.parsing.header_fields import CONTENT_LENGTH_DIGITS_MAX, ParsedFields

CRLF: Final = b"\r\n"

#: A letter for each byte that a value may have: visible, space, tab, obs-text. RFC 9110 section 5.5.
_FIELD_CHARACTERS: Final = bytes([97 if byte == 9 or (byte >= 0x20 and byte != 0x7F) else 0 for byte in range(256)])

#: A shape is used from the second head on.
LEARNT_AFTER: Final = 1

_Fields = TypeVar("_Fields")


class Meaning:
    """The meaning of all lines with one name, or (`is_whole_line`) of one exact line. Compared by identity.

    `text`: the line; or what comes before its value, the name with a colon and a space.
    """

    __slots__ = ("is_whole_line", "kind", "text")

    def __init__(self, kind: Kind, text: bytes, *, is_whole_line: bool) -> None:
        self.kind: Final = kind
        self.text: Final = text
        self.is_whole_line: Final = is_whole_line


class Shape(Generic[_Fields]):
    """A cached parse result: the constant lines, and the holes for values between them.

    The indexes of significant holes count from 0, -1 for none; fields that may be repeated have the index and the name,
    in lower case.
    """

    __slots__ = (
        "_first",
        "_going",
        "_lines",
        "act_for",
        "content_length",
        "credentials",
        "fields",
        "forwarded",
        "minor_version",
        "request_id",
        "usage_tokens",
    )

    def __init__(self, minor_version: int, fields: _Fields, parsed: ParsedFields, lines: list[Meaning]) -> None:
        self.minor_version = minor_version
        self.fields = fields
        self.content_length = self.request_id = self.act_for = self.usage_tokens = -1
        self.credentials: list[tuple[int, bytes]] = []
        self.forwarded: list[tuple[int, bytes]] = []
        self._lines = lines
        going = [b""]
        places = []
        holes = 0
        for line, is_forwarded in zip(lines, parsed.is_forwarded, strict=True):
            if line.is_whole_line:
                going[-1] += line.text + CRLF if is_forwarded else b""
                continue
            self._note_hole(line.kind, line.text[:-2].lower(), holes)
            if line.kind is Kind.USAGE and parsed.usage_tokens is not None and is_forwarded:
                self.usage_tokens = holes
            if is_forwarded:
                places.append(holes)
                going[-1] += line.text
                going.append(CRLF)
            holes += 1
        #: The forwarded lines: the first constant part, then the index of each value and the constant part after it.
        self._first = going[0]
        self._going = list(zip(places, going[1:], strict=True))

    def _note_hole(self, kind: Kind, name: bytes, place: int) -> None:
        if kind is Kind.CONTENT_LENGTH:
            self.content_length = place
        elif kind is Kind.REQUEST_ID:
            self.request_id = place
        elif kind is Kind.ACT_FOR:
            self.act_for = place
        elif kind is Kind.CREDENTIAL:
            self.credentials.append((place, name))
        elif kind is Kind.FORWARDED:
            self.forwarded.append((place, name))

    def values(self, lines: list[bytes]) -> list[bytes] | None:
        """Return the values in the holes, for a head with these lines; None if it has another shape.

        The first line, the start line, is not compared.
        """
        expected = self._lines
        if len(lines) != len(expected) + 1:
            return None
        found: list[bytes] = []
        place = 1
        for one in expected:
            line = lines[place]
            place += 1
            if one.is_whole_line:
                if line != one.text:
                    return None
            elif line.startswith(one.text):
                found.append(line[len(one.text) :])
            else:
                return None
        if self.content_length >= 0 and not _is_canonical(found[self.content_length]):
            return None
        characters = b"".join(found).translate(_FIELD_CHARACTERS)
        return found if characters.isalpha() or not characters else None

    def block(self, values: Sequence[bytes]) -> bytes:
        """Return the forwarded lines of a head with these values."""
        block = self._first
        for place, after in self._going:
            block += values[place] + after
        return block


def _is_canonical(length: bytes) -> bool:
    """Whether a length is in canonical form. Any other form is parsed each time, and rewritten."""
    if not length.isdigit() or len(length) > CONTENT_LENGTH_DIGITS_MAX:
        return False
    return not length.startswith(b"0") or len(length) == 1
