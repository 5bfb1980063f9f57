"""The composition root: builds all parts in order, connects them, and closes them in reverse.

A reload first builds the changed parts beside the running ones, then swaps the two. The swap cannot fail, so either the
whole configuration is applied or none of it. Nothing here decides on a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

from keyproxy.ai.categories import TEMPLATE
from keyproxy.config.schema import Listen, Settings
from keyproxy.decision.anomalies.watcher import Watcher, terms_of
from keyproxy.gateway import Gateway
from keyproxy.metrics.access_log import AccessLog
from keyproxy.metrics.access_log_lines import LabelledExchange
from keyproxy.metrics.exposition import CONTENT_TYPE, Catalogue
from keyproxy.metrics.recorder import Histogram, Recorder
from keyproxy.platform import clock, sockets
from keyproxy.process import startup_conflicts
from keyproxy.process.control_socket import Control
from keyproxy.process.ops_listener import Check, OpsListener, Verdict, gathered
from keyproxy.process.patterns.re2_matcher import PatternError, compile_patterns
from keyproxy.process.providers.proxy_providers import ProxyProviders
from keyproxy.process.providers.watched_file import WatchedFileError
from keyproxy.process.proxy_metrics import APPROVAL_WAIT_BOUNDS, PROXY_METRICS, ROUND_TRIP_BOUNDS, Scrape
from keyproxy.process.reload import PreparedConfig, ReloadError, new_socket, new_store, new_tls
from keyproxy.process.signing.proxy_signing import ProxySigning
from keyproxy.process.store_health import carry_over, check_housekeeping, check_ledger, check_reaping
from keyproxy.process.terms import build_gateway, build_terms, build_upstreams
from keyproxy.reasons import Refusal
from keyproxy.signing.signing_key import SigningKey
from keyproxy.signing.token_check import AcceptedTokens
from keyproxy.store.agent_tokens.minter import TokenMinter
from keyproxy.store.postgres.database import StoreConflict, StoreUnavailable
from keyproxy.store.store import Store
from keyproxy.store.usage.model_names import ModelNames
from keyproxy.wire.client.request_ids import RequestIds
from keyproxy.wire.context import ServerTerms
from keyproxy.wire.deadlines import Deadlines
from keyproxy.wire.server import ProxyServer
from keyproxy.wire.tls import TlsError, upstream_context
from keyproxy.wire.upstream.pool import UpstreamPool, Upstreams

_log = logging.getLogger(__name__)

#: After a reload, decisions that began before it may take as long as draining may, but at least this long.
_UNDECIDED_SECONDS: Final = 10.0

#: How long a stop waits for tokens that are being minted for clients that have left.
_MINTING_SECONDS: Final = 3.0

#: A resource of a configuration cannot be used.
_UNUSABLE: Final = (sockets.BindError, TlsError, PatternError, WatchedFileError)


class Proxy:
    """A running data plane: the proxied port and the ops listener over one store."""

    def __init__(
        self,
        settings: Settings,
        dsn: str,
        *,
        access_log_fd: int,
        keys: Sequence[SigningKey],
        has_siblings: bool = True,
    ) -> None:
        """`keys`: to sign with, the oldest first. `has_siblings`: other processes may write to the same access log; the
        settings do not show that, since each worker has its own. Raises TlsError, PatternError, WatchedFileError.
        """
        self._settings = settings
        self._dsn = dsn
        self._loop = asyncio.get_running_loop()
        self._deadlines = Deadlines(self._loop, clock.monotonic)
        self.store = new_store(settings, dsn)
        self.signing = ProxySigning(keys, self.store.signing_keys)
        self.providers = ProxyProviders()
        self.providers.prepare(settings)
        self._patterns = compile_patterns(settings.categories)
        self._access_log = AccessLog(access_log_fd, wall_offset=clock.wall_offset, has_siblings=has_siblings)
        self._watcher = Watcher(clock.now)
        self._recorder = Recorder(None, self._note_usage)
        self._log_as(settings)
        self.upstreams = self._upstreams(settings)
        #: The gateway in use, and earlier ones over the same store with pending decisions.
        self._gateways: list[Gateway] = []
        terms = self._terms(settings, self.store, self.upstreams, new_tls(settings))
        self.server = ProxyServer(
            terms,
            recorder=self._recorder,
            deadlines=self._deadlines,
            clock=clock.monotonic,
            loop=self._loop,
            request_ids=RequestIds(secrets.token_hex(8).encode("ascii")),
        )
        self._ledger_round_trips = Histogram(ROUND_TRIP_BOUNDS)
        self.store.ledger.conversation.observe = self._ledger_round_trips.observe
        self._approval_waits = Histogram(APPROVAL_WAIT_BOUNDS)
        self.store.approvals.observe_wait = self._approval_waits.observe
        self._catalogue = Catalogue(PROXY_METRICS, self._scrape)
        self._ops = self._ops_listener()
        #: The control socket of this process; None: its supervisor has it, or there is none.
        self.control: Control | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._retired: list[UpstreamPool] = []

    @contextlib.asynccontextmanager
    async def running(self, proxy: socket.socket, ops: socket.socket) -> AsyncIterator[None]:
        """Serve two bound sockets while the context lasts; then drain."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._access_log.close)
            self._access_log.start()
            stack.callback(self._recorder.close)
            self._recorder.start(self._loop)
            stack.push_async_callback(self._close_store)
            await self.store.open()
            stack.push_async_callback(self.signing.end)
            self.signing.start()
            stack.push_async_callback(self.providers.close)
            self.providers.start()
            self._deadlines.start()
            stack.callback(self._deadlines.stop)
            stack.push_async_callback(self._close_pools)
            stack.push_async_callback(self._close_ops)
            self._ops.is_started = False
            await self._ops.start(ops)
            await self.signing.until_started(self._settings)
            stack.push_async_callback(self._drain)
            self.server.start(proxy)
            self._ops.is_started = True
            yield

    async def prepare(self, settings: Settings, dsn: str) -> PreparedConfig:
        """Prepare a new configuration, to be applied or abandoned. Raises ReloadError if it cannot be applied."""
        was = self._settings
        with contextlib.ExitStack() as undo:
            try:
                if self.control is not None:
                    self.control.check(startup_conflicts.of_proxy(settings, dsn))
                proxy = new_socket(undo, was.listen, settings.listen)
                ops = new_socket(undo, was.ops, settings.ops)
                tls = new_tls(settings)
                upstreams = self.upstreams if settings.upstream == was.upstream else self._upstreams(settings)
                patterns = compile_patterns(settings.categories)
                self.providers.prepare(settings)
                store = await self._store_for(settings, dsn)
            except (*_UNUSABLE, StoreUnavailable, StoreConflict) as error:
                raise ReloadError(str(error)) from error
            undo.pop_all()
        return PreparedConfig(settings, dsn, proxy, ops, tls, upstreams, store, patterns)

    async def abandon(self, change: PreparedConfig) -> None:
        """Release the resources of a prepared configuration."""
        for sock in (change.proxy, change.ops):
            if sock is not None:
                sock.close()
        if change.store is not self.store:
            await change.store.close()

    async def apply(self, change: PreparedConfig) -> None:
        """Switch to a prepared configuration. Cannot fail, and drops no request."""
        settings, upstreams, store = change.settings, change.upstreams, change.store
        self._settings, self._dsn, self._patterns = settings, change.dsn, change.patterns
        before, self._gateways = self._gateways, []
        self.server.change(self._terms(settings, store, upstreams, change.tls), change.proxy)
        self._log_as(settings)
        if upstreams is not self.upstreams:
            self._retired += self.upstreams.distinct().values()
            for pool in self._retired:
                pool.retire()
            self.upstreams = upstreams
        if store is not self.store:
            carry_over(self.store, store)
            self.signing.ring.change_store(store.signing_keys)
            self._retire_store(self.store, before)
            self.store = store
        else:
            self._gateways += [gateway for gateway in before if gateway.is_deciding]
        if change.ops is not None:
            ops, self._ops = self._ops, self._ops_listener()
            await self._ops.start(change.ops)
            await ops.close()
        if self.control is not None:
            self.control.show(startup_conflicts.of_proxy(settings, change.dsn))

    @property
    def listen(self) -> Listen:
        """The listen settings of the current configuration."""
        return self._settings.listen

    # -- building

    def _terms(self, settings: Settings, store: Store, upstreams: Upstreams, tls: ssl.SSLContext | None) -> ServerTerms:
        routes = settings.route_table()
        store.approvals.rules = settings.approvals
        # Records keep the names of configured models, and of a bounded number of others.
        store.usage.model_names = ModelNames([model.name for model in settings.models])
        store.signals.terms = settings.anomalies
        self._watcher.change(
            terms_of(settings.anomalies.watch, [model.name for model in settings.models]), store.signals
        )
        gateway = build_gateway(
            settings, routes, identities=store.identities, owned_ids=store.owned_ids, templates=store.templates,
            ledger=store.ledger, claims=store.claims, approvals=store.approvals, patterns=self._patterns,
            upstream_credentials=self.providers.credentials(settings, store.provider_keys),
            mint=TokenMinter(
                store.minting_database, rules=settings.access.mint_rules, signing_key=self.signing.ring.usable,
                now=clock.now,
            ),
        )  # fmt: skip
        self._gateways.append(gateway)
        accepted = AcceptedTokens(settings.access.issuer, settings.access.audiences[0])
        if accepted != store.signing_keys.rules:
            store.signing_keys.rules = accepted
            store.identities.distrust_all()
        return build_terms(settings, routes, gateway, upstreams, tls=tls, assertions=self.signing.signer(settings))

    def _upstreams(self, settings: Settings) -> Upstreams:
        return build_upstreams(settings, self._deadlines, self._loop, upstream_context(settings.upstream))

    def _ops_listener(self) -> OpsListener:
        return OpsListener(
            checks=self._checks, metrics=self._metrics, metrics_content_type=CONTENT_TYPE, jwks=self._jwks
        )

    def _scrape(self) -> Scrape:
        return Scrape(
            recorder=self._recorder,
            cells=self._recorder.cells(),
            access_log=self._access_log,
            server=self.server,
            upstreams=self.upstreams,
            store=self.store,
            routes=self._settings.routes,
            models=[model.name for model in self._settings.models],
            categories=[category.name for category in self._settings.categories],
            tools=self._settings.tools,
            ledger_round_trips=self._ledger_round_trips,
            approval_waits=self._approval_waits,
            signing=self.signing,
            providers=self.providers,
        )

    # -- reloading and closing

    async def _store_for(self, settings: Settings, dsn: str) -> Store:
        was = self._settings
        if dsn == self._dsn and _of_store(was) == _of_store(settings):
            return self.store
        store = new_store(settings, dsn)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(store.close)
            await store.open()
            await store.check_connection()
            await self.signing.ring.publish_in(store.signing_keys)
            undo.pop_all()
        return store

    def _retire_store(self, store: Store, gateways: Sequence[Gateway]) -> None:
        """Close a replaced store once no pending decision or request in flight needs it.

        A decision that is still pending after the drain time is refused with STORE_UNAVAILABLE.
        """
        seconds = max(_UNDECIDED_SECONDS, self._settings.listen.drain_seconds)

        async def closing() -> None:
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await asyncio.gather(*(gateway.all_decided() for gateway in gateways))
                # Requests in flight settle in the store that admitted them.
                await store.ledger.all_settled()
            finally:
                await store.close()

        task = self._loop.create_task(closing())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _close_store(self) -> None:
        for task in self._leaving:
            # Once: then it closes its store, which a second cancellation would interrupt.
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        # Requests that have ended must be included in the last write of usage.
        self._recorder.count_pending()
        await self.store.close()

    async def _close_pools(self) -> None:
        for pool in [*self.upstreams.distinct().values(), *self._retired]:
            await pool.close()

    async def _close_ops(self) -> None:
        await self._ops.close()

    async def _drain(self) -> None:
        await self.server.drain(self._settings.listen.drain_seconds)
        # A token that is being minted is charged if it comes to exist, even if its client has left.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_MINTING_SECONDS):
                await asyncio.gather(*(gateway.all_decided() for gateway in self._gateways))

    def _log_as(self, settings: Settings) -> None:
        """Apply the log setting. Requests that have already ended are logged under the previous one."""
        self._recorder.count_pending()
        self._access_log.success_share = settings.log.success_share
        self._recorder.log_to(self._access_log if settings.log.access else None)

    def _note_usage(self, rows: Sequence[LabelledExchange]) -> None:
        self.store.usage.take(rows)
        if self._watcher.is_watching:
            self._watcher.take(rows)

    # -- metrics and checks

    async def _metrics(self) -> bytes:
        return self._catalogue.render()

    async def _jwks(self) -> bytes | None:
        try:
            return await self.store.signing_keys.current_jwks()
        except Refusal:
            return None

    async def _checks(self) -> Mapping[str, Check]:
        return await gathered(
            {
                "store": self._check_store,
                "change_feed": self._check_feed,
                "ledger": self._check_ledger,
                "ledger_reaping": self._check_reaping,
                "housekeeping": self._check_housekeeping,
                "upstream": self._check_upstream,
                "proxy": self._check_proxy,
            }
        )

    async def _check_store(self) -> Check:
        database = self.store.database
        if database.is_up and not self.store.templates.is_loaded and self._judges_templates():
            return Check(Verdict.FAILED, "the prompt templates are not loaded")
        if database.is_up:
            shortage = database.shortage.because
            return Check(Verdict.DEGRADED if shortage else Verdict.OK, shortage and f"too few connections: {shortage}")
        why = database.down_because or "no query made yet"
        # Without verified identities in the cache, or with ones that are too old, no request can be served.
        too_old = self.store.feed.lag_seconds() > self._settings.cache.stale_seconds
        if too_old or not self.store.identities.sizes()["known"]:
            return Check(Verdict.FAILED, why)
        return Check(Verdict.DEGRADED, f"cached identities are served, other keys refused: {why}")

    def _judges_templates(self) -> bool:
        return any(TEMPLATE in row.category for row in self._settings.routes)

    async def _check_feed(self) -> Check:
        feed = self.store.feed
        if feed.is_current():
            return Check(Verdict.OK, "" if feed.is_listening else "no notifications: polling only")
        return Check(Verdict.DEGRADED, f"not current for {feed.lag_seconds():.1f} s")

    async def _check_ledger(self) -> Check:
        return check_ledger(self.store)

    async def _check_reaping(self) -> Check:
        return check_reaping(self.store)

    async def _check_housekeeping(self) -> Check:
        return check_housekeeping(self.store)

    async def _check_upstream(self) -> Check:
        for mode, pool in self.upstreams.distinct().items():
            if not await pool.reach():
                return Check(Verdict.FAILED, f"{mode}: {pool.unreachable_because or 'unreachable'}")
        congested = {mode: pool.congestion() for mode, pool in self.upstreams.distinct().items()}
        if any(congested.values()):
            # Other users are still served, and another proxy would have the same users.
            return Check(Verdict.DEGRADED, "; ".join(f"{mode}: {why}" for mode, why in congested.items() if why))
        return Check(Verdict.OK)

    async def _check_proxy(self) -> Check:
        return Check(Verdict.FAILED, "draining") if self.server.is_draining else Check(Verdict.OK)


def _of_store(settings: Settings) -> tuple[object, ...]:
    """The settings that a store is built from."""
    limits, alerts, oauth = settings.limits, settings.alerts.percentages, settings.oauth
    # Cached identities were admitted by the format of their keys; those of OAuth tokens also by the resources.
    admission = settings.keys.prefix, settings.keys.accept_foreign, oauth.resource, oauth.test_resource
    return settings.store, settings.cache, settings.identity, settings.ledger, settings.usage, limits, alerts, admission
