"""Accept connections on one bound socket, and track those that are not open yet: TLS handshakes in progress.

The loop's own server accepts every connection. Out of file descriptors, uvloop's server closes connections silently,
and it does not count handshakes, so clients that never finish theirs would accumulate without a bound. This listener
leaves a connection that it cannot accept in the kernel's queue, and retries a little later.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Final

_log = logging.getLogger(__name__)

_BACKLOG: Final = 4096

#: Connections accepted in one go, before open connections are served.
_AT_ONCE: Final = 64

#: The delay before the next attempt to accept.
_PAUSE_SECONDS: Final = 0.1

#: Errors for exhausted resources: no further socket can be opened.
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

Opening = Callable[[socket.socket], Coroutine[Any, Any, None]]


class SocketListener:
    """Accepts connections on one socket. `exhausted` counts failures for lack of a file descriptor."""

    def __init__(
        self, sock: socket.socket, loop: asyncio.AbstractEventLoop, *, open_: Opening, has_room: Callable[[], bool]
    ) -> None:
        """`open_` makes a connection of an accepted socket; `has_room`: whether another may be accepted."""
        self.exhausted = 0
        self._sock = sock
        self._loop = loop
        self._open = open_
        self._has_room = has_room
        self._opening: set[asyncio.Task[None]] = set()
        self._resuming: asyncio.TimerHandle | None = None
        self._is_exhausted = False

    def start(self) -> None:
        """Listen. Raises OSError if the address is in use by now."""
        self._sock.setblocking(False)
        self._sock.listen(_BACKLOG)
        self._resume()

    def stop(self) -> None:
        """Accept the connections in the queue, then stop listening. The socket is closed."""
        self._accept()
        if self._resuming is not None:
            self._resuming.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    async def opened(self, seconds: float) -> None:
        """Wait until all accepted connections are open or have failed, at most this long."""
        if self._opening:
            await asyncio.wait(self._opening, timeout=seconds)

    def opening(self) -> int:
        """The number of accepted connections that are not open yet."""
        return len(self._opening)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._has_room():
                self._pause()
                return
            try:
                sock, _address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._note_exhaustion(error)
                self._pause()
                return
            self._is_exhausted = False
            sock.setblocking(False)
            task = self._loop.create_task(self._open(sock))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    def _note_exhaustion(self, error: OSError) -> None:
        self.exhausted += 1
        if not self._is_exhausted:
            self._is_exhausted = True
            _log.error("cannot accept connections, new ones wait in the queue: %s", error.strerror)

    def _pause(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        if self._resuming is None:
            self._resuming = self._loop.call_later(_PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        self._resuming = None
        self._loop.add_reader(self._sock.fileno(), self._accept)
