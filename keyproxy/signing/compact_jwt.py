"""The compact form of a JWT, RFC 7515 section 7.1: three parts of canonical base64url, two of them JSON objects."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, NoReturn

#: The maximum of a time: every integer up to here has a value of its own as a float.
_TIME_MAX: Final = 2**53

_BASE64URL: Final = re.compile(rb"[A-Za-z0-9_-]+")


class JwtFault(ValueError):
    """A JWT is malformed or invalid. The text is the reason, and quotes nothing of it."""


class CompactJwt(NamedTuple):
    """A JWT of the right form. Nothing about it is verified.

    `kid`: the name of its key, None without one. `message`: what the signature is for.
    """

    algorithm: str
    kid: str | None
    type: str
    message: bytes
    signature: bytes
    payload: bytes

    @classmethod
    def parse(cls, token: bytes, bytes_max: int) -> CompactJwt:
        """Split a JWT. Raises JwtFault, also for one with `crit`: there is no extension that must be understood."""
        if len(token) > bytes_max:
            raise JwtFault("too long")
        parts = token.split(b".")
        if len(parts) != 3:
            raise JwtFault("not three parts")
        header = members(decoded(parts[0]))
        algorithm, kid, typ = header.get("alg"), header.get("kid"), header.get("typ", "")
        if not isinstance(algorithm, str) or not isinstance(kid, str | None) or not isinstance(typ, str):
            raise JwtFault("a member of the header has the wrong type")
        if "crit" in header:
            raise JwtFault("the header has `crit`")
        message = parts[0] + b"." + parts[1]
        return cls(algorithm, kid, typ, message, decoded(parts[2]), decoded(parts[1]))

    def claims(self) -> dict[str, Any]:
        """The payload, verified or not. Raises JwtFault if it is no JSON object with distinct members."""
        return members(self.payload)


def members(text: bytes) -> dict[str, Any]:
    """The members of a JSON object. Raises JwtFault, also for a duplicate member, which readers resolve differently."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise JwtFault("a part is not JSON with distinct members") from None
    if not isinstance(content, dict):
        raise JwtFault("a part is not a JSON object")
    return content


def decoded(part: bytes) -> bytes:
    """Canonical base64url: one text for the same bytes, without padding, spaces or stray bits. Raises JwtFault."""
    if _BASE64URL.fullmatch(part) is None or len(part) % 4 == 1:
        raise JwtFault("a part is not base64url")
    content = base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))
    if base64.urlsafe_b64encode(content).rstrip(b"=") != part:
        raise JwtFault("a part is not canonical base64url")
    return content


def time_claim(value: object) -> float:
    """A NumericDate, RFC 7519 section 2. Raises JwtFault."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _TIME_MAX:
        raise JwtFault("a time is missing or invalid")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate member")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
