"""Clients that an operator registers get tokens, and lose them when the operator ends that."""

from __future__ import annotations

import base64
import json
import secrets

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from keyproxy.auth.api_key import KeyFormat
from keyproxy.oauth.client import AuthMethod
from keyproxy.signing.client_assertions import ASSERTION_TYPE
from keyproxy.store.directory.directory import Actor, Directory, OAuthClientWish
from tests.authorize.authority import Authority, Reply

SECRET = OAuthClientWish("worker", AuthMethod.CLIENT_SECRET, user="u_42", scopes=("jobs:read", "jobs:write"))


@pytest.fixture
async def directory(authority: Authority) -> Directory:
    """The operator's side of the same system."""
    await authority.user()
    actor = Actor("cli:test", "host")
    return Directory(authority.database, KeyFormat(), actor, settings=authority.context.settings)


def _basic(client_id: str, secret: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{client_id}:{secret}".encode()).decode()}


async def _token(authority: Authority, headers: dict[str, str] | None, **form: str) -> Reply:
    authority.clock.advance(6)  # for the limit of failures
    sent = {"grant_type": "client_credentials", **form}
    return await authority.call("POST", "/oauth/token", form=sent, headers=headers)


async def test_service_with_a_secret_gets_tokens_for_its_user_until_it_is_disabled(
    authority: Authority, directory: Directory
) -> None:
    made = await directory.oauth_clients.create(SECRET)
    mine = _basic("worker", made["secret"])
    reply = await _token(authority, mine, scope="jobs:read")
    assert (reply.status, reply.json["scope"], "refresh_token" in reply.json) == (200, "jobs:read", False)
    shown = await authority.call("POST", "/oauth/introspect", form={"token": reply.json["access_token"]}, headers=mine)
    assert (shown.json["active"], shown.json["sub"], shown.json["client_id"]) == (True, "u_42", "worker")
    (session,) = await directory.oauth_sessions.list_by_id("", 10, user_id="u_42")
    assert (session["presented_as"], session["via_key"], session["via_subject"]) == ("worker", None, None)
    wrong = await _token(authority, _basic("worker", made["secret"][:-1] + "0"))
    assert (wrong.status, wrong.error) == (401, "invalid_client")
    await directory.oauth_clients.change("worker", {"disabled": True})
    assert (await _token(authority, mine)).error == "invalid_client"
    await directory.oauth_clients.change("worker", {"disabled": False})
    assert (await _token(authority, mine)).status == 200
    (grant,) = await directory.oauth_grants.list_by_id("", 10)
    await directory.oauth_grants.delete(grant["id"])
    assert (await _token(authority, mine)).error == "unauthorized_client"
    await directory.oauth_clients.delete("worker")
    assert (await _token(authority, mine)).error == "invalid_client"


async def test_service_with_a_key_signs_assertions_of_which_each_works_once(
    authority: Authority, directory: Directory
) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    public = {**json.loads(ECAlgorithm.to_jwk(private.public_key())), "kid": "k1"}
    wish = OAuthClientWish("signer", AuthMethod.PRIVATE_KEY_JWT, user="u_42", is_test=True, jwks={"keys": [public]})
    await directory.oauth_clients.create(wish)
    issuer, now = authority.context.settings.oauth.issuer, int(authority.clock.wall_seconds)
    claims = {"iss": "signer", "sub": "signer", "aud": issuer, "exp": now + 200, "jti": secrets.token_hex(8)}
    assertion = jwt.encode(claims, private, "ES256", {"kid": "k1"})
    form = {"client_assertion_type": ASSERTION_TYPE, "client_assertion": assertion}
    reply = await _token(authority, None, **form)
    assert reply.status == 200, reply.text
    (session,) = await directory.oauth_sessions.list_by_id("", 10)
    assert (session["is_test"], session["scopes"]) == (True, [])
    assert (await _token(authority, None, **form)).error == "invalid_client"


async def test_secret_of_a_client_with_odd_characters_in_its_id_works_in_both_places(
    authority: Authority, directory: Directory
) -> None:
    odd = "a b:c%2F+d"
    made = await directory.oauth_clients.create(
        OAuthClientWish(odd, AuthMethod.CLIENT_SECRET, user="u_42", scopes=("jobs:read",))
    )
    quoted = "a+b%3Ac%252F%2Bd"  # RFC 6749, section 2.3.1
    assert (await _token(authority, _basic(quoted, made["secret"]))).status == 200
    assert (await _token(authority, None, client_id=odd, client_secret=made["secret"])).status == 200
    assert (await directory.oauth_clients.get(odd))["grants"] == 1


async def test_registered_application_asks_users_at_its_redirect_uri_alone(
    authority: Authority, directory: Directory
) -> None:
    await directory.oauth_clients.create(
        OAuthClientWish("portal", AuthMethod.NONE, redirect_uris=("https://portal.example/cb",))
    )
    query = {
        "response_type": "code", "client_id": "portal", "code_challenge": "c" * 43, "code_challenge_method": "S256",
    }  # fmt: skip
    for uri, status in (("https://portal.example/cb", 200), ("https://portal.example/cb2", 400)):
        reply = await authority.call("GET", "/oauth/authorize", query={**query, "redirect_uri": uri})
        assert (reply.status, "Location" in reply.headers) == (status, False)
    await directory.oauth_clients.change("portal", {"disabled": True})
    reply = await authority.call(
        "GET", "/oauth/authorize", query={**query, "redirect_uri": "https://portal.example/cb"}
    )
    assert (reply.status, "Location" in reply.headers) == (403, False)
