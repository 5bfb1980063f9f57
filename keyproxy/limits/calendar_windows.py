"""The calendar windows of limits: minutes to months in UTC, as Unix time. Weeks begin on Monday.

Plain arithmetic, because this room has no clock and no time zones.
"""

from __future__ import annotations

import math
from typing import Final

_DAY_SECONDS: Final = 86_400
_DAYS_PER_MONTH_MAX: Final = 31
_SECONDS: Final = {"minute": 60, "hour": 3_600, "day": _DAY_SECONDS, "week": 7 * _DAY_SECONDS}

#: The first Monday of Unix time, January 5, 1970.
_MONDAY_SECONDS: Final = 4 * _DAY_SECONDS


def span(measure: str, at: float) -> tuple[int, float]:
    """The start and end of the window of this measure that contains an instant; without a calendar: 0 and infinity."""
    _, _, period = measure.rpartition("_per_")
    seconds = _SECONDS.get(period)
    if seconds is not None:
        first = _MONDAY_SECONDS if period == "week" else 0
        start = int((at - first) // seconds) * seconds + first
        return start, float(start + seconds)
    if period == "month":
        day = int(at // _DAY_SECONDS)
        first = day - _day_of_month(day) + 1
        in_next_month = first + _DAYS_PER_MONTH_MAX
        following = in_next_month - _day_of_month(in_next_month) + 1
        return first * _DAY_SECONDS, float(following * _DAY_SECONDS)
    return 0, math.inf


def civil_date(day: int) -> tuple[int, int, int]:
    """The year, month and day of the month, from 1, of a day since 1970.

    Howard Hinnant, "chrono-compatible low-level date algorithms": years begin in March, in eras of 400 years.
    """
    era, of_era = divmod(day + 719_468, 146_097)
    year = (of_era - of_era // 1_460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    month = (5 * of_year + 2) // 153
    of_month = of_year - (153 * month + 2) // 5 + 1
    return year + 400 * era + (month > 9), month - 9 if month > 9 else month + 3, of_month


def _day_of_month(day: int) -> int:
    return civil_date(day)[2]
