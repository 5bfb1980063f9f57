"""API keys: make, check, digest, display. Identical to the proxy's own.

    <prefix>_<live|test>_<43 base62 digits of 256 random bits><6 base62 digits of a CRC-32>

The checksum covers everything before it; it detects typing errors and is no protection. Only the digest of a key is
stored: unsalted SHA-256 suffices for 256 random bits, which cannot be guessed from their hash.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import zlib
from dataclasses import dataclass
from typing import Final

PREFIX: Final = "kp"
RANDOM_DIGITS: Final = 43
CHECKSUM_DIGITS: Final = 6
ENTROPY_BYTES: Final = 32

_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PREFIX = re.compile(r"[a-z][a-z0-9]{0,15}")
_KEY = re.compile(rf"([0-9a-z]+)_(live|test)_[0-9A-Za-z]{{{RANDOM_DIGITS + CHECKSUM_DIGITS}}}")
_KINDS: Final = "live|test|admin|access|refresh|client"
_ID_DIGITS: Final = 22
_HINT_TAIL: Final = 4
_HINT_SHOWS_TAIL_FROM: Final = 32


@dataclass(frozen=True, slots=True)
class Key:
    """The parts of a well-formed key that are no secret."""

    prefix: str
    is_test: bool


def make(*, is_test: bool = False, prefix: str = PREFIX, entropy: bytes | None = None) -> str:
    """Make a key. `entropy`: 32 random bytes; drawn from the operating system by default."""
    if _PREFIX.fullmatch(prefix) is None:
        raise ValueError("the prefix of a key must be 1 to 16 of a-z and 0-9, a letter first")
    drawn = secrets.token_bytes(ENTROPY_BYTES) if entropy is None else entropy
    if len(drawn) != ENTROPY_BYTES:
        raise ValueError(f"a key requires {ENTROPY_BYTES} random bytes, not {len(drawn)}")
    body = f"{prefix}_{'test' if is_test else 'live'}_{base62(int.from_bytes(drawn, 'big'), RANDOM_DIGITS)}"
    return body + _checksum(body)


def parse(secret: str, *, prefix: str | None = None) -> Key | None:
    """The parts of a key; None if it is not one, under this prefix or (None) under any, or its checksum is wrong."""
    match = _KEY.fullmatch(secret)
    if match is None or secret[-CHECKSUM_DIGITS:] != _checksum(secret[:-CHECKSUM_DIGITS]):
        return None
    return Key(match[1], match[2] == "test") if prefix in (None, match[1]) else None


def digest(secret: str) -> bytes:
    """SHA-256 of the whole key: what `api_keys.digest` holds."""
    return hashlib.sha256(secret.encode("utf-8")).digest()


def hint(secret: str, *, prefix: str = PREFIX) -> str:
    """The part of a key that may be displayed to identify it: its start and its last four characters."""
    start = re.match(f"{re.escape(prefix)}_(?:{_KINDS})_", secret, re.IGNORECASE)
    if start is None and len(secret) < _HINT_SHOWS_TAIL_FROM:
        return f"{secret[:2]}…"
    return f"{secret[: start.end() + _HINT_TAIL] if start else secret[:_HINT_TAIL]}…{secret[-_HINT_TAIL:]}"


def new_key_id() -> str:
    """A new, random id for a key."""
    return "key_" + "".join(secrets.choice(_ALPHABET) for _ in range(_ID_DIGITS))


def base62(number: int, digits: int) -> str:
    """The last so many digits of a number, with leading zeros."""
    out = []
    for _ in range(digits):
        number, digit = divmod(number, 62)
        out.append(_ALPHABET[digit])
    return "".join(reversed(out))


def _checksum(body: str) -> str:
    return base62(zlib.crc32(body.encode("ascii")), CHECKSUM_DIGITS)
