"""`keyproxy serve` and `keyproxy authorize` before an MCP server, as processes that the tests of a module share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import ssl
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trustme
import uvicorn
from mcp.server.mcpserver import Context, MCPServer

from keyproxy.auth.api_key import KeyFormat
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.config.schema import Settings
from keyproxy.oauth.client import AuthMethod
from keyproxy.store.directory.directory import Actor, Directory, KeyWish
from keyproxy.store.directory.oauth.client_wish import OAuthClientWish
from keyproxy.store.postgres.database import Database
from tests.authorize.processes import started
from tests.rawhttp import free_port
from tests.waiting import wait_until

SCOPES = ("jobs:read", "jobs:write")


@dataclass
class Deployment:
    """The running processes. `documents`: the origin of metadata documents. `log`: of the authorization server.

    `users`: the user and session that the MCP server has seen, by the argument of the call.
    """

    dsn: str
    proxy: str
    issuer: str
    ops: str
    documents: str = ""
    log: Path = Path()
    users: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def resource(self) -> str:
        """The URL of the MCP server."""
        return f"{self.proxy}/mcp"

    async def key(self, user: str, scopes: Sequence[str] = SCOPES) -> str:
        """The secret of a key of this user, who is created if missing."""
        async with self._directory() as directory:
            await directory.tenants.create("acme", "")
            await directory.users.create(user, "acme", None)
            return str((await directory.keys.issue(user, KeyWish(scopes=scopes)))["secret"])

    @contextlib.asynccontextmanager
    async def _directory(self, settings: Settings | None = None) -> AsyncIterator[Directory]:
        database = Database(self.dsn, pool_size_max=1, statement_timeout_seconds=5.0)
        await database.open()
        try:
            yield Directory(database, KeyFormat(), Actor("test", "local"), settings=settings)
        finally:
            await database.close()

    async def machine(self, client_id: str, user: str, jwks: object = None) -> str:
        """Register a client that gets tokens for this user. Returns its secret, empty if it has keys."""
        await self.key(user)
        wish = OAuthClientWish(
            client_id,
            AuthMethod.CLIENT_SECRET if jwks is None else AuthMethod.PRIVATE_KEY_JWT,
            user=user,
            scopes=["jobs:write"],
            jwks=jwks,
        )
        settings = Settings(oauth=OAuthSettings(issuer=self.issuer, resource=self.resource, scopes=list(SCOPES)))
        async with self._directory(settings) as directory:
            return str((await directory.oauth_clients.create(wish))["secret"] or "")

    def requests(self, route: str) -> list[dict[str, Any]]:
        """The log lines of the authorization server for an endpoint."""
        lines = [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line["route"] == route]


@contextlib.contextmanager
def deployed(dsn: str, home: Path) -> Iterator[Deployment]:
    """A deployment on free ports until the context ends."""
    proxy, issuer, ops = (f"http://127.0.0.1:{free_port()}" for _ in range(3))
    deployment = Deployment(dsn, proxy, issuer, ops)
    with contextlib.ExitStack() as stack:
        certificates = trustme.CA()
        certificates.cert_pem.write_to_path(str(home / "ca.pem"))
        deployment.documents = stack.enter_context(_documents(certificates))
        upstream = stack.enter_context(_mcp_server(deployment))
        (home / "secret").write_bytes(secrets.token_bytes(32))
        config = _config(deployment, upstream, home)
        stack.enter_context(started("serve", config, f"{proxy}/mcp"))
        deployment.log = stack.enter_context(started("authorize", config, f"{ops}/livez")).out
        yield deployment


def _config(deployment: Deployment, upstream: str, home: Path) -> Path:
    tables: dict[str, dict[str, Any]] = {
        "listen": {"address": deployment.proxy.removeprefix("http://")},
        "ops": {"address": f"127.0.0.1:{free_port()}"},
        "upstream": {"url": upstream},
        "store": {"dsn": deployment.dsn},
        "oauth": {
            "address": deployment.issuer.removeprefix("http://"),
            "ops_address": deployment.ops.removeprefix("http://"),
            # Tests take the addresses of many clients, as a proxy in front would pass them on.
            "trusted_proxies": ["127.0.0.0/8"],
            "issuer": deployment.issuer,
            "resource": deployment.resource,
            "scopes": list(SCOPES),
            "secret_file": str(home / "secret"),
            "document_networks": ["127.0.0.0/8"],
            "document_ca_file": str(home / "ca.pem"),
        },
    }
    lines = []
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    lines += ["[[routes]]", 'match = "* /mcp"', 'protocol = "mcp"', 'scopes = ["jobs:write"]']
    lines += ["[[tools]]", 'name = "whoami"']
    config = home / "keyproxy.toml"
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return config


@contextlib.contextmanager
def _mcp_server(deployment: Deployment) -> Iterator[str]:
    """An MCP server in a thread. It notes the identity that the proxy asserts."""
    server = MCPServer("tools")

    @server.tool()
    async def whoami(call: str, ctx: Context[Any, Any]) -> str:
        headers = ctx.request_context.request.headers  # type: ignore[union-attr]
        deployment.users[call] = headers["X-Keyproxy-User"], headers["X-Keyproxy-Key-Id"]
        return str(headers["X-Keyproxy-User"])

    port = free_port()
    config = uvicorn.Config(server.streamable_http_app(), host="127.0.0.1", port=port, log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(running.serve()), daemon=True)
    thread.start()
    wait_until(lambda: running.started, "the MCP server runs")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def _documents(certificates: trustme.CA) -> Iterator[str]:
    """A web server of metadata documents: each path is the document of a client with loopback redirect URIs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps(
                {
                    "client_id": f"{url}{self.path}",
                    "client_name": "A program with a document",
                    "redirect_uris": ["http://localhost/callback", "http://127.0.0.1/callback"],
                    "token_endpoint_auth_method": "none",
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            """No log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"https://localhost:{server.server_port}"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificates.issue_cert("localhost").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
