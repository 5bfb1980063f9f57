"""Connections to the admin API: how many there may be, and how long one may take to say or to hear something.

aiohttp closes a connection on which no request has begun within the time of keep-alive, also if a part of a head is
there. What it does not bound is bounded here: how many connections there are, how long it may take to agree on TLS, and
how long somebody may ask and not read the answer.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import ssl
from typing import Any, Final, NamedTuple, cast

from aiohttp import web

from keyproxy import clock
from keyproxy.admin.problems import Problem, Refused, body
from keyproxy.ops import Unreadable
from keyproxy.wire.answers import DateField
from keyproxy.wire.handshake import Accepted
from keyproxy.wire.listener import Listener

_http_log = logging.getLogger("keyproxy.admin.http")
_http_log.addFilter(Unreadable())

_LINE_BYTES_MAX: Final = 65_536
_TURNED_AWAY_SECONDS: Final = 1.0


class Bounds(NamedTuple):
    """`idle_seconds`: without a whole head. `unread_seconds`: with an answer that waits to be read."""

    connections_max: int = 256
    idle_seconds: float = 30.0
    handshake_seconds: float = 10.0
    unread_seconds: float = 60.0


#: As they are outside of tests.
BOUNDS: Final = Bounds()


#: The response to a request that came without TLS to a port that speaks it.
_WITHOUT_TLS: Final = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 47\r\n"
    b"Connection: close\r\n\r\nThis port speaks TLS. Use https:// in the URL.\n"
)


class Connections:
    """See the module. Takes connections for one server of aiohttp."""

    def __init__(self, server: web.Server, bounds: Bounds) -> None:
        self._server = server
        self._bounds = bounds
        self._loop = asyncio.get_running_loop()
        self._listening: Listener | None = None
        self._tls: ssl.SSLContext | None = None
        self.open: set[_Connection] = set()

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Accept on a bound socket."""
        self._tls = tls
        self._listening = Listener(sock, self._loop, open_=self._open, has_room=self._has_room)
        self._listening.start()

    def stop(self) -> None:
        """Accept no more. What is open stays so."""
        if self._listening is not None:
            self._listening.stop()
            self._listening = None

    async def _open(self, sock: socket.socket) -> None:
        """Make a connection of an accepted socket: at once in the clear, after the handshake with TLS."""
        accepted, seconds = None, None
        if self._tls is not None:
            accepted, seconds = Accepted(sock, lambda: _WITHOUT_TLS), self._bounds.handshake_seconds
            accepted.open()
        try:
            await self._loop.connect_accepted_socket(self._accepted, sock, ssl=self._tls, ssl_handshake_timeout=seconds)
        except OSError:
            if accepted is not None:
                await accepted.close(self._loop)

    def _has_room(self) -> bool:
        return self._listening is None or self._listening.opening() < self._bounds.connections_max

    def _accepted(self) -> asyncio.Protocol:
        # Full: who comes is told so and turned away, and who is there is not disturbed.
        if len(self.open) >= self._bounds.connections_max:
            return _TurnedAway(self._loop)
        return _Connection(self, self._server, self._bounds, self._loop)


class _Connection(web.RequestHandler):
    """One connection."""

    def __init__(
        self, connections: Connections, server: web.Server, bounds: Bounds, loop: asyncio.AbstractEventLoop
    ) -> None:
        options = {"access_log": None}  # not said by the types: no log, the listener writes one of its own
        super().__init__(
            server, loop=loop, keepalive_timeout=bounds.idle_seconds, logger=_http_log,
            max_line_size=_LINE_BYTES_MAX, max_field_size=_LINE_BYTES_MAX, **cast(dict[str, Any], options),
        )  # fmt: skip
        self._all = connections
        self._unread_seconds = bounds.unread_seconds
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._all.open.add(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._all.open.discard(self)
        self._heard()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self._loop.call_later(self._unread_seconds, self._cut)

    def resume_writing(self) -> None:
        self._heard()
        super().resume_writing()

    def _heard(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _cut(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class _TurnedAway(asyncio.Protocol):
    """A connection that is one too many: told so, and closed once it has said something or a moment has passed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(_full())
        self._loop.call_later(_TURNED_AWAY_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        # Closed before its request is read, it might never read why.
        if self._transport is not None:
            self._transport.close()


def _full() -> bytes:
    request_id = secrets.token_hex(16)
    content = body(Refused(Problem.OVERLOADED), request_id)
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 2\r\n"
        b"%bX-Request-Id: %b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
        % (_DATE.line(clock.wall()), request_id.encode("ascii"), len(content), content)
    )


_DATE: Final = DateField()
