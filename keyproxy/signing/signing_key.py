"""The keys that sign agent tokens and identity assertions: P-256, for ES256 alone.

The private half of a key exists in memory only, and in the pipe from the supervisor to its workers. Neither `repr` nor
pickling reveals it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Final, NoReturn, Self

from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from jwt.exceptions import InvalidKeyError

#: How long after its creation a key may be used at most.
LIFE_SECONDS: Final = 25 * 3600.0

ES256: Final = ECAlgorithm(ECAlgorithm.SHA256, ec.SECP256R1)

_BITS: Final = 256


class SigningKey:
    """A private key. `kid` is the RFC 7638 thumbprint of its public half.

    Nothing that it signs may be valid after `ends_wall_seconds`: verifiers then have no public half any more.
    `signed_until_wall_seconds`: the latest `exp` of all that it has signed in this process; 0.0: it has signed nothing.
    """

    __slots__ = (
        "_headers",
        "_private",
        "created_wall_seconds",
        "ends_wall_seconds",
        "kid",
        "signed_until_wall_seconds",
    )

    def __init__(self, private: ec.EllipticCurvePrivateKey, *, created_wall: float, ends_wall: float) -> None:
        self.created_wall_seconds: Final = created_wall
        self.ends_wall_seconds: Final = ends_wall
        self.signed_until_wall_seconds = 0.0
        self._private = private
        self.kid: Final = thumbprint(private.public_key())
        #: The encoded header for each `typ`.
        self._headers: dict[str, bytes] = {}

    @classmethod
    def make(cls, now_wall: float) -> Self:
        """Create a key."""
        private = ec.generate_private_key(ec.SECP256R1())
        return cls(private, created_wall=now_wall, ends_wall=now_wall + LIFE_SECONDS)

    @classmethod
    def from_private(cls, text: str) -> Self:
        """The key that `private_text` returned the text of. Raises ValueError, which does not quote the text."""
        try:
            content = json.loads(text)
            scalar = int.from_bytes(base64.urlsafe_b64decode(content["d"]), "big")
            private = ec.derive_private_key(scalar, ec.SECP256R1())
            created, ends = float(content["created"]), float(content["ends"])
        except (ValueError, KeyError, TypeError):
            raise ValueError("not a signing key") from None
        return cls(private, created_wall=created, ends_wall=ends)

    def private_text(self) -> str:
        """The key with its private half, for the processes that sign with it. Never write it anywhere."""
        scalar = self._private.private_numbers().private_value.to_bytes(_BITS // 8, "big")
        content = {
            "d": base64.urlsafe_b64encode(scalar).decode("ascii"),
            "created": self.created_wall_seconds,
            "ends": self.ends_wall_seconds,
        }
        return json.dumps(content)

    def public_jwk(self) -> dict[str, str]:
        """The public half as a JSON Web Key."""
        return public_jwk(self._private.public_key())

    def sign(self, typ: str, claims: Mapping[str, object]) -> bytes:
        """A JWT in compact form. `typ` is its explicit type, RFC 8725 section 3.11; the claims include `exp`."""
        expires = claims["exp"]
        if not isinstance(expires, int):
            raise TypeError("`exp` is not an integer")
        self.signed_until_wall_seconds = max(self.signed_until_wall_seconds, expires)
        header = self._headers.get(typ)
        if header is None:
            header = self._headers[typ] = encoded(json_text({"typ": typ, "alg": "ES256", "kid": self.kid}))
        message = header + b"." + encoded(json_text(claims))
        return message + b"." + encoded(ES256.sign(message, self._private))

    def __repr__(self) -> str:
        return f"SigningKey(kid={self.kid!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signing key cannot be pickled or copied")


class VerifyingKey:
    """The public half of a key, as read from the store; until `ends_wall_seconds` it verifies what the key signed."""

    __slots__ = ("_public", "ends_wall_seconds", "jwk", "kid")

    def __init__(self, jwk: Mapping[str, str], *, kid: str, ends_wall: float) -> None:
        """Raises ValueError if the JSON Web Key is no P-256 key."""
        try:
            public = ES256.from_jwk({name: jwk[name] for name in ("kty", "crv", "x", "y")})
        except (InvalidKeyError, ValueError, KeyError, TypeError):
            raise ValueError("not an elliptic-curve key") from None
        if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
            raise ValueError("not a P-256 key")  # noqa: TRY004 - a value of the right type
        self._public = public
        self.kid: Final = kid
        self.ends_wall_seconds = ends_wall
        self.jwk: Final = {**public_jwk(public), "kid": kid}

    def verifies(self, message: bytes, signature: bytes) -> bool:
        """Whether this is an ES256 signature of the message: 64 bytes, never the DER form.

        A second signature can be computed from a genuine one (s becomes n - s). ES256 allows both, and libraries create
        both. It does no harm: a token is known by the digest of all its bytes, so that its other form has no row.
        """
        return ES256.verify(message, self._public, signature)


def public_jwk(public: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """A public key as a JSON Web Key. `kid` is its thumbprint."""
    numbers = public.public_numbers()
    x, y = (encoded(number.to_bytes(_BITS // 8, "big")).decode("ascii") for number in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": thumbprint(public), "use": "sig", "alg": "ES256"}


def thumbprint(public: ec.EllipticCurvePublicKey) -> str:
    """The RFC 7638 thumbprint of a public key."""
    numbers = public.public_numbers()
    x, y = (encoded(number.to_bytes(_BITS // 8, "big")).decode("ascii") for number in (numbers.x, numbers.y))
    members = json_text({"crv": "P-256", "kty": "EC", "x": x, "y": y})
    return encoded(hashlib.sha256(members).digest()).decode("ascii")


def json_text(content: Mapping[str, object]) -> bytes:
    """JSON without spaces, in ASCII, the members in this order."""
    return json.dumps(content, separators=(",", ":")).encode("ascii")


def encoded(content: bytes) -> bytes:
    """Base64url without padding, RFC 7515 section 2."""
    return base64.urlsafe_b64encode(content).rstrip(b"=")
