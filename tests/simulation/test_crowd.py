"""Many processes on one window: few messages, no overspending, and any of them finds the last unit."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from keyproxy.limits.ledger_protocol import REPORTS_PER_SECOND
from keyproxy.limits.plan import Plan
from tests.simulation.crowd import EVENING, STORM, Crowd


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Suppress the warnings about lost messages."""
    logger = logging.getLogger("keyproxy")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def test_300_processes_on_one_window_send_no_more_messages_than_its_pace() -> None:
    # Each of them reports every half second otherwise.
    crowd = Crowd(300, requests_per_second=2.0)
    crowd.run(26.0)
    mean, highest = crowd.messages_per_second(16.0, 26.0)
    assert mean <= REPORTS_PER_SECOND
    assert highest < 150
    assert crowd.refused == 0
    waited = sum(1 for _, seconds in crowd.waited if seconds > 0.001)
    assert waited < 0.05 * len(crowd.waited)


@pytest.mark.parametrize("is_stormy", [False, True])
def test_many_processes_pass_midnight_without_more_messages_refusals_or_waits(is_stormy: bool) -> None:
    crowd = Crowd(120, starts_wall=EVENING + 35.0, weather=STORM if is_stormy else None)
    crowd.run(45.0)
    yesterday, today = sorted(crowd.reference.windows)
    # It is 25 seconds after the start.
    _, highest = crowd.messages_per_second(14.0, 45.0)
    assert highest < 150
    assert crowd.reference.windows[yesterday].held == 0
    assert crowd.received_in[yesterday[1]] + crowd.received_in[today[1]] == crowd.received
    assert min(crowd.received_in[yesterday[1]], crowd.received_in[today[1]]) > 1_500
    if not is_stormy:
        assert crowd.refused == 0
        after = [seconds for at, seconds in crowd.waited if 25.0 <= at < 27.0]
        assert sum(1 for seconds in after if seconds > 0.001) < 0.25 * len(after)


def test_when_a_window_runs_out_its_last_unit_is_used_within_five_seconds_although_all_keep_asking() -> None:
    crowd = Crowd(200, limit=200 * 20)
    crowd.run(40.0)
    (row,) = crowd.reference.windows.values()
    assert (crowd.received, row.spent, row.held) == (crowd.limit, crowd.limit, 0)
    assert max(at for at, _ in crowd.waited) - crowd.first_refused <= 5.0
    _, highest = crowd.messages_per_second(0.0, 40.0)
    assert highest <= 150


def test_window_that_many_processes_share_is_spent_to_its_last_unit_and_not_beyond() -> None:
    crowd = Crowd(150, limit=150 * 10)
    crowd.run(30.0)
    (row,) = crowd.reference.windows.values()
    assert (crowd.received, row.spent, row.held) == (crowd.limit, crowd.limit, 0)
    # All of them keep trying: not more often than the window's pace allows.
    mean, _ = crowd.messages_per_second(22.0, 30.0)
    assert mean < 150


@pytest.mark.parametrize("is_stormy", [False, True])
def test_units_that_idle_processes_hold_are_found_by_any_process_within_five_seconds(is_stormy: bool) -> None:
    crowd = Crowd(150, requests_per_second=0.5)
    crowd.run(16.0)
    crowd.is_quiet = True
    crowd.run(1.0)
    if is_stormy:
        crowd.network.weather = STORM
    found = 0
    while found < 4:
        # Nothing is left but what others hold.
        (row,) = crowd.reference.windows.values()
        # A unit in use is spent soon: then none is left to find.
        if row.held <= crowd.in_flight + 10:
            break
        crowd.allowance_plan = Plan(requests_per_day=row.spent + row.held)
        empty = [member for member in crowd.members if crowd.units_of(member) == 0]
        assert crowd.seconds_to_a_unit(crowd.chance.choice(empty)) <= (12.0 if is_stormy else 5.0)
        found += 1
        crowd.run(0.5)
    assert found >= 1


def test_many_processes_that_die_and_lose_messages_do_not_overspend() -> None:
    crowd = Crowd(120, limit=120 * 8, weather=STORM, kills_per_second=1.0)
    crowd.run(40.0)
    (row,) = crowd.reference.windows.values()
    assert crowd.received <= row.spent + row.held <= crowd.limit
    assert row.forfeited > 0
