"""Write a request to the upstream, track what the upstream has taken, and hold bytes back for a moment.

An upstream may respond before it has the whole request, and close. Further writes then cause a reset, after which a
part of the response may be lost. So arrived bytes are read before more is written; until then unwritten bytes are held
here. After a failed write, the bytes that the upstream had sent are still read from the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import ssl
from collections.abc import Iterator
from typing import Final

from keyproxy.wire.handshake import TlsObject
from keyproxy.wire.outflow import Outflow
from keyproxy.wire.pace import Pace

#: How much is held back while a response is being read. Beyond that the client is not read any further.
KEPT_BYTES_MAX: Final = 65_536

_CONTENT_TOO_LARGE: Final = 413

#: A request up to this size reaches the upstream's kernel as a whole. For a longer one, our kernel is queried.
_SHORT_BYTES: Final = 4_096

#: How much of a response is read after the upstream has reset the connection.
_LEFT_READ_BYTES: Final = 65_536
_LEFT_READS_MAX: Final = 16


class RequestWriter:
    """Writes requests to one upstream connection; `begin` starts the next one.

    `is_whole`: nothing more of the request will come. `is_refused`: the upstream will not read the rest of it.
    `body_pace`: how fast the client sends a body that did not come with its head.
    """

    def __init__(self) -> None:
        self.outflow = Outflow()
        self.is_whole = False
        self.is_refused = False
        self.body_pace: Pace | None = None
        self._transport: asyncio.Transport | None = None
        self._tls: ssl.SSLObject | None = None
        self._kept = b""
        self._begun_at_bytes = 0
        #: Of the socket below TLS, which the event loop closes when a write fails.
        self._duplicate = -1

    def attach(self, transport: asyncio.Transport, tls: ssl.SSLObject | None) -> None:
        """Use an open connection."""
        self._transport, self._tls = transport, tls

    def detach(self) -> None:
        """Handle the loss of the connection."""
        self._transport = None
        self._kept = b""
        self._forget_duplicate()

    def begin(self, data: bytes, now: float, *, is_last: bool) -> None:
        """Write the first bytes of a request."""
        self.is_refused = False
        self.is_whole = is_last
        self.body_pace = None
        self._begun_at_bytes = self.outflow.written_bytes
        if self._tls is not None and (not is_last or len(data) > KEPT_BYTES_MAX):
            with contextlib.suppress(OSError):
                self._duplicate = os.dup(self.fileno())
        self._put(data)
        if not is_last:
            self.body_pace = Pace(now)
            self.body_pace.add(len(data), now)

    def count(self, data: bytes, now: float, *, is_last: bool) -> None:
        """Count more bytes of the request from the client."""
        self.is_whole = is_last
        if self.body_pace is not None:
            self.body_pace.add(len(data), now)

    def write(self, data: bytes) -> None:
        """Write more of a request, unless the upstream will not read it."""
        if not self.is_refused:
            self._put(data)

    def keep(self, data: bytes) -> bool:
        """Hold bytes back until the caller has read what has arrived. Return whether these are the first ones."""
        is_first = not self._kept
        self._kept += data
        return is_first

    def write_kept(self) -> None:
        """Write what was held back."""
        kept, self._kept = self._kept, b""
        self.write(kept)

    def drop_kept(self) -> None:
        """Discard what was held back."""
        self._kept = b""

    def end(self) -> bool:
        """End the request. Return whether all of it has left our buffers."""
        is_written, self._kept = not self._kept, b""
        if self._duplicate >= 0:
            self._forget_duplicate()
        if self.outflow.is_stalled:
            self.outflow.flow()
            is_written = is_written and self._transport is not None and not self._transport.get_write_buffer_size()
        return is_written

    def restart_pace(self, now: float) -> None:
        """Restart the pace: the client was not read for a while, so its earlier pace is not meaningful."""
        if self.body_pace is not None:
            self.body_pace = Pace(now)

    @property
    def kept_bytes(self) -> int:
        """The number of bytes held back."""
        return len(self._kept)

    @property
    def is_full(self) -> bool:
        """Whether the upstream does not read as fast as the request is written."""
        return self.outflow.is_stalled or bool(self._kept)

    def leaves_unread(self, status: int) -> bool:
        """Whether an upstream that responds with this status now has perhaps not read the whole request.

        Many servers then close without announcing it, even after a response that keeps the connection alive: RFC 9110
        section 15.5.14 for 413. A request that is not idempotent could not be retried after that.
        """
        if status == _CONTENT_TOO_LARGE or not self.is_whole or self._kept:
            return True
        is_short = self.outflow.written_bytes - self._begun_at_bytes <= _SHORT_BYTES
        return not is_short and self.outflow.is_outstanding(self._transport)

    def has_arrived(self) -> bool:
        """Whether there is something to read: bytes, or the end of the connection."""
        fileno = self.fileno()
        if fileno < 0:
            return True
        poll = select.poll()
        poll.register(fileno, select.POLLIN)
        return bool(poll.poll(0))

    def left_to_read(self) -> Iterator[bytes]:
        """The bytes that the upstream had sent before writing to it failed.

        The socket is open until the event loop has reported the loss; below TLS it is closed by then, and its duplicate
        is open.
        """
        tls = self._tls
        fileno = self.fileno() if tls is None else self._duplicate
        if fileno < 0:
            return
        for _ in range(_LEFT_READS_MAX):
            try:
                data = os.read(fileno, _LEFT_READ_BYTES)
            except OSError:
                return
            if not data:
                return
            if isinstance(tls, TlsObject):
                data = tls.decrypt(data)
            if data:
                yield data

    def goes_on(self, now: float, seconds: float, *, waits_for_response: bool) -> bool:
        """At a deadline, `seconds` after the last one: whether the upstream is still reading."""
        outflow, transport = self.outflow, self._transport
        if outflow.is_stalled:
            return outflow.has_moved(transport, now, in_seconds=seconds)
        # The request has left our buffers, but megabytes of it may be in the kernel's buffers.
        goes_on = waits_for_response and outflow.is_being_taken(transport, since_bytes=self._begun_at_bytes)
        if goes_on:
            outflow.stall(transport, now)
        return goes_on

    def fileno(self) -> int:
        """The socket's file descriptor, -1 if closed."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        return -1 if sock is None else int(sock.fileno())

    def _put(self, data: bytes) -> None:
        if self._transport is not None:
            self.outflow.written_bytes += len(data)
            self._transport.write(data)

    def _forget_duplicate(self) -> None:
        if self._duplicate >= 0:
            os.close(self._duplicate)
            self._duplicate = -1
