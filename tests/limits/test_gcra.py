"""The rate arithmetic admits what ITU-T I.371 admits, unit by unit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.limits import gcra

#: Powers of two, so that every sum is exact and both sides of each edge are.
INTERVALS = st.sampled_from([0.125, 0.5, 1.0, 64.0])
STEPS = st.integers(0, 40)


@given(INTERVALS, st.integers(1, 9), st.lists(st.tuples(STEPS, st.integers(1, 4)), max_size=30))
def test_units_conform_exactly_if_each_would_conform_alone_in_virtual_scheduling(
    interval: float, burst: int, arrivals: list[tuple[int, int]]
) -> None:
    now, theoretical, standard = 1_024.0, -math.inf, -math.inf
    for steps, units in arrivals:
        now += steps * interval / 4
        ahead = gcra.ahead_seconds(theoretical, now, burst, interval)
        conforming = 0
        # I.371, A.1: a cell that arrives at `now` does not conform if TAT > now + limit.
        attempt = standard
        while conforming < units and not attempt > now + (burst - 1) * interval:
            attempt = max(now, attempt) + interval
            conforming += 1
        assert min(units, gcra.units_available(ahead, burst, interval)) == conforming
        if conforming == units:
            standard, theoretical = attempt, now + ahead + units * interval
            assert theoretical == standard


@given(INTERVALS, st.integers(1, 9), STEPS, st.integers(1, 9))
def test_units_are_available_after_exactly_the_wait(interval: float, burst: int, steps: int, units: int) -> None:
    units = min(units, burst)
    now = 1_024.0
    theoretical = now + min(steps * interval / 4, burst * interval)

    def available_after(seconds: float) -> int:
        ahead = gcra.ahead_seconds(theoretical, now + seconds, burst, interval)
        return gcra.units_available(ahead, burst, interval)

    wait = gcra.wait_seconds(theoretical - now, units, burst, interval)
    assert available_after(wait) >= units
    if wait:
        assert available_after(wait - interval / 1_024) < units


@pytest.mark.parametrize(
    ("theoretical", "ahead"), [(-math.inf, 0.0), (99.0, 0.0), (100.0, 0.0), (103.0, 3.0), (1e9, 10.0)]
)
def test_state_is_at_most_one_burst_ahead(theoretical: float, ahead: float) -> None:
    assert gcra.ahead_seconds(theoretical, 100.0, 5, 2.0) == ahead
