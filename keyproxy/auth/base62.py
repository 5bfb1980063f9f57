"""Numbers in base62: letters and digits only, so that a double click selects all of it and no encoding changes it."""

from __future__ import annotations

from typing import Final

ALPHABET: Final = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def base62(number: int, digits: int) -> bytes:
    """The last so many digits of a number, with leading zeros."""
    out = bytearray(digits)
    for place in range(digits - 1, -1, -1):
        number, digit = divmod(number, 62)
        out[place] = ALPHABET[digit]
    return bytes(out)
