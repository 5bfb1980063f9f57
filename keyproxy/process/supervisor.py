"""Several worker processes on one port: starts them, restarts crashed ones, serves health and metrics for all.

Each worker is a `keyproxy serve` process that binds the same port (SO_REUSEPORT) and responds to its supervisor on an
abstract socket, so that no directory has to be writable. The supervisor binds the port without listening on it, so that
a port chosen by the kernel stays reserved, and handles no request: if it is killed, the workers drain and exit; if a
worker crashes, only its own requests are lost.

The supervisor reads a new configuration first. If it changes what all workers share (addresses, the number of workers),
the supervisor starts a new set of workers and stops the old set once the new one serves. Otherwise it offers the
configuration to the workers, which keep their caches, and applies it if all of them accept it. A worker that is started
later begins with the configuration that was applied last.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from keyproxy.config.schema import Settings
from keyproxy.metrics.exposition import CONTENT_TYPE
from keyproxy.platform import clock, sockets, systemd
from keyproxy.platform.process_registry import Presence
from keyproxy.platform.tasks import cancel_all
from keyproxy.process import control_channel, startup_conflicts
from keyproxy.process.control_channel import Order
from keyproxy.process.control_socket import Control
from keyproxy.process.ops_listener import Check, OpsListener, Verdict
from keyproxy.process.reload import ReloadError, bound, check_resources, new_socket
from keyproxy.process.shutdown import Shutdown
from keyproxy.process.signing.key_cut import cut_keys_of
from keyproxy.process.signing.key_rotation import KeyRotation
from keyproxy.process.worker_pool import Worker, WorkerPool

_log = logging.getLogger(__name__)

_STOP_SECONDS: Final = 5.0  # beyond listen.drain_seconds
_LOOK_SECONDS: Final = 1.0

#: A crashed worker is restarted after the first of these delays, after another crash after the second, and so on.
_BACKOFF_SECONDS: Final = (0.1, 0.5, 1.0, 2.0, 5.0)

#: A crash after this much uptime resets the backoff.
_STEADY_SECONDS: Final = 30.0


def count(workers: int) -> int:
    """The number of processes for a value of `listen.workers`; 0: one per core."""
    return workers or len(os.sched_getaffinity(0))


class Supervisor:
    """Starts and supervises the workers. `command` starts one."""

    def __init__(self, settings: Settings, dsn: str, text: str, command: Sequence[str]) -> None:
        """`text`: the configuration that the settings were read from."""
        self._settings = settings
        self._dsn = dsn
        self._text = text
        self._command = command
        self._pool = WorkerPool(lambda: self._restarts)
        self._tasks: set[asyncio.Task[None]] = set()
        self._restarts = 0
        self._failures = 0
        self._is_stopping = False
        self._is_running = False
        self._reloading = asyncio.Lock()
        self._reserved: socket.socket | None = None
        #: The keys that all workers sign with.
        self._rotation = KeyRotation()
        self._ops = self._ops_listener()

    async def run(
        self, *, started: Callable[[str, str], None], reread: Callable[[], str], read: Callable[[str], Settings]
    ) -> None:
        """Run until shutdown: SIGTERM, SIGINT or `keyproxy drain`. Raises BindError, ReloadError.

        `started` is called with both addresses. At SIGHUP `reread` returns a configuration, and `read` parses it;
        either may raise ReloadError.
        """
        shutdown, reload_requested = Shutdown(), asyncio.Event()
        shutdown.on_signals()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload_requested.set)
        check_resources(self._settings)
        control = Control(shutdown.begin)
        async with control.open(self._presence(self._settings)):
            try:
                self._reserved = bound(self._settings.listen)
                ops = bound(self._settings.ops)
                addresses = (sockets.address_of(self._reserved), sockets.address_of(ops))
                # Before the first request is forwarded: the upstream may read the keys here.
                self._ops.is_started = False
                await self._ops.start(ops)
                await self._start_workers()
                self._ops.is_started = self._is_running = True
                started(*addresses)
                systemd.notify("READY=1")
                self._spawn(self._poll_workers())
                self._spawn(self._rotation.run(lambda: self._spawn(self._hand_out_keys())))
                self._spawn(self._reload_on_signal(reload_requested, control, reread, read))
                await shutdown.begun.wait()
                systemd.notify("STOPPING=1")
            finally:
                await self._end(shutdown)

    def _presence(self, settings: Settings) -> Presence:
        return startup_conflicts.of_proxy(settings, self._dsn_of(settings))

    def _dsn_of(self, settings: Settings) -> str:
        return self._dsn if settings.store.dsn == "embedded" else settings.store.dsn

    # -- starting and stopping

    async def _start_workers(self) -> None:
        """Start the configured number of workers and wait until all serve. Raises ReloadError; then none is left."""
        number = count(self._settings.listen.workers)
        workers: list[Worker] = []
        try:
            while len(workers) < number:
                workers.append(await self._start())
            if len(await self._pool.until_ready(workers)) < number:
                raise ReloadError("a worker did not start: see its log messages above")
        except (ReloadError, OSError) as error:
            for worker in workers:
                worker.is_leaving = True
                worker.send_signal(signal.SIGTERM)
            raise ReloadError(str(error)) from error

    async def _start(self) -> Worker:
        assert self._reserved is not None  # noqa: S101 - for the type checker: run() has bound it
        environment = {
            **os.environ,
            "KEYPROXY_LISTEN__ADDRESS": sockets.address_of(self._reserved),
            "KEYPROXY_LISTEN__WORKERS": "1",
            # A worker never binds this address; passing it keeps the configuration valid.
            "KEYPROXY_OPS__ADDRESS": self._settings.ops.address,
        }
        environment.pop("NOTIFY_SOCKET", None)
        begin = Order(control_channel.BEGIN, self._text, self._rotation.private_texts())
        worker = await Worker.start(self._command, environment, begin)
        self._pool.members.add(worker)
        self._spawn(self._restart_after_exit(worker))
        return worker

    async def _restart_after_exit(self, worker: Worker) -> None:
        """Wait for a worker to exit, and replace it unless it was stopped on purpose."""
        status = await worker.process.wait()
        self._pool.ended(worker)
        await self._note_signed(worker)
        await worker.closed()
        if self._is_stopping or worker.is_leaving or not self._is_running:
            return
        if clock.monotonic() - worker.started_mono > _STEADY_SECONDS:
            self._failures = 0
        pause = _BACKOFF_SECONDS[min(self._failures, len(_BACKOFF_SECONDS) - 1)]
        self._failures += 1
        _log.error("worker %d exited with status %d; restarting in %g s", worker.process.pid, status, pause)
        await asyncio.sleep(pause)
        while not await self._is_replaced():  # noqa: ASYNC110 - a retry, not polling
            await asyncio.sleep(_BACKOFF_SECONDS[-1])

    async def _is_replaced(self) -> bool:
        """Start a replacement for a worker that exited. Returns whether none is missing any more."""
        # Never during a reload: the worker would start with the old configuration.
        async with self._reloading:
            staying = sum(not worker.is_leaving for worker in self._pool.members)
            if self._is_stopping or staying >= count(self._settings.listen.workers):
                return True
            try:
                await self._start()
            except OSError as error:
                # No process, memory or file descriptor is available at the moment.
                _log.error("cannot start a worker: %s; retry in %g s", error, _BACKOFF_SECONDS[-1])
                return False
            self._restarts += 1
            return True

    async def _end(self, shutdown: Shutdown) -> None:
        self._is_stopping = True
        listen = self._settings.listen
        for worker in self._pool.members:
            worker.send_signal(shutdown.signal)
        self._spawn(self._skip_linger(shutdown))
        waiting = [self._note_signed(worker) for worker in self._pool.members]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(listen.linger_seconds + listen.drain_seconds + _STOP_SECONDS):
                await asyncio.gather(*waiting)
        for worker in list(self._pool.members):
            _log.error("worker %d did not exit in time; killing it", worker.process.pid)
            worker.send_signal(signal.SIGKILL)
        await asyncio.gather(*(self._note_signed(worker) for worker in self._pool.members))
        await cancel_all(self._tasks)
        await cut_keys_of(self._dsn_of(self._settings), self._rotation.ends())
        for worker in list(self._pool.members):
            await worker.closed()
        await self._ops.close()
        if self._reserved is not None:
            self._reserved.close()
        _log.info("stopped")

    async def _note_signed(self, worker: Worker) -> None:
        await worker.process.wait()
        self._rotation.was_signed(await worker.signed_until())

    async def _hand_out_keys(self) -> None:
        # Never during a reload: a worker follows one order at a time.
        async with self._reloading:
            try:
                await self._pool.hand_out(self._rotation.private_texts())
            except ReloadError as error:
                _log.error("a worker has not received the new signing key: %s", error)

    async def _skip_linger(self, shutdown: Shutdown) -> None:
        await shutdown.is_urgent.wait()
        for worker in self._pool.members:
            worker.send_signal(shutdown.signal)

    # -- reloading

    async def _reload_on_signal(
        self,
        reload_requested: asyncio.Event,
        control: Control,
        reread: Callable[[], str],
        read: Callable[[str], Settings],
    ) -> None:
        while True:
            await reload_requested.wait()
            reload_requested.clear()
            systemd.notify(systemd.reloading())
            try:
                text = reread()
                settings = read(text)
                check_resources(settings)
                control.check(self._presence(settings))
                async with self._reloading:
                    await self._reload(settings, text)
                control.show(self._presence(settings))
            except (ReloadError, sockets.BindError) as error:
                _log.error("reload rejected: %s", error)
            except Exception:  # noqa: BLE001 - the outermost boundary of this task
                _log.exception("reload failed with an internal error")
            else:
                logging.getLogger().setLevel(settings.log.level.upper())
                _log.info("configuration reloaded")
            systemd.notify("READY=1")

    async def _reload(self, settings: Settings, text: str) -> None:
        """Reload all workers, or none. Raises ReloadError or BindError in the second case."""
        ready = await self._pool.offer(text)
        if _frame(settings) == _frame(self._settings):
            self._settings, self._text = settings, text
            await self._pool.apply(ready)
        else:
            await self._pool.withdraw(ready)
            await self._replace_workers(settings, text)

    async def _replace_workers(self, settings: Settings, text: str) -> None:
        was, old_workers, old_ops = (self._settings, self._text, self._reserved), set(self._pool.members), self._ops
        with contextlib.ExitStack() as undo:
            ops = new_socket(undo, self._settings.ops, settings.ops)
            listened = new_socket(undo, self._settings.listen, settings.listen)
            self._settings, self._text, self._reserved = settings, text, listened or self._reserved
            try:
                await self._start_workers()
            except ReloadError:
                self._settings, self._text, self._reserved = was
                raise
            undo.pop_all()
        if ops is not None:
            self._ops = self._ops_listener()
            await self._ops.start(ops)
            await old_ops.close()
        for worker in old_workers:
            worker.is_leaving = True
            # Without lingering: new workers serve already, and old ones must not take new requests.
            worker.send_signal(signal.SIGINT)
        if listened is not None and was[2] is not None:
            was[2].close()

    # -- metrics and checks

    async def _poll_workers(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self._pool.poll()

    def _ops_listener(self) -> OpsListener:
        return OpsListener(
            checks=self._checks,
            metrics=self._pool.metrics,
            metrics_content_type=CONTENT_TYPE,
            jwks=self._pool.jwks,
        )

    async def _checks(self) -> Mapping[str, Check]:
        checks = await self._pool.checks(count(self._settings.listen.workers))
        return checks | {"workers": Check(Verdict.FAILED, "stopping")} if self._is_stopping else checks

    def _spawn(self, doing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _frame(settings: Settings) -> tuple[str, str, int]:
    """The settings that all workers share, so that they cannot change one by one."""
    return settings.listen.address, settings.ops.address, count(settings.listen.workers)
