"""The public keys of other parties as JSON Web Key Sets, RFC 7517, and the signatures that they verify.

The algorithm of a signature is pinned twice: it is one of ALGORITHMS, all of them asymmetric, and the key is of the type
that belongs to it. So neither `none` nor a public key as the secret of an HMAC verifies anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import Algorithm, ECAlgorithm, OKPAlgorithm, RSAAlgorithm, RSAPSSAlgorithm
from jwt.exceptions import InvalidKeyError

from keyproxy.signing.compact_jwt import CompactJwt, JwtFault, members

_RSA_BITS: Final = range(2_048, 8_193)
_RSA_EXPONENT_BITS_MAX: Final = 32
_KEYS_MAX: Final = 100


class _Verifier(NamedTuple):
    """One algorithm. `key_members`: the public members of its keys; private ones are never read."""

    algorithm: Algorithm
    key_type: str
    curves: tuple[str, ...]
    key_members: tuple[str, ...]


_RSA_MEMBERS: Final = ("kty", "n", "e")
_EC_MEMBERS: Final = ("kty", "crv", "x", "y")

#: The algorithms of signatures by other parties, RFC 7518 section 3.1 and RFC 8037.
ALGORITHMS: Final[Mapping[str, _Verifier]] = {
    "RS256": _Verifier(RSAAlgorithm(RSAAlgorithm.SHA256), "RSA", (), _RSA_MEMBERS),
    "PS256": _Verifier(RSAPSSAlgorithm(RSAPSSAlgorithm.SHA256), "RSA", (), _RSA_MEMBERS),
    "ES256": _Verifier(ECAlgorithm(ECAlgorithm.SHA256, ec.SECP256R1), "EC", ("P-256",), _EC_MEMBERS),
    "EdDSA": _Verifier(OKPAlgorithm(), "OKP", ("Ed25519", "Ed448"), ("kty", "crv", "x")),
}


class UnknownKey(Exception):
    """A key set has no key that fits a signature. The party may have added one meanwhile."""


class _PublicKey(NamedTuple):
    kid: str | None
    algorithm: str
    content: Any


class KeySet:
    """The usable keys of a key set. Others are ignored, since a set may hold keys for other purposes."""

    __slots__ = ("_keys",)

    def __init__(self, jwks: Mapping[str, Any]) -> None:
        """Raises JwtFault without a list of keys, and for more than 100."""
        rows = jwks.get("keys")
        if not isinstance(rows, list):
            raise JwtFault("the key set has no list of keys")
        if len(rows) > _KEYS_MAX:
            raise JwtFault(f"the key set has more than {_KEYS_MAX} keys")
        self._keys: Final = tuple(key for row in rows for key in _keys_of(row))

    @classmethod
    def parse(cls, text: bytes) -> KeySet:
        """The keys of a JSON Web Key Set. Raises JwtFault."""
        return cls(members(text))

    def verify(self, jwt: CompactJwt) -> None:
        """Raises UnknownKey if no key fits, JwtFault if the algorithm is not allowed or the signature is invalid.

        A JWT without a key id is verified only if exactly one key fits its algorithm.
        """
        verifier = ALGORITHMS.get(jwt.algorithm)
        if verifier is None:
            raise JwtFault("the algorithm is not allowed")
        fitting = [key for key in self._keys if key.algorithm == jwt.algorithm and jwt.kid in (None, key.kid)]
        if not fitting:
            raise UnknownKey
        if jwt.kid is None and len(fitting) > 1:
            raise JwtFault("the header names no key, and several fit")
        if not any(_verifies(verifier.algorithm, key.content, jwt) for key in fitting):
            raise JwtFault("invalid signature")

    def __len__(self) -> int:
        """How many keys are usable; a key for two algorithms counts for both."""
        return len(self._keys)

    def __repr__(self) -> str:
        return f"KeySet({', '.join(f'{key.kid} {key.algorithm}' for key in self._keys)})"


def _verifies(algorithm: Algorithm, key: Any, jwt: CompactJwt) -> bool:
    try:
        return algorithm.verify(jwt.message, key, jwt.signature)
    except ValueError:
        return False  # a signature of an impossible length


def _keys_of(row: object) -> list[_PublicKey]:
    """The key of a row once for each algorithm that it may be used with; none if it is not for signatures."""
    if not isinstance(row, dict) or row.get("use", "sig") != "sig":
        return []
    operations = row.get("key_ops", ["verify"])
    kid = row.get("kid")
    if not isinstance(operations, list) or "verify" not in operations or not isinstance(kid, str | None):
        return []
    found = []
    for name, verifier in ALGORITHMS.items():
        fits = row.get("kty") == verifier.key_type and row.get("alg", name) == name
        if fits and (not verifier.curves or row.get("crv") in verifier.curves):
            key = _public_key(verifier, row)
            if key is not None:
                found.append(_PublicKey(kid, name, key))
    return found


def _public_key(verifier: _Verifier, row: Mapping[str, Any]) -> Any:
    """The key of a row, None if it is invalid or too weak. Only its public members are read."""
    if not all(isinstance(row.get(name), str) for name in verifier.key_members):
        return None
    try:
        key = verifier.algorithm.from_jwk({name: row[name] for name in verifier.key_members})
    except (InvalidKeyError, ValueError, TypeError, UnsupportedAlgorithm):
        return None
    if isinstance(key, RSAPublicKey):
        numbers = key.public_numbers()
        # A large exponent makes each verification expensive.
        if key.key_size not in _RSA_BITS or numbers.e.bit_length() > _RSA_EXPONENT_BITS_MAX:
            return None
    return key
