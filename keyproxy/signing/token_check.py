"""The check of an agent token that needs no query: exact header, signature, issuer, audience and times.

Only the bytes that `SigningKey.sign` writes are accepted, so there is one header text per key and no choice of algorithm:
a token with another `alg` or `typ`, with `jku`, `jwk`, `x5u` or `crit`, or in another encoding is refused before its
signature is verified.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.claims import AGENT_TOKEN_TYPE
from keyproxy.signing.compact_jwt import JwtFault, decoded, members, time_claim
from keyproxy.signing.signing_key import VerifyingKey

#: How far the clock of the machine that signed may be ahead of this one's.
SKEW_SECONDS: Final = 60

_BYTES_MAX: Final = 4_096
_SIGNATURE_BYTES: Final = 64

_HEADER: Final = re.compile(
    rb'\{"typ":"%b","alg":"ES256","kid":"([A-Za-z0-9_-]{43})"\}' % re.escape(AGENT_TOKEN_TYPE.encode("ascii"))
)


class AcceptedTokens(NamedTuple):
    """The issuer and the audience of the agent tokens that a proxy accepts."""

    issuer: str
    audience: str


#: No tokens: for a process that publishes keys, or serves them, and accepts no tokens.
ACCEPTS_NONE: Final = AcceptedTokens("", "")


class SignedToken(NamedTuple):
    """An agent token of the right form; nothing about it is verified."""

    kid: str
    message: bytes
    signature: bytes
    payload: bytes

    @classmethod
    def parse(cls, token: bytes) -> SignedToken:
        """Split a token. Raises a Refusal for any other form than that of our tokens."""
        if len(token) > _BYTES_MAX:
            raise _invalid("too long")
        parts = token.split(b".")
        if len(parts) != 3:
            raise _invalid("not three parts")
        header = _HEADER.fullmatch(_decoded(parts[0]))
        if header is None:
            raise _invalid("not the header of an agent token")
        signature = _decoded(parts[2])
        if len(signature) != _SIGNATURE_BYTES:
            raise _invalid("a signature of the wrong length")
        return cls(header[1].decode("ascii"), parts[0] + b"." + parts[1], signature, _decoded(parts[1]))

    def check(self, key: VerifyingKey, rules: AcceptedTokens, now_wall: float) -> None:
        """Raises a Refusal if the signature or a claim is invalid, or a genuine token has expired."""
        if not key.verifies(self.message, self.signature):
            raise _invalid("invalid signature")
        try:
            claims = members(self.payload)
            issued, expires = time_claim(claims.get("iat")), time_claim(claims.get("exp"))
        except JwtFault as fault:
            raise _invalid(str(fault)) from None
        # `aud` is one string here: a list that contains the audience is not a token of ours.
        if claims.get("iss") != rules.issuer or claims.get("aud") != rules.audience:
            raise _invalid("wrong issuer or audience")
        if issued > now_wall + SKEW_SECONDS:
            raise _invalid("issued in the future")
        # Without skew, as the expiry of every key: the row would be refused for the same reason.
        if now_wall >= expires:
            raise Refusal(Reason.KEY_EXPIRED, "agent token: expired")
        if now_wall >= key.ends_wall_seconds:
            raise _invalid("signed with a key that has ended")


def _decoded(part: bytes) -> bytes:
    try:
        return decoded(part)
    except JwtFault as fault:
        raise _invalid(str(fault)) from None


def _invalid(why: str) -> Refusal:
    return Refusal(Reason.KEY_INVALID, f"agent token: {why}")
