"""The canonical form of a JSON text: equal values in one spelling, for a digest.

Members are sorted by name, space is removed, and strings have no escapes but the required ones. Numbers stay as written:
two spellings of a number may be different values to the server that reads them. A repeated name, a lone surrogate and
anything else that two parsers could read differently is refused.

Time is linear in the text, but for the sorting. A text of megabytes takes a second, so it is read in portions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import orjson

from keyproxy.ai.scanning.json_grammar import NUMBERS, PLAIN, SPACE, STRING
from keyproxy.reasons import Reason, Refusal

#: The number of values and names that one call of `advance` reads: about a millisecond.
_STEPS: Final = 2_000

#: Sorting more members would delay other requests.
_MEMBERS_MAX: Final = 16_384
_DEPTH_MAX: Final = 64

#: The depth of a member of the outermost object.
_TRIMMED_DEPTH: Final = 2

_QUOTE: Final = 0x22
_COMMA: Final = 0x2C
_COLON: Final = 0x3A
_OPEN_ARRAY: Final = 0x5B
_BACKSLASH: Final = 0x5C
_CLOSE_ARRAY: Final = 0x5D
_OPEN_OBJECT: Final = 0x7B
_CLOSE_OBJECT: Final = 0x7D
_OPENS: Final = (_OPEN_OBJECT, _OPEN_ARRAY)
_SPACES: Final = b" \t\r\n"


class _Container:
    """An object or array that is being read."""

    __slots__ = ("elements", "is_object", "members", "name")

    def __init__(self, *, is_object: bool) -> None:
        self.is_object = is_object
        #: The canonical elements of an array so far, each followed by a comma.
        self.elements = bytearray()
        self.members: list[tuple[bytes, bytes]] = []
        #: The name, in canonical form, of the member whose value is next.
        self.name = b""


class CanonicalJson:
    """Reads one JSON object or array in portions.

    `text` is its canonical form once `advance` has returned True; `members` then has those of the outermost object.

    From the member `trimmed` of the outermost object, members whose name `drops` accepts are left out; and that member
    itself if it is an empty object then. Names are in canonical form, in quotes.
    """

    __slots__ = ("_at", "_content", "_drops", "_is_begun", "_stack", "_trimmed", "members", "text")

    def __init__(self, content: bytes, trimmed: bytes = b"", drops: Callable[[bytes], bool] | None = None) -> None:
        """`content` is UTF-8."""
        self.text = b""
        self.members: dict[bytes, bytes] = {}
        self._content: Final = content
        self._trimmed: Final = trimmed
        self._drops: Final = drops
        self._stack: Final[list[_Container]] = []
        self._at = 0
        self._is_begun = False

    @property
    def size(self) -> int:
        """The number of bytes of the text."""
        return len(self._content)

    def advance(self) -> bool:
        """Read the next portion; return whether it was the last. Raises a Refusal if the text is malformed."""
        if not self._is_begun:
            self._is_begun = True
            self._skip_space()
            byte = self._byte()
            if byte not in _OPENS:
                raise _malformed("is neither an object nor an array")
            self._open(is_object=byte == _OPEN_OBJECT)
        for _ in range(_STEPS):
            if not self._stack:
                break
            container = self._stack[-1]
            if container.is_object:
                self._step_in_object(container)
            else:
                self._step_in_array(container)
        if self._stack:
            return False
        self._skip_space()
        if self._at != len(self._content):
            raise _malformed("has content after its end")
        return True

    def whole(self) -> bytes:
        """Read the rest at once, and return the canonical form."""
        while not self.advance():
            pass
        return self.text

    def _step_in_object(self, container: _Container) -> None:
        """Read the next member, up to the beginning of its value if that is an object or array; or the end."""
        byte = self._byte()
        if byte == _CLOSE_OBJECT:
            self._at += 1
            self._close(self._joined(container))
            return
        if byte != _QUOTE:
            raise _malformed("has an object without a name")
        if len(container.members) >= _MEMBERS_MAX:
            raise _malformed(f"has an object of more than {_MEMBERS_MAX} members")
        container.name = self._string()
        self._skip_space()
        if self._byte() != _COLON:
            raise _malformed("has a name without a value")
        self._at += 1
        self._skip_space()
        self._value()

    def _step_in_array(self, container: _Container) -> None:
        if self._byte() == _CLOSE_ARRAY:
            self._at += 1
            elements = container.elements
            if elements:
                elements[-1] = _CLOSE_ARRAY
            else:
                elements.append(_CLOSE_ARRAY)
            self._close(b"[" + bytes(elements))
            return
        numbers = NUMBERS.match(self._content, self._at)
        if numbers is not None and numbers.end() > self._at:
            # One step for thousands of numbers, as in the vector of an embedding.
            container.elements += numbers.group().translate(None, _SPACES)
            self._at = numbers.end()
            self._skip_space()
            if self._byte() == _CLOSE_ARRAY:
                raise _malformed("has a comma before the end of an array")
        self._value()

    def _value(self) -> None:
        byte = self._byte()
        if byte == _QUOTE:
            self._put(self._string())
        elif byte in _OPENS:
            self._open(is_object=byte == _OPEN_OBJECT)
        else:
            match = PLAIN.match(self._content, self._at)
            if match is None:
                raise _malformed("has an invalid value")
            self._at = match.end()
            self._put(match.group())

    def _open(self, *, is_object: bool) -> None:
        if len(self._stack) >= _DEPTH_MAX:
            raise _malformed(f"is nested more than {_DEPTH_MAX} levels deep")
        self._at += 1
        self._skip_space()
        self._stack.append(_Container(is_object=is_object))

    def _close(self, text: bytes) -> None:
        self._stack.pop()
        if self._stack:
            self._put(text)
        else:
            self.text = text

    def _put(self, text: bytes) -> None:
        """Add a complete value to its container, and read the comma after it, if there is one."""
        container = self._stack[-1]
        if container.is_object:
            container.members.append((container.name, text))
            end = _CLOSE_OBJECT
        else:
            container.elements += text
            container.elements += b","
            end = _CLOSE_ARRAY
        self._skip_space()
        byte = self._byte()
        if byte == _COMMA:
            self._at += 1
            self._skip_space()
            if self._byte() == end:
                raise _malformed("has a comma before the end of an object or array")
        elif byte != end:
            raise _malformed("has values without a comma between them")

    def _joined(self, container: _Container) -> bytes:
        """The canonical form of an object."""
        members = container.members
        members.sort()
        last = b""
        for name, _ in members:
            if name == last:
                raise _malformed("has an object with a repeated name")
            last = name
        drops, depth = self._drops, len(self._stack)
        if drops is not None:
            if depth == 1:
                members = [one for one in members if one[0] != self._trimmed or one[1] != b"{}"]
            elif depth == _TRIMMED_DEPTH and self._stack[0].name == self._trimmed:
                members = [one for one in members if not drops(one[0])]
        if depth == 1:
            self.members = dict(members)
        return b"{" + b",".join([name + b":" + text for name, text in members]) + b"}"

    def _string(self) -> bytes:
        """Read a string; return its canonical form."""
        match = STRING.match(self._content, self._at)
        if match is None:
            raise _malformed("has an invalid string")
        self._at = match.end()
        text = match.group()
        return text if _BACKSLASH not in text else orjson.dumps(orjson.loads(text))

    def _byte(self) -> int:
        """The next byte, -1 at the end."""
        return self._content[self._at] if self._at < len(self._content) else -1

    def _skip_space(self) -> None:
        match = SPACE.match(self._content, self._at)
        if match is not None:
            self._at = match.end()


def _malformed(what: str) -> Refusal:
    text = f"The JSON of the call {what}."
    return Refusal(Reason.REQUEST_MALFORMED, text, caller_text=text, replaces_sentence=True)
