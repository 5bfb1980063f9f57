"""The cache of stored provider keys in front of the store, opened.

`find` decides from memory or raises Missing, which fetches the rows of the tenant and the shared ones in one query; it
never waits. Entries are served as those of the identity cache: fresh, then stale while the change feed is current or the
store is down. An entry that the feed changes is looked up again before it is served, even while the store is down: its
key may be revoked. It is kept until then, so that an unchanged row is neither opened again nor loses its mark.
"""

from __future__ import annotations

import asyncio
import collections
import json
import math
from collections.abc import Callable, Mapping
from typing import Final

from keyproxy.config.schema import Cache
from keyproxy.model import Missing, Moment
from keyproxy.ports.tools import UpstreamCredential
from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.sealing import SealingKeys
from keyproxy.store.identities.cache import FeedState
from keyproxy.store.identities.lookup_batcher import LookupBatcher, LookupQuery
from keyproxy.store.postgres.database import Database, Row
from keyproxy.store.provider_keys.credential_header import CredentialHeader
from keyproxy.store.provider_keys.stored_keys import NO_KEYS, KeySubject, StoredKeys, opened

#: When the store does not respond. The default is for a missing key, which an operator has to add.
_OUTAGE_RETRY_SECONDS: Final = 2

#: The tenant of the keys that all tenants without any of their own share.
SHARED: Final = ""

_BY_SUBJECT: Final[LookupQuery[KeySubject]] = LookupQuery(
    "provider_keys_of",
    "provider keys",
    parameters=lambda subjects: tuple(list(column) for column in zip(*subjects, strict=True)),
    subject=lambda row: KeySubject(row["provider"], row["tenant_id"]),
    name=lambda row: f"provider {row['provider']} and tenant {row['tenant_id']}",
    groups=lambda _row: (),
)


class _CachedKeys:
    """The keys of one subject. Times are monotonic seconds. `is_changed`: must not be served before a lookup."""

    __slots__ = ("fresh_until", "is_changed", "is_distrusted", "keys", "stale_until")

    def __init__(self, keys: StoredKeys, fresh_until: float, stale_until: float) -> None:
        self.keys = keys
        self.fresh_until = fresh_until
        self.stale_until = stale_until
        self.is_distrusted = False
        self.is_changed = False


