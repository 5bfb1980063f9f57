"""The supervisor's view of its workers: processes with an ops listener and a socket for orders."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Self

import orjson

from keyproxy.metrics.exposition import Catalogue
from keyproxy.metrics.fleet import Fleet
from keyproxy.platform import clock
from keyproxy.process import control_channel
from keyproxy.process.control_channel import Order, SupervisorEnd
from keyproxy.process.ops_listener import LIVE, Check, Verdict, worst
from keyproxy.process.proxy_metrics import PROXY_METRICS, SUPERVISOR_METRICS, Workers
from keyproxy.process.reload import ReloadError

_log = logging.getLogger(__name__)

_START_SECONDS: Final = 60.0

_FETCH_SECONDS: Final = 2.0

#: The maximum time for an order. Preparing a configuration may wait for a database that does not respond.
_ORDER_SECONDS: Final = 30.0


class Worker:
    """One worker process, and its last known state."""

    def __init__(self, process: asyncio.subprocess.Process, ops: bytes, supervisor_end: SupervisorEnd) -> None:
        """`ops`: the abstract name of its ops socket."""
        self.process = process
        self.started_mono = clock.monotonic()
        self.is_ready = False
        self.is_leaving = False
        self.page = ""
        self.patience_seconds = _ORDER_SECONDS
        self._ops = ops
        self._channel = supervisor_end
        self._is_lost = False

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str], begin: Order) -> Self:
        """Start a worker with its own ops listener, and the configuration and keys of this order. Raises OSError."""
        ours, theirs = socket.socketpair()
        ops = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as undo, theirs, ops:
            undo.enter_context(ours)
            ops.bind("")  # the kernel chooses a name that nothing else has
            process = await asyncio.create_subprocess_exec(
                *command,
                "--ops-fd",
                str(ops.fileno()),
                env=dict(environment),
                stdin=theirs.fileno(),
                pass_fds=(ops.fileno(),),
            )
            name: bytes = ops.getsockname()
            undo.pop_all()
        supervisor_end = await control_channel.supervisor_end(ours)
        supervisor_end.begin(begin)
        return cls(process, name, supervisor_end)

    async def fetch(self, path: str) -> bytes | None:
        """The body of a response of its ops listener, whatever its status; None if it does not respond."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(_FETCH_SECONDS):
                await asyncio.get_running_loop().sock_connect(sock, self._ops)
                return await _page(sock, path)
        except (TimeoutError, OSError):
            return None
        finally:
            sock.close()

    async def poll(self) -> None:
        """Update readiness and metrics. It serves its metrics before it accepts connections."""
        self.is_ready = self.is_ready or await self.fetch("/livez") == LIVE
        page = await self.fetch("/metrics")
        if page is not None:
            self.page = page.decode("utf-8")

    async def follows(self, order: Order) -> str:
        """Send an order. Returns the reason for a refusal, else "".

        A worker that does not respond is killed: its configuration is unknown, and its replacement has the current one.
        """
        if self._is_lost:
            return "the worker was killed"
        try:
            async with asyncio.timeout(self.patience_seconds):
                return await self._channel.send(order)
        except TimeoutError:
            why = f"timeout: worker {self.process.pid} has not responded for {self.patience_seconds:g} s"
        except (OSError, ValueError) as error:
            why = f"worker {self.process.pid} does not respond: {error}"
        _log.error("%s; killing it", why)
        self._is_lost = True
        self.send_signal(signal.SIGKILL)
        return why

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def signed_until(self) -> Mapping[str, float] | None:
        """After it has exited: until when what it has signed is valid, by `kid`. None: it has crashed."""
        return await self._channel.signed_until()

    async def closed(self) -> None:
        """Close its socket for orders."""
        await self._channel.close()


