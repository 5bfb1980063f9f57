"""Virtual time: one event loop for each simulated process, and one clock that advances as they work and wait.

Each process has its own loop, so that it can be stopped (SIGSTOP: none of its callbacks run, its timers fire late) and
killed (SIGKILL: none of its callbacks ever runs again). Everything happens in one order, which the seed determines.
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
    """The schedule of events. Times are seconds since the start of the simulation."""

    def __init__(self) -> None:
        self.now = 0.0
        self.loops: list[VirtualLoop] = []
        #: When loops may have something to do: never later than they have, so that idle ones cost nothing.
        self._agenda: list[tuple[float, int]] = []
        self._stopped: set[int] = set()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, happens: Callable[[], None]) -> None:
        """Schedule an event outside of all processes."""
        heapq.heappush(self._events, (max(when, self.now), next(self._numbers), happens))

    def run(self, until: float) -> None:
        """Advance to a time, and run everything that is due."""
        while True:
            busy = self._busy()
            for loop in busy:
                if loop.runs:
                    loop.run_ready()
                else:
                    self._stopped.add(loop.place)
            # Work takes time too: code that polls the clock sees it advance.
            self.now += _TURN_SECONDS
            if busy:
                continue
            following = self._next_at()
            if self._events:
                following = min(following, self._events[0][0])
            if following > until:
                self.now = max(self.now, until)
                return
            self.now = max(self.now, following)
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()

    def note(self, loop: VirtualLoop, when: float) -> None:
        """A loop has something to do at this time."""
        heapq.heappush(self._agenda, (when, loop.place))

    def _busy(self) -> list[VirtualLoop]:
        """The loops that have something to do now, in their order. The stopped ones are kept for later."""
        places = {place for place in self._stopped if self.loops[place].runs}
        self._stopped -= places
        for place in places:
            self.note(self.loops[place], self.loops[place].next_at())
        while self._agenda and self._agenda[0][0] <= self.now:
            _, place = heapq.heappop(self._agenda)
            (places if self.loops[place].runs else self._stopped).add(place)
        return [self.loops[place] for place in sorted(places) if self.loops[place].has_ready]

    def _next_at(self) -> float:
        """When the first loop has something to do."""
        while self._agenda:
            when, place = self._agenda[0]
            loop = self.loops[place]
            if loop.runs and (loop.has_ready or loop.next_at() <= when):
                return when
            heapq.heappop(self._agenda)
            if not loop.runs:
                self._stopped.add(place)
        return math.inf


class VirtualLoop(asyncio.AbstractEventLoop):
    """The event loop of one process: the part that code without sockets needs."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.runs = True
        self.errors: list[dict[str, Any]] = []
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self.place = len(clock.loops)
        clock.loops.append(self)

    # -- driven by the clock

    @property
    def has_ready(self) -> bool:
        """Whether a callback is due now."""
        return bool(self._ready) or self.next_at() <= self._clock.now

    def next_at(self) -> float:
        """The time of the next timer."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else math.inf

    def run_ready(self) -> None:
        """Run the callbacks that are due, as one iteration of a loop does."""
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

    # -- the interface that asyncio uses

    def time(self) -> float:
        return self._clock.now

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Record unhandled errors, which fail the simulation. Pending tasks of killed processes are no errors."""
        if self.runs and "was destroyed but it is pending" not in context["message"]:
            self.errors.append(context)

    def call_soon(
        self, callback: Callable[..., object], *args: object, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        self._clock.note(self, self._clock.now)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: object, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: object, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        self._clock.note(self, when)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: cancelled timers are dropped when they are due."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **_: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        return asyncio.Task(coro, loop=self)
