"""Units of a token rate that a request took and did not use: they go back to the ledger, but for those refilled since."""

from __future__ import annotations

import math


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
