"""An agent token is accepted in exactly one form, and only if its signature and claims are right."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.claims import ASSERTION_TYPE
from keyproxy.signing.signing_key import SigningKey, VerifyingKey, encoded
from keyproxy.signing.token_check import AcceptedTokens, SignedToken

NOW = 1_800_000_000.0
RULES = AcceptedTokens("keyproxy", "keyproxy")
KEY = SigningKey.make(NOW - 3600)
VERIFIER = VerifyingKey(KEY.public_jwk(), kid=KEY.kid, ends_wall=KEY.ends_wall_seconds)
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
HEADER = {"typ": "at+jwt", "alg": "ES256", "kid": KEY.kid}
CLAIMS: dict[str, Any] = {
    "iss": "keyproxy", "aud": "keyproxy", "sub": "u_42", "act": {"sub": "crawler", "type": "agent"}, "client_id": "key_a",
    "tenant": "acme", "scope": "data:read", "jti": "agt_0123456789012345678901", "iat": int(NOW) - 60,
    "exp": int(NOW) + 840,
}  # fmt: skip


def check(token: bytes, now: float = NOW, *, ends_wall: float | None = None) -> Reason | None:
    """The reason for which a token is refused, None if it is accepted."""
    key = VERIFIER if ends_wall is None else VerifyingKey(KEY.public_jwk(), kid=KEY.kid, ends_wall=ends_wall)
    try:
        signed = SignedToken.parse(token)
        if signed.kid != KEY.kid:
            return Reason.KEY_INVALID
        signed.check(key, RULES, now)
    except Refusal as refusal:
        return refusal.reason
    return None


def signed(header: bytes, payload: bytes) -> bytes:
    """A token with a genuine signature over any bytes."""
    message = encoded(header) + b"." + encoded(payload)
    signature = ECAlgorithm(ECAlgorithm.SHA256).sign(message, KEY._private)
    return message + b"." + encoded(signature)


def text(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def with_claims(**changed: object) -> bytes:
    claims = {name: value for name, value in {**CLAIMS, **changed}.items() if value is not ...}
    return signed(text(HEADER), text(claims))


def with_signature(change: Any) -> bytes:
    """The genuine token with another signature, computed from the numbers of the genuine one."""
    message, _, signature = KEY.sign("at+jwt", CLAIMS).rpartition(b".")
    raw = base64.urlsafe_b64decode(signature + b"==")
    return message + b"." + encoded(change(int.from_bytes(raw[:32]), int.from_bytes(raw[32:])))


def raw(r: int, s: int) -> bytes:
    return r.to_bytes(32) + s.to_bytes(32)


def test_a_signed_token_has_exactly_the_documented_header_and_is_accepted() -> None:
    token = KEY.sign("at+jwt", CLAIMS)
    header = base64.urlsafe_b64decode(token.partition(b".")[0] + b"==")
    assert header == b'{"typ":"at+jwt","alg":"ES256","kid":"%b"}' % KEY.kid.encode()
    assert check(token) is None


def test_a_token_verifies_with_pyjwt_and_one_of_pyjwt_here() -> None:
    now = int(time.time())
    claims = {**CLAIMS, "iat": now, "exp": now + 60}
    public = jwt.PyJWK(KEY.public_jwk())
    assert jwt.decode(KEY.sign("at+jwt", claims), public, audience="keyproxy", issuer="keyproxy") == claims
    theirs = jwt.encode(claims, KEY._private, "ES256", headers=HEADER, sort_headers=False)
    assert check(theirs.encode(), now) is None


def test_the_key_id_is_the_rfc_7638_thumbprint() -> None:
    jwk = KEY.public_jwk()
    members = json.dumps({name: jwk[name] for name in ("crv", "kty", "x", "y")}, separators=(",", ":"), sort_keys=True)
    assert jwk["kid"] == KEY.kid == encoded(hashlib.sha256(members.encode()).digest()).decode()
    assert len(KEY.kid) == 43
    assert "d" not in jwk


@pytest.mark.parametrize(
    "header",
    [
        {**HEADER, "alg": "none"},
        {**HEADER, "alg": "HS256"},
        {**HEADER, "alg": "es256"},
        {**HEADER, "alg": "ES384"},
        {**HEADER, "typ": "JWT"},
        {**HEADER, "typ": "application/at+jwt"},
        {**HEADER, "typ": ASSERTION_TYPE},
        {**HEADER, "jku": "https://evil.example/jwks.json"},
        {**HEADER, "jwk": KEY.public_jwk()},
        {**HEADER, "x5u": "https://evil.example/cert"},
        {**HEADER, "crit": ["exp"]},
        {**HEADER, "cty": "JWT"},
        {**HEADER, "b64": False},
        {"typ": "at+jwt", "kid": KEY.kid, "alg": "ES256"},
        {"alg": "ES256", "kid": KEY.kid},
        {"typ": "at+jwt", "alg": "ES256"},
        {**HEADER, "kid": "../../dev/null"},
        {**HEADER, "kid": "x' UNION SELECT"},
        {**HEADER, "kid": ["a"]},
    ],
)
def test_any_other_header_is_refused_whatever_its_signature(header: dict[str, object]) -> None:
    assert check(signed(text(header), text(CLAIMS))) is Reason.KEY_INVALID


@pytest.mark.parametrize(
    "header",
    [
        b'{"typ":"at+jwt","alg":"ES256","kid":"KID","kid":"KID"}',
        b'{"typ":"at+jwt","alg":"none","alg":"ES256","kid":"KID"}',
        b'{ "typ":"at+jwt","alg":"ES256","kid":"KID"}',
        b'{"typ":"at+jwt","alg":"ES256","kid":"KID"}\n',
        b'{"typ":"at+jwt","alg":"ES256","kid":"KID"} ',
        b'{"typ":"at\\u002bjwt","alg":"ES256","kid":"KID"}',
        b'\xef\xbb\xbf{"typ":"at+jwt","alg":"ES256","kid":"KID"}',
        b"[]",
        b"",
    ],
)
def test_any_other_text_of_the_same_header_is_refused(header: bytes) -> None:
    assert check(signed(header.replace(b"KID", KEY.kid.encode()), text(CLAIMS))) is Reason.KEY_INVALID


def test_the_public_key_is_no_hmac_secret() -> None:
    public = KEY._private.public_key()
    secrets = [
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        text(KEY.public_jwk()),
    ]
    for secret in secrets:
        for alg in ("HS256", "ES256"):
            message = encoded(text({**HEADER, "alg": alg})) + b"." + encoded(text(CLAIMS))
            token = message + b"." + encoded(hmac.digest(secret, message, "sha256"))
            assert check(token) is Reason.KEY_INVALID
            assert check(token + encoded(bytes(32))) is Reason.KEY_INVALID


@pytest.mark.parametrize(
    "change",
    [
        lambda r, s: raw(0, s),
        lambda r, s: raw(r, 0),
        lambda _r, _s: raw(0, 0),
        lambda r, s: raw(s, r),
        lambda r, s: raw(ORDER, s),
        lambda r, s: raw(r, s ^ 1),
        lambda r, s: raw(r, s)[:-1],
        lambda r, s: raw(r, s) + b"\0",
        lambda r, s: b"\0" + raw(r, s),
        lambda _r, _s: KEY._private.sign(KEY.sign("at+jwt", CLAIMS).rpartition(b".")[0], ec.ECDSA(hashes.SHA256())),
    ],
    ids=["r=0", "s=0", "both 0", "swapped", "r=n", "one bit", "short", "long", "longer in front", "DER"],
)  # fmt: skip
def test_another_signature_is_refused(change: Any) -> None:
    assert check(with_signature(change)) is Reason.KEY_INVALID


def test_both_forms_of_a_signature_are_accepted() -> None:
    # ES256 allows both, and libraries create both. The digest of the bytes identifies a token, so the second form of a
    # token that was minted has no row.
    assert check(with_signature(raw)) is None
    assert check(with_signature(lambda r, s: raw(r, ORDER - s))) is None


def test_a_signature_of_another_key_is_refused() -> None:
    message = KEY.sign("at+jwt", CLAIMS).rpartition(b".")[0]
    other = ec.generate_private_key(ec.SECP256R1())
    assert check(message + b"." + encoded(ECAlgorithm(ECAlgorithm.SHA256).sign(message, other))) is Reason.KEY_INVALID


@pytest.mark.parametrize(
    "change",
    [
        lambda token: token + b"=",
        lambda token: token.replace(b".", b"=.", 1),
        lambda token: token + b"\n",
        lambda token: b" " + token,
        lambda token: token + b".",
        lambda token: token + b".AAAA",
        lambda token: b"." + token,
        lambda token: token.rpartition(b".")[0],
        lambda token: token.rpartition(b".")[0] + b".",
        lambda token: token.replace(b"eyJ", b"ey J", 1),
        lambda token: token.replace(b"eyJ", b"eyJ\r\n", 1),
        lambda token: token[:-1] + bytes([token[-1] + 1]),
        lambda token: base64.b64encode(token),
        lambda token: token.replace(b"-", b"+").replace(b"_", b"/") + b"/",
        lambda _token: b"",
        lambda _token: b"..",
        lambda token: token + b"A" * 4096,
        lambda token: token + "é".encode(),
    ],
)
def test_any_other_encoding_is_refused(change: Any) -> None:
    # 64 bytes take 86 characters, so the last one has two stray bits: `Q` and `R` decode to the same bytes.
    token = KEY.sign("at+jwt", CLAIMS)
    assert check(change(token)) is Reason.KEY_INVALID


def test_a_flipped_bit_anywhere_is_refused() -> None:
    token = KEY.sign("at+jwt", CLAIMS)
    for at in range(len(token)):
        changed = token[:at] + bytes([token[at] ^ 1]) + token[at + 1 :]
        assert check(changed) is not None, at


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"iss": "other"}, Reason.KEY_INVALID),
        ({"iss": ...}, Reason.KEY_INVALID),
        ({"iss": ["keyproxy"]}, Reason.KEY_INVALID),
        ({"aud": "upstream"}, Reason.KEY_INVALID),
        ({"aud": ["keyproxy"]}, Reason.KEY_INVALID),
        ({"aud": ["keyproxy", "upstream"]}, Reason.KEY_INVALID),
        ({"aud": ...}, Reason.KEY_INVALID),
        ({"exp": ...}, Reason.KEY_INVALID),
        ({"exp": None}, Reason.KEY_INVALID),
        ({"exp": True}, Reason.KEY_INVALID),
        ({"exp": str(int(NOW) + 60)}, Reason.KEY_INVALID),
        ({"exp": 10**400}, Reason.KEY_INVALID),
        ({"exp": -1}, Reason.KEY_INVALID),
        ({"iat": ...}, Reason.KEY_INVALID),
        ({"iat": False}, Reason.KEY_INVALID),
        ({"iat": int(NOW) + 60}, None),
        ({"iat": int(NOW) + 61}, Reason.KEY_INVALID),
        ({"exp": int(NOW) + 1}, None),
        ({"exp": int(NOW)}, Reason.KEY_EXPIRED),
        ({"exp": int(NOW) - 1}, Reason.KEY_EXPIRED),
        ({"exp": NOW + 0.5}, None),
        ({"exp": int(NOW) - 1, "aud": "upstream"}, Reason.KEY_INVALID),
        ({"exp": int(NOW) - 1, "iss": "other"}, Reason.KEY_INVALID),
    ],
    ids=str,
)
def test_claims_are_checked_and_a_genuine_expired_token_is_named_as_such(
    changed: dict[str, object], reason: Reason | None
) -> None:
    assert check(with_claims(**changed)) is reason


@pytest.mark.parametrize(
    "payload",
    [
        text(CLAIMS)[:-1] + b',"aud":"keyproxy"}',
        text(CLAIMS)[:-1] + b',"x":{"a":1,"a":2}}',
        text(CLAIMS)[:-1] + b',"x":NaN}',
        text(CLAIMS)[:-1] + b',"x":Infinity}',
        text(CLAIMS) + b"{}",
        b"[" + text(CLAIMS) + b"]",
        b"[" * 2900,
        b'{"a":' * 500,
        b"\xff",
        b"null",
        b'"text"',
        text(CLAIMS).decode().encode("utf-16"),
    ],
    ids=range(12),
)
def test_an_ambiguous_payload_is_refused_even_if_it_is_signed(payload: bytes) -> None:
    assert check(signed(text(HEADER), payload)) is Reason.KEY_INVALID


def test_nothing_is_accepted_after_the_end_of_its_key() -> None:
    assert check(with_claims(), ends_wall=NOW + 0.1) is None
    assert check(with_claims(), ends_wall=NOW) is Reason.KEY_INVALID
    assert check(with_claims(exp=int(NOW) - 1), ends_wall=NOW - 1) is Reason.KEY_EXPIRED
