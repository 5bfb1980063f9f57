"""A process with many leases reports each of them rarely; what others wait for is never late."""

from __future__ import annotations

import pytest

from keyproxy.limits.allowance import Allowance, Need
from keyproxy.limits.ledger.report_pace import PAUSE_SECONDS_MAX, ReportPace
from keyproxy.limits.ledger_protocol import Pool, Window
from keyproxy.limits.plan import Limit, Plan
from tests.limits.test_lease_table import Fleet, Process

#: A process with three times as many leases as it reports in a second.
PAUSE_SECONDS = 3.0
#: A report is up to two fifths of the pause late.
LATEST_SECONDS = 1.4 * PAUSE_SECONDS
AMPLE = 10**9


def slow_process(fleet: Fleet, pace: ReportPace | None = None) -> Process:
    """A process that reports one lease in `PAUSE_SECONDS`."""
    return fleet.process(pace or ReportPace(lines_per_second=1.0 / PAUSE_SECONDS))


def of_user(plan: Plan, number: int = 1) -> Allowance:
    """The limits of one user."""
    return Allowance(((Pool("user", f"u_{number}", False), plan),))


def window_of(fleet: Fleet, measure: str = "requests_per_day", number: int = 1) -> tuple[int, int]:
    """What is spent and held of the window of one user."""
    key = max(key for key in fleet.ledger.windows if key[0] == Window(Pool("user", f"u_{number}", False), measure))
    return fleet.ledger.windows[key].spent, fleet.ledger.windows[key].held


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
def process(fleet: Fleet) -> Process:
    """A slow process with a lease that was just granted."""
    process = slow_process(fleet)
    for _ in range(2):
        process.used(process.take(of_user(Plan(requests_per_day=AMPLE))))
        fleet.now += LATEST_SECONDS
        process.sync()
    return process


@pytest.mark.parametrize(
    ("leases", "seconds"), [(0, 0.0), (249, 0.0), (250, 0.0), (251, 0.502), (2_000, 4.0), (10**6, PAUSE_SECONDS_MAX)]
)
def test_pause_grows_with_the_number_of_leases_up_to_ten_seconds(leases: int, seconds: float) -> None:
    pace = ReportPace(settle_seconds=0.5, lines_per_second=500.0)
    pace.note_leases(leases)
    assert pace.pause_seconds(Window(Pool("user", "u", False), "requests_per_day")) == pytest.approx(seconds)
    assert pace.is_slow is bool(seconds)


@pytest.mark.parametrize(
    ("measure", "most"), [("rate", 0.0), ("token_rate", 0.0), ("requests_per_minute", 2.0), ("tokens_per_minute", 2.0)]
)
def test_rates_are_reported_at_once_and_windows_of_a_minute_within_two_seconds(measure: str, most: float) -> None:
    pace = ReportPace(lines_per_second=1.0)
    pace.note_leases(1_000)
    assert pace.pause_seconds(Window(Pool("user", "u", False), measure)) == most


def test_process_with_few_leases_reports_every_settlement(fleet: Fleet) -> None:
    process = slow_process(fleet, ReportPace(lines_per_second=500.0))
    for _ in range(5):
        process.used(process.take(of_user(Plan(requests_per_day=AMPLE))))
        fleet.now += 0.5
        assert process.sync() == 1


def test_lease_is_reported_once_in_a_pause_however_much_it_is_used(process: Process) -> None:
    fleet, allowance = process.fleet, of_user(Plan(requests_per_day=AMPLE))
    lines = 0
    for _ in range(60):
        process.used(process.take(allowance))
        fleet.now += 0.5
        lines += process.sync()
    assert 30.0 / LATEST_SECONDS - 1 <= lines <= 30.0 / PAUSE_SECONDS + 3
    fleet.now += LATEST_SECONDS
    process.sync()
    assert window_of(fleet)[0] == 62


