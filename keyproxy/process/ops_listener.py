"""The ops listener: /livez, /readyz, /metrics and /jwks.json, on an address of their own, never on the proxied port.

    /livez      the process runs its event loop. Restart it if this fails. 503 until the proxied port accepts connections.
    /readyz     200 while requests can be served, also with `"status": "degraded"`; 503 while none can.
    /jwks.json  the keys that verify agent tokens and assertions, of all proxies.

Each check defines whether its failure makes the proxy unready. A store that is down does not, as long as verified
identities can be served: every proxy has the same store, and taking all of them out of rotation would turn a database
outage into one for every customer. An upstream that is down does: another proxy may have one that is up.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, NamedTuple

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from keyproxy.platform import process_registry
from keyproxy.process.http_connections import Bounds, Connections, date_line

#: The body of /livez once the proxied port accepts connections.
LIVE: Final = b'{"status":"ok"}'

_CHECK_SECONDS: Final = 3.0

#: More than probes and scrapers need. Without a bound, idle clients would use up the file descriptors of the proxied
#: port.
_BOUNDS: Final = Bounds(connections_max=128, idle_seconds=75.0, unread_seconds=30.0)


def _full() -> bytes:
    return (
        b"HTTP/1.1 503 Service Unavailable\r\n%bRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        % date_line()
    )


class Verdict(enum.Enum):
    """The effect of a check on the readiness of the process."""

    OK = "ok"
    DEGRADED = "degraded"
    FAILED = "failed"


class Check(NamedTuple):
    """The outcome of one check, with the reason if it is not OK."""

    verdict: Verdict
    reason: str = ""


class Unreadable(logging.Filter):
    """Drops aiohttp's log records about malformed requests: they quote the bytes, which may contain a key."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError)


_http_log = logging.getLogger("keyproxy.ops.http")
_http_log.addFilter(Unreadable())


class OpsListener:
    """The HTTP server for /livez, /readyz, /metrics and /jwks.json."""

    def __init__(
        self,
        *,
        checks: Callable[[], Awaitable[Mapping[str, Check]]],
        metrics: Callable[[], Awaitable[bytes]],
        metrics_content_type: str,
        jwks: Callable[[], Awaitable[bytes | None]] | None,
        bounds: Bounds = _BOUNDS,
    ) -> None:
        """`jwks`: None in a process that signs nothing."""
        self._checks = checks
        self._metrics = metrics
        self._metrics_content_type = metrics_content_type
        self._jwks = jwks
        #: Whether the proxied port accepts connections; before that, verifiers may read the keys here.
        self.is_started = True
        self._bounds = bounds
        self._runner: web.AppRunner | None = None
        self._connections: Connections | None = None

    def application(self, *, is_private: bool = False) -> web.Application:
        """The aiohttp application. `is_private`: serve only processes of this user."""
        app = web.Application(middlewares=[_only_this_user] if is_private else [])
        app.router.add_get("/livez", self._live)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._scrape)
        if self._jwks is not None:
            app.router.add_get("/jwks.json", _key_set(self._jwks))
        return app

    async def start(self, sock: socket.socket) -> None:
        """Serve a bound socket."""
        # An abstract socket has no file mode that could exclude other users.
        is_private = sock.family == socket.AF_UNIX and isinstance(sock.getsockname(), bytes)
        self._runner = web.AppRunner(
            self.application(is_private=is_private),
            access_log=None,
            handle_signals=False,
            shutdown_timeout=1.0,
            logger=_http_log,
        )
        await self._runner.setup()
        if self._runner.server is None:
            raise RuntimeError("the runner has no server after its setup")
        self._connections = Connections(self._runner.server, self._bounds, full=_full, log=_http_log)
        await self._connections.start(sock, None)

    async def close(self) -> None:
        """Stop serving."""
        if self._connections is not None:
            self._connections.stop()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _live(self, _request: web.Request) -> web.Response:
        if not self.is_started:
            return _json(503, {"status": "starting"})
        return web.Response(body=LIVE, content_type="application/json", headers={"Cache-Control": "no-store"})

    async def _ready(self, _request: web.Request) -> web.Response:
        checks = dict(await self._checks())
        if not self.is_started:
            checks["proxy"] = Check(Verdict.FAILED, "starting")
        status = worst(check.verdict for check in checks.values())
        content = {
            "status": status.value,
            "checks": {
                name: {"status": check.verdict.value} | ({"reason": check.reason} if check.reason else {})
                for name, check in checks.items()
            },
        }
        return _json(503 if status is Verdict.FAILED else 200, content)

    async def _scrape(self, _request: web.Request) -> web.Response:
        return web.Response(body=await self._metrics(), headers={"Content-Type": self._metrics_content_type})


def _key_set(jwks: Callable[[], Awaitable[bytes | None]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(_request: web.Request) -> web.Response:
        return key_set(await jwks())

    return handle


def key_set(jwks: bytes | None) -> web.Response:
    """The response with a JSON Web Key Set; None: it cannot be read now."""
    if jwks is None:
        return web.Response(status=503, headers={"Cache-Control": "no-store", "Retry-After": "1"})
    headers = {"Content-Type": "application/jwk-set+json", "Cache-Control": "max-age=60"}
    return web.Response(body=jwks, headers=headers)


@web.middleware
async def _only_this_user(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    sock = None if request.transport is None else request.transport.get_extra_info("socket")
    if sock is None:
        raise web.HTTPForbidden
    with socket.socket(fileno=os.dup(sock.fileno())) as own:
        is_trusted = process_registry.is_trusted(own)
    if not is_trusted:
        raise web.HTTPForbidden
    return await handler(request)


async def gathered(checks: Mapping[str, Callable[[], Awaitable[Check]]]) -> Mapping[str, Check]:
    """Run checks concurrently and return their outcomes."""
    outcomes = await asyncio.gather(*(_checked(check) for check in checks.values()))
    return dict(zip(checks, outcomes, strict=True))


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of some verdicts; OK if there are none."""
    found = set(verdicts)
    return next((one for one in (Verdict.FAILED, Verdict.DEGRADED) if one in found), Verdict.OK)


async def _checked(check: Callable[[], Awaitable[Check]]) -> Check:
    try:
        async with asyncio.timeout(_CHECK_SECONDS):
            return await check()
    except TimeoutError:
        return Check(Verdict.FAILED, "the check timed out")


def _json(status: int, content: object) -> web.Response:
    return web.Response(
        status=status,
        body=orjson.dumps(content),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
