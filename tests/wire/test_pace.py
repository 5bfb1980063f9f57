"""Pace is that of the last seconds, whatever came before them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.wire.pace import SLOW_BYTES_PER_SECOND, WINDOW_SECONDS, Pace

_EVENTS = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 10**9)), max_size=60)


@given(started=st.floats(0, 1e6), events=_EVENTS, later=st.floats(0, 20))
def test_the_pace_counts_only_bytes_moved_in_the_window(
    started: float, events: list[tuple[float, int]], later: float
) -> None:
    pace, now, moved = Pace(started), started, []
    for seconds, amount in events:
        now += seconds
        pace.add(amount, now)
        moved.append((now, amount))
    now += later
    age = now - started
    # The oldest slot is forgotten as a whole: between one slot less and the window.
    surely = sum(amount for when, amount in moved if when > now - (WINDOW_SECONDS - 1) + 1e-6)
    perhaps = sum(amount for when, amount in moved if when >= now - WINDOW_SECONDS - 1e-6)
    counted = pace.per_second(now) * max(1.0, min(age, WINDOW_SECONDS))
    assert counted >= surely * 0.999
    assert pace.per_second(now) * max(1.0, min(age, WINDOW_SECONDS - 1)) <= perhaps * 1.001 + 1e-6


@given(
    per_tick=st.integers(1, 10**6), ticks=st.integers(10, 400), burst=st.integers(0, 10**12), tick=st.floats(0.01, 0.5)
)
def test_a_burst_is_forgotten_and_a_steady_pace_is_found(per_tick: int, ticks: int, burst: int, tick: float) -> None:
    pace = Pace(0.0)
    pace.add(burst, 0.0)
    now = 0.0
    for _ in range(ticks):
        now += tick
        pace.add(per_tick, now)
    if now > WINDOW_SECONDS + 0.01:
        steady = per_tick / tick
        assert pace.per_second(now) == pytest.approx(steady, rel=tick / (WINDOW_SECONDS - 1) + 0.01)


def test_a_byte_now_and_then_after_a_burst_is_slow_within_the_window() -> None:
    pace = Pace(100.0)
    pace.add(100_000_000, 100.5)
    assert not pace.is_slow(103.0)
    pace.add(1, 105.0)
    assert pace.is_slow(100.0 + WINDOW_SECONDS + 1)


@pytest.mark.parametrize(("per_second", "is_slow"), [(0, True), (SLOW_BYTES_PER_SECOND // 2, True), (1331, False)])
def test_slow_is_less_than_a_kibibyte_a_second(per_second: int, is_slow: bool) -> None:
    pace = Pace(0.0)
    for second in range(1, 30):
        pace.add(per_second, float(second))
        assert pace.is_slow(float(second)) is is_slow


def test_a_clock_that_goes_back_does_no_harm() -> None:
    pace = Pace(10.0)
    pace.add(5000, 12.0)
    pace.add(5000, 11.0)
    assert pace.per_second(9.0) > 0
    assert pace.per_second(12.0) == pytest.approx(5000)
