"""The metadata documents: where clients look for them, and what they promise."""

from __future__ import annotations

import pytest

from keyproxy.oauth.protected_resource import document
from keyproxy.store.postgres.database import Database
from tests.authorize.authority import SCOPES, Authority, authorizing

SERVER = "/.well-known/oauth-authorization-server"
OPENID = "/.well-known/openid-configuration"
RESOURCE = "/.well-known/oauth-protected-resource"


async def test_server_metadata_name_every_endpoint_at_the_issuers_origin(authority: Authority) -> None:
    reply = await authority.call("GET", SERVER)
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json")
    assert reply.json["issuer"] == authority.url
    assert {
        name: url.removeprefix(authority.url) for name, url in reply.json.items() if name.endswith("_endpoint")
    } == {
        "authorization_endpoint": "/oauth/authorize",
        "token_endpoint": "/oauth/token",
        "registration_endpoint": "/oauth/register",
        "revocation_endpoint": "/oauth/revoke",
        "introspection_endpoint": "/oauth/introspect",
    }
    assert reply.json["code_challenge_methods_supported"] == ["S256"]
    assert "none" in reply.json["token_endpoint_auth_methods_supported"]
    assert "none" not in reply.json["introspection_endpoint_auth_methods_supported"]
    assert reply.json["authorization_response_iss_parameter_supported"] is True
    assert reply.json["client_id_metadata_document_supported"] is True
    assert reply.json["scopes_supported"] == SCOPES
    assert "mtls_endpoint_aliases" not in reply.json


async def test_openid_configuration_is_the_same_document(authority: Authority) -> None:
    assert (await authority.call("GET", OPENID)).body == (await authority.call("GET", SERVER)).body


async def test_issuer_with_a_path_has_its_metadata_at_every_place_where_clients_look(database: Database) -> None:
    issuer = "https://mcp.example.com/auth"
    async with authorizing(database, issuer=issuer) as authority:
        for path in (SERVER, f"{SERVER}/auth", OPENID, f"{OPENID}/auth", f"/auth{OPENID}"):
            reply = await authority.call("GET", path)
            assert (reply.status, reply.json["issuer"]) == (200, issuer), path
            assert reply.json["token_endpoint"] == "https://mcp.example.com/oauth/token"
        assert (await authority.call("GET", f"{SERVER}/other")).status == 404


async def test_metadata_promise_only_what_is_configured(database: Database) -> None:
    async with authorizing(
        database, registration="off", documents="off", mtls_address="0.0.0.0:8443", issuer="https://mcp.example.com"
    ) as authority:
        document = (await authority.call("GET", SERVER)).json
    assert "registration_endpoint" not in document
    assert document["client_id_metadata_document_supported"] is False
    assert "tls_client_auth" in document["token_endpoint_auth_methods_supported"]
    assert document["tls_client_certificate_bound_access_tokens"] is True
    assert document["mtls_endpoint_aliases"] == {
        "token_endpoint": "https://mcp.example.com:8443/oauth/token",
        "revocation_endpoint": "https://mcp.example.com:8443/oauth/revoke",
        "introspection_endpoint": "https://mcp.example.com:8443/oauth/introspect",
    }


@pytest.mark.parametrize("path", [SERVER, OPENID])
async def test_scripts_of_any_origin_read_the_metadata_without_credentials(authority: Authority, path: str) -> None:
    reply = await authority.call("GET", path, headers={"Origin": "https://inspector.example"})
    assert reply.headers["Access-Control-Allow-Origin"] == "*"
    assert "Access-Control-Allow-Credentials" not in reply.headers
    preflight = await authority.call(
        "OPTIONS", path, headers={"Origin": "https://inspector.example", "Access-Control-Request-Method": "GET"}
    )
    assert (preflight.status, preflight.headers["Access-Control-Allow-Origin"]) == (204, "*")
    assert "GET" in preflight.headers["Access-Control-Allow-Methods"]
    assert "MCP-Protocol-Version" in preflight.headers["Access-Control-Allow-Headers"]


async def test_resources_have_the_metadata_that_the_proxy_publishes(authority: Authority) -> None:
    settings = authority.context.settings.oauth
    live, test = (document(resource, authority.url, SCOPES) for resource in (settings.resource, settings.test_resource))
    for path, content in ((RESOURCE, live), (f"{RESOURCE}/mcp", live), (f"{RESOURCE}/test-mcp", test)):
        reply = await authority.call("GET", path, headers={"Origin": "https://inspector.example"})
        assert (reply.status, reply.body) == (200, content)
        assert reply.headers["Access-Control-Allow-Origin"] == "*"
    assert (await authority.call("GET", f"{RESOURCE}/other")).status == 404


async def test_host_selects_between_resources_of_one_path(database: Database) -> None:
    live, test = "https://mcp.example.com/mcp", "https://test.example.com/mcp"
    async with authorizing(database, resource=live, test_resource=test) as authority:
        for host, resource in (("mcp.example.com", live), ("TEST.example.com", test), ("other.example", live)):
            reply = await authority.call("GET", f"{RESOURCE}/mcp", headers={"Host": host})
            assert reply.json["resource"] == resource
