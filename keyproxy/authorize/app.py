"""The process of the authorization server: its listeners over a store, until SIGTERM; SIGHUP reloads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from keyproxy.auth.api_key import KeyFormat
from keyproxy.authorize.browser.tickets import SecretFileError, secrets_of
from keyproxy.authorize.connections import Bounds
from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoints import Parts, PartsFault, parts_of
from keyproxy.authorize.listener import AuthorizeListener, Served
from keyproxy.authorize.metrics import AUTHORIZE_METRICS, OAuthCounts
from keyproxy.authorize.rate_limits import RateLimits
from keyproxy.config.addresses import is_loopback
from keyproxy.config.oauth.oauth_settings import LOGIN_BY_OIDC, OAuthLogin
from keyproxy.config.schema import Settings
from keyproxy.metrics.access_log import AccessLog
from keyproxy.metrics.exposition import CONTENT_TYPE, Catalogue
from keyproxy.platform import clock, sockets, systemd
from keyproxy.platform.tasks import cancel_all
from keyproxy.process import startup_conflicts
from keyproxy.process.control_socket import Control
from keyproxy.process.ops_listener import Check, OpsListener, Verdict, gathered
from keyproxy.process.store_health import check_chores
from keyproxy.store.background import BackgroundTask
from keyproxy.store.postgres.database import Database, StoreUnavailable
from keyproxy.wire.tls import TlsError, server_context

_log = logging.getLogger(__name__)

#: For how long a check of readiness waits for the store; less than the ops listener waits for a check.
_STORE_SECONDS: Final = 2.0


class RejectedConfig(Exception):
    """A configuration that the authorization server does not start with, or reload. The text is the reason."""


class AuthorizationServer:
    """A running authorization server."""

    def __init__(self, settings: Settings, dsn: str) -> None:
        """Raises RejectedConfig, TlsError."""
        self._settings = settings
        self._contexts = _contexts(settings)
        self._database = Database(
            dsn,
            pool_size_max=settings.store.pool_size_max,
            statement_timeout_seconds=settings.store.statement_timeout_seconds,
        )
        self._counts = OAuthCounts()
        self._rate_limits = RateLimits(clock.now)
        self._tasks = _RunningTasks()
        self._context = self._context_of(settings)
        self._parts = _parts_of(self._context)

    async def run(
        self, *, access_log_fd: int, started: Callable[[str], None], read_again: Callable[[], Settings]
    ) -> None:
        """Serve until SIGTERM or SIGINT. Calls `started` with the addresses. Raises BindError."""
        stop, again = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, again.set)
        async with contextlib.AsyncExitStack() as stack:
            await self._database.open()
            stack.push_async_callback(self._database.close)
            log = AccessLog(access_log_fd, wall_offset=clock.wall_offset)
            log.success_share = self._settings.log.success_share
            stack.callback(log.close)
            log.start()
            await stack.enter_async_context(Control().open(startup_conflicts.of_authorize(self._settings)))
            stack.push_async_callback(self._tasks.end)
            self._tasks.start(self._parts)
            listeners = await self._start_listeners(stack, log.write_line if self._settings.log.access else None)
            self._warn_of_unencrypted_secrets()
            started(f"{', '.join(listeners)}, ops on {self._settings.oauth.ops_address}")
            systemd.notify("READY=1")
            async with asyncio.TaskGroup() as group:
                changing = group.create_task(self._change_on(again, list(listeners.values()), read_again))
                await stop.wait()
                await cancel_all([changing])
            systemd.notify("STOPPING=1")
        _log.info("stopped")

    async def _start_listeners(
        self, stack: contextlib.AsyncExitStack, log_line: Callable[[bytes, int], None] | None
    ) -> dict[str, AuthorizeListener]:
        """Bind all sockets, then serve them. Returns the listeners by their address."""
        oauth = self._settings.oauth
        ops_socket = stack.enter_context(contextlib.closing(_bound(self._settings, oauth.ops_address)))
        addresses = filter(None, (oauth.address, oauth.mtls_address))
        bound = [stack.enter_context(contextlib.closing(_bound(self._settings, address))) for address in addresses]
        served = Served(self._context, self._parts)
        listeners = {}
        for sock, tls in zip(bound, self._contexts, strict=False):
            is_mtls = sock is not bound[0]
            listener = AuthorizeListener(
                served, log_line=log_line, bounds=Bounds(oauth.connections_max), is_mtls=is_mtls
            )
            stack.push_async_callback(listener.close)
            await listener.start(sock, tls)
            with_tls = " (mutual TLS)" if is_mtls else " (TLS)" if tls is not None else ""
            listeners[f"{sockets.address_of(sock)}{with_tls}"] = listener
        ops = OpsListener(
            checks=self._checks, metrics=self._metrics_page(), metrics_content_type=CONTENT_TYPE, jwks=None
        )
        stack.push_async_callback(ops.close)
        await ops.start(ops_socket)
        return listeners

    def _context_of(self, settings: Settings) -> Context:
        """Raises RejectedConfig."""
        return Context(
            settings=settings,
            database=self._database,
            key_format=KeyFormat(settings.keys.prefix, accepts_foreign=settings.keys.accept_foreign),
            ticket_secrets=_ticket_secrets(settings),
            now=clock.now,
            entropy=os.urandom,
            rate_limits=self._rate_limits,
            counts=self._counts,
            login_secret=_login_secret(settings.oauth_login),
        )

    async def _checks(self) -> Mapping[str, Check]:
        return await gathered({"store": self._check_store, "housekeeping": self._check_housekeeping})

    async def _check_housekeeping(self) -> Check:
        return check_chores([self._parts.cleanup.tending])

    async def _check_store(self) -> Check:
        """An outage only degrades the process: metadata and registration need no store."""
        try:
            async with asyncio.timeout(_STORE_SECONDS):
                await self._database.fetch("responds")
        except StoreUnavailable as error:
            return Check(Verdict.DEGRADED, str(error))
        except TimeoutError:
            return Check(Verdict.DEGRADED, f"no response within {_STORE_SECONDS:g} s")
        return Check(Verdict.OK)

    def _metrics_page(self) -> Callable[[], Awaitable[bytes]]:
        catalogue = Catalogue(AUTHORIZE_METRICS, lambda: self._counts)

        async def page() -> bytes:
            self._counts.is_store_up = (await self._check_store()).verdict is Verdict.OK
            return catalogue.render()

        return page

    def _warn_of_unencrypted_secrets(self) -> None:
        # Only a warning: a TLS proxy in front, a pod or a container requires this setup.
        if self._contexts[0] is None and not is_loopback(self._settings.oauth.address):
            _log.warning(
                "oauth.address: %s is not loopback, and oauth.tls_certificate_file is not set: keys, codes and tokens"
                " cross the network unencrypted unless a TLS proxy is in front",
                self._settings.oauth.address,
            )

    async def _change_on(
        self, again: asyncio.Event, listeners: list[AuthorizeListener], read_again: Callable[[], Settings]
    ) -> None:
        while True:
            await again.wait()
            again.clear()
            systemd.notify(systemd.reloading())
            try:
                await self._change(read_again(), listeners)
                _log.info("configuration reloaded")
            except (TlsError, RejectedConfig) as error:
                _log.error("reload rejected: %s", error)
            except Exception:  # noqa: BLE001 - the outermost boundary of this task: the server keeps running
                _log.exception("reload failed with an internal error")
            systemd.notify("READY=1")

    async def _change(self, settings: Settings, listeners: list[AuthorizeListener]) -> None:
        """Apply a new configuration. Raises TlsError, RejectedConfig, without an effect then."""
        if _fixed(settings) != _fixed(self._settings):
            raise RejectedConfig(
                "store, log, the addresses of [oauth], oauth.socket_mode, oauth.connections_max and the presence of a"
                " certificate cannot change in a reload: restart the authorization server"
            )
        contexts = _contexts(settings)
        context = self._context_of(settings)
        parts = _parts_of(context)
        self._settings, self._context, self._parts = settings, context, parts
        served = Served(context, parts)
        for listener, tls in zip(listeners, contexts, strict=False):
            # New contexts, so that a client's certificate is verified by the current CAs.
            listener.change(served, tls)
        await self._tasks.end()
        self._tasks.start(parts)


class _RunningTasks:
    """The tasks beside the endpoints, which are restarted after an unexpected error."""

    def __init__(self) -> None:
        self._tasks: list[BackgroundTask] = []

    def start(self, parts: Parts) -> None:
        """Start the tasks of a configuration."""
        for name, work in parts.tasks.items():
            task = BackgroundTask(name)
            task.start(work)
            self._tasks.append(task)

    async def end(self) -> None:
        """Cancel all tasks and wait for them."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            await task.end()


