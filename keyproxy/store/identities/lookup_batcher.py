"""Looks keys up in the store: at most one lookup at a time for each key, and one query for a batch of keys.

All requests with the same key share one lookup, and a few concurrent queries serve all waiting keys in batches. So
neither a flood of unknown keys nor the recovery of the store becomes a stampede.

If a change arrives from the feed while a lookup is under way, its result is discarded and the lookup repeated. A query
that starts after the feed has delivered a change returns a result that includes the change.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable, Sequence
from typing import Final

from keyproxy.model import KeyDigest
from keyproxy.platform.tasks import cancel_all
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.postgres.database import Database, Row, StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

_BATCH_MAX: Final = 500

#: How many keys may wait for a lookup. Beyond this, requests with keys that are not cached are refused, not queued.
_WAITING_MAX: Final = 10_000

#: How often to repeat the lookup of a key that changes during each one, before its requests are refused.
_ATTEMPTS_MAX: Final = 5


#: The errors that reading a row raises if it contains values that this program never writes.
UNUSABLE: Final = (ValueError, TypeError, ArithmeticError, LookupError, RecursionError)


class _Flight:
    """The lookup of one key. `result` resolves to None on success, or to a Refusal with the reason of the failure.

    `row` is the result, settled when the feed had delivered `settled_at_change` changes.
    """

    __slots__ = ("attempts", "has_changed", "queried_at_change", "result", "row", "settled_at_change")

    def __init__(self, result: asyncio.Future[Refusal | None]) -> None:
        self.result = result
        self.queried_at_change = 0
        self.attempts = 0
        self.has_changed = False
        self.row: Row | None = None
        self.settled_at_change = -1


class LookupBatcher:
    """Shares and batches the lookups of keys: see the module."""

    def __init__(
        self, database: Database, settle: Callable[[KeyDigest, Row | None], None], *, look_ups_max: int
    ) -> None:
        """`settle` receives each result, None for "no such key". `look_ups_max`: how many queries may run at once."""
        self._database = database
        self._settle = settle
        self._look_ups_max = look_ups_max
        self._flights: dict[KeyDigest, _Flight] = {}
        self._waiting: collections.deque[KeyDigest] = collections.deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._working = 0
        self._changes = 0
        self._changed_groups: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        """How many keys are being looked up."""
        return len(self._flights)

    async def fetch_missing(self, digest: KeyDigest, *, is_known: bool, is_kept: Callable[[], bool]) -> None:
        """Look a key up and wait until the result is settled. Raises a Refusal if there is none.

        A full cache may evict the result before all waiting requests have run; if `is_kept` returns false, the result is
        settled again.
        """
        flight = self.enqueue(digest, is_known=is_known)
        if flight is None:
            raise Refusal(Reason.OVERLOADED, "too many keys are waiting for a lookup")
        # A cancelled request must not cancel the lookup for the others.
        refusal = await asyncio.shield(flight.result)
        if refusal is not None:
            raise Refusal(refusal.reason, refusal.detail)
        if flight.settled_at_change == self._changes and not is_kept():
            self._settle(digest, flight.row)

    def enqueue(self, digest: KeyDigest, *, is_known: bool) -> _Flight | None:
        """Join the lookup of this key or start one; None if too many are waiting already."""
        flight = self._flights.get(digest)
        if flight is not None:
            return flight
        if len(self._waiting) >= _WAITING_MAX and not is_known:
            return None
        loop = asyncio.get_running_loop()
        flight = self._flights[digest] = _Flight(loop.create_future())
        # Cached keys first: their callers are known customers.
        if is_known:
            self._waiting.appendleft(digest)
        else:
            self._waiting.append(digest)
        if self._working < self._look_ups_max:
            self._working += 1
            task = loop.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return flight

    def key_changed(self, digest: KeyDigest) -> None:
        """Discard the result of a lookup of this key that is under way."""
        self._changes += 1
        flight = self._flights.get(digest)
        if flight is not None:
            flight.has_changed = True

    def group_changed(self, kind: str, name: str) -> None:
        """Discard the results of lookups under way that depend on this user or tenant."""
        self._changes += 1
        if self._flights:
            self._changed_groups[kind, name] = self._changes

    def all_changed(self) -> None:
        """Discard the results of all lookups under way."""
        self._changes += 1
        for flight in self._flights.values():
            flight.has_changed = True

    async def close(self) -> None:
        """Cancel all lookups. Requests that wait for one are refused with STORE_UNAVAILABLE."""
        await cancel_all(self._tasks)
        self._finish(list(self._flights), Refusal(Reason.STORE_UNAVAILABLE, "shutting down"))

    async def _work(self) -> None:
        try:
            await self._look_up_waiting()
        finally:
            # Here, not in a done callback, which runs later: a key that arrives in between would wait forever.
            self._working -= 1

    async def _look_up_waiting(self) -> None:
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(_BATCH_MAX, len(self._waiting)))]
            batch = [digest for digest in taken if digest in self._flights]
            for digest in batch:
                flight = self._flights[digest]
                flight.queried_at_change, flight.has_changed = self._changes, False
            try:
                rows = await self._database.fetch("identities_by_digest", batch)
                self._install(batch, {KeyDigest(row["digest"]): row for row in rows})
            except (StoreUnavailable, StoreConflict) as error:
                # The waiting keys would only meet the same failure.
                self._finish([*batch, *self._waiting], Refusal(Reason.STORE_UNAVAILABLE, str(error)))
            except asyncio.CancelledError:
                self._finish(batch, Refusal(Reason.STORE_UNAVAILABLE, "shutting down"))
                raise
            except Exception:  # noqa: BLE001 - the outermost boundary of this task; no request may wait forever
                _log.exception("lookup of keys failed")
                self._finish([*batch, *self._waiting], Refusal(Reason.INTERNAL_ERROR, "lookup of keys failed"))

    def _finish(self, digests: Sequence[KeyDigest], refusal: Refusal | None) -> None:
        for digest in digests:
            flight = self._flights.pop(digest, None)
            if flight is not None and not flight.result.done():
                flight.result.set_result(refusal)
        if refusal is not None:
            self._waiting = collections.deque(digest for digest in self._waiting if digest in self._flights)
        if not self._flights:
            self._changed_groups.clear()

    def _install(self, batch: Sequence[KeyDigest], found: dict[KeyDigest, Row]) -> None:
        settled, given_up, unusable = [], [], []
        for digest in batch:
            flight, row = self._flights[digest], found.get(digest)
            if not self._is_outdated(flight, row):
                try:
                    self._settle(digest, row)
                except UNUSABLE as error:
                    key_id = None if row is None else row["key_id"]
                    _log.error("the row of key %s is invalid, refusing requests with this key: %s", key_id, error)
                    unusable.append(digest)
                    continue
                flight.row, flight.settled_at_change = row, self._changes
                settled.append(digest)
            elif flight.attempts < _ATTEMPTS_MAX:
                flight.attempts += 1
                self._waiting.append(digest)
            else:
                given_up.append(digest)
        self._finish(settled, None)
        if unusable:
            self._finish(unusable, Refusal(Reason.INTERNAL_ERROR, "the row of the key is invalid"))
        if given_up:
            self._finish(given_up, Refusal(Reason.STORE_UNAVAILABLE, "the key changes faster than it can be read"))

    def _is_outdated(self, flight: _Flight, row: Row | None) -> bool:
        """Whether something that this result depends on has changed since the query started."""
        if flight.has_changed:
            return True
        if row is None or not self._changed_groups:
            return False
        groups = (("user", row["user_id"]), ("tenant", row["tenant_id"]))
        return any(self._changed_groups.get(group, 0) > flight.queried_at_change for group in groups)
