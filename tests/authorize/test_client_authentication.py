"""A client with a credential is served only if it proves to be that client, by exactly one method, each proof once."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote_plus

import jwt
import pytest
import trustme
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from jwt.algorithms import ECAlgorithm
from multidict import CIMultiDict

from keyproxy.authorize.clients import composition
from keyproxy.authorize.endpoint import CLIENT, PEER_CERTIFICATE
from keyproxy.config.oauth.oauth_settings import KnownClientRow
from keyproxy.oauth.client import row_id
from keyproxy.oauth.client_ids import encode_value_id
from keyproxy.oauth.oauth_error import OAuthError
from keyproxy.signing.client_assertions import ASSERTION_TYPE
from keyproxy.store.postgres.database import Database
from tests.authorize.authority import Authority, Reply, authorizing
from tests.authorize.document_server import DocumentServer, serving_documents
from tests.store.harness import Sql

SECRET = "kp_client_s3cret"
VALUE = encode_value_id(["https://acme.example/cb"], "Acme")
KEY, NEW_KEY, OTHER_KEY = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
_NETWORKS = itertools.count(1)
BEHIND_PROXY: dict[str, Any] = {"trusted_proxies": ["127.0.0.1"]}
SPIFFE = "uri:spiffe://example.com/worker"


def jwks(key: ec.EllipticCurvePrivateKey, kid: str = "k") -> dict[str, Any]:
    return {"keys": [{**ECAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid}]}


@pytest.fixture
async def authority(database: Database) -> AsyncIterator[Authority]:
    """A server behind a proxy."""
    async with authorizing(database, **BEHIND_PROXY) as authority:
        yield authority


@pytest.fixture
async def services(sql: Sql) -> None:
    """One registered client of each method."""
    for client_id, method, column, value in (
        ("public", "none", "secret_digest", None),
        ("by secret", "client_secret", "secret_digest", hashlib.sha256(SECRET.encode()).digest()),
        ("by key", "private_key_jwt", "jwks", json.dumps(jwks(KEY))),
        ("by tls", "tls_client_auth", "tls_subject", SPIFFE),
    ):
        await sql.execute(
            f"INSERT INTO keyproxy.oauth_clients (id, client_id, kind, name, auth_method, {column})"
            " VALUES ($1, $2, 'registered', 'Worker', $3, $4)",
            row_id(client_id), client_id, method, value,
        )  # fmt: skip


def basic(client_id: str, secret: str = SECRET, *, scheme: str = "Basic") -> dict[str, str]:
    text = f"{quote_plus(client_id)}:{quote_plus(secret)}"
    return {"Authorization": f"{scheme} {base64.b64encode(text.encode()).decode()}"}


class Assertions:
    """Signs assertions for a server."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._number = 0

    def form(
        self, client_id: str = "by key", key: ec.EllipticCurvePrivateKey = KEY, *, kid: str = "k", **claims: Any
    ) -> dict[str, str]:
        """The parameters with a new assertion."""
        self._number += 1
        now = int(self._authority.clock.wall_seconds)
        content = {
            "iss": client_id, "sub": client_id, "aud": self._authority.url, "jti": f"j-{self._number}", "exp": now + 60,
            **claims,
        }  # fmt: skip
        signed = jwt.encode(content, key, "ES256", headers={"kid": kid})
        return {"client_assertion": signed, "client_assertion_type": ASSERTION_TYPE}


async def revoke(authority: Authority, form: Mapping[str, str], headers: Mapping[str, str] | None = None) -> Reply:
    """A request that any authenticated client may make, without effect; each from another address, for the limits."""
    address = f"2001:db8:0:{next(_NETWORKS):x}::1"
    sent = {"X-Forwarded-For": address, **(headers or {})}
    return await authority.call("POST", "/oauth/revoke", form={"token": "none", **form}, headers=sent)


