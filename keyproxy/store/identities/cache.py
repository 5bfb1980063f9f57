"""The identity cache in front of the store: the identities that keys resolve to.

`known` returns a cached identity or raises Missing, which fetches it from the store; it never waits. The states of an
entry:

    fresh   younger than fresh_seconds: served.
    stale   older: served while the change feed is current, and refreshed in the background; also served while the store
            is down, up to stale_seconds. If the feed is not current but the store is up, the key is looked up first,
            since the feed may have missed a revocation.
    changed the feed delivered a change of the key, its user or its tenant: never served again. If only limits changed,
            the key is looked up again before it is served, and still served under the old limits while the store is down.

Unknown keys, which do not exist in the store, are cached in a separate table, so that a flood of them evicts no known
key. For the lookups see `lookup_batcher`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Final
from weakref import WeakValueDictionary

import cachetools

from keyproxy.auth.api_key import SecretKey
from keyproxy.config.schema import Cache
from keyproxy.model import Identity, KeyDigest, Missing, Moment, TimeBudget
from keyproxy.ports import Identities
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.identities import drf_api_keys
from keyproxy.store.identities.drf_api_keys import DrfApiKeys
from keyproxy.store.identities.groups import Group
from keyproxy.store.identities.identity_rows import BY_DIGEST, identity_of
from keyproxy.store.identities.last_used import LastUsed
from keyproxy.store.identities.lookup_batcher import LookupBatcher
from keyproxy.store.postgres.database import Database, Row

#: How many recently used entries an eviction skips before it removes the oldest one anyway.
_SECOND_CHANCES_MAX: Final = 16


class _Entry:
    """One verified identity. Times are monotonic seconds."""

    __slots__ = ("fresh_until", "identity", "is_distrusted", "mark_due", "stale_until", "tenant", "user")

    def __init__(self, identity: Identity, user: Group, tenant: Group) -> None:
        self.identity = identity
        self.user = user
        self.tenant = tenant
        self.fresh_until = 0.0
        self.stale_until = 0.0
        self.mark_due = 0.0
        self.is_distrusted = False


class LookupCounts:
    """Lookups by outcome. Attributes rather than a dict, since every request increments one."""

    __slots__ = ("hit", "miss", "refused", "stale", "unknown")

    def __init__(self) -> None:
        self.hit = self.stale = self.miss = self.unknown = self.refused = 0

    def by_name(self) -> dict[str, int]:
        """The current counts by name."""
        return {
            "hit": self.hit,
            "stale": self.stale,
            "miss": self.miss,
            "unknown": self.unknown,
            "refused": self.refused,
        }


class FeedState:
    """The time until which the change feed counts as current, in monotonic seconds. The feed writes it.

    `server_ahead_seconds`: how far the database's clock is ahead of this machine's.
    """

    __slots__ = ("current_until", "server_ahead_seconds")

    def __init__(self) -> None:
        self.current_until = 0.0
        self.server_ahead_seconds = 0.0

    def ahead_seconds(self) -> float:
        """How far the database's clock is ahead, as of now."""
        return self.server_ahead_seconds


