"""The calendar windows of limits: days and months in UTC, as Unix time.

Plain arithmetic, because this room has no clock and no time zones.
"""

from __future__ import annotations

import math
from typing import Final

_DAY_SECONDS: Final = 86_400
_DAYS_PER_MONTH_MAX: Final = 31


def span(measure: str, at: float) -> tuple[int, float]:
    """The start and end of the window of this measure that contains an instant; without a calendar: 0 and infinity."""
    day = int(at // _DAY_SECONDS)
    if measure.endswith("_per_day"):
        return day * _DAY_SECONDS, float((day + 1) * _DAY_SECONDS)
    if measure.endswith("_per_month"):
        first = day - _day_of_month(day) + 1
        in_next_month = first + _DAYS_PER_MONTH_MAX
        following = in_next_month - _day_of_month(in_next_month) + 1
        return first * _DAY_SECONDS, float(following * _DAY_SECONDS)
    return 0, math.inf


def _day_of_month(day: int) -> int:
    """The day of the month, from 1, of a day since 1970.

    Howard Hinnant, "chrono-compatible low-level date algorithms": years begin in March, in eras of 400 years.
    """
    of_era = (day + 719_468) % 146_097
    year = (of_era - of_era // 1_460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    month = (5 * of_year + 2) // 153
    return of_year - (153 * month + 2) // 5 + 1
