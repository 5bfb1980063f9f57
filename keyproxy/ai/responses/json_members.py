"""Find members of the outermost object of a JSON document that arrives in pieces, without keeping the document.

A key is one of the names in quotes followed by a colon; it belongs to the outermost object if one more bracket was
opened than closed before it. So the text between two such keys is not parsed: its strings are removed in one pass, and
the remaining brackets are counted. Text from the client can appear in a response, as strings and, if the upstream
echoes the request, as objects: neither is at that place.

Memory: the current piece, and at most `VALUE_BYTES_MAX` between pieces. Time: linear in the document. Rejected: keeping
the document and parsing it whole, which for a batch of embeddings is tens of megabytes a request.

For a document that is no JSON, the scanner finds nothing, or what looks like its members; it never raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Final

import orjson

from keyproxy.ai.json_characters import INSIDE

#: A longer value is not read.
VALUE_BYTES_MAX: Final = 8192

#: A document with more values, or more keys in one piece, is read no further: it would take too long.
_VALUES_MAX: Final = 256
_STEPS_MAX: Final = 8_192

_CONTENT: Final = INSIDE + rb"*+(?:\\." + INSIDE + rb"*+)*+"
_STRING = re.compile(rb'"' + _CONTENT + rb'"', re.DOTALL)
#: Everything up to the first unterminated string. Found first: searching on inside such a string would be quadratic.
_WHOLE = re.compile(rb'[^"]*+(?:"' + _CONTENT + rb'"[^"]*+)*+', re.DOTALL)
#: The rest of a string that began in an earlier piece, up to its closing quote, which is excluded.
_STRING_REST = re.compile(_CONTENT, re.DOTALL)
#: Strings, and what is between them, up to the next bracket.
_STRINGS: Final = re.compile(rb'(?:"' + _CONTENT + rb'"[^"\[\]{}]*+)++', re.DOTALL)
_SPACE: Final = re.compile(rb"[ \t\r\n]*+")
_NUMBER: Final = re.compile(rb"[-+.0-9eE]++")
_UNREADABLE: Final = object()
_DECODER: Final = json.JSONDecoder()


class MemberScanner:
    """Scans a JSON document fed in pieces of any size; `found` has the last value of each name, null if it is none.

    Values are objects, strings and numbers.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.found: dict[str, object] = {}
        self._keys: Final = {b'"%b"' % name.encode(): name for name in names}
        longest = max([len(key) for key in self._keys], default=0)
        self._key_bytes_max: Final = longest
        alternatives = b"|".join([re.escape(key) for key in self._keys])
        self._candidate: Final = re.compile(rb"(" + alternatives + rb")[ \t\r\n]*(?::|\Z)")
        self._depth = 0
        self._is_in_string = False
        #: Bytes that are meaningful only with the following ones: the beginning of a key, or a lone backslash.
        self._rest = b""
        #: The member whose value is being read, and the beginning of the value.
        self._name = ""
        self._value: bytes | None = None
        self._values = 0
        self._is_over = False

    def feed(self, content: bytes) -> None:
        """Scan the next piece."""
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
        self.found.clear()
        self._value, self._is_over = None, True

    def _skip_string(self, content: bytes, at: int) -> int:
        match = _STRING_REST.match(content, at)
        end = match.end() if match is not None else at
        if content.startswith(b'"', end):
            self._is_in_string = False
            return end + 1
        self._rest = content[end:]  # nothing, or a backslash at the very end
        return len(content)

    def _skip_structure(self, content: bytes, at: int) -> int:
        """Advance past the next key, or to the end."""
        match = self._candidate.search(content, at)
        end = len(content)
        limit = end if match is None else match.start()
        whole = _WHOLE.match(content, at, limit)
        begun = whole.end() if whole is not None else at
        bare = _STRINGS.sub(b"", content[at:begun])
        self._depth += bare.count(b"{") + bare.count(b"[") - bare.count(b"}") - bare.count(b"]")
        if begun < limit:
            # A string begins that does not end before the key: what looked like a key is the end of that string.
            if match is None and end - begun < self._key_bytes_max:
                self._rest = content[begun:]
                return end
            self._is_in_string = True
            return begun + 1
        if match is None:
            return end
        key = match[1]
        if not match.group().endswith(b":"):
            self._rest = key  # whether it is a key is known from what comes next
            return end
        if self._depth != 1:
            return match.end()
        self._name = self._keys[key]
        return self._take_value(content, match.end())

    def _take_value(self, content: bytes, at: int) -> int:
        """Read a value once it is complete; return the offset after it."""
        self._values += 1
        if self._values > _VALUES_MAX:
            self._give_up()
            return len(content)
        space = _SPACE.match(content, at)
        at = at if space is None else space.end()
        if at == len(content):
            self._value = b""
            return at
        self.found[self._name] = None
        first = content[at : at + 1]
        piece = content[at : at + VALUE_BYTES_MAX]
        if first == b"{":
            found, end = _decoded(piece) if b"}" in piece else (_UNREADABLE, 0)
        elif first == b'"':
            match = _STRING.match(piece)
            found, end = (_UNREADABLE, 0) if match is None else (_loaded(match.group()), match.end())
        else:
            match = _NUMBER.match(piece)
            if match is None:
                return at  # null, or without usable content
            found, end = (_UNREADABLE, 0) if match.end() == len(piece) else (_loaded(match.group()), match.end())
        if found is not _UNREADABLE:
            self.found[self._name] = found
            return at + end
        if len(piece) == VALUE_BYTES_MAX:
            self._give_up()
        else:
            self._values -= 1
            self._value = piece
        return len(content)


def _decoded(content: bytes) -> tuple[object, int]:
    """Return the value at the beginning, and its end. The end is searched in Latin-1, where characters are bytes."""
    try:
        _, end = _DECODER.raw_decode(content.decode("latin-1"))
    except (ValueError, RecursionError):
        return _UNREADABLE, 0
    return _loaded(content[:end]), end


def _loaded(content: bytes) -> object:
    try:
        return orjson.loads(content)
    except ValueError:
        return None