async def test_client_authenticates_by_its_method_alone(authority: Authority, services: None) -> None:
    sign = Assertions(authority).form
    post = {"client_id": "by secret", "client_secret": SECRET}
    for form, headers, status in (
        ({"client_id": "public"}, {}, 200),
        ({"client_id": VALUE}, {}, 200),
        (post, {}, 200),
        ({}, basic("by secret"), 200),
        ({}, basic("by secret", scheme="bAsIc"), 200),
        ({"client_id": "by secret"}, basic("by secret"), 200),
        (sign(), {}, 200),
        ({"client_id": "by key", **sign()}, {}, 200),
        # nothing, something wrong, or the method of another client
        ({}, {}, 401),
        ({"client_id": "unknown"}, {}, 401),
        ({"client_id": "public", "client_secret": SECRET}, {}, 401),
        ({"client_id": "by secret"}, {}, 401),
        ({**post, "client_secret": SECRET[:-1]}, {}, 401),
        ({**post, "client_secret": hashlib.sha256(SECRET.encode()).hexdigest()}, {}, 401),
        ({}, basic("by secret", ""), 401),
        ({}, basic("by key"), 401),
        ({}, basic("unknown"), 401),
        ({"client_id": "by key"}, {}, 401),
        ({"client_id": "by tls"}, {}, 401),
        (sign("by secret"), {}, 401),
        (sign("by tls"), {}, 401),
        (sign("public"), {}, 401),
        (sign(VALUE), {}, 401),
        (sign(key=OTHER_KEY), {}, 401),
        (sign(kid="x"), {}, 401),
        (sign(aud="https://other.example"), {}, 401),
        (sign(iss="by secret"), {}, 401),
        ({"client_id": "by secret", **sign()}, {}, 401),
        ({"client_id": "by key", **sign(sub="by secret")}, {}, 401),
        ({"client_assertion": sign()["client_assertion"]}, {}, 401),
        ({**sign(), "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:saml2-bearer"}, {}, 401),
        ({**sign(), "client_assertion": "x"}, {}, 401),
        ({}, {"Authorization": "Basic"}, 401),
        ({}, {"Authorization": "Basic !"}, 401),
        ({}, {"Authorization": "Basic " + base64.b64encode(b"by secret").decode()}, 401),
        ({}, {"Authorization": "Basic " + base64.b64encode(b"\xff:\xff").decode()}, 401),
        ({"client_id": "public"}, {"Authorization": "Bearer x"}, 401),
        # two at once
        (post, basic("by secret"), 400),
        ({**post, **sign()}, {}, 400),
        (sign(), basic("by key"), 400),
        ({"client_id": "public"}, basic("by secret"), 400),
    ):
        reply = await revoke(authority, form, headers)
        assert reply.status == status, (form, headers, reply.body)
        assert reply.error == {200: "", 400: "invalid_request", 401: "invalid_client"}[status]
        challenge = reply.headers.get("WWW-Authenticate")
        assert challenge == ('Basic realm="keyproxy"' if status == 401 and headers else None)
        assert SECRET.encode() not in reply.body


async def test_two_authorization_fields_are_refused_since_a_proxy_may_read_the_other_one(
    authority: Authority, services: None
) -> None:
    good, other = basic("by secret"), basic("by key", "x")
    for fields in ([good, other], [good, good], [{"Authorization": "Bearer x"}, good]):
        headers = CIMultiDict([(name, value) for field in fields for name, value in field.items()])
        for path in ("/oauth/revoke", "/oauth/introspect", "/oauth/token"):
            form = {"token": "none", "grant_type": "client_credentials"}
            reply = await authority.call("POST", path, form=form, headers=headers)
            assert (reply.status, reply.error) == (400, "invalid_request"), (path, fields)


async def test_disabled_client_is_refused_as_an_unknown_one(authority: Authority, services: None, sql: Sql) -> None:
    await sql.execute("UPDATE keyproxy.oauth_clients SET disabled_at = now()")
    refusals = {(await revoke(authority, form)).body for form in (
        {"client_id": "by secret", "client_secret": SECRET}, {"client_id": "unknown"}, Assertions(authority).form(),
    )}  # fmt: skip
    assert len(refusals) == 1
    assert json.loads(refusals.pop())["error"] == "invalid_client"


