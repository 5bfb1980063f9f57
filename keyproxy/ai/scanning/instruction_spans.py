"""What the instructions of a request depend on, as bytes of its JSON: collected while the JSON is scanned.

A system prompt comes with many requests. Requests with the same bytes here have the same instructions, so that these need
not be parsed again.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from keyproxy.mypyc_compat import mypyc_attr

# What a member is to the instructions.
NOTHING: Final = 0
WHOLE: Final = 1  # they depend on its value
STORED: Final = 2  # they depend on its value if that is an object
ENTRIES: Final = 3  # they depend on its elements, but for those with an exempt role
ROLE: Final = 4  # the role of an element

_PIECES_MAX: Final = 64
_BYTES_MAX: Final = 16_384

#: The shortest number beyond the range of a double is 9e308, and the shortest without an exponent has 309 digits.
_SAFE_BYTES: Final = 4
_DIGITS_MAX: Final = 300
_NINE: Final = 0x39


class InstructionMembers(NamedTuple):
    """The members of a document by what they are to its instructions. `roles`: elements with one are not instructions."""

    whole: tuple[str, ...]
    stored: tuple[str, ...]
    entries: tuple[str, ...]
    roles: frozenset[bytes]


@mypyc_attr(acyclic=True)
class InstructionSpans:
    """The bytes on which the instructions of one document depend. `is_usual`: False if they depend on anything else."""

    __slots__ = ("_bytes", "_content", "_exempt_start", "_pieces", "_roles", "is_usual")

    def __init__(self, content: bytes, members: InstructionMembers) -> None:
        self.is_usual = True
        self._content: Final = content
        self._roles: Final = members.roles
        self._pieces: list[bytes] | None = None
        self._bytes = 0
        #: Where the last object with an exempt role begins.
        self._exempt_start = -1

    def key(self) -> bytes:
        """The bytes. Two documents with the same ones have the same instructions."""
        # JSON has no NUL, and no value of it begins like a name.
        return b"" if self._pieces is None else b"\0".join(self._pieces)

    def note_role(self, object_start: int, text: bytes | None) -> None:
        """A string is the role of an entry. `object_start`: of the entry. `text`: decoded; None: it is long."""
        if text is not None and text in self._roles:
            self._exempt_start = object_start

    def note_string(self, part: int, path: str, start: int, end: int) -> None:
        """A string, with its quotes, is the value of a member."""
        if part == WHOLE:
            self._add_named(path, start, end)
        elif part == ENTRIES:
            # It is the user's, or no instruction in any API: which one does not matter.
            self._add_named(path, start, start + 1)

    def note_plain(self, start: int, end: int) -> None:
        """A number or literal ends, anywhere in the document."""
        length = end - start
        if length > _SAFE_BYTES and self._content[start] <= _NINE:
            # A parser may refuse the document for it.
            number = self._content[start:end]
            if length > _DIGITS_MAX or number.lower().find(b"e") > 0:
                self.is_usual = False

    def note_member(self, part: int, path: str, start: int, end: int) -> None:
        """A number or literal is the value of a member."""
        if part in (WHOLE, ENTRIES):
            self._add_named(path, start, end)

    def note_container(self, part: int, path: str, start: int, end: int, *, is_object: bool) -> None:
        """An array or object that is the value of a member ends."""
        if part == WHOLE or (part == STORED and is_object):
            self._add_named(path, start, end)
        elif part == ENTRIES and is_object:
            self.note_entry(start, end, is_object=True)

    def note_entry(self, start: int, end: int, *, is_object: bool) -> None:
        """An element of an array of entries ends."""
        if not is_object:
            self.is_usual = False
        elif start != self._exempt_start:
            self._add(start, end)

    def _add_named(self, path: str, start: int, end: int) -> None:
        pieces = self._pieces
        if pieces is None:
            pieces = self._pieces = []
        pieces.append(path.encode("ascii"))
        self._add(start, end)

    def _add(self, start: int, end: int) -> None:
        pieces = self._pieces
        if pieces is None:
            pieces = self._pieces = []
        self._bytes += end - start
        if self._bytes > _BYTES_MAX or len(pieces) >= _PIECES_MAX:
            self.is_usual = False
        else:
            pieces.append(self._content[start:end])
