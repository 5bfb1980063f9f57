"""Connections to one upstream: bounded in number, reused, expired, and shared between users.

    lent + idle + connecting <= connections_max; an exchange waits only while all of them are lent or connecting, or its
    user holds as many as one user may.

A request that has used an approval gets a new connection: the upstream may be closing one that was used before, and
would cost the approval without having executed the call.

`take` is the hot path and never waits. `wait` queues an exchange and, if the bound allows, starts to connect; whichever
connection becomes free first, new or returned, goes to the next exchange in turn. The queue is bounded in length and
time. While exchanges wait, those in flight are reviewed regularly: exchanges with a slow client are ended immediately,
those of a user beyond its share after a while. Tunnels, and requests on public routes, have a lower bound of their own,
so that they leave connections for other requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Final

from keyproxy.config.schema import Upstream as UpstreamSettings
from keyproxy.model import PUBLIC, PUBLIC_OWNER, TEST, Owner
from keyproxy.platform.tasks import cancel_all
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.deadlines import Deadlines
from keyproxy.wire.parsing.head_cache import ResponseReader
from keyproxy.wire.upstream import preemption
from keyproxy.wire.upstream.connection import ConnectionOwner, UpstreamConnection
from keyproxy.wire.upstream.connector import UpstreamConnector
from keyproxy.wire.upstream.fair_queue import Turns
from keyproxy.wire.upstream.upstream_user import UpstreamUser

#: Shorter than the shortest usual keep-alive of a server (5 s: uvicorn, Node), so that the proxy closes first.
IDLE_SECONDS: Final = 4.0

#: A connection that was idle longer than this is checked for a close by the upstream before it is lent.
_TRUSTED_IDLE_SECONDS: Final = 0.1

#: How often connections are searched, while exchanges wait, for ones that can be freed.
_LOOK_SECONDS: Final = 0.1

_TOO_MANY: Final = "too many requests wait for an upstream connection"

#: The fraction of the connections that tunnels may take, and that requests on public routes may take; and for how long
#: readiness reports that an exchange had to wait.
_TUNNELS_DIVISOR: Final = 2
_PUBLIC_DIVISOR: Final = 4
_PRESSED_SECONDS: Final = 5.0


class PoolUser(UpstreamUser):
    """The interface that the pool requires of an exchange, in addition to a connection's."""

    def connected(self, upstream: UpstreamConnection) -> None:
        """Use a connection that is lent to this exchange."""
        raise NotImplementedError


