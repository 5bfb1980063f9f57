"""Marks approvals as expired, and deletes approvals, consents and events a month after they ended."""

from __future__ import annotations

import asyncio
import random
from typing import Final

from keyproxy.store.background import BackgroundTask
from keyproxy.store.housekeeping import Chore
from keyproxy.store.postgres.database import StatementRunner

_TEND_SECONDS: Final = 60.0
_PORTION: Final = 1_000


class ApprovalCleanup:
    """Tends the tables once a minute."""

    def __init__(self, database: StatementRunner) -> None:
        self.lasting = BackgroundTask("approval_cleanup")
        self.tending = Chore("approvals", "delete old approvals, consents and events", portion=_PORTION)
        self._database = database

    def start(self) -> None:
        """Start the background task."""
        self.lasting.start(self._tend_forever, pause_seconds=_TEND_SECONDS)

    async def close(self) -> None:
        """Stop the background task."""
        await self.lasting.end()

    async def tend(self, portion: int = _PORTION) -> bool:
        """Tend one portion. Return whether there may be more."""
        (row,) = await self._database.fetch("tend_approvals", portion)
        return bool(row["is_more"])

    async def _tend_forever(self) -> None:
        while True:
            # Not at the same time in all processes.
            await asyncio.sleep(_TEND_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
            await self.tending.finish(self.tend)
