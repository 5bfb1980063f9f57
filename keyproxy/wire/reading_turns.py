"""Schedule the reading of long bodies: one portion at a time, users taking turns.

Reading a dense body takes a second or two of processor time in all, and a user may have hundreds of them at once. A
single queue would serve each of them as often as the only body of another user. So every user has a queue, and each
portion goes to the next user: with n users, one portion in n goes to each of them, whatever the others have sent.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from typing import Final

from keyproxy.wire.body_buffer import BodyOwner


class ReadingTurns:
    """One turn at a time. `enter` waits for it, `leave` passes it on."""

    def __init__(self) -> None:
        #: The owner of the body that has the turn.
        self._user: BodyOwner | None = None
        #: Users with waiting bodies, the next user first; within a user the body that has waited longest is first.
        self._waiting: Final[collections.OrderedDict[BodyOwner, collections.deque[asyncio.Future[None]]]] = (
            collections.OrderedDict()
        )

    async def work(self, user: BodyOwner, advance: Callable[[], bool]) -> None:
        """Call `advance` until it returns True, with other work between two calls."""
        is_done = False
        while not is_done:
            await self.enter(user)
            try:
                is_done = advance()
                if not is_done:
                    # Keep the turn until all other work has run once.
                    await asyncio.sleep(0)
            finally:
                self.leave()

    async def enter(self, user: BodyOwner) -> None:
        """Wait for the turn. Every `enter` that returns needs its `leave`."""
        if self._user is None:
            self._user = user
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(user, collections.deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """Pass the turn to the next user; all others have theirs before this user's next one."""
        waiting, last = self._waiting, self._user
        if last is not None and last in waiting:
            waiting.move_to_end(last)
        while waiting:
            user = next(iter(waiting))
            queue = waiting[user]
            turn = queue.popleft()
            if not queue:
                del waiting[user]
            if not turn.done():
                self._user = user
                turn.set_result(None)
                return
        self._user = None

    def __repr__(self) -> str:
        waiting = sum(len(queue) for queue in self._waiting.values())
        return f"<ReadingTurns of {len(self._waiting)} users, {waiting} waiting>"
