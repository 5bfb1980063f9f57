"""Measure throughput over the last seconds. Pure: `now` is an argument.

An average since the start hides a peer that sends much at first and then hardly anything. So the bytes are counted in
slots of one second, and slots older than `WINDOW_SECONDS` are dropped.
"""

from __future__ import annotations

from typing import Final

#: The length of "the last seconds".
WINDOW_SECONDS: Final = 5

#: A slower peer loses its upstream connection when others wait.
SLOW_BYTES_PER_SECOND: Final = 1024

#: A peer that takes less than this over its idle timeout counts as stalled: single bytes must not keep a connection
#: open indefinitely.
STILL_BYTES_PER_SECOND: Final = 32


class Pace:
    """Bytes per second over the last `WINDOW_SECONDS`, or since the start if that is less."""

    __slots__ = ("_slot", "_slots", "_started", "_whole")

    def __init__(self, now: float) -> None:
        self._started = now
        self._slot = 0
        self._slots = [0] * WINDOW_SECONDS
        self._whole = 0

    def add(self, amount: int, now: float) -> None:
        """Count bytes that have moved just now. A clock that goes back counts as one that stands still."""
        self._forget(now)
        self._slots[self._slot % WINDOW_SECONDS] += amount
        self._whole += amount

    def per_second(self, now: float) -> float:
        """Return the pace. Less than a second after the start, the bytes so far count for a whole second."""
        self._forget(now)
        seconds = now - self._started
        covered = WINDOW_SECONDS - 1 + max(0.0, seconds - self._slot)
        return self._whole / max(1.0, min(seconds, covered))

    def seconds(self, now: float) -> float:
        """Since the start."""
        return now - self._started

    def is_slow(self, now: float) -> bool:
        """Whether it is too slow to be kept while others wait."""
        return self.per_second(now) < SLOW_BYTES_PER_SECOND

    def _forget(self, now: float) -> None:
        slot = int(now - self._started)
        if slot <= self._slot:
            return
        slots = self._slots
        # The slots between the last one and this one take the places of those that are now too old.
        for passed in range(max(self._slot, slot - WINDOW_SECONDS) + 1, slot + 1):
            self._whole -= slots[passed % WINDOW_SECONDS]
            slots[passed % WINDOW_SECONDS] = 0
        self._slot = slot
