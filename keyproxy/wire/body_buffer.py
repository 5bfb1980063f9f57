"""A request body that is needed for the decision, and the buffer memory that such bodies share.

    collected -> read -> written upstream: its memory is free again

The memory is per process. A user's bodies may take at most as much of it as they leave free: one user at most half, two
at most a third each. So however many connections a few users open, there is memory for the next user. A body has to
keep arriving at a minimum pace over the last seconds; the minimum is higher while more than half of the memory is
taken.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from keyproxy.reasons import Reason, Refusal

#: A larger body is not buffered: a client could occupy the memory for as long as it likes.
WHOLE_BYTES_MAX: Final = 33_554_432

#: The size of the buffer memory in one process.
TOGETHER_BYTES_MAX: Final = 268_435_456

#: A body has to arrive at this pace over the last `PACE_SECONDS`; at the higher one while more than half of the memory
#: is taken.
PACE_SECONDS: Final = 10.0
PACE_BYTES_PER_SECOND: Final = 8_192
SHORT_PACE_BYTES_PER_SECOND: Final = 65_536

#: A smaller body takes hardly any memory: it only has to arrive within this time.
SMALL_BYTES: Final = 65_536
SMALL_SECONDS: Final = 120.0

#: The owner of the body.
BodyOwner = tuple[str, str]


class BodyMemory:
    """The memory taken by buffered bodies in this process."""

    def __init__(self, bytes_max: int = TOGETHER_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self.held_bytes = 0
        self._held: dict[BodyOwner, int] = {}

    @property
    def is_short(self) -> bool:
        """Whether more than half of it is taken."""
        return 2 * self.held_bytes > self.bytes_max

    def take(self, owner: BodyOwner, count: int) -> None:
        """Take memory. Raises a Refusal (OVERLOADED), taking nothing, if it exceeds the user's share."""
        held = self._held.get(owner, 0) + count
        if held + self.held_bytes + count > self.bytes_max:
            raise Refusal(
                Reason.OVERLOADED,
                f"buffered bodies hold {self.held_bytes} bytes, and this user's would hold {held} of them",
            )
        self._held[owner] = held
        self.held_bytes += count

    def give_back(self, owner: BodyOwner, count: int) -> None:
        """Return memory that `owner` has taken."""
        self.held_bytes -= count
        left = self._held.get(owner, 0) - count
        if left > 0:
            self._held[owner] = left
        else:
            self._held.pop(owner, None)


class BodyBuffer:
    """Collects a body in pieces; `wait` returns when it is complete, or the exchange is over."""

    def __init__(
        self, room: BodyMemory, owner: BodyOwner, started_mono: float, too_much: Refusal | None = None
    ) -> None:
        """`too_much`: the refusal of a body that is too large."""
        self._too_much = too_much or Refusal(Reason.BODY_TOO_LARGE, "a body that has to be read whole")
        self._content = bytearray()
        self._room = room
        self._owner = owner
        self._held_bytes = 0
        self._started_mono = started_mono
        self._arrived: deque[tuple[float, int]] = deque([(started_mono, 0)])
        self._is_over = asyncio.get_running_loop().create_future()

    def expect(self, announced_bytes: int) -> None:
        """Raise a Refusal if the announced length is too large."""
        if announced_bytes > WHOLE_BYTES_MAX:
            raise self._too_much

    def take(self, content: bytes) -> None:
        """Add the next piece. Raises a Refusal if the body becomes too large."""
        if self._held_bytes + len(content) > WHOLE_BYTES_MAX:
            raise self._too_much
        self._room.take(self._owner, len(content))
        self._content += content
        self._held_bytes += len(content)

    def is_slow(self, now: float) -> bool:
        """Whether the body is arriving too slowly. Call this about every half second."""
        if self._is_over.done():
            return False
        arrived = self._arrived
        arrived.append((now, self._held_bytes))
        while len(arrived) > 1 and arrived[1][0] <= now - PACE_SECONDS:
            arrived.popleft()
        if self._held_bytes < SMALL_BYTES:
            return now - self._started_mono > SMALL_SECONDS
        since, before = arrived[0]
        seconds = now - since
        pace = SHORT_PACE_BYTES_PER_SECOND if self._room.is_short else PACE_BYTES_PER_SECOND
        return seconds >= PACE_SECONDS and self._held_bytes - before < pace * seconds

    def whole(self) -> bytes:
        """Return the body. Its memory stays taken until `leave`."""
        content, self._content = bytes(self._content), bytearray()
        self._end()
        return content

    def leave(self) -> None:
        """Release the body: it was passed upstream, or the exchange is over."""
        if self._held_bytes:
            self._room.give_back(self._owner, self._held_bytes)
            self._held_bytes = 0
        self._content = bytearray()
        self._end()

    async def wait(self) -> None:
        """Wait until `whole` or `leave` was called."""
        await self._is_over

    def _end(self) -> None:
        if not self._is_over.done():
            self._is_over.set_result(None)
