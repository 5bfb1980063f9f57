"""A window with many holders: rare reports, recalled units, and requests that are not repeated too soon."""

from __future__ import annotations

import pytest

from keyproxy.limits.allowance import Allowance
from keyproxy.limits.ledger_protocol import FEW_HOLDERS, REPORTS_PER_SECOND
from keyproxy.limits.plan import Plan
from tests.limits.test_lease_table import TENANT, Fleet, Process, under

HOLDERS = 2 * FEW_HOLDERS
PAUSE_SECONDS = HOLDERS / REPORTS_PER_SECOND


@pytest.fixture
def crowd() -> list[Process]:
    """Processes that share one window. The first one knows how many they are."""
    fleet = Fleet()
    processes = [fleet.process() for _ in range(HOLDERS)]
    for process in [*processes, processes[0]]:
        process.used(process.take(ample()))
        process.sync()
    # The schedule of messages is full after so many first ones, until these seconds have passed.
    for _ in range(2):
        fleet.now += 3 * PAUSE_SECONDS
        processes[0].used(processes[0].take(ample()))
        processes[0].sync()
    return processes


def ample(limit: int = 10**6) -> Allowance:
    """An allowance of the tenant alone."""
    return under(Plan(requests_per_day=limit), pools=(TENANT,))


def reports(process: Process) -> int:
    """The number of lines that the process sends when it settles."""
    return process.sync()


def test_report_waits_until_the_pause_of_the_window_is_over(crowd: list[Process]) -> None:
    process, fleet = crowd[0], crowd[0].fleet
    process.used(process.take(ample()))
    fleet.now += PAUSE_SECONDS * 0.9
    assert reports(process) == 0
    # Up to two fifths later than that, so that the reports of the processes spread.
    fleet.now += PAUSE_SECONDS * 0.6
    assert reports(process) == 1
    assert reports(process) == 0


def test_request_that_waits_for_units_does_not_wait_for_the_next_report(crowd: list[Process]) -> None:
    process = crowd[0]
    for _ in range(200):
        process.used(process.take(ample()))


def test_slice_lasts_two_intervals_at_the_pace_of_the_process(crowd: list[Process]) -> None:
    process, fleet = crowd[0], crowd[0].fleet
    for _ in range(60):
        process.used(process.take(ample()))
        fleet.now += 0.1
        process.sync()
    # 10 requests per second.
    held = next(iter(fleet.ledger.holders[process.name].leases.values())).outstanding
    assert 10 * PAUSE_SECONDS <= held <= 10 * 2 * PAUSE_SECONDS * 1.5


def test_recalled_holder_returns_what_is_idle_at_once_and_keeps_what_is_in_use(crowd: list[Process]) -> None:
    process, fleet = crowd[0], crowd[0].fleet
    for _ in range(30):
        process.used(process.take(ample()))
        fleet.now += 0.25
        process.sync()
    hold = process.take(ample())
    (lease,) = fleet.ledger.holders[process.name].leases
    fleet.now += 0.01
    process.lease_sync.recall([lease], process.now)
    before = fleet.ledger.holders[process.name].leases[lease].outstanding
    assert process.sync(everything=False) == 1
    # What is in use, and what a busy process uses within a second.
    assert before > 5
    assert fleet.ledger.holders[process.name].leases[lease].outstanding == 5
    process.used(hold)


def test_recalled_holder_returns_everything_once_it_is_idle_however_busy_it_was(crowd: list[Process]) -> None:
    process, fleet = crowd[0], crowd[0].fleet
    for _ in range(30):
        process.used(process.take(ample()))
        fleet.now += 0.1
        process.sync()
    (lease,) = fleet.ledger.holders[process.name].leases
    fleet.now += 0.5
    process.sync()
    assert fleet.ledger.holders[process.name].leases[lease].outstanding > 5
    fleet.now += 0.6
    process.lease_sync.recall([lease], process.now)
    process.sync(everything=False)
    assert fleet.ledger.holders[process.name].leases[lease].outstanding == 0


def test_recall_of_a_lease_that_is_closed_changes_nothing(crowd: list[Process]) -> None:
    process = crowd[0]
    process.lease_sync.recall([999_999], process.now)
    assert process.sync(everything=False) == 0


def test_recall_survives_a_lost_message(crowd: list[Process]) -> None:
    process, fleet = crowd[0], crowd[0].fleet
    (lease,) = fleet.ledger.holders[process.name].leases
    process.lease_sync.recall([lease], process.now)
    fleet.ledger.holders[process.name].leases[lease].is_recalled = True
    assert process.sync(everything=False, answer_is_lost=True) == 1
    fleet.now += 0.5
    assert process.sync() == 1
    assert fleet.ledger.recalled(process.name) == []


