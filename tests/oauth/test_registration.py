"""Dynamic client registration is a function of the request: nothing is stored, and nothing is secret."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from keyproxy.oauth.client_ids import decode_value_id
from keyproxy.oauth.client_policy import ClientPolicy
from keyproxy.oauth.known_clients import KnownClient, KnownClients
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.oauth.registration import register

URI = "https://acme.example/cb"
CLAUDE = "https://claude.ai/api/mcp/auth_callback"
KNOWN = KnownClients(
    [KnownClient("Claude", (CLAUDE,)), KnownClient("Cursor", ("cursor://mcp/cb", "http://localhost/cb"))]
)
OPEN = ClientPolicy(KNOWN)


def body(**metadata: Any) -> bytes:
    return json.dumps({"redirect_uris": [URI], **metadata}).encode()


def test_response_has_the_id_and_the_metadata_in_use() -> None:
    response = json.loads(register(body(client_name="Acme"), OPEN))
    assert decode_value_id(response.pop("client_id")) is not None
    assert response == {
        "client_name": "Acme",
        "redirect_uris": [URI],
        "token_endpoint_auth_method": "none",
        "grant_types": ["authorization_code", "refresh_token"],
        "response_types": ["code"],
    }


def test_redirect_uris_are_returned_as_sent() -> None:
    sent = ["http://127.0.0.1:33418/", "https://b.example/", "https://a.example/", "https://a.example/"]
    assert json.loads(register(body(redirect_uris=sent), OPEN))["redirect_uris"] == sent


def test_one_program_gets_the_same_bytes_each_time() -> None:
    assert len({register(body(client_name="Acme", scope="a"), OPEN) for _ in range(50)}) == 1


def test_null_members_count_as_absent_and_none_is_returned() -> None:
    sent = body(client_name=None, grant_types=None, response_types=None, jwks=None, client_uri=None)
    assert register(sent, OPEN) == register(body(), OPEN)
    assert None not in json.loads(register(sent, OPEN)).values()


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "private_key_jwt", "none"])
def test_every_registered_program_is_public(method: str) -> None:
    response = json.loads(register(body(token_endpoint_auth_method=method), OPEN))
    assert response["token_endpoint_auth_method"] == "none"
    assert "client_secret" not in response


@pytest.mark.parametrize(
    "redirect_uris",
    [
        None,
        [],
        URI,
        [1],
        [None],
        {"0": URI},
        ["javascript:alert(1)"],
        [URI, "http://acme.example/cb"],
        [URI, "https://acme.example/cb#x"],
        ["https://" + "a" * 500],
        [f"https://acme.example/{number}" for number in range(11)],
    ],
)
def test_invalid_redirect_uri_is_refused(redirect_uris: object) -> None:
    with pytest.raises(OAuthError) as error:
        register(json.dumps({"redirect_uris": redirect_uris}).encode(), OPEN)
    assert (error.value.status, error.value.code) == (400, "invalid_redirect_uri")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 60_000,
        body(client_name=1),
        body(client_name="a" * 201),
        body(grant_types="authorization_code"),
        body(grant_types=["client_credentials"]),
        body(grant_types=[1]),
        body(response_types=["token"]),
        body(redirect_uris=[f"https://acme.example/{number}/{'a' * 400}" for number in range(10)]),
    ],
)
def test_invalid_metadata_are_refused(content: bytes) -> None:
    with pytest.raises(OAuthError) as error:
        register(content, OPEN)
    assert (error.value.status, error.value.code) == (400, "invalid_client_metadata")


def test_ten_redirect_uris_are_accepted() -> None:
    register(body(redirect_uris=[f"https://acme.example/{number}" for number in range(10)]), OPEN)


def test_name_is_returned_without_characters_that_deceive() -> None:
    assert json.loads(register(body(client_name="Ac\u202eme\n"), OPEN))["client_name"] == "Acme"
    assert "client_name" not in json.loads(register(body(client_name="\u200b"), OPEN))


def test_name_of_combining_marks_takes_no_time_that_others_would_wait_for() -> None:
    began = time.process_time()
    for name in ("a" + "\u0301\u0316" * 15_000, "\u0301" * 15_000 + "\u0316" * 15_000):
        with pytest.raises(OAuthError, match="client_name"):
            register(body(client_name=name), OPEN)
    assert time.process_time() - began < 0.5, "sorting all of the marks takes seconds"


def test_registration_is_not_found_while_it_is_off() -> None:
    with pytest.raises(OAuthError) as error:
        register(body(), ClientPolicy(KNOWN, registers=False))
    assert error.value.status == 404


@pytest.mark.parametrize(
    ("uris", "accepted"),
    [
        ([CLAUDE], True),
        (["cursor://mcp/cb", "http://localhost:8787/cb"], True),
        ([URI], False),
        ([CLAUDE, URI], False),
        (["http://localhost/other"], False),
    ],
)
def test_only_redirect_uris_of_known_clients_register_where_registration_is_listed(
    uris: list[str], accepted: bool
) -> None:
    policy = ClientPolicy(KNOWN, registers_any=False)
    if accepted:
        register(body(redirect_uris=uris), policy)
        return
    with pytest.raises(OAuthError, match="known client"):
        register(body(redirect_uris=uris), policy)


@pytest.mark.parametrize(
    ("uri", "accepted"),
    [
        (URI, True),
        ("https://ACME.example:8443/x", True),
        (CLAUDE, True),
        ("http://localhost:1/x", True),
        ("com.example.app:/cb", True),
        ("https://evil.example/cb", False),
        ("https://sub.acme.example/cb", False),
        ("https://acme.example.evil.example/cb", False),
    ],
)
def test_https_redirect_hosts_are_those_that_the_operator_allows(uri: str, accepted: bool) -> None:
    policy = ClientPolicy(KNOWN, redirect_hosts=frozenset({"acme.example"}))
    assert (policy.registration_fault([uri]) is None) is accepted
