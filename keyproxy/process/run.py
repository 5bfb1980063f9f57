"""The data plane as a process: signals, file descriptors, notifications to the service manager."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from keyproxy.config.schema import Settings
from keyproxy.platform import sockets, systemd
from keyproxy.platform.tasks import cancel_all
from keyproxy.process import control_channel, startup_conflicts
from keyproxy.process.app import Proxy
from keyproxy.process.control_channel import Order, WorkerEnd
from keyproxy.process.control_socket import Control
from keyproxy.process.reload import PreparedConfig, ReloadError, bound, check_resources
from keyproxy.process.shutdown import Shutdown
from keyproxy.process.signing.key_cut import cut_keys
from keyproxy.process.signing.key_rotation import KeyRotation
from keyproxy.signing.signing_key import SigningKey

_log = logging.getLogger(__name__)

#: File descriptors for everything except proxied connections: the store, listeners, logs, and a reserve.
_OTHER_FILES: Final = 64

_PR_SET_PDEATHSIG: Final = 1

#: The time in which a worker has to prepare a new configuration, or refuses it.
_PREPARE_SECONDS: Final = 20.0

#: The garbage collector runs on the youngest generation after this many net allocations.
_YOUNG_OBJECTS: Final = 20_000


class Changes(Protocol):
    """Where new configurations and signing keys of a process come from."""

    @property
    def keys(self) -> Sequence[SigningKey]:
        """The keys to sign with at the start, the oldest first."""
        ...

    async def apply(self, proxy: Proxy, reload_requested: asyncio.Event) -> None:
        """Apply changes to the proxy until cancelled. SIGHUP sets the event."""
        ...

    async def end(self, proxy: Proxy) -> None:
        """The proxy has drained and signs nothing more; its store is still open."""
        ...


def end_with(owner: int) -> None:
    """Have the kernel send SIGTERM to this process when its owner dies, however it dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != owner:
        sys.exit("the supervisor has already exited")


