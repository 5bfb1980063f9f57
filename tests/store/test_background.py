"""Background tasks end when they are cancelled, whatever a library does to their cancellation."""

from __future__ import annotations

import asyncio
import contextlib

from keyproxy.store.background import BackgroundTask


async def test_task_ends_although_a_library_loses_its_first_cancellation() -> None:
    lost = 0

    async def work() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60.0)
            except asyncio.CancelledError:
                if lost:
                    raise
                lost += 1

    tasks = BackgroundTask("test")
    tasks.start(work)
    await asyncio.sleep(0)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10.0):
            await tasks.end()
            assert lost == 1
            return
    raise AssertionError("the task did not end")
