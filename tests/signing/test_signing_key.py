"""A signing key does not reveal its private half, and knows until when what it has signed is valid."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from keyproxy.model import NEVER, AgentToken, Identity
from keyproxy.signing.claims import actor_claim, assertion_claims
from keyproxy.signing.signing_key import LIFE_SECONDS, SigningKey, VerifyingKey


def test_a_key_that_is_handed_over_is_the_same_key() -> None:
    key = SigningKey.make(1000.5)
    other = SigningKey.from_private(key.private_text())
    assert (other.kid, other.created_wall_seconds, other.ends_wall_seconds) == (key.kid, 1000.5, 1000.5 + LIFE_SECONDS)
    assert other.public_jwk() == key.public_jwk()
    assert LIFE_SECONDS == 25 * 3600


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"d":"","created":0,"ends":0}', '{"d":5,"created":0,"ends":0}',
     '{"d":"__________________________________________8=","created":0,"ends":0}'],
)  # fmt: skip
def test_a_text_that_is_no_key_is_an_error_that_does_not_quote_it(text: str) -> None:
    with pytest.raises(ValueError, match=r"^not a signing key$") as caught:
        SigningKey.from_private(text)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_neither_repr_nor_pickle_nor_copy_reveals_a_key() -> None:
    key = SigningKey.make(0.0)
    assert repr(key) == f"SigningKey(kid={key.kid!r})"
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            attempt(key)


def test_a_key_knows_the_latest_expiry_of_what_it_has_signed() -> None:
    key = SigningKey.make(0.0)
    assert key.signed_until_wall_seconds == 0.0
    for expires in (50, 90, 70):
        key.sign("at+jwt", {"exp": expires})
    assert key.signed_until_wall_seconds == 90
    for claims in ({"exp": 1.5}, {"exp": "90"}):
        with pytest.raises(TypeError):
            key.sign("at+jwt", claims)


@pytest.mark.parametrize(
    "changed", [{"crv": "P-384"}, {"kty": "OKP"}, {"x": "AAAA"}, {"y": "A" * 43}, {"x": 5}, {"kty": None}], ids=str
)
def test_a_json_web_key_that_is_no_point_of_the_curve_is_refused(changed: dict[str, Any]) -> None:
    jwk = {**SigningKey.make(0.0).public_jwk(), **changed}
    with pytest.raises(ValueError, match="key"):
        VerifyingKey(jwk, kid="a", ends_wall=1.0)


def test_the_actor_claim_has_the_current_actor_outermost() -> None:
    user = {"sub": "u_worker", "type": "user", "key_id": "key_a"}
    assert actor_claim((), None, "key_a") is None
    assert actor_claim((), "u_worker", "key_a") == user
    assert actor_claim(("crawler",), None, "key_a") == {"sub": "crawler", "type": "agent"}
    assert actor_claim(("crawler",), "u_worker", "key_a") == {"sub": "crawler", "type": "agent", "act": user}
    assert actor_claim(("child", "parent"), None, "key_a") == {
        "sub": "child", "type": "agent", "act": {"sub": "parent", "type": "agent"},
    }  # fmt: skip


def identity(expires: float = NEVER, actor: str | None = None, agents: tuple[str, ...] = ()) -> Identity:
    return Identity(
        key_id="key_a",
        user_id="u_42",
        tenant_id="acme",
        scopes=frozenset({"jobs:write", "data:read"}),
        is_test=True,
        expires_wall_seconds=expires,
        standing=None,
        header_block=b"",
        actor_user_id=actor,
        agent_token=AgentToken("agt_x", agents, 0) if agents else None,
    )


def test_an_assertion_states_the_identity_and_never_outlives_the_credential() -> None:
    def claims(who: Identity) -> dict[str, object]:
        return assertion_claims(who, issuer="keyproxy", audience="upstream", issued_wall=1000, ttl_seconds=60)

    assert claims(identity()) == {
        "iss": "keyproxy", "aud": "upstream", "sub": "u_42", "tenant": "acme", "scope": "data:read jobs:write",
        "key_id": "key_a", "test": True, "iat": 1000, "exp": 1060,
    }  # fmt: skip
    assert claims(identity(1059.9))["exp"] == 1059
    assert claims(identity(1060.1))["exp"] == 1060
    assert claims(identity(actor="u_worker"))["act"] == {"sub": "u_worker", "type": "user", "key_id": "key_a"}
    assert claims(identity(agents=("crawler",)))["act"] == {"sub": "crawler", "type": "agent"}
