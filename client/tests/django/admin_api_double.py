"""An admin API between Django and the real one, which can lose responses, be slow or absent, and records requests."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from deployment import Deployment

#: What happens to a request: it is forwarded and answered, forwarded and the response lost, or refused with 503.
PASS, LOSE, REFUSE = "pass", "lose", "refuse"


class Between:
    """The server. `rule` decides what happens to a request by its method and path; `seen` are those that came."""

    def __init__(self, deployment: Deployment) -> None:
        self.target = urlsplit(deployment.admin_url)
        self.rule: Callable[[str, str], str] = lambda _method, _path: PASS
        self.seen: list[tuple[str, str]] = []
        self.keys: list[str | None] = []
        #: Called after a request was forwarded, before its response is sent.
        self.forwarded: Callable[[], None] = lambda: None
        self.url = ""

    def lose_once(self, method: str, path: str) -> None:
        """Lose the response of the next such request."""
        left = [1]

        def rule(this_method: str, this_path: str) -> str:
            if (this_method, this_path) == (method, path) and left[0]:
                left[0] = 0
                return LOSE
            return PASS

        self.rule = rule


@contextmanager
def between(deployment: Deployment) -> Iterator[Between]:
    """The server until the context ends."""
    state = Between(deployment)

    class Handler(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else None
            state.seen.append((self.command, self.path))
            state.keys.append(self.headers.get("Idempotency-Key"))
            fate = state.rule(self.command, self.path)
            if fate == REFUSE:
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            upstream = http.client.HTTPConnection(state.target.hostname or "", state.target.port, timeout=10)
            upstream.request(self.command, self.path, body, dict(self.headers.items()))
            response = upstream.getresponse()
            content = response.read()
            upstream.close()
            state.forwarded()
            if fate == LOSE:
                self.close_connection = True
                return
            self.send_response(response.status)
            for name in ("Content-Type", "Idempotency-Replayed"):
                if response.getheader(name):
                    self.send_header(name, response.getheader(name) or "")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = _forward  # noqa: N815 - names of the standard library

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
