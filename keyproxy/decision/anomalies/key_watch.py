"""What a process remembers of a key, to detect unusual use of it: at most 4 KiB. Times are monotonic."""

from __future__ import annotations

from array import array
from typing import Final

_MINUTE_SECONDS: Final = 60.0
_MINUTES: Final = 60

#: A burst has more requests in a minute than this, and ten times as many as a minute of the hour has on average.
_BURST_MIN: Final = 60
_BURST_FACTOR: Final = 10


class Occurrences:
    """The latest `count` times of something, and whether all of them lie within `seconds`."""

    __slots__ = ("_added", "_next", "_seconds", "_times")

    def __init__(self, count: int, seconds: float) -> None:
        self._seconds = seconds
        # A ring, which takes a fifth of a deque of as many numbers.
        self._times = array("d", bytes(8 * count))
        self._next = 0
        self._added = 0

    def add(self, now: float) -> bool:
        """Add one. Whether there were `count` of them within the time; then counting starts over."""
        times = self._times
        times[self._next] = now
        self._next = (self._next + 1) % len(times)
        self._added += 1
        if self._added < len(times) or now - times[self._next] > self._seconds:
            return False
        self._added = 0
        return True


class StoredHabits:
    """The stored habits of a key of one kind: values without line ends, in a tenth of the memory of a set."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines = b"\n"

    def __contains__(self, value: bytes) -> bool:
        return b"\n%b\n" % value in self._lines

    def add(self, value: bytes, /) -> None:
        """Add one."""
        if value not in self:
            self._lines += value + b"\n"


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
    """One key, with its stored habits. `pace`: None unless bursts are watched; `count` is not yet added to it."""

    __slots__ = ("count", "models", "networks", "pace", "probes", "reported")

    def __init__(self) -> None:
        self.models = StoredHabits()
        self.networks = StoredHabits()
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
_REPORTED_MAX: Final = 8
