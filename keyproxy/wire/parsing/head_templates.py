"""Shapes of heads: the constant lines, and the places of the values that differ between them.

A shape is created from a parsed head. One regular expression tests whether another head has the same shape: everything
between the values must be equal, byte for byte, and a value must consist of field characters only (a Content-Length: of
digits only). The parse result of such a head is the cached one, with its own values in their places.

Compiling an expression costs as much as parsing ten heads, so a shape is compiled only once it was seen a few times: a
client that always sends new heads costs their parsing and seldom more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from keyproxy.http.headers import Kind
from keyproxy.wire.parsing.header_fields import CONTENT_LENGTH_DIGITS_MAX, ParsedFields

CRLF: Final = b"\r\n"

#: A value: visible, space, tab, obs-text. RFC 9110 section 5.5. The quantifier is possessive: no backtracking.
_VALUE: Final = rb"([\t\x20-\x7e\x80-\xff]*+)"

_START_LINE: Final = rb"([^\r\n]*+)"
_HEAD_END: Final = rb"\r\n\r\n"
_TRACEPARENT: Final = b"traceparent"

#: A length in canonical form. Any other form is parsed each time, and rewritten.
_NUMBER: Final = b"(0|[1-9][0-9]{0,%d})" % (CONTENT_LENGTH_DIGITS_MAX - 1)

LEARNT_AFTER: Final = 8

#: A compiled expression takes ten times as much memory as its text. Heads with a longer one are parsed each time.
_PATTERN_BYTES_MAX: Final = 2048

_Fields = TypeVar("_Fields")


class Meaning:
    """The meaning of all lines with one name, or (`is_whole_line`) of one exact line. Compared by identity."""

    __slots__ = ("is_whole_line", "kind")

    def __init__(self, kind: Kind, *, is_whole_line: bool) -> None:
        self.kind = kind
        self.is_whole_line = is_whole_line


class Shape(Generic[_Fields]):
    """A cached parse result: the constant lines, and the holes for values between them.

    The indexes of significant holes count from 1, because value 0 is the start line; -1 for none. Fields that may be
    repeated have the index and the name, in lower case. `values` returns None until the shape was seen often enough.
    """

    __slots__ = (
        "_constant_bytes",
        "_first",
        "_going",
        "_match",
        "_pattern",
        "_sightings",
        "act_for",
        "content_length",
        "credentials",
        "fields",
        "forwarded",
        "minor_version",
        "request_id",
        "traceparent",
        "usage_tokens",
    )

    def __init__(
        self, minor_version: int, fields: _Fields, lines: list[bytes], parsed: ParsedFields, meanings: list[Meaning]
    ) -> None:
        self.minor_version = minor_version
        self.fields = fields
        self.content_length = self.request_id = self.act_for = self.usage_tokens = self.traceparent = -1
        self.credentials: list[tuple[int, bytes]] = []
        self.forwarded: list[tuple[int, bytes]] = []
        self._sightings = 0
        self._match: Callable[[bytes, int, int], re.Match[bytes] | None] | None = None
        pattern, going = _START_LINE, [b""]
        places = []
        holes = 1
        constant_bytes = 2 * len(CRLF)
        for line, is_forwarded, meaning in zip(lines, parsed.is_forwarded, meanings, strict=True):
            if meaning.is_whole_line:
                pattern += re.escape(CRLF + line)
                constant_bytes += len(CRLF + line)
                going[-1] += line + CRLF if is_forwarded else b""
                continue
            name = line.partition(b":")[0]
            self._note_hole(meaning.kind, name.lower(), holes)
            if meaning.kind is Kind.USAGE and parsed.usage_tokens is not None and is_forwarded:
                self.usage_tokens = holes
            if is_forwarded:
                places.append(holes)
                going[-1] += name + b": "
                going.append(CRLF)
            pattern += re.escape(CRLF + name + b": ") + (_NUMBER if meaning.kind is Kind.CONTENT_LENGTH else _VALUE)
            constant_bytes += len(CRLF + name + b": ")
            holes += 1
        self._pattern = pattern + _HEAD_END
        self._constant_bytes = constant_bytes
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
        elif name == _TRACEPARENT:
            self.traceparent = place

    def sighted(self) -> None:
        """Count a head of this shape. After enough of them, compile the expression."""
        self._sightings += 1
        if self._sightings == LEARNT_AFTER and len(self._pattern) <= _PATTERN_BYTES_MAX:
            self._match = re.compile(self._pattern).match

    def values(self, buffer: bytes, end: int) -> tuple[bytes, ...] | None:
        """Return the start line and the values in the holes, of the head at the beginning of a buffer. None if it has
        another shape, or does not end within `end` bytes.

        No line of a shape is empty and no value has a line end, so that a match ends with the first empty line.
        """
        if self._match is None:
            return None
        match = self._match(buffer, 0, end)
        return None if match is None else match.groups()

    def raw_bytes(self, values: tuple[bytes, ...]) -> int:
        """Return the length of a head with these values, with its empty line."""
        total = self._constant_bytes
        for value in values:
            total += len(value)
        return total

    def block(self, values: tuple[bytes, ...]) -> bytes:
        """Return the forwarded lines of a head with these values."""
        parts = [self._first]
        for place, after in self._going:
            parts.append(values[place])
            parts.append(after)
        return b"".join(parts)
