"""How often a process reports its leases: the more of them it has, the less often each.

A report costs 10 to 20 µs of the process's CPU and 100 of the ledger's. With 1,000 active users, each with limits of its
key and of itself, a process has 4,000 to 12,000 leases; to report all of them every half second costs more than their
requests. So a process sends about `LINES_PER_SECOND` reports, and at most `PAUSE_SECONDS_MAX` pass between two of one
lease. Requests that wait for units, leases that run low, and recalls are never delayed.
"""

from __future__ import annotations

import math
from typing import Final

from keyproxy.limits.ledger_protocol import RATES, Window

#: How many reports a process sends per second, as long as no lease waits longer than the longest pause.
LINES_PER_SECOND: Final = 500.0

#: The longest pause between two reports of a lease.
PAUSE_SECONDS_MAX: Final = 10.0

#: For a window of a minute: a slice of two pauses is then no more than what it uses in four seconds.
_MINUTE_PAUSE_SECONDS_MAX: Final = 2.0

#: The part of what a window has left that a slice may have in order to last for two pauses: others need units too, and a
#: process that dies is charged for what it has.
_SLICE_SHARE: Final = 32

#: Makes the times of reports different between processes, whose monotonic clocks are.
_SPREAD: Final = 997.0


def spread(now_mono: float) -> float:
    """A fraction of a pause by which a report is late."""
    return now_mono * _SPREAD % 1.0


def longer_slice(pace: float, pause_seconds: float, available: int) -> int:
    """How many units last for two pauses at a pace, or the part of the available ones that a slice may have."""
    return min(math.ceil(pace * 2.0 * pause_seconds), available // _SLICE_SHARE)


class ReportPace:
    """The pause between two reports of one lease."""

    __slots__ = ("_lines_per_second", "_pause_seconds", "settle_seconds")

    def __init__(self, settle_seconds: float = 0.5, lines_per_second: float = 0.0) -> None:
        """`settle_seconds`: the pause of a process with few leases. `lines_per_second` 0: never a longer one."""
        self.settle_seconds: Final = settle_seconds
        self._lines_per_second: Final = lines_per_second
        self._pause_seconds = 0.0

    @property
    def is_slow(self) -> bool:
        """Whether leases are reported less often than every settlement."""
        return self._pause_seconds > 0.0

    def note_leases(self, number: int) -> None:
        """The process has so many leases."""
        if self._lines_per_second:
            pause_seconds = min(number / self._lines_per_second, PAUSE_SECONDS_MAX)
            self._pause_seconds = pause_seconds if pause_seconds > self.settle_seconds else 0.0

    def pause_seconds(self, window: Window) -> float:
        """The pause of the leases of a window; 0.0: every settlement. Units of a rate are returned at once."""
        if not self._pause_seconds or window.measure in RATES:
            return 0.0
        if window.measure.endswith("_minute"):
            return min(self._pause_seconds, _MINUTE_PAUSE_SECONDS_MAX)
        return self._pause_seconds
