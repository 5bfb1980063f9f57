"""What a process remembers of a key, to detect unusual use of it: at most 4 KiB. Times are monotonic."""

from __future__ import annotations

from array import array
from collections import deque
from typing import Final

_MINUTE_SECONDS: Final = 60.0
_MINUTES: Final = 60

#: A burst has more requests in a minute than this, and ten times as many as a minute of the hour has on average.
_BURST_MIN: Final = 60
_BURST_FACTOR: Final = 10


class Occurrences:
    """The latest `count` times of something, and whether all of them lie within `seconds`."""

    __slots__ = ("_count", "_seconds", "_times")

    def __init__(self, count: int, seconds: float) -> None:
        self._count = count
        self._seconds = seconds
        self._times: deque[float] = deque(maxlen=count)

    def add(self, now: float) -> bool:
        """Add one. Whether there were `count` of them within the time; then counting starts over."""
        times = self._times
        times.append(now)
        if len(times) < self._count or now - times[0] > self._seconds:
            return False
        times.clear()
        return True


class KeyPace:
    """The requests of a key by minute, for an hour."""

    __slots__ = ("_by_minute", "_hour", "_minute")

    def __init__(self, now: float) -> None:
        self._minute = int(now // _MINUTE_SECONDS)
        self._by_minute = array("I", bytes(4 * _MINUTES))
        self._hour = 0

    def add(self, count: int, now: float) -> None:
        """Count requests."""
        self._advance(now)
        self._by_minute[self._minute % _MINUTES] += count
        self._hour += count

    def burst(self, now: float) -> int:
        """The requests of the last minute if they are a burst, else 0.

        Of the minute before the current one, the share that is less than a minute ago is counted.
        """
        self._advance(now)
        current = self._by_minute[self._minute % _MINUTES]
        previous = self._by_minute[(self._minute - 1) % _MINUTES]
        if current + previous <= _BURST_MIN:
            return 0
        recent = int(current + previous * (1.0 - (now / _MINUTE_SECONDS - self._minute)))
        is_burst = recent > _BURST_MIN and recent * _MINUTES >= _BURST_FACTOR * self._hour
        return recent if is_burst else 0

    def _advance(self, now: float) -> None:
        minute = int(now // _MINUTE_SECONDS)
        for passed in range(self._minute + 1, min(minute, self._minute + _MINUTES) + 1):
            self._hour -= self._by_minute[passed % _MINUTES]
            self._by_minute[passed % _MINUTES] = 0
        self._minute = max(minute, self._minute)


class KeyWatch:
    """One key. `known`: its stored habits. `pace`: None unless bursts are watched; `count` is not yet added to it."""

    __slots__ = ("count", "known", "pace", "probes", "reported")

    def __init__(self) -> None:
        self.known: set[bytes] = set()
        self.count = 0
        self.pace: KeyPace | None = None
        self.probes: Occurrences | None = None
        #: The hour in which each signal was reported last, with its value.
        self.reported: dict[tuple[str, str], int] = {}

    def is_first(self, kind: str, value: str, hour: int) -> bool:
        """Whether a signal with this value has not been reported in this hour."""
        if self.reported.get((kind, value)) == hour:
            return False
        if len(self.reported) >= _REPORTED_MAX:
            self.reported.clear()
        self.reported[kind, value] = hour
        return True


#: Signals are few: their values are names of limits.
_REPORTED_MAX: Final = 16
