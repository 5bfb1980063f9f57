"""A listener of the authorization server: the outermost boundary, rate limits, and one log line for each request.

Paths are compared as sent, before any decoding, so no other spelling of a path reaches an endpoint.
"""

from __future__ import annotations

import logging
import re
import secrets
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import orjson
from aiohttp import hdrs, web

from keyproxy.auth.api_key import KeyFormat
from keyproxy.authorize import responses
from keyproxy.authorize.connections import BOUNDS, AuthorizeConnections, Bounds
from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoint import (
    ADDRESS,
    CLIENT,
    GRANT_TYPE,
    OUTCOME,
    PEER_CERTIFICATE,
    REQUEST_ID,
    TOKEN,
    USER,
    Endpoint,
    Handler,
    PageError,
)
from keyproxy.authorize.endpoints import Parts
from keyproxy.authorize.form import BODY_BYTES_MAX
from keyproxy.authorize.metrics import NO_ENDPOINT, OK
from keyproxy.http.forwarding import UNKNOWN, Hop, TrustRule
from keyproxy.oauth.oauth_error import OAuthError

_log = logging.getLogger(__name__)

_SHUTDOWN_SECONDS: Final = 10.0
_PATH_CHARACTERS_MAX: Final = 512
#: A code, verifier, cookie or ticket in the path of a request that went wrong; no path that is served has such a part.
_MAY_BE_SECRET: Final = re.compile(r"[A-Za-z0-9._~-]{40,}")
_FORWARDED_FOR: Final = b"x-forwarded-for"
_FAILURES: Final = (400, 401)


class Served:
    """What listeners serve under one configuration: the endpoints by their paths, and how requests are judged."""

    def __init__(self, context: Context, parts: Parts) -> None:
        self.endpoints: Final = {path: endpoint for endpoint in parts.endpoints for path in endpoint.paths}
        for name in {endpoint.name for endpoint in parts.endpoints}:
            # A series from the start on, in which an alert sees the first increase.
            context.counts.requests[name, OK] += 0
        self.on_mtls: Final = {path: one for path, one in self.endpoints.items() if one.is_on_mtls}
        self.error_page: Final = parts.error_page
        self.key_format: Final[KeyFormat] = context.key_format
        self.context: Final = context
        settings = context.settings
        self._trust = TrustRule(settings.oauth.trusted_proxies, recorded=settings.log.client_address)
        self._trusts_unix = "unix" in settings.oauth.trusted_proxies
        self._has_warned = False

    def client_of(self, request: web.Request) -> Hop:
        """The client: the peer or, behind trusted proxies, the right-most untrusted one of X-Forwarded-For."""
        fields = [
            (_FORWARDED_FOR, value.encode("utf-8", "surrogateescape"))
            for value in request.headers.getall("X-Forwarded-For", [])
        ]
        peer, is_trusted = UNKNOWN, self._trusts_unix
        if request.remote:
            peer = self._trust.client([(_FORWARDED_FOR, request.remote.encode())], UNKNOWN)
            is_trusted = peer.is_trusted
        if is_trusted:
            return self._trust.client(fields, peer)
        if fields and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "X-Forwarded-For from %s is ignored, because oauth.trusted_proxies does not name it: if it is a proxy,"
                " all of its clients share one rate limit",
                request.remote or "a unix socket",
            )
        return peer


