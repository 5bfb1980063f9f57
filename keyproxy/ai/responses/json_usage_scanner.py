"""Find the `usage` of a JSON document that arrives in pieces, without keeping the document.

The only thing looked for is a member `usage` of the outermost object. A key is `"usage"` followed by a colon, and it is
the outermost object's if one more bracket was opened than closed before it. So the text between two such keys need not
be taken apart: its strings are cut out in one pass, and what brackets are left is counted. A client can have its own
words in an answer, as strings and, where the upstream echoes what it was asked, as objects: neither is at that place.

Memory: a piece being looked at, and at most `USAGE_BYTES_MAX` between pieces. Time: linear in the document. Rejected:
keeping the document and parsing it whole, which for a batch of embeddings is tens of megabytes a request.

A document that is no JSON yields nothing or what its `usage` seems to be; it never raises.
"""

from __future__ import annotations

import json
import re
from typing import Final

import orjson

#: A usage object that is longer is not read.
USAGE_BYTES_MAX: Final = 8192

#: A document that has more usages, or comes with more keys in one piece, is read no further: it would take too long.
_VALUES_MAX: Final = 256
_STEPS_MAX: Final = 8_192

_KEY: Final = b'"usage"'
_CANDIDATE = re.compile(rb'"usage"[ \t\r\n]*(?::|\Z)')
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
#: All up to the first string that does not end. Found first: searching on inside such a string would be quadratic.
_WHOLE = re.compile(rb'[^"]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"]*+)*+', re.DOTALL)
#: The rest of a string whose beginning is behind us, up to its closing quote, which is not part of it.
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_SPACE: Final = re.compile(rb"[ \t\r\n]*+")
_UNREADABLE: Final = object()
_DECODER: Final = json.JSONDecoder()


class UsageScanner:
    """Fed with a JSON document in pieces of any size; `usage` is the last one it had, None if none."""

    def __init__(self) -> None:
        self.usage: object = None
        self._depth = 0
        self._is_in_string = False
        #: Bytes that mean something only together with what follows: the beginning of a key, or a lone backslash.
        self._rest = b""
        self._value: bytes | None = None
        self._values = 0
        self._is_over = False

    def feed(self, content: bytes) -> None:
        """The next piece."""
        if self._is_over:
            return
        if self._value is not None:
            content, self._value = self._value + content, None
            at = self._take_value(content, 0)
        else:
            content, self._rest, at = self._rest + content, b"", 0
        # An offset moves through the piece: cutting it at each of many keys would be quadratic.
        for _ in range(_STEPS_MAX):
            if at >= len(content) or self._is_over:
                return
            at = self._skip_string(content, at) if self._is_in_string else self._skip_structure(content, at)
        self._give_up()

    def _give_up(self) -> None:
        self.usage, self._value, self._is_over = None, None, True

    def _skip_string(self, content: bytes, at: int) -> int:
        match = _STRING_REST.match(content, at)
        end = match.end() if match is not None else at
        if content.startswith(b'"', end):
            self._is_in_string = False
            return end + 1
        self._rest = content[end:]  # nothing, or a backslash at the very end
        return len(content)

    def _skip_structure(self, content: bytes, at: int) -> int:
        """Go on to behind the next key, or to the end."""
        match = _CANDIDATE.search(content, at)
        end = len(content)
        limit = end if match is None else match.start()
        whole = _WHOLE.match(content, at, limit)
        begun = whole.end() if whole is not None else at
        bare = _STRING.sub(b"", content[at:begun])
        self._depth += bare.count(b"{") + bare.count(b"[") - bare.count(b"}") - bare.count(b"]")
        if begun < limit:
            # A string begins that does not end before the key: what looked like a key is the end of that string.
            if match is None and end - begun < len(_KEY):
                self._rest = content[begun:]
                return end
            self._is_in_string = True
            return begun + 1
        if match is None:
            return end
        if not match.group().endswith(b":"):
            self._rest = _KEY  # whether it is a key is known from what comes next
            return end
        return self._take_value(content, match.end()) if self._depth == 1 else match.end()

    def _take_value(self, content: bytes, at: int) -> int:
        """Read the value of `usage`, as soon as all of it is there; returns where what follows it begins."""
        self._values += 1
        if self._values > _VALUES_MAX:
            self._give_up()
            return len(content)
        space = _SPACE.match(content, at)
        at = at if space is None else space.end()
        if at == len(content):
            self._value = b""
            return at
        if not content.startswith(b"{", at):
            self.usage = None  # null, or without usable content
            return at
        piece = content[at : at + USAGE_BYTES_MAX]
        found, end = _decoded(piece) if b"}" in piece else (_UNREADABLE, 0)
        if found is not _UNREADABLE:
            self.usage = found
            return at + end
        if len(piece) == USAGE_BYTES_MAX:
            self._give_up()
        else:
            self._value = piece
        return len(content)


def _decoded(content: bytes) -> tuple[object, int]:
    """The value at the beginning and where it ends. Its end is looked for in Latin-1, where characters are bytes."""
    try:
        _, end = _DECODER.raw_decode(content.decode("latin-1"))
    except (ValueError, RecursionError):
        return _UNREADABLE, 0
    try:
        return orjson.loads(content[:end]), end
    except ValueError:
        return None, end
