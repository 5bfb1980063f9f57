"""Logins at a real OpenID provider, the package oidc-provider, with each algorithm of its id_tokens."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import aiohttp
import pytest
from yarl import URL

from keyproxy.authorize.oidc.oidc_login import CALLBACK_PATH
from keyproxy.config.oauth.oauth_settings import OAuthLogin
from keyproxy.store.postgres.database import Database
from tests import npm_packages
from tests.authorize.authority import authorizing
from tests.authorize.oidc.browser import Browser

PACKAGES = {"oidc-provider": "9.13.3"}
#: Where browsers reach the authorization server: nothing listens there, as the test follows redirects itself.
ISSUER = "http://127.0.0.1:1"
SCRIPT = Path(__file__).with_name("provider.mjs")


@pytest.fixture(scope="session")
def issuer() -> Iterator[str]:
    """The issuer of a provider in a process of its own."""
    directory = npm_packages.installed(PACKAGES)
    # Node looks packages up beside a script, or in the working directory for one that is no file.
    command = ["node", "--input-type=module", "-e", SCRIPT.read_text(encoding="utf-8")]
    with subprocess.Popen(
        command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line, "the provider does not start"
        yield line
        process.stdin.close()


async def registered(session: aiohttp.ClientSession, issuer: str, **metadata: str) -> Mapping[str, Any]:
    """The client that the authorization server is for the provider."""
    wanted = {"redirect_uris": [ISSUER + CALLBACK_PATH], **metadata}
    async with session.post(f"{issuer}/reg", json=wanted) as response:
        client: dict[str, Any] = await response.json()
    assert response.status == 201, client
    return client


async def signed_in(session: aiohttp.ClientSession, location: str, user: str) -> URL:
    """Sign in and consent at the provider as a person does. Returns where that leads."""
    for _ in range(10):
        async with session.get(location, allow_redirects=False) as response:
            page = await response.text()
        if response.status == 200:
            form = dict(re.findall(r'name="(prompt)" value="(\w+)"', page)) | {"login": user, "password": "x"}
            async with session.post(location, data=form, allow_redirects=False) as response:
                page = await response.text()
        assert response.status in (302, 303), page
        location = urljoin(location, response.headers["Location"])
        if location.startswith(ISSUER):
            return URL(location)
    raise AssertionError(location)


@pytest.mark.parametrize(
    ("algorithm", "method"),
    [
        ("RS256", "client_secret_basic"),
        ("PS256", "client_secret_post"),
        ("ES256", "none"),
        ("EdDSA", "client_secret_basic"),
    ],
)
async def test_user_signs_in_at_a_real_provider(database: Database, issuer: str, algorithm: str, method: str) -> None:
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(cookie_jar=jar) as session:
        client = await registered(
            session, issuer, id_token_signed_response_alg=algorithm, token_endpoint_auth_method=method
        )
        login = OAuthLogin(
            kind="oidc", issuer=issuer, client_id=client["client_id"], provision="create", tenant_claim="org",
            tenants={"acme.example": "acme"},
        )  # fmt: skip
        secret = client.get("client_secret")
        async with authorizing(database, login=login, login_secret=secret, issuer=ISSUER) as authority:
            await authority.user()
            browser = Browser(authority)
            begun = await browser.begin()
            callback = await signed_in(session, begun.headers["Location"], "ada@acme.example")
            page = await browser.call("GET", callback.path, query=callback.query)
            tokens = await browser.exchange(await browser.decide(page))
            assert (tokens.status, tokens.json["token_type"]) == (200, "Bearer")
            replayed = await browser.call("GET", callback.path, query=callback.query)
            assert (replayed.status, "Location" in replayed.headers) == (403, False)
            # Signed in at the provider already, as one of an organisation without a tenant.
            jar.clear()
            begun = await browser.begin(prompt="login")
            callback = await signed_in(session, begun.headers["Location"], "eve@other.example")
            assert (await browser.call("GET", callback.path, query=callback.query)).status == 403
