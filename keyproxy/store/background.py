"""Background tasks that run as long as the process does and are restarted after an unexpected error.

An asyncio task that ends with an exception does so silently, and everything that depends on it waits forever. Each task
handles expected failures, such as an unavailable store, by itself; this module handles unexpected ones. It logs the
traceback, counts the failure, calls the task's `failed` callback, so that nothing waits for results that were under way,
and restarts the task after a pause.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from keyproxy.platform.tasks import cancel_all

_log = logging.getLogger(__name__)

_PAUSE_SECONDS: Final = 1.0


class BackgroundTask:
    """The background tasks of one part of the store. `defects`: how often one failed unexpectedly."""

    def __init__(self, what: str) -> None:
        """`what` is the name in the log and in metrics."""
        self.defects = 0
        self.what = what
        self._tasks: list[asyncio.Task[None]] = []

    def start(
        self,
        work: Callable[[], Awaitable[None]],
        failed: Callable[[Exception], None] | None = None,
        *,
        pause_seconds: float = _PAUSE_SECONDS,
    ) -> None:
        """Run `work`, which never returns, until `end`. After an unexpected error, call `failed` before the pause."""
        self._tasks.append(asyncio.get_running_loop().create_task(self._last(work, failed, pause_seconds)))

    async def end(self) -> None:
        """Cancel all tasks and wait for them."""
        tasks, self._tasks = self._tasks, []
        await cancel_all(tasks)

    async def _last(
        self, work: Callable[[], Awaitable[None]], failed: Callable[[Exception], None] | None, pause_seconds: float
    ) -> None:
        while True:
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - the outermost boundary of a task
                self._note(error, failed)
            await asyncio.sleep(pause_seconds)

    def _note(self, error: Exception, failed: Callable[[Exception], None] | None) -> None:
        self.defects += 1
        _log.error("background task %s failed; restarting", self.what, exc_info=error)
        if failed is None:
            return
        try:
            failed(error)
        except Exception:  # noqa: BLE001 - the outermost boundary of a task: the callback must not end it
            _log.exception("background task %s: the failure callback failed", self.what)
