"""OAuth access tokens in a real proxy: accepted for its resource, until the session ends or the resource changes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import aiohttp
import asyncpg

from tests.acceptance.conftest import Configure, Site, until
from tests.store.oauth_rows import RESOURCE, access_token, add_access_token, session_id

ISSUER = "https://mcp.example.com"
METADATA = "/.well-known/oauth-protected-resource"


class Client:
    """An OAuth client of the proxy of a site."""

    def __init__(self, site: Site, session: aiohttp.ClientSession) -> None:
        self._url = f"http://127.0.0.1:{site.proxy_port}"
        self._session = session

    async def call(self, number: int = 1, scheme: str = "Bearer", **headers: str) -> tuple[int, str]:
        """(status, code) of a call with an access token; the code is empty if the upstream responded."""
        token = access_token(number).reveal().decode()
        given = {"Authorization": f"{scheme} {token}"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        async with self._session.get(f"{self._url}/v1/jobs", headers=given) as response:
            content = await response.json(content_type=None)
            return response.status, content.get("code", "")

    async def resource(self) -> str:
        """The resource that the metadata name."""
        async with self._session.get(f"{self._url}{METADATA}") as response:
            resource: str = (await response.json())["resource"]
        return resource

    async def is_led_to(self, resource: str) -> bool:
        """Whether the challenge of a 401 leads to the metadata of this resource."""
        async with self._session.get(f"{self._url}/v1/jobs") as response:
            challenge = response.headers.getall("WWW-Authenticate")[0]
        return resource.replace(ISSUER, f"{ISSUER}{METADATA}") in challenge


def _resource(config: Path, resource: str) -> None:
    text = config.read_text(encoding="utf-8")
    before = next(line for line in text.splitlines() if line.startswith("resource = "))
    config.write_text(text.replace(before, f'resource = "{resource}"'), encoding="utf-8")


async def test_a_token_is_good_for_the_configured_resource_until_its_session_ends(
    configure: Configure, dsn: str
) -> None:
    site = configure(dsn, oauth={"issuer": ISSUER, "resource": RESOURCE, "scopes": ["jobs:write"]})
    await site.key()  # creates the user
    sql = await asyncpg.connect(dsn)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(sql.close)
        for number in (1, 2):
            await add_access_token(sql, number, session=number)
        process = await stack.enter_async_context(site.serving())
        client = Client(site, await stack.enter_async_context(aiohttp.ClientSession()))
        # Looked up by its digest alone, so that it works once it acts for no user.
        assert await client.call(2, X_Keyproxy_Act_For="u_42") == (403, "delegation_refused")
        assert await client.call(2) == await client.call() == (200, "")
        assert site.upstream.requests[-1].one("X-Keyproxy-Key-Id") == session_id(1)
        assert await client.resource() == RESOURCE
        assert await client.is_led_to(RESOURCE)
        # Another resource: a token for the former one is invalid at once.
        for resource, outcome in ((f"{ISSUER}/other", (401, "api_key_invalid")), (RESOURCE, (200, ""))):
            _resource(site.config, resource)
            process.send_signal(signal.SIGHUP)
            while await client.resource() != resource:
                await asyncio.sleep(0.02)
            assert await client.is_led_to(resource)
            assert await client.call() == outcome
        await sql.execute("DELETE FROM keyproxy.oauth_sessions WHERE id = $1", session_id(1))
        async with asyncio.timeout(1.0):
            while (await client.call())[0] == 200:
                await asyncio.sleep(0.02)
        assert await client.call() == (401, "api_key_invalid")
        assert await client.call(2) == (200, "")
        # A token in another format than the configured one is none, although it is cached.
        site.config.write_text(site.config.read_text(encoding="utf-8") + '[keys]\nprefix = "acme"\n', encoding="utf-8")
        process.send_signal(signal.SIGHUP)
        await site.until_logged("configuration reloaded", times=3)
        for scheme in ("Bearer", "Api-Key"):
            assert await client.call(2, scheme) == (401, "api_key_invalid")

        async def is_logged() -> bool:
            lines = [line for line in site.log() if line["path"] == METADATA]
            return any((line["route"], line["access"], line["code"]) == (METADATA, "public", "ok") for line in lines)

        await until(is_logged, "the metadata are logged")
        assert "kp_access_" not in b"".join(site.printed).decode()
