"""The metrics of an admin process: queried from the database and cached briefly."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Final

from keyproxy.admin.reminder_sender import ReminderSender
from keyproxy.metrics.control import ControlCatalogue, Standing, Traffic
from keyproxy.store.postgres.database import StoreUnavailable

_WITHIN_DAYS: Final = (1, 7, 30)
_REMEMBERED_SECONDS: Final = 15.0

#: Maximum number of tokens with a series: those that expire first.
_TOKENS_MAX: Final = 100


class MetricsPage:
    """The metrics page. It queries the database at most once every 15 seconds."""

    def __init__(self, reminding: ReminderSender, now_mono: Callable[[], float], traffic: Traffic) -> None:
        self._reminding = reminding
        self._now_mono = now_mono
        self._catalogue = ControlCatalogue(traffic)
        self._asking = asyncio.Lock()
        self._standing: Standing | None = None
        self._good_until_mono = 0.0

    async def page(self) -> bytes:
        """Return the page in the Prometheus text format."""
        async with self._asking:
            if self._standing is None or self._now_mono() >= self._good_until_mono:
                self._standing = await self._asked()
                self._good_until_mono = self._now_mono() + _REMEMBERED_SECONDS
        return self._catalogue.render(self._standing, dataclasses.asdict(self._reminding.total))

    async def _asked(self) -> Standing | None:
        reminders = self._reminding.reminders
        try:
            return Standing(
                keys=await reminders.expiring(_WITHIN_DAYS),
                tokens=await reminders.expiring_tokens(_WITHIN_DAYS),
                token_expiries=await reminders.token_expiries(_TOKENS_MAX),
                reminders_waiting=await reminders.count_waiting(),
            )
        except StoreUnavailable:
            return None
