"""Timeouts for many connections at the cost of one comparison a second each.

A connection keeps its own deadline as a number and moves it by writing that number: no timer is made or cancelled on
the path of a request. It stays in one of a few slots for its life; the slots are swept in turn, so that each connection
is checked once per `period_seconds` and a sweep never blocks the loop for all of them at once. A timeout is therefore
late by at most the period, and never early.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

_log = logging.getLogger(__name__)

_SLOTS: Final = 10

NO_DEADLINE: Final = float("inf")


class Timed(Protocol):
    """Something with a deadline in monotonic seconds."""

    deadline: float

    def deadline_passed(self, now: float) -> None:
        """Called once the deadline has passed, and again on every sweep until it is moved or forgotten."""
        ...

    def abort(self) -> None:
        """Called if `deadline_passed` raised: end it immediately. Never raises."""
        ...


class Deadlines:
    """Watches the deadlines of everything that is registered."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float], *, period_seconds: float = 1.0
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._tick_seconds = period_seconds / _SLOTS
        self._slots: list[set[Timed]] = [set() for _ in range(_SLOTS)]
        self._next = 0
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start sweeping."""
        self._handle = self._loop.call_later(self._tick_seconds, self._tick)

    def stop(self) -> None:
        """Stop sweeping."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def watch(self, item: Timed) -> None:
        """Watch `item.deadline` from now on."""
        self._slot(item).add(item)

    def forget(self, item: Timed) -> None:
        """Stop watching."""
        self._slot(item).discard(item)

    def _slot(self, item: Timed) -> set[Timed]:
        return self._slots[(id(item) >> 6) % _SLOTS]

    def _tick(self) -> None:
        self._handle = self._loop.call_later(self._tick_seconds, self._tick)
        now = self._clock()
        slot, self._next = self._slots[self._next], (self._next + 1) % _SLOTS
        for item in [item for item in slot if item.deadline <= now]:
            try:
                item.deadline_passed(now)
            except Exception:  # noqa: BLE001 - the outermost boundary of one timeout: the others count too
                _log.exception("handling a timeout failed; cutting the connection")
                item.abort()
