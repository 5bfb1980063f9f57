"""Records when keys were last used: collected in memory, flushed every two seconds, at most once a minute per key.

Nothing depends on it: while the store is down the notes wait; at the bound the oldest are dropped.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

import orjson

from keyproxy.model import Identity, Moment
from keyproxy.store.background import BackgroundTask
from keyproxy.store.postgres.database import Database, StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

_MARK_SECONDS: Final = 60.0
_FLUSH_SECONDS: Final = 2.0
_WAITING_MAX: Final = 200_000
_BATCH_MAX: Final = 5_000

#: A paced flush writes 20 notes per statement, or more if this would take too many statements. 1,000 notes keep a core of
#: the server busy for 60 ms, since the audit compares each updated key, and would delay requests of proxies on the same
#: machine; 20 take 1.3 ms, and it serves others in the pauses.
_PORTION: Final = 20
_PORTIONS_MAX: Final = 100
_PAUSE_SECONDS: Final = 0.005


class Markable(Protocol):
    """A cached key with the time from which its next use is recorded."""

    mark_due: float
    identity: Identity


class LastUsed:
    """Collects and flushes the times of last use: see the module."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: dict[str, float] = {}
        self.lasting = BackgroundTask("last_used")

    def mark(self, entry: Markable, now: Moment) -> None:
        """Record a use of this key. Called only when a note is due."""
        entry.mark_due = now.mono_seconds + _MARK_SECONDS
        # Full: drop the oldest note; the key's next use makes a new one.
        if len(self._waiting) >= _WAITING_MAX:
            del self._waiting[next(iter(self._waiting))]
        self._waiting[entry.identity.key_id] = now.wall_seconds

    def start(self) -> None:
        """Start the periodic flush."""
        self.lasting.start(self._write_forever)

    async def close(self) -> None:
        """Stop, and flush if the store is up."""
        await self.lasting.end()
        if not self._database.is_down:
            await self.flush()

    async def flush(self, *, is_paced: bool = False) -> None:
        """Write all collected notes, in batches. `is_paced`: in small ones, with pauses between them."""
        waiting, self._waiting = self._waiting, {}
        items = list(waiting.items())
        portion = max(_PORTION, -(-len(items) // _PORTIONS_MAX)) if is_paced else _BATCH_MAX
        written = 0
        try:
            while written < len(items):
                if is_paced and written:
                    await asyncio.sleep(_PAUSE_SECONDS)
                notes = dict(items[written : written + portion])
                times = orjson.dumps(notes, option=orjson.OPT_NON_STR_KEYS).decode()
                await self._database.fetch("mark_used", list(notes), times)
                written += len(notes)
        except (StoreUnavailable, StoreConflict) as error:
            _log.debug("last use of %d keys could not be written, retrying: %s", len(items) - written, error)
        finally:
            self._wait_again(dict(items[written:]))

    def _wait_again(self, notes: dict[str, float]) -> None:
        """Put notes that were not written before those made meanwhile, within the bound."""
        if not notes:
            return
        self._waiting = notes | self._waiting
        while len(self._waiting) > _WAITING_MAX:
            del self._waiting[next(iter(self._waiting))]

    async def _write_forever(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            if not self._database.is_down:
                await self.flush(is_paced=True)
