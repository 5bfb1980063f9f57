"""The admin process: a listener over a store, until SIGTERM; SIGHUP reloads the configuration and the token."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
from collections.abc import Callable

from keyproxy.admin.authentication import Access, TokenFileError, file_digest
from keyproxy.admin.connections import Bounds
from keyproxy.admin.endpoints import ApiConfig
from keyproxy.admin.listener import AdminListener, traffic
from keyproxy.admin.metrics_page import MetricsPage, Traffic
from keyproxy.admin.service import Service
from keyproxy.admin.webhooks import Webhooks
from keyproxy.auth.api_key import KeyFormat
from keyproxy.auth.throttle import Throttle
from keyproxy.config.addresses import is_loopback
from keyproxy.config.schema import Settings
from keyproxy.metrics.access_log import AccessLog
from keyproxy.platform import clock, sockets, systemd
from keyproxy.platform.tasks import cancel_all
from keyproxy.process import startup_conflicts
from keyproxy.process.control_socket import Control
from keyproxy.process.providers.operator_secrets import OperatorSecrets
from keyproxy.signing.token_check import ACCEPTS_NONE
from keyproxy.store.directory.admin_tokens import AdminTokens
from keyproxy.store.directory.agents.operator_mint import OperatorKey, SigningMint
from keyproxy.store.directory.directory import Actor
from keyproxy.store.ledger import select_backend
from keyproxy.store.postgres.database import Database, StoreUnavailable
from keyproxy.store.signing_keys import SigningKeyCache
from keyproxy.wire.tls import TlsError, server_context, show

_log = logging.getLogger(__name__)


class RefusedToStart(Exception):
    """The admin API does not start with this configuration. The text is the reason."""


class Admin:
    """A running admin API."""

    def __init__(self, settings: Settings, dsn: str) -> None:
        """Raises TokenFileError, TlsError."""
        self._settings = settings
        self._tls = _tls(settings)
        self._database = Database(
            dsn,
            pool_size_max=settings.store.pool_size_max,
            statement_timeout_seconds=settings.store.statement_timeout_seconds,
        )
        self._throttle = Throttle()
        self._webhooks = Webhooks(self._database, lambda: self._settings)
        self._signing_keys = SigningKeyCache(self._database, ACCEPTS_NONE, clock.now)
        self._operator_key = OperatorKey(self._signing_keys, clock.now)
        self._service = self._made(settings)

    def _made(self, settings: Settings) -> Service:
        select_backend.preload(settings.ledger)
        key_format = KeyFormat(settings.keys.prefix, accepts_foreign=settings.keys.accept_foreign)
        # This instance only looks tokens up; it makes no changes, so its actor is never logged.
        tokens = AdminTokens(self._database, key_format, Actor("admin", "local"))
        access = Access(tokens, key_format, self._throttle, file_digest=file_digest(settings.admin.token_file))
        config = ApiConfig(settings.keys.age_days_max, settings)
        mint = SigningMint(settings.access, self._operator_key, clock.now)
        return Service(self._database, key_format, access, config, mint, OperatorSecrets(settings), clock.monotonic)

    async def run(
        self, *, access_log_fd: int, started: Callable[[str], None], read_again: Callable[[], Settings]
    ) -> None:
        """Serve until SIGTERM or SIGINT. Calls `started` with the address. Raises BindError, RefusedToStart."""
        stop, again = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, again.set)
        async with contextlib.AsyncExitStack() as stack:
            await self._database.open()
            stack.push_async_callback(self._database.close)
            stack.push_async_callback(self._operator_key.close)
            await self._check_tokens()
            log = AccessLog(access_log_fd, wall_offset=clock.wall_offset)
            log.success_share = self._settings.log.success_share
            stack.callback(log.close)
            log.start()
            counted = traffic()
            listener = AdminListener(
                self._service,
                metrics=self._metrics_page(counted).page,
                signing_keys=self._signing_keys,
                traffic=counted,
                log_line=log.write_line if self._settings.log.access else None,
                bounds=Bounds(self._settings.admin.connections_max),
            )
            await stack.enter_async_context(Control().open(startup_conflicts.of_admin(self._settings)))
            sock = stack.enter_context(contextlib.closing(_bound(self._settings)))
            stack.push_async_callback(listener.close)
            await listener.start(sock, self._tls)
            self._warn_of_unencrypted_tokens()
            started(f"{sockets.address_of(sock)}{'' if self._tls is None else ', TLS'}")
            systemd.notify("READY=1")
            async with asyncio.TaskGroup() as group:
                changing = group.create_task(self._change_on(again, listener, read_again))
                sending = group.create_task(self._webhooks.run())
                await stop.wait()
                await cancel_all([changing, sending])
            systemd.notify("STOPPING=1")
        _log.info("stopped")

    def _metrics_page(self, counted: Traffic) -> MetricsPage:
        return MetricsPage(
            self._webhooks, now_mono=clock.monotonic, traffic=counted, minted=lambda: self._operator_key.minted
        )

    def _warn_of_unencrypted_tokens(self) -> None:
        # Only a warning: a TLS proxy in front, a pod or a container requires this setup.
        if self._tls is None and not is_loopback(self._settings.admin.address):
            _log.warning(
                "admin.address: %s is not loopback, and admin.tls_certificate_file is not set: tokens and new keys cross"
                " the network unencrypted unless a TLS proxy is in front",
                self._settings.admin.address,
            )

    async def _check_tokens(self) -> None:
        if self._settings.admin.token_file or is_loopback(self._settings.admin.address):
            return
        tokens = AdminTokens(self._database, self._service.key_format, Actor("admin", "local"))
        try:
            is_there = await tokens.are_there_any()
        except StoreUnavailable as error:
            raise RefusedToStart(
                f"admin.address: {self._settings.admin.address} is not loopback, admin.token_file is not set, and the"
                f" database is unavailable, so tokens cannot be checked: {error}"
            ) from error
        if not is_there:
            raise RefusedToStart(
                f"admin.address: {self._settings.admin.address} is not loopback, and no admin token exists: set"
                f" admin.token_file, or create one with `keyproxy admin token create`"
            )

    async def _change_on(
        self, again: asyncio.Event, listener: AdminListener, read_again: Callable[[], Settings]
    ) -> None:
        while True:
            await again.wait()
            again.clear()
            systemd.notify(systemd.reloading())
            try:
                listener.service = self._changed(read_again())
                _log.info("configuration reloaded")
            except (TokenFileError, TlsError, RefusedToStart) as error:
                _log.error("reload rejected: %s", error)
            except Exception:  # noqa: BLE001 - the outermost boundary of this task: the admin API keeps running
                _log.exception("reload failed with an internal error")
            systemd.notify("READY=1")

    def _changed(self, settings: Settings) -> Service:
        """Apply a new configuration and return its service. Raises TokenFileError, TlsError, RefusedToStart."""
        was = self._settings
        if _fixed(settings) != _fixed(was):
            raise RefusedToStart(
                "store, log, admin.address, admin.socket_mode, admin.connections_max and the presence of a certificate"
                " cannot change in a reload: restart the admin API"
            )
        if was.admin.token_file and not settings.admin.token_file and not is_loopback(settings.admin.address):
            raise RefusedToStart(
                "admin.token_file: a reload cannot remove it while admin.address is not loopback: restart the admin API"
            )
        _tls(settings)  # validate before changing anything
        service = self._made(settings)
        if self._tls is not None:
            show(self._tls, settings.admin.tls_certificate_file, settings.admin.tls_key_file)
        self._service, self._settings = service, settings
        return self._service


def _bound(settings: Settings) -> socket.socket:
    """Raises BindError. The port is not shared, so that admin requests cannot reach another process."""
    return sockets.bind(settings.admin.address, mode=int(settings.admin.socket_mode, 8), is_shared=False)


def _fixed(settings: Settings) -> tuple[object, ...]:
    """The settings that a reload cannot change."""
    admin = settings.admin
    return (
        settings.store,
        settings.log,
        admin.address,
        admin.socket_mode,
        admin.connections_max,
        bool(admin.tls_certificate_file),
    )


def _tls(settings: Settings) -> ssl.SSLContext | None:
    """Raises TlsError."""
    admin = settings.admin
    if not admin.tls_certificate_file:
        return None
    try:
        return server_context(admin.tls_certificate_file, admin.tls_key_file)
    except TlsError as error:
        raise TlsError(f"admin.tls_certificate_file: {error}") from error
