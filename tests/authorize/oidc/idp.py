"""An OpenID provider in this process, which behaves as a test wishes, also against the protocol."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import hashlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote_plus, urlsplit

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

CLIENT_ID, CLIENT_SECRET = "keyproxy:1", "s&cret %+"

Respond = Callable[[Mapping[str, str]], web.Response | None]


@dataclass
class Idp:
    """Its behaviour. `claims` and `headers` change those of the id_token, None removes one; `metadata` likewise."""

    issuer: str = ""
    claims: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    delay_seconds: float = 0.0
    #: A status for every request.
    status: int | None = None
    #: Makes the id_token from header, claims and key.
    sign: Callable[[dict[str, Any], dict[str, Any], Any], str] | None = None
    #: Responds at the token endpoint in its place.
    respond: Respond | None = None
    requests: collections.Counter[str] = field(default_factory=collections.Counter)
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    kid: str = "k1"
    key: Any = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def rotate(self, kid: str) -> None:
        """Sign with another key."""
        self.kid, self.key = kid, ec.generate_private_key(ec.SECP256R1())

    def code(self, location: str, code: str = "code-1") -> str:
        """Sign a user in who has been redirected here, and return the code."""
        self.codes[code] = {name: values[0] for name, values in parse_qs(urlsplit(location).query).items()}
        return code

    def app(self) -> web.Application:
        """The endpoints."""
        app = web.Application(middlewares=[self._counted])
        app.router.add_get("/.well-known/openid-configuration", self._discovery)
        app.router.add_get("/jwks", self._jwks)
        app.router.add_post("/token", self._token)
        return app

    @web.middleware
    async def _counted(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests[request.path] += 1
        await asyncio.sleep(self.delay_seconds)
        if self.status is not None:
            return web.Response(status=self.status)
        response: web.StreamResponse = await handler(request)
        return response

    async def _discovery(self, _request: web.Request) -> web.Response:
        document = {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/auth",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/jwks",
            "id_token_signing_alg_values_supported": ["ES256"],
            "code_challenge_methods_supported": ["S256"],
            "authorization_response_iss_parameter_supported": True,
            **self.metadata,
        }
        return web.json_response({name: value for name, value in document.items() if value is not None})

    async def _jwks(self, _request: web.Request) -> web.Response:
        public = ECAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
        return web.json_response({"keys": [{**public, "kid": self.kid, "use": "sig"}]})

    async def _token(self, request: web.Request) -> web.Response:
        form = {name: str(value) for name, value in (await request.post()).items()}
        if self.respond is not None:
            response = self.respond(form)
            if response is not None:
                return response
        if not self._is_client(request, form):
            return web.json_response({"error": "invalid_client"}, status=401)
        asked = self.codes.pop(form.get("code", ""), None)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(form.get("code_verifier", "").encode()).digest())
        if (
            asked is None
            or asked["code_challenge"] != challenge.rstrip(b"=").decode()
            or asked["redirect_uri"] != form.get("redirect_uri")
        ):
            return web.json_response({"error": "invalid_grant"}, status=400)
        return web.json_response({"access_token": "a", "token_type": "Bearer", "id_token": self.id_token(asked)})

    def _is_client(self, request: web.Request, form: Mapping[str, str]) -> bool:
        methods = self.metadata.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        if "client_secret_basic" not in methods:
            return (form.get("client_id"), form.get("client_secret")) == (CLIENT_ID, CLIENT_SECRET)
        encoded = request.headers.get("Authorization", "").removeprefix("Basic ")
        name, _, secret = base64.b64decode(encoded).decode().partition(":")
        return (unquote_plus(name), unquote_plus(secret)) == (CLIENT_ID, CLIENT_SECRET)

    def id_token(self, asked: Mapping[str, str]) -> str:
        """The id_token for an authorization request."""
        now = int(time.time())
        claims = {
            "iss": self.issuer, "aud": asked["client_id"], "sub": "s-1", "nonce": asked["nonce"], "iat": now,
            "exp": now + 300, **self.claims,
        }  # fmt: skip
        claims = {name: value for name, value in claims.items() if value is not None}
        header = {"kid": self.kid, **self.headers}
        if self.sign is not None:
            return self.sign(header, claims, self.key)
        return jwt.encode(claims, self.key, "ES256", headers=header)


@contextlib.asynccontextmanager
async def running_idp(idp: Idp | None = None, tls: ssl.SSLContext | None = None) -> AsyncIterator[Idp]:
    """A provider on a loopback port."""
    idp = idp or Idp()
    runner = web.AppRunner(idp.app(), shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        idp.issuer = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
        yield idp
    finally:
        await runner.cleanup()
