"""Several processes on one port: starts them, starts a crashed one again, and answers health and metrics for all.

Each worker is a `keyproxy serve` of its own that binds the same port (SO_REUSEPORT) and listens for ops on a private unix
socket. The supervisor holds the port without listening on it, so that a port that was chosen stays chosen, and touches no
request: when it is killed the workers drain and end, and a worker that crashes takes down only what it was serving.

Another configuration is read here first. Where it changes what all share (addresses, the number of workers), a whole new
crew is started and the old one is let go once the new one serves; else the workers are told to read it themselves, which
keeps what they have cached.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from keyproxy import clock, sockets, systemd
from keyproxy.app import ChangeError, check_files
from keyproxy.metrics.catalogue import CONTENT_TYPE
from keyproxy.metrics.fleet import Fleet
from keyproxy.ops import Check, OpsListener, Verdict, worst
from keyproxy.settings import Settings

_log = logging.getLogger(__name__)

_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 5.0  # beyond listen.drain_seconds
_ASK_SECONDS: Final = 2.0
_LOOK_SECONDS: Final = 1.0

#: A worker that ended unasked is started again after the first of these, the next time after the second, and so on.
_BACKOFF_SECONDS: Final = (0.1, 0.5, 1.0, 2.0, 5.0)

#: A worker that has served this long has started well: the next crash is the first one again.
_STEADY_SECONDS: Final = 30.0


def count(workers: int) -> int:
    """How many processes `listen.workers` stands for; 0: one per core."""
    return workers or len(os.sched_getaffinity(0))


class _Worker:
    """One process, and what it last told of itself."""

    def __init__(self, process: asyncio.subprocess.Process, path: Path) -> None:
        self.process = process
        self.started_mono = clock.monotonic()
        self.is_ready = False
        self.is_leaving = False
        self.page = ""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(path)), timeout=aiohttp.ClientTimeout(total=_ASK_SECONDS)
        )

    async def ask(self, path: str) -> bytes | None:
        """A page of its ops listener, whatever its status; None if it does not answer."""
        try:
            async with self._session.get(f"http://worker{path}") as response:
                return await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def look(self) -> None:
        """Take note of how it is."""
        page = await self.ask("/metrics")
        if page is not None:
            self.is_ready, self.page = True, page.decode("utf-8")

    def tell(self, number: signal.Signals) -> None:
        """Send a signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def closed(self) -> None:
        """Nothing will be asked of it any more."""
        await self._session.close()


