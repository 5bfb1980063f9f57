"""The socket to a client: write, pause, and end in a way that shows the client whether the response is complete.

    open -> lingering -> closing

A clean end is a close, an incomplete response is a reset. After an early response, the rest of the request
is read and discarded, within bounds, so that the client can read the response: closing at once
would make the kernel reset the connection (RFC 9112 section 9.6). Many clients send all of a body before they read.
"""

from __future__ import annotations

import asyncio
import enum
import select
import socket
import struct
from collections.abc import Callable
from typing import Final

from keyproxy.http.headers import Forwarding
from keyproxy.wire.deadlines import NO_DEADLINE
from keyproxy.wire.outflow import Outflow

#: How much of a request is discarded, for how long in total, and the longest silence.
_LINGER_BYTES_MAX: Final = 67_108_864
_LINGER_SECONDS: Final = 10.0
_LINGER_IDLE_SECONDS: Final = 2.0

#: SO_LINGER on, zero seconds: closing sends a reset, which no client takes for a clean end.
_RESET: Final = struct.pack("ii", 1, 0)

_GONE: Final = select.POLLHUP | select.POLLERR


class State(enum.Enum):
    """The state of a client connection."""

    OPEN = enum.auto()
    LINGERING = enum.auto()
    CLOSING = enum.auto()


#: Looking up an enum member on its class costs more than the comparison.
OPEN: Final = State.OPEN


class ClientTransport(asyncio.Protocol):
    """The socket to a client. `close_seconds`: how long a client that reads nothing may delay the close."""

    forwarding: Forwarding

    def __init__(self, clock: Callable[[], float], close_seconds: float) -> None:
        self.deadline = NO_DEADLINE
        self._clock = clock
        self._close_seconds = close_seconds
        self._transport: asyncio.Transport | None = None
        self._outflow = Outflow()
        self._state = State.OPEN
        self._is_paused = False
        self._has_ended = False
        self._lingered_bytes = 0
        self._lingers_until = 0.0

    def deadline_passed(self, now: float) -> None:
        """See `deadlines`."""
        raise NotImplementedError

    # -- called by the exchange

    @property
    def is_stalled(self) -> bool:
        """Whether the client does not read what was sent to it."""
        raise NotImplementedError

    def enter_tunnel(self) -> None:
        """From now on bytes are relayed unchanged."""
        raise NotImplementedError

    def exchange_over(self, now: float, *, closes: bool, is_cut: bool) -> None:
        """The response was written or abandoned."""
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """Write to the client."""
        if self._transport is not None:
            self._outflow.written_bytes += len(data)
            self._transport.write(data)

    def pause(self) -> None:
        """Pause reading."""
        if self._transport is not None and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
            self._watch()

    def resume(self) -> None:
        """Resume reading."""
        if self._transport is not None and self._is_paused and self._state is not State.CLOSING:
            self._is_paused = False
            self._transport.resume_reading()
            self._watch()

    def close(self) -> None:
        """Close once everything is sent, within the time that a stalled reader gets."""
        self._state = State.CLOSING
        transport = self._transport
        if transport is not None:
            now = self._clock()
            self.deadline = now + self._close_seconds
            if self._unsent() and not self._outflow.is_stalled:
                self._outflow.stall(transport, now)
            transport.close()

    def abort(self) -> None:
        """Cut the connection visibly: a reset, never a clean end after a partial response."""
        self._state = State.CLOSING
        if self._transport is not None:
            sock = self._transport.get_extra_info("socket")
            if sock is not None and sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()

    def reads_slowly(self, now: float, *, for_seconds: float) -> bool:
        """Whether the client has been too slow a reader to keep its connection while others wait."""
        return self._outflow.is_slow(self._transport, now, for_seconds=for_seconds)

    def is_gone(self) -> bool:
        """Whether a client that has closed its sending side has closed the connection entirely."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        if sock is None or sock.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(sock.fileno(), 0)
        return any(events & _GONE for _, events in poll.poll(0))

    def _finish(self, *, lingers: bool, ends_answer: bool) -> None:
        """Close. `lingers`: the client may still be sending; `ends_answer`: the close marks the end of the response."""
        transport = self._transport
        if transport is None:
            return
        can_end = transport.can_write_eof()  # TLS cannot: there the client closes once it has read the response
        if not lingers or self._has_ended or (ends_answer and not can_end):
            self.close()
            return
        self._state = State.LINGERING
        self.resume()
        if can_end:
            transport.write_eof()
        now = self._clock()
        self._lingers_until = now + _LINGER_SECONDS
        self.deadline = now + _LINGER_IDLE_SECONDS

    def _throw_away(self, data: bytes) -> None:
        """Discard bytes that arrive while lingering."""
        self._lingered_bytes += len(data)
        if self._lingered_bytes > _LINGER_BYTES_MAX:
            self.close()
        else:
            self.deadline = min(self._lingers_until, self._clock() + _LINGER_IDLE_SECONDS)

    def _unsent(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def _goes_on_reading(self, now: float) -> bool:
        """At a deadline: return whether the client is still reading. If so, extend the deadline."""
        outflow, transport = self._outflow, self._transport
        if self._state is not OPEN and not outflow.is_outstanding(transport):
            return False
        if not outflow.is_stalled:
            if self._state is OPEN:
                return False
            # A reset now would discard the rest of a response in the kernel's buffer.
            outflow.stall(transport, now)
        elif not outflow.has_moved(transport, now, in_seconds=self._close_seconds):
            return False
        self.deadline = now + self._close_seconds
        return True

    def _watch(self) -> None:
        """Set the deadline for what the client has to do next."""
        raise NotImplementedError
