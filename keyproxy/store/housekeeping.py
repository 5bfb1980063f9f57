"""Background cleanup of the store's tables: ends or deletes expired rows, one portion at a time.

One statement never does all overdue work: once that took longer than the statement timeout, it would always fail, and
the table would grow forever. A failed portion is retried at half its size. Failures show in three places: a log line
at warning when they begin and one when they end, `/readyz`, and the metric keyproxy_housekeeping_failures_total.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from keyproxy.store.postgres.database import StoreConflict, StoreUnavailable
from keyproxy.store.postgres.failures import means_move

_log = logging.getLogger(__name__)

_PORTION_MIN: Final = 10

#: Pause between two portions, so that a backlog leaves database capacity for requests.
_PAUSE_SECONDS: Final = 0.2


class Chore:
    """One kind of cleanup. `failures`: how many portions failed; `failing_because`: why the latest failed, or empty."""

    def __init__(self, name: str, what: str, *, portion: int) -> None:
        """`name` is the metric's label, `what` completes "cannot …" in the log."""
        self.name = name
        self.what = what
        self.failures = 0
        self.failing_because = ""
        self._portion_max = self._portion = portion
        self._is_logged = False

    def __repr__(self) -> str:
        return f"<Chore {self.name}: portion {self._portion}, {self.failures} failures>"

    async def finish(self, work: Callable[[int], Awaitable[bool]]) -> bool:
        """Call `work` with a size until it returns that nothing is left. Whether no call failed."""
        while await self.advance(work):
            if self.failing_because:
                return False
            await asyncio.sleep(_PAUSE_SECONDS)
        return True

    async def advance(self, work: Callable[[int], Awaitable[bool]]) -> bool:
        """Call `work` once. Whether more is left to do, which is always true after a failure."""
        try:
            is_more = await work(self._portion)
        except (StoreUnavailable, StoreConflict) as error:
            self._note_failure(error)
            return True
        if self._is_logged:
            _log.warning("recovered, continuing to %s", self.what)
        self.failing_because, self._is_logged = "", False
        if not is_more:
            self._portion = self._portion_max
        return is_more

    def _note_failure(self, error: Exception) -> None:
        self.failures += 1
        self._portion = max(min(_PORTION_MIN, self._portion_max), self._portion // 2)
        if means_move(error.__cause__):
            # A database outage, which is logged once for all components.
            _log.debug("cannot %s, retrying: %s", self.what, error)
        elif not self._is_logged:
            _log.warning("cannot %s, retrying: %s", self.what, error)
            self._is_logged = True
        self.failing_because = str(error) or type(error).__name__
