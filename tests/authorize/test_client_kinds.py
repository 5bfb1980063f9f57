"""Clients of every kind connect a user and keep their session, whatever order they do things in."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
import trustme

from keyproxy.config.oauth.oauth_settings import KnownClientRow
from keyproxy.oauth.client import row_id
from keyproxy.oauth.client_ids import encode_value_id
from keyproxy.store.postgres.database import Database
from tests.authorize.authority import Authority, Reply, authorizing, pkce
from tests.authorize.browser.browser import REDIRECT_URI, Browser
from tests.authorize.document_server import DocumentServer, serving_documents
from tests.authorize.test_client_authentication import BEHIND_PROXY, KEY, OTHER_KEY, SECRET, Assertions, basic, jwks
from tests.store.harness import Sql

LISTED = "https://listed.example/cb"


@pytest.fixture
async def documents() -> AsyncIterator[DocumentServer]:
    async with serving_documents(trustme.CA()) as server:
        yield server


@pytest.fixture
async def authority(database: Database, documents: DocumentServer, tmp_path: Path) -> AsyncIterator[Authority]:
    """A server that knows one client, and accepts documents of this machine."""
    async with authorizing(
        database,
        known_clients=(KnownClientRow("Listed", [LISTED]),),
        document_networks=["127.0.0.0/8", "::1/128"],
        document_ca_file=documents.ca_file(tmp_path),
        **BEHIND_PROXY,
    ) as authority:
        yield authority


async def exchange(
    authority: Authority, form: Mapping[str, str], headers: Mapping[str, str] | None = None, **more: str
) -> Reply:
    return await authority.call("POST", "/oauth/token", form={**form, **more}, headers=headers)


async def connect(
    authority: Authority,
    client_id: str,
    secret: str,
    *,
    redirect_uri: str = REDIRECT_URI,
    proof: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    repeats_uri: bool = True,
) -> str:
    """The refresh token of a new session of this client."""
    code = await Browser(authority).code(client_id, secret, redirect_uri=redirect_uri)
    form = {"grant_type": "authorization_code", "code": code, "code_verifier": pkce()[0], **(proof or {})}
    form |= {"redirect_uri": redirect_uri} if repeats_uri else {}
    form |= {} if headers or proof else {"client_id": client_id}
    reply = await exchange(authority, form, headers)
    assert reply.status == 200, reply.body
    return str(reply.json["refresh_token"])


def refresh(refresh_token: str, **more: str) -> dict[str, str]:
    return {"grant_type": "refresh_token", "refresh_token": refresh_token, **more}


@pytest.mark.parametrize("repeats_uri", [True, False])
async def test_listed_client_may_present_any_id_and_keeps_its_session(
    authority: Authority, sql: Sql, *, repeats_uri: bool
) -> None:
    secret = (await authority.user())["key"]["secret"]
    ids = ("stale-id-of-another-server", "https://unreachable.invalid/c", encode_value_id([LISTED], "Listed"))
    for client_id in ids:
        token = await connect(authority, client_id, secret, redirect_uri=LISTED, repeats_uri=repeats_uri)
        reply = await exchange(authority, refresh(token, client_id=client_id, client_secret="of another server"))
        assert reply.status == 200, (client_id, reply.body)
        assert (await exchange(authority, refresh(reply.json["refresh_token"], client_id="another"))).status == 401
    rows = await sql.fetch("SELECT client_id, kind FROM keyproxy.oauth_clients")
    assert [tuple(row) for row in rows] == [("listed:Listed", "listed")]
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_grants") == 1
    assert await sql.fetchval("SELECT count(DISTINCT presented_as) FROM keyproxy.oauth_sessions") == len(ids)


async def test_id_that_was_registered_later_or_never_is_the_same_client(authority: Authority, sql: Sql) -> None:
    """Authorizing first, registering again and registering 50 times make one client."""
    secret, browser = (await authority.user())["key"]["secret"], Browser(authority)
    never_registered = encode_value_id([REDIRECT_URI], "Acme")
    token = await connect(authority, never_registered, secret)
    assert {await browser.client() for _ in range(15)} == {never_registered}
    assert (await exchange(authority, refresh(token, client_id=never_registered))).status == 200
    await sql.execute("DELETE FROM keyproxy.oauth_clients")
    assert (await exchange(authority, refresh(token, client_id=never_registered))).error == "invalid_grant"
    await connect(authority, never_registered, secret)
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_clients") == 1


async def test_native_program_gets_its_code_on_any_loopback_port(authority: Authority) -> None:
    secret, browser = (await authority.user())["key"]["secret"], Browser(authority)
    client_id = await browser.client("http://127.0.0.1:33418/cb")
    await connect(authority, client_id, secret, redirect_uri="http://127.0.0.1:49152/cb")
    code = await browser.code(client_id, secret, redirect_uri="http://127.0.0.1:49153/cb")
    form = {"grant_type": "authorization_code", "code": code, "code_verifier": pkce()[0], "client_id": client_id}
    # At the token endpoint the redirect URI is the one of the authorization request, port included.
    assert (await exchange(authority, form, redirect_uri="http://127.0.0.1:49152/cb")).error == "invalid_grant"
    assert (await exchange(authority, form, redirect_uri="http://127.0.0.1:49153/cb")).status == 200


async def test_session_of_a_document_client_survives_the_loss_of_its_document(
    authority: Authority, documents: DocumentServer, sql: Sql
) -> None:
    secret = (await authority.user())["key"]["secret"]
    client_id = documents.publish("/c", "localhost")
    token = await connect(authority, client_id, secret)
    fetches = len(documents.requests)
    documents.responses.clear()
    authority.clock.advance(86_400)
    assert (await exchange(authority, refresh(token, client_id=client_id))).status == 200
    assert len(documents.requests) == fetches
    assert (await Browser(authority).authorize(client_id)).status == 400
    assert await sql.fetchval("SELECT kind FROM keyproxy.oauth_clients") == "document"


async def test_document_client_with_keys_must_sign_for_its_code_and_each_refresh(
    authority: Authority, documents: DocumentServer
) -> None:
    secret, sign = (await authority.user())["key"]["secret"], Assertions(authority).form
    client_id = documents.publish("/c", "localhost", token_endpoint_auth_method="private_key_jwt", jwks=jwks(KEY))
    token = await connect(authority, client_id, secret, proof=sign(client_id))
    for form in (refresh(token, client_id=client_id), refresh(token, **sign(client_id, OTHER_KEY))):
        assert (await exchange(authority, form)).error == "invalid_client"
    # Neither the redirect URI of a known client nor a code of one's own makes it another client, which need not sign.
    other = await Browser(authority).code(client_id, secret, redirect_uri=LISTED)
    for more in ({"scope": ""}, {"code": "x"}, {"token": "x"}, {"code": other}):
        form = refresh(token, client_id=client_id, redirect_uri=LISTED, **more)
        assert (await exchange(authority, form)).error == "invalid_client", more
    assert (await exchange(authority, refresh(token, **sign(client_id)))).status == 200


async def test_stolen_code_and_token_of_a_confidential_client_are_worth_nothing_without_its_secret(
    authority: Authority, sql: Sql
) -> None:
    secret = (await authority.user())["key"]["secret"]
    await sql.execute(
        "INSERT INTO keyproxy.oauth_clients (id, client_id, kind, name, redirect_uris, auth_method, secret_digest)"
        " VALUES ($1, 'web', 'registered', 'Web', $2, 'client_secret', $3)",
        row_id("web"), [REDIRECT_URI], hashlib.sha256(SECRET.encode()).digest(),
    )  # fmt: skip
    token = await connect(authority, "web", secret, headers=basic("web"))
    value = encode_value_id([REDIRECT_URI], "Web")
    for form, headers in (
        (refresh(token, client_id="web"), {}),
        (refresh(token, client_id="web", client_secret="wrong"), {}),
        (refresh(token), basic("web", "wrong")),
        (refresh(token, client_id=value), {}),
        (refresh(token, client_id="listed:Listed"), {}),
        (refresh(token, client_id="web", redirect_uri=LISTED), {}),
        (refresh(token, client_id="other", redirect_uri=LISTED), {}),
    ):
        assert (await exchange(authority, form, headers)).status in (400, 401), form
    assert (await exchange(authority, refresh(token), basic("web"))).status == 200
    code = await Browser(authority).code("web", secret)
    stolen = {"grant_type": "authorization_code", "code": code, "code_verifier": pkce()[0]}
    for more in ({"client_id": "web"}, {"client_id": "other", "redirect_uri": LISTED}, {"client_id": value}):
        assert (await exchange(authority, stolen | more)).status in (400, 401), more
    assert (await exchange(authority, stolen, basic("web"))).status == 200


async def test_browser_is_never_sent_to_a_redirect_uri_that_the_client_does_not_have(
    authority: Authority, documents: DocumentServer
) -> None:
    """Open redirect: the errors of such a request are pages."""
    document = documents.publish("/c", "localhost", redirect_uris=[REDIRECT_URI, "https://other.example/cb"])
    value = encode_value_id([REDIRECT_URI], "Acme")
    for client_id, redirect_uri in (
        (value, "https://evil.example/cb"),
        (value, REDIRECT_URI + "/../evil"),
        (value, REDIRECT_URI.replace("acme.example", "acme.example@evil.example")),
        (value, "javascript:alert(1)"),
        (value, LISTED.replace("listed.example", "LISTED.example")),
        (value, LISTED + "?x"),
        (document, "https://evil.example/cb"),
        (document, "http://127.0.0.1/cb"),
        ("https://localhost/c", REDIRECT_URI),
        ("https://169.254.169.254/latest/meta-data", REDIRECT_URI),
        ("https://unknown.invalid/c", REDIRECT_URI),
        ("stale", REDIRECT_URI),
    ):
        for changed in ({}, {"response_type": "token"}, {"code_challenge": None}):
            reply = await Browser(authority).authorize(client_id, redirect_uri=redirect_uri, **changed)
            assert reply.status == 400, (client_id, redirect_uri)
            assert "Location" not in reply.headers
            assert b"evil.example/cb" not in reply.body
