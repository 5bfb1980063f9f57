"""The upstream of the tests: responds with the request that it got. In a thread of the driver."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Without this, the head and the body of a response are two packets, and the second waits for an acknowledgement.
    wbufsize = 65_536

    def _respond(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        body = self._body()
        seen = {
            "method": self.command,
            "target": self.path,
            "headers": [list(pair) for pair in self.headers.items()],
            "body": body.decode("utf-8", "replace"),
        }
        content = query["body"][0].encode() if "body" in query else json.dumps(seen).encode()
        self.send_response(int(query.get("status", ["200"])[0]))
        self.send_header("Content-Type", query.get("type", ["application/json"])[0])
        self.send_header("Content-Length", str(len(content)))
        for line in query.get("header", []):
            name, _, value = line.partition(":")
            self.send_header(name, value.strip())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _respond  # noqa: N815

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
        """Nothing: tests read the response."""


@contextlib.contextmanager
def echoing() -> Iterator[str]:
    """The server until the context ends; its origin."""
    with _Server(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="echo")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