def freeze_garbage() -> None:
    """Make the garbage collector ignore all objects that exist now, and collect rarely.

    A request leaves no cycles: reference counting frees its objects. Scanning a hundred thousand cached keys for cycles
    is visible in the tail latency.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 20, 50)


def _raise_file_limit(settings: Settings) -> None:
    """Raise the limit of file descriptors to what the bounds on connections require; warn if that is not possible."""
    needed = settings.listen.connections_max + 2 * settings.upstream.connections_max + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
        if allowed < needed:
            _log.warning("only %d file descriptors allowed, up to %d needed: raise LimitNOFILE", allowed, needed)


async def serve(
    settings: Settings,
    dsn: str,
    *,
    access_log_fd: int,
    started: Callable[[str, str], None],
    changes: Changes,
    private_ops: socket.socket | None = None,
) -> None:
    """Run the data plane until shutdown: SIGTERM, SIGINT or `keyproxy drain`.

    `started` is called with both addresses. `changes`: where new configurations and signing keys come from.
    `private_ops`: a worker's socket for requests of its supervisor, which has the control socket. Raises BindError,
    ReloadError.
    """
    shutdown, reload_requested = Shutdown(), asyncio.Event()
    shutdown.on_signals()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload_requested.set)
    _raise_file_limit(settings)
    check_resources(settings)
    async with contextlib.AsyncExitStack() as stack:
        control = None if private_ops is not None else Control(shutdown.begin)
        if control is not None:
            await stack.enter_async_context(control.open(startup_conflicts.of_proxy(settings, dsn)))
        is_worker = private_ops is not None
        proxy = Proxy(settings, dsn, access_log_fd=access_log_fd, keys=changes.keys, has_siblings=is_worker)
        proxy.control = control
        proxy.signing.drained = functools.partial(changes.end, proxy)
        proxy_socket = stack.enter_context(contextlib.closing(bound(settings.listen)))
        ops_socket = stack.enter_context(contextlib.closing(private_ops or bound(settings.ops)))
        # Before the first connection: it blocks the event loop for the time of several hundred requests.
        freeze_garbage()
        async with proxy.running(proxy_socket, ops_socket):
            started(sockets.address_of(proxy_socket), sockets.address_of(ops_socket))
            systemd.notify("READY=1")
            async with asyncio.TaskGroup() as group:
                change = group.create_task(changes.apply(proxy, reload_requested))
                await shutdown.begun.wait()
                await cancel_all([change])
            systemd.notify("STOPPING=1")
            proxy.server.leave()
            if proxy.listen.linger_seconds and not shutdown.is_urgent.is_set():
                _log.info("not ready; accepting connections for another %g s", proxy.listen.linger_seconds)
                await shutdown.linger(proxy.listen.linger_seconds)
            _log.info("draining: no new work, up to %g s for requests in flight", proxy.listen.drain_seconds)
    _log.info("stopped")


class OwnChanges:
    """The changes of a single process: it reads its configuration again at SIGHUP, and makes its signing keys."""

    def __init__(self, read_again: Callable[[], tuple[Settings, str]]) -> None:
        """`read_again` returns the new settings and DSN, or raises ReloadError."""
        self._read_again = read_again
        self._rotation = KeyRotation()

    @property
    def keys(self) -> Sequence[SigningKey]:
        return self._rotation.keys

    async def apply(self, proxy: Proxy, reload_requested: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._rotation.run(lambda: proxy.signing.ring.adopt(self.keys)))
            group.create_task(self._reload(proxy, reload_requested))

    async def end(self, proxy: Proxy) -> None:
        await cut_keys(proxy.store.signing_keys, self._rotation.ends())

    async def _reload(self, proxy: Proxy, reload_requested: asyncio.Event) -> None:
        while True:
            await reload_requested.wait()
            reload_requested.clear()
            systemd.notify(systemd.reloading())
            try:
                await _apply(proxy, await proxy.prepare(*self._read_again()))
            except ReloadError as error:
                _log.error("reload rejected: %s", error)
            except Exception:  # noqa: BLE001 - the outermost boundary of this task: a failed reload drops no request
                _log.exception("reload failed with an internal error")
            systemd.notify("READY=1")


class OrderedChanges:
    """The changes of a worker: its supervisor orders new configurations and hands it the signing keys.

    A worker ignores SIGHUP, which a terminal or a service manager may send to all processes: the supervisor handles it.
    """

    def __init__(self, sock: socket.socket, begun: Order, read: Callable[[str], tuple[Settings, str]]) -> None:
        """`begun`: the first order. `read` parses a configuration into settings and DSN, or raises ReloadError."""
        self._sock = sock
        self._read = read
        self._worker_end: WorkerEnd | None = None
        self.keys: Sequence[SigningKey] = [SigningKey.from_private(text) for text in begun.keys]

    async def apply(self, proxy: Proxy, _reload_requested: asyncio.Event) -> None:
        prepared: PreparedConfig | None = None
        worker_end = self._worker_end = await control_channel.worker_end(self._sock)
        try:
            async for order in worker_end.orders():
                refused = ""
                if order.kind == control_channel.KEYS:
                    proxy.signing.ring.adopt([SigningKey.from_private(text) for text in order.keys])
                elif order.kind == control_channel.OFFER:
                    try:
                        prepared = await _prepare(proxy, self._read, order.text)
                    except ReloadError as error:
                        refused = str(error)
                elif prepared is not None:
                    change, prepared = prepared, None
                    await (_apply if order.kind == control_channel.APPLY else Proxy.abandon)(proxy, change)
                worker_end.reply(refused)
        finally:
            if prepared is not None:
                await proxy.abandon(prepared)
            worker_end.stop()

    async def end(self, proxy: Proxy) -> None:
        if self._worker_end is not None:
            await self._worker_end.close(proxy.signing.ring.signed_until())


def changes(
    sock: socket.socket | None,
    begun: Order | None,
    read_again: Callable[[], tuple[Settings, str]],
    read: Callable[[str], tuple[Settings, str]],
) -> Changes:
    """The changes of a worker with this control channel and first order, or of a single process."""
    return OwnChanges(read_again) if sock is None or begun is None else OrderedChanges(sock, begun, read)


async def _prepare(proxy: Proxy, read: Callable[[str], tuple[Settings, str]], text: str) -> PreparedConfig:
    try:
        async with asyncio.timeout(_PREPARE_SECONDS):
            return await proxy.prepare(*read(text))
    except TimeoutError:
        raise ReloadError(f"timeout: not prepared within {_PREPARE_SECONDS:g} s") from None
    except ReloadError:
        raise
    except Exception as error:  # the outermost boundary of an order: a failed reload drops no request
        _log.exception("reload failed with an internal error")
        raise ReloadError("internal error, logged above") from error


async def _apply(proxy: Proxy, change: PreparedConfig) -> None:
    await proxy.apply(change)
    _raise_file_limit(change.settings)
    logging.getLogger().setLevel(change.settings.log.level.upper())
    _log.info("configuration reloaded")
