"""Times and dates as in PostgreSQL, including infinite ones and those beyond Python's calendar.

A column may contain any value that an SQL client writes: JavaScript's largest date, milliseconds mistaken for seconds, a
date before Christ, `infinity`. Each can be read and displayed, so that a row with one is handled like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import MAXYEAR, MINYEAR, UTC, date, datetime, timedelta
from typing import Any, Final, TypeAlias

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_EPOCH_DAY: Final = _EPOCH.date()
_MICROSECONDS_PER_DAY: Final = 86_400_000_000

#: The wire encoding of infinite values: timestamps, dates.
_INSTANTS: Final = (-(2**63), 2**63 - 1)
_DAYS: Final = (-(2**31), 2**31 - 1)

#: The Gregorian calendar repeats after 400 years.
_CYCLE_YEARS, _CYCLE_DAYS = 400, 146_097


@dataclass(frozen=True, slots=True)
class FarTime:
    """A time or date that Python cannot represent. `text`: ISO 8601 with a signed year of six digits, or `infinity`."""

    text: str
    #: PostgreSQL's internal value: microseconds or days since 2000.
    count: int


#: Before every other date.
FIRST_DAY: Final = FarTime("-infinity", _DAYS[0])

Instant: TypeAlias = datetime | FarTime
Day: TypeAlias = date | FarTime


def time_text(moment: Instant | None, timespec: str = "seconds") -> str | None:
    """A time in ISO 8601, in UTC, by default in whole seconds."""
    if moment is None:
        return None
    if isinstance(moment, FarTime):
        return moment.text
    return moment.astimezone(UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def day_text(day: Day | None) -> str | None:
    """A date in ISO 8601."""
    if day is None:
        return None
    return day.text if isinstance(day, FarTime) else day.isoformat()


def decoded_instant(value: tuple[int]) -> Instant:
    """Decode a timestamptz."""
    (count,) = value
    if count in _INSTANTS:
        return _infinite(count)
    try:
        return _EPOCH + timedelta(microseconds=count)
    except OverflowError:
        days, rest = divmod(count, _MICROSECONDS_PER_DAY)
        clock = (_EPOCH + timedelta(microseconds=rest)).strftime("T%H:%M:%SZ")
        return FarTime(_far_day(days) + clock, count)


def decoded_day(value: tuple[int]) -> Day:
    """Decode a date."""
    (count,) = value
    if count in _DAYS:
        return _infinite(count)
    try:
        return _EPOCH_DAY + timedelta(days=count)
    except OverflowError:
        return FarTime(_far_day(count), count)


def encoded_instant(moment: Any) -> tuple[int]:
    """Encode a timestamptz; a datetime without a zone is local. Raises TypeError."""
    if isinstance(moment, FarTime):
        return (moment.count,)
    if not isinstance(moment, datetime):
        raise TypeError(f"expected a datetime, not {type(moment).__name__}")
    return ((moment.astimezone(UTC) - _EPOCH) // timedelta(microseconds=1),)


def encoded_day(day: Any) -> tuple[int]:
    """Encode a date. Raises TypeError."""
    if isinstance(day, FarTime):
        return (day.count,)
    if not isinstance(day, date):
        raise TypeError(f"expected a date, not {type(day).__name__}")
    return (day.toordinal() - _EPOCH_DAY.toordinal(),)


def _infinite(count: int) -> FarTime:
    return FarTime("infinity" if count > 0 else "-infinity", count)


def _far_day(days: int) -> str:
    """ISO 8601's expanded form, which JavaScript reads too: year 0 is 1 BC."""
    cycles, rest = divmod(days, _CYCLE_DAYS)
    near = _EPOCH_DAY + timedelta(days=rest)
    year = near.year + cycles * _CYCLE_YEARS
    sign = "" if MINYEAR <= year <= MAXYEAR else "-" if year < 0 else "+"
    return f"{sign}{abs(year):06}-{near.month:02}-{near.day:02}"
