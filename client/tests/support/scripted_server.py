"""A server that responds as a test scripts it, and records what it receives."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Reply:
    """One response. The lines of a header's value are fields of their own."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"


@dataclass(frozen=True)
class Received:
    """One request. `headers`: pairs in their order, names in lower case."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    client_port: int

    def values(self, name: str) -> list[str]:
        """The values of all headers of a name, in any spelling."""
        return [value for found, value in self.headers if found.replace("_", "-") == name.lower()]

    @property
    def credentials(self) -> tuple[list[str], list[str]]:
        """The values of Authorization and of Act-For."""
        return self.values("authorization"), self.values("x-keyproxy-act-for")


def refusal(status: int = 429, code: str = "rate_limited", *, retry_after: str | None = "0", **headers: str) -> Reply:
    """A refusal of keyproxy."""
    fields = {"Content-Type": "application/problem+json", **headers}
    if retry_after is not None:
        fields["Retry-After"] = retry_after
    return Reply(status, fields, json.dumps({"code": code, "status": status}).encode())


def unauthorized() -> Reply:
    """The 401 of keyproxy."""
    return refusal(401, "api_key_revoked", retry_after=None, **{"WWW-Authenticate": 'Api-Key realm="keyproxy"'})


class ScriptedServer:
    """Responds with `replies` in their order, then with 200."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.replies: list[Reply] = []
        self.received: list[Received] = []

    def script(self, *replies: Reply) -> ScriptedServer:
        """Start over with these replies."""
        self.replies[:] = replies
        self.received.clear()
        return self


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Without this, the head and the body of a response are two packets, and the second waits for an acknowledgement.
    wbufsize = 65_536
    scripted: ScriptedServer

    def _respond(self) -> None:
        headers = [(name.lower(), value) for name, value in self.headers.items()]
        received = Received(self.command, self.path, headers, self._body(), self.client_address[1])
        self.scripted.received.append(received)
        reply = self.scripted.replies.pop(0) if self.scripted.replies else Reply()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            for line in value.splitlines():
                self.send_header(name, line)
        self.end_headers()
        self.wfile.write(reply.body)

    do_GET = do_POST = do_PUT = _respond  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: tests read what was received."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    #: Connections of clients that stay open must not delay the end.
    block_on_close = False


@contextlib.contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """The server until the context ends."""
    handler = type("Handler", (_Handler,), {})
    with _Server(("127.0.0.1", 0), handler) as server:
        scripted = ScriptedServer(f"http://127.0.0.1:{server.server_address[1]}")
        handler.scripted = scripted  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="scripted")
        thread.start()
        try:
            yield scripted
        finally:
            server.shutdown()
            thread.join()
