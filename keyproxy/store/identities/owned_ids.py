"""The cache of ownership in front of the store: which ids of the upstream's objects belong to which tenant.

`is_owned` decides from memory or raises Missing, which fetches the row from the store; it never waits. Entries are served
as those of the identity cache: fresh, then stale while the change feed is current or the store is down; an entry that the
feed changes is looked up again before it is served. There are three tables, each with a bound:

    owned      an id and the tenant that owns it.
    not owned  an id that the tenant does not own, although it owns others of the kind. Kept for unknown_seconds.
    nothing    a tenant and a kind of which it owns nothing: no id of that kind is looked up for that tenant.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Mapping
from typing import Final, NamedTuple, TypeVar

import cachetools

from keyproxy.ai.access.object_ids import is_object_id
from keyproxy.config.schema import Cache
from keyproxy.model import Missing, Moment
from keyproxy.ports.tenant_records import OwnedIds
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.identities.cache import FeedState, LookupCounts
from keyproxy.store.identities.lookup_batcher import LookupBatcher, LookupQuery
from keyproxy.store.postgres.database import Database, Row

_Key = TypeVar("_Key", bound=Hashable)


class OwnedId(NamedTuple):
    """An id that a tenant may own."""

    kind: str
    id: str
    tenant_id: str


def _groups(row: Row) -> list[tuple[str, str]]:
    """That a tenant owns nothing of a kind depends on all rows of that kind; anything else only on the row itself."""
    return [] if row["owns_any"] else [(row["tenant_id"], row["kind"])]


_BY_ID: Final = LookupQuery(
    "owners_by_id",
    "owned ids",
    parameters=lambda subjects: tuple(list(column) for column in zip(*subjects, strict=True)),
    subject=lambda row: OwnedId(row["kind"], row["id"], row["tenant_id"]),
    name=lambda row: f"{row['kind']} {row['id']}",
    groups=_groups,
)


class _Ownership:
    """One row of a table. Times are monotonic seconds."""

    __slots__ = ("fresh_until", "is_distrusted", "stale_until")

    def __init__(self, fresh_until: float, stale_until: float) -> None:
        self.fresh_until = fresh_until
        self.stale_until = stale_until
        self.is_distrusted = False


class OwnedIdCache(OwnedIds):
    """The cache of ownership: see the module. Implements the port OwnedIds."""

    def __init__(
        self, database: Database, cache: Cache, *, feed: FeedState, look_ups_max: int, now: Callable[[], Moment]
    ) -> None:
        """`look_ups_max`: how many queries may run at once. `now`: the clock."""
        self.counts = LookupCounts()
        self._database = database
        self._cache = cache
        self._feed = feed
        self._now = now
        self._owned: collections.OrderedDict[OwnedId, _Ownership] = collections.OrderedDict()
        self._nothing: collections.OrderedDict[tuple[str, str], _Ownership] = collections.OrderedDict()
        self._not_owned: cachetools.TTLCache[OwnedId, bool] = cachetools.TTLCache(
            cache.unknown_entries_max, cache.unknown_seconds, timer=lambda: now().mono_seconds
        )
        self._look_ups = LookupBatcher(database, _BY_ID, self._settle, look_ups_max=look_ups_max)

    def is_owned(
        self,
        kind: str,
        id: str,  # noqa: A002 - the name of the column
        tenant_id: str,
        now: Moment,
        *,
        is_first_lookup: bool = True,
    ) -> bool:
        """Whether the tenant owns the id. Raises Missing with the lookup, or a Refusal."""
        subject = OwnedId(kind, id, tenant_id)
        mono = now.mono_seconds
        entry = self._owned.get(subject)
        is_owned = entry is not None
        if entry is None:
            entry = self._nothing.get((tenant_id, kind))
        if entry is not None and (mono < entry.fresh_until or self._may_serve_stale(entry, subject, mono)):
            if is_first_lookup:
                if mono < entry.fresh_until:
                    self.counts.hit += 1
                else:
                    self.counts.stale += 1
            return is_owned
        if entry is None and subject in self._not_owned:
            if is_first_lookup:
                self.counts.unknown += 1
            return False
        if not is_object_id(id):
            # No row can have it, and the database might refuse the text, and with it the whole batch.
            return False
        if self._database.is_down:
            if is_first_lookup:
                self.counts.refused += 1
            raise Refusal(Reason.STORE_UNAVAILABLE, self._database.down_because)
        raise Missing("ownership", lambda _patience: self._fetch(subject))

    def _may_serve_stale(self, entry: _Ownership, subject: OwnedId, mono: float) -> bool:
        if mono >= entry.stale_until:
            return False
        if self._database.is_down:
            return True
        if entry.is_distrusted or mono >= self._feed.current_until:
            return False
        self._look_ups.enqueue(subject, is_known=True)
        return True

    # -- called by the change feed

    def forget(self, subject: OwnedId) -> None:
        """The tenant got or lost this id."""
        self._owned.pop(subject, None)
        self._not_owned.pop(subject, None)
        self._nothing.pop((subject.tenant_id, subject.kind), None)
        self._look_ups.subject_changed(subject)
        self._look_ups.group_changed(subject.tenant_id, subject.kind)

    def distrust_all(self) -> None:
        """Changes may have been missed: look every id up before it is served again, unless the store is down."""
        for entries in (self._owned, self._nothing):
            for entry in entries.values():
                entry.fresh_until = 0.0
                entry.is_distrusted = True
        self._not_owned.clear()
        self._look_ups.all_changed()

    def forget_all(self) -> None:
        """Any id may have changed its owner: serve none before it is looked up, even while the store is down."""
        self._owned.clear()
        self._nothing.clear()
        self._not_owned.clear()
        self._look_ups.all_changed()

    # -- the cold path

    async def _fetch(self, subject: OwnedId) -> None:
        self.counts.miss += 1
        await self._look_ups.fetch_missing(
            subject, is_known=subject in self._owned, is_kept=lambda: self._is_kept(subject)
        )

    def _is_kept(self, subject: OwnedId) -> bool:
        return (
            subject in self._owned or subject in self._not_owned or (subject.tenant_id, subject.kind) in self._nothing
        )

    def _settle(self, subject: OwnedId, row: Row | None) -> None:
        owner = (subject.tenant_id, subject.kind)
        self._owned.pop(subject, None)
        self._nothing.pop(owner, None)
        self._not_owned.pop(subject, None)
        if row is None or not row["owns_any"]:
            self._keep(self._nothing, owner)
        elif row["is_owned"]:
            self._keep(self._owned, subject)
        else:
            self._not_owned[subject] = True

    def _keep(self, entries: collections.OrderedDict[_Key, _Ownership], key: _Key) -> None:
        # Full: evict the entry that was looked up longest ago.
        if len(entries) >= self._cache.entries_max:
            entries.popitem(last=False)
        mono = self._now().mono_seconds
        entries[key] = _Ownership(mono + self._cache.fresh_seconds, mono + self._cache.stale_seconds)

    # -- statistics and shutdown

    def sizes(self) -> Mapping[str, int]:
        """How many entries the tables hold."""
        return {
            "owned": len(self._owned),
            "not_owned": len(self._not_owned),
            "nothing": len(self._nothing),
            "looking_up": len(self._look_ups),
        }

    async def close(self) -> None:
        """Cancel all lookups."""
        await self._look_ups.close()
