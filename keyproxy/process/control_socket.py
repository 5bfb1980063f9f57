"""The control socket of a process: `keyproxy health` and `keyproxy drain` connect to it.

    health   -> live
    drain    -> draining; then, after the last request has ended: drained. The connection ends with the process.

The socket also makes the process discoverable (`process_registry`). It serves only the same user and root.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from typing import Final

from keyproxy.platform import process_registry
from keyproxy.platform.process_registry import Presence
from keyproxy.platform.tasks import cancel_all
from keyproxy.process import startup_conflicts

_log = logging.getLogger(__name__)

_BACKLOG: Final = 16
_TALKS_MAX: Final = 32
_REQUEST_SECONDS: Final = 5.0
_REQUEST_BYTES_MAX: Final = 64
_PAUSE_SECONDS: Final = 0.1


class Control:
    """The control socket of this process."""

    def __init__(self, on_drain: Callable[[], None] | None = None) -> None:
        """`on_drain` is called for every request to drain; None: this process cannot be drained."""
        self._on_drain = on_drain
        self._loop = asyncio.get_running_loop()
        self._shown: Presence | None = None
        self._name = ""
        self._sock: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._talks: set[asyncio.Task[None]] = set()
        self._waiting: set[socket.socket] = set()

    @contextlib.asynccontextmanager
    async def open(self, presence: Presence) -> AsyncIterator[None]:
        """Be discoverable while the context lasts. Raises BindError on a conflict with a running process."""
        has_drained = False
        try:
            self.show(presence)
            startup_conflicts.check(presence, self._name)
            yield
            has_drained = True
        finally:
            await cancel_all([*self._talks, *filter(None, [self._accepting])])
            for sock in self._waiting:
                with sock, contextlib.suppress(OSError):  # the peer has stopped waiting
                    sock.send(process_registry.DRAINED if has_drained else b"")
            if self._sock is not None:
                self._sock.close()

    def check(self, presence: Presence) -> None:
        """Raises BindError if the new presence conflicts with a running process.

        Checks only a change of address: each of two processes that share a port may get another upstream.
        """
        if self._shown is None or (self._shown.main, self._shown.ops) != (presence.main, presence.ops):
            startup_conflicts.check(presence, self._name)

    def show(self, presence: Presence) -> None:
        """Replace the published presence."""
        if presence == self._shown:
            return
        name = presence.name()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.bind(f"\0{name}")
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            _log.warning(
                "no control socket; `keyproxy health` and `keyproxy drain` cannot find this process: %s", error
            )
            return
        before, accepting = self._sock, self._accepting
        self._sock, self._accepting = sock, self._loop.create_task(self._accept(sock))
        if accepting is not None:
            accepting.cancel()
        if before is not None:
            before.close()
        self._shown, self._name = presence, name

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(listening)
            except OSError:
                # No file descriptor is free at the moment: retry.
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            if not process_registry.is_trusted(sock) or len(self._talks) >= _TALKS_MAX:
                sock.close()
                continue
            sock.setblocking(False)
            task = self._loop.create_task(self._serve_client(sock))
            self._talks.add(task)
            task.add_done_callback(self._talks.discard)

    async def _serve_client(self, sock: socket.socket) -> None:
        keeps = False
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                request = await self._loop.sock_recv(sock, _REQUEST_BYTES_MAX)
                if request == process_registry.HEALTH:
                    await self._loop.sock_sendall(sock, process_registry.LIVE)
                elif request == process_registry.DRAIN and self._on_drain is not None:
                    self._on_drain()
                    await self._loop.sock_sendall(sock, process_registry.DRAINING)
                    keeps = len(self._waiting) < _TALKS_MAX
        except (OSError, TimeoutError):
            keeps = False  # the peer has disconnected, or sends nothing
        finally:
            if keeps:
                self._waiting.add(sock)
            else:
                sock.close()