class AuthorizeListener:
    """An HTTP server over the endpoints. What it serves can change while requests are in flight."""

    def __init__(
        self,
        served: Served,
        *,
        log_line: Callable[[bytes, int], None] | None,
        bounds: Bounds = BOUNDS,
        is_mtls: bool = False,
    ) -> None:
        """`is_mtls`: serve only what clients with certificates need."""
        self.served = served
        self._log_line = log_line
        self._bounds = bounds
        self._is_mtls = is_mtls
        self._runner: web.AppRunner | None = None
        self._connections: AuthorizeConnections | None = None

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve a bound socket."""
        # No routes: the middleware is the router, so that a reload can change the paths.
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[self._outermost])
        app.on_response_prepare.append(_remove_server)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        await self._runner.setup()
        if self._runner.server is None:
            raise RuntimeError("the runner was set up and has no server")
        self._connections = AuthorizeConnections(self._runner.server, self._bounds)
        await self._connections.start(sock, tls)

    def change(self, served: Served, tls: ssl.SSLContext | None) -> None:
        """Serve this from the next request on, and use this context from the next connection on."""
        self.served = served
        if self._connections is not None:
            self._connections.tls = tls

    async def close(self) -> None:
        """Stop accepting connections; requests in flight finish within a time limit."""
        if self._connections is not None:
            self._connections.stop()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def open_connections(self) -> int:
        """The number of open connections."""
        return 0 if self._connections is None else len(self._connections.open)

    @web.middleware
    async def _outermost(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        served, request_id = self.served, secrets.token_hex(16)
        started = served.context.now().mono_seconds
        endpoint = (served.on_mtls if self._is_mtls else served.endpoints).get(_path_of(request))
        client = served.client_of(request)
        request[REQUEST_ID], request[ADDRESS] = request_id, client.address.decode("ascii")
        _note_certificate(request)
        code = ""
        try:
            response = await self._handled(request, endpoint)
        except Exception as failure:  # noqa: BLE001 - the outermost boundary
            error = self._throttled(request, endpoint, responses.error_of(failure, request_id))
            code = error.code if isinstance(error, OAuthError) else error.message
            if error.detail:
                _log.info("%s, request_id=%s: %s", code, request_id, error.detail)
            response = self._error_response(request, endpoint, error)
        is_cross_origin = endpoint is not None and endpoint.is_cross_origin
        responses.add_headers(response, request_id, is_cross_origin=is_cross_origin)
        name = NO_ENDPOINT if endpoint is None else endpoint.name
        outcome = request.get(OUTCOME) or code or OK
        served.context.counts.requests[name, outcome] += 1
        if self._log_line is not None:
            seconds = served.context.now().mono_seconds - started
            line = _line(request, endpoint, served.key_format) | {
                "status": response.status,
                "code": "" if outcome == OK else outcome,
                "peer": client.recorded.decode("ascii") if client.address else "unix",
                "duration_seconds": round(seconds, 6),
            }
            self._log_line(orjson.dumps(line) + b"\n", response.status)
        return response

    async def _handled(self, request: web.Request, endpoint: Endpoint | None) -> web.StreamResponse:
        if endpoint is None:
            raise responses.not_found()
        if request.method == "OPTIONS":
            return responses.options(endpoint)
        handler = endpoint.handlers.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            raise responses.method_not_allowed(responses.methods_of(endpoint))
        if endpoint.limit is not None:
            wait_seconds = self.served.context.rate_limits.count(endpoint.limit, request[ADDRESS])
            if wait_seconds:
                raise responses.too_many_requests(wait_seconds)
        return await handler(request)

    def _throttled(
        self, request: web.Request, endpoint: Endpoint | None, error: OAuthError | PageError
    ) -> OAuthError | PageError:
        """Count a failure, and replace its error if the address has too many of them."""
        if endpoint is None or endpoint.failures is None or error.status not in _FAILURES:
            return error
        wait_seconds = self.served.context.rate_limits.count(endpoint.failures, request[ADDRESS])
        return responses.too_many_requests(wait_seconds) if wait_seconds else error

    def _error_response(
        self, request: web.Request, endpoint: Endpoint | None, error: OAuthError | PageError
    ) -> web.Response:
        if isinstance(error, OAuthError):
            if endpoint is None or not endpoint.shows_pages:
                return responses.json_error(error)
            allowed = (error.headers or {}).get("Allow")
            response = self.served.error_page(request, responses.page_error_of(error))
            if allowed is not None:
                response.headers["Allow"] = allowed
            return response
        return self.served.error_page(request, error)


def _path_of(request: web.Request) -> str:
    return request.rel_url.raw_path


def _note_certificate(request: web.Request) -> None:
    tls = request.get_extra_info("ssl_object")
    certificate = None if tls is None else tls.getpeercert(binary_form=True)
    if certificate:
        request[PEER_CERTIFICATE] = certificate


def _line(request: web.Request, endpoint: Endpoint | None, key_format: KeyFormat) -> dict[str, Any]:
    """The members of a log line that are known from the request. There is no query in it."""
    path = request.path if endpoint is not None else _MAY_BE_SECRET.sub("...", request.path)
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "request_id": request[REQUEST_ID],
        # Any other method is free text of the client.
        "method": request.method if request.method in hdrs.METH_ALL else "",
        "path": "" if key_format.is_within(request.path.encode("utf-8", "replace")) else path[:_PATH_CHARACTERS_MAX],
        "route": "" if endpoint is None else endpoint.paths[0],
        "token": request.get(TOKEN),
        "grant_type": request.get(GRANT_TYPE),
        "client": request.get(CLIENT),
        "user": request.get(USER),
    }


async def _remove_server(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.pop("Server", None)