class IdentityCache(Identities):
    """The identity cache: see the module. Implements the port Identities."""

    def __init__(
        self,
        database: Database,
        cache: Cache,
        *,
        feed: FeedState,
        last_used: LastUsed,
        header_prefix: str,
        look_ups_max: int,
        now: Callable[[], Moment],
    ) -> None:
        """`look_ups_max`: how many queries may run at once. `now`: the clock."""
        self.counts = LookupCounts()
        self._database = database
        self._cache = cache
        self._feed = feed
        self._last_used = last_used
        self._header_prefix = header_prefix
        self._now = now
        self._entries: collections.OrderedDict[KeyDigest, _Entry] = collections.OrderedDict()
        self._unknown: cachetools.TTLCache[KeyDigest, bool] = cachetools.TTLCache(
            cache.unknown_entries_max, cache.unknown_seconds, timer=lambda: now().mono_seconds
        )
        self._foreign = DrfApiKeys(database)
        self._users: WeakValueDictionary[str, Group] = WeakValueDictionary()
        self._tenants: WeakValueDictionary[str, Group] = WeakValueDictionary()
        self._look_ups = LookupBatcher(database, BY_DIGEST, self._settle, look_ups_max=look_ups_max)

    # -- the hot path

    def known(self, digest: KeyDigest, now: Moment, *, is_first_lookup: bool = True) -> Identity:
        """The cached identity of a key. Raises Missing with the lookup, or a Refusal."""
        entry = self._entries.get(digest)
        if entry is not None and entry.user.is_current and entry.tenant.is_current:
            mono = now.mono_seconds
            if mono < entry.fresh_until or self._may_serve_stale(entry, digest, mono):
                if is_first_lookup:
                    if mono < entry.fresh_until:
                        self.counts.hit += 1
                    else:
                        self.counts.stale += 1
                if mono >= entry.mark_due:
                    self._last_used.mark(entry, now)
                return entry.identity
        elif entry is None and digest in self._unknown:
            if is_first_lookup:
                self.counts.unknown += 1
            raise Refusal(Reason.KEY_INVALID, "the store has no such key")
        if self._database.is_down:
            if entry is not None and _is_usable(entry, now.mono_seconds):
                if is_first_lookup:
                    self.counts.stale += 1
                return entry.identity
            if is_first_lookup:
                self.counts.refused += 1
            raise Refusal(Reason.STORE_UNAVAILABLE, self._database.down_because)
        raise Missing("identity", lambda _patience: self._fetch(digest))

    def fetching(self, key: SecretKey, missing: Missing) -> Missing:
        """The fetch for a key that is not cached: a key of a foreign form is first imported by its own hash.

        Off the hot path.
        """
        if drf_api_keys.prefix_of(key) is None or key.digest() in self._entries:
            return missing

        async def fetch_missing(patience: TimeBudget) -> None:
            await self._foreign.adopt(key)
            await missing.fetch_missing(patience)

        return Missing("identity", fetch_missing)

    def _may_serve_stale(self, entry: _Entry, digest: KeyDigest, mono: float) -> bool:
        if mono >= entry.stale_until:
            return False
        if self._database.is_down:
            return True
        if entry.is_distrusted or mono >= self._feed.current_until:
            return False
        self._look_ups.enqueue(digest, is_known=True)
        return True

    # -- called by the change feed

    def forget_key(self, digest: KeyDigest) -> None:
        """This key was changed, created or deleted."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.fresh_until = entry.stale_until = 0.0
        self._unknown.pop(digest, None)
        self._look_ups.subject_changed(digest)

    def forget_user(self, user_id: str) -> None:
        """This user was changed or deleted: look up all of its keys again."""
        self._forget_group("user", user_id, self._users)

    def forget_tenant(self, tenant_id: str) -> None:
        """This tenant was changed or deleted: look up all keys of its users again."""
        self._forget_group("tenant", tenant_id, self._tenants)

    def distrust_key(self, digest: KeyDigest) -> None:
        """Limits of this key changed: look it up before it is served again, unless the store is down."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.fresh_until = 0.0
            entry.is_distrusted = True
        self._look_ups.subject_changed(digest)

    def distrust_user(self, user_id: str) -> None:
        """Limits of this user changed: look its keys up before they are served again, unless the store is down."""
        self._distrust_group("user", user_id, self._users)

    def distrust_tenant(self, tenant_id: str) -> None:
        """Limits of this tenant changed: as `distrust_user`, for all keys of its users."""
        self._distrust_group("tenant", tenant_id, self._tenants)

    def distrust_all(self) -> None:
        """Changes may have been missed: look up every key before it is served again, unless the store is down."""
        for entry in self._entries.values():
            entry.fresh_until = 0.0
            entry.is_distrusted = True
        self._unknown.clear()
        self._look_ups.all_changed()

    def forget_all(self) -> None:
        """Any key may have been changed or deleted: serve none before it is looked up, even while the store is down."""
        for entry in self._entries.values():
            entry.fresh_until = entry.stale_until = 0.0
        self._unknown.clear()
        self._look_ups.all_changed()

    def _forget_group(self, kind: str, name: str, groups: WeakValueDictionary[str, Group]) -> None:
        group = groups.pop(name, None)
        if group is not None:
            group.end()
        self._look_ups.group_changed(kind, name)

    def _distrust_group(self, kind: str, name: str, groups: WeakValueDictionary[str, Group]) -> None:
        group = groups.get(name)
        if group is not None:
            groups[name] = group.supersede()
        self._look_ups.group_changed(kind, name)

    # -- the cold path

    async def _fetch(self, digest: KeyDigest) -> None:
        self.counts.miss += 1
        await self._look_ups.fetch_missing(
            digest, is_known=digest in self._entries, is_kept=lambda: self._is_kept(digest)
        )

    def _is_kept(self, digest: KeyDigest) -> bool:
        return digest in self._entries or digest in self._unknown

    def _settle(self, digest: KeyDigest, row: Row | None) -> None:
        if row is None:
            self._entries.pop(digest, None)
            self._unknown[digest] = True
        else:
            self._keep(digest, row)

    def _keep(self, digest: KeyDigest, row: Row) -> None:
        now = self._now().mono_seconds
        user = self._users.setdefault(row["user_id"], Group())
        tenant = self._tenants.setdefault(row["tenant_id"], Group())
        entry = _Entry(identity_of(row, self._header_prefix), user, tenant)
        entry.fresh_until = now + self._cache.fresh_seconds
        entry.stale_until = now + self._cache.stale_seconds
        before = self._entries.pop(digest, None)
        if before is not None:
            entry.mark_due = before.mark_due
        elif len(self._entries) >= self._cache.entries_max:
            self._make_room(now)
        self._entries[digest] = entry
        self._unknown.pop(digest, None)

    def _make_room(self, now: float) -> None:
        # Full: evict the oldest known key, but skip one that was used in the last minute.
        for _ in range(_SECOND_CHANCES_MAX):
            digest, entry = self._entries.popitem(last=False)
            if entry.mark_due <= now:
                return
            self._entries[digest] = entry
        self._entries.popitem(last=False)

    # -- statistics and shutdown

    def sizes(self) -> Mapping[str, int]:
        """How many entries the tables hold."""
        return {"known": len(self._entries), "unknown": len(self._unknown), "looking_up": len(self._look_ups)}

    async def close(self) -> None:
        """Cancel all lookups."""
        await self._look_ups.close()


def _is_usable(entry: _Entry, mono: float) -> bool:
    """Whether an entry may be served while the store is down."""
    return mono < entry.stale_until and entry.user.is_usable and entry.tenant.is_usable
