"""The proxied port: accepts connections within the bound, knows them all, and drains them.

Also the one place that a connection finds what it shares with all others: settings, header names, the gateway.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from typing import Final

from keyproxy.headers import FieldNames, TrustRule
from keyproxy.ports import Gate, Recorder
from keyproxy.problems import Problems
from keyproxy.settings import Listen
from keyproxy.wire.client import ClientConnection
from keyproxy.wire.deadlines import Deadlines
from keyproxy.wire.pool import Upstreams
from keyproxy.wire.readers import RequestReader

_log = logging.getLogger(__name__)

_BACKLOG: Final = 1024
_WRITE_BUFFER_BYTES: Final = 65_536

#: Connections over the bound that are told so; more of them than this are closed without a word.
_TURNED_AWAY_MAX: Final = 128

#: SO_LINGER on, zero seconds: closing sends a reset, which no client takes for a clean end.
_RESET: Final = struct.pack("ii", 1, 0)


class ProxyServer:
    """See the module."""

    def __init__(
        self, listen: Listen, *, gate: Gate, recorder: Recorder, upstreams: Upstreams, names: FieldNames,
        problems: Problems, deadlines: Deadlines, clock: Callable[[], float], loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        self.listen = listen
        self.gate = gate
        self.recorder = recorder
        self.upstreams = upstreams
        self.names = names
        self.requests = RequestReader(names, gate.holds_key)
        self.problems = problems
        self.clock = clock
        self.loop = loop
        self.trust = TrustRule(listen.trusted_proxies)
        self.is_draining = False
        self._deadlines = deadlines
        self._connections: set[ClientConnection] = set()
        self._listener: asyncio.Server | None = None
        self._all_gone = asyncio.Event()
        self._all_gone.set()

    async def start(self, sock: socket.socket) -> None:
        """Serve a bound socket."""
        if sock.family == socket.AF_UNIX:
            self._listener = await self.loop.create_unix_server(self._connection, sock=sock, backlog=_BACKLOG)
        else:
            self._listener = await self.loop.create_server(self._connection, sock=sock, backlog=_BACKLOG)

    def admit(self, connection: ClientConnection) -> bool:
        """Register a new connection. False if it is over the bound and has to be turned away."""
        self._connections.add(connection)
        self._deadlines.watch(connection)
        self._all_gone.clear()
        over = len(self._connections) - self.listen.connections_max
        if over > _TURNED_AWAY_MAX:
            connection.abort()
        return over <= 0

    def forget(self, connection: ClientConnection) -> None:
        """The connection is lost."""
        self._deadlines.forget(connection)
        self._connections.discard(connection)
        if not self._connections:
            self._all_gone.set()

    def open_connections(self) -> int:
        """How many client connections there are."""
        return len(self._connections)

    def open_requests(self) -> int:
        """How many requests are under way."""
        return sum(not connection.is_idle for connection in self._connections)

    async def drain(self, seconds: float) -> None:
        """Accept no more; let what is under way finish, for so long; then cut what is left."""
        self.is_draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.close_if_idle()
        try:
            async with asyncio.timeout(seconds):
                await self._all_gone.wait()
        except TimeoutError:
            _log.warning("draining took longer than %g s: %d connections are cut", seconds, len(self._connections))
            for connection in list(self._connections):
                connection.abort()

    def reset_on_close(self, transport: asyncio.Transport) -> None:
        """Make the close of this transport a reset."""
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def _connection(self) -> ClientConnection:
        return ClientConnection(self)
