"""The non-nested part of JSON's grammar (RFC 8259) as regular expressions.

All quantifiers are possessive and all choices atomic: a match never backtracks, so that its time is linear in its text.
"""

from __future__ import annotations

import re
from typing import Final

_SPACE_PATTERN: Final = rb"[ \t\r\n]*+"
_CHARACTERS_PATTERN: Final = (
    rb'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u(?:[0-9a-cefA-CEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
    rb"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})))*+"
)
_STRING_PATTERN: Final = rb'"' + _CHARACTERS_PATTERN + rb'"'
_PLAIN_PATTERN: Final = rb"(?>-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?+[0-9]++)?+|true|false|null)"


def _nested(value: bytes) -> bytes:
    """A pattern for a value, or an array or object of such values."""
    space, member = _SPACE_PATTERN, _STRING_PATTERN + _SPACE_PATTERN + rb":" + _SPACE_PATTERN + value + _SPACE_PATTERN
    array = rb"\[%b(?:%b%b(?:,%b%b%b)*+)?+\]" % (space, value, space, space, value, space)
    members = rb"\{%b(?:%b(?:,%b%b)*+)?+\}" % (space, member, space, member)
    return rb"(?>%b|%b|%b)" % (value, array, members)


_SIMPLE_PATTERN: Final = rb"(?>" + _STRING_PATTERN + rb"|" + _PLAIN_PATTERN + rb"|\[\]|\{\})"
#: Elements of an array, each followed by its comma. With one level more, some documents take three times as long.
RUN: Final = re.compile(rb"(?:%b%b%b,)*+" % (_SPACE_PATTERN, _nested(_SIMPLE_PATTERN), _SPACE_PATTERN))
SPACE: Final = re.compile(_SPACE_PATTERN)
CHARACTERS: Final = re.compile(_CHARACTERS_PATTERN)
PLAIN: Final = re.compile(_PLAIN_PATTERN)
#: The characters of numbers and literals.
WORD: Final = re.compile(rb"[-+.0-9A-Za-z]*+")
#: Characters that strings may not contain.
CONTROLS: Final = bytes(range(0x20))
NAME: Final = re.compile(rb'"(' + _CHARACTERS_PATTERN + rb')"')
COLON: Final = re.compile(_SPACE_PATTERN + rb":")


_VALUE_PATTERN: Final = rb'(?>"(%b)"|(%b))' % (_CHARACTERS_PATTERN, _PLAIN_PATTERN)
#: A member of an object. Groups: the name; a string, or a number or literal, and the comma that follows; or the opening
#: bracket of its value.
MEMBER: Final = re.compile(
    rb'%b"(%b)"%b:%b(?>%b%b(?:(,)|(?=\}))|([{\[]))'
    % (_SPACE_PATTERN, _CHARACTERS_PATTERN, _SPACE_PATTERN, _SPACE_PATTERN, _VALUE_PATTERN, _SPACE_PATTERN)
)
#: An element of an array. Groups: as of a member, without the name.
ELEMENT: Final = re.compile(rb"%b(?>%b%b(?:(,)|(?=\]))|([{\[]))" % (_SPACE_PATTERN, _VALUE_PATTERN, _SPACE_PATTERN))
#: Numbers in an array, each followed by its comma.
NUMBERS: Final = re.compile(
    rb"(?:%b-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?+[0-9]++)?+%b,)*+" % (_SPACE_PATTERN, _SPACE_PATTERN)
)


class Utf8:
    """Checks text that arrives in pieces. `is_whole`: no character was cut off by the end of the last piece."""

    __slots__ = ("_cut",)

    def __init__(self) -> None:
        self._cut = b""

    @property
    def is_whole(self) -> bool:
        return not self._cut

    def takes(self, piece: bytes) -> bool:
        """Whether the next piece is UTF-8."""
        if self._cut:
            piece = self._cut + piece
        elif piece.isascii():
            return True
        whole = len(piece)
        # A character that is cut off begins in the last three bytes.
        for back in range(1, min(3, whole) + 1):
            byte = piece[whole - back]
            if byte < 0x80:
                break
            if byte >= 0xC0:
                if byte >= (0xC0, 0xE0, 0xF0)[back - 1]:
                    whole -= back
                break
        self._cut = piece[whole:]
        try:
            piece[:whole].decode("utf-8")
        except UnicodeDecodeError:
            return False
        return True
