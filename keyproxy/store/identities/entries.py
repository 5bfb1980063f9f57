"""The entries of the identity cache, and the tables that hold them. Times are monotonic seconds."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

from keyproxy.model import Identity
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.store.identities.groups import Group

_Key = TypeVar("_Key", bound=Hashable)

#: How many recently used entries an eviction skips for each that it removes, before it removes the oldest one anyway.
_SECOND_CHANCES_MAX: Final = 16

#: A full table evicts this fraction of its entries at once, but no more than this number. One at a time would take
#: quadratic time: a dict passes over the places of all entries that were removed at its beginning.
_EVICTED_FRACTION: Final = 64
_EVICTED_MAX: Final = 256


@mypyc_attr(acyclic=True)
class Entry:
    """One verified identity, and the groups that it depends on."""

    __slots__ = ("fresh_until", "identity", "is_distrusted", "mark_due", "stale_until", "tenant", "user")

    def __init__(self, identity: Identity, user: Group, tenant: Group) -> None:
        self.identity = identity
        self.user = user
        self.tenant = tenant
        self.fresh_until = 0.0
        self.stale_until = 0.0
        self.mark_due = 0.0
        self.is_distrusted = False

    def is_usable(self, mono: float) -> bool:
        """Whether the entry may be served while the store is down."""
        return mono < self.stale_until and self.user.is_usable and self.tenant.is_usable

    def forget(self) -> None:
        """Never serve the entry again."""
        self.fresh_until = self.stale_until = 0.0

    def distrust(self) -> None:
        """Look the entry up before it is served again, unless the store is down."""
        self.fresh_until = 0.0
        self.is_distrusted = True


@mypyc_attr(acyclic=True)
class ActingEntry(Entry):
    """The identity of a key that acts for a user. `key`: the group of the key and its owner; `user`: that of the user."""

    __slots__ = ("key",)

    def __init__(self, identity: Identity, user: Group, tenant: Group, key: Group) -> None:
        super().__init__(identity, user, tenant)
        self.key = key

    @property
    def is_current(self) -> bool:
        """Whether nothing that the entry depends on has changed."""
        return self.key.is_current and self.user.is_current and self.tenant.is_current

    def is_usable(self, mono: float) -> bool:
        """Whether the entry may be served while the store is down."""
        return super().is_usable(mono) and self.key.is_usable


_AnyEntry = TypeVar("_AnyEntry", bound=Entry)


class EntryTable(Generic[_Key, _AnyEntry]):
    """Entries by key, the oldest first, up to a bound. `rows` is read on the hot path.

    A dict rather than an OrderedDict: it takes about 70 bytes less for an entry.
    """

    __slots__ = ("_entries_max", "_evicted_at_once", "rows")

    def __init__(self, entries_max: int) -> None:
        self._entries_max = entries_max
        self._evicted_at_once = min(max(entries_max // _EVICTED_FRACTION, 1), _EVICTED_MAX)
        self.rows: dict[_Key, _AnyEntry] = {}

    def put(self, key: _Key, entry: _AnyEntry, now: float) -> None:
        """Add an entry, or replace it. Full: evict the oldest ones, but skip those that were used in the last minute."""
        before = self.rows.pop(key, None)
        if before is not None:
            entry.mark_due = before.mark_due
        elif len(self.rows) >= self._entries_max:
            self._make_room(now)
        self.rows[key] = entry

    def _make_room(self, now: float) -> None:
        left, chances = self._evicted_at_once, self._evicted_at_once * _SECOND_CHANCES_MAX
        for key in list(itertools.islice(self.rows, left + chances)):
            entry = self.rows.pop(key)
            if chances and entry.mark_due > now:
                self.rows[key] = entry
                chances -= 1
                continue
            left -= 1
            if not left:
                return
        # Fewer entries than that, and all of them were used in the last minute.
        for key in list(itertools.islice(self.rows, left)):
            del self.rows[key]

    def forget_all(self) -> None:
        """Serve no entry before it is looked up, even while the store is down."""
        for entry in self.rows.values():
            entry.forget()

    def distrust_all(self) -> None:
        """Look every entry up before it is served again, unless the store is down."""
        for entry in self.rows.values():
            entry.distrust()
