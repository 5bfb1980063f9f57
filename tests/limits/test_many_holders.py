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
    fleet.now += 2 * PAUSE_SECONDS
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
    hold = process.take(ample())
    (lease,) = fleet.ledger.holders[process.name].leases
    fleet.now += 0.01
    process.lease_sync.recall([lease], process.now)
    before = fleet.ledger.holders[process.name].leases[lease].outstanding
    assert process.sync(everything=False) == 1
    # What is in use, and what a busy process uses within a second.
    assert before > 2
    assert fleet.ledger.holders[process.name].leases[lease].outstanding == 2
    process.used(hold)


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
    limit, waits = 1, []
    for process in processes:
        process.refused(ample(limit))
        (lease,) = process.lease_sync.leases_of(TENANT).leases.values()
        waits.append(lease.ask_after_mono - process.now)
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(0.7)
    # 60 of them per second.
    assert waits[-1] == pytest.approx(HOLDERS / 60.0, rel=0.5)
    # Before its turn, a process refuses without another message.
    serial = processes[-1].serial
    fleet.now += 0.6
    processes[-1].refused(ample(limit))
    assert processes[-1].serial == serial
