"""The schedule of the messages about a window with many holders: a queue of places, `REPORTS_PER_SECOND` of them.

The ledger stores when the schedule ends, for each window. A message takes places at the end; the reply states how many
holders would fill the schedule, which paces reports, and how long to wait before the next request for units.
"""

from __future__ import annotations

import math
from typing import Final

from keyproxy.limits.ledger_protocol import FEW_HOLDERS, REPORTS_PER_SECOND

#: The places of a message that opens a lease: several, since others like it follow while processes join.
PLACES_OF_NEW: Final = 4

#: The additional places of a message that is granted nothing, since it is repeated soon.
PLACES_OF_REFUSED: Final = 3

#: If the schedule is full, holders report as if they were more, at most this many times.
_STRETCH_MAX: Final = 2

#: If the schedule ends so far ahead, many processes compete for units.
_AHEAD_SECONDS: Final = 0.25

#: For how long a new window expects the holders of its predecessor: seconds at least, and intervals of their reports.
_EXPECTED_SECONDS_MIN: Final = 5.0
_EXPECTED_INTERVALS: Final = 3.0

#: How long a holder waits at least that was granted nothing, and how long any waits at most.
_REFUSED_SECONDS_MIN: Final = 0.7
_WAIT_SECONDS_MAX: Final = 20.0


def applies(holders: int) -> bool:
    """Whether a window with so many holders has a schedule."""
    return holders > FEW_HOLDERS


def extended(ends: float, now: float, places: int, holders: int) -> float:
    """When the schedule ends after a message that takes so many places."""
    ahead = max(ends - now, 0.0) + places / REPORTS_PER_SECOND
    return now + min(ahead, _STRETCH_MAX * holders / REPORTS_PER_SECOND)


def pacing_holders(ends: float, now: float, holders: int) -> int:
    """The number of holders of a window, or of those that would fill its schedule."""
    return max(holders, math.floor((ends - now) * REPORTS_PER_SECOND))


def expected_seconds(holders: int) -> float:
    """For how long a new window expects the holders of its predecessor."""
    return max(_EXPECTED_SECONDS_MIN, _EXPECTED_INTERVALS * holders / REPORTS_PER_SECOND)


def first_units(want: int, holders: int) -> int:
    """What lasts for two intervals of reports if `want` lasts for two seconds."""
    return math.floor(want * holders / REPORTS_PER_SECOND)


def is_ahead(ends: float, now: float) -> bool:
    """Whether the schedule ends so far ahead that the senders of messages compete for units."""
    return ends - now >= _AHEAD_SECONDS


def wait_seconds(ends: float, now: float, *, is_short: bool, is_refused: bool) -> float:
    """How long a holder waits before it requests units: for the next place in the schedule.

    `is_short`: the window was short of units lately. `is_refused`: this holder was granted nothing now.
    """
    if is_refused:
        return max(_REFUSED_SECONDS_MIN, min(ends - now, _WAIT_SECONDS_MAX))
    return min(ends - now, _WAIT_SECONDS_MAX) if is_short and is_ahead(ends, now) else 0.0
