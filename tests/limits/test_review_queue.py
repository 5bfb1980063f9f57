"""The order in which leases are reviewed, and when the ledger client is woken."""

from __future__ import annotations

import pytest

from keyproxy.limits.lease import IDLE_SECONDS, Lease
from keyproxy.limits.ledger_protocol import Pool, Window
from keyproxy.limits.plan import Limit
from keyproxy.limits.review_queue import ReviewQueue


@pytest.fixture
def leases() -> list[Lease]:
    limit = Limit("requests", "day", 10)
    return [Lease(Window(Pool("user", f"u_{number}", False), "requests_per_day"), limit, 0.0) for number in range(3)]


def test_changed_leases_are_due_once_each_in_order_after_the_next_gather(leases: list[Lease]) -> None:
    queue = ReviewQueue(lambda: None)
    for lease in (leases[1], leases[0], leases[1]):
        queue.note_change(lease)
    assert not queue.due
    queue.gather(0.0)
    queue.make_due(leases[0])
    queue.make_due(leases[2])
    assert queue.due == [leases[1], leases[0], leases[2]]
    assert [queue.next_due() for _ in range(4)] == [leases[1], leases[0], leases[2], None]
    queue.note_change(leases[1])
    queue.gather(0.0)
    assert queue.due == [leases[1]]


def test_urgent_leases_wake_the_client_once_until_it_has_sent_a_message(leases: list[Lease]) -> None:
    woken: list[None] = []
    queue = ReviewQueue(lambda: woken.append(None))
    for lease in (leases[2], leases[0], leases[2]):
        queue.make_urgent(lease)
    assert len(woken) == 1
    assert queue.is_urgent(leases[0])
    assert [queue.next_urgent() for _ in range(3)] == [leases[2], leases[0], None]
    assert not queue.is_urgent(leases[0])
    queue.make_urgent(leases[1])
    assert len(woken) == 1
    queue.rearm()
    queue.make_urgent(leases[1])
    assert len(woken) == 2


def test_lease_in_use_is_reviewed_when_it_has_been_idle(leases: list[Lease]) -> None:
    queue, (busy, idle, _) = ReviewQueue(lambda: None), leases
    busy.number, idle.number = 1, 2
    busy.touched_mono, idle.touched_mono = 10.0, 10.0 - IDLE_SECONDS
    for lease in (busy, idle, busy):
        queue.review_when_idle(lease, 10.0)
    queue.gather(10.0 + IDLE_SECONDS - 0.01)
    assert not queue.due
    queue.gather(10.0 + IDLE_SECONDS)
    assert queue.due == [busy]


def test_scheduled_review_is_never_early_and_happens_once_however_many_share_its_time(leases: list[Lease]) -> None:
    queue, (first, second, third) = ReviewQueue(lambda: None), leases
    queue.review_at(first, 20.06)
    queue.review_at(second, 20.02)
    queue.review_at(third, 29.0)
    # Earlier ones: within the same slice of time, and in another.
    queue.review_at(first, 20.04)
    queue.review_at(third, 20.05)
    queue.review_at(third, 25.0)
    found = []
    for hundredth in range(1_990, 3_000):
        queue.gather(hundredth / 100)
        while (lease := queue.next_due()) is not None:
            found.append((hundredth, lease))
    assert found == [(2_002, second), (2_004, first), (2_005, third)]


def test_lease_can_be_scheduled_again_after_its_review(leases: list[Lease]) -> None:
    queue, (lease, _, _) = ReviewQueue(lambda: None), leases
    queue.review_at(lease, 20.01)
    queue.gather(20.01)
    assert queue.next_due() is lease
    queue.review_at(lease, 20.02)
    queue.gather(20.01)
    assert queue.next_due() is None
    queue.gather(20.02)
    assert queue.next_due() is lease
