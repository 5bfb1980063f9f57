"""The socket to a client: write, pause, and end in a way that shows the client whether the response is complete.

    open -> half-closed -> closing -> lost
      `---> lingering ------^

A clean end is a close, an incomplete response is a reset. After an early response, the rest of the request
is read and discarded, within bounds, so that the client can read the response: closing at once
would make the kernel reset the connection (RFC 9112 section 9.6). Many clients send all of a body before they read.

Methods that give the client time to do something return until when; the connection keeps that as its deadline.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from typing import Final

from keyproxy.wire.outflow import Outflow
from keyproxy.wire.phases import CLOSING, HALF_CLOSED, LINGERING, LOST, OPEN, SOCKET

#: How much of a request is discarded, for how long in total, and the longest silence.
_LINGER_BYTES_MAX: Final = 67_108_864
_LINGER_SECONDS: Final = 10.0
_LINGER_IDLE_SECONDS: Final = 2.0

#: SO_LINGER on, zero seconds: closing sends a reset, which no client takes for a clean end.
_RESET: Final = struct.pack("ii", 1, 0)

_GONE: Final = select.POLLHUP | select.POLLERR


class ClientTransport:
    """The socket to a client. `close_seconds`: how long a client that reads nothing may delay the close."""

    def __init__(self, close_seconds: float) -> None:
        #: See `phases`.
        self.phase: int = OPEN
        self.is_paused = False
        self.outflow = Outflow()
        self.close_seconds = close_seconds
        self._transport: asyncio.Transport | None = None
        self._lingered_bytes = 0
        self._lingers_until = 0.0

    def attach(self, transport: asyncio.Transport) -> None:
        """Use an open socket."""
        self._transport = transport

    def lose(self) -> None:
        """Handle the loss of the socket."""
        self._transport = None
        self.phase = SOCKET.step(self.phase, LOST)

    @property
    def is_open(self) -> bool:
        """Whether requests are read and responses written."""
        return self.phase <= HALF_CLOSED

    @property
    def is_stalled(self) -> bool:
        """Whether the client does not read what was sent to it."""
        return self.outflow.is_stalled

    def send(self, data: bytes) -> None:
        """Write to the client."""
        if self._transport is not None:
            self.outflow.written_bytes += len(data)
            self._transport.write(data)

    def pause(self) -> bool:
        """Pause reading. Return whether that changed anything."""
        if self._transport is None or self.is_paused:
            return False
        self.is_paused = True
        self._transport.pause_reading()
        return True

    def resume(self) -> bool:
        """Resume reading. Return whether that changed anything."""
        if self._transport is None or not self.is_paused or self.phase >= CLOSING:
            return False
        self.is_paused = False
        self._transport.resume_reading()
        return True

    def end_of_input(self) -> bool:
        """The client has closed its sending side. Return whether the socket stays open for writing.

        TLS has no half-closed connections: its transport closes regardless of this return value.
        """
        if self.phase == OPEN:
            self.phase = SOCKET.step(self.phase, HALF_CLOSED)
        return self._transport is not None and self._transport.can_write_eof()

    @property
    def unsent_bytes(self) -> int:
        """How much of what was written is still in our buffers."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def stall(self, now: float) -> None:
        """The client does not read as fast as it is sent to."""
        self.outflow.stall(self._transport, now)

    def sample(self, now: float) -> None:
        """Note how much a slow client has read."""
        self.outflow.sample(self._transport, now)

    @property
    def has_outstanding(self) -> bool:
        """Whether the client has not taken all that was sent."""
        return self.outflow.is_outstanding(self._transport)

    def reads_slowly(self, now: float, *, for_seconds: float) -> bool:
        """Whether the client has been too slow a reader to keep its connection while others wait."""
        return self.outflow.is_slow(self._transport, now, for_seconds=for_seconds)

    def is_abandoned(self) -> bool:
        """Whether a client that has closed its sending side has closed the connection entirely."""
        if self.phase != HALF_CLOSED or self._transport is None:
            return False
        sock = self._transport.get_extra_info("socket")
        if sock is None or sock.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(sock.fileno(), 0)
        return any(events & _GONE for _, events in poll.poll(0))

    def close(self, now: float) -> float:
        """Close once everything is sent. Return until when a stalled reader has time for that."""
        if self.phase < CLOSING:
            self.phase = SOCKET.step(self.phase, CLOSING)
        transport = self._transport
        if transport is not None:
            if self.unsent_bytes and not self.outflow.is_stalled:
                self.outflow.stall(transport, now)
            transport.close()
        return now + self.close_seconds

    def abort(self) -> None:
        """Cut the connection visibly: a reset, never a clean end after a partial response."""
        if self.phase < CLOSING:
            self.phase = SOCKET.step(self.phase, CLOSING)
        if self._transport is not None:
            sock = self._transport.get_extra_info("socket")
            if sock is not None and sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()

    def finish(self, now: float, *, lingers: bool, ends_response: bool) -> float:
        """Close. `lingers`: the client may still be sending; `ends_response`: the close marks its end.

        Return until when the client has time to do its part.
        """
        transport = self._transport
        # TLS cannot: there the client closes once it has read the response.
        can_end = transport is not None and transport.can_write_eof()
        if transport is None or not lingers or self.phase == HALF_CLOSED or (ends_response and not can_end):
            return self.close(now)
        self.phase = SOCKET.step(self.phase, LINGERING)
        self.resume()
        if can_end:
            transport.write_eof()
        self._lingers_until = now + _LINGER_SECONDS
        return now + _LINGER_IDLE_SECONDS

    def discard(self, data: bytes, now: float) -> float:
        """Discard bytes that arrive while lingering. Return until when the next ones have time."""
        self._lingered_bytes += len(data)
        if self._lingered_bytes > _LINGER_BYTES_MAX:
            return self.close(now)
        return min(self._lingers_until, now + _LINGER_IDLE_SECONDS)

    def has_kept_reading(self, now: float) -> bool:
        """At a deadline: return whether the client is still reading, and so has more time."""
        outflow, transport = self.outflow, self._transport
        if not self.is_open and not outflow.is_outstanding(transport):
            return False
        if not outflow.is_stalled:
            if self.is_open:
                return False
            # A reset now would discard the rest of a response in the kernel's buffer.
            outflow.stall(transport, now)
            return True
        return outflow.has_moved(transport, now, in_seconds=self.close_seconds)

    def __repr__(self) -> str:
        return f"<ClientTransport {SOCKET.names[self.phase]}>"