async def test_assertion_is_used_once(authority: Authority, services: None, sql: Sql) -> None:
    sign = Assertions(authority).form
    form = sign()
    assert [(await revoke(authority, form)).status for _ in range(2)] == [200, 401]
    # Another assertion with the same id is a replay too; the id of another client is not.
    assert (await revoke(authority, sign(jti="same"))).status == 200
    assert (await revoke(authority, sign(jti="same"))).status == 401
    await sql.execute(
        "INSERT INTO keyproxy.oauth_clients (id, client_id, kind, auth_method, jwks) VALUES ($1, 'second', 'registered',"
        " 'private_key_jwt', $2)", row_id("second"), json.dumps(jwks(OTHER_KEY)),
    )  # fmt: skip
    assert (await revoke(authority, sign("second", OTHER_KEY, jti="same"))).status == 200


async def test_assertion_that_does_not_verify_uses_up_no_id(authority: Authority, services: None) -> None:
    sign = Assertions(authority).form
    assert (await revoke(authority, sign(key=OTHER_KEY, jti="mine"))).status == 401
    assert (await revoke(authority, sign(jti="mine"))).status == 200


async def test_secret_of_another_server_does_not_disturb_a_public_client(authority: Authority) -> None:
    """Programs keep the secret that another server issued; a public client is protected by PKCE, not by secrets."""
    assert (await revoke(authority, {"client_id": VALUE, "client_secret": "stale"})).status == 200
    assert (await revoke(authority, {}, basic(VALUE, "stale"))).status == 200


async def test_certificate_authenticates_the_client_with_its_subject(database: Database, services: None) -> None:
    async with authorizing(database) as authority:
        authentication = composition.client_parts(authority.context, _never).authentication

        async def status(certificate: bytes | None, **form: str) -> int:
            request = make_mocked_request("POST", "/oauth/token")
            if certificate is not None:
                request[PEER_CERTIFICATE] = certificate
            try:
                client = await authentication.authenticate({"client_id": "by tls", **form}, request)
            except OAuthError as error:
                return error.status
            assert request[CLIENT] == client.row_id
            return 200

        right, wrong = certificate_of(SPIFFE), certificate_of("uri:spiffe://example.com/other")
        assert await status(right) == 200
        assert await status(wrong) == 401
        assert await status(None) == 401
        assert await status(right, client_secret=SECRET) == 400
        # A certificate is no substitute for a secret; and it does not disturb.
        assert await status(right, client_id="by secret") == 401
        assert await status(right, client_id="by secret", client_secret=SECRET) == 200


async def _never(_digest: bytes, _expires: object) -> bool:
    raise AssertionError("no assertion")


def certificate_of(subject: str) -> bytes:
    pem = trustme.CA().issue_cert("worker.example.com").cert_chain_pems[0].bytes()
    parsed = x509.load_pem_x509_certificate(pem)
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(subject.removeprefix("uri:"))])
    builder = x509.CertificateBuilder(
        parsed.issuer, parsed.subject, KEY.public_key(), 1, parsed.not_valid_before_utc, parsed.not_valid_after_utc
    )
    return builder.add_extension(names, critical=False).sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)


# -- clients with documents


@pytest.fixture
async def documents() -> AsyncIterator[DocumentServer]:
    async with serving_documents(trustme.CA()) as server:
        yield server


@pytest.fixture
async def with_documents(database: Database, documents: DocumentServer, tmp_path: Any) -> AsyncIterator[Authority]:
    """A server that accepts documents of this machine."""
    known = KnownClientRow("Listed", ["https://listed.example/cb"], [documents.url("/listed", "localhost")])
    async with authorizing(
        database,
        known_clients=(known,),
        document_networks=["127.0.0.0/8", "::1/128"],
        document_ca_file=documents.ca_file(tmp_path),
        **BEHIND_PROXY,
    ) as authority:
        yield authority


