"""A request body that is needed for the decision, and the buffer memory that such bodies share.

    collected -> read -> written upstream: its memory is free again

The memory is per process, and one user's bodies take at most a quarter of it, however many connections the user opens.
The inflated content of a compressed body counts until the body is ready to be forwarded. A body has to keep arriving at
a minimum pace over the last seconds; the minimum is higher while more than half of the memory is taken.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from keyproxy.ai.requests.inflation import ContentMemory
from keyproxy.config.token_settings import USER_SHARE, Tokens
from keyproxy.ports.exchange import Exchange
from keyproxy.reasons import LimitReason, Reason, Refusal

#: A body has to arrive at the configured pace over the last `PACE_SECONDS`; at this one while more than half of the
#: memory is taken.
PACE_SECONDS: Final = 10.0
SHORT_PACE_BYTES_PER_SECOND: Final = 65_536

#: The owner of the body.
BodyOwner = tuple[str, str]


def owner_of(exchange: Exchange) -> BodyOwner:
    """The owner of the body of an exchange, whose key is known."""
    identity = exchange.identity
    assert identity is not None  # noqa: S101 - for the type checker: no body is read before its key is known
    return identity.tenant_id, identity.user_id


class BodyMemory:
    """The memory taken by buffered bodies in this process, and the bounds of one body."""

    def __init__(self, tokens: Tokens) -> None:
        self.bytes_max = 0
        self.body_bytes_max = 0
        self.rate_min = 0
        self.held_bytes = 0
        self._held: dict[BodyOwner, int] = {}
        self.configure(tokens)

    def configure(self, tokens: Tokens) -> None:
        """Use other bounds from the next body on."""
        self.bytes_max, self.body_bytes_max = tokens.body_memory_max, tokens.body_bytes_max
        self.rate_min = tokens.body_rate_min

    @property
    def is_short(self) -> bool:
        """Whether more than half of it is taken."""
        return 2 * self.held_bytes > self.bytes_max

    def take(self, owner: BodyOwner, count: int, *, own_bytes: int = 0) -> None:
        """Take memory.

        `own_bytes`: what the same request has taken before. A user's only body is always within the share: compressed
        and inflated it may exceed the share, but would exceed it in every retry too.

        Raises a Refusal, taking nothing: CONCURRENCY_LIMITED if it exceeds the user's share, OVERLOADED if there is none.
        """
        held = self._held.get(owner, 0) + count
        if held * USER_SHARE > self.bytes_max and held - count > own_bytes:
            raise Refusal(
                Reason.CONCURRENCY_LIMITED,
                f"this user's buffered bodies would hold {held} bytes",
                caller_text="The bodies of the user's requests take too much memory at the same time.",
                limit_reason=LimitReason.BODY_MEMORY,
            )
        if self.held_bytes + count > self.bytes_max:
            raise Refusal(Reason.OVERLOADED, f"buffered bodies hold {self.held_bytes} bytes")
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
        self._bytes_max = room.body_bytes_max
        self._owner = owner
        self._held_bytes = 0
        self._arrived: deque[tuple[float, int]] = deque([(started_mono, 0)])
        self._is_over = asyncio.get_running_loop().create_future()

    def begin(self, announced_bytes: int, content: bytes, bytes_max: int | None = None) -> None:
        """Begin with what has arrived. Raises a Refusal if the announced length is too large.

        `bytes_max`: the largest body; None: the configured bound.
        """
        if bytes_max is not None:
            self._bytes_max = bytes_max
        if announced_bytes > self._bytes_max:
            raise self._too_much
        self.take(content)

    def take(self, content: bytes) -> None:
        """Add the next piece. Raises a Refusal if the body becomes too large."""
        if self._held_bytes + len(content) > self._bytes_max:
            raise self._too_much
        self._room.take(self._owner, len(content), own_bytes=self._held_bytes)
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
        since, before = arrived[0]
        seconds = now - since
        pace = SHORT_PACE_BYTES_PER_SECOND if self._room.is_short else self._room.rate_min
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

    @property
    def held_bytes(self) -> int:
        """The memory that the body takes."""
        return self._held_bytes

    async def wait(self) -> None:
        """Wait until `whole` or `leave` was called."""
        await self._is_over

    def _end(self) -> None:
        if not self._is_over.done():
            self._is_over.set_result(None)


class InflatedContent(ContentMemory):
    """The memory of a request's inflated content, beside that of the body as it was sent."""

    def __init__(self, room: BodyMemory, owner: BodyOwner, sent: BodyBuffer | None) -> None:
        self._room: Final = room
        self._owner: Final = owner
        self._sent: Final = sent
        self._held_bytes = 0

    def hold(self, count: int) -> None:
        """See ContentMemory. The user's share and the whole memory refuse as they do for a body that arrives."""
        more = count - self._held_bytes
        if more > 0:
            sent_bytes = 0 if self._sent is None else self._sent.held_bytes
            self._room.take(self._owner, more, own_bytes=sent_bytes + self._held_bytes)
        elif more < 0:
            self._room.give_back(self._owner, -more)
        self._held_bytes = count