def _bound(settings: Settings, address: str) -> socket.socket:
    """Raises BindError. The port is not shared, so that requests cannot reach a process with another secret."""
    return sockets.bind(address, mode=int(settings.oauth.socket_mode, 8), is_shared=False)


def _fixed(settings: Settings) -> tuple[object, ...]:
    """The settings that a reload cannot change."""
    oauth = settings.oauth
    return (
        settings.store,
        settings.log,
        oauth.address,
        oauth.ops_address,
        oauth.mtls_address,
        oauth.socket_mode,
        oauth.connections_max,
        bool(oauth.tls_certificate_file),
    )


def _contexts(settings: Settings) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """The TLS contexts of the listener, and of the one for clients with certificates. Raises TlsError."""
    oauth = settings.oauth
    if oauth.mtls_address and not (oauth.tls_certificate_file and oauth.mtls_client_ca_file):
        raise TlsError("oauth.mtls_address: needs oauth.tls_certificate_file and oauth.mtls_client_ca_file")
    if not oauth.tls_certificate_file:
        return None, None
    try:
        tls = server_context(oauth.tls_certificate_file, oauth.tls_key_file)
    except TlsError as error:
        raise TlsError(f"oauth.tls_certificate_file: {error}") from error
    if not oauth.mtls_address:
        return tls, None
    try:
        return tls, server_context(oauth.tls_certificate_file, oauth.tls_key_file, oauth.mtls_client_ca_file)
    except TlsError as error:
        raise TlsError(f"oauth.mtls_client_ca_file: {error}") from error


def _parts_of(context: Context) -> Parts:
    """Raises RejectedConfig."""
    try:
        return parts_of(context)
    except PartsFault as fault:
        raise RejectedConfig(str(fault)) from fault


def _ticket_secrets(settings: Settings) -> tuple[bytes, ...]:
    """Raises RejectedConfig."""
    if not settings.oauth.is_configured:
        raise RejectedConfig("oauth.resource: is not set, so that there is nothing to authorize")
    try:
        return secrets_of(settings.oauth)
    except SecretFileError as error:
        raise RejectedConfig(str(error)) from error


def _login_secret(login: OAuthLogin) -> str | None:
    """The secret for the identity provider. Raises RejectedConfig."""
    key, path = "oauth.login.client_secret_file", login.client_secret_file
    if not path or login.kind != LOGIN_BY_OIDC:
        return None
    try:
        secret = Path(path).read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        raise RejectedConfig(f"{key}: {path}: is not ASCII text") from None
    except OSError as error:
        raise RejectedConfig(f"{key}: {path}: {error.strerror or error}") from error
    if not secret:
        raise RejectedConfig(f"{key}: {path}: is empty")
    return secret
