"""Reload: the resources of a new configuration, prepared beside the current one, and the ways in which this can fail."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import NamedTuple

from keyproxy.config.schema import Listen, Ops, Settings
from keyproxy.platform import clock, sockets
from keyproxy.process.patterns.re2_matcher import PatternError, Re2Matcher, compile_patterns
from keyproxy.process.providers.proxy_providers import ProxyProviders
from keyproxy.process.providers.watched_file import WatchedFileError
from keyproxy.store.store import Store
from keyproxy.wire.tls import TlsError, server_context, upstream_context
from keyproxy.wire.upstream.pool import Upstreams


class ReloadError(Exception):
    """A new configuration cannot be applied. The text gives the reason."""


class PreparedConfig(NamedTuple):
    """A new configuration with its resources, ready for use. `proxy`, `ops`: None if the address is unchanged."""

    settings: Settings
    dsn: str
    proxy: socket.socket | None
    ops: socket.socket | None
    tls: ssl.SSLContext | None
    upstreams: Upstreams
    store: Store
    patterns: Re2Matcher | None


def new_socket(undo: contextlib.ExitStack, was: Listen | Ops, now: Listen | Ops) -> socket.socket | None:
    """A socket for a changed address; None if it is unchanged. Raises BindError, ReloadError."""
    if was.address == now.address:
        if was.socket_mode != now.socket_mode and now.address.startswith("unix:"):
            raise ReloadError("socket_mode: applies when the socket is created: restart, or change the address too")
        return None
    return undo.enter_context(contextlib.closing(bound(now)))


def bound(listener: Listen | Ops) -> socket.socket:
    """A socket bound to the address of a listener. Raises BindError."""
    return sockets.bind(listener.address, mode=int(listener.socket_mode, 8))


def new_store(settings: Settings, dsn: str) -> Store:
    """A store, not yet open."""
    return Store(
        settings.store,
        settings.cache,
        settings.ledger,
        settings.usage,
        dsn=dsn,
        header_prefix=settings.identity.header_prefix,
        limits=settings.limits,
        oauth=settings.oauth,
        alert_percentages=settings.alerts.percentages,
        now=clock.now,
    )


def new_tls(settings: Settings) -> ssl.SSLContext | None:
    """The TLS context for client connections; None without TLS. Raises TlsError."""
    listen = settings.listen
    if not listen.tls_certificate_file:
        return None
    return server_context(
        listen.tls_certificate_file,
        listen.tls_key_file,
        listen.tls_client_ca_file,
        requires_client_certificates=settings.requires_client_certificates,
    )


def check_resources(settings: Settings) -> None:
    """Check that the files and the patterns of the configuration can be loaded. Raises ReloadError."""
    try:
        new_tls(settings)
        upstream_context(settings.upstream)
        compile_patterns(settings.categories)
        ProxyProviders().prepare(settings)
    except (TlsError, PatternError, WatchedFileError) as error:
        raise ReloadError(str(error)) from error
