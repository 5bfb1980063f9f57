"""The form of agent tokens, which are JSON Web Tokens (RFC 7519), and their recognition in text.

A token is three base64url parts: header, claims, signature. The headers of this program begin with the same bytes, so a
token is recognised in any text without decoding it. A token of another issuer whose header begins with the same members
in the same order is taken for one of ours. Only the signature distinguishes a token from all others.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Final

from keyproxy.auth.base62 import base62

#: The maximum length of a credential that is a JSON Web Token.
TOKEN_BYTES_MAX: Final = 4096

ID_ENTROPY_BYTES: Final = 16
_ID_DIGITS: Final = 22

#: The signature may be empty, as that of `{"alg":"none"}` is.
_PARTS = re.compile(rb"([A-Za-z0-9_-]++)\.[A-Za-z0-9_-]*+\.[A-Za-z0-9_-]*+")

#: `{"` in base64url, without the bits that depend on the next character.
_OBJECT_START: Final = b"ey"

#: `{"typ":"at+jwt","alg":"ES256","kid":` in base64url: the bytes that do not depend on the signing key.
_TOKEN_START: Final = "eyJ0eXAiOiJhdCtqd3QiLCJhbGciOiJFUzI1NiIsImtpZCI6"  # noqa: S105 - no secret

#: The same for `keyproxy-assertion+jwt`. An assertion is no credential here, but it proves an identity to an upstream.
_ASSERTION_START: Final = "eyJ0eXAiOiJrZXlwcm94eS1hc3NlcnRpb24rand0IiwiYWxnIjoiRVMyNTYiLCJraWQi"

#: No shorter text contains a token or an assertion.
START_BYTES: Final = len(_TOKEN_START)

_STARTS: Final = f"(?:{_TOKEN_START}|{_ASSERTION_START})"
_RECOGNISABLE = re.compile(_STARTS.encode("ascii"), re.IGNORECASE)
_LIKE_A_TOKEN = re.compile(rf"({_STARTS})[A-Za-z0-9_.-]*", re.IGNORECASE)

_TOKEN_BEGINS = re.compile(_TOKEN_START.encode("ascii"))

#: After the start: the rest of a header with a `kid` of 32 bytes, the claims, a signature of 64 bytes.
_REST = re.compile(rb"[A-Za-z0-9_-]{62}\.([A-Za-z0-9_-]++)\.[A-Za-z0-9_-]{86}")
_WORD = re.compile(rb"[A-Za-z0-9_.-]*+")


def is_jwt(plaintext: bytes) -> bool:
    """Whether these bytes have the form of a JSON Web Token of at most TOKEN_BYTES_MAX bytes: three base64url parts, the
    first a JSON object with a member `alg`."""
    if len(plaintext) > TOKEN_BYTES_MAX:
        return False
    match = _PARTS.fullmatch(plaintext)
    return match is not None and _is_object(match[1], "alg")


def make_token_id(entropy: bytes) -> str:
    """The id of an agent token, from 16 random bytes."""
    if len(entropy) != ID_ENTROPY_BYTES:
        raise ValueError(f"a token id requires {ID_ENTROPY_BYTES} random bytes, not {len(entropy)}")
    return f"agt_{base62(int.from_bytes(entropy, 'big'), _ID_DIGITS).decode('ascii')}"


def signature_of(plaintext: bytes) -> bytes:
    """The signature of a JSON Web Token; empty if these bytes have another form."""
    # For every presented key: an expression takes ten times as long.
    if plaintext[: len(_OBJECT_START)] != _OBJECT_START or plaintext.count(b".") != 2:
        return b""
    return plaintext.rpartition(b".")[2]


def is_within(text: bytes) -> bool:
    """Whether these bytes contain the start of one of our tokens or assertions, in upper or lower case."""
    return len(text) >= START_BYTES and _RECOGNISABLE.search(text) is not None


def masked(text: str) -> str:
    """The text, with every token and assertion of ours truncated to the start that all have."""
    return _LIKE_A_TOKEN.sub(r"\1…", text)


def whole_tokens(text: bytes) -> Iterator[bytes]:
    """Every agent token of ours in a text. Characters after a whole token are not part of it."""
    for start in _TOKEN_BEGINS.finditer(text):
        end = _end_of_whole(text, start.end())
        if end:
            yield text[start.start() : end]


def truncated_tokens(text: bytes) -> Iterator[bytes]:
    """Every word of a text that begins as an agent token of ours does, without being one or beginning with one."""
    at = 0
    while start := _TOKEN_BEGINS.search(text, at):
        word = _WORD.match(text, start.end())
        # The next one begins in another word: this one may repeat the start thousands of times.
        at = start.end() if word is None else word.end()
        if not _end_of_whole(text, start.end()):
            yield text[start.start() : at]


def _end_of_whole(text: bytes, at: int) -> int:
    """The end of a whole token, the start of which ends at `at`; 0 if it is truncated."""
    rest = _REST.match(text, at)
    return rest.end() if rest is not None and _is_object(rest[1], "jti") else 0


def _is_object(part: bytes, member: str) -> bool:
    """Whether a base64url part is a JSON object with this member."""
    try:
        content = json.loads(base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4)).decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and member in content
