"""The non-nested part of JSON's grammar (RFC 8259) as regular expressions.

All quantifiers are possessive and all choices atomic: a match never backtracks, so that its time is linear in its text.
"""

from __future__ import annotations

import re
from typing import Final

import orjson

from keyproxy.ai.json_characters import VALID

_BACKSLASH: Final = 0x5C

_SPACE_PATTERN: Final = rb"[ \t\r\n]*+"
_CHARACTERS_PATTERN: Final = (
    rb"(?:" + VALID + rb'++|\\(?:["\\/bfnrt]|u(?:[0-9a-cefA-CEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
    rb"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})))*+"
)
_PLAIN_PATTERN: Final = rb"(?>-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?+[0-9]++)?+|true|false|null)"
SPACE: Final = re.compile(_SPACE_PATTERN)
CHARACTERS: Final = re.compile(_CHARACTERS_PATTERN)
PLAIN: Final = re.compile(_PLAIN_PATTERN)
#: The characters of numbers and literals.
WORD: Final = re.compile(rb"[-+.0-9A-Za-z]*+")
#: Characters that strings may not contain; and that of escapes.
CONTROLS: Final = bytes(range(0x20))
SPECIAL: Final = CONTROLS + b"\\"
#: A string, with its characters in the group.
STRING: Final = re.compile(rb'"(' + _CHARACTERS_PATTERN + rb')"')
#: A string, or the beginning of one and all that follows: no quote is tried twice.
STRINGS: Final = re.compile(rb'"(' + _CHARACTERS_PATTERN + rb')(?:"|.*+)', re.DOTALL)
#: Numbers in an array, each followed by its comma.
NUMBERS: Final = re.compile(
    rb"(?:%b-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?+[0-9]++)?+%b,)*+" % (_SPACE_PATTERN, _SPACE_PATTERN)
)


def decoded(content: bytes, start: int, end: int) -> bytes:
    """A string from its characters in UTF-8. Raises ValueError if they are malformed."""
    raw = content[start:end]
    return raw if _BACKSLASH not in raw else str(orjson.loads(content[start - 1 : end + 1])).encode("utf-8")


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
