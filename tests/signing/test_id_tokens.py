"""An id_token is accepted only with the provider's signature, for this client and this login, within its time."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from keyproxy.signing import id_tokens
from keyproxy.signing.compact_jwt import JwtFault
from keyproxy.signing.id_tokens import ExpectedLogin
from keyproxy.signing.key_sets import KeySet, UnknownKey

NOW = 1_800_000_000
ISSUER, CLIENT, NONCE = "https://idp.example", "keyproxy-1", "n" * 43
EXPECTED = ExpectedLogin(ISSUER, CLIENT, NONCE)

RSA = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()

CLAIMS: dict[str, Any] = {
    "iss": ISSUER, "aud": CLIENT, "sub": "s-1", "nonce": NONCE, "iat": NOW - 5, "exp": NOW + 300,
}  # fmt: skip


def jwk(algorithm: Any, key: Any, **members: object) -> dict[str, Any]:
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), **members}


RSA_JWK = jwk(RSAAlgorithm, RSA, kid="r", use="sig")
EC_JWK = jwk(ECAlgorithm, EC, kid="e", alg="ES256")
ED_JWK = jwk(OKPAlgorithm, ED, kid="d")
KEYS = KeySet({"keys": [RSA_JWK, EC_JWK, ED_JWK]})
PEM = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def token(
    claims: Mapping[str, Any] = CLAIMS, key: Any = RSA, alg: str = "RS256", headers: Mapping[str, Any] | None = None
) -> str:
    return jwt.encode(dict(claims), key, alg, headers=dict(headers if headers is not None else {"kid": "r"}))


def encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def by_hand(header: Mapping[str, Any], signature: bytes = b"") -> str:
    return f"{encoded(json.dumps(header).encode())}.{encoded(json.dumps(CLAIMS).encode())}.{encoded(signature)}"


def as_secret(secret: bytes) -> str:
    """A token whose HMAC has a public key of the provider as its secret."""
    message = by_hand({"alg": "HS256", "kid": "r", "typ": "JWT"}).rpartition(".")[0]
    return f"{message}.{encoded(hmac.digest(secret, message.encode(), hashlib.sha256))}"


def fault(text: str, keys: KeySet = KEYS, now: float = NOW) -> str:
    """The reason for which a token is refused, empty if it is accepted."""
    try:
        id_tokens.verified_claims(id_tokens.parse(text), keys, EXPECTED, now)
    except JwtFault as caught:
        return str(caught)
    except UnknownKey:
        return "unknown key"
    return ""


@pytest.mark.parametrize(
    ("key", "alg", "kid"), [(RSA, "RS256", "r"), (RSA, "PS256", "r"), (EC, "ES256", "e"), (ED, "EdDSA", "d")]
)
def test_id_token_is_accepted_with_each_allowed_algorithm(key: Any, alg: str, kid: str) -> None:
    whole = token(key=key, alg=alg, headers={"kid": kid})
    assert id_tokens.verified_claims(id_tokens.parse(whole), KEYS, EXPECTED, NOW)["sub"] == "s-1"
    head, _, signature = whole.split(".")
    altered = encoded(json.dumps({**CLAIMS, "sub": "s-2"}).encode())
    assert fault(f"{head}.{altered}.{signature}") == "invalid signature"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (as_secret(PEM), "not allowed"),
        (as_secret(json.dumps(RSA_JWK).encode()), "not allowed"),
        (by_hand({"alg": "none", "kid": "r"}), "not base64url"),
        (by_hand({"alg": "none", "kid": "r"}, b"x"), "not allowed"),
        (by_hand({"alg": "None"}, b"x"), "not allowed"),
        (token(alg="RS512"), "not allowed"),
        (token(key=EC, alg="ES256", headers={"kid": "r"}), "unknown key"),
        (token(key=RSA, headers={"kid": "e"}), "unknown key"),
        (token(headers={"kid": "other"}), "unknown key"),
        (token(headers={"kid": "r", "crit": ["exp"]}), "crit"),
        (token(headers={"kid": "r", "typ": "at+jwt"}), "type"),
        (by_hand({"alg": ["RS256"], "kid": "r"}, b"x"), "wrong type"),
        (by_hand({"alg": "RS256", "kid": 1}, b"x"), "wrong type"),
        (by_hand({"alg": "RS256", "kid": "r"}, b"x" * 256), "invalid signature"),
        (by_hand({"alg": "ES256", "kid": "e"}, b"\0" * 64), "invalid signature"),
        (by_hand({"alg": "ES256", "kid": "e"}, b"x"), "invalid signature"),
        (by_hand({"alg": "EdDSA", "kid": "d"}, b"x"), "invalid signature"),
        (token(key=rsa.generate_private_key(public_exponent=65_537, key_size=2_048)), "invalid signature"),
        ("a.b", "three parts"),
        ("", "three parts"),
        (token() + "=", "base64url"),
        ("é.é.é", "ASCII"),
        ("x" * 40_000, "too long"),
    ],
)  # fmt: skip
def test_id_token_without_a_genuine_signature_is_refused(text: str, reason: str) -> None:
    assert reason in fault(text)


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"iss": "https://idp.example/"}, "iss"),
        ({"iss": "https://other.example"}, "iss"),
        ({"iss": [ISSUER]}, "iss"),
        ({"aud": "other"}, "aud"),
        ({"aud": ["other"]}, "aud"),
        ({"aud": []}, "aud"),
        ({"aud": None}, "aud"),
        ({"aud": {CLIENT: 1}}, "aud"),
        ({"aud": [CLIENT]}, ""),
        ({"aud": [CLIENT, "other"]}, "azp"),
        ({"aud": [CLIENT, "other"], "azp": CLIENT}, ""),
        ({"aud": [CLIENT, "other"], "azp": "other"}, "azp"),
        ({"azp": "other"}, "azp"),
        ({"azp": None}, "azp"),
        ({"azp": CLIENT}, ""),
        ({"nonce": "m" * 43}, "nonce"),
        ({"nonce": None}, "nonce"),
        ({"nonce": "é"}, "nonce"),
        ({"nonce": [NONCE]}, "nonce"),
        ({"exp": NOW - 59}, ""),
        ({"exp": NOW - 60}, "expired"),
        ({"exp": str(NOW + 300)}, "time"),
        ({"exp": True}, "time"),
        ({"iat": NOW + 60}, ""),
        ({"iat": NOW + 61}, "future"),
        ({"nbf": NOW + 60}, ""),
        ({"nbf": NOW + 61}, "not valid yet"),
    ],
)  # fmt: skip
def test_id_token_for_another_login_or_time_is_refused(claims: dict[str, Any], reason: str) -> None:
    # Signed by hand: PyJWT refuses to encode some of these.
    text = jwt.api_jws.encode(json.dumps({**CLAIMS, **claims}).encode(), RSA, "RS256", headers={"kid": "r"})
    assert reason in fault(text)
    assert bool(fault(text)) == bool(reason)


@pytest.mark.parametrize("name", ["iss", "aud", "exp", "iat", "nonce"])
def test_id_token_without_a_required_claim_is_refused(name: str) -> None:
    assert fault(token({key: value for key, value in CLAIMS.items() if key != name}))


@pytest.mark.parametrize(
    "payload", [b"[]", b"null", b"{", b'{"iss":1,"iss":2}', b'{"exp":NaN}', b"\xff", b"[" * 20_000]
)
def test_id_token_with_ambiguous_json_is_refused(payload: bytes) -> None:
    assert "JSON" in fault(jwt.api_jws.encode(payload, RSA, "RS256", headers={"kid": "r"}))


SMALL = rsa.generate_private_key(public_exponent=65_537, key_size=1_024)


@pytest.mark.parametrize(
    ("rows", "usable"),
    [
        ([RSA_JWK], 2),  # for RS256 and PS256
        ([{**RSA_JWK, "alg": "PS256"}], 1),
        ([{**RSA_JWK, "use": "enc"}], 0),
        ([{**RSA_JWK, "key_ops": ["encrypt"]}], 0),
        ([{**RSA_JWK, "alg": "RSA-OAEP"}], 0),
        ([{**RSA_JWK, "kid": 7}], 0),
        ([{**RSA_JWK, "n": "!"}], 0),
        ([{**RSA_JWK, "e": encoded(b"\x01" * 64)}], 0),
        ([jwk(RSAAlgorithm, SMALL)], 0),
        ([jwk(ECAlgorithm, ec.generate_private_key(ec.SECP384R1()))], 0),
        ([{**EC_JWK, "x": encoded(b"\x01" * 32)}], 0),
        ([{**EC_JWK, "crv": ["P-256"]}], 0),
        ([{"kty": "oct", "k": "c2VjcmV0", "kid": "r"}], 0),
        ([None, 3, "x", [], {}], 0),
        ([ED_JWK, None, EC_JWK], 2),
    ],
)  # fmt: skip
def test_key_set_uses_only_keys_that_are_strong_and_for_signatures(rows: Sequence[Any], usable: int) -> None:
    assert len(KeySet({"keys": rows})) == usable


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"keys":{}}', b'{"keys":[],"keys":[]}'])
def test_malformed_key_set_is_refused(text: bytes) -> None:
    with pytest.raises(JwtFault):
        KeySet.parse(text)


def test_key_set_is_bounded() -> None:
    KeySet({"keys": [ED_JWK] * 100})
    with pytest.raises(JwtFault):
        KeySet({"keys": [ED_JWK] * 101})


def test_id_token_without_a_key_id_is_accepted_only_if_one_key_fits() -> None:
    whole = token(headers={})
    assert fault(whole) == ""
    assert "several" in fault(whole, KeySet({"keys": [RSA_JWK, {**RSA_JWK, "kid": "r2"}]}))
    assert fault(whole, KeySet({"keys": [EC_JWK]})) == "unknown key"


def test_private_members_of_a_published_key_are_not_read() -> None:
    private = {**RSAAlgorithm.to_jwk(RSA, as_dict=True), "kid": "r", "key_ops": ["verify"]}
    assert fault(token(), KeySet({"keys": [private]})) == ""
