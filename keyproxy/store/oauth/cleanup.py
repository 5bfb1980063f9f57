"""Deletes codes, tokens, sessions, grants and clients of OAuth that have ended, once a minute.

Several processes may run this; only one works at a time. A call looks for unused grants and clients, and for sessions
with too many refresh tokens, in the next 10,000 rows of each table, so that its duration does not depend on their number.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from datetime import datetime
from typing import Final

from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.store.housekeeping import Chore
from keyproxy.store.postgres.database import StatementRunner

_TEND_SECONDS: Final = 60.0
_PORTION: Final = 1_000


class OAuthCleanup:
    """Tends the tables once a minute."""

    def __init__(
        self,
        database: StatementRunner,
        rules: OAuthSettings,
        *,
        sessions_expired: Callable[[int], None] = lambda _count: None,
        now: Callable[[], datetime] | None = None,
    ) -> None:
        """`sessions_expired`: called with the number of sessions that were deleted. `now`: None for the time of the
        database."""
        self.tending = Chore("oauth", "delete expired OAuth sessions and tokens", portion=_PORTION)
        self._database = database
        self._rules = rules
        self._sessions_expired = sessions_expired
        self._now = now
        self._swept_to = ["", "", ""]

    async def run(self) -> None:
        """Tend the tables until cancelled."""
        while True:
            # Not at the same time in all processes.
            await asyncio.sleep(_TEND_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
            await self.tending.finish(self.tend)

    async def tend(self, portion: int = _PORTION) -> bool:
        """Delete one portion of each table. Return whether there may be more."""
        now = None if self._now is None else self._now()
        (row,) = await self._database.fetch("tend_oauth", portion, self._rules.grant_days, self._swept_to, now)
        self._swept_to = row["next"]
        if row["sessions"]:
            self._sessions_expired(row["sessions"])
        return bool(row["is_more"])
