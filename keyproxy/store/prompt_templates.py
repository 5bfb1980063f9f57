"""The templates of instructions, all of them in memory: implements the port PromptTemplates.

They are read at start and whenever the change feed delivers a change. While the store is down they are served for
`stale_seconds`. A template that has changed and cannot be read is unavailable; the others are still served.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Final

from keyproxy.config.schema import Cache
from keyproxy.model import Moment
from keyproxy.ports.tenant_records import PromptTemplates
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.background import BackgroundTask
from keyproxy.store.postgres.database import Database, StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = (0.1, 0.2, 0.4, 0.8, 1.5)

#: With more changes than this, reading all templates is cheaper.
_CHANGES_MAX: Final = 500

_NOT_LOADED: Final = "the prompt templates are not loaded yet"


class TemplateCache(PromptTemplates):
    """All templates in memory: see the module."""

    def __init__(self, database: Database, cache: Cache, now: Callable[[], Moment]) -> None:
        self.lasting = BackgroundTask("prompt_templates")
        self._database = database
        self._stale_seconds = cache.stale_seconds
        self._now = now
        #: The category and the tenant of each digest; no tenant: all.
        self._table: dict[bytes, tuple[str, str | None]] = {}
        #: Until when they are served, in monotonic seconds, and why not after that.
        self._valid_until = 0.0
        self._unavailable_because = _NOT_LOADED
        self._wake = asyncio.Event()
        self._reading = asyncio.Lock()
        #: What has to be read: all, or these digests.
        self._is_all_changed = True
        self._changed: set[bytes] = set()
        #: Digests that have changed and could not be read.
        self._unreadable: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._table)

    def category(self, digest: bytes, tenant_id: str, now: Moment) -> str | None:
        """The category registered for the digest and visible to the tenant; None: unregistered. Never waits."""
        if now.mono_seconds >= self._valid_until:
            raise Refusal(Reason.STORE_UNAVAILABLE, self._unavailable_because)
        if digest in self._unreadable:
            raise Refusal(Reason.STORE_UNAVAILABLE, "the prompt template has changed and cannot be read")
        found = self._table.get(digest)
        if found is None:
            return None
        category, owner = found
        return category if owner is None or owner == tenant_id else None

    @property
    def is_loaded(self) -> bool:
        """Whether templates are served."""
        return self._now().mono_seconds < self._valid_until

    def start(self) -> None:
        """Start reading changes."""
        self.lasting.start(self._follow)

    async def close(self) -> None:
        """Stop reading changes."""
        await self.lasting.end()

    # -- called by the change feed

    def changed(self, digest: bytes) -> None:
        """This template was changed, created or deleted."""
        self._changed.add(digest)
        self._wake.set()

    def distrust_all(self) -> None:
        """Changes may have been missed: read all templates again."""
        self._is_all_changed = True
        self._wake.set()

    def forget_all(self) -> None:
        """Any template may have been changed: serve none before all are read again."""
        self._valid_until, self._unavailable_because = 0.0, "all prompt templates have changed and are not read yet"
        self.distrust_all()

    def confirm(self, mono_seconds: float) -> None:
        """At this time the feed had delivered all changes."""
        if self._valid_until and not self._is_all_changed and not self._changed:
            self._extend(mono_seconds)

    # -- reading

    async def read(self) -> None:
        """Read what has changed. Raises StoreUnavailable or StoreConflict; it is then still to be read."""
        # One at a time: an earlier result must not replace a later one.
        async with self._reading:
            is_all = self._is_all_changed or len(self._changed) > _CHANGES_MAX
            changed, self._changed, self._is_all_changed = self._changed, set(), False
            queried_at = self._now().mono_seconds
            rows = None
            try:
                if is_all:
                    rows = await self._database.fetch("prompt_templates")
                else:
                    rows = await self._database.fetch("prompt_templates_by_digest", list(changed))
            finally:
                if rows is None:
                    self._changed |= changed
                    self._unreadable |= changed
                    self._is_all_changed = self._is_all_changed or is_all
            found = {bytes(row["digest"]): (row["category"], row["tenant_id"]) for row in rows}
            if is_all:
                self._replace_all(found, queried_at)
            else:
                self._replace(changed, found)

    def _replace_all(self, found: dict[bytes, tuple[str, str | None]], queried_at: float) -> None:
        self._table = found
        self._unreadable &= self._changed
        # If all have changed again meanwhile, these may not be served.
        if not self._is_all_changed:
            self._extend(queried_at)

    def _replace(self, changed: Collection[bytes], found: dict[bytes, tuple[str, str | None]]) -> None:
        for digest in changed:
            self._table.pop(digest, None)
        self._table.update(found)
        self._unreadable -= set(changed) - self._changed

    def _extend(self, mono_seconds: float) -> None:
        self._valid_until = mono_seconds + self._stale_seconds
        self._unavailable_because = f"the prompt templates were last read more than {self._stale_seconds:g} s ago"

    async def _follow(self) -> None:
        failures = 0
        while True:
            await self._wake.wait()
            # Cleared before reading, so that a change during it causes another reading.
            self._wake.clear()
            try:
                await self.read()
                failures = 0
            except (StoreUnavailable, StoreConflict) as error:
                _log.debug("reading the prompt templates failed, retrying: %s", error)
                self._wake.set()
                await asyncio.sleep(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
                failures += 1
