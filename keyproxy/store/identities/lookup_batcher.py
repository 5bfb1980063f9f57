"""Looks values up in the store: at most one lookup at a time for each subject, and one query for a batch of them.

A subject is a key by its digest, or an id that a tenant may own. All requests with the same subject share one lookup, and
a few concurrent queries serve all waiting subjects in batches. So neither a flood of unknown keys nor the recovery of the
store becomes a stampede.

If a change arrives from the feed while a lookup is under way, its result is discarded and the lookup repeated. A query
that starts after the feed has delivered a change returns a result that includes the change.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from keyproxy.platform.tasks import cancel_all
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.postgres.database import Database, Row, StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

_Subject = TypeVar("_Subject", bound=Hashable)

_BATCH_MAX: Final = 500

#: How many subjects may wait for a lookup. Beyond this, requests with ones that are not cached are refused, not queued.
_WAITING_MAX: Final = 10_000

#: How often to repeat the lookup of a subject that changes during each one, before its requests are refused.
_ATTEMPTS_MAX: Final = 5


#: The errors that reading a row raises if it contains values that this program never writes.
UNUSABLE: Final = (ValueError, TypeError, ArithmeticError, LookupError, RecursionError)


@dataclass(frozen=True, slots=True)
class LookupQuery(Generic[_Subject]):
    """The query for a batch of subjects, and how to read its rows.

    `plural` and `name`: what messages call the subjects, and the subject of a row. `groups`: the users, tenants or sets
    that the result depends on beside the subject itself.
    """

    statement: str
    plural: str
    parameters: Callable[[list[_Subject]], Sequence[object]]
    subject: Callable[[Row], _Subject]
    name: Callable[[Row], str]
    groups: Callable[[Row], Sequence[tuple[str, str]]]


class _Flight:
    """The lookup of one subject. `result` resolves to None on success, or to a Refusal with the reason of the failure.

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


class LookupBatcher(Generic[_Subject]):
    """Shares and batches lookups: see the module."""

    def __init__(
        self,
        database: Database,
        query: LookupQuery[_Subject],
        settle: Callable[[_Subject, Row | None], None],
        *,
        look_ups_max: int,
    ) -> None:
        """`settle` receives each result, None for a subject without a row. `look_ups_max`: how many queries may run at
        once."""
        self._database = database
        self._query = query
        self._settle = settle
        self._look_ups_max = look_ups_max
        self._flights: dict[_Subject, _Flight] = {}
        self._waiting: collections.deque[_Subject] = collections.deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._working = 0
        self._changes = 0
        self._changed_groups: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        """How many subjects are being looked up."""
        return len(self._flights)

    async def fetch_missing(self, subject: _Subject, *, is_known: bool, is_kept: Callable[[], bool]) -> None:
        """Look a subject up and wait until the result is settled. Raises a Refusal if there is none.

        A full cache may evict the result before all waiting requests have run; if `is_kept` returns false, the result is
        settled again.
        """
        flight = self.enqueue(subject, is_known=is_known)
        if flight is None:
            raise Refusal(Reason.OVERLOADED, f"too many {self._query.plural} are waiting for a lookup")
        # A cancelled request must not cancel the lookup for the others.
        refusal = await asyncio.shield(flight.result)
        if refusal is not None:
            raise Refusal(refusal.reason, refusal.detail)
        if flight.settled_at_change == self._changes and not is_kept():
            self._settle(subject, flight.row)

    def enqueue(self, subject: _Subject, *, is_known: bool) -> _Flight | None:
        """Join the lookup of this subject or start one; None if too many are waiting already."""
        flight = self._flights.get(subject)
        if flight is not None:
            return flight
        if len(self._waiting) >= _WAITING_MAX and not is_known:
            return None
        loop = asyncio.get_running_loop()
        flight = self._flights[subject] = _Flight(loop.create_future())
        # Cached subjects first: their callers were verified before.
        if is_known:
            self._waiting.appendleft(subject)
        else:
            self._waiting.append(subject)
        if self._working < self._look_ups_max:
            self._working += 1
            task = loop.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return flight

    def subject_changed(self, subject: _Subject) -> None:
        """Discard the result of a lookup of this subject that is under way."""
        self._changes += 1
        flight = self._flights.get(subject)
        if flight is not None:
            flight.has_changed = True

    def group_changed(self, kind: str, name: str) -> None:
        """Discard the results of lookups under way that depend on this group."""
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
            batch = [subject for subject in taken if subject in self._flights]
            for subject in batch:
                flight = self._flights[subject]
                flight.queried_at_change, flight.has_changed = self._changes, False
            try:
                rows = await self._database.fetch(self._query.statement, *self._query.parameters(batch))
                self._install(batch, {self._query.subject(row): row for row in rows})
            except (StoreUnavailable, StoreConflict) as error:
                # The waiting subjects would fail in the same way.
                self._finish([*batch, *self._waiting], Refusal(Reason.STORE_UNAVAILABLE, str(error)))
            except asyncio.CancelledError:
                self._finish(batch, Refusal(Reason.STORE_UNAVAILABLE, "shutting down"))
                raise
            except Exception:  # noqa: BLE001 - the outermost boundary of this task; no request may wait forever
                _log.exception("lookup of %s failed", self._query.plural)
                failure = Refusal(Reason.INTERNAL_ERROR, f"lookup of {self._query.plural} failed")
                self._finish([*batch, *self._waiting], failure)

    def _finish(self, subjects: Sequence[_Subject], refusal: Refusal | None) -> None:
        for subject in subjects:
            flight = self._flights.pop(subject, None)
            if flight is not None and not flight.result.done():
                flight.result.set_result(refusal)
        if refusal is not None:
            self._waiting = collections.deque(subject for subject in self._waiting if subject in self._flights)
        if not self._flights:
            self._changed_groups.clear()

    def _install(self, batch: Sequence[_Subject], found: dict[_Subject, Row]) -> None:
        settled, given_up, unusable = [], [], []
        for subject in batch:
            flight, row = self._flights[subject], found.get(subject)
            if not self._is_outdated(flight, row):
                try:
                    self._settle(subject, row)
                except UNUSABLE as error:
                    name = None if row is None else self._query.name(row)
                    _log.error("the row of %s is invalid, refusing requests that need it: %s", name, error)
                    unusable.append(subject)
                    continue
                flight.row, flight.settled_at_change = row, self._changes
                settled.append(subject)
            elif flight.attempts < _ATTEMPTS_MAX:
                flight.attempts += 1
                self._waiting.append(subject)
            else:
                given_up.append(subject)
        self._finish(settled, None)
        if unusable:
            self._finish(unusable, Refusal(Reason.INTERNAL_ERROR, "a row of the store is invalid"))
        if given_up:
            detail = f"one of the {self._query.plural} changes faster than it can be read"
            self._finish(given_up, Refusal(Reason.STORE_UNAVAILABLE, detail))

    def _is_outdated(self, flight: _Flight, row: Row | None) -> bool:
        """Whether something that this result depends on has changed since the query started."""
        if flight.has_changed:
            return True
        if row is None or not self._changed_groups:
            return False
        return any(self._changed_groups.get(group, 0) > flight.queried_at_change for group in self._query.groups(row))
