"""The listener of the admin API: routes, health, the outermost boundary, and one log line for each request."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import socket
import ssl
from collections import defaultdict
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final

import orjson
from aiohttp import hdrs, web

from keyproxy.admin.connections import BOUNDS, AdminConnections, Bounds
from keyproxy.admin.endpoints import Endpoint
from keyproxy.admin.metrics_page import Traffic
from keyproxy.admin.problems import Problem, Refused, problem_response
from keyproxy.admin.reference import docs_page, openapi
from keyproxy.admin.request_parsing import BODY_BYTES_MAX
from keyproxy.admin.scopes import Scope
from keyproxy.admin.service import ENDPOINTS, TOKEN_ID, Service
from keyproxy.metrics.exposition import CONTENT_TYPE
from keyproxy.process.ops_listener import key_set
from keyproxy.reasons import Refusal
from keyproxy.store.postgres.database import StoreUnavailable
from keyproxy.store.signing_keys import SigningKeyCache

_log = logging.getLogger(__name__)

_SHUTDOWN_SECONDS: Final = 10.0
_PATH_CHARACTERS_MAX: Final = 512
_REQUEST_ID: Final = web.RequestKey("request_id", str)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


#: Paths served in addition to the endpoints.
_PAGES: Final = ("/livez", "/readyz", "/openapi.json", "/docs", "/metrics", "/jwks.json")

_FAILED_LOGINS: Final = (
    Problem.TOKEN_MISSING,
    Problem.TOKEN_INVALID,
    Problem.TOKEN_EXPIRED,
    Problem.TOKEN_REVOKED,
    Problem.ACCOUNT_DISABLED,
    Problem.TOO_MANY_FAILURES,
)


def traffic() -> Traffic:
    """Counters of requests to the admin API."""
    endpoints = [(endpoint.method, endpoint.path) for endpoint in ENDPOINTS]
    return Traffic([*endpoints, *(("GET", path) for path in _PAGES)], [one.code for one in _FAILED_LOGINS])


class AdminListener:
    """The admin API's HTTP server. The service can be replaced while requests are in flight."""

    def __init__(
        self,
        service: Service,
        *,
        metrics: Callable[[], Awaitable[bytes]],
        signing_keys: SigningKeyCache,
        log_line: Callable[[bytes, int], None] | None,
        traffic: Traffic,
        bounds: Bounds = BOUNDS,
    ) -> None:
        self.service = service
        self._traffic = traffic
        self._metrics = metrics
        self._signing_keys = signing_keys
        self._log_line = log_line
        self._bounds = bounds
        self._runner: web.AppRunner | None = None
        self._connections: AdminConnections | None = None

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[self._outermost])
        app.on_response_prepare.append(_add_headers)
        for path, handlers in self._handlers().items():
            resource = app.router.add_resource(path)
            for method, handler in handlers.items():
                resource.add_route(method, handler)
        return app

    def _handlers(self) -> dict[str, dict[str, Handler]]:
        """The handlers of each path, by method."""
        found: dict[str, dict[str, Handler]] = defaultdict(dict)
        for endpoint in ENDPOINTS:
            handler = self._handler(endpoint)
            found[endpoint.path][endpoint.method] = handler
            if endpoint.method == "GET" and not endpoint.is_stream:
                found[endpoint.path]["HEAD"] = handler
        for path, page in self._pages().items():
            found[path] |= {"GET": page, "HEAD": page}
        for handlers in found.values():
            handlers["OPTIONS"] = _options({*handlers, "OPTIONS"})
        return found

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve a bound socket."""
        self._runner = web.AppRunner(
            self.application(), access_log=None, handle_signals=False, shutdown_timeout=_SHUTDOWN_SECONDS
        )
        await self._runner.setup()
        if self._runner.server is None:
            raise RuntimeError("the runner was set up and has no server")
        self._connections = AdminConnections(self._runner.server, self._bounds)
        await self._connections.start(sock, tls)

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

    # -- pages outside the endpoints; only the metrics require a token

    def _pages(self) -> dict[str, Handler]:
        return {
            "/livez": self._live,
            "/readyz": self._ready,
            "/openapi.json": self._show_openapi,
            "/docs": self._show_reference,
            "/metrics": self._scrape,
            "/jwks.json": self._key_set,
            "/": self._to_reference,
        }

    async def _scrape(self, request: web.Request) -> web.Response:
        # The metrics cover all tenants.
        await self.service.authorize(request, Scope.METRICS_READ, is_global=True)
        return web.Response(body=await self._metrics(), headers={"Content-Type": CONTENT_TYPE})

    async def _key_set(self, _request: web.Request) -> web.Response:
        try:
            return key_set(await self._signing_keys.current_jwks())
        except Refusal:
            return key_set(None)

    async def _to_reference(self, _request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "/docs"})

    async def _live(self, _request: web.Request) -> web.Response:
        return _json(200, {"status": "ok"})

    async def _ready(self, _request: web.Request) -> web.Response:
        try:
            await self.service.database.fetch("is_there_a_working_admin_token")
        except StoreUnavailable:
            return _json(503, {"status": "failed", "checks": {"store": {"status": "failed"}}})
        return _json(200, {"status": "ok", "checks": {"store": {"status": "ok"}}})

    async def _show_openapi(self, _request: web.Request) -> web.Response:
        document, *_ = await asyncio.to_thread(_documents)
        return web.Response(body=document, content_type="application/json")

    async def _show_reference(self, _request: web.Request) -> web.Response:
        _, page, policy = await asyncio.to_thread(_documents)
        return web.Response(text=page, content_type="text/html", headers={"Content-Security-Policy": policy})

    # -- the rest

    def _handler(self, endpoint: Endpoint) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            return await self.service.respond(endpoint, request)

        return handle

    @web.middleware
    async def _outermost(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request[_REQUEST_ID] = secrets.token_hex(16)
        started = self.service.now_mono()
        code = ""
        try:
            response = await handler(request)
        except Exception as error:  # noqa: BLE001 - the outermost boundary
            refused = _refusal(error, request[_REQUEST_ID])
            code = refused.problem.code
            response = problem_response(refused, request[_REQUEST_ID])
        self._note(request, response.status, code, self.service.now_mono() - started)
        return response

    def _note(self, request: web.Request, status: int, code: str, seconds: float) -> None:
        resource = request.match_info.route.resource
        route = "" if resource is None else resource.canonical
        self._traffic.note("GET" if request.method == "HEAD" else request.method, route, status, code)
        if self._log_line is None:
            return
        path = request.path[:_PATH_CHARACTERS_MAX]
        if self.service.key_format.is_within(path.encode("utf-8", "replace")):
            path = ""
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "request_id": request[_REQUEST_ID],
            # Any other method is free text of the client.
            "method": request.method if request.method in hdrs.METH_ALL else "",
            "path": path,
            "route": route,
            "status": status,
            "code": code,
            "token": request.get(TOKEN_ID),
            "peer": request.remote or "unix",
            "duration_seconds": round(seconds, 6),
        }
        self._log_line(orjson.dumps(line) + b"\n", status)


@functools.cache
def _documents() -> tuple[bytes, str, str]:
    """(the OpenAPI document, its HTML page, the page's Content-Security-Policy).

    Built at the first request, in a thread: that takes as long as a tenth of the start-up.
    """
    document = openapi.document(ENDPOINTS)
    return orjson.dumps(document, option=orjson.OPT_INDENT_2), *docs_page.page(document)


def _refusal(error: Exception, request_id: str) -> Refused:
    match error:
        case Refused():
            return error
        case StoreUnavailable():
            return Refused(Problem.STORE_UNAVAILABLE)
        case web.HTTPMethodNotAllowed():
            return Refused(Problem.METHOD_NOT_ALLOWED, headers={"Allow": error.headers["Allow"]})
        case web.HTTPRequestEntityTooLarge():
            return Refused(Problem.BODY_TOO_LARGE)
        case web.HTTPNotFound():
            return Refused(Problem.NOT_FOUND, "The path does not exist.")
        case web.HTTPException():
            return Refused(Problem.REQUEST_MALFORMED)
        case ConnectionResetError():
            return Refused(Problem.REQUEST_MALFORMED, "The client disconnected.")
        case _:
            _log.error("internal error, request_id=%s", request_id, exc_info=error)
            return Refused(Problem.INTERNAL_ERROR)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.pop("Server", None)
    response.headers["X-Request-Id"] = request.get(_REQUEST_ID, "")
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")


def _options(allowed: set[str]) -> Handler:
    methods = ", ".join(sorted(allowed))

    async def handle(_request: web.Request) -> web.Response:
        return web.Response(status=204, headers={"Allow": methods})

    return handle


def _json(status: int, content: object) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(content), content_type="application/json")
