"""The proxied port: accepts connections within the bound, knows them all, and drains them.

Also the one place that a connection finds what it shares with all others, `Terms`: settings, header names, the gateway.
They can be exchanged for others while connections are open; a request is served on the terms it began with, the next one
on the new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

from keyproxy.config.schema import Listen
from keyproxy.http.error_responses import Answer, Problems
from keyproxy.http.headers import FieldNames, TrustRule
from keyproxy.platform import clock as clock_room
from keyproxy.ports import Gate, Recorder
from keyproxy.wire import response_heads
from keyproxy.wire.body_buffer import BodyMemory
from keyproxy.wire.client.connection import ClientConnection
from keyproxy.wire.client.transport import ClientTransport
from keyproxy.wire.context import ServerContext
from keyproxy.wire.deadlines import Deadlines
from keyproxy.wire.handshake import Accepted
from keyproxy.wire.idle_eviction import SPARED_SECONDS, SPARED_UNFINISHED_SECONDS, Quiet
from keyproxy.wire.listener import Listener
from keyproxy.wire.parsing.head_cache import RequestReader
from keyproxy.wire.reading_turns import ReadingTurns
from keyproxy.wire.upstream.pool import Upstreams

_log = logging.getLogger(__name__)

#: Connections over the bound that are taken to be told so; more of them than this wait in the kernel's queue.
_TURNED_AWAY_MAX: Final = 128

#: For how long an accepted connection waits for another one to close.
_PLACE_SECONDS_MAX: Final = 1.0

#: A TLS connection that is being closed waits for its peer no longer than its deadline, which slow readers may move.
_TLS_SHUTDOWN_SECONDS: Final = 3600.0

#: How often exchanges that take long are looked at again, and what counts as long; and for how long at most a connection
#: on which nothing is under way keeps its last head, with the key in it.
_REVIEW_SECONDS: Final = 0.5
_LONG_SECONDS: Final = 0.5

#: How long a connection that lies idle when draining begins may still be used for one request more. Its client may be
#: sending it at this moment, and could not know.
_LAST_REQUEST_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms requests are served. `tls` None: in the clear."""

    listen: Listen
    gate: Gate
    upstreams: Upstreams
    names: FieldNames
    problems: Problems
    trust: TrustRule
    tls: ssl.SSLContext | None = None


