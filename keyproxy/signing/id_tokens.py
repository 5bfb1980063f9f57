"""The check of an OpenID provider's id_token: signature, issuer, audience, times and nonce.

OpenID Connect Core section 3.1.3.7.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from keyproxy.signing.compact_jwt import CompactJwt, JwtFault, time_claim
from keyproxy.signing.key_sets import KeySet

#: How far the clocks of the provider and of this machine may differ.
SKEW_SECONDS: Final = 60

_BYTES_MAX: Final = 32_768

#: Another `typ` is the one of another kind of JWT, RFC 8725 section 3.11.
_TYPES: Final = ("", "jwt")


@dataclass(frozen=True, slots=True)
class ExpectedLogin:
    """The login that an id_token must be for."""

    issuer: str
    client_id: str
    nonce: str = field(repr=False)


def parse(token: str) -> CompactJwt:
    """Split an id_token. Raises JwtFault."""
    try:
        return CompactJwt.parse(token.encode("ascii"), _BYTES_MAX)
    except UnicodeEncodeError:
        raise JwtFault("not ASCII") from None


def verified_claims(token: CompactJwt, keys: KeySet, expected: ExpectedLogin, now_wall: float) -> Mapping[str, Any]:
    """The claims of an id_token that is for this login. Raises JwtFault, and UnknownKey if no key fits."""
    if token.type.lower() not in _TYPES:
        raise JwtFault("its type is not that of an id_token")
    keys.verify(token)
    claims = token.claims()
    if claims.get("iss") != expected.issuer:
        raise JwtFault("`iss` is not the configured issuer")
    _check_audience(claims, expected.client_id)
    if now_wall >= time_claim(claims.get("exp")) + SKEW_SECONDS:
        raise JwtFault("it has expired")
    if time_claim(claims.get("iat")) > now_wall + SKEW_SECONDS:
        raise JwtFault("it was issued in the future")
    if "nbf" in claims and time_claim(claims["nbf"]) > now_wall + SKEW_SECONDS:
        raise JwtFault("it is not valid yet")
    nonce = claims.get("nonce")
    # A nonce is compared as bytes: `compare_digest` takes no text beyond ASCII.
    if not isinstance(nonce, str) or not hmac.compare_digest(nonce.encode("utf-8", "replace"), expected.nonce.encode()):
        raise JwtFault("`nonce` is not that of this login")
    return claims


def _check_audience(claims: Mapping[str, Any], client_id: str) -> None:
    """With several audiences, `azp` must name the client: another of them could have obtained the token."""
    audience = claims.get("aud")
    audiences = [audience] if isinstance(audience, str) else audience
    if not isinstance(audiences, list) or client_id not in audiences:
        raise JwtFault("`aud` does not contain the client id")
    if "azp" in claims:
        if claims["azp"] != client_id:
            raise JwtFault("`azp` is not the client id")
    elif len(audiences) > 1:
        raise JwtFault("it has several audiences and no `azp`")
