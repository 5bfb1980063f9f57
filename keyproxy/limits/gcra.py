"""GCRA, the generic cell rate algorithm: a rate limit whose whole state is one time per window.

    source       ITU-T Recommendation I.371, annex A.1 (virtual scheduling algorithm), for n units at once
    state        TAT, the theoretical arrival time: when all units taken so far have been replenished
    ahead        max(TAT - now, 0)
    conforms     ahead + n * interval <= burst * interval; for n = 1 that is I.371's TAT - now <= (burst - 1) * interval
    then         TAT := now + ahead + n * interval

`interval` is the time in which one unit is replenished, `burst` the number of units that are available after a long
pause. A refused request does not change the state. Units that were taken and not used can be returned, less those that
have been replenished since: TAT := now + ahead - max(0, n - elapsed / interval) * interval. Without that deduction a
window that is full again would admit the returned units a second time. The ledger computes the same in SQL
(PostgreSQL) and in Lua (Redis).
"""

from __future__ import annotations

import math
from typing import Final

#: A unit counts as replenished this fraction of an interval early, so that rounding does not withhold it.
_ROUNDING: Final = 1e-6


def ahead_seconds(theoretical: float, now: float, burst: int, interval_seconds: float) -> float:
    """How far the theoretical arrival time is ahead of now.

    Capped at the burst: the clock may have been set back, or the burst lowered.
    """
    return min(max(theoretical, now) - now, burst * interval_seconds)


def ahead_after_return(ahead: float, units: int, burst: int, interval_seconds: float, elapsed_seconds: float) -> float:
    """How far it is ahead after units are returned that were taken `elapsed_seconds` ago.

    Negative `units` were used without having been taken: they count in full, up to one burst.
    """
    if units > 0:
        return max(0.0, ahead - max(0.0, units * interval_seconds - max(0.0, elapsed_seconds)))
    return min(ahead - units * interval_seconds, burst * interval_seconds)


def units_available(ahead: float, burst: int, interval_seconds: float) -> int:
    """The number of units that conform now."""
    return math.floor((burst * interval_seconds - ahead) / interval_seconds + _ROUNDING)


def wait_seconds(ahead: float, units: int, burst: int, interval_seconds: float) -> float:
    """How long until this many units conform, if none are taken in the meantime."""
    return max(0.0, ahead + (units - burst) * interval_seconds)


class UnusedUnits:
    """Units of a token rate to be returned with the next line, and units used beyond the grant.

    The ledger takes back what was not refilled since the grant. Of units with different times, those that the elapsed
    time has refilled already are dropped, so that one time describes them all.
    """

    __slots__ = ("_granted_at", "_overused", "_unused")

    def __init__(self) -> None:
        self._unused = self._overused = 0
        self._granted_at = 0.0

    @property
    def has_any(self) -> bool:
        """Whether the next line has something to report."""
        return self._unused > 0 or self._overused > 0

    def add(self, units: int, granted_at: float, interval_seconds: float) -> None:
        """Add units that were granted at this time of the ledger; negative: units that were used beyond the grant."""
        if units < 0:
            self._overused -= units
        elif not self._unused:
            self._unused, self._granted_at = units, granted_at
        else:
            newest = max(granted_at, self._granted_at)
            older, newer = self._unused, units
            if granted_at < newest:
                older, newer = units, self._unused
            refilled = math.ceil(abs(granted_at - self._granted_at) / interval_seconds)
            self._unused, self._granted_at = newer + max(0, older - refilled), newest

    def taken(self) -> tuple[int, float]:
        """What to report, once: a message that is lost returns nothing, so that nothing is returned twice."""
        units, granted_at = self._unused - self._overused, self._granted_at
        self._unused = self._overused = 0
        return (units, granted_at) if units > 0 else (units, 0.0)


#: Shared by windows that never have any; nothing is added to it.
NO_UNUSED_UNITS: Final = UnusedUnits()