def test_lease_that_runs_low_does_not_wait_for_its_report(process: Process) -> None:
    allowance = of_user(Plan(requests_per_day=AMPLE))
    serial, wakes = process.serial, process.wakes
    while process.wakes == wakes:
        process.used(process.take(allowance))
    assert process.serial == serial
    assert process.sync(everything=False) == 1
    # It was renewed before a request had to wait.
    process.used(process.table.take(allowance, process.now))


def test_recalled_lease_returns_all_idle_units_and_reports_its_use_at_once(process: Process) -> None:
    fleet = process.fleet
    process.used(process.take(of_user(Plan(requests_per_day=AMPLE))))
    (lease,) = fleet.ledger.holders[process.name].leases
    assert window_of(fleet)[1] > 0
    fleet.now += 0.1
    process.lease_sync.recall([lease], process.now)
    assert process.sync(everything=False) == 1
    assert window_of(fleet) == (3, 0)


def test_idle_lease_is_returned_and_closed_after_two_pauses(process: Process) -> None:
    fleet = process.fleet
    ends = fleet.now + 2 * LATEST_SECONDS + 1.0
    while fleet.now < ends:
        fleet.now += 0.5
        process.sync()
    assert window_of(fleet) == (2, 0)
    assert not process.lease_sync.has_leases


def test_lost_report_is_sent_again_with_the_next_settlement(process: Process) -> None:
    fleet = process.fleet
    process.used(process.take(of_user(Plan(requests_per_day=AMPLE))))
    fleet.now += LATEST_SECONDS
    assert process.sync(answer_is_lost=True) == 1
    fleet.now += 0.5
    assert process.sync() == 1


def test_another_plan_returns_units_with_the_next_settlement(process: Process) -> None:
    fleet = process.fleet
    assert window_of(fleet)[1] > 0
    allowance = of_user(Plan([Limit("requests", "month", AMPLE)]))
    process.used(process.take(allowance))
    fleet.now += 0.5
    process.sync()
    assert window_of(fleet) == (2, 0)


def test_history_that_the_ledger_lost_is_reported_at_once(process: Process) -> None:
    process.used(process.take(of_user(Plan(requests_per_day=AMPLE))))
    process.lease_sync.resend_all()
    assert process.sync() == 1


@pytest.mark.parametrize("limit", [40, 1_000, AMPLE])
def test_slice_lasts_two_pauses_or_is_a_small_part_of_what_is_left(fleet: Fleet, limit: int) -> None:
    process, allowance = slow_process(fleet), of_user(Plan(requests_per_day=limit))
    for _ in range(min(limit // 2, 300)):
        process.used(process.take(allowance))
        fleet.now += 0.1
        process.sync(everything=False)
        if int(fleet.now * 10) % 5 == 0:
            process.sync()
    spent, held = window_of(fleet)
    # 10 requests per second.
    two_seconds = 2.0 * 20
    assert held <= max(two_seconds, min((limit - spent) / 32 + 1, 2.0 * 20 * PAUSE_SECONDS))
    assert limit < AMPLE or held >= 10 * PAUSE_SECONDS / 2


def test_unused_tokens_of_a_rate_are_returned_with_the_next_settlement(fleet: Fleet) -> None:
    process = slow_process(fleet)
    allowance = of_user(Plan([Limit("token-rate", "second", 10, 1_000)]))
    for _ in range(3):
        process.used(process.take(allowance, Need(100, 100)), tokens=10)
        fleet.now += 0.1
        assert process.sync() == 1


def test_quota_is_spent_to_its_last_request_by_two_slow_processes(fleet: Fleet) -> None:
    processes = [slow_process(fleet) for _ in range(2)]
    allowances = [of_user(Plan(requests_per_day=100)) for _ in processes]
    for number in range(100):
        one = number % 2
        for _ in range(3):
            if number < 90:
                break
            # What the change feed delivers.
            for other in processes:
                other.lease_sync.recall(fleet.ledger.recalled(other.name), other.now)
                other.sync(everything=False)
            fleet.now += 0.5
        processes[one].used(processes[one].take(allowances[one]))
        fleet.now += 0.05
        processes[one].sync()
    for process in processes:
        process.leave()
    assert window_of(fleet) == (100, 0)
