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
from typing import Final, Protocol

#: How long a connection keeps its place without a request, and with a stalled request or handshake.
SPARED_SECONDS: Final = 0.02
SPARED_UNFINISHED_SECONDS: Final = 1.0

#: If none was found, all are searched again after this time.
_LOOK_SECONDS: Final = 0.1

_BATCH_MIN: Final = 16
_BATCH_DIVISOR: Final = 32


class Place(Protocol):
    """The interface of a client connection. `quiet_since`: the start of its client's inactivity."""

    has_place: bool
    quiet_since: float

    def spared_until(self, now: float) -> float:
        """Return until when the connection keeps its place at the bound."""
        ...

    def give_up_place(self) -> None:
        """End now: another client gets the place."""
        ...


class Quiet:
    """The candidates for eviction. `is_soon`: there is none now, but there will be one in a moment."""

    def __init__(self) -> None:
        self.is_soon = False
        self._batch: collections.deque[tuple[float, Place]] = collections.deque()
        self._next_look_mono = 0.0

    def first(self, connections: Collection[Place], now: float) -> Place | None:
        """The connection to close first; None if none can be closed."""
        found = self._still_first(now)
        if found is None and now >= self._next_look_mono:
            self._look(connections, now)
            found = self._still_first(now)
        return found

    def _still_first(self, now: float) -> Place | None:
        batch = self._batch
        while batch:
            since, connection = batch[0]
            if connection.has_place and connection.quiet_since == since and connection.spared_until(now) <= now:
                return connection
            batch.popleft()
        return None

    def _look(self, connections: Collection[Place], now: float) -> None:
        soonest, found = float("inf"), []
        for connection in connections:
            if connection.has_place:
                until = connection.spared_until(now)
                if until <= now:
                    found.append((connection.quiet_since, connection))
                elif until < soonest:
                    soonest = until
        number = max(_BATCH_MIN, len(connections) // _BATCH_DIVISOR)
        self._batch.extend(heapq.nsmallest(number, found, key=lambda one: one[0]))
        self.is_soon = not found and soonest <= now + SPARED_SECONDS
        self._next_look_mono = 0.0 if found else min(soonest, now + _LOOK_SECONDS)
