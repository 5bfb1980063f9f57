"""Connections to an aiohttp server: bounds on their number and on the time to send or read something.

aiohttp closes a connection on which no request starts within the keep-alive time, also after a partial head. This module
bounds the rest: the number of connections, the time for a TLS handshake, and the time for which a client may leave a
response unread. At the bound the connection that has been idle longest is closed, else the one that has been sending a
body longest, never one whose complete request is in flight.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final, NamedTuple, cast

from aiohttp import web
from aiohttp.http_parser import RawRequestMessage

from keyproxy.platform import clock
from keyproxy.wire.handshake import AcceptedSocket
from keyproxy.wire.listener import SocketListener
from keyproxy.wire.outflow import outstanding_bytes
from keyproxy.wire.responses.response_heads import DateField

_LINE_BYTES_MAX: Final = 65_536
#: Of the whole head: aiohttp bounds each field and their number, whose product is several MiB for each connection.
_HEAD_BYTES_MAX: Final = 131_072
_TURNED_AWAY_SECONDS: Final = 1.0

#: For how long to read the rest of a request after an early response.
_LINGERING_SECONDS: Final = 2.0

#: For how long a connection without a request is spared at the bound, so that its client can send one.
_SPARED_SECONDS: Final = 0.02


class Bounds(NamedTuple):
    """`idle_seconds`: without a complete head. `unread_seconds`: with an unread response. `body_seconds`: for how long a
    connection that sends a body is spared at the bound."""

    connections_max: int = 256
    idle_seconds: float = 30.0
    handshake_seconds: float = 10.0
    unread_seconds: float = 60.0
    body_seconds: float = 2.0


_DATE: Final = DateField()


def date_line() -> bytes:
    """The Date line of a response that is sent now."""
    return _DATE.line(clock.wall())


def _without_tls() -> bytes:
    """The response to a request without TLS on a TLS port."""
    content = b"This port speaks TLS. Use https:// in the URL.\n"
    return (
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n%bContent-Length: %d\r\n"
        b"Connection: close\r\n\r\n%b" % (date_line(), len(content), content)
    )


def _head_too_large() -> bytes:
    return (
        b"HTTP/1.1 431 Request Header Fields Too Large\r\n%bContent-Length: 0\r\nConnection: close\r\n\r\n"
        % date_line()
    )


class Connections:
    """Accepts connections for one aiohttp server, within bounds."""

    def __init__(
        self,
        server: web.Server,
        bounds: Bounds,
        *,
        full: Callable[[], bytes],
        log: logging.Logger,
        line_bytes_max: int = _LINE_BYTES_MAX,
    ) -> None:
        """`full`: makes the response to a connection beyond the bound. `log`: the logger for aiohttp.

        `line_bytes_max`: of the request line, and of each field.
        """
        self.line_bytes_max: Final = line_bytes_max
        self.evicted = 0
        self._server = server
        self._bounds = bounds
        self._full = full
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._listening: SocketListener | None = None
        #: Of the next connections.
        self.tls: ssl.SSLContext | None = None
        self.open: set[_Connection] = set()

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Accept on a bound socket."""
        self.tls = tls
        self._listening = SocketListener(sock, self._loop, open_=self._open, has_room=self._has_room)
        self._listening.start()

    def stop(self) -> None:
        """Stop accepting. Open connections stay open."""
        if self._listening is not None:
            self._listening.stop()
            self._listening = None

    async def _open(self, sock: socket.socket) -> None:
        """Make a connection from an accepted socket: at once without TLS, else after the handshake."""
        accepted, seconds = None, None
        if self.tls is not None:
            accepted, seconds = AcceptedSocket(sock, _without_tls), self._bounds.handshake_seconds
            accepted.open()
        try:
            await self._loop.connect_accepted_socket(self._accepted, sock, ssl=self.tls, ssl_handshake_timeout=seconds)
        except OSError:
            if accepted is not None:
                await accepted.close(self._loop)

    def _has_room(self) -> bool:
        return self._listening is None or self._listening.opening() < self._bounds.connections_max

    def _accepted(self) -> asyncio.Protocol:
        if len(self.open) >= self._bounds.connections_max and not self._evict():
            return _RejectedConnection(self._loop, self._full())
        return _Connection(self, self._server, self._bounds, self._log)

    def _evict(self) -> bool:
        """Close the connection that is worth least. False if all of them have complete requests in flight."""
        now = self._loop.time()
        idle = [one for one in self.open if one.is_idle and one.idle_since <= now - _SPARED_SECONDS]
        sending = [one for one in self.open if one.is_sending and one.sending_since <= now - self._bounds.body_seconds]
        if idle:
            longest = min(idle, key=lambda one: one.idle_since)
        elif sending:
            longest = min(sending, key=lambda one: one.sending_since)
        else:
            return False
        self.open.discard(longest)
        self.evicted += 1
        longest.force_close()
        return True


