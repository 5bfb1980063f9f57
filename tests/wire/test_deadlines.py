"""Timeouts are late by a moment at most, even if an earlier one failed."""

from __future__ import annotations

import asyncio
import time

import pytest

from keyproxy.wire.deadlines import NO_DEADLINE, Deadlines


class Item:
    """Something whose deadline has passed."""

    def __init__(self, *, is_broken: bool) -> None:
        self.deadline = 0.0
        self.is_broken = is_broken
        self.passed = 0
        self.is_aborted = False

    def deadline_passed(self, now: float) -> None:
        assert now > 0.0
        self.passed += 1
        if self.is_broken:
            raise RuntimeError("a defect")
        self.deadline = NO_DEADLINE

    def abort(self) -> None:
        self.is_aborted = True
        self.deadline = NO_DEADLINE


async def test_a_failure_at_one_timeout_does_not_prevent_others(caplog: pytest.LogCaptureFixture) -> None:
    deadlines = Deadlines(asyncio.get_running_loop(), time.monotonic, period_seconds=0.02)
    items = [Item(is_broken=number % 2 == 0) for number in range(60)]
    for item in items:
        deadlines.watch(item)
    deadlines.start()
    async with asyncio.timeout(5.0):
        while not all(item.passed for item in items):
            await asyncio.sleep(0.005)
    deadlines.stop()
    assert [item.passed for item in items] == [1] * len(items)
    assert all(item.is_aborted == item.is_broken for item in items)
    assert caplog.text.count("handling a timeout failed") == len(items) // 2
