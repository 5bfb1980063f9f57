"""Responses that are read on for a moment after their clients have left, because only their usage is missing.

The model has finished by then, so nothing more is produced: the report states exactly what to charge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from keyproxy.ai.responses.meter import Meter

REPORTED: Final = "reported"
NOT_REPORTED: Final = "not_reported"
TIMED_OUT: Final = "timed_out"


def is_missed(meter: Meter | None) -> bool:
    """Whether nothing but the usage of a response is missing."""
    return meter is not None and meter.is_finished and not meter.is_reported


class UsageReads:
    """The reads in progress, with their timers, and how often each outcome has occurred."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.outcomes: Final[dict[str, int]] = dict.fromkeys((REPORTED, NOT_REPORTED, TIMED_OUT), 0)
        self._loop = loop
        self._reads: dict[object, tuple[Callable[[], None], asyncio.TimerHandle]] = {}

    def begin(self, exchange: object, leave: Callable[[], None], seconds: float) -> None:
        """Call `leave` after so many seconds, or when `end` is called for this exchange before that."""
        self._reads[exchange] = leave, self._loop.call_later(seconds, self.end, exchange, TIMED_OUT)

    def end(self, exchange: object, outcome: str) -> None:
        """End a read in progress."""
        begun = self._reads.pop(exchange, None)
        if begun is not None:
            leave, timer = begun
            timer.cancel()
            self.outcomes[outcome] += 1
            leave()

    def end_all(self) -> None:
        """Give up all reads: the server stops."""
        for exchange in list(self._reads):
            self.end(exchange, TIMED_OUT)
