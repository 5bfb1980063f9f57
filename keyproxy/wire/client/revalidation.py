"""Check open exchanges again while they last: is the key still valid, and is the client still connected?

A key that expires or is revoked ends its streams and tunnels: every half second, each exchange that has lasted that
long is passed to `Gate.review`, which looks its key up again and refuses the exchange if it is not valid any more. The
same round drops the last request's head of each idle connection, because the key is in it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Final

from keyproxy.wire.client.connection import ClientConnection

_log = logging.getLogger(__name__)

#: How often exchanges are checked again, and how old the first time.
_PERIOD_SECONDS: Final = 0.5
_LONG_SECONDS: Final = 0.5


class Revalidation:
    """Checks the exchanges of all `connections` of a server."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connections: Collection[ClientConnection]) -> None:
        self._loop = loop
        self._connections = connections
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start checking."""
        self._timer = self._loop.call_later(_PERIOD_SECONDS, self._check_all)

    def stop(self) -> None:
        """Stop checking."""
        if self._timer is not None:
            self._timer.cancel()

    def _check_all(self) -> None:
        self.start()
        known = [one for one in self._connections if one.exchange is not None or one.stream.last_head is not None]
        for connection in known:
            try:
                _check(connection)
            except Exception:  # noqa: BLE001 - the outermost boundary of one check: it is not verified any more
                _log.exception("reviewing a connection failed; cutting it")
                connection.abort()


def _check(connection: ClientConnection) -> None:
    exchange, transport, server = connection.exchange, connection.transport, connection.server
    now = server.clock()
    if exchange is None:
        connection.stream.last_head = None
        return
    if exchange.started_mono > now - _LONG_SECONDS:
        return
    if transport.is_stalled:
        transport.sample(now)
    if transport.is_abandoned():
        connection.abort()
    elif exchange.permit is not None:
        server.gate.review(exchange)
    else:
        exchange.check_pace()