async def test_sent_assertion_is_verified_with_the_keys_of_the_document_also_for_listed_clients(
    with_documents: Authority, documents: DocumentServer
) -> None:
    sign = Assertions(with_documents).form
    documents.responses["/keys"] = json.dumps(jwks(KEY)).encode()
    keys = {"jwks_uri": documents.url("/keys", "localhost")}
    only = documents.publish("/only", "localhost", token_endpoint_auth_method="private_key_jwt", **keys)
    both = documents.publish(
        "/both", "localhost", token_endpoint_auth_methods_supported=["none", "private_key_jwt"], jwks=jwks(KEY)
    )
    listed = documents.publish("/listed", "localhost", token_endpoint_auth_method="private_key_jwt", **keys)
    none = documents.publish("/none", "localhost")
    for form, status in (
        (sign(only), 200),
        ({"client_id": only}, 401),
        ({"client_id": only, "client_secret": SECRET}, 401),
        (sign(only, OTHER_KEY), 401),
        (sign(both), 200),
        ({"client_id": both}, 200),
        (sign(both, OTHER_KEY), 401),
        (sign(listed), 200),
        ({"client_id": listed}, 200),
        (sign(listed, OTHER_KEY), 401),
        (sign(none), 401),
        ({"client_id": none}, 200),
        (sign(documents.url("/missing", "localhost")), 401),
    ):
        reply = await revoke(with_documents, form)
        assert reply.status == status, (form, reply.body)


async def test_keys_of_a_listed_client_are_fetched_from_its_vendors_hosts_where_other_documents_are_not_accepted(
    database: Database, documents: DocumentServer, tmp_path: Any
) -> None:
    listed = documents.publish(
        "/listed",
        "localhost",
        token_endpoint_auth_method="private_key_jwt",
        jwks_uri=documents.url("/keys", "localhost"),
    )
    documents.responses["/keys"] = json.dumps(jwks(KEY)).encode()
    async with authorizing(
        database,
        known_clients=(KnownClientRow("Listed", ["https://listed.example/cb"], [listed]),),
        documents="off",
        document_networks=["127.0.0.0/8", "::1/128"],
        document_ca_file=documents.ca_file(tmp_path),
        **BEHIND_PROXY,
    ) as authority:
        sign = Assertions(authority).form
        assert (await revoke(authority, sign(listed))).status == 200
        assert (await revoke(authority, sign(listed, OTHER_KEY))).status == 401
        assert (await revoke(authority, sign(documents.publish("/other", "localhost")))).status == 401
        assert "/other" not in documents.requests


async def test_new_key_of_a_client_works_and_unknown_ones_cause_one_fetch_in_30_seconds(
    with_documents: Authority, documents: DocumentServer
) -> None:
    sign = Assertions(with_documents).form
    documents.responses["/keys"] = json.dumps(jwks(KEY)).encode()
    client = documents.publish(
        "/c", "localhost", token_endpoint_auth_method="private_key_jwt", jwks_uri=documents.url("/keys", "localhost")
    )
    assert (await revoke(with_documents, sign(client))).status == 200
    documents.responses["/keys"] = json.dumps(jwks(NEW_KEY, "new")).encode()
    with_documents.clock.advance(30)
    assert (await revoke(with_documents, sign(client, NEW_KEY, kid="new"))).status == 200
    for _ in range(5):
        assert (await revoke(with_documents, sign(client, kid="x"))).status == 401
    assert documents.requests.count("/keys") == 2


async def test_keys_that_cannot_be_fetched_are_no_failed_authentication(
    with_documents: Authority, documents: DocumentServer
) -> None:
    async def fail(_request: Any) -> Any:
        return web.Response(status=500)

    documents.responses["/keys"] = fail
    client = documents.publish(
        "/c", "localhost", token_endpoint_auth_method="private_key_jwt", jwks_uri=documents.url("/keys", "localhost")
    )
    reply = await revoke(with_documents, Assertions(with_documents).form(client))
    assert (reply.status, reply.error) == (503, "temporarily_unavailable")
    assert int(reply.headers["Retry-After"]) > 0
