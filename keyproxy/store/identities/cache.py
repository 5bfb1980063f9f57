"""The identity cache in front of the store: the identities that keys and agent tokens resolve to.

`known` and `acting` return a cached identity or raise Missing, which fetches it from the store; they never wait. The
states of an entry:

    fresh   younger than fresh_seconds: served.
    stale   older: served while the change feed is current, and refreshed in the background; also served while the store
            is down, up to stale_seconds. If the feed is not current but the store is up, the key is looked up first,
            since the feed may have missed a revocation.
    changed the feed delivered a change of the key, its user or its tenant: never served again. If only limits changed,
            the key is looked up again before it is served, and still served under the old limits while the store is down.

Unknown digests are cached in a separate table, so that a flood of them evicts no known key: see `refused_digests`. So
are the pairs of a key and a user that it acts for: see `acting_pairs`. For the lookups see `lookup_batcher`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from keyproxy.auth import names
from keyproxy.auth.api_key import SecretKey
from keyproxy.auth.authorization import refused_delegation
from keyproxy.config.schema import Cache
from keyproxy.model import Identity, KeyDigest, Missing, Moment
from keyproxy.ports.identities import Identities
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.identities.acting_pairs import ActingPairs
from keyproxy.store.identities.delegated_rows import (
    BY_PAIR,
    BY_TOKEN,
    ActingPair,
    TokenDigest,
    token_identity,
)
from keyproxy.store.identities.entries import Entry, EntryTable
from keyproxy.store.identities.groups import KEY, TENANT, USER, Group, Groups
from keyproxy.store.identities.identity_rows import (
    BY_ACCESS_TOKEN,
    BY_DIGEST,
    NO_RESOURCES,
    AccessTokenDigest,
    TokenResources,
    identity_of,
)
from keyproxy.store.identities.last_used import LastUsed
from keyproxy.store.identities.lookup_batcher import Flight, LookupBatcher, LookupQuery
from keyproxy.store.identities.refused_digests import RefusedDigests
from keyproxy.store.identities.request_lookup import LookupOwner
from keyproxy.store.identities.unknown_credentials import TokenVerifier, UnknownCredentials
from keyproxy.store.postgres.database import Database, Row

#: What the store is queried for.
_Subject: TypeAlias = KeyDigest | AccessTokenDigest | TokenDigest | ActingPair


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
        verifier: TokenVerifier | None = None,
        resources: TokenResources = NO_RESOURCES,
    ) -> None:
        """`look_ups_max`: how many queries may run at once. `now`: the clock. Without a `verifier`, no agent token is
        accepted. `resources`: what OAuth access tokens must be for."""
        self.counts = LookupCounts()
        self._database = database
        self._cache = cache
        self._feed = feed
        self._last_used = last_used
        self._header_prefix = header_prefix
        self._resources = resources
        self._now = now
        self._groups = Groups()
        self._keys: EntryTable[KeyDigest, Entry] = EntryTable(cache.entries_max)
        self._entries = self._keys.rows
        self._pairs = ActingPairs(cache, self._groups, header_prefix, now)
        self._acting = self._pairs.entries.rows
        self._refused_digests = RefusedDigests(cache.unknown_entries_max, cache.unknown_seconds)
        self._unknown = UnknownCredentials(database, self._refused_digests, verifier, now)
        keys: LookupQuery[Any] = BY_DIGEST
        others: dict[type, LookupQuery[Any]]
        others = {AccessTokenDigest: BY_ACCESS_TOKEN, TokenDigest: BY_TOKEN, ActingPair: BY_PAIR}
        self._look_ups: LookupBatcher[_Subject] = LookupBatcher(
            database, keys, self._settle, look_ups_max=look_ups_max, others=others
        )
        self._fetches = LookupOwner(self._look_ups, self._count_miss, self._restore)

    # -- the hot path

    def known(self, digest: KeyDigest, now: Moment, *, is_first_lookup: bool = True) -> Identity:
        """The cached identity of a key or agent token. Raises Missing with the lookup, or a Refusal."""
        entry = self._entries.get(digest)
        if entry is not None and entry.user.is_current and entry.tenant.is_current:
            mono = now.mono_seconds
            if mono < entry.fresh_until or self._may_serve_stale(entry, digest, None, mono):
                if is_first_lookup:
                    if mono < entry.fresh_until:
                        self.counts.hit += 1
                    else:
                        self.counts.stale += 1
                if mono >= entry.mark_due:
                    self._last_used.mark(entry, now)
                return entry.identity
        elif entry is None:
            refusal = self._refusal(digest, now, is_first_lookup)
            if refusal is not None:
                raise refusal
        if self._database.is_down:
            return self._while_down(entry, now, is_first_lookup)
        # A digest that is not cached is that of a key, unless `fetching` finds out otherwise.
        raise self._fetches.missing(digest if entry is None else _subject_of(entry.identity, digest))

    def acting(self, digest: KeyDigest, user_id: str, now: Moment, *, is_first_lookup: bool = True) -> Identity:
        """The cached identity of a key that acts for this user. Raises Missing with the lookup, or a Refusal."""
        entry = self._acting.get((digest, user_id))
        if entry is not None and entry.key.is_current and entry.user.is_current and entry.tenant.is_current:
            mono = now.mono_seconds
            if mono < entry.fresh_until or self._may_serve_stale(entry, digest, user_id, mono):
                if is_first_lookup:
                    if mono < entry.fresh_until:
                        self.counts.hit += 1
                    else:
                        self.counts.stale += 1
                if mono >= entry.mark_due:
                    self._last_used.mark(entry, now)
                return entry.identity
        elif entry is None:
            refused = self._refused(digest, user_id, now, is_first_lookup)
            if refused is not None:
                return refused
        if self._database.is_down:
            return self._while_down(entry, now, is_first_lookup)
        raise self._fetches.missing(ActingPair(digest, user_id))

    def reviewed(self, digest: KeyDigest, before: Identity, now: Moment) -> Identity:
        """The identity behind a credential that was resolved to `before`, as it is now."""
        if before.actor_user_id is not None and before.agent_token is None:
            return self.acting(digest, before.user_id, now, is_first_lookup=False)
        try:
            return self.known(digest, now, is_first_lookup=False)
        except Missing:
            # Its entry may have been evicted; the digest alone does not show what to look up.
            raise self._fetches.missing(_subject_of(before, digest)) from None

    def fetching(self, key: SecretKey, missing: Missing) -> Missing:
        """What to fetch for a credential, after `known` or `acting` raised `missing`. Off the hot path."""
        return self._unknown.fetching(key, missing, self._fetches, is_cached=self._has_entries)

    def _refused(self, digest: KeyDigest, user_id: str, now: Moment, is_first_lookup: bool) -> Identity | None:
        """The identity of a credential that may not act for this user, as far as that is known without a lookup.

        While the store is down it is not known: the user may have been created meanwhile.
        """
        own = self._entries.get(digest)
        if own is None:
            refusal = self._refusal(digest, now, is_first_lookup)
            if refusal is not None:
                raise refusal
        if not names.is_id(user_id) or (own is not None and own.identity.agent_token is not None):
            return refused_delegation(self.known(digest, now, is_first_lookup=is_first_lookup))
        if self._database.is_down:
            return None
        if own is not None and not own.identity.can_act and self._is_served(own, digest, now.mono_seconds):
            return refused_delegation(self.known(digest, now, is_first_lookup=is_first_lookup))
        refused = self._pairs.refused(digest, user_id)
        if refused is not None and is_first_lookup:
            self.counts.unknown += 1
        return refused

    def _refusal(self, digest: KeyDigest, now: Moment, is_first_lookup: bool) -> Refusal | None:
        refusal = self._refused_digests.refusal(digest, now.mono_seconds)
        if refusal is not None and is_first_lookup:
            self.counts.unknown += 1
        return refusal

    def _while_down(self, entry: Entry | None, now: Moment, is_first_lookup: bool) -> Identity:
        if entry is not None and entry.is_usable(now.mono_seconds):
            if is_first_lookup:
                self.counts.stale += 1
            return entry.identity
        if is_first_lookup:
            self.counts.refused += 1
        raise Refusal(Reason.STORE_UNAVAILABLE, self._database.down_because)

    def _is_served(self, entry: Entry, digest: KeyDigest, mono: float) -> bool:
        """Whether `known` serves this entry of a key."""
        if not (entry.user.is_current and entry.tenant.is_current):
            return False
        return mono < entry.fresh_until or self._may_serve_stale(entry, digest, None, mono)

    def _may_serve_stale(self, entry: Entry, digest: KeyDigest, user_id: str | None, mono: float) -> bool:
        """`user_id`: the user that the key acts for, None if it does not act."""
        if mono >= entry.stale_until:
            return False
        if self._database.is_down:
            return True
        if entry.is_distrusted or mono >= self._feed.current_until:
            return False
        subject = _subject_of(entry.identity, digest) if user_id is None else ActingPair(digest, user_id)
        self._look_ups.enqueue(subject, is_known=True)
        return True

    # -- called by the change feed

    def forget_key(self, digest: KeyDigest) -> None:
        """This key or agent token was changed, created or deleted."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.forget()
        self._refused_digests.discard(digest)
        self._look_ups.subject_changed(digest)
        self._forget_group(KEY, digest)

    def forget_user(self, user_id: str) -> None:
        """This user was changed, created or deleted: look up all of its keys again, and those that act for it."""
        self._forget_group(USER, user_id)

    def forget_tenant(self, tenant_id: str) -> None:
        """This tenant was changed or deleted: look up all keys of its users again."""
        self._forget_group(TENANT, tenant_id)

    def distrust_key(self, digest: KeyDigest) -> None:
        """Limits of this key changed: look it up before it is served again, unless the store is down."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.distrust()
        self._look_ups.subject_changed(digest)
        self._distrust_group(KEY, digest)

    def distrust_user(self, user_id: str) -> None:
        """Limits of this user changed: look its keys up before they are served again, unless the store is down."""
        self._distrust_group(USER, user_id)

    def distrust_tenant(self, tenant_id: str) -> None:
        """Limits of this tenant changed: as `distrust_user`, for all keys of its users."""
        self._distrust_group(TENANT, tenant_id)

    def distrust_all(self) -> None:
        """Changes may have been missed: look up every key before it is served again, unless the store is down."""
        self._keys.distrust_all()
        self._pairs.distrust_all()
        self._refused_digests.clear()
        self._look_ups.all_changed()

    def forget_all(self) -> None:
        """Any key may have been changed or deleted: serve none before it is looked up, even while the store is down."""
        self._keys.forget_all()
        self._pairs.forget_all()
        self._refused_digests.clear()
        self._look_ups.all_changed()

    def _forget_group(self, kind: str, name: str | KeyDigest) -> None:
        self._groups.forget(kind, name)
        self._look_ups.group_changed(kind, name)

    def _distrust_group(self, kind: str, name: str | KeyDigest) -> None:
        self._groups.distrust(kind, name)
        self._look_ups.group_changed(kind, name)

    # -- the cold path

    def _count_miss(self, subject: _Subject) -> bool:
        self.counts.miss += 1
        return self._is_cached(subject)

    def _restore(self, subject: _Subject, flight: Flight) -> None:
        if not self._look_ups.is_current(flight) or self._is_kept(subject):
            return
        if isinstance(flight.kept, Entry):
            self._keys.put(_digest_of(subject), flight.kept, self._now().mono_seconds)
        else:
            self._settle(subject, flight.row)

    def _is_cached(self, subject: _Subject) -> bool:
        return subject in self._acting if isinstance(subject, ActingPair) else _digest_of(subject) in self._entries

    def _has_entries(self, digest: KeyDigest) -> bool:
        return digest in self._entries or self._groups.has_key(digest)

    def _is_kept(self, subject: _Subject) -> bool:
        if isinstance(subject, ActingPair):
            if self._pairs.holds(subject):
                return True
        elif self._is_cached(subject):
            return True
        return self._refused_digests.has(_digest_of(subject), self._now().mono_seconds)

    def _settle(self, subject: _Subject, row: Row | None) -> Entry | None:
        digest = _digest_of(subject)
        if row is None:
            self._entries.pop(digest, None)
            if isinstance(subject, ActingPair):
                self._pairs.drop(subject)
            self._refused_digests.add(digest, self._now().mono_seconds)
            return None
        entry: Entry | None = None
        if isinstance(subject, ActingPair):
            self._pairs.keep(subject, row)
        elif isinstance(subject, TokenDigest):
            entry = self._keep(digest, token_identity(row, self._header_prefix), self._group_of_token(row))
        else:
            identity = identity_of(row, self._header_prefix, self._resources)
            entry = self._keep(digest, identity, self._groups.get(USER, identity.user_id))
        self._refused_digests.discard(digest)
        return entry

    def _group_of_token(self, row: Row) -> Group:
        """The group of the user of an agent token; if it was minted while acting, also of the owner of its root key."""
        user = self._groups.get(USER, row["user_id"])
        if row["owner_id"] == row["user_id"]:
            return user
        both = Group()
        both.depend_on(user)
        both.depend_on(self._groups.get(USER, row["owner_id"]))
        return both

    def _keep(self, digest: KeyDigest, identity: Identity, user: Group) -> Entry:
        now = self._now().mono_seconds
        entry = Entry(identity, user, self._groups.get(TENANT, identity.tenant_id))
        entry.fresh_until = now + self._cache.fresh_seconds
        entry.stale_until = now + self._cache.stale_seconds
        self._keys.put(digest, entry, now)
        return entry

    # -- statistics and shutdown

    def sizes(self) -> Mapping[str, int]:
        """How many entries the tables hold."""
        return {
            "known": len(self._entries),
            "unknown": self._refused_digests.count(self._now().mono_seconds),
            **self._pairs.sizes(),
            "looking_up": len(self._look_ups),
        }

    async def close(self) -> None:
        """Cancel all lookups."""
        await self._look_ups.close()


def _subject_of(identity: Identity, digest: KeyDigest) -> KeyDigest | AccessTokenDigest | TokenDigest:
    """What to look up for a digest that resolved to this identity before."""
    if identity.agent_token is not None:
        return TokenDigest(digest)
    return digest if identity.oauth is None else AccessTokenDigest(digest)


def _digest_of(subject: _Subject) -> KeyDigest:
    return KeyDigest(subject) if isinstance(subject, bytes) else subject.digest
