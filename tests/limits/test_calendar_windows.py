"""Calendar windows are days and months in UTC."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.limits.calendar_windows import span

INSTANTS = st.datetimes(datetime(1970, 1, 1), datetime(2900, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


@given(INSTANTS)
def test_day_lasts_from_midnight_to_midnight(at: datetime) -> None:
    midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
    ends = midnight + timedelta(days=1)
    assert span("tokens_per_day", at.timestamp()) == (midnight.timestamp(), ends.timestamp())


@given(INSTANTS)
def test_month_lasts_from_its_first_day_to_the_next_one_s(at: datetime) -> None:
    first = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    following = (first + timedelta(days=32)).replace(day=1)
    assert span("requests_per_month", at.timestamp()) == (first.timestamp(), following.timestamp())


@pytest.mark.parametrize("month", range(1, 13))
@pytest.mark.parametrize("year", [1999, 2000, 2023, 2024, 2100])
def test_window_contains_its_start_and_not_its_end(year: int, month: int) -> None:
    starts, ends = span("tokens_per_month", datetime(year, month, 15, tzinfo=UTC).timestamp())
    assert span("tokens_per_month", starts) == (starts, ends)
    assert span("tokens_per_month", ends)[0] == ends
    assert span("tokens_per_month", starts - 1)[1] == starts


@pytest.mark.parametrize("measure", ["rate", "concurrency"])
def test_measure_without_a_calendar_has_one_endless_window(measure: str) -> None:
    assert span(measure, 1e9) == (0, math.inf)
