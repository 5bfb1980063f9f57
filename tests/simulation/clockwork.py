"""Virtual time: many event loops, one per process of the simulated fleet, and one clock that moves as they work and wait.

Each process has a loop of its own, so that it can be stopped (SIGSTOP: none of its callbacks run, its timers fire late)
and killed (SIGKILL: nothing of it ever runs again). Everything happens in one order, which the seed decides.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

_TURN_SECONDS = 1e-6


class Clock:
    """What happens when. Times are seconds since the simulation began."""

    def __init__(self) -> None:
        self.now = 0.0
        self.loops: list[VirtualLoop] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, happens: Callable[[], None]) -> None:
        """Something that happens outside of all processes."""
        heapq.heappush(self._events, (max(when, self.now), next(self._numbers), happens))

    def run(self, until: float) -> None:
        """Let time pass."""
        while True:
            busy = [loop for loop in self.loops if loop.runs and loop.has_ready]
            for loop in busy:
                if loop.runs:
                    loop.run_ready()
            # Work takes time too: who asks for the time again and again sees it pass.
            self.now += _TURN_SECONDS
            if busy:
                continue
            following = min((loop.next_at() for loop in self.loops if loop.runs), default=math.inf)
            if self._events:
                following = min(following, self._events[0][0])
            if following > until:
                self.now = max(self.now, until)
                return
            self.now = max(self.now, following)
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()


class VirtualLoop(asyncio.AbstractEventLoop):
    """The event loop of one process: as much of one as code without sockets needs."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.runs = True
        self.errors: list[dict[str, Any]] = []
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        clock.loops.append(self)

    # -- what the clock drives

    @property
    def has_ready(self) -> bool:
        """Whether there is something to do at this instant."""
        return bool(self._ready) or self.next_at() <= self._clock.now

    def next_at(self) -> float:
        """When there is something to do next."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else math.inf

    def run_ready(self) -> None:
        """Do what there is to do now, as one turn of a loop does."""
        while self.next_at() <= self._clock.now:
            self._ready.append(heapq.heappop(self._timers)[2])
        asyncio._set_running_loop(self)
        try:
            for _ in range(len(self._ready)):
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)

    # -- what asyncio asks of a loop

    def time(self) -> float:
        """See AbstractEventLoop."""
        return self._clock.now

    def get_debug(self) -> bool:
        """See AbstractEventLoop."""
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Errors that nobody handled are kept, and fail the simulation; processes that are killed leave tasks behind."""
        if self.runs and "was destroyed but it is pending" not in context["message"]:
            self.errors.append(context)

    def call_soon(
        self, callback: Callable[..., object], *args: object, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """See AbstractEventLoop."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: object, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """See AbstractEventLoop."""
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: object, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """See AbstractEventLoop."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are dropped when their time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        """See AbstractEventLoop."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **_: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        """See AbstractEventLoop."""
        return asyncio.Task(coro, loop=self)
