"""An MCP client that is given only the URL of a server: it finds out where its user signs in, registers, and gets tokens.

https://modelcontextprotocol.io/specification/2025-11-25/basic/authorization
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode, urlsplit

import aiohttp
from aiohttp import web

from keyproxy.platform import sockets

NAME: Final = "Demo client"

_CALLBACK: Final = "/callback"
_VERSION: Final = "2025-11-25"
_METADATA = re.compile(r'resource_metadata="([^"]+)"')

_UNAUTHORIZED: Final = 401


class SignInFailed(Exception):
    """The authorization server refused the client or its user. The text is the reason."""


class McpCall(NamedTuple):
    """The response to a call. `received`: what the MCP server received; `code`: of a refusal."""

    status: int
    received: Mapping[str, Any]
    code: str

    def __str__(self) -> str:
        if self.received:
            return f"{self.status} the MCP server executed {self.received['tool']} for {self.received['user']}"
        return f"{self.status} {self.code}"


class McpClient:
    """A public client: it has no secret. `url`: of the MCP server."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._resource: Mapping[str, Any] = {}
        self._server: Mapping[str, Any] = {}
        self._tokens: Mapping[str, Any] = {}
        self.client_id = ""

    async def discover(self) -> str:
        """Send a request without a token, and follow its challenge to the metadata. Returns the challenge."""
        initialize = {"protocolVersion": _VERSION, "capabilities": {}, "clientInfo": {"name": NAME, "version": "1"}}
        async with self._post("initialize", initialize) as response:
            challenge: str = response.headers.get("WWW-Authenticate", "")
            found = _METADATA.search(challenge)
            if response.status != _UNAUTHORIZED or found is None:
                raise SignInFailed(f"status {response.status} without a challenge that names metadata")
        self._resource = await self._get(found[1])
        issuer = self._resource["authorization_servers"][0]
        self._server = await self._get(f"{issuer}/.well-known/oauth-authorization-server")
        return challenge

    async def register(self) -> str:
        """Get an id from the authorization server, and return it."""
        # RFC 8252, section 7.3: the port of a loopback redirect URI is known when the client listens.
        metadata = {"client_name": NAME, "redirect_uris": [f"http://127.0.0.1{_CALLBACK}"]}
        async with self._session.post(self._server["registration_endpoint"], json=metadata) as response:
            self.client_id = str((await _checked(response))["client_id"])
        return self.client_id

    async def sign_in(self, open_url: Callable[[str], Awaitable[None]]) -> Mapping[str, Any]:
        """Send the user to the authorization server, and exchange the code for tokens. Returns them.

        `open_url`: opens a browser, in which the user decides.
        """
        verifier, state = secrets.token_urlsafe(48), secrets.token_urlsafe(16)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        async with _loopback() as (redirect_uri, returned):
            query = {
                "response_type": "code",
                "client_id": self.client_id,
                "redirect_uri": redirect_uri,
                "code_challenge": challenge,
                "code_challenge_method": "S256",
                "state": state,
                "resource": self._resource["resource"],
                "scope": " ".join(self._resource["scopes_supported"]),
            }
            await open_url(f"{self._server['authorization_endpoint']}?{urlencode(query)}")
            query = await returned
        if (query.get("state"), query.get("iss")) != (state, self._server["issuer"]):
            raise SignInFailed("the response is not for this request, or not from this server")
        if "code" not in query:
            raise SignInFailed(query.get("error", "no code"))
        return await self._token(
            grant_type="authorization_code", code=query["code"], redirect_uri=redirect_uri, code_verifier=verifier
        )

    async def refresh(self) -> Mapping[str, Any]:
        """Exchange the refresh token for new tokens, and return them."""
        return await self._token(grant_type="refresh_token", refresh_token=self._tokens["refresh_token"])

    async def call(self, tool: str, arguments: Mapping[str, object]) -> McpCall:
        """Call a tool with the access token."""
        async with self._post("tools/call", {"name": tool, "arguments": arguments}) as response:
            content = await response.json(content_type=None)
            received = content.get("result", {}).get("structuredContent", {})
            return McpCall(response.status, received, content.get("error", {}).get("data", {}).get("code", ""))

    async def _token(self, **form: str) -> Mapping[str, Any]:
        form |= {"client_id": self.client_id, "resource": self._resource["resource"]}
        async with self._session.post(self._server["token_endpoint"], data=form) as response:
            self._tokens = await _checked(response)
        return self._tokens

    def _post(self, method: str, params: Mapping[str, object]) -> Any:
        headers = {"Accept": "application/json, text/event-stream"}
        if self._tokens:
            headers["Authorization"] = f"Bearer {self._tokens['access_token']}"
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return self._session.post(self._url, json=message, headers=headers)

    async def _get(self, url: str) -> Mapping[str, Any]:
        async with self._session.get(url) as response:
            return await _checked(response)


async def _checked(response: aiohttp.ClientResponse) -> Mapping[str, Any]:
    """The JSON of a response. Raises SignInFailed."""
    content: Mapping[str, Any] = await response.json(content_type=None)
    if not response.ok:
        path = urlsplit(str(response.url)).path
        raise SignInFailed(f"{path}: {response.status} {content.get('error')}: {content.get('error_description')}")
    return content


@contextlib.asynccontextmanager
async def _loopback() -> AsyncIterator[tuple[str, asyncio.Future[dict[str, str]]]]:
    """Listen for the browser's return: the redirect URI, and its parameters once it has come."""
    returned: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()

    async def callback(request: web.Request) -> web.Response:
        if not returned.done():
            returned.set_result(dict(request.query))
        return web.Response(text="You can close this window.")

    application = web.Application()
    application.router.add_get(_CALLBACK, callback)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    sock = sockets.bind("127.0.0.1:0")
    await web.SockSite(runner, sock).start()
    try:
        yield f"http://{sockets.address_of(sock)}{_CALLBACK}", returned
    finally:
        await runner.cleanup()
