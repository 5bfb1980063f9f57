"""The bounds on connections to the admin API, and the response to connections beyond them."""

from __future__ import annotations

import logging
import secrets
from typing import Final

from aiohttp import web

from keyproxy.admin.problems import Problem, Refused, problem_body
from keyproxy.process import http_connections
from keyproxy.process.http_connections import Bounds
from keyproxy.process.ops_listener import Unreadable

__all__ = ["BOUNDS", "Bounds", "AdminConnections"]

_http_log = logging.getLogger("keyproxy.admin.http")
_http_log.addFilter(Unreadable())

#: The bounds in production.
BOUNDS: Final = Bounds()


class AdminConnections(http_connections.Connections):
    """Connections to the admin API."""

    def __init__(self, server: web.Server, bounds: Bounds) -> None:
        super().__init__(server, bounds, full=_full, log=_http_log)


def _full() -> bytes:
    request_id = secrets.token_hex(16)
    refused = Refused(Problem.OVERLOADED)
    content = problem_body(refused, request_id)
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: %d\r\n"
        b"%bX-Request-Id: %b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
        % (
            refused.retry_after_seconds or 1,
            http_connections.date_line(),
            request_id.encode("ascii"),
            len(content),
            content,
        )
    )
