"""The bounds on connections to the authorization server, and the response to connections beyond them."""

from __future__ import annotations

import logging
import secrets
from typing import Final

import orjson
from aiohttp import web

from keyproxy.process import http_connections
from keyproxy.process.http_connections import Bounds
from keyproxy.process.ops_listener import Unreadable

__all__ = ["BOUNDS", "AuthorizeConnections", "Bounds"]

_http_log = logging.getLogger("keyproxy.authorize.http")
_http_log.addFilter(Unreadable())

#: The bounds in production.
BOUNDS: Final = Bounds()

#: A callback of the identity provider has the state of a login, which is longer than the request that it began with.
_LINE_BYTES_MAX: Final = 16_384

_CONTENT: Final = orjson.dumps(
    {"error": "temporarily_unavailable", "error_description": "Too many connections; retry shortly."}
)


class AuthorizeConnections(http_connections.Connections):
    """Connections to the authorization server."""

    def __init__(self, server: web.Server, bounds: Bounds) -> None:
        super().__init__(server, bounds, full=_full, log=_http_log, line_bytes_max=_LINE_BYTES_MAX)


def _full() -> bytes:
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 2\r\n"
        b"Cache-Control: no-store\r\n%bX-Request-Id: %b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
        % (http_connections.date_line(), secrets.token_hex(16).encode("ascii"), len(_CONTENT), _CONTENT)
    )
