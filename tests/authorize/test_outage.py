"""While the store is down: what needs no store works, and everything else can be repeated."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from keyproxy.store.postgres.database import Database
from tests.authorize.authority import Authority, authorizing, pkce


@pytest.fixture
async def authority() -> AsyncIterator[Authority]:
    """A server whose store does not exist."""
    database = Database("postgresql://127.0.0.1:1/nowhere", pool_size_max=1, statement_timeout_seconds=1.0)
    await database.open()
    async with authorizing(database) as authority:
        yield authority
    await database.close()


async def test_metadata_and_registration_need_no_store(authority: Authority) -> None:
    program = {"redirect_uris": ["https://acme.example/cb"]}
    resource = "oauth-protected-resource"
    for path in ("oauth-authorization-server", "openid-configuration", resource, f"{resource}/mcp"):
        assert (await authority.call("GET", f"/.well-known/{path}")).status == 200, path
    assert (await authority.call("POST", "/oauth/register", content=program)).status == 201


async def test_browser_gets_a_page_and_no_redirect(authority: Authority) -> None:
    program = {"redirect_uris": ["https://acme.example/cb"]}
    client_id = (await authority.call("POST", "/oauth/register", content=program)).json["client_id"]
    query = {
        "response_type": "code",
        "client_id": client_id,
        "redirect_uri": "https://acme.example/cb",
        "code_challenge": pkce()[1],
        "code_challenge_method": "S256",
    }
    reply = await authority.call("GET", "/oauth/authorize", query=query)
    assert reply.status == 503
    assert "Location" not in reply.headers
    assert reply.headers["Content-Type"].startswith("text/html")
    assert int(reply.headers["Retry-After"]) > 0


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("/oauth/token", {"grant_type": "authorization_code", "code": "c" * 43, "code_verifier": "v" * 43}),
        ("/oauth/token", {"grant_type": "refresh_token", "refresh_token": "kp_refresh_" + "a" * 49}),
        ("/oauth/token", {"grant_type": "client_credentials"}),
        ("/oauth/revoke", {"token": "kp_access_" + "a" * 49}),
        ("/oauth/introspect", {"token": "kp_access_" + "a" * 49}),
    ],
)
async def test_token_requests_get_503_and_are_no_failures_of_the_client(
    authority: Authority, path: str, form: dict[str, str]
) -> None:
    for _ in range(11):
        reply = await authority.call("POST", path, form={"client_id": "worker", "client_secret": "s" * 40, **form})
    assert (reply.status, reply.error) == (503, "temporarily_unavailable")
    assert int(reply.headers["Retry-After"]) > 0
    assert reply.headers["Cache-Control"] == "no-store"
