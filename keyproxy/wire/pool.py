"""Connections to one upstream: bounded in number, reused, expired, and handed to who has waited longest.

    lent + idle + connecting <= connections_max; an exchange waits only while all of them are lent or connecting.

`take` is the hot path and never waits. `wait` queues an exchange and, if the bound allows, begins to connect; whichever
connection becomes free first, new or returned, goes to the head of the queue. The queue is bounded in length and time.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import logging
import select
import ssl
from collections.abc import Callable
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from keyproxy.reasons import Reason, Refusal
from keyproxy.settings import Upstream as UpstreamSettings
from keyproxy.wire.deadlines import Deadlines
from keyproxy.wire.exchange import Exchange
from keyproxy.wire.readers import ResponseReader
from keyproxy.wire.upstream import UpstreamConnection

_log = logging.getLogger(__name__)

#: Shorter than the shortest usual keep-alive of a server (5 s: uvicorn, Node), so that it is us who close first.
IDLE_SECONDS: Final = 4.0

#: A connection that has lain longer than this is asked whether the other side has closed it, before it is lent.
_TRUSTED_IDLE_SECONDS: Final = 0.1

_WAITING_PER_CONNECTION: Final = 16

#: How often all connections are looked through for one that can be had back.
_LOOK_SECONDS: Final = 0.1

#: Errors that say nothing about the upstream: no file descriptors, ports or memory left here.
_OUR_LIMITS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


class Address(NamedTuple):
    """Where an upstream listens: `path` of a unix socket, or `host` and `port`. `authority` is for a missing Host."""

    host: str
    port: int
    path: str
    authority: bytes
    is_tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Address:
        """Of a checked `upstream.url`."""
        if url.startswith("unix:"):
            return cls("", 0, url.removeprefix("unix:"), b"localhost")
        parts = urlsplit(url)
        is_tls = parts.scheme == "https"
        port = parts.port or (443 if is_tls else 80)
        return cls(parts.hostname or "", port, "", parts.netloc.encode("ascii"), is_tls)


class UpstreamPool:
    """See the module. `repr` shows what it holds."""

    def __init__(
        self, url: str, settings: UpstreamSettings, responses: ResponseReader, deadlines: Deadlines, *,
        clock: Callable[[], float], loop: asyncio.AbstractEventLoop, tls: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        """`tls`: for an https URL, how its certificate is verified."""
        self._address = Address.parse(url)
        self._tls = tls if self._address.is_tls else None
        if self._address.is_tls and tls is None:
            raise ValueError("an https upstream needs a TLS context")
        self.host = self._address.authority
        self.settings = settings
        self.responses = responses
        self._deadlines = deadlines
        self.clock = clock
        self._loop = loop
        self._idle: collections.deque[UpstreamConnection] = collections.deque()
        self._open: set[UpstreamConnection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._waiting: collections.OrderedDict[Exchange, float] = collections.OrderedDict()
        self._expiry: asyncio.TimerHandle | None = None
        self._is_retired = False
        self._next_look_mono = 0.0
        self.unreachable_because = ""

    def take(self, now: float) -> UpstreamConnection | None:
        """An idle connection, the one used last first; None if there is none."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            # One that was used a moment ago is taken at its word; an older one is asked whether it was closed.
            is_recent = now - connection.idle_since < _TRUSTED_IDLE_SECONDS
            if connection.is_open and (is_recent or not _was_closed_by_peer(connection)):
                return connection
            connection.abort()
        return None

    def wait(self, exchange: Exchange) -> None:
        """Tell the exchange when it has a connection, or why it gets none."""
        if len(self._waiting) >= self.settings.connections_max * _WAITING_PER_CONNECTION:
            exchange.upstream_lost(Refusal(Reason.OVERLOADED, "too many requests wait for an upstream connection"))
            return
        self._waiting[exchange] = self.clock()
        if len(self._open) + len(self._connecting) < self.settings.connections_max:
            self._connect()
        else:
            self._make_room(self.clock())
        if self._expiry is None:
            self._expiry = self._loop.call_later(self.settings.connect_timeout_seconds, self._expire)

    def wait_no_more(self, exchange: Exchange) -> None:
        """The exchange ended while it waited."""
        self._waiting.pop(exchange, None)

    def release(self, connection: UpstreamConnection, now: float) -> None:
        """A connection is free: for who has waited longest, else it lies idle."""
        if self._waiting:
            exchange, _ = self._waiting.popitem(last=False)
            exchange.connected(connection)
            return
        if self._is_retired:
            connection.abort()
            return
        connection.idle_since = now
        self._idle.append(connection)
        if self._expiry is None:
            self._expiry = self._loop.call_later(IDLE_SECONDS, self._expire)

    def forget(self, connection: UpstreamConnection) -> None:
        """The connection is lost. Who waits gets a new one in its place."""
        self._deadlines.forget(connection)
        self._open.discard(connection)
        if connection.idle_since:
            with contextlib.suppress(ValueError):
                self._idle.remove(connection)
        if len(self._connecting) < len(self._waiting):
            self._connect()

    async def reach(self) -> bool:
        """Whether the upstream accepts connections; asks it if no connection to it is open."""
        if not any(connection.is_open for connection in self._open):
            if not self._connecting:
                self._connect()
            await asyncio.wait(self._connecting, timeout=self.settings.connect_timeout_seconds)
        return any(connection.is_open for connection in self._open)

    def counts(self) -> dict[str, int]:
        """How many connections are in which state."""
        idle = len(self._idle)
        return {"idle": idle, "busy": len(self._open) - idle, "connecting": len(self._connecting)}

    def retire(self) -> None:
        """Another pool takes over: what is under way or waits is served, and no connection is kept after that."""
        self._is_retired = True
        while self._idle:
            self._idle.popleft().abort()

    async def close(self) -> None:
        """Close everything. Exchanges under way lose their upstream."""
        self.retire()
        if self._expiry is not None:
            self._expiry.cancel()
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        for connection in list(self._open):
            connection.abort()

    def _connect(self) -> None:
        task = self._loop.create_task(self._open_one())
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _open_one(self) -> None:
        address = self._address
        connection = UpstreamConnection(self, self._loop)
        try:
            async with asyncio.timeout(self.settings.connect_timeout_seconds):
                if address.path:
                    await self._loop.create_unix_connection(lambda: connection, address.path)
                else:
                    await self._loop.create_connection(lambda: connection, address.host, address.port, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            # ssl.SSLError is an OSError: a certificate that does not verify is an upstream that cannot be reached.
            self._connect_failed(str(error) or "timed out", is_our_limit=getattr(error, "errno", None) in _OUR_LIMITS)
            return
        self.unreachable_because = ""
        self._open.add(connection)
        self._deadlines.watch(connection)
        self.release(connection, self.clock())

    def _connect_failed(self, why: str, *, is_our_limit: bool) -> None:
        if not self.unreachable_because:
            _log.warning("the upstream cannot be reached: %s", why)
        self.unreachable_because = why
        # Without any open connection nobody who waits can be served: waiting on would only be slower.
        failed = list(self._waiting) if not self._open else list(self._waiting)[:1]
        for exchange in failed:
            del self._waiting[exchange]
            reason = Reason.OVERLOADED if is_our_limit else Reason.UPSTREAM_UNREACHABLE
            exchange.upstream_lost(Refusal(reason, f"connecting failed: {why}"))

    def _waited_too_long(self) -> Refusal:
        """Why a request got no connection in time: all are in use, or those that were begun do not come about."""
        if len(self._open) >= self.settings.connections_max:
            return Refusal(Reason.OVERLOADED, "no upstream connection became free in time")
        return Refusal(Reason.UPSTREAM_UNREACHABLE, "connecting failed: timed out")

    def _make_room(self, now: float) -> None:
        """Every connection is in use and somebody waits: whose client hardly sends its body has to give way."""
        if now < self._next_look_mono:
            return
        self._next_look_mono = now + _LOOK_SECONDS
        for connection in list(self._open):
            connection.give_way(now, self.settings.connect_timeout_seconds)

    def _expire(self) -> None:
        self._expiry = None
        now = self.clock()
        # Oldest first on both; what is left at the front is young enough.
        while self._idle and (not self._idle[0].is_open or now - self._idle[0].idle_since >= IDLE_SECONDS):
            self._idle.popleft().abort()
        patience = self.settings.connect_timeout_seconds
        while self._waiting and now - next(iter(self._waiting.values())) >= patience:
            exchange, _ = self._waiting.popitem(last=False)
            exchange.upstream_lost(self._waited_too_long())
        if self._idle or self._waiting:
            self._expiry = self._loop.call_later(min(patience, 1.0), self._expire)

    def __repr__(self) -> str:
        counts = " ".join(f"{state}={count}" for state, count in self.counts().items())
        return f"<UpstreamPool {counts} waiting={len(self._waiting)} max={self.settings.connections_max}>"


def _was_closed_by_peer(connection: UpstreamConnection) -> bool:
    """Whether an idle connection became readable: the other side has closed it, or says what nobody asked for."""
    fileno = connection.fileno()
    if fileno < 0:
        return True  # below TLS, whose transport does not know yet
    poll = select.poll()
    poll.register(fileno, select.POLLIN)
    return bool(poll.poll(0))


class Upstreams:
    """The pools for live and test requests. Without an upstream for tests, both go to the same."""

    def __init__(self, live: UpstreamPool, test: UpstreamPool | None = None) -> None:
        self._pools = (live, test or live)

    def pool(self, *, is_test: bool) -> UpstreamPool:
        """The pool for requests of one mode."""
        return self._pools[is_test]

    def distinct(self) -> dict[str, UpstreamPool]:
        """Every pool once, by the mode it serves."""
        live, test = self._pools
        return {"live": live} if live is test else {"live": live, "test": test}
