"""The data plane as a process: signals, file descriptors, notifications to the service manager."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias

from keyproxy.config.schema import Settings
from keyproxy.platform import sockets, systemd
from keyproxy.process import control_channel, startup_conflicts
from keyproxy.process.app import Proxy
from keyproxy.process.control_socket import Control
from keyproxy.process.reload import PreparedConfig, ReloadError, bound, check_resources
from keyproxy.process.shutdown import Shutdown

_log = logging.getLogger(__name__)

#: File descriptors for everything except proxied connections: the store, listeners, logs, and a reserve.
_OTHER_FILES: Final = 64

_PR_SET_PDEATHSIG: Final = 1

#: The time in which a worker has to prepare a new configuration, or refuses it.
_PREPARE_SECONDS: Final = 20.0

#: Applies new configurations to the proxy until it is cancelled. SIGHUP sets the event.
Changing: TypeAlias = Callable[[Proxy, asyncio.Event], Coroutine[Any, Any, None]]

#: The garbage collector runs on the youngest generation after this many net allocations.
_YOUNG_OBJECTS: Final = 20_000


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
    changing: Changing,
    private_ops: socket.socket | None = None,
) -> None:
    """Run the data plane until shutdown: SIGTERM, SIGINT or `keyproxy drain`.

    `started` is called with both addresses. `changing` applies reloaded configurations. `private_ops`: a worker's socket
    for requests of its supervisor, which has the control socket. Raises BindError, ReloadError.
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
        proxy = Proxy(settings, dsn, access_log_fd=access_log_fd)
        proxy.control = control
        proxy_socket = stack.enter_context(contextlib.closing(bound(settings.listen)))
        ops_socket = stack.enter_context(contextlib.closing(private_ops or bound(settings.ops)))
        # Before the first connection: it blocks the event loop for the time of several hundred requests.
        freeze_garbage()
        async with proxy.running(proxy_socket, ops_socket):
            started(sockets.address_of(proxy_socket), sockets.address_of(ops_socket))
            systemd.notify("READY=1")
            async with asyncio.TaskGroup() as group:
                change = group.create_task(changing(proxy, reload_requested))
                await shutdown.begun.wait()
                change.cancel()
            systemd.notify("STOPPING=1")
            proxy.server.leave()
            if proxy.listen.linger_seconds and not shutdown.is_urgent.is_set():
                _log.info("not ready; accepting connections for another %g s", proxy.listen.linger_seconds)
                await shutdown.linger(proxy.listen.linger_seconds)
            _log.info("draining: no new work, up to %g s for requests in flight", proxy.listen.drain_seconds)
    _log.info("stopped")


def on_hangup(read_again: Callable[[], tuple[Settings, str]]) -> Changing:
    """Reload at SIGHUP. `read_again` returns the new settings and DSN, or raises ReloadError."""

    async def changing(proxy: Proxy, reload_requested: asyncio.Event) -> None:
        while True:
            await reload_requested.wait()
            reload_requested.clear()
            systemd.notify(systemd.reloading())
            try:
                await _apply(proxy, await proxy.prepare(*read_again()))
            except ReloadError as error:
                _log.error("reload rejected: %s", error)
            except Exception:  # noqa: BLE001 - the outermost boundary of this task: a failed reload drops no request
                _log.exception("reload failed with an internal error")
            systemd.notify("READY=1")

    return changing


def on_orders(sock: socket.socket, read: Callable[[str], tuple[Settings, str]]) -> Changing:
    """Reload on orders of the supervisor. `read` parses a configuration into settings and DSN, or raises ReloadError.

    A worker ignores SIGHUP, which a terminal or a service manager may send to all processes: the supervisor handles it.
    """

    async def changing(proxy: Proxy, _again: asyncio.Event) -> None:
        prepared: PreparedConfig | None = None
        worker_end = await control_channel.worker_end(sock)
        try:
            async for order in worker_end.orders():
                refused = ""
                if order.kind == control_channel.OFFER:
                    try:
                        prepared = await _prepare(proxy, read, order.text)
                    except ReloadError as error:
                        refused = str(error)
                elif prepared is not None:
                    change, prepared = prepared, None
                    await (_apply if order.kind == control_channel.APPLY else Proxy.abandon)(proxy, change)
                worker_end.reply(refused)
        finally:
            if prepared is not None:
                await proxy.abandon(prepared)
            await worker_end.close()

    return changing


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
