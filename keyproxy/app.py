"""The composition root: builds everything in order, introduces the edges to each other, closes in reverse.

Nothing here decides anything about a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable

from keyproxy import clock, sockets
from keyproxy.gateway import Gateway
from keyproxy.headers import FieldNames
from keyproxy.keyformat import KeyFormat
from keyproxy.metrics.access_log import AccessLog
from keyproxy.metrics.catalogue import CONTENT_TYPE, Catalogue, Sources
from keyproxy.metrics.recorder import Recorder
from keyproxy.ops import Check, OpsListener, Verdict
from keyproxy.problems import Problems
from keyproxy.settings import Settings
from keyproxy.store.database import Database, Listener
from keyproxy.store.feed import CHANNEL, ChangeFeed
from keyproxy.store.identities import FeedState, IdentityCache
from keyproxy.store.last_used import LastUsed
from keyproxy.wire.deadlines import Deadlines
from keyproxy.wire.pool import UpstreamPool, Upstreams
from keyproxy.wire.readers import ResponseReader
from keyproxy.wire.server import ProxyServer

_log = logging.getLogger(__name__)


class Store:
    """The edges to PostgreSQL, opened and closed together."""

    def __init__(self, settings: Settings, dsn: str) -> None:
        self.database = Database(
            dsn,
            pool_size_max=settings.store.pool_size_max,
            statement_timeout_seconds=settings.store.statement_timeout_seconds,
        )
        state = FeedState()
        self.last_used = LastUsed(self.database)
        self.identities = IdentityCache(
            self.database, settings.cache, feed=state, last_used=self.last_used,
            header_prefix=settings.identity.header_prefix,
            # One connection is left for the change feed, which tells of revocations.
            look_ups_max=max(1, settings.store.pool_size_max - 1), now=clock.now,
        )  # fmt: skip
        self.feed = ChangeFeed(self.database, Listener(dsn, CHANNEL), self.identities, state, clock.now)
        self._stale_seconds = settings.cache.stale_seconds
        self._answered_mono: float | None = None

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Open while the context lasts."""
        await self.database.open()
        self.feed.start()
        self.last_used.start()
        try:
            yield
        finally:
            await self.last_used.close()
            await self.feed.close()
            await self.identities.close()
            await self.database.close()

    async def check(self) -> Check:
        """Whether requests can be judged."""
        if self.database.is_up:
            return Check(Verdict.OK)
        why = self.database.down_because or "not asked yet"
        # Nothing verified to go on with, or too old by now: nobody can be served.
        if not self.identities.sizes()["known"] or self.feed.lag_seconds() > self._stale_seconds:
            return Check(Verdict.FAILED, why)
        return Check(Verdict.DEGRADED, f"verified identities are served, strangers refused: {why}")

    async def check_feed(self) -> Check:
        """Whether changes reach this proxy within a second."""
        if self.feed.is_current():
            if self.feed.is_listening:
                return Check(Verdict.OK)
            return Check(Verdict.OK, "no notifications: polling alone")
        return Check(Verdict.DEGRADED, f"not current for {self.feed.lag_seconds():.1f} s")


class Proxy:
    """A running data plane: the proxied port and the ops listener over one store."""

    def __init__(self, settings: Settings, dsn: str, *, access_log_fd: int) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._deadlines = Deadlines(self._loop, clock.monotonic)
        self.store = Store(settings, dsn)
        self._access_log = AccessLog(access_log_fd, wall_offset=clock.wall_offset) if settings.log.access else None
        self._recorder = Recorder(self._access_log)
        gateway = Gateway(
            key_format=KeyFormat(settings.keys.prefix, accepts_foreign=settings.keys.accept_foreign),
            identities=self.store.identities,
            routes=settings.route_table(),
            now=clock.now,
            instance=secrets.token_hex(8).encode("ascii"),
        )
        names = FieldNames(settings.identity.header_prefix)
        responses = ResponseReader(names)
        live = self._pool(settings.upstream.url, responses)
        test = self._pool(settings.upstream.test_url, responses) if settings.upstream.test_url else None
        self.upstreams = Upstreams(live, test)
        self.server = ProxyServer(
            settings.listen, gate=gateway, recorder=self._recorder, upstreams=self.upstreams, names=names,
            problems=Problems(invalid_key_status=settings.errors.invalid_key_status),
            deadlines=self._deadlines, clock=clock.monotonic, loop=self._loop,
        )  # fmt: skip
        catalogue = Catalogue(self._recorder, self._sources())
        self._ops = OpsListener(
            checks={"store": self.store.check, "change_feed": self.store.check_feed, "upstream": self._check_upstream}
            | {"proxy": self._check_proxy},
            metrics=catalogue.render,
            metrics_content_type=CONTENT_TYPE,
        )

    @contextlib.asynccontextmanager
    async def running(self, proxy: socket.socket, ops: socket.socket) -> AsyncIterator[None]:
        """Serve two bound sockets while the context lasts; then drain."""
        async with contextlib.AsyncExitStack() as stack:
            if self._access_log is not None:
                stack.callback(self._access_log.close)
                self._access_log.start()
            stack.callback(self._recorder.close)
            self._recorder.start(self._loop)
            await stack.enter_async_context(self.store.opened())
            self._deadlines.start()
            stack.callback(self._deadlines.stop)
            for pool in self.upstreams.distinct().values():
                stack.push_async_callback(pool.close)
            stack.push_async_callback(self._ops.close)
            await self._ops.start(ops)
            stack.push_async_callback(self.server.drain, self._settings.listen.drain_seconds)
            await self.server.start(proxy)
            yield

    def _pool(self, url: str, responses: ResponseReader) -> UpstreamPool:
        return UpstreamPool(
            url, self._settings.upstream, responses, self._deadlines, clock=clock.monotonic, loop=self._loop
        )

    def _sources(self) -> Sources:
        return Sources(
            identity_lookups=lambda: self.store.identities.counts,
            identities=self.store.identities.sizes,
            store_is_up=lambda: self.store.database.is_up,
            change_feed_lag_seconds=self.store.feed.lag_seconds,
            upstream_connections=self._upstream_connections,
            open_requests=self.server.open_requests,
            client_connections=self.server.open_connections,
            access_log_dropped=lambda: 0 if self._access_log is None else self._access_log.dropped,
        )

    def _upstream_connections(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for pool in self.upstreams.distinct().values():
            for state, count in pool.counts().items():
                counts[state] = counts.get(state, 0) + count
        return counts

    async def _check_upstream(self) -> Check:
        for mode, pool in self.upstreams.distinct().items():
            if not await pool.reach():
                return Check(Verdict.FAILED, f"{mode}: {pool.unreachable_because or 'cannot be reached'}")
        return Check(Verdict.OK)

    async def _check_proxy(self) -> Check:
        return Check(Verdict.FAILED, "draining") if self.server.is_draining else Check(Verdict.OK)


async def serve(settings: Settings, dsn: str, *, access_log_fd: int, started: Callable[[str, str], None]) -> None:
    """Run the data plane until SIGTERM or SIGINT. `started` is told both addresses. Raises sockets.BindError."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with (
        contextlib.closing(sockets.bind(settings.listen.address)) as proxy_socket,
        contextlib.closing(sockets.bind(settings.ops.address)) as ops_socket,
    ):
        proxy = Proxy(settings, dsn, access_log_fd=access_log_fd)
        async with proxy.running(proxy_socket, ops_socket):
            started(sockets.told(proxy_socket), sockets.told(ops_socket))
            await stop.wait()
            _log.info("draining: no new work, up to %g s for what is under way", settings.listen.drain_seconds)
    _log.info("stopped")