class UpstreamPool(ConnectionOwner):
    """The connections to one upstream. `repr` shows their states."""

    def __init__(
        self,
        url: str,
        settings: UpstreamSettings,
        responses: ResponseReader,
        deadlines: Deadlines,
        *,
        clock: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls`: for an https URL, how its certificate is verified."""
        self._connector = UpstreamConnector(url, loop, settings.connect_timeout_seconds, tls)
        self.host = self._connector.address.authority
        self.settings = settings
        self.responses = responses
        self._deadlines = deadlines
        self.clock = clock
        self._loop = loop
        #: The least recently used one first.
        self._idle: list[UpstreamConnection] = []
        self._open: set[UpstreamConnection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._turns: Turns[PoolUser] = Turns(settings.connections_max, settings.connections_per_user_max)
        #: Waiting exchanges that are handshakes for a tunnel.
        self._tunnels_waiting: set[PoolUser] = set()
        #: Exchanges that have their place, and wait for a new connection in place of a used one.
        self._renewing: dict[PoolUser, Owner] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._is_retired = False
        self._public_max = max(1, settings.connections_max // _PUBLIC_DIVISOR)
        self._next_look_mono = self._next_public_look_mono = 0.0
        self._pressed_mono = float("-inf")

    @property
    def unreachable_because(self) -> str:
        """Why the last attempt to connect failed; empty: it did not."""
        return self._connector.unreachable_because

    def take(self, owner: Owner, now: float) -> UpstreamConnection | None:
        """Take the most recently used idle connection; None if there is none, or none for this user."""
        if not self._idle or (owner[2] == PUBLIC and not self._has_room_for_public()):
            return None
        if not self._turns.try_take(owner, now):
            return None
        connection = self._take_idle(now)
        if connection is None:
            self._turns.give_back(owner)
        else:
            connection.owner = owner
        return connection

    def wait(self, exchange: PoolUser, owner: Owner) -> None:
        """Queue the exchange. It gets a connection later, or the reason why there is none."""
        now = self.clock()
        if exchange.is_tunnel_request:
            waiting, tunnels_max = len(self._tunnels_waiting), max(1, self._turns.places // _TUNNELS_DIVISOR)
            if not preemption.make_room_for_tunnel(self._open, waiting, owner, tunnels_max):
                exchange.upstream_lost(Refusal(Reason.OVERLOADED, f"{tunnels_max} tunnels are open or about to be"))
                return
        if owner[2] == PUBLIC and not self._has_room_for_public():
            self._end_slow_public(now)
            exchange.upstream_lost(Refusal(Reason.OVERLOADED, f"{self._public_max} public requests are in flight"))
            return
        if not self._queue(exchange, owner, now):
            exchange.upstream_lost(Refusal(Reason.OVERLOADED, _TOO_MANY))
            return
        if exchange.is_tunnel_request:
            self._tunnels_waiting.add(exchange)
        if self._looking is None:
            seconds = min(_LOOK_SECONDS, self.settings.connect_timeout_seconds)
            self._looking = self._loop.call_later(seconds, self._look_again)
        if not self._lend_idle(now):
            if self._has_room() and self._turns.is_within_cap(owner):
                self._connect()
            else:
                self._make_room(now)

    def wait_no_more(self, exchange: PoolUser) -> None:
        """Remove an exchange that ended while it waited."""
        self._turns.leave(exchange)
        self._tunnels_waiting.discard(exchange)
        self._end_renewal(exchange)

    def release(self, connection: UpstreamConnection, now: float) -> None:
        """Lend a freed connection to the next exchange in turn, or keep it idle. It is checked when it is lent."""
        self._returned(connection)
        if len(self._turns):
            if not connection.is_open:
                connection.abort()
                return
            if self._lend(connection, now):
                return
        if self._is_retired:
            connection.abort()
            return
        connection.idle_since = now
        self._idle.append(connection)
        if self._expiry is None:
            self._expiry = self._loop.call_later(IDLE_SECONDS, self._expire)

    def forget(self, connection: UpstreamConnection) -> None:
        """Remove a lost connection. A new one replaces it if exchanges wait."""
        self._deadlines.forget(connection)
        self._open.discard(connection)
        self._returned(connection)
        if connection.idle_since:
            with contextlib.suppress(ValueError):
                self._idle.remove(connection)
        if len(self._turns):
            self._serve(self.clock())

    async def reach(self) -> bool:
        """Whether the upstream accepts connections; opens one to check if none is open."""
        if not any(connection.is_open for connection in self._open):
            if not self._connecting:
                self._connect()
            await asyncio.wait(self._connecting, timeout=self.settings.connect_timeout_seconds)
        return any(connection.is_open for connection in self._open)

    def counts(self) -> dict[str, int]:
        """Return the number of connections in each state."""
        idle = len(self._idle)
        return {"idle": idle, "busy": len(self._open) - idle, "connecting": len(self._connecting)}

    def congestion(self) -> str:
        """Describe why requests waited for a connection in the last seconds; empty if none did."""
        if self.clock() - self._pressed_mono > _PRESSED_SECONDS:
            return ""
        turns, most = self._turns, self._turns.most_held()
        why = f"all {self.settings.connections_max} connections are in use, {len(turns)} requests wait"
        return f"{why}; one user holds {most}" if most >= turns.share else why

    def retire(self) -> None:
        """Retire this pool in favour of another: serve requests in flight and queued ones, then keep no connection."""
        self._is_retired = True
        while self._idle:
            self._idle.pop().abort()

    async def close(self) -> None:
        """Close everything. Exchanges under way lose their upstream."""
        self.retire()
        for timer in (self._expiry, self._looking):
            if timer is not None:
                timer.cancel()
        await cancel_all(self._connecting)
        for connection in list(self._open):
            connection.abort()

    def _connect(self, exchange: PoolUser | None = None) -> None:
        """Open a connection: for this exchange, else for the next one in turn."""
        task = self._loop.create_task(self._open_one(exchange))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _open_one(self, exchange: PoolUser | None) -> None:
        connection = UpstreamConnection(self, self._loop)
        refusal = await self._connector.open(lambda: connection)
        owner = None if exchange is None else self._end_renewal(exchange)
        if refusal is not None:
            self._connect_failed(refusal)
            if exchange is not None and owner is not None:
                exchange.upstream_lost(refusal)
            return
        self._open.add(connection)
        self._deadlines.watch(connection)
        now = self.clock()
        if exchange is not None and owner is not None:
            self._give(connection, exchange, owner, now)
        else:
            self.release(connection, now)

    def _connect_failed(self, refusal: Refusal) -> None:
        # Without any open connection no waiting exchange can be served: waiting longer would not help.
        failed = 1 if self._open else len(self._turns)
        for _ in range(failed):
            exchange = self._turns.first()
            if exchange is None:
                break
            self.wait_no_more(exchange)
            exchange.upstream_lost(refusal)

    def _waited_too_long(self, owner: Owner, now: float) -> Refusal:
        """Build the refusal of a request that got no connection in time: all are in use, or connecting fails."""
        if self._has_room() and not self._turns.may_take(owner, now):
            return Refusal(Reason.OVERLOADED, "the user holds as many upstream connections as one user may")
        if len(self._open) >= self.settings.connections_max:
            return Refusal(Reason.OVERLOADED, "no upstream connection became free in time")
        return Refusal(Reason.UPSTREAM_UNREACHABLE, f"connecting failed: {self.unreachable_because or 'timed out'}")

    # -- lending

    def _queue(self, exchange: PoolUser, owner: Owner, now: float) -> bool:
        """Queue the exchange. If one user fills the queue, drop that user's last one. False: the queue is full."""
        if self._turns.wait(owner, exchange, now):
            return True
        last = self._turns.last_of_most(owner)
        if last is None:
            return False
        self.wait_no_more(last)
        last.upstream_lost(Refusal(Reason.OVERLOADED, _TOO_MANY))
        return self._turns.wait(owner, exchange, now)

    def _take_idle(self, now: float) -> UpstreamConnection | None:
        idle = self._idle
        while idle:
            connection = idle.pop()
            # A recently used connection is trusted; an older one is checked for a close.
            is_recent = now - connection.idle_since < _TRUSTED_IDLE_SECONDS
            if connection.is_open and (is_recent or not connection.was_closed_by_peer()):
                return connection
            connection.abort()
        return None

    def _lend(self, connection: UpstreamConnection, now: float) -> bool:
        """Lend a connection to the next exchange in turn; False if there is none."""
        found = self._turns.next(now)
        if found is None:
            return False
        exchange, owner = found
        self._tunnels_waiting.discard(exchange)
        if exchange.has_claim and not connection.is_new:
            connection.abort()
            self._renewing[exchange] = owner
            self._turns.take(owner, now)
            self._connect(exchange)
        else:
            self._give(connection, exchange, owner, now)
        return True

    def _give(self, connection: UpstreamConnection, exchange: PoolUser, owner: Owner, now: float) -> None:
        connection.owner = owner
        self._turns.take(owner, now)
        exchange.connected(connection)

    def _end_renewal(self, exchange: PoolUser) -> Owner | None:
        """Free the place of an exchange that waits for a new connection; returns its user, None if it does not wait."""
        owner = self._renewing.pop(exchange, None)
        if owner is not None:
            self._turns.give_back(owner)
        return owner

    def _lend_idle(self, now: float) -> bool:
        """Lend an idle connection to the next exchange in turn; False if either is missing."""
        if not self._idle or not self._turns.may_have_place(now):
            return False
        connection = self._take_idle(now)
        return connection is not None and self._lend(connection, now)

    def _returned(self, connection: UpstreamConnection) -> None:
        owner = connection.owner
        if owner is not None:
            connection.owner = None
            self._turns.give_back(owner)

    def _serve(self, now: float) -> None:
        """Serve waiting exchanges with idle connections, and new ones within the bound."""
        while self._lend_idle(now):
            pass
        connecting = len(self._connecting) - len(self._renewing)
        if connecting < len(self._turns) and self._has_room() and self._turns.may_have_place(now):
            self._connect()

    def _has_room(self) -> bool:
        """Whether one more connection may be opened."""
        return len(self._open) + len(self._connecting) < self.settings.connections_max

    def _has_room_for_public(self) -> bool:
        return self._turns.held(PUBLIC_OWNER) + self._turns.queued(PUBLIC_OWNER) < self._public_max

    def _end_slow_public(self, now: float) -> None:
        """At the bound of public requests: end those whose clients are too slow, for the ones that come next."""
        if now >= self._next_public_look_mono:
            self._next_public_look_mono = now + _LOOK_SECONDS
            preemption.end_slow_of(self._open, PUBLIC_OWNER, now, self.settings.connect_timeout_seconds)

    def _make_room(self, now: float) -> None:
        """End exchanges in flight, if others wait and get no connection."""
        if now < self._next_look_mono:
            return
        self._next_look_mono = now + _LOOK_SECONDS
        turns, patience = self._turns, self.settings.connect_timeout_seconds
        is_full = not self._idle and not self._has_room()
        if is_full:
            self._pressed_mono = now
        preemption.end_stalled(self._open, turns, now, patience, is_full=is_full)
        if is_full:
            preemption.end_beyond_share(self._open, turns, now, patience, connecting=len(self._connecting))

    def _look_again(self) -> None:
        """While exchanges wait: refuse those that have waited too long, and free connections for the others."""
        self._looking = None
        now, turns = self.clock(), self._turns
        patience = self.settings.connect_timeout_seconds
        while (exchange := turns.first()) is not None and now - turns.since(exchange) >= patience:
            refusal = self._waited_too_long(turns.owner(exchange), now)
            self.wait_no_more(exchange)
            exchange.upstream_lost(refusal)
        if not len(turns):
            return
        self._looking = self._loop.call_later(min(_LOOK_SECONDS, patience), self._look_again)
        self._serve(now)
        self._make_room(now)

    def _expire(self) -> None:
        self._expiry = None
        now = self.clock()
        # What remains at the front is young enough.
        while self._idle and (not self._idle[0].is_open or now - self._idle[0].idle_since >= IDLE_SECONDS):
            self._idle.pop(0).abort()
        if self._idle:
            self._expiry = self._loop.call_later(min(self.settings.connect_timeout_seconds, 1.0), self._expire)

    def __repr__(self) -> str:
        counts = " ".join(f"{state}={count}" for state, count in self.counts().items())
        return f"<UpstreamPool {counts} waiting={len(self._turns)} max={self.settings.connections_max}>"


class Upstreams:
    """The pools for live and test requests. Without an upstream for tests, both go to the same."""

    def __init__(self, live: UpstreamPool, test: UpstreamPool | None = None) -> None:
        self._live: Final = live
        self._test: Final = test or live

    def for_owner(self, owner: Owner) -> UpstreamPool:
        """The pool for the requests of one owner."""
        return self._test if owner[2] == TEST else self._live

    def distinct(self) -> dict[str, UpstreamPool]:
        """Every pool once, by the mode it serves."""
        return {"live": self._live} if self._live is self._test else {"live": self._live, "test": self._test}
