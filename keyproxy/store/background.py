"""Work that lasts as long as the process does: whatever it fails of, it is begun again.

A task that an exception has ended says so to nobody, and whoever waits for its work waits in vain from then on. What is
foreseen, a store that cannot be asked, is each work's own to deal with; this is for what is not. The traceback is logged,
the defect counted, the work told of it, so that nobody waits for what was under way; and after a pause it begins anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

_log = logging.getLogger(__name__)

_PAUSE_SECONDS: Final = 1.0


class BackgroundTask:
    """The lasting work of one part of the store. `defects`: how often it ended in what nobody had foreseen."""

    def __init__(self, what: str) -> None:
        """`what` it is, for the log and for metrics."""
        self.defects = 0
        self.what = what
        self._tasks: list[asyncio.Task[None]] = []

    def start(
        self, work: Callable[[], Awaitable[None]], failed: Callable[[Exception], None] | None = None, *,
        pause_seconds: float = _PAUSE_SECONDS,
    ) -> None:  # fmt: skip
        """Do some work, which never ends by itself, until `end`. `failed` is told of a defect before the pause."""
        self._tasks.append(asyncio.get_running_loop().create_task(self._last(work, failed, pause_seconds)))

    async def end(self) -> None:
        """Cancel all of it, and wait until it has ended."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

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
        _log.error("a defect ended the work of %s; it begins again", self.what, exc_info=error)
        if failed is None:
            return
        try:
            failed(error)
        except Exception:  # noqa: BLE001 - the outermost boundary of a task, again: this must not end it
            _log.exception("a defect while dealing with a defect of %s", self.what)