def test_requests_that_many_holders_send_in_vain_wait_in_turn() -> None:
    fleet = Fleet()
    processes = [fleet.process() for _ in range(HOLDERS)]
    for process in processes:
        process.used(process.take(ample()))
        process.sync()
    fleet.now += 3 * PAUSE_SECONDS
    limit, waits = 1, []
    for process in processes:
        process.refused(ample(limit))
        (lease,) = process.lease_sync.leases_of(TENANT).leases.values()
        waits.append(lease.ask_after_mono - process.now)
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(0.7)
    # At most two intervals of reports.
    assert waits[-1] == pytest.approx(2 * HOLDERS / REPORTS_PER_SECOND)
    # Before its turn, a process refuses without another message.
    serial = processes[-1].serial
    fleet.now += 0.6
    processes[-1].refused(ample(limit))
    assert processes[-1].serial == serial


def test_reply_to_a_report_makes_later_requests_wait_in_turn_while_others_are_short(crowd: list[Process]) -> None:
    fleet, short = crowd[0].fleet, 1
    for process in crowd[1:]:
        process.refused(ample(short))
    process = crowd[0]
    process.used(process.take(ample()))
    fleet.now += 0.6
    process.sync(is_last=True)
    (lease,) = process.lease_sync.leases_of(TENANT).leases.values()
    assert lease.ask_after_mono > process.now + 0.25


def test_new_holder_of_a_window_of_many_gets_what_lasts_two_intervals(crowd: list[Process]) -> None:
    first = crowd[0].fleet.process()
    first.used(first.take(ample()))
    fleet = Fleet()
    few = fleet.process()
    few.used(few.take(ample()))

    def held(process: Process) -> int:
        return next(iter(process.fleet.ledger.holders[process.name].leases.values())).granted

    assert held(few) == 5
    assert held(first) == 5 * HOLDERS // REPORTS_PER_SECOND


def test_units_of_the_next_window_are_there_before_it_begins_and_are_not_used_before(crowd: list[Process]) -> None:
    process, fleet = crowd[0], crowd[0].fleet
    (before,) = process.lease_sync.leases_of(TENANT).leases.values()
    fleet.now += before.ends_mono - process.now - 1.6 * PAUSE_SECONDS
    while before.successor is None:
        process.used(process.take(ample()))
        fleet.now += 0.1
        process.sync()
    assert before.ends_mono - 1.5 * PAUSE_SECONDS <= process.now < before.ends_mono
    today, tomorrow = (row for _, row in sorted(fleet.ledger.windows.items()))
    assert (tomorrow.spent, tomorrow.held > 0) == (0, True)
    fleet.now += before.ends_mono - process.now - 0.001
    process.used(process.take(ample()))
    assert (before.is_current, today.held > 0) == (True, True)
    fleet.now += 0.002
    serial = process.serial
    process.used(process.take(ample()))
    assert (before.is_current, process.serial) == (False, serial)
    assert process.lease_sync.leases_of(TENANT).leases["requests_per_day", ""] is before.successor
    assert before.successor.used == 1


def test_units_of_the_next_window_are_returned_when_the_plan_changes(crowd: list[Process]) -> None:
    process, fleet = crowd[0], crowd[0].fleet
    (before,) = process.lease_sync.leases_of(TENANT).leases.values()
    fleet.now += before.ends_mono - process.now - 1.4 * PAUSE_SECONDS
    while before.successor is None:
        process.used(process.take(ample()))
        fleet.now += 0.1
        process.sync()
    _, tomorrow = (row for _, row in sorted(fleet.ledger.windows.items()))
    assert tomorrow.held > 0
    process.used(process.take(ample(9_000)))
    fleet.now += 4 * PAUSE_SECONDS
    process.sync()
    assert (tomorrow.spent, tomorrow.held) == (0, 0)


def test_few_holders_request_nothing_ahead_of_the_next_window() -> None:
    fleet = Fleet()
    process = fleet.process()
    process.used(process.take(ample()))
    (before,) = process.lease_sync.leases_of(TENANT).leases.values()
    fleet.now += before.ends_mono - process.now - 0.6
    process.used(process.take(ample()))
    fleet.now += 0.5
    process.sync()
    assert len(fleet.ledger.windows) == 1
