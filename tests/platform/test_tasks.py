"""Tasks end when they are cancelled, whatever a library does to their cancellation."""

from __future__ import annotations

import asyncio

import pytest

from keyproxy.platform.tasks import cancel_all


class Deaf:
    """Waits forever, and loses its first `losses` cancellations."""

    def __init__(self, losses: int) -> None:
        self.losses = losses
        self.lost = 0

    async def wait(self) -> None:
        """Wait until a cancellation is not lost."""
        while True:
            try:
                await asyncio.sleep(3_600)
            except asyncio.CancelledError:
                if self.lost == self.losses:
                    raise
                self.lost += 1


@pytest.mark.parametrize("losses", [0, 1, 3])
async def test_tasks_end_however_often_they_lose_their_cancellation(losses: int) -> None:
    deaf = [Deaf(losses), Deaf(0)]
    tasks = [asyncio.ensure_future(one.wait()) for one in deaf]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await cancel_all(tasks)
    assert all(task.cancelled() for task in tasks)
    assert [one.lost for one in deaf] == [losses, 0]


async def test_ended_and_failed_tasks_and_none_at_all_are_no_fault() -> None:
    async def failing() -> None:
        raise RuntimeError("a defect")

    async def ending() -> None:
        return

    tasks = {asyncio.ensure_future(failing()), asyncio.ensure_future(ending())}
    await asyncio.wait(tasks)
    await cancel_all(tasks)
    await cancel_all([])


async def test_a_set_that_tasks_leave_as_they_end_is_cancelled_whole() -> None:
    tasks: set[asyncio.Task[None]] = set()
    for _ in range(3):
        task = asyncio.ensure_future(Deaf(0).wait())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.sleep(0)
    await cancel_all(tasks)
    assert not tasks
