"""Accepts connections on one bound socket, and knows those that are not open yet: TLS handshakes under way.

The loop's own server accepts whatever comes. Out of file descriptors uvloop's closes connections without a word, and
handshakes are in nobody's count, so that clients who never finish theirs would be held without a bound. Here who cannot
be taken is left in the kernel's queue, where it waits its turn, and is looked at again a little later.
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

#: Connections taken in one go, before what is open gets its turn.
_AT_ONCE: Final = 64

#: How long who cannot be taken is left in the queue before the next look.
_PAUSE_SECONDS: Final = 0.1

#: Errors that say that nothing more can be opened here.
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

Opening = Callable[[socket.socket], Coroutine[Any, Any, None]]


class Listener:
    """See the module. `exhausted` counts the times that there was no file descriptor for a connection."""

    def __init__(
        self, sock: socket.socket, loop: asyncio.AbstractEventLoop, *, open_: Opening, has_room: Callable[[], bool]
    ) -> None:
        """`open_` makes a connection of an accepted socket; `has_room` says whether one more may be begun."""
        self.exhausted = 0
        self._sock = sock
        self._loop = loop
        self._open = open_
        self._has_room = has_room
        self._opening: set[asyncio.Task[None]] = set()
        self._resuming: asyncio.TimerHandle | None = None
        self._is_exhausted = False

    def start(self) -> None:
        """Listen. Raises OSError if the address is taken by now."""
        self._sock.setblocking(False)
        self._sock.listen(_BACKLOG)
        self._resume()

    def stop(self) -> None:
        """Take who has come already, and listen no more. The socket is closed."""
        self._accept()
        if self._resuming is not None:
            self._resuming.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    async def opened(self, seconds: float) -> None:
        """Wait until who was accepted has a connection, or none comes about; for so long at most."""
        if self._opening:
            await asyncio.wait(self._opening, timeout=seconds)

    def opening(self) -> int:
        """How many accepted connections are not open yet."""
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
            _log.error("no connection can be accepted, those to come wait in the queue: %s", error.strerror)

    def _pause(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        if self._resuming is None:
            self._resuming = self._loop.call_later(_PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        self._resuming = None
        self._loop.add_reader(self._sock.fileno(), self._accept)
