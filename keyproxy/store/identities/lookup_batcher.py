"""Looks values up in the store: at most one lookup at a time for each subject, and one query for a batch of them.

A subject is a key or an agent token by its digest, a key with the user that it acts for, or an id that a tenant may own.
All requests with the same subject share one lookup, and a few concurrent queries serve all waiting subjects in batches.
So neither a flood of unknown keys nor the recovery of the store becomes a stampede.

If a change arrives from the feed while a lookup is under way, its result is discarded and the lookup repeated. A query
that starts after the feed has delivered a change returns a result that includes the change.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final, Generic, TypeAlias, TypeVar

from keyproxy.platform.tasks import cancel_all
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.postgres.database import Database, Row, StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

_Subject = TypeVar("_Subject", bound=Hashable)

#: A kind of group and its name.
Group: TypeAlias = tuple[str, Hashable]

_BATCH_MAX: Final = 500

#: How many subjects may wait for a lookup. Beyond this, requests with ones that are not cached are refused, not queued.
_WAITING_MAX: Final = 10_000

#: How many subjects of one share, such as the users that one key acts for, may wait for a lookup.
_SHARE_MAX: Final = 1_000

#: How often to repeat the lookup of a subject that changes during each one, before its requests are refused.
_ATTEMPTS_MAX: Final = 5


#: The errors that reading a row raises if it contains values that this program never writes.
UNUSABLE: Final = (ValueError, TypeError, ArithmeticError, LookupError, RecursionError)


def _no_groups(_subject: object) -> Sequence[Group]:
    return ()


class LookupQuery(Generic[_Subject]):
    """The query for a batch of subjects, and how to read its rows.

    `plural` and `name`: what messages call the subjects, and the subject of a row. `groups`: the users, tenants or sets
    that the result depends on beside the subject itself; `groups_of_subject`: those that it depends on without a row too.
    `share`: what the subject belongs to that may have only some subjects waiting; None: there is no such bound.
    """

    def __init__(
        self,
        statement: str,
        plural: str,
        *,
        parameters: Callable[[list[_Subject]], Sequence[object]],
        subject: Callable[[Row], _Subject],
        name: Callable[[Row], str],
        groups: Callable[[Row], Sequence[Group]],
        groups_of_subject: Callable[[_Subject], Sequence[Group]] = _no_groups,
        share: Callable[[_Subject], Hashable] | None = None,
    ) -> None:
        self.statement: Final = statement
        self.plural: Final = plural
        self.parameters: Final = parameters
        self.subject: Final = subject
        self.name: Final = name
        self.groups: Final = groups
        self.groups_of_subject: Final = groups_of_subject
        self.share: Final = share


class Flight:
    """The lookup of one subject.

    `row`: its result, from which `kept` was made when the feed had delivered `settled_at_change` changes. `share`: the
    bound under which the subject waits.
    """

    __slots__ = (
        "_has_ended",
        "_loop",
        "_refusal",
        "_result",
        "_waiting",
        "attempts",
        "has_changed",
        "kept",
        "queried_at_change",
        "row",
        "settled_at_change",
        "share",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, share: Hashable | None) -> None:
        self.share = share
        self.queried_at_change = 0
        self.attempts = 0
        self.has_changed = False
        self.row: Row | None = None
        self.kept: object = None
        self.settled_at_change = -1
        self._loop = loop
        self._waiting: list[Callable[[Flight, Refusal | None], None]] = []
        self._result: asyncio.Future[Refusal | None] | None = None
        self._has_ended = False
        self._refusal: Refusal | None = None

    @property
    def result(self) -> asyncio.Future[Refusal | None]:
        """Resolves to None on success, or to a Refusal with the reason of the failure."""
        if self._result is None:
            self._result = self._loop.create_future()
            if self._has_ended:
                self._result.set_result(self._refusal)
        return self._result

    def call_at_end(self, ended: Callable[[Flight, Refusal | None], None]) -> None:
        """Call this in a later iteration of the event loop than the one in which the lookup ends."""
        self._waiting.append(ended)

    def end(self, refusal: Refusal | None) -> None:
        """The lookup has ended, with this refusal if it failed."""
        self._has_ended, self._refusal = True, refusal
        if self._result is not None and not self._result.done():
            self._result.set_result(refusal)
        for ended in self._waiting:
            self._loop.call_soon(ended, self, refusal)
        self._waiting = []


class LookupBatcher(Generic[_Subject]):
    """Shares and batches lookups: see the module."""

    def __init__(
        self,
        database: Database,
        query: LookupQuery[_Subject],
        settle: Callable[[_Subject, Row | None], object],
        *,
        look_ups_max: int,
        others: Mapping[type, LookupQuery[Any]] | None = None,
    ) -> None:
        """`settle` receives each result, None for a subject without a row, and returns what it keeps. `look_ups_max`: how
        many queries may run at once. `others`: the queries for subjects of other types than those that `query` is for."""
        self._database = database
        self._query = query
        self._others = dict(others or {})
        self._shares: collections.Counter[Hashable] = collections.Counter()
        self._settle = settle
        self._look_ups_max = look_ups_max
        self._flights: dict[_Subject, Flight] = {}
        self._waiting: collections.deque[_Subject] = collections.deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._working = 0
        self._changes = 0
        self._changed_groups: dict[Group, int] = {}

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
            raise self.too_many(subject)
        # A cancelled request must not cancel the lookup for the others.
        refusal = await asyncio.shield(flight.result)
        if refusal is not None:
            raise Refusal(refusal.reason, refusal.detail)
        if self.is_current(flight) and not is_kept():
            self._settle(subject, flight.row)

    def is_current(self, flight: Flight) -> bool:
        """Whether nothing has changed since the result was settled."""
        return flight.settled_at_change == self._changes

    def too_many(self, subject: _Subject) -> Refusal:
        """The refusal if `enqueue` has no room for this subject."""
        return Refusal(Reason.OVERLOADED, f"too many {self._query_for(subject).plural} are waiting for a lookup")

    def enqueue(self, subject: _Subject, *, is_known: bool) -> Flight | None:
        """Join the lookup of this subject or start one; None if too many are waiting already."""
        flight = self._flights.get(subject)
        if flight is not None:
            return flight
        share = None
        if not is_known:
            share_of = self._query_for(subject).share
            share = None if share_of is None else share_of(subject)
            if len(self._waiting) >= _WAITING_MAX or (share is not None and self._shares[share] >= _SHARE_MAX):
                return None
        loop = asyncio.get_running_loop()
        flight = self._flights[subject] = Flight(loop, share)
        if share is not None:
            self._shares[share] += 1
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

    def group_changed(self, kind: str, name: Hashable) -> None:
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

    def _query_for(self, subject: _Subject) -> LookupQuery[Any]:
        return self._others.get(type(subject), self._query)

    def _by_query(self, subjects: Sequence[_Subject]) -> list[tuple[LookupQuery[Any], list[_Subject]]]:
        """The queries with the subjects that each is for, without those that are no longer looked up."""
        batches: dict[int, tuple[LookupQuery[Any], list[_Subject]]] = {}
        for subject in subjects:
            if subject in self._flights:
                query = self._query_for(subject)
                batches.setdefault(id(query), (query, []))[1].append(subject)
        return list(batches.values())

    async def _look_up_waiting(self) -> None:
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(_BATCH_MAX, len(self._waiting)))]
            batches = self._by_query(taken)
            try:
                while batches:
                    await self._look_up(*batches[0])
                    del batches[0]
            except (StoreUnavailable, StoreConflict) as error:
                # The waiting subjects would fail in the same way.
                self._finish([*_subjects(batches), *self._waiting], Refusal(Reason.STORE_UNAVAILABLE, str(error)))
            except asyncio.CancelledError:
                self._finish(_subjects(batches), Refusal(Reason.STORE_UNAVAILABLE, "shutting down"))
                raise
            except Exception:  # noqa: BLE001 - the outermost boundary of this task; no request may wait forever
                plural = batches[0][0].plural
                _log.exception("lookup of %s failed", plural)
                failure = Refusal(Reason.INTERNAL_ERROR, f"lookup of {plural} failed")
                self._finish([*_subjects(batches), *self._waiting], failure)

    async def _look_up(self, query: LookupQuery[Any], batch: list[_Subject]) -> None:
        for subject in batch:
            flight = self._flights[subject]
            flight.queried_at_change, flight.has_changed = self._changes, False
        rows = await self._database.fetch(query.statement, *query.parameters(batch))
        self._install(query, batch, {query.subject(row): row for row in rows})

    def _finish(self, subjects: Sequence[_Subject], refusal: Refusal | None) -> None:
        for subject in subjects:
            flight = self._flights.pop(subject, None)
            if flight is None:
                continue
            if flight.share is not None:
                self._shares[flight.share] -= 1
                if not self._shares[flight.share]:
                    del self._shares[flight.share]
            flight.end(refusal)
        if refusal is not None:
            self._waiting = collections.deque(subject for subject in self._waiting if subject in self._flights)
        if not self._flights:
            self._changed_groups.clear()

    def _install(self, query: LookupQuery[Any], batch: Sequence[_Subject], found: dict[_Subject, Row]) -> None:
        settled, given_up, unusable = [], [], []
        for subject in batch:
            flight, row = self._flights[subject], found.get(subject)
            if not (flight.has_changed or (self._changed_groups and self._is_outdated(query, subject, flight, row))):
                try:
                    flight.kept = self._settle(subject, row)
                except UNUSABLE as error:
                    name = None if row is None else query.name(row)
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
            detail = f"one of the {query.plural} changes faster than it can be read"
            self._finish(given_up, Refusal(Reason.STORE_UNAVAILABLE, detail))

    def _is_outdated(self, query: LookupQuery[Any], subject: _Subject, flight: Flight, row: Row | None) -> bool:
        """Whether a group that this result depends on has changed since the query started."""
        groups = [*query.groups_of_subject(subject), *(() if row is None else query.groups(row))]
        return any(self._changed_groups.get(group, 0) > flight.queried_at_change for group in groups)


def _subjects(batches: Sequence[tuple[LookupQuery[Any], list[_Subject]]]) -> list[_Subject]:
    return [subject for _, batch in batches for subject in batch]
