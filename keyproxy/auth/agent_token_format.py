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
_PARTS = re.compile(rb"([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]*\.([A-Za-z0-9_-]*)")

#: `{"typ":"at+jwt","alg":"ES256","kid":` in base64url: the bytes that do not depend on the signing key.
_TOKEN_START: Final = "eyJ0eXAiOiJhdCtqd3QiLCJhbGciOiJFUzI1NiIsImtpZCI6"  # noqa: S105 - no secret

#: The same for `keyproxy-assertion+jwt`. An assertion is no credential here, but it proves an identity to an upstream.
_ASSERTION_START: Final = "eyJ0eXAiOiJrZXlwcm94eS1hc3NlcnRpb24rand0IiwiYWxnIjoiRVMyNTYiLCJraWQi"

_STARTS: Final = f"(?:{_TOKEN_START}|{_ASSERTION_START})"
_RECOGNISABLE = re.compile(_STARTS.encode("ascii"), re.IGNORECASE)
_LIKE_A_TOKEN = re.compile(rf"({_STARTS})[A-Za-z0-9_.-]*", re.IGNORECASE)

#: The rest of the header after its start, with a `kid` of 32 bytes; the claims; a signature of 64 bytes.
_WHOLE = re.compile(rb"%b[A-Za-z0-9_-]{62}\.[A-Za-z0-9_-]++\.[A-Za-z0-9_-]{86}" % _TOKEN_START.encode("ascii"))
_TRUNCATED = re.compile(rb"%b[A-Za-z0-9_.-]*+" % _TOKEN_START.encode("ascii"))


def is_jwt(plaintext: bytes) -> bool:
    """Whether these bytes have the form of a JSON Web Token of at most TOKEN_BYTES_MAX bytes: three base64url parts, the
    first a JSON object with a member `alg`."""
    if len(plaintext) > TOKEN_BYTES_MAX:
        return False
    match = _PARTS.fullmatch(plaintext)
    if match is None:
        return False
    header = match[1]
    try:
        content = json.loads(base64.urlsafe_b64decode(header + b"=" * (-len(header) % 4)).decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "alg" in content


def make_token_id(entropy: bytes) -> str:
    """The id of an agent token, from 16 random bytes."""
    if len(entropy) != ID_ENTROPY_BYTES:
        raise ValueError(f"a token id requires {ID_ENTROPY_BYTES} random bytes, not {len(entropy)}")
    return f"agt_{base62(int.from_bytes(entropy, 'big'), _ID_DIGITS).decode('ascii')}"


def signature_of(plaintext: bytes) -> bytes:
    """The last of three base64url parts; empty if these bytes have another form."""
    match = _PARTS.fullmatch(plaintext)
    return b"" if match is None else match[2]


def is_within(text: bytes) -> bool:
    """Whether these bytes contain the start of one of our tokens or assertions, in upper or lower case."""
    return _RECOGNISABLE.search(text) is not None


def masked(text: str) -> str:
    """The text, with every token and assertion of ours truncated to the start that all have."""
    return _LIKE_A_TOKEN.sub(r"\1…", text)


def whole_tokens(text: bytes) -> Iterator[bytes]:
    """Every agent token of ours in a text. Characters after a whole token are not part of it."""
    for match in _WHOLE.finditer(text):
        yield match[0]


def truncated_tokens(text: bytes) -> Iterator[bytes]:
    """Every word of a text that begins as an agent token of ours does and is not a whole one."""
    for match in _TRUNCATED.finditer(text):
        if _WHOLE.match(match[0]) is None:
            yield match[0]
