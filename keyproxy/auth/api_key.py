"""The format of a key: make, parse, check, digest. And the type that holds one without ever printing it.

    <prefix>_<live|test>_<43 base62 digits of 256 random bits><6 base62 digits of a CRC-32>

The checksum covers everything before it, so that a mistyped or truncated key can be distinguished from an unknown one
without a lookup, and secret scanners report only real keys. It is not a secret and not a protection. Only the digest of
a key is ever stored or compared: unsalted SHA-256 suffices for 256 random bits, which cannot be guessed from their hash.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator
from typing import Final

from keyproxy.auth import agent_token_format
from keyproxy.auth.base62 import base62
from keyproxy.model import KeyDigest
from keyproxy.mypyc_compat import mypyc_attr

RANDOM_DIGITS: Final = 43
CHECKSUM_DIGITS: Final = 6
ENTROPY_BYTES: Final = 32

#: The maximum length of a key that is looked up. Our own keys have 57 characters with the default prefix; agent tokens
#: have their own limit.
KEY_BYTES_MAX: Final = 512

#: The characters of a foreign key: those that RFC 9110 allows in a token68 or a token, and no separators.
_FOREIGN = re.compile(rb"[A-Za-z0-9!#$%%&'*+\-./:=?@^_`|~]{8,%d}" % KEY_BYTES_MAX)

_HINT_TAIL: Final = 4

#: For a shorter foreign key, a hint of eight characters would reveal too much.
_HINT_SHOWS_TAIL_FROM: Final = 32

#: A truncated key must still be masked; `/docs/kp_live_keys` is not a key.
_RECOGNISABLE_DIGITS: Final = 16


#: The kinds of our secrets, which stand where a key has its mode. Of those for OAuth, the proxy accepts access tokens.
_ADMIN: Final = b"admin"
_ACCESS: Final = b"access"
_REFRESH: Final = b"refresh"
_CLIENT: Final = b"client"
_OF_OAUTH_STARTS: Final = frozenset([kind[0] for kind in (_ACCESS, _REFRESH, _CLIENT)])
_KINDS: Final = "live|test|admin|access|refresh|client"

#: All pairs of base62 digits, by value.
_PAIRS_COUNT: Final = 62 * 62
_PAIRS: Final = [base62(number, 2) for number in range(_PAIRS_COUNT)]

#: A secret of OAuth under any prefix.
_OF_OAUTH = re.compile(
    rb"[0-9a-z]+_(?:%b|%b|%b)_[0-9A-Za-z]{%d}" % (_ACCESS, _REFRESH, _CLIENT, RANDOM_DIGITS + CHECKSUM_DIGITS)
)

#: What an access token contains and few keys do.
_ACCESS_MARK: Final = b"_access_"

_LIKE_A_KEY = re.compile(rf"([0-9a-z]+_(?:{_KINDS})_)[0-9a-z]{{{_RECOGNISABLE_DIGITS},}}", re.IGNORECASE)

#: Hashes begin as copies of this one: OpenSSL 3 looks its algorithm up for each that is made, which takes longer than
#: to hash a key.
_UNUSED: Final = hashlib.sha256()


def digest_of(plaintext: bytes) -> KeyDigest:
    """SHA-256 of a whole key, 32 bytes."""
    hashing = _UNUSED.copy()
    hashing.update(plaintext)
    return KeyDigest(hashing.digest())


@mypyc_attr(acyclic=True)
class SecretKey:
    """A whole key in plaintext. No `repr`, `str`, format string, pickle or comparison shows or leaks it."""

    __slots__ = ("_plaintext",)

    def __init__(self, plaintext: bytes) -> None:
        self._plaintext = plaintext

    def reveal(self) -> bytes:
        """The plaintext. Called where a key is handed to its owner, and nowhere else."""
        return self._plaintext

    def digest(self) -> KeyDigest:
        """SHA-256 of the whole key, 32 bytes."""
        return digest_of(self._plaintext)

    def __repr__(self) -> str:
        return "SecretKey(<not shown>)"

    def __format__(self, _spec: str) -> str:
        return repr(self)

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a SecretKey cannot be serialised")

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, _other: object) -> bool:
        raise TypeError("compare digests, not keys")


class KeyFormat:
    """The format under one configured prefix."""

    def __init__(
        self, prefix: str = "kp", *, accepts_foreign: bool = True, accepts_access_tokens: bool = False
    ) -> None:
        #: Whether OAuth access tokens are credentials of requests.
        self.accepts_access_tokens = accepts_access_tokens
        self._prefix = prefix.encode("ascii")
        self._accepts_foreign = accepts_foreign
        self._access_start = b"%b_%b_" % (self._prefix, _ACCESS)
        self._oauth_starts = (self._access_start, *[b"%b_%b_" % (self._prefix, kind) for kind in (_REFRESH, _CLIENT)])
        self._ours = re.compile(
            rb"%b_(?:live|test)_[0-9A-Za-z]{%d}" % (re.escape(self._prefix), RANDOM_DIGITS + CHECKSUM_DIGITS)
        )
        start = rb"%b_(?:%b)_" % (re.escape(self._prefix), _KINDS.encode("ascii"))
        self._start = re.compile(start, re.IGNORECASE)
        #: No shorter text contains one of our keys or tokens.
        self._recognisable_bytes = min(
            len(self._prefix) + len("_live_") + _RECOGNISABLE_DIGITS, agent_token_format.START_BYTES
        )
        self._recognisable = re.compile(rb"%b[0-9A-Z]{%d}" % (start, _RECOGNISABLE_DIGITS), re.IGNORECASE)

    def make(self, entropy: bytes, *, is_test: bool) -> SecretKey:
        """Make a key from 32 random bytes."""
        return self._made(b"test" if is_test else b"live", entropy)

    def make_admin_token(self, entropy: bytes) -> SecretKey:
        """Make a token for the admin API from 32 random bytes: in the format of a key, but not valid as one."""
        return self._made(_ADMIN, entropy)

    def make_access_token(self, entropy: bytes) -> SecretKey:
        """Make an OAuth access token from 32 random bytes."""
        return self._made(_ACCESS, entropy)

    def make_refresh_token(self, entropy: bytes) -> SecretKey:
        """Make an OAuth refresh token from 32 random bytes."""
        return self._made(_REFRESH, entropy)

    def make_client_secret(self, entropy: bytes) -> SecretKey:
        """Make the secret of an OAuth client from 32 random bytes."""
        return self._made(_CLIENT, entropy)

    def may_be_admin_token(self, plaintext: bytes) -> bool:
        """Whether to look this up as an admin token: well-formed, with a correct checksum."""
        return self._is_whole(_ADMIN, plaintext)

    def is_of_oauth(self, plaintext: bytes) -> bool:
        """Whether this begins as an access token, a refresh token or a client secret does, which are no keys."""
        # One byte distinguishes nearly every key from these, which costs less than to compare three starts.
        at = len(self._prefix) + 1
        return len(plaintext) > at and plaintext[at] in _OF_OAUTH_STARTS and plaintext.startswith(self._oauth_starts)

    def may_contain_access_token(self, text: bytes) -> bool:
        """Whether the start of an access token is anywhere in these bytes."""
        return text.find(self._access_start) >= 0

    def begins_as_access_token(self, plaintext: bytes) -> bool:
        """Whether this begins as an access token does. It may be malformed."""
        return plaintext.startswith(self._access_start)

    def may_be_access_token(self, plaintext: bytes) -> bool:
        """Whether to look this up as an OAuth access token."""
        return self._is_whole(_ACCESS, plaintext)

    def may_be_refresh_token(self, plaintext: bytes) -> bool:
        """Whether to look this up as an OAuth refresh token."""
        return self._is_whole(_REFRESH, plaintext)

    def may_exist(self, plaintext: bytes) -> bool:
        """Whether to look this up as a key: well-formed with a correct checksum, or a foreign key where allowed.

        A JSON Web Token is an agent token of ours or nothing; its signature is verified before any lookup. A secret of
        OAuth that was issued under another prefix is nothing, as one under this prefix is no key.
        """
        if self._ours.fullmatch(plaintext) is not None:
            return _is_whole(plaintext)
        if self._start.match(plaintext):
            return False
        if not self._accepts_foreign or _FOREIGN.fullmatch(plaintext) is None:
            return False
        if _OF_OAUTH.fullmatch(plaintext) is not None and _is_whole(plaintext):
            return False
        return not agent_token_format.is_jwt(plaintext)

    @staticmethod
    def has_right_checksum(plaintext: bytes) -> bool:
        """Whether the checksum at the end of a key, under any prefix, matches the rest of the key."""
        return _is_whole(plaintext)

    def starts(self, text: bytes) -> Iterator[re.Match[bytes]]:
        """Every place in a text where a key under this prefix begins."""
        return self._start.finditer(text)

    def _is_whole(self, kind: bytes, plaintext: bytes) -> bool:
        start = b"%b_%b_" % (self._prefix, kind)
        digits = plaintext[len(start) :]
        has_form = plaintext.startswith(start) and len(digits) == RANDOM_DIGITS + CHECKSUM_DIGITS
        return has_form and digits.isalnum() and _is_whole(plaintext)

    def _made(self, kind: bytes, entropy: bytes) -> SecretKey:
        if len(entropy) != ENTROPY_BYTES:
            raise ValueError(f"a key requires {ENTROPY_BYTES} random bytes, not {len(entropy)}")
        body = b"%b_%b_%b" % (self._prefix, kind, base62(int.from_bytes(entropy, "big"), RANDOM_DIGITS))
        return SecretKey(body + _checksum(body))

    def is_within(self, text: bytes) -> bool:
        """Whether these bytes contain one of our keys or agent tokens, or enough of one to require masking, in upper or
        lower case."""
        if len(text) < self._recognisable_bytes:
            return False
        return self._recognisable.search(text) is not None or agent_token_format.is_within(text)

    def hint(self, key: SecretKey) -> str:
        """The part of a key that may be displayed to identify it: its start and its last four characters."""
        plaintext = key.reveal()
        start = self._start.match(plaintext)
        if start is None and len(plaintext) < _HINT_SHOWS_TAIL_FROM:
            return f"{plaintext[:2].decode('ascii')}…"
        shown = plaintext[: start.end() + _HINT_TAIL] if start else plaintext[:_HINT_TAIL]
        return f"{shown.decode('ascii')}…{plaintext[-_HINT_TAIL:].decode('ascii')}"

    def hint_start(self, part: str) -> str:
        """The start of a key's hint, given the first part of the key; empty if that is too short or not a key's."""
        start = self._start.match(part.encode("utf-8"))
        shown = 0 if start is None else start.end() + _HINT_TAIL
        return part[:shown] if len(part) >= shown else ""


def is_access_token(plaintext: bytes) -> bool:
    """Whether this is a whole OAuth access token, under any prefix. No key is."""
    return (
        plaintext.find(_ACCESS_MARK) >= 0
        and plaintext.endswith(_ACCESS_MARK, 0, -RANDOM_DIGITS - CHECKSUM_DIGITS)
        and _OF_OAUTH.fullmatch(plaintext) is not None
        and _is_whole(plaintext)
    )


def masked(text: str) -> str:
    """The text, with everything that looks like a key under any prefix, or an agent token, truncated to its start."""
    return agent_token_format.masked(_LIKE_A_KEY.sub(r"\1…", text))


def _is_whole(key: bytes) -> bool:
    return _checksum(key[:-CHECKSUM_DIGITS]) == key[-CHECKSUM_DIGITS:]


def _checksum(body: bytes) -> bytes:
    """The CRC-32 in six digits. By pairs, since every key that is not cached is checked."""
    number = zlib.crc32(body)
    rest = number // _PAIRS_COUNT
    return _PAIRS[rest // _PAIRS_COUNT] + _PAIRS[rest % _PAIRS_COUNT] + _PAIRS[number % _PAIRS_COUNT]
