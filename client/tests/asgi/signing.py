"""Makes assertions as keyproxy does, and serves the keys of them."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

TYPE = "keyproxy-assertion+jwt"
STATED = {"User": "u_42", "Tenant": "acme", "Scope": "jobs:read jobs:write", "Test": "false", "Key-Id": "key_7"}


def encoded(content: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


class Signer:
    """One signing key."""

    def __init__(self, kid: str) -> None:
        self.kid = kid
        self.private = ec.generate_private_key(ec.SECP256R1())

    @property
    def jwk(self) -> dict[str, Any]:
        """The public half."""
        public = json.loads(ECAlgorithm.to_jwk(self.private.public_key()))
        return {**public, "kid": self.kid, "use": "sig", "alg": "ES256"}

    def claims(self, **changed: Any) -> dict[str, Any]:
        """Those of a valid assertion with changes; None removes a claim."""
        now = int(time.time())
        claims = {
            "iss": "keyproxy", "aud": "upstream", "sub": "u_42", "tenant": "acme", "scope": "jobs:read jobs:write",
            "key_id": "key_7", "test": False, "iat": now, "exp": now + 60,
        }  # fmt: skip
        return {name: value for name, value in {**claims, **changed}.items() if value is not None}

    def sign(self, claims: dict[str, Any] | None = None, **header: Any) -> str:
        """An assertion; `header` changes its header, None removes a member."""
        members = {"typ": TYPE, "alg": "ES256", "kid": self.kid, **header}
        head = encoded(json.dumps({name: one for name, one in members.items() if one is not None}).encode())
        message = f"{head}.{encoded(json.dumps(claims or self.claims()).encode())}"
        algorithm = jwt.get_algorithm_by_name("ES256")
        return f"{message}.{encoded(algorithm.sign(message.encode(), self.private))}"


class KeyServer:
    """Serves a JWKS: `keys`, or `status` if that is not 200. Counts fetches."""

    def __init__(self, keys: list[dict[str, Any]]) -> None:
        self.keys = keys
        self.status = 200
        self.fetches = 0
        self.url = ""

    @contextlib.contextmanager
    def serving(self) -> Iterator[KeyServer]:
        """Until the context ends."""
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.fetches += 1
                body = json.dumps({"keys": owner.keys}).encode()
                self.send_response(owner.status)
                self.send_header("Cache-Control", "max-age=60")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Nothing."""

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_address[1]}/jwks.json"
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()