class WorkerPool:
    """The workers of one supervisor: starting, serving and stopping ones."""

    def __init__(self, restarts: Callable[[], int]) -> None:
        self.members: set[Worker] = set()
        own = Catalogue(SUPERVISOR_METRICS, lambda: Workers(self._states(), restarts()))
        self._fleet = Fleet(PROXY_METRICS, own)

    def ended(self, worker: Worker) -> None:
        """Remove a worker that has exited. Its counters are kept."""
        self.members.discard(worker)
        if worker.page:
            self._fleet.ended(worker.page)

    async def until_ready(self, workers: Iterable[Worker]) -> list[Worker]:
        """Wait until all these workers serve or have exited. Returns those that serve. Raises ReloadError on timeout."""
        workers = list(workers)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await asyncio.gather(*(self._until_settled(worker) for worker in workers))
        except TimeoutError:
            raise ReloadError(f"timeout: a worker does not serve after {_START_SECONDS:g} s") from None
        return [worker for worker in workers if worker in self.members]

    async def offer(self, text: str) -> list[Worker]:
        """Have all workers prepare a configuration; return them. If one refuses, withdraw it and raise ReloadError."""
        serving = await self.until_ready(worker for worker in self.members if not worker.is_leaving)
        refusals = await asyncio.gather(*(worker.follows(Order(control_channel.OFFER, text)) for worker in serving))
        if any(refusals):
            await self.withdraw(serving)
            raise ReloadError(next(filter(None, refusals)))
        return serving

    async def apply(self, workers: Iterable[Worker]) -> None:
        """Have these workers apply the prepared configuration."""
        await asyncio.gather(*(worker.follows(Order(control_channel.APPLY)) for worker in workers))

    async def withdraw(self, workers: Iterable[Worker]) -> None:
        """Have these workers abandon the prepared configuration."""
        await asyncio.gather(*(worker.follows(Order(control_channel.WITHDRAW)) for worker in workers))

    async def hand_out(self, keys: Sequence[str]) -> None:
        """Hand these signing keys to all workers, once they serve. Raises ReloadError if one does not start."""
        serving = await self.until_ready(worker for worker in self.members if not worker.is_leaving)
        await asyncio.gather(*(worker.follows(Order(control_channel.KEYS, keys=keys)) for worker in serving))

    async def jwks(self) -> bytes | None:
        """The key set as the first worker that has read it serves it; None if none has."""
        for worker in sorted(self.members, key=lambda worker: worker.is_leaving):
            page = await worker.fetch("/jwks.json")
            if page is not None and page.startswith(b'{"keys":'):
                return page
        return None

    async def poll(self) -> None:
        """Update readiness and metrics of all workers."""
        await asyncio.gather(*(worker.poll() for worker in self.members))

    async def metrics(self) -> bytes:
        """The combined metrics page of all workers."""
        await self.poll()
        return self._fleet.render(worker.page for worker in self.members if worker.page)

    async def checks(self, wanted: int) -> dict[str, Check]:
        """The worst result of each check, and whether the wanted number of workers serve."""
        pages = await asyncio.gather(*(worker.fetch("/readyz") for worker in self.members if not worker.is_leaving))
        by_name: dict[str, list[Check]] = {}
        for page in pages:
            for name, check in (orjson.loads(page)["checks"] if page else {}).items():
                by_name.setdefault(name, []).append(Check(Verdict(check["status"]), check.get("reason", "")))
        checks = {name: _worst(some) for name, some in by_name.items()}
        return checks | {"workers": _check_number(sum(page is not None for page in pages), wanted)}

    async def _until_settled(self, worker: Worker) -> None:
        while not worker.is_ready and worker in self.members:
            await asyncio.sleep(0.05)
            await worker.poll()

    def _states(self) -> Mapping[str, int]:
        ready = sum(worker.is_ready and not worker.is_leaving for worker in self.members)
        leaving = sum(worker.is_leaving for worker in self.members)
        return {"ready": ready, "starting": len(self.members) - ready - leaving, "leaving": leaving}


async def _page(sock: socket.socket, path: str) -> bytes | None:
    """The body of the response to a GET; None if it is truncated. Raises OSError."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, f"GET {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n".encode("ascii"))
    received = bytearray()
    while chunk := await loop.sock_recv(sock, 65_536):
        received += chunk
    head, _, content = bytes(received).partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)
    return content if length is not None and len(content) == int(length[1]) else None


def _check_number(serving: int, wanted: int) -> Check:
    if serving >= wanted:
        return Check(Verdict.OK)
    return Check(Verdict.DEGRADED if serving else Verdict.FAILED, f"{serving} of {wanted} workers serve")


def _worst(checks: Sequence[Check]) -> Check:
    verdict = worst(check.verdict for check in checks)
    return next(check for check in checks if check.verdict is verdict)
