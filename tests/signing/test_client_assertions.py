"""A client assertion is accepted only with the client's signature, for this server, within its short time."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from keyproxy.signing import client_assertions
from keyproxy.signing.compact_jwt import JwtFault
from keyproxy.signing.key_sets import KeySet, UnknownKey

NOW = 1_800_000_000
ISSUER, CLIENT = "https://mcp.example.com", "worker"

RSA = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
OTHER = ec.generate_private_key(ec.SECP256R1())

KEYS = KeySet({"keys": [
    {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "kid": "r"},
    {**ECAlgorithm.to_jwk(EC.public_key(), as_dict=True), "kid": "e"},
    {**OKPAlgorithm.to_jwk(ED.public_key(), as_dict=True), "kid": "d"},
]})  # fmt: skip

CLAIMS: dict[str, Any] = {"iss": CLIENT, "sub": CLIENT, "aud": ISSUER, "jti": "j-1", "iat": NOW, "exp": NOW + 300}
PEM = EC.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def signed(claims: Mapping[str, Any], key: Any = EC, alg: str = "ES256", **headers: Any) -> str:
    kept = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(kept, key, alg, headers={"kid": "e", **headers})


def encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def by_hand(header: Mapping[str, Any], secret: bytes | None = None) -> str:
    message = f"{encoded(json.dumps(header).encode())}.{encoded(json.dumps(CLAIMS).encode())}"
    signature = b"" if secret is None else hmac.digest(secret, message.encode(), hashlib.sha256)
    return f"{message}.{encoded(signature)}"


def fault(text: str, now: float = NOW) -> str:
    """The reason for which an assertion is refused, empty if it is accepted."""
    try:
        verified = client_assertions.verify(client_assertions.parse(text), KEYS, ISSUER, now)
    except JwtFault as caught:
        return str(caught)
    except UnknownKey:
        return "unknown key"
    assert (verified.jti, verified.expires_wall_seconds) == (
        "j-1",
        jwt.decode(text, options={"verify_signature": False})["exp"],
    )
    return ""


@pytest.mark.parametrize(
    ("key", "alg", "kid"), [(RSA, "RS256", "r"), (RSA, "PS256", "r"), (EC, "ES256", "e"), (ED, "EdDSA", "d")]
)
def test_assertion_of_each_pinned_algorithm_is_accepted(key: Any, alg: str, kid: str) -> None:
    assert fault(signed(CLAIMS, key, alg, kid=kid)) == ""
    assert client_assertions.parse(signed(CLAIMS, key, alg, kid=kid)).client_id == CLIENT


@pytest.mark.parametrize("typ", ["JWT", "client-authentication+jwt", "jwt"])
def test_assertion_may_have_the_types_of_its_kind(typ: str) -> None:
    assert fault(signed(CLAIMS, typ=typ)) == ""


@pytest.mark.parametrize(
    "text",
    [
        by_hand({"alg": "none", "kid": "e"}),
        by_hand({"alg": "HS256", "kid": "e"}, PEM),
        by_hand({"alg": "HS256", "kid": "e"}, b""),
        by_hand({"alg": "ES256", "kid": "e"}),
        signed(CLAIMS, OTHER),
        signed(CLAIMS, EC, kid="r"),
        signed(CLAIMS, RSA, "RS256", kid="e"),
        signed(CLAIMS, OTHER, kid="x"),
        signed(CLAIMS, OTHER, jwk=ECAlgorithm.to_jwk(OTHER.public_key(), as_dict=True)),
        signed(CLAIMS, RSA, "RS384", kid="r"),
        signed(CLAIMS, typ="at+jwt"),
        signed(CLAIMS, crit=["exp"]),
        "",
        "a.b.c",
        signed(CLAIMS)[:-1],
        signed(CLAIMS) + "A",
        signed(CLAIMS) + "\u00e9",
        signed({**CLAIMS, "sub": None}),
        signed({**CLAIMS, "x": "a" * 9_000}),
    ],
)
def test_assertion_with_another_signature_or_form_is_refused(text: str) -> None:
    assert fault(text)


@pytest.mark.parametrize(
    ("claim", "value", "reason"),
    [
        ("iss", "other", "`iss` and `sub`"),
        ("iss", None, "`iss` and `sub`"),
        ("aud", "https://mcp.example.com/", "`aud`"),
        ("aud", "https://mcp.example.com/oauth/token", "`aud`"),
        ("aud", [ISSUER, "https://other.example"], "`aud`"),
        ("aud", [], "`aud`"),
        ("aud", None, "`aud`"),
        ("jti", None, "`jti`"),
        ("jti", "", "`jti`"),
        ("jti", "j" * 513, "`jti`"),
        ("exp", None, "time"),
        ("exp", NOW, "expired"),
        ("exp", NOW + 301, "more than 300"),
        ("exp", True, "time"),
        ("nbf", NOW + 61, "future"),
        ("iat", NOW + 61, "future"),
        ("iat", "x", "time"),
    ],
)
def test_assertion_with_another_claim_is_refused(claim: str, value: object, reason: str) -> None:
    claims = {**CLAIMS, claim: value}
    if isinstance(value, int | str | list | None) and claim not in ("jti", "iat", "iss"):
        text = signed(claims)
    else:
        # The library refuses to write some of these values.
        header = json.dumps({"alg": "ES256", "kid": "e"}).encode()
        message = f"{encoded(header)}.{encoded(json.dumps(claims).encode())}"
        text = f"{message}.{encoded(ECAlgorithm(ECAlgorithm.SHA256).sign(message.encode(), EC))}"
    assert reason in fault(text)


@pytest.mark.parametrize("aud", [ISSUER, [ISSUER]])
def test_audience_is_the_issuer_alone(aud: object) -> None:
    assert fault(signed({**CLAIMS, "aud": aud})) == ""


@pytest.mark.parametrize(
    ("issued", "expires", "is_accepted"),
    [
        (None, 300, True),
        (None, 301, False),
        (-600, 300, True),
        (-600, 1, True),
        (60, 360, True),  # the client's clock is ahead
        (60, 361, False),
        (0, 1, True),
        (0, 0, False),
    ],
)
def test_assertion_lives_300_seconds_at_most(issued: int | None, expires: int, *, is_accepted: bool) -> None:
    iat = None if issued is None else NOW + issued
    assert (fault(signed({**CLAIMS, "iat": iat, "exp": NOW + expires})) == "") is is_accepted