class ProviderKeyCache:
    """The cache of provider keys: see the module. Follows the change feed."""

    table: Final = "provider_keys"

    def __init__(
        self, database: Database, cache: Cache, *, feed: FeedState, look_ups_max: int, now: Callable[[], Moment]
    ) -> None:
        """`look_ups_max`: how many queries may run at once. `now`: the clock."""
        self._database = database
        self._cache = cache
        self._feed = feed
        self._now = now
        self._keys: SealingKeys | None = None
        self._headers: dict[str, CredentialHeader] = {}
        self._entries: collections.OrderedDict[KeySubject, _CachedKeys] = collections.OrderedDict()
        #: The choices that hold for a while, by provider, tenant and mode, and until when.
        self._chosen: dict[tuple[str, str, bool], tuple[UpstreamCredential, float]] = {}
        self._look_ups = LookupBatcher(database, _BY_SUBJECT, self._settle, look_ups_max=look_ups_max)

    def configure(self, keys: SealingKeys | None, headers: Mapping[str, CredentialHeader]) -> None:
        """Open rows with these keys, for the headers of these providers."""
        if dict(headers) != self._headers:
            # What is in memory has the lines of other headers.
            self._entries.clear()
            self._chosen.clear()
            self._look_ups.all_changed()
        elif keys is not self._keys:
            # Rows that did not open may open now. Those that did are served on if the store is down.
            self.distrust_all()
        self._keys, self._headers = keys, dict(headers)

    def find(self, provider: str, tenant_id: str, now: Moment, *, is_test: bool) -> UpstreamCredential | None:
        """The credential for requests of a tenant: its own, else the shared one; None: there are no rows.

        Raises Missing with the lookup, or a Refusal: if the tenant has rows and none is usable, there is no other one
        for it; likewise for the shared rows.
        """
        chosen = self._chosen.get((provider, tenant_id, is_test))
        mono = now.mono_seconds
        if chosen is not None and mono < chosen[1] and chosen[0].refused_until_mono_seconds <= mono:
            return chosen[0]
        # The rows have times of the server's clock.
        there = Moment(now.wall_seconds + self._feed.server_ahead_seconds, now.mono_seconds)
        until = mono + self._cache.fresh_seconds
        for owner in (tenant_id, SHARED):
            entry = self._entry_of(KeySubject(provider, owner), now, tenant_id)
            until = min(until, entry.fresh_until)
            found = entry.keys.choose(there, is_test=is_test)
            if found is not None:
                self._remember((provider, tenant_id, is_test), found.credential, min(until, mono + found.holds_seconds))
                return found.credential
            if entry.keys.has_begun(there, is_test=is_test):
                whose = f"tenant {owner}" if owner else "all tenants"
                raise _unavailable(f"provider {provider}: no stored key for {whose} is usable")
        return None

    def _remember(self, request: tuple[str, str, bool], found: UpstreamCredential, until: float) -> None:
        """Remember a choice until another one may be better, or a row has changed."""
        if until > self._now().mono_seconds:
            if len(self._chosen) >= self._cache.entries_max:
                self._chosen.clear()
            self._chosen[request] = found, until

    def _forget_choices(self, subject: KeySubject) -> None:
        """The rows of a subject have changed. The shared ones concern the requests of all tenants."""
        if subject.tenant_id == SHARED:
            self._chosen.clear()
        for is_test in (False, True):
            self._chosen.pop((subject.provider, subject.tenant_id, is_test), None)

    def _entry_of(self, subject: KeySubject, now: Moment, tenant_id: str) -> _CachedKeys:
        entry, mono = self._entries.get(subject), now.mono_seconds
        if entry is not None and not entry.is_changed:
            if mono < entry.fresh_until:
                return entry
            if mono < entry.stale_until:
                if self._database.is_down:
                    return entry
                if not entry.is_distrusted and mono < self._feed.current_until:
                    self._look_ups.enqueue(subject, is_known=True)
                    return entry
        if self._database.is_down:
            raise _store_down(subject.provider, self._database.down_because)
        raise Missing("provider keys", lambda _patience: self._fetch(subject.provider, tenant_id))

    # -- called by the change feed

    def changed(self, subject: str) -> None:
        """Rows of a subject have changed, as the feed names it: a JSON array of provider and tenant."""
        try:
            provider, tenant_id = json.loads(subject)
        except (ValueError, TypeError):
            self.forget_all()
            return
        one = KeySubject(str(provider), str(tenant_id))
        if (entry := self._entries.get(one)) is not None:
            entry.is_changed = True
        self._forget_choices(one)
        self._look_ups.subject_changed(one)

    def distrust_all(self) -> None:
        """Changes may have been missed: look every row up before it is served again, unless the store is down."""
        for entry in self._entries.values():
            entry.fresh_until = 0.0
            entry.is_distrusted = True
        self._chosen.clear()
        self._look_ups.all_changed()

    def forget_all(self) -> None:
        """Any row may have changed: serve none before it is looked up, even while the store is down."""
        for entry in self._entries.values():
            entry.is_changed = True
        self._chosen.clear()
        self._look_ups.all_changed()

    # -- the cold path

    async def _fetch(self, provider: str, tenant_id: str) -> None:
        # Both in one query: a tenant without rows needs the shared ones next.
        subjects = [KeySubject(provider, owner) for owner in dict.fromkeys((tenant_id, SHARED))]
        missing = [subject for subject in subjects if not self._is_fresh(subject)]
        refusals = [
            result for result in await asyncio.gather(*map(self._look_up, missing), return_exceptions=True) if result
        ]
        for failure in refusals:
            if isinstance(failure, Refusal) and failure.reason is Reason.STORE_UNAVAILABLE:
                raise _store_down(provider, failure.detail) from failure
            raise failure

    async def _look_up(self, subject: KeySubject) -> None:
        await self._look_ups.fetch_missing(
            subject, is_known=subject in self._entries, is_kept=lambda: subject in self._entries
        )

    def _is_fresh(self, subject: KeySubject) -> bool:
        entry = self._entries.get(subject)
        return entry is not None and not entry.is_changed and self._now().mono_seconds < entry.fresh_until

    def _settle(self, subject: KeySubject, row: Row | None) -> None:
        rows = [] if row is None else json.loads(row["keys"])
        before = self._entries.get(subject)
        keys = opened(
            subject, rows, NO_KEYS if before is None else before.keys,
            keys=self._keys, header=self._headers.get(subject.provider),
        )  # fmt: skip
        self._entries.pop(subject, None)
        self._forget_choices(subject)
        # Full: evict the entry that was looked up longest ago.
        if len(self._entries) >= self._cache.entries_max:
            self._entries.popitem(last=False)
        mono = self._now().mono_seconds
        self._entries[subject] = _CachedKeys(keys, mono + self._cache.fresh_seconds, mono + self._cache.stale_seconds)

    # -- statistics and shutdown

    def since_wall(self, provider: str) -> float:
        """When the oldest key that is in memory and in use was first used; infinite without any."""
        now = self._now()
        found = [one.keys.in_use_since_wall(now) for key, one in self._entries.items() if key.provider == provider]
        return min(found, default=math.inf)

    def __len__(self) -> int:
        """How many subjects are in memory."""
        return len(self._entries)

    async def close(self) -> None:
        """Cancel all lookups."""
        await self._look_ups.close()


def _unavailable(detail: str) -> Refusal:
    return Refusal(Reason.UPSTREAM_CREDENTIAL_UNAVAILABLE, detail)


def _store_down(provider: str, because: str) -> Refusal:
    detail = f"provider {provider}: its stored keys cannot be read: {because}"
    return Refusal(Reason.UPSTREAM_CREDENTIAL_UNAVAILABLE, detail, retry_after_seconds=_OUTAGE_RETRY_SECONDS)
