"""The scene of the demo in which an MCP client connects a user by OAuth, and an operator ends the connection."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import aiohttp
import click

from keyproxy.auth.api_key import KeyFormat
from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoints import parts_of
from keyproxy.authorize.listener import AuthorizeListener, Served
from keyproxy.authorize.metrics import OAuthCounts
from keyproxy.authorize.rate_limits import RateLimits
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.config.schema import Settings
from keyproxy.demo import browser, tools
from keyproxy.demo.compute import MCP_PATH
from keyproxy.demo.mcp_client import McpClient, SignInFailed
from keyproxy.platform import clock, sockets
from keyproxy.store.background import BackgroundTask
from keyproxy.store.directory.directory import Directory, KeyWish
from keyproxy.store.postgres.database import Database

_USER: Final = "u_frank"
_TOOL: Final = "search"

#: Of the key, and what the client asks for.
SCOPES: Final = ("data:read", "data:write")

#: The end of a session takes effect everywhere within this time after its commit.
_ENDED_SECONDS_MAX: Final = 1.0
_UNAUTHORIZED: Final = 401


def settings_of(proxy: socket.socket, authorize: socket.socket) -> OAuthSettings:
    """The table `[oauth]` of the demo."""
    address = sockets.address_of(authorize)
    return OAuthSettings(
        address=address,
        issuer=f"http://{address}",
        resource=f"http://{sockets.address_of(proxy)}{MCP_PATH}",
        scopes=list(SCOPES),
    )


@contextlib.asynccontextmanager
async def authorizing(settings: Settings, dsn: str, sock: socket.socket) -> AsyncIterator[None]:
    """The authorization server, on this socket. The secret of its tickets ends with it."""
    async with contextlib.AsyncExitStack() as stack:
        database = Database(dsn, pool_size_max=2, statement_timeout_seconds=10.0)
        await database.open()
        stack.push_async_callback(database.close)
        context = Context(
            settings,
            database,
            KeyFormat(settings.keys.prefix),
            (os.urandom(32),),
            clock.now,
            os.urandom,
            RateLimits(clock.now),
            OAuthCounts(),
        )
        parts = parts_of(context)
        for name, work in parts.tasks.items():
            task = BackgroundTask(name)
            task.start(work)
            stack.push_async_callback(task.end)
        listener = AuthorizeListener(Served(context, parts), log_line=None)
        stack.push_async_callback(listener.close)
        await listener.start(sock)
        yield


@dataclass(frozen=True, slots=True)
class OAuthScene:
    """The steps. `begin`: print the title and the request of the next one; `judge`: its errors.

    `is_attended`: a person signs in, in a browser of their own.
    """

    session: aiohttp.ClientSession
    settings: Settings
    config_path: Path
    directory: Directory
    begin: Callable[[str, str], str]
    judge: Callable[[str, list[str]], None]
    is_attended: bool

    async def play(self) -> str:
        """A client discovers, registers, signs its user in, calls, refreshes, and is ended. Returns the user's key."""
        await self.directory.tenants.create("acme", "Acme Ltd")
        wish = KeyWish("laptop", SCOPES, expires_in=timedelta(days=7))
        made = await self.directory.users.create(_USER, "acme", wish)
        key: str = made["key"]["secret"]
        client = McpClient(self.session, self.settings.oauth.resource)
        try:
            await self._discover(client)
            await self._register(client)
            await self._sign_in(client, key)
            await self._call(client)
            await self._end(client)
        except SignInFailed as error:
            self.judge("The client connects", [str(error)])
        return key

    async def _discover(self, client: McpClient) -> None:
        title = self.begin(
            "An MCP client that knows only the URL finds out where its user signs in",
            f"{MCP_PATH}   initialize, without a token",
        )
        challenge = await client.discover()
        click.echo(f"   < 401 WWW-Authenticate: {challenge.partition(', Api-Key')[0]}")
        self.judge(title, [] if "resource_metadata" in challenge else [challenge])

    async def _register(self, client: McpClient) -> None:
        title = self.begin("The client registers; nothing is stored for it", "/oauth/register")
        client_id = await client.register()
        again = await client.register()
        click.echo(f"   < 201 {client_id[:24]}… ({len(client_id)} characters, the same every time)")
        wrong = [] if client_id == again else [f"another id: {again}"]
        stored = await self.directory.oauth_clients.list_by_id("", 10)
        self.judge(title, [*wrong, *(f"client {one['id']} is stored" for one in stored)])

    async def _sign_in(self, client: McpClient, key: str) -> None:
        title = self.begin("frank signs in with a key and allows the client what it asks for", "/oauth/consent")
        tokens = await client.sign_in(lambda url: self._open(url, key))
        (session,) = await self.directory.oauth_sessions.list_by_id("", 10)
        click.echo(
            f"   < a token for {tokens['expires_in']} seconds with the scopes {tokens['scope']}\n"
            f"   < session {session['id']} of {session['user']}, client {session['client_name']}"
        )
        self.judge(title, [] if session["user"] == _USER else [f"the session is of {session['user']}"])

    async def _open(self, url: str, key: str) -> None:
        if self.is_attended:
            click.echo(f"\n   Open this page and sign in with {key}:\n\n   {url}\n")
        else:
            pages = await browser.allow(url, key)
            click.echo(f"   frank's browser: {', '.join(pages)}")

    async def _call(self, client: McpClient) -> None:
        title = self.begin("The client calls a tool for frank, then refreshes its token", f"{MCP_PATH}   {_TOOL}")
        first = await client.call(_TOOL, tools.ARGUMENTS[_TOOL])
        await client.refresh()
        second = await client.call(_TOOL, tools.ARGUMENTS[_TOOL])
        click.echo(f"   < {first}\n   < {second}, with the new token")
        self.judge(title, [str(one) for one in (first, second) if one.received.get("user") != _USER])

    async def _end(self, client: McpClient) -> None:
        title = self.begin("An operator ends the session, and its tokens with it", f"{MCP_PATH}   {_TOOL}")
        (session,) = await self.directory.oauth_sessions.list_by_id("", 10)
        arguments = ("oauth", "session", "revoke", session["id"])
        click.echo(f"   $ keyproxy {shlex.join(arguments)}")
        _, error = await tools.run(self.config_path, *arguments)
        ended = time.monotonic()
        while True:
            response, delay = await client.call(_TOOL, tools.ARGUMENTS[_TOOL]), time.monotonic() - ended
            if response.status == _UNAUTHORIZED or delay > _ENDED_SECONDS_MAX:
                break
        wrong = [error] if error else []
        wrong += [] if response.code == "api_key_invalid" else [f"{response} after {delay:.3f} s"]
        try:
            await client.refresh()
            wrong.append("the refresh token still works")
        except SignInFailed as refusal:
            click.echo(f"   < {response}, at most {delay * 1000:.1f} ms after the command\n   < {refusal}")
            wrong += [] if "invalid_grant" in str(refusal) else [str(refusal)]
        self.judge(title, wrong)
