"""A request body that has to be whole before anything is decided about it."""

from __future__ import annotations

import asyncio
from typing import Final

from keyproxy.reasons import Reason, Refusal

#: More is not read whole: it would be memory that a client may have us hold for as long as it likes.
WHOLE_BYTES_MAX: Final = 33_554_432

#: What all of them may hold together in one process. Full: whoever sends more is told that the proxy is overloaded, and
#: what is whole already goes on.
TOGETHER_BYTES_MAX: Final = 268_435_456


class Room:
    """What bodies that are read whole take in this process."""

    def __init__(self, bytes_max: int = TOGETHER_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self.held_bytes = 0


class Collector:
    """Takes a body in pieces; `wait` ends when it is whole, or nobody wants it any more."""

    def __init__(self, room: Room, announced_bytes: int = 0, too_much: Refusal | None = None) -> None:
        """`too_much`: what is told of a body that is too large; raised if it is announced to be."""
        self._too_much = too_much or Refusal(Reason.BODY_TOO_LARGE, "a body that has to be read whole")
        if announced_bytes > WHOLE_BYTES_MAX:
            raise self._too_much
        self._content = bytearray()
        self._room = room
        self._held_bytes = 0
        self._is_over = asyncio.get_running_loop().create_future()

    def take(self, content: bytes) -> None:
        """The next piece. Raises a Refusal if it becomes too much."""
        self._content += content
        self._held_bytes += len(content)
        self._room.held_bytes += len(content)
        if self._held_bytes > WHOLE_BYTES_MAX:
            raise self._too_much
        if self._room.held_bytes > self._room.bytes_max:
            raise Refusal(Reason.OVERLOADED, f"bodies that are read whole hold {self._room.held_bytes} bytes")

    def whole(self) -> bytes:
        """The body. It takes its room until `leave`."""
        content, self._content = bytes(self._content), bytearray()
        self._end()
        return content

    def leave(self) -> None:
        """The exchange is over."""
        self._room.held_bytes -= self._held_bytes
        self._held_bytes = 0
        self._content = bytearray()
        self._end()

    async def wait(self) -> None:
        """Until `whole` or `leave` was called."""
        await self._is_over

    def _end(self) -> None:
        if not self._is_over.done():
            self._is_over.set_result(None)
