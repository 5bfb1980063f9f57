"""The data plane as a process: signals, file descriptors, and what the service manager is told."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Final

from keyproxy import sockets, systemd
from keyproxy.app import ChangeError, Proxy, check_files
from keyproxy.settings import Settings

_log = logging.getLogger(__name__)

#: For what takes file descriptors beside connections: the store, listeners, logs, and some in reserve.
_OTHER_FILES: Final = 64

_PR_SET_PDEATHSIG: Final = 1

#: So many more objects that may be part of a cycle are made than go, before the youngest are looked through.
_YOUNG_OBJECTS: Final = 20_000


def end_with(owner: int) -> None:
    """Have the kernel send SIGTERM to this process when its owner dies, however it dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != owner:
        sys.exit("the supervisor is gone already")


def _settle_memory() -> None:
    """Have the collector of cycles look at what requests make, seldom, and at what is there by now never again.

    A request leaves no cycles: its objects go when they are let go. Looking through a hundred thousand cached keys for
    some shows in the tail of its latency.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 20, 50)


def _allow_files(settings: Settings) -> None:
    """Have as many file descriptors as the bounds on connections may take, or say that there are not so many."""
    needed = settings.listen.connections_max + 2 * settings.upstream.connections_max + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
        if allowed < needed:
            _log.warning("%d file descriptors are allowed, %d may be needed: raise LimitNOFILE", allowed, needed)


async def serve(
    settings: Settings, dsn: str, *, access_log_fd: int, started: Callable[[str, str], None],
    read_again: Callable[[], tuple[Settings, str]],
) -> None:  # fmt: skip
    """Run the data plane until SIGTERM or SIGINT.

    `started` is told both addresses. `read_again` gives settings and DSN when SIGHUP asks for them, or raises
    ChangeError. Raises BindError, ChangeError.
    """
    stop, again = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, again.set)
    _allow_files(settings)
    check_files(settings)
    proxy = Proxy(settings, dsn, access_log_fd=access_log_fd)
    with (
        contextlib.closing(sockets.bind(settings.listen.address)) as proxy_socket,
        contextlib.closing(sockets.bind(settings.ops.address)) as ops_socket,
    ):
        async with proxy.running(proxy_socket, ops_socket):
            started(sockets.told(proxy_socket), sockets.told(ops_socket))
            _settle_memory()
            systemd.notify("READY=1")
            async with asyncio.TaskGroup() as group:
                changing = group.create_task(_change_on(again, proxy, read_again))
                await stop.wait()
                changing.cancel()
            systemd.notify("STOPPING=1")
            _log.info("draining: no new work, up to %g s for what is under way", settings.listen.drain_seconds)
    _log.info("stopped")


async def _change_on(again: asyncio.Event, proxy: Proxy, read_again: Callable[[], tuple[Settings, str]]) -> None:
    while True:
        await again.wait()
        again.clear()
        systemd.notify(systemd.reloading())
        try:
            settings, dsn = read_again()
            await proxy.change(settings, dsn)
        except ChangeError as error:
            _log.error("the configuration stays as it was: %s", error)
        except Exception:  # noqa: BLE001 - the outermost boundary of this task: nobody is dropped for a defect in here
            _log.exception("the configuration could not be changed")
        else:
            _allow_files(settings)
            logging.getLogger().setLevel(settings.log.level.upper())
            _log.info("another configuration is in force")
        systemd.notify("READY=1")