class _Connection(web.RequestHandler):
    """A connection that registers with `Connections` while it is open, so that the limits hold."""

    def __init__(self, connections: Connections, server: web.Server, bounds: Bounds, log: logging.Logger) -> None:
        options = {"access_log": None}  # not covered by the type stubs: the listener writes its own access log
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=bounds.idle_seconds,
            logger=log,
            lingering_time=_LINGERING_SECONDS,
            max_line_size=connections.line_bytes_max,
            max_field_size=connections.line_bytes_max,
            auto_decompress=False,
            **cast(dict[str, Any], options),
        )
        self._all = connections
        self._unread_seconds = bounds.unread_seconds
        self._unread_bytes = 0
        self._unread: asyncio.TimerHandle | None = None
        #: The body that is arriving or has arrived last, and the bytes since then of a head that is not complete.
        self._body: Any = None
        self._head_bytes = 0
        self._is_malformed = False
        self.sending_since = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight; one may have begun to arrive."""
        return self._waiter is not None and not self._waiter.done()

    @property
    def idle_since(self) -> float:
        """The start of the current idle time."""
        return self._next_keepalive_close_time - self._keepalive_timeout

    @property
    def is_sending(self) -> bool:
        """Whether the body of a request has not arrived completely."""
        return self._body is not None and not self._body.is_eof()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Respond to what is not HTTP. aiohttp's message quotes it, and it may contain a secret."""
        text = message if message is None else "The request is not valid HTTP.\n"
        return super().handle_error(request, status, exc, text)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._all.open.add(self)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._is_malformed:
            # aiohttp would parse what follows, and keep one more error with these bytes.
            return
        received = self._request_count
        super().data_received(data)
        if self._request_count != received:
            message, body = self._messages[-1]
            self._body, self._head_bytes, self.sending_since = body, 0, self._loop.time()
            if not isinstance(message, RawRequestMessage):
                self._is_malformed = True
                if message.exc is not None:
                    # Its frames refer to the bytes and to the error: a cycle that occupies memory until a collection.
                    message.exc.__traceback__ = None
        elif not self.is_sending:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES_MAX:
                self._refuse_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._all.open.discard(self)
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def _refuse_head(self) -> None:
        """Close the connection, with a response if no other one is being written."""
        if self.transport is not None and self.is_idle:
            self.transport.write(_head_too_large())
        self.force_close()

    def _watch_reading(self) -> None:
        self._unread_bytes = 0 if self.transport is None else outstanding_bytes(self.transport)
        self._unread = self._loop.call_later(self._unread_seconds, self._look_at_reading)

    def _look_at_reading(self) -> None:
        """Disconnect a client that has read nothing: its buffer is unchanged, and nothing was written meanwhile."""
        if self.transport is None:
            return
        if outstanding_bytes(self.transport) < self._unread_bytes:
            self._watch_reading()
        else:
            self.transport.abort()

    def _stop_watching(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class _RejectedConnection(asyncio.Protocol):
    """A connection beyond the bound: it gets a refusal, and is closed once it has sent bytes, or after a second."""

    def __init__(self, loop: asyncio.AbstractEventLoop, full: bytes) -> None:
        self._loop = loop
        self._full = full
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._full)
        self._loop.call_later(_TURNED_AWAY_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        # If closed before its request is read, it might never receive the reason.
        if self._transport is not None:
            self._transport.close()
