"""PKCE and scopes of requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.oauth import pkce, scopes
from keyproxy.oauth.oauth_error import OAuthError

#: RFC 7636 appendix B.
VERIFIER = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
CHALLENGE = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"


def test_verifier_of_the_challenge_is_the_only_one() -> None:
    challenge = pkce.challenge_of(CHALLENGE)
    assert challenge is not None
    assert pkce.verifies(VERIFIER, challenge)
    assert not pkce.verifies(VERIFIER[:-1] + "l", challenge)
    # PKCE downgrade: `plain` would compare the texts.
    assert not pkce.verifies(CHALLENGE, challenge)


@pytest.mark.parametrize(
    "text",
    ["", CHALLENGE[:-1], CHALLENGE + "A", CHALLENGE + "=", CHALLENGE[:-1] + "N", CHALLENGE[:-1] + "+", "\n" * 43],
)
def test_challenge_is_the_text_of_32_bytes(text: str) -> None:
    assert pkce.challenge_of(text) is None


@pytest.mark.parametrize(
    ("verifier", "valid"),
    [("a" * 42, False), ("a" * 43, True), ("a" * 128, True), ("a" * 129, False), ("~._-" * 11, True), ("é" * 43, False),
     ("a" * 43 + "\n", False), ("a b" * 20, False)],
)  # fmt: skip
def test_verifier_has_43_to_128_unreserved_characters(verifier: str, valid: bool) -> None:
    assert pkce.is_verifier(verifier) is valid


OFFERED = ["jobs:write", "jobs:read"]


@pytest.mark.parametrize(
    ("requested", "granted"),
    [
        (None, ("jobs:write", "jobs:read")),
        ("", ("jobs:write", "jobs:read")),
        (" ", ("jobs:write", "jobs:read")),
        ("jobs:read", ("jobs:read",)),
        ("jobs:read  jobs:write jobs:read", ("jobs:write", "jobs:read")),
        ("offline_access jobs:read", ("jobs:read",)),
    ],
)
def test_requested_scopes_that_are_offered_are_granted(requested: str | None, granted: tuple[str, ...]) -> None:
    assert scopes.granted(scopes.parse(requested), OFFERED) == granted


@pytest.mark.parametrize("requested", ["other", "jobs", "jobs:read,jobs:write", "JOBS:READ"])
def test_request_without_any_offered_scope_is_refused(requested: str) -> None:
    with pytest.raises(OAuthError) as error:
        scopes.granted(scopes.parse(requested), OFFERED)
    assert error.value.code == "invalid_scope"


@given(st.lists(st.sampled_from(["a", "b", "c", "d"])), st.lists(st.sampled_from(["a", "b", "c"]), unique=True))
def test_nothing_is_granted_that_is_not_both_requested_and_offered(requested: list[str], offered: list[str]) -> None:
    try:
        granted = scopes.granted(scopes.parse(" ".join(requested)), offered)
    except OAuthError:
        assert not set(requested) & set(offered)
        return
    assert set(granted) == (set(requested) or set(offered)) & set(offered)
