"""A server of metadata documents: https on a port of its own, with the responses that a test gives it."""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trustme
from aiohttp import web

HOST = "docs.example"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class DocumentServer:
    """The server. `responses`: the response by path. `requests`: the paths of all requests so far."""

    port: int
    authority: trustme.CA
    responses: dict[str, bytes | Handler] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def url(self, path: str, host: str = HOST) -> str:
        """The URL of a document here."""
        return f"https://{host}:{self.port}{path}"

    def tls(self) -> ssl.SSLContext:
        """What trusts this server's certificate."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context

    def ca_file(self, directory: Path) -> str:
        """The file of the CA of its certificate."""
        file = directory / "documents-ca.pem"
        self.authority.cert_pem.write_to_path(file)
        return str(file)

    def publish(self, path: str, host: str = HOST, **metadata: Any) -> str:
        """Publish a document, and return its URL, the client id."""
        url = self.url(path, host)
        content = {"client_id": url, "client_name": "Acme", "redirect_uris": ["https://acme.example/cb"], **metadata}
        self.responses[path] = json.dumps(
            {name: value for name, value in content.items() if value is not None}
        ).encode()
        return url

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Respond as the test wants."""
        self.requests.append(request.raw_path)
        response = self.responses.get(request.path)
        if response is None:
            raise web.HTTPNotFound
        return (
            web.Response(body=response, headers=self.headers)
            if isinstance(response, bytes)
            else await response(request)
        )


@contextlib.asynccontextmanager
async def serving_documents(authority: trustme.CA) -> AsyncIterator[DocumentServer]:
    """A running server."""
    app = web.Application()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(HOST, "localhost", "127.0.0.1").configure_cert(context)
    runner = web.AppRunner(app)
    server = DocumentServer(0, authority)
    app.router.add_route("*", "/{path:.*}", server.handle)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        server.port = runner.addresses[0][1]
        yield server
    finally:
        await runner.cleanup()
