"""Choose the client connection to close when another one arrives at the bound.

It is the one that has been idle longest among those without a request in flight: it is idle, has sent nothing yet, or
has stalled in the middle of a request. Each is spared for a moment, so that a new client can send its request however
fast others connect.

The search costs nothing on the path of a request: all connections are searched only at the bound, and each search
returns a batch of candidates.
"""

from __future__ import annotations

import collections
import heapq
from collections.abc import Collection
from typing import Final

from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.client.connection import ClientConnection
from keyproxy.wire.deadlines import NO_DEADLINE
from keyproxy.wire.phases import CLOSING

#: How long a connection keeps its place without a request, and with a stalled request or handshake.
SPARED_SECONDS: Final = 0.02
SPARED_UNFINISHED_SECONDS: Final = 1.0

#: If none was found, all are searched again after this time.
_LOOK_SECONDS: Final = 0.1

_BATCH_MIN: Final = 16
_BATCH_DIVISOR: Final = 32


class IdleConnections:
    """The candidates for eviction. `is_soon`: there is none now, but there will be one in a moment."""

    def __init__(self) -> None:
        self.is_soon = False
        self._batch: collections.deque[tuple[float, ClientConnection]] = collections.deque()
        self._next_look_mono = 0.0

    def first(self, connections: Collection[ClientConnection], now: float) -> ClientConnection | None:
        """The connection to close first; None if none can be closed."""
        found = self._still_first(now)
        if found is None and now >= self._next_look_mono:
            self._look(connections, now)
            found = self._still_first(now)
        return found

    def _still_first(self, now: float) -> ClientConnection | None:
        batch = self._batch
        while batch:
            since, connection = batch[0]
            if connection.has_place and connection.quiet_since == since and spared_until(connection, now) <= now:
                return connection
            batch.popleft()
        return None

    def _look(self, connections: Collection[ClientConnection], now: float) -> None:
        soonest, found = float("inf"), []
        for connection in connections:
            if connection.has_place:
                until = spared_until(connection, now)
                if until <= now:
                    found.append((connection.quiet_since, connection))
                elif until < soonest:
                    soonest = until
        number = max(_BATCH_MIN, len(connections) // _BATCH_DIVISOR)
        self._batch.extend(heapq.nsmallest(number, found, key=lambda one: one[0]))
        self.is_soon = not found and soonest <= now + SPARED_SECONDS
        self._next_look_mono = 0.0 if found else min(soonest, now + _LOOK_SECONDS)


def spared_until(connection: ClientConnection, now: float) -> float:
    """Return until when a connection is spared at the bound; NO_DEADLINE: until its request is over."""
    exchange, transport = connection.exchange, connection.transport
    if not transport.is_open:
        return 0.0  # it is already closing
    if transport.is_stalled:
        is_slow = exchange is None and transport.reads_slowly(now, for_seconds=SPARED_UNFINISHED_SECONDS)
        return 0.0 if is_slow else NO_DEADLINE
    if exchange is None:
        return connection.quiet_since + (SPARED_UNFINISHED_SECONDS if connection.stream.buffer else SPARED_SECONDS)
    is_unfinished = connection.waits_for_client(exchange) and not exchange.has_upstream
    return connection.quiet_since + SPARED_UNFINISHED_SECONDS if is_unfinished else NO_DEADLINE


def evict(connection: ClientConnection) -> None:
    """Close a connection immediately, for another client."""
    transport = connection.transport
    if transport.is_open and connection.exchange is not None:
        connection.exchange.refuse(Refusal(Reason.REQUEST_TIMEOUT, "the body did not arrive while others connected"))
    elif transport.is_open and connection.stream.buffer and not transport.is_stalled:
        refusal = Refusal(Reason.REQUEST_TIMEOUT, "the head did not arrive while others connected")
        connection.refuse_without_exchange(refusal)
    elif not transport.is_open or transport.is_stalled:
        connection.abort()
    if transport.phase < CLOSING:
        connection.close()
