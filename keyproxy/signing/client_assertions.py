"""Assertions with which OAuth clients authenticate themselves, `private_key_jwt`: RFC 7523 section 3."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from keyproxy.signing.compact_jwt import CompactJwt, JwtFault, time_claim
from keyproxy.signing.key_sets import KeySet

#: The value of `client_assertion_type`.
ASSERTION_TYPE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

LIFE_SECONDS_MAX: Final = 300
#: How far the clock of the client may be ahead of this one's.
SKEW_SECONDS: Final = 60

_BYTES_MAX: Final = 8_192
_ID_CHARACTERS_MAX: Final = 512

#: The explicit types of such JWTs; another one is of another kind, RFC 8725 section 3.11.
_TYPES: Final = ("", "jwt", "client-authentication+jwt")


@dataclass(frozen=True, slots=True)
class ClientAssertion:
    """A JWT of the right form. Nothing about it is verified, not even which client it names."""

    client_id: str
    jwt: CompactJwt = field(repr=False)


@dataclass(frozen=True, slots=True)
class VerifiedAssertion:
    """A verified assertion. `jti` may be used once until it expires."""

    jti: str = field(repr=False)
    expires_wall_seconds: float


def parse(text: str) -> ClientAssertion:
    """Split an assertion and read which client it names. Raises JwtFault."""
    try:
        jwt = CompactJwt.parse(text.encode("ascii"), _BYTES_MAX)
    except UnicodeEncodeError:
        raise JwtFault("not ASCII") from None
    client_id = jwt.claims().get("sub")
    if not isinstance(client_id, str) or not client_id:
        raise JwtFault("`sub` is missing")
    return ClientAssertion(client_id, jwt)


def verify(assertion: ClientAssertion, keys: KeySet, audience: str, now_wall: float) -> VerifiedAssertion:
    """Verify an assertion with the keys of the client that it names. `audience`: the issuer of this server.

    Raises JwtFault, and UnknownKey if no key fits.
    """
    jwt = assertion.jwt
    if jwt.type.lower() not in _TYPES:
        raise JwtFault("its type is not that of a client assertion")
    keys.verify(jwt)
    claims = jwt.claims()
    if claims.get("iss") != assertion.client_id or claims.get("sub") != assertion.client_id:
        raise JwtFault("`iss` and `sub` are not both the client id")
    # A list with another audience would let that one replay the assertion here.
    if claims.get("aud") not in (audience, [audience]):
        raise JwtFault("`aud` is not exactly the issuer of this server")
    expires = time_claim(claims.get("exp"))
    issued = time_claim(claims.get("iat", now_wall))
    if now_wall >= expires:
        raise JwtFault("expired")
    if max(issued, time_claim(claims.get("nbf", 0))) > now_wall + SKEW_SECONDS:
        raise JwtFault("issued in the future")
    # From now, or by the client's clock if that one is ahead.
    if expires - max(issued, now_wall) > LIFE_SECONDS_MAX:
        raise JwtFault(f"valid for more than {LIFE_SECONDS_MAX} seconds")
    jti = claims.get("jti")
    if not isinstance(jti, str) or not 0 < len(jti) <= _ID_CHARACTERS_MAX:
        raise JwtFault("`jti` is missing or too long")
    return VerifiedAssertion(jti, expires)
