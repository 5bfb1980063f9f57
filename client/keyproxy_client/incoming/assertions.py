"""Verifies the signed assertions of keyproxy: `X-Keyproxy-Assertion`, a JWT signed with ES256.

The algorithm and the type are fixed, and keys come from the configured JWKS alone, so that neither `none`, nor a public
key as the secret of an HMAC, nor a key that the header carries verifies anything.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from keyproxy_client import names
from keyproxy_client.incoming.key_set_fetch import KeySetFetcher
from keyproxy_client.incoming.key_sets import KeySets, KeysMissing, KeysUnavailable
from keyproxy_client.incoming.verified_identity import Identity
from keyproxy_client.missing_extra import missing_extra

__all__ = ["AssertionInvalid", "AssertionVerifier", "KeysMissing", "KeysUnavailable"]

_TYPE: Final = "keyproxy-assertion+jwt"
_ALGORITHM: Final = "ES256"
_HEADER_MEMBERS: Final = {"typ", "alg", "kid"}
_REQUIRED: Final = ("exp", "iat", "iss", "aud", "sub", "tenant")
LEEWAY_SECONDS: Final = 5

#: The signature has 64 bytes.
_COMPACT: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{86}")
_CHARACTERS_MAX: Final = 16_384
_KEY_ID_CHARACTERS_MAX: Final = 256
_KEYS_MAX: Final = 100
#: Of agents, one within the other.
_CHAIN_MAX: Final = 16
CACHED_MAX: Final = 1024


class AssertionInvalid(Exception):
    """An assertion proves nothing. The text is for the log, and shows nothing of the assertion."""


@dataclass(frozen=True, slots=True)
class _Verified:
    identity: Identity
    expires_wall_seconds: float


class AssertionVerifier:
    """Verifies assertions of one issuer for one audience. Safe in threads.

    Keeps up to 1,024 verified assertions until they expire. The oldest leave first: they expire first.
    """

    def __init__(self, jwks_url: str, *, issuer: str, audience: str, now_wall: Callable[[], float] = time.time) -> None:
        """Raises ImportError without PyJWT and cryptography, and ValueError for invalid values."""
        if not issuer or not audience:
            raise ValueError("issuer and audience must not be empty")
        try:
            import jwt
            from jwt.algorithms import ECAlgorithm

            ECAlgorithm(ECAlgorithm.SHA256)
        except ImportError as error:
            raise missing_extra("signed", error) from error
        except AttributeError as error:
            # PyJWT has the class without the library, but not its constants.
            raise missing_extra("signed", ImportError(name="cryptography")) from error
        self._jwt: Final = jwt
        self._issuer: Final = issuer
        self._audience: Final = audience
        self._now_wall: Final = now_wall
        self._lock: Final = threading.Lock()
        self._verified: dict[str, _Verified] = {}
        self.key_sets: Final = KeySets(KeySetFetcher(jwks_url), self._keys_of)

    def identity(self, assertion: str, *, may_fetch: bool) -> Identity:
        """The identity that an assertion proves.

        Raises AssertionInvalid; KeysUnavailable; and KeysMissing if `may_fetch` and the keys must be fetched first, which
        has then begun.
        """
        known = self._verified.get(assertion)
        if known is None or self._now_wall() >= known.expires_wall_seconds:
            known = self._verify(assertion, may_fetch=may_fetch)
            with self._lock:
                while len(self._verified) >= CACHED_MAX:
                    del self._verified[next(iter(self._verified))]
                self._verified[assertion] = known
        return known.identity

    def _verify(self, assertion: str, *, may_fetch: bool) -> _Verified:
        # A decoder of base64 may accept more, so that one assertion would have many spellings.
        if len(assertion) > _CHARACTERS_MAX or _COMPACT.fullmatch(assertion) is None:
            raise AssertionInvalid("too long, or no JWT of ES256")
        try:
            header = self._jwt.get_unverified_header(assertion)
        except (self._jwt.PyJWTError, ValueError, RecursionError) as error:
            raise AssertionInvalid("no JWT") from error
        kid = header.get("kid")
        if header.get("typ") != _TYPE or header.get("alg") != _ALGORITHM or set(header) != _HEADER_MEMBERS:
            raise AssertionInvalid("the header is not that of an assertion")
        if not isinstance(kid, str) or len(kid) > _KEY_ID_CHARACTERS_MAX:
            raise AssertionInvalid("the key id is malformed")
        key = self.key_sets.key(kid, may_fetch=may_fetch)
        if key is None:
            raise AssertionInvalid("keyproxy has no such key")
        try:
            claims = self._jwt.decode(
                assertion,
                key,
                algorithms=[_ALGORITHM],
                issuer=self._issuer,
                audience=self._audience,
                leeway=LEEWAY_SECONDS,
                options={"require": list(_REQUIRED)},
            )
            expires = claims["exp"]
            if not isinstance(expires, int | float):
                raise AssertionInvalid("the end is no number")
            expires_wall_seconds = float(expires) + LEEWAY_SECONDS
        except (self._jwt.PyJWTError, ValueError, RecursionError, OverflowError) as error:
            raise AssertionInvalid(type(error).__name__) from error
        # keyproxy signs for one audience. A list would let another one of it replay the assertion here.
        if claims["aud"] != self._audience:
            raise AssertionInvalid("the audience is not this application alone")
        return _Verified(identity_of(claims), expires_wall_seconds)

    def _keys_of(self, content: Any) -> dict[str, Any]:
        """The keys for ES256 of a JWKS, by id. Raises ValueError."""
        from jwt.algorithms import ECAlgorithm

        rows = content.get("keys") if isinstance(content, dict) else None
        if not isinstance(rows, list) or len(rows) > _KEYS_MAX:
            raise ValueError("no JWKS")
        found = {}
        for row in rows:
            if not isinstance(row, dict) or row.get("kty") != "EC" or row.get("crv") != "P-256":
                continue
            if row.get("alg", _ALGORITHM) != _ALGORITHM or row.get("use", "sig") != "sig":
                continue
            kid = row.get("kid")
            if not isinstance(kid, str):
                continue
            try:
                public = {name: row[name] for name in ("kty", "crv", "x", "y")}
                found[kid] = ECAlgorithm.from_jwk(public)
            except (self._jwt.InvalidKeyError, ValueError, KeyError, TypeError):
                continue
        return found

    def __repr__(self) -> str:
        return f"signed({self.key_sets!r}, {len(self._verified)} verified)"


def identity_of(claims: Mapping[str, Any]) -> Identity:
    """The identity that verified claims state. Raises AssertionInvalid."""
    user, tenant, key_id, scope = (claims.get(name) for name in ("sub", "tenant", "key_id", "scope"))
    is_test = claims.get("test")
    if not isinstance(is_test, bool) or not isinstance(scope, str):
        raise AssertionInvalid("a claim is missing")
    actor, agent = _actors(claims.get("act"))
    scopes = scope.split()
    if not isinstance(user, str) or not isinstance(tenant, str) or not isinstance(key_id, str):
        raise AssertionInvalid("a claim is missing")
    ids = [user, tenant, key_id] if actor is None else [user, tenant, key_id, actor]
    if not all(map(names.is_id, ids)) or not all(map(names.is_scope, scopes)):
        raise AssertionInvalid("a claim is outside keyproxy's patterns")
    return Identity(user, tenant, frozenset(scopes), is_test, key_id, actor, agent)


def _actors(act: object) -> tuple[str | None, str | None]:
    """The user whose key acts, and the current agent, by the claim `act`: the current actor is outermost."""
    actor = agent = None
    for _ in range(_CHAIN_MAX):
        if act is None:
            return actor, agent
        if not isinstance(act, dict) or not isinstance(act.get("sub"), str):
            break
        if act.get("type") == "agent" and names.is_agent(act["sub"]):
            agent = agent or act["sub"]
        elif act.get("type") == "user" and act.get("act") is None:
            actor = act["sub"]
        else:
            break
        act = act.get("act")
    raise AssertionInvalid("the claim `act` is malformed")
