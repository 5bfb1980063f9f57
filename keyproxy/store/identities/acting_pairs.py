"""The pairs of a key and a user that the key acts for: the identities of those that may, and which may not.

They have tables of their own, so that neither acting nor attempts to act evict a key. The second table holds the pairs
that may not act, and keys that may act for no user at all, under an empty id; each for unknown_seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import cachetools

from keyproxy.config.schema import Cache
from keyproxy.model import Identity, KeyDigest, Moment
from keyproxy.store.identities.delegated_rows import ActingPair, acting_identity, ends_all_pairs
from keyproxy.store.identities.entries import ActingEntry, EntryTable
from keyproxy.store.identities.groups import TENANT, USER, Groups
from keyproxy.store.postgres.database import Row

#: In place of a user: the key may act for none.
_ANY_USER: Final = ""


class ActingPairs:
    """The two tables: see the module."""

    def __init__(self, cache: Cache, groups: Groups, header_prefix: str, now: Callable[[], Moment]) -> None:
        self._cache = cache
        self._groups = groups
        self._header_prefix = header_prefix
        self._now = now
        self.entries: EntryTable[tuple[KeyDigest, str], ActingEntry] = EntryTable(cache.acting_entries_max)
        self._refused: cachetools.TTLCache[tuple[KeyDigest, str], ActingEntry] = cachetools.TTLCache(
            cache.unknown_entries_max, cache.unknown_seconds, timer=lambda: now().mono_seconds
        )

    def refused(self, digest: KeyDigest, user_id: str) -> Identity | None:
        """The identity of a key that may not act for this user; None if that is not known."""
        for name in (user_id, _ANY_USER):
            entry = self._refused.get((digest, name))
            if entry is not None and entry.is_current:
                return entry.identity
        return None

    def holds(self, pair: ActingPair) -> bool:
        """Whether the result of a lookup of this pair is in a table."""
        return pair in self.entries.rows or self.refused(pair.digest, pair.user_id) is not None

    def keep(self, pair: ActingPair, row: Row) -> None:
        """Put the result of a lookup into its table. Raises ValueError and the like for an invalid row."""
        identity = acting_identity(row, self._header_prefix)
        key = self._groups.key_of(pair.digest, self._groups.get(USER, row["owner_id"]))
        tenant, user = self._groups.get(TENANT, row["tenant_id"]), self._groups.get(USER, pair.user_id)
        if ends_all_pairs(row):
            self.entries.rows.pop(pair, None)
            # It depends on no user but the owner.
            self._refused[pair.digest, _ANY_USER] = ActingEntry(identity, key, tenant, key)
            return
        entry = ActingEntry(identity, user, tenant, key)
        if not row["may_act"]:
            self.entries.rows.pop(pair, None)
            self._refused[pair.digest, pair.user_id] = entry
            return
        mono = self._now().mono_seconds
        entry.fresh_until = mono + self._cache.fresh_seconds
        entry.stale_until = mono + self._cache.stale_seconds
        self.entries.put(pair, entry, mono)
        self._refused.pop(pair, None)
        self._refused.pop((pair.digest, _ANY_USER), None)

    def drop(self, pair: ActingPair) -> None:
        """The key of this pair does not exist."""
        self.entries.rows.pop(pair, None)

    def forget_all(self) -> None:
        """Serve none before it is looked up, even while the store is down."""
        self.entries.forget_all()
        self._refused.clear()

    def distrust_all(self) -> None:
        """Look each up before it is served again, unless the store is down."""
        self.entries.distrust_all()
        self._refused.clear()

    def sizes(self) -> dict[str, int]:
        """How many entries the tables hold."""
        return {"acting": len(self.entries.rows), "acting_refused": len(self._refused)}
