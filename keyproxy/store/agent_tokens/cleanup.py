"""Deletes agent tokens, with their windows, and signing keys a day after they ended."""

from __future__ import annotations

import asyncio
import random
from typing import Final

from keyproxy.store.background import BackgroundTask
from keyproxy.store.housekeeping import Chore
from keyproxy.store.postgres.database import StatementRunner

_TEND_SECONDS: Final = 600.0
_RETRY_SECONDS: Final = 60.0
_PORTION: Final = 1_000


class AgentTokenCleanup:
    """Deletes what ended, every ten minutes."""

    def __init__(self, database: StatementRunner) -> None:
        self.lasting = BackgroundTask("agent_tokens")
        self.tending = Chore("agent_tokens", "delete expired agent tokens and signing keys", portion=_PORTION)
        self._database = database

    def start(self) -> None:
        """Start the background task."""
        self.lasting.start(self._tend_forever, pause_seconds=_RETRY_SECONDS)

    async def close(self) -> None:
        """Stop the background task."""
        await self.lasting.end()

    async def tend(self, portion: int = _PORTION) -> bool:
        """Delete one portion. Return whether there may be more."""
        (row,) = await self._database.fetch("tend_agent_tokens", portion)
        return bool(row["is_more"])

    async def _tend_forever(self) -> None:
        pause = _TEND_SECONDS
        while True:
            # Not at the same time in all processes.
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
            pause = _TEND_SECONDS if await self.tending.finish(self.tend) else _RETRY_SECONDS