class ProxyServer(ServerContext):
    """See the module."""

    def __init__(
        self, terms: Terms, *, recorder: Recorder, deadlines: Deadlines, clock: Callable[[], float],
        loop: asyncio.AbstractEventLoop, wall: Callable[[], float] = clock_room.wall,
    ) -> None:  # fmt: skip
        self.recorder = recorder
        self.clock = clock
        self._wall = wall
        self._date = response_heads.DateField()
        self.loop = loop
        self.is_draining = False
        #: For bodies that are read whole.
        self.room = BodyMemory()
        #: Schedules long work on requests in turns.
        self.turns = ReadingTurns()
        self._deadlines = deadlines
        self._connections: set[ClientConnection] = set()
        self._listener: Listener | None = None
        self._unopened = 0
        #: Connections that count towards the bound, handshakes under way with their start, and what leaves at the bound.
        self._places = 0
        self._handshakes: dict[socket.socket, float] = {}
        self._quiet = Quiet()
        self._evicted = 0
        self._exhausted = 0
        self._review: asyncio.TimerHandle | None = None
        self._all_gone = asyncio.Event()
        self._all_gone.set()
        self._take(terms)

    def _take(self, terms: Terms) -> None:
        self.listen = terms.listen
        self.gate = terms.gate
        self.upstreams = terms.upstreams
        self.names = terms.names
        self.problems = terms.problems
        self.trust = terms.trust
        self.requests = RequestReader(terms.names, terms.gate.holds_key, terms.gate.methods)
        self._tls = terms.tls

    def start(self, sock: socket.socket) -> None:
        """Serve a bound socket, which is closed when draining begins, or when another takes its place."""
        self._listen(sock)
        self._review = self.loop.call_later(_REVIEW_SECONDS, self._look_after_all)

    def change(self, terms: Terms, sock: socket.socket | None) -> None:
        """Serve on other terms from the next request on, and accept on this socket; None: on the same as before."""
        before = self._listener
        if before is None:
            return
        self._take(terms)
        if sock is not None:
            self._listen(sock)
            self._exhausted += before.exhausted
            before.stop()

    def admit(self, connection: ClientTransport) -> bool:
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

    def forget(self, connection: ClientTransport) -> None:
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
        return self._date.line(self._wall())

    def open_connections(self) -> int:
        """How many client connections there are."""
        return len(self._connections)

    def failed_connections(self) -> dict[str, int]:
        """How many connections did not come about or had to leave, by reason.

        `file_descriptors` counts again and again what waits for one; `evicted` what left at the bound for another.
        """
        exhausted = self._exhausted + (self._listener.exhausted if self._listener is not None else 0)
        return {"file_descriptors": exhausted, "handshake": self._unopened, "evicted": self._evicted}

    def open_requests(self) -> int:
        """How many requests are under way."""
        return sum(not connection.is_idle for connection in self._connections)

    def open_tunnels(self) -> int:
        """How many of them are tunnels."""
        return sum(one.exchange is not None and one.exchange.is_tunnel for one in self._connections)

    def leave(self) -> None:
        """Keep accepting, but close the connection after every response, so that clients move to another proxy."""
        self.is_draining = True

    async def drain(self, seconds: float) -> None:
        """Accept no more; let what is under way finish, for so long; then cut what is left."""
        self.is_draining = True
        listener = self._listener
        self._stop_listening()
        if listener is not None:
            # Who has connected before is served, also if the handshake is not over yet.
            await listener.opened(min(seconds, _LAST_REQUEST_SECONDS))
        for connection in list(self._connections):
            if connection.exchange is not None:
                connection.exchange.close_tunnel()
        if await self._are_gone(min(seconds, _LAST_REQUEST_SECONDS)):
            return
        for connection in list(self._connections):
            connection.close_if_idle()
        if not await self._are_gone(max(0.0, seconds - _LAST_REQUEST_SECONDS)):
            _log.warning("draining took longer than %g s: %d connections are cut", seconds, len(self._connections))
            for connection in list(self._connections):
                connection.abort()

    async def _are_gone(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._all_gone.wait()
        return self._all_gone.is_set()

    def _listen(self, sock: socket.socket) -> None:
        self._listener = Listener(sock, self.loop, open_=self._open, has_room=self._has_room)
        self._listener.start()

    async def _open(self, sock: socket.socket) -> None:
        """Make a connection of an accepted socket: at once in the clear, after the handshake with TLS."""
        await self._make_place()
        tls = self._tls
        # In the clear too: until it is a connection it holds the place that was made for it.
        self._handshakes[sock] = self.clock()
        accepted = None
        if tls is not None:
            accepted = Accepted(sock, self._without_tls)
            accepted.open()
        try:
            await self.loop.connect_accepted_socket(
                self._connection, sock, ssl=tls,
                ssl_handshake_timeout=None if tls is None else self.listen.header_timeout_seconds,
                ssl_shutdown_timeout=None if tls is None else _TLS_SHUTDOWN_SECONDS,
            )  # fmt: skip
        except OSError:
            # Of TLS alone: a client that speaks something else, shows no certificate, takes too long, or has left.
            self._unopened += sock in self._handshakes
            if accepted is not None:
                await accepted.close(self.loop)
        finally:
            self._handshakes.pop(sock, None)

    def _without_tls(self) -> bytes:
        """The response to a request that came without TLS to a port that speaks it."""
        fields = b"Content-Type: text/plain; charset=utf-8\r\nCache-Control: no-store\r\n"
        answer = Answer(400, b"Bad Request", fields, b"This port speaks TLS. Use https:// in the URL.\n")
        return response_heads.own(answer, self.gate.request_id(None), self.date_line(), closes=True, without_body=False)

    def _opening(self) -> int:
        return self._listener.opening() if self._listener is not None else 0

    def _has_room(self) -> bool:
        """Whether a connection may be accepted now. One that may not waits for a moment."""
        if len(self._connections) + self._opening() < self.listen.connections_max + _TURNED_AWAY_MAX:
            return True
        while self._evict_handshake(self.clock()):
            pass
        return False

    async def _make_place(self) -> None:
        """At the bound: end the connection that has been idle longest, waiting until it may be closed if necessary."""
        waited_seconds = 0.0
        while self._places + len(self._handshakes) >= self.listen.connections_max and not self._evict(self.clock()):
            # A handshake has its time too, and what is accepted in the same go is no connection yet.
            is_soon = self._quiet.is_soon or bool(self._handshakes)
            if not is_soon or waited_seconds >= _PLACE_SECONDS_MAX:
                return
            await asyncio.sleep(SPARED_SECONDS)
            waited_seconds += SPARED_SECONDS

    def _evict(self, now: float) -> bool:
        """At the bound: end the connection or handshake that has been idle longest. False if none may end."""
        first = self._quiet.first(self._connections, now)
        if first is None or first.quiet_since > next(iter(self._handshakes.values()), now):
            if self._evict_handshake(now):
                return True
            if first is None:
                return False
        self._evicted += 1
        self._places -= 1
        first.has_place = False
        first.give_up_place()
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
        if self._review is not None:
            self._review.cancel()
        if self._listener is not None:
            self._exhausted += self._listener.exhausted
            self._listener.stop()
            self._listener = None

    def _look_after_all(self) -> None:
        self._review = self.loop.call_later(_REVIEW_SECONDS, self._look_after_all)
        now = self.clock()
        known = [one for one in self._connections if one.exchange is not None or one.stream.last_head is not None]
        for connection in known:
            try:
                connection.check_liveness(long_since=now - _LONG_SECONDS)
            except Exception:  # noqa: BLE001 - the outermost boundary of one look: it is not verified any more
                _log.exception("looking after a connection met a defect; it is cut")
                connection.abort()

    def _connection(self) -> ClientConnection:
        return ClientConnection(self)
