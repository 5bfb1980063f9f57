"""The ways in which tests wait for a condition: polling, with a deadline and a message."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from tests.running_process import RunningProcess

_POLL_SECONDS = 0.005


async def until(
    condition: Callable[[], bool | Awaitable[bool]],
    what: str = "the condition holds",
    *,
    seconds: float = 10.0,
    pause_seconds: float = _POLL_SECONDS,
    while_running: RunningProcess | None = None,
) -> None:
    """Wait until the condition is true. Fails with `what` after the deadline, or when the process has ended."""
    deadline = time.monotonic() + seconds
    async with asyncio.timeout(seconds + 1.0):  # for a condition that never returns
        while not await _holds(condition):
            assert while_running is None or while_running.returncode is None, "the process has ended"
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
            await asyncio.sleep(pause_seconds)


async def _holds(condition: Callable[[], bool | Awaitable[bool]]) -> bool:
    holds = condition()
    return await holds if isinstance(holds, Awaitable) else holds


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 20.0) -> None:
    """As `until`, without an event loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(_POLL_SECONDS)
