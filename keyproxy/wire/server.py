"""The proxied port: accepts connections within the bound, tracks them, and drains them.

A reload replaces the terms while
connections are open; a request is served on the terms that it began with, the next one on the new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Callable
from typing import Final, cast

from keyproxy.auth import credentials
from keyproxy.http.own_response import OwnResponse
from keyproxy.platform import clock as clock_room
from keyproxy.ports.gate import Recorder
from keyproxy.wire.body_buffer import BodyMemory
from keyproxy.wire.client.connection import ClientConnection
from keyproxy.wire.client.exchange_owner import ExchangeOwner
from keyproxy.wire.client.request_ids import RequestIds
from keyproxy.wire.client.revalidation import Revalidation
from keyproxy.wire.context import ServerContext, ServerTerms
from keyproxy.wire.deadlines import Deadlines
from keyproxy.wire.handshake import AcceptedSocket
from keyproxy.wire.idle_eviction import SPARED_SECONDS, SPARED_UNFINISHED_SECONDS, IdleConnections, evict
from keyproxy.wire.listener import SocketListener
from keyproxy.wire.parsing.head_cache import RequestReader
from keyproxy.wire.reading_turns import ReadingTurns
from keyproxy.wire.responses import response_heads
from keyproxy.wire.usage_reads import UsageReads

_log = logging.getLogger(__name__)

#: Connections over the bound that are accepted to be refused; any beyond this number wait in the kernel's queue.
_TURNED_AWAY_MAX: Final = 128

#: How long an accepted connection waits for another one to close.
_PLACE_SECONDS_MAX: Final = 1.0

#: A TLS connection that is being closed waits for its peer no longer than its deadline, which slow readers may move.
_TLS_SHUTDOWN_SECONDS: Final = 3600.0

#: How long a connection that is idle when draining begins may still be used for one more request. Its client may be
#: sending one at this moment.
_LAST_REQUEST_SECONDS: Final = 1.0


class ProxyServer(ServerContext):
    """The proxied port."""

    def __init__(
        self,
        terms: ServerTerms,
        *,
        recorder: Recorder,
        deadlines: Deadlines,
        clock: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
        request_ids: RequestIds,
        wall: Callable[[], float] = clock_room.wall,
    ) -> None:
        self.recorder = recorder
        self.clock = clock
        self.wall = wall
        self.request_ids = request_ids
        self._date = response_heads.DateField()
        self.loop = loop
        self.is_draining = False
        #: For bodies that are buffered whole.
        self.room = BodyMemory(terms.tokens)
        #: Responses that are read on for their usage after their clients have left.
        self.usage_reads = UsageReads(loop)
        #: Schedules long work on requests in turns.
        self.turns = ReadingTurns()
        self._deadlines = deadlines
        self._connections: set[ClientConnection] = set()
        self._listener: SocketListener | None = None
        self._unopened = 0
        #: Connections that count towards the bound, handshakes in progress with their start, and eviction candidates.
        self._places = 0
        self._handshakes: dict[socket.socket, float] = {}
        self._idle = IdleConnections()
        self._evicted = 0
        self._exhausted = 0
        self._revalidation = Revalidation(loop, self._connections)
        self._all_gone = asyncio.Event()
        self._all_gone.set()
        self._take(terms)

    def _take(self, terms: ServerTerms) -> None:
        self.listen = listen = terms.listen
        self.header_bytes_max, self.body_bytes_max = listen.header_bytes_max, listen.body_bytes_max
        self.keepalive_seconds = listen.keepalive_timeout_seconds
        self.room.configure(terms.tokens)
        self.gate = terms.gate
        self.assertions = terms.assertions
        self.routes = terms.routes
        self.key_format = terms.key_format
        self.upstreams = terms.upstreams
        self.names = terms.names
        self.problems = terms.problems
        self.trust = terms.trust
        holds_key = functools.partial(credentials.holds_key, key_format=terms.key_format)
        routes = terms.routes
        self.requests = RequestReader(
            terms.names, holds_key, routes.methods(), accepts_encoded_slash=routes.forwards_encoded_slash
        )
        self._tls = terms.tls

    def start(self, sock: socket.socket) -> None:
        """Serve a bound socket, which is closed when draining begins, or when another replaces it."""
        self._listen(sock)
        self._revalidation.start()

    def change(self, terms: ServerTerms, sock: socket.socket | None) -> None:
        """Use new terms from the next request on, and accept on this socket; None: keep the current socket."""
        before = self._listener
        if before is None:
            return
        self._take(terms)
        if sock is not None:
            self._listen(sock)
            self._exhausted += before.exhausted
            before.stop()

    def admit(self, connection: ExchangeOwner) -> bool:
        """Register a new connection. False if it is over the bound and has to be turned away."""
        admitted = cast("ClientConnection", connection)
        self._connections.add(admitted)
        self._deadlines.watch(admitted)
        self._all_gone.clear()
        if self._places >= self.listen.connections_max and not self._evict(self.clock()):
            return False
        self._places += 1
        admitted.has_place = True
        return True

    def forget(self, connection: ExchangeOwner) -> None:
        """The connection is lost."""
        lost = cast("ClientConnection", connection)
        self._deadlines.forget(lost)
        self._connections.discard(lost)
        if lost.has_place:
            lost.has_place = False
            self._places -= 1
        if not self._connections:
            self._all_gone.set()

    def date_line(self) -> bytes:
        """The Date line of a response that is sent now."""
        return self._date.line(self.wall())

    def open_connections(self) -> int:
        """The number of client connections."""
        return len(self._connections)

    def failed_connections(self) -> dict[str, int]:
        """The number of connections that failed to open or were evicted, by reason.

        `file_descriptors` counts every failed attempt, a connection perhaps several times; `evicted` counts connections
        closed for another one at the bound.
        """
        exhausted = self._exhausted + (self._listener.exhausted if self._listener is not None else 0)
        return {"file_descriptors": exhausted, "handshake": self._unopened, "evicted": self._evicted}

    def open_requests(self) -> int:
        """The number of requests in flight."""
        return sum(not connection.is_idle for connection in self._connections)

    def open_tunnels(self) -> int:
        """The number of open tunnels."""
        return sum(one.exchange is not None and one.exchange.is_tunnel for one in self._connections)

    def leave(self) -> None:
        """Keep accepting, but close the connection after every response, so that clients move to another proxy."""
        self.is_draining = True

    async def drain(self, seconds: float) -> None:
        """Stop accepting; give requests in flight this long to finish; then cut the rest."""
        try:
            await self._drain(seconds)
        finally:
            self.usage_reads.end_all()

    async def _drain(self, seconds: float) -> None:
        self.is_draining = True
        listener = self._listener
        self._stop_listening()
        if listener is not None:
            # Connections accepted before are served, even if their handshake is not over yet.
            await listener.opened(min(seconds, _LAST_REQUEST_SECONDS))
        for connection in list(self._connections):
            if connection.exchange is not None:
                connection.exchange.close_tunnel()
        if await self._are_gone(min(seconds, _LAST_REQUEST_SECONDS)):
            return
        for connection in list(self._connections):
            connection.close_if_idle()
        if not await self._are_gone(max(0.0, seconds - _LAST_REQUEST_SECONDS)):
            _log.warning("draining timed out after %g s: cutting %d connections", seconds, len(self._connections))
            for connection in list(self._connections):
                connection.abort()

    async def _are_gone(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._all_gone.wait()
        return self._all_gone.is_set()

    def _listen(self, sock: socket.socket) -> None:
        self._listener = SocketListener(sock, self.loop, open_=self._open, has_room=self._has_room)
        self._listener.start()

    async def _open(self, sock: socket.socket) -> None:
        """Open a connection on an accepted socket: immediately without TLS, after the handshake with TLS."""
        await self._make_place()
        tls = self._tls
        # Without TLS too: the entry reserves the place until the connection is open.
        self._handshakes[sock] = self.clock()
        accepted = None
        if tls is not None:
            accepted = AcceptedSocket(sock, self._without_tls)
            accepted.open()
        try:
            await self.loop.connect_accepted_socket(
                self._connection,
                sock,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else self.listen.header_timeout_seconds,
                ssl_shutdown_timeout=None if tls is None else _TLS_SHUTDOWN_SECONDS,
            )
        except OSError:
            # With TLS only: the client uses another protocol, has no certificate, takes too long, or has left.
            self._unopened += sock in self._handshakes
            if accepted is not None:
                await accepted.close(self.loop)
        finally:
            self._handshakes.pop(sock, None)

    def _without_tls(self) -> bytes:
        """Return the response to plain HTTP on a TLS port."""
        fields = b"Content-Type: text/plain; charset=utf-8\r\nCache-Control: no-store\r\n"
        response = OwnResponse(400, b"Bad Request", fields, b"This port speaks TLS. Use https:// in the URL.\n")
        request_id = self.request_ids.choose(None, self.key_format)
        return response_heads.own(response, request_id, self.date_line(), closes=True)

    def _opening(self) -> int:
        return self._listener.opening() if self._listener is not None else 0

    def _has_room(self) -> bool:
        """Whether a connection may be accepted now. Otherwise it waits in the kernel's queue for a moment."""
        if len(self._connections) + self._opening() < self.listen.connections_max + _TURNED_AWAY_MAX:
            return True
        while self._evict_handshake(self.clock()):
            pass
        return False

    async def _make_place(self) -> None:
        """At the bound: end the connection that has been idle longest, waiting until it may be closed if necessary."""
        waited_seconds = 0.0
        while self._places + len(self._handshakes) >= self.listen.connections_max and not self._evict(self.clock()):
            # Handshakes are spared for a while too, and sockets accepted in the same go are not open yet.
            is_soon = self._idle.is_soon or bool(self._handshakes)
            if not is_soon or waited_seconds >= _PLACE_SECONDS_MAX:
                return
            await asyncio.sleep(SPARED_SECONDS)
            waited_seconds += SPARED_SECONDS

    def _evict(self, now: float) -> bool:
        """At the bound: end the connection or handshake that has been idle longest. False if none may end."""
        first = self._idle.first(self._connections, now)
        if first is None or first.quiet_since > next(iter(self._handshakes.values()), now):
            if self._evict_handshake(now):
                return True
            if first is None:
                return False
        self._evicted += 1
        self._places -= 1
        first.has_place = False
        evict(first)
        return True

    def _evict_handshake(self, now: float) -> bool:
        """End the oldest handshake, if its time is up."""
        for sock, began in self._handshakes.items():
            if now - began < SPARED_UNFINISHED_SECONDS:
                return False
            del self._handshakes[sock]
            self._evicted += 1
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            return True
        return False

    def _stop_listening(self) -> None:
        self._revalidation.stop()
        if self._listener is not None:
            self._exhausted += self._listener.exhausted
            self._listener.stop()
            self._listener = None

    def _connection(self) -> ClientConnection:
        return ClientConnection(self)
