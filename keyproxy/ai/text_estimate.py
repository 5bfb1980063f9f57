"""Estimate how many tokens a text is, without a tokenizer. Pure arithmetic on UTF-8 bytes.

    run of L ASCII letters       1 + L//7 + 6 * (L//16), + U//3 per run of U capitals, + 1 per change from lower to upper
    run of L digits              1 + L//3, + 1 after a space or tab
    run of L spaces or tabs      half a token per 2
    other ASCII                  1 each
    character of 2, 3, 4 bytes   3/4, 5/4, 3

Words of a vocabulary are mostly shorter than 7 letters; runs of 16 and more are not words (base64, identifiers in one
case) and are split finely. docs/token-estimates.md compares the figures with a real tokenizer.

There are two ways to the same figures, and a test holds them equal. The compiled build reads byte by byte, which takes 2
to 3 ns a byte and no call. Interpreted, that takes 100: there each byte is translated to its class, so that every floor
above is the number of non-overlapping occurrences of a short needle, and `bytes.count` finds them at the speed of C, with
no Python object per word. Rejected: a regular expression per run (4 times as slow), and Python strings (one emoji makes
a string 4 bytes a character).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from keyproxy.mypyc_compat import i64, mypyc_attr

#: Joins strings into one argument of `add`: no UTF-8 contains it. It counts nothing and ends a run.
SEPARATOR: Final = b"\xff"

#: Counted at a time, which bounds the copies.
_SLICE_BYTES: Final = 65_536

#: Estimates are sums of quarter tokens.
QUARTERS: Final = 4
_OTHER: Final = ord(".")
_CONTINUATION: Final = bytes(range(0x80, 0xC0))


def _classes() -> bytes:
    """The class of each byte: a, A, 0, space, `.` other ASCII, 2 3 4 the first byte of a character, - any other byte of
    it, x the separator."""
    table = bytearray(_OTHER for _ in range(0x100))
    for characters, kind in (
        (b"abcdefghijklmnopqrstuvwxyz", "a"),
        (b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "A"),
        (b"0123456789", "0"),
        (b" \t", " "),
        (bytes(range(0xC0, 0xE0)), "2"),
        (bytes(range(0xE0, 0xF0)), "3"),
        (bytes(range(0xF0, 0xFF)), "4"),
        (_CONTINUATION, "-"),
        (SEPARATOR, "x"),
    ):
        for character in characters:
            table[character] = ord(kind)
    return bytes(table)


_CLASSES: Final = _classes()

_IS_COMPILED: Final = not __file__.endswith(".py")

# The classes in `_CLASSES`.
_LOWER: Final = ord("a")
_UPPER: Final = ord("A")
_DIGIT: Final = ord("0")
_SPACE: Final = ord(" ")
_TWO: Final = ord("2")
_THREE: Final = ord("3")
_FOUR: Final = ord("4")
_INSIDE: Final = ord("-")
#: Of a text of classes: its letters as `a`, or its digits as `0`, all else as a space.
_LETTERS: Final = bytes(ord("a" if chr(character) in "aA" else " ") for character in range(0x100))
_DIGITS: Final = bytes(ord("0" if chr(character) == "0" else " ") for character in range(0x100))

#: One of so many bytes.
_RARE: Final = 16

#: Escapes of JSON, the backslash first, which is then none that begins another. What they stand for, or another byte
#: of its class.
_ESCAPES: Final = (
    (b"\\\\", b"."), (b"\\t", b"\t"), (b"\\n", b"\n"), (b'\\"', b'"'), (b"\\/", b"/"), (b"\\r", b"\r"), (b"\\b", b"."),
    (b"\\f", b"."),
)  # fmt: skip
_UNICODE_ESCAPE: Final = re.compile(rb"\\u([0-9a-fA-F]{4})")

_7_LETTERS: Final = b"a" * 7
_16_LETTERS: Final = b"a" * 16


@mypyc_attr(acyclic=True)
class TextEstimate:
    """The sum of the estimates of the strings added, in quarter tokens: rounded up once, not per string."""

    __slots__ = ("_capitals", "_digits", "_letters", "_spaces", "quarters")

    def __init__(self) -> None:
        self.quarters = 0
        # The lengths of the runs at the end of what was added.
        self._letters = self._capitals = self._digits = self._spaces = 0

    def add(self, decoded: bytes, *, continues: bool = False) -> None:
        """Add a string: its decoded characters in UTF-8.

        `continues`: these bytes continue the string added last, cut anywhere. A string costs up to 12 ns a byte and half
        a microsecond: cut long ones where the event loop must not be held.
        """
        if not continues:
            self._letters = self._capitals = self._digits = self._spaces = 0
        if _IS_COMPILED:
            self.add_bytewise(decoded)
        else:
            self.add_by_counts(decoded)

    def add_all(self, decoded: Sequence[bytes]) -> None:
        """Add several short strings at once."""
        if _IS_COMPILED:
            for text in decoded:
                self.add(text)
        else:
            self.add(SEPARATOR.join(decoded))

    def tokens(self) -> int:
        """The estimate: whole tokens, rounded up."""
        return -(-self.quarters // QUARTERS)

    def add_bytewise(self, decoded: bytes) -> None:
        """Add the rest of a string byte by byte."""
        letters: i64 = self._letters
        capitals: i64 = self._capitals
        digits: i64 = self._digits
        spaces: i64 = self._spaces
        tokens: i64 = 0
        quarters: i64 = 0
        at: i64 = 0
        size: i64 = len(decoded)
        classes = _CLASSES
        while at < size:
            kind: i64 = classes[decoded[at]]
            start: i64 = at
            at += 1
            if kind == _LOWER:
                while at < size and classes[decoded[at]] == kind:
                    at += 1
                run: i64 = letters + at - start
                tokens += run // 7 - letters // 7 + 6 * (run // 16 - letters // 16)
                if letters == 0:
                    tokens += 1
                letters = run
                capitals = digits = spaces = 0
                continue
            if kind == _UPPER:
                digits = spaces = 0
                if letters == 0 or capitals == 0:
                    tokens += 1
                letters += 1
                capitals += 1
                if letters % 7 == 0:
                    tokens += 1
                if letters % 16 == 0:
                    tokens += 6
                if capitals % 3 == 0:
                    tokens += 1
                continue
            if kind == _INSIDE:
                continue
            letters = capitals = 0
            if kind == _SPACE:
                digits = 0
                spaces += 1
                if spaces % 2 == 0:
                    quarters += 2
            elif kind == _DIGIT:
                if digits == 0:
                    tokens += 1
                    if spaces:
                        tokens += 1
                spaces = 0
                digits += 1
                if digits % 3 == 0:
                    tokens += 1
            else:
                digits = spaces = 0
                if kind == _OTHER:
                    tokens += 1
                elif kind == _TWO:
                    quarters += 3
                elif kind == _THREE:
                    quarters += 5
                elif kind == _FOUR:
                    quarters += 12
        self._letters, self._capitals, self._digits, self._spaces = letters, capitals, digits, spaces
        self.quarters += QUARTERS * tokens + quarters

    def add_by_counts(self, decoded: bytes) -> None:
        """Add the rest of a string by counting in slices of it."""
        for start in range(0, len(decoded), _SLICE_BYTES):
            text = _classified(decoded[start : start + _SLICE_BYTES])
            if text:
                self.quarters += _quarters(text)
                self._join(text)
                self._note_end(text)

    def _join(self, text: bytes) -> None:
        """Correct the sum: the runs at the beginning of this text are the rest of those at the end of the last one."""
        size = len(text)
        first = text[:1]
        if self._letters and first in (b"a", b"A"):
            more = size - len(text.lstrip(b"aA"))
            tokens = _more(self._letters, more, 7) + 6 * _more(self._letters, more, 16) - 1
            self.quarters += QUARTERS * tokens
            if first == b"A":
                more = size - len(text.lstrip(b"A"))
                is_change = not self._capitals
                self.quarters += QUARTERS * (_more(self._capitals, more, 3) + is_change)
        elif first == b"0" and self._digits:
            more = size - len(text.lstrip(b"0"))
            self.quarters += QUARTERS * (_more(self._digits, more, 3) - 1)
        elif first == b"0" and self._spaces:
            self.quarters += QUARTERS
        elif first == b" " and self._spaces:
            more = size - len(text.lstrip(b" "))
            self.quarters += 2 * _more(self._spaces, more, 2)

    def _note_end(self, text: bytes) -> None:
        size = len(text)
        letters = size - len(text.rstrip(b"aA"))
        capitals = size - len(text.rstrip(b"A"))
        digits = size - len(text.rstrip(b"0"))
        spaces = size - len(text.rstrip(b" "))
        self._letters = letters + (self._letters if letters == size else 0)
        self._capitals = capitals + (self._capitals if capitals == size else 0)
        self._digits = digits + (self._digits if digits == size else 0)
        self._spaces = spaces + (self._spaces if spaces == size else 0)


def text_tokens(decoded: bytes) -> int:
    """Estimate the tokens of one string in UTF-8."""
    estimate = TextEstimate()
    estimate.add(decoded)
    return estimate.tokens()


def pieces_quarters(pieces: bytes) -> int:
    """Count pieces of output, each at least one token, in quarter tokens.

    `pieces`: none of them empty, each preceded and followed by a `SEPARATOR` of its own.
    """
    text = _classified(pieces)
    if _IS_COMPILED:
        # The texts of a few events are short: 1,500 instructions instead of 24,000.
        estimate = TextEstimate()
        estimate.add_bytewise(pieces)
        quarters = estimate.quarters
    else:
        quarters = _quarters(text)
    # All other pieces have a token.
    lack = 4 * text.count(b"x x") + 2 * (text.count(b"x  x") + text.count(b"x   x"))
    return quarters + lack + text.count(b"x2x") + text.count(b"x 2x")


def json_text(raw: bytes) -> bytes:
    """Return the characters of JSON strings, as far as the estimate distinguishes them, without decoding them.

    `raw`: the strings as they stand in JSON, without their quotes, perhaps joined by `SEPARATOR`.
    """
    if raw.find(b"\\") < 0:  # `in` tries the operand as a number first, at 2,000 instructions
        return raw
    for escape, character in _ESCAPES:
        raw = raw.replace(escape, character)
    return _UNICODE_ESCAPE.sub(_character, raw) if raw.find(b"\\u") >= 0 else raw


def _character(escape: re.Match[bytes]) -> bytes:
    """The UTF-8 of an escaped character. A pair of surrogates is one of 4 bytes: here, its first half is."""
    code = int(escape[1], 16)
    if code < 0x80:
        return b"%c" % code
    if code < 0x800:
        return b"\xc2\x80"
    if 0xD800 <= code < 0xDC00:
        return b"\xf0\x90\x80\x80"
    return b"" if 0xDC00 <= code < 0xE000 else b"\xe0\xa0\x80"


def _classified(text: bytes) -> bytes:
    return text.translate(_CLASSES) if text.isascii() else text.translate(_CLASSES, _CONTINUATION)


def _quarters(text: bytes) -> int:
    """Count a text of classes, in quarter tokens."""
    letters = text.translate(_LETTERS)
    tokens = text.count(b".") + _runs(letters, b"a") + letters.count(_7_LETTERS) + 6 * letters.count(_16_LETTERS)
    if text.find(b"A") >= 0:
        tokens += text.count(b"aA") + text.count(b"AAA")
    digits = text.count(b"0")
    if digits:
        only = text.translate(_DIGITS)
        # Where digits are rare, the objects that `split` makes cost less than a search that stops at every space.
        runs = len(only.split()) if digits * _RARE < len(text) else _runs(only, b"0")
        tokens += runs + text.count(b"000") + text.count(b" 0")
    characters = 3 * text.count(b"2") + 5 * text.count(b"3") + 12 * text.count(b"4")
    return QUARTERS * tokens + 2 * text.count(b"  ") + characters


def _runs(text: bytes, kind: bytes) -> int:
    """The number of runs of a class in a text of this class and spaces."""
    return text.count(b" " + kind) + text.startswith(kind)


def _more(length: int, added: int, step: int) -> int:
    """By how much two parts of a run, counted apart, have too few whole steps."""
    return (length + added) // step - length // step - added // step
