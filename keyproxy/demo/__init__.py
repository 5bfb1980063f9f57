"""`keyproxy demo`: the complete system on one machine, demonstrated and checked step by step.

Every part is real: a PostgreSQL, a compute server on its own socket, the proxy as `serve` runs it. Only the data
directory remains; the database of a run is dropped at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import aiohttp
import click
import uvloop

from keyproxy.ai.tools.tool import MCP
from keyproxy.auth.api_key import KeyFormat
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.config.schema import Listen, Ops, RouteRow, Settings, StoreSettings, Upstream
from keyproxy.demo import authority, delegation, tools
from keyproxy.demo.compute import CHAT, COMPLETIONS, JOBS, MCP_PATH, Compute
from keyproxy.demo.oauth_scene import authorizing, settings_of
from keyproxy.demo.story import Stage, Story
from keyproxy.model import AGENT_TOKENS
from keyproxy.platform import sockets
from keyproxy.process import app
from keyproxy.process.signing.key_rotation import KeyRotation
from keyproxy.store.directory.directory import Actor, Directory
from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.postgres import migrations, scratch_databases
from keyproxy.store.postgres.database import Database

_DATABASE_PREFIX: Final = "demo_"
_PORTS: Final = {"proxy": 8080, "ops": 9090, "authorize": 8082}

_log = logging.getLogger(__name__)


def run(directory: Path | None, *, once: bool, with_oauth: bool) -> int:
    """Run the demo. Returns 0 if every step passed. `with_oauth`: the steps of an MCP client that connects a user."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    started = time.monotonic()
    home = directory or embedded_postgres.default_directory(os.environ).with_name("demo")
    click.echo("Starting PostgreSQL …")
    server = embedded_postgres.start(home)
    try:
        click.echo(f"  {server.socket_directory} ({time.monotonic() - started:.1f} s)")
        return uvloop.run(_demo(server, home, once=once, with_oauth=with_oauth))
    finally:
        server.stop()


async def _demo(server: embedded_postgres.EmbeddedServer, home: Path, *, once: bool, with_oauth: bool) -> int:
    maintenance, name = server.dsn("postgres"), f"{_DATABASE_PREFIX}{secrets.token_hex(6)}"
    await scratch_databases.drop_unused(maintenance, _DATABASE_PREFIX)
    await scratch_databases.create(maintenance, name)
    try:
        await migrations.migrate(server.dsn(name))
        async with _everything(server.dsn(name), home, with_oauth=with_oauth) as story:
            await (story.play_oauth(is_attended=not once) if with_oauth else story.play())
            story.sum_up()
            stays = not once and not story.failures
            story.invite(stays=stays)
            if stays:
                await asyncio.Event().wait()
            return 1 if story.failures else 0
    except asyncio.CancelledError:
        click.echo("\nBye.")
        return 0
    finally:
        await scratch_databases.drop(maintenance, name)


@contextlib.asynccontextmanager
async def _everything(dsn: str, home: Path, *, with_oauth: bool) -> AsyncIterator[Story]:
    async with contextlib.AsyncExitStack() as stack:
        compute = await stack.enter_async_context(Compute().running())
        proxy_socket, ops_socket = _preferably(_PORTS["proxy"]), _preferably(_PORTS["ops"])
        authorize_socket = _preferably(_PORTS["authorize"]) if with_oauth else None
        settings = Settings(
            listen=Listen(address=sockets.address_of(proxy_socket), drain_seconds=1.0),
            ops=Ops(address=sockets.address_of(ops_socket)),
            upstream=Upstream(url=f"http://{compute.address}"),
            store=StoreSettings(dsn=dsn),
            routes=(
                RouteRow(f"POST {JOBS}", ["jobs:write"]),
                RouteRow(f"GET {JOBS}/{{id}}", ["jobs:read"]),
                RouteRow(f"POST {COMPLETIONS}", ["jobs:write"], tokens="openai"),
                RouteRow(f"POST {CHAT}", ["jobs:write"], tokens="openai"),
                RouteRow(f"POST {delegation.TOKENS_PATH}", ["agents:mint"], serves=AGENT_TOKENS),
                RouteRow(f"POST {authority.COLLECTIONS}/{{collection...}}", ["jobs:write"], binds=authority.BINDS),
                RouteRow(f"* {MCP_PATH}", protocol=MCP),
            ),
            tools=tools.TOOLS,
            models=authority.MODELS,
            oauth=OAuthSettings() if authorize_socket is None else settings_of(proxy_socket, authorize_socket),
        )
        if authorize_socket is not None:
            await stack.enter_async_context(authorizing(settings, dsn, authorize_socket))
        config_path = home / "demo.toml"
        config_path.write_text(f'[store]\ndsn = "{dsn}"\n', encoding="utf-8")
        log = stack.enter_context((home / "access.log").open("wb"))
        proxy = app.Proxy(settings, dsn, access_log_fd=log.fileno(), keys=KeyRotation().keys)
        await stack.enter_async_context(proxy.running(proxy_socket, ops_socket))
        second_socket = sockets.bind("127.0.0.1:0")
        second = app.Proxy(settings, dsn, access_log_fd=log.fileno(), keys=KeyRotation().keys)
        await stack.enter_async_context(second.running(second_socket, sockets.bind("127.0.0.1:0")))
        stage = Stage(settings, compute, (settings.listen.address, sockets.address_of(second_socket)), config_path)
        database = Database(dsn, pool_size_max=1, statement_timeout_seconds=10.0)
        await database.open()
        stack.push_async_callback(database.close)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        directory = Directory(database, KeyFormat(), Actor("demo", "local"))
        yield Story(stage, directory, session)


def _preferably(port: int) -> socket.socket:
    """This port, or any free one if it is in use. Never a shared port: a proxy may serve on it."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return socket.create_server(("127.0.0.1", 0))
