"""Estimate the strings of a JSON document that arrives in pieces, without keeping the document.

All string values count, member names do not. The strings of members that hold an image or a sound in base64 count as
media. A name longer than `NAME_BYTES_MAX` counts as a value: which it is must be known before it has ended.

Memory: the current piece, and two names between pieces. Time: linear in the document.
"""

from __future__ import annotations

import re
from typing import Final

from keyproxy.ai.json_characters import INSIDE
from keyproxy.ai.responses.produced_text import MEDIA_MEMBERS, base64_bytes, media_tokens
from keyproxy.ai.text_estimate import QUARTERS, SEPARATOR, TextEstimate, json_text

NAME_BYTES_MAX: Final = 1_024

_SPACES_MAX: Final = 64

_MEDIA_KEYS: Final = tuple([b'"%b"' % name.encode() for name in MEDIA_MEMBERS])

#: The content of a string, of whole escapes.
_CONTENT: Final = rb"(?:%b++|\\u%b{4}|\\[^u]|\\u(?=%b{0,3}[\"\\]))*+" % (INSIDE, INSIDE, INSIDE)
_COLON: Final = rb"[ \t\r\n]{0,%d}+:" % _SPACES_MAX
_MEDIA_NAME: Final = (
    rb'"(?:'
    + b"|".join([name.encode() for name in MEDIA_MEMBERS])
    + rb')"'
    + _COLON
    + rb"[ \t\r\n]{0,%d}+" % _SPACES_MAX
)
#: A string, its end, and perhaps the colon after it.
_STRINGS: Final = re.compile(rb'"(' + _CONTENT + rb'"(?:' + _COLON + rb")?)", re.DOTALL)
#: A member with media, or any other string, which may look like one.
_MEDIA: Final = re.compile(_MEDIA_NAME + rb'"(' + _CONTENT + rb')"|"' + _CONTENT + rb'"', re.DOTALL)
_REST: Final = re.compile(_CONTENT, re.DOTALL)
#: Everything up to the first unterminated string.
_WHOLE: Final = re.compile(rb'[^"]*+(?:"%b*+(?:\\.%b*+)*+"[^"]*+)*+' % (INSIDE, INSIDE), re.DOTALL)
_MEDIA_BEFORE: Final = re.compile(_MEDIA_NAME + rb"\Z")
_BEFORE_BYTES: Final = 2 * _SPACES_MAX + 32
_IS_MEDIA: Final = re.compile(rb".*" + _MEDIA_NAME, re.DOTALL)
#: What may stand between a string and what belongs to it.
_GAP: Final = re.compile(rb"[ \t\r\n:]{0,%d}+" % (2 * _SPACES_MAX + 1))
_BACKSLASH: Final = 0x5C
_QUOTE: Final = 0x22


class StringCounter:
    """Counts the strings of a JSON document fed in pieces of any size."""

    def __init__(self) -> None:
        self._estimate: Final = TextEstimate()
        self._media_characters = 0
        #: Strings whose kind depends on what follows, and one that has begun.
        self._held = b""
        self._is_in_string = False
        self._is_media = False
        self._is_begun = False

    @property
    def tokens(self) -> int:
        """The estimate. A string that has not ended counts as a value."""
        estimate, media = TextEstimate(), self._media_characters
        held = self._held
        if held and not self._is_in_string:
            whole = _WHOLE.match(held)
            end = len(held) if whole is None else whole.end()
            media += _count(held[:end], estimate)
            rest = held[end + 1 :]
            if _IS_MEDIA.fullmatch(held, 0, end):
                media += _characters(rest)
            else:
                estimate.add(json_text(rest))
        return -(-(self._estimate.quarters + estimate.quarters) // QUARTERS) + media_tokens(base64_bytes(media))

    def feed(self, content: bytes) -> None:
        """Count the next piece."""
        content, self._held = self._held + content if self._held else content, b""
        at = 0
        if self._is_in_string:
            at = self._count_rest(content)
            if self._is_in_string:
                return
        whole = _WHOLE.match(content, at)
        end = len(content) if whole is None else whole.end()
        held = _held_from(content, at, end)
        if len(content) - end <= NAME_BYTES_MAX + 1:
            self._media_characters += _count(content[at:held], self._estimate)
            self._held = content[held:]
            return
        # A value begins that does not end here.
        self._media_characters += _count(content[at:end], self._estimate)
        self._is_in_string, self._is_begun = True, False
        self._is_media = _IS_MEDIA.fullmatch(content, held, end) is not None
        self._count_rest(content[end + 1 :])

    def _count_rest(self, content: bytes) -> int:
        """Count the rest of a string; return the offset after it, if it ends here."""
        match = _REST.match(content)
        end = 0 if match is None else match.end()
        raw = content[:end]
        if self._is_media:
            self._media_characters += _characters(raw)
        else:
            self._estimate.add(json_text(raw), continues=self._is_begun)
            self._is_begun = True
        if content.startswith(b'"', end):
            self._is_in_string = False
            return end + 1
        self._held = content[end:]  # the beginning of an escape
        return len(content)


def _held_from(content: bytes, start: int, end: int) -> int:
    """Where the last string begins, if what follows the end may belong to it; else the end."""
    last = content.rfind(b'"', start, end)
    if last < 0 or _GAP.fullmatch(content, last + 1, end) is None:
        return end
    first = last
    while True:
        first = content.rfind(b'"', max(start, last - NAME_BYTES_MAX - 1), first)
        if first < 0:
            return end  # longer than a name
        backslashes = first
        while backslashes > start and content[backslashes - 1] == _BACKSLASH:
            backslashes -= 1
        if (first - backslashes) % 2 == 0:
            break
    # A short string may be the value of a member with media, which begins with its name.
    name = _MEDIA_BEFORE.search(content, max(start, first - _BEFORE_BYTES), first)
    return first if name is None else name.start()


def _count(content: bytes, estimate: TextEstimate) -> int:
    """Count whole strings; return the characters of base64."""
    characters = 0
    for name in _MEDIA_KEYS:
        if content.find(name) >= 0:
            characters = sum([_characters(media) for media in _MEDIA.findall(content) if media])
            content = _MEDIA.sub(_without_media, content) if characters else content
            break
    # One object a string: a document may consist of short ones. Each comes with the quote that ends it.
    found = _STRINGS.findall(content)
    if b":" not in content:
        values = found
    else:
        values = [value for value in found if value[-1] == _QUOTE]
        if max(map(len, found), default=0) > NAME_BYTES_MAX:
            values += _long_names(found)
    if values:
        estimate.add(json_text(SEPARATOR.join(values)))
        estimate.quarters -= QUARTERS * len(values)
    return characters


def _long_names(found: list[bytes]) -> list[bytes]:
    """The names that count as values."""
    ends = [(name, name.rindex(b'"')) for name in found if len(name) > NAME_BYTES_MAX and name[-1] != _QUOTE]
    return [name[: end + 1] for name, end in ends if end > NAME_BYTES_MAX]


def _without_media(match: re.Match[bytes]) -> bytes:
    return match.group() if match[1] is None else b""


def _characters(media: bytes) -> int:
    return len(media) - media.count(b"=")
