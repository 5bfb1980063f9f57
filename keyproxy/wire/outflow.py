"""Track how much of the bytes written to a socket the peer has taken, and how fast.

The transport's buffer reveals little about a slow peer: the kernel buffers megabytes first, and accepts more only once a
third of them have drained. The peer has taken the written bytes minus those in both buffers. Over TLS this is off by the
encryption overhead, which drains like the rest.

The kernel is queried when a peer stalls, at its deadline, and now and then in between; never for each write.
"""

from __future__ import annotations

import asyncio

from keyproxy.platform import sockets
from keyproxy.wire.pace import STILL_BYTES_PER_SECOND, Pace


class Outflow:
    """The outflow of one connection. The writer increments `written_bytes`. `is_stalled`: the peer has fallen behind."""

    __slots__ = ("_pace", "_seen_bytes", "_since_check_bytes", "is_stalled", "written_bytes")

    def __init__(self) -> None:
        self.written_bytes = 0
        self.is_stalled = False
        self._pace: Pace | None = None
        self._seen_bytes = 0
        self._since_check_bytes = 0

    def stall(self, transport: asyncio.WriteTransport | None, now: float) -> None:
        """The peer does not keep up from now on."""
        self.is_stalled = True
        self._pace = Pace(now)
        self._seen_bytes = self._taken(transport)
        self._since_check_bytes = 0

    def flow(self) -> None:
        """The peer keeps up again."""
        self.is_stalled = False
        self._pace = None

    def sample(self, transport: asyncio.WriteTransport | None, now: float) -> None:
        """Note how much has been taken by now, if the peer is slow."""
        pace = self._pace
        if pace is None:
            return
        taken = self._taken(transport)
        if taken > self._seen_bytes:
            pace.add(taken - self._seen_bytes, now)
            self._since_check_bytes += taken - self._seen_bytes
            self._seen_bytes = taken

    def has_moved(self, transport: asyncio.WriteTransport | None, now: float, *, in_seconds: float) -> bool:
        """Whether the peer has made significant progress since the last check, `in_seconds` ago."""
        self.sample(transport, now)
        moved, self._since_check_bytes = self._since_check_bytes, 0
        return moved >= max(1.0, in_seconds * STILL_BYTES_PER_SECOND)

    def is_slow(self, transport: asyncio.WriteTransport | None, now: float, *, for_seconds: float) -> bool:
        """Whether the peer has been too slow to keep its connection while others wait."""
        self.sample(transport, now)
        pace = self._pace
        return pace is not None and pace.seconds(now) > for_seconds and pace.is_slow(now)

    def is_being_taken(self, transport: asyncio.WriteTransport | None, *, since_bytes: int) -> bool:
        """Whether the peer has taken some of what was written since `written_bytes` was this, and not all of it."""
        return self.is_outstanding(transport) and self._taken(transport) > since_bytes

    def is_outstanding(self, transport: asyncio.WriteTransport | None) -> bool:
        """Whether the peer has not taken everything yet."""
        return transport is not None and outstanding_bytes(transport) > 0

    def _taken(self, transport: asyncio.WriteTransport | None) -> int:
        if transport is None:
            return self._seen_bytes
        return self.written_bytes - outstanding_bytes(transport)


def outstanding_bytes(transport: asyncio.WriteTransport) -> int:
    """The bytes that the peer has not taken yet: those in the transport and in the kernel."""
    sock = transport.get_extra_info("socket")
    fd = -1 if sock is None else int(sock.fileno())
    return transport.get_write_buffer_size() + (sockets.untaken_bytes(fd) if fd >= 0 else 0)