class Supervisor:
    """See the module. `command` starts a worker, which is configured by `environment` over it."""

    def __init__(self, settings: Settings, command: Sequence[str]) -> None:
        self._settings = settings
        self._command = command
        self._workers: set[_Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._restarts = 0
        self._failures = 0
        self._serial = 0
        self._is_stopping = False
        self._is_manned = False
        self._reserved: socket.socket | None = None
        self._directory = Path(tempfile.mkdtemp(prefix="keyproxy-"))
        self._fleet = Fleet(self._states, lambda: self._restarts)
        self._ops = self._ops_listener()

    async def run(self, *, started: Callable[[str, str], None], read_again: Callable[[], tuple[Settings, str]]) -> None:
        """Run until SIGTERM or SIGINT. Raises BindError, ChangeError."""
        stop, again = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, again.set)
        check_files(self._settings)
        try:
            self._reserved = sockets.bind(self._settings.listen.address)
            ops = sockets.bind(self._settings.ops.address)
            told = (sockets.told(self._reserved), sockets.told(ops))
            await self._start_crew()
            self._is_manned = True
            await self._ops.start(ops)
            started(*told)
            systemd.notify("READY=1")
            self._spawn(self._look_on())
            self._spawn(self._change_on(again, read_again))
            await stop.wait()
            systemd.notify("STOPPING=1")
        finally:
            await self._end()

    # -- starting and ending

    async def _start_crew(self) -> None:
        """As many workers as are configured; all serve when this returns, or, raising ChangeError, none is left."""
        number = count(self._settings.listen.workers)
        crew = await asyncio.gather(*(self._start() for _ in range(number)))
        try:
            async with asyncio.timeout(_START_SECONDS):
                await asyncio.gather(*(self._until_ready(worker) for worker in crew))
            if not self._workers.issuperset(crew):
                raise ChangeError("a worker ended")
        except (TimeoutError, ChangeError):
            for worker in crew:
                worker.is_leaving = True
                worker.tell(signal.SIGTERM)
            raise ChangeError("a worker could not be started: it says above why") from None

    async def _start(self) -> _Worker:
        self._serial += 1
        path = self._directory / f"{self._serial}.sock"
        assert self._reserved is not None  # noqa: S101 - for the type checker: run() has bound it
        environment = {
            **os.environ,
            "KEYPROXY_LISTEN__ADDRESS": sockets.told(self._reserved),
            "KEYPROXY_LISTEN__WORKERS": "1",
            "KEYPROXY_OPS__ADDRESS": f"unix:{path}",
        }
        environment.pop("NOTIFY_SOCKET", None)
        process = await asyncio.create_subprocess_exec(
            *self._command, env=environment, stdin=asyncio.subprocess.DEVNULL
        )
        worker = _Worker(process, path)
        self._workers.add(worker)
        self._spawn(self._mind(worker))
        return worker

    async def _until_ready(self, worker: _Worker) -> None:
        while not worker.is_ready:
            if worker not in self._workers:
                raise ChangeError("a worker ended")
            await asyncio.sleep(0.05)
            await worker.look()

    async def _mind(self, worker: _Worker) -> None:
        """Wait for the end of a worker; start another one in its place if nobody asked for that."""
        status = await worker.process.wait()
        self._workers.discard(worker)
        await worker.closed()
        if worker.page:
            self._fleet.ended(worker.page)
        if self._is_stopping or worker.is_leaving or not self._is_manned:
            return
        if clock.monotonic() - worker.started_mono > _STEADY_SECONDS:
            self._failures = 0
        pause = _BACKOFF_SECONDS[min(self._failures, len(_BACKOFF_SECONDS) - 1)]
        self._failures += 1
        _log.error("worker %d ended with status %d; another one starts in %g s", worker.process.pid, status, pause)
        await asyncio.sleep(pause)
        while not self._is_stopping and len(self._workers) < count(self._settings.listen.workers):
            try:
                await self._start()
            except OSError as error:
                # No process, memory or file descriptor to be had now: there may be later.
                _log.error("a worker cannot be started: %s; once more in %g s", error, _BACKOFF_SECONDS[-1])
                await asyncio.sleep(_BACKOFF_SECONDS[-1])
            else:
                self._restarts += 1
                return

    async def _end(self) -> None:
        self._is_stopping = True
        for worker in self._workers:
            worker.tell(signal.SIGTERM)
        waiting = [worker.process.wait() for worker in self._workers]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.listen.drain_seconds + _STOP_SECONDS):
                await asyncio.gather(*waiting)
        for worker in list(self._workers):
            _log.error("worker %d did not end and is killed", worker.process.pid)
            worker.tell(signal.SIGKILL)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in list(self._workers):
            await worker.closed()
        await self._ops.close()
        if self._reserved is not None:
            self._reserved.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        _log.info("stopped")

    # -- another configuration

    async def _change_on(self, again: asyncio.Event, read_again: Callable[[], tuple[Settings, str]]) -> None:
        while True:
            await again.wait()
            again.clear()
            systemd.notify(systemd.reloading())
            try:
                settings, _ = read_again()
                check_files(settings)
                await self._change(settings)
            except (ChangeError, sockets.BindError) as error:
                _log.error("the configuration stays as it was: %s", error)
            except Exception:  # noqa: BLE001 - the outermost boundary of this task
                _log.exception("the configuration could not be changed")
            systemd.notify("READY=1")

    async def _change(self, settings: Settings) -> None:
        was = self._settings
        if _frame(settings) == _frame(was):
            self._settings = settings
            for worker in self._workers:
                worker.tell(signal.SIGHUP)
            return
        old_crew, old_socket, old_ops = set(self._workers), self._reserved, self._ops
        ops = None if settings.ops.address == was.ops.address else sockets.bind(settings.ops.address)
        if settings.listen.address != was.listen.address:
            self._reserved = sockets.bind(settings.listen.address)
        self._settings = settings
        try:
            await self._start_crew()
        except ChangeError:
            self._settings, self._reserved = was, old_socket
            raise
        if ops is not None:
            self._ops = self._ops_listener()
            await self._ops.start(ops)
            await old_ops.close()
        for worker in old_crew:
            worker.is_leaving = True
            worker.tell(signal.SIGTERM)
        if old_socket is not None and old_socket is not self._reserved:
            old_socket.close()
        _log.info("another configuration is in force")

    # -- what is told of all

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await asyncio.gather(*(worker.look() for worker in self._workers))

    def _states(self) -> Mapping[str, int]:
        ready = sum(worker.is_ready and not worker.is_leaving for worker in self._workers)
        leaving = sum(worker.is_leaving for worker in self._workers)
        return {"ready": ready, "starting": len(self._workers) - ready - leaving, "leaving": leaving}

    def _ops_listener(self) -> OpsListener:
        return OpsListener(checks=self._checks, metrics=self._metrics, metrics_content_type=CONTENT_TYPE)

    async def _metrics(self) -> bytes:
        await asyncio.gather(*(worker.look() for worker in self._workers))
        return self._fleet.render(worker.page for worker in self._workers if worker.page)

    async def _checks(self) -> Mapping[str, Check]:
        pages = await asyncio.gather(*(worker.ask("/readyz") for worker in self._workers if not worker.is_leaving))
        told: dict[str, list[Check]] = {}
        for page in pages:
            for name, check in (orjson.loads(page)["checks"] if page else {}).items():
                told.setdefault(name, []).append(Check(Verdict(check["status"]), check.get("reason", "")))
        checks = {name: _worst(some) for name, some in told.items()}
        return checks | {"workers": self._check_workers(sum(page is not None for page in pages))}

    def _check_workers(self, answering: int) -> Check:
        wanted = count(self._settings.listen.workers)
        if self._is_stopping:
            return Check(Verdict.FAILED, "stopping")
        if answering >= wanted:
            return Check(Verdict.OK)
        return Check(Verdict.DEGRADED if answering else Verdict.FAILED, f"{answering} of {wanted} serve")

    def _spawn(self, doing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _frame(settings: Settings) -> tuple[str, str, int]:
    """What the workers share and cannot change one by one."""
    return settings.listen.address, settings.ops.address, count(settings.listen.workers)


def _worst(checks: Sequence[Check]) -> Check:
    verdict = worst(check.verdict for check in checks)
    return next(check for check in checks if check.verdict is verdict)
