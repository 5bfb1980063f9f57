"""The cache of consents in front of the store: the live consents of each user, also that there are none.

`has_consent` decides from memory or raises Missing, which fetches the consents of the user; it never waits. Entries are
served as those of the identity cache: fresh, then stale while the change feed is current or the store is down. An entry
that the feed changes is looked up again before it is served.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from typing import Final

from keyproxy.config.schema import Cache
from keyproxy.model import Identity, Missing, Moment
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.identities.cache import FeedState, LookupCounts
from keyproxy.store.identities.lookup_batcher import LookupBatcher, LookupQuery
from keyproxy.store.postgres.database import Database, Row

_BY_USER: Final[LookupQuery[str]] = LookupQuery(
    "consents_of_users",
    "consents",
    parameters=lambda users: (users,),
    subject=lambda row: str(row["user_id"]),
    name=lambda row: f"user {row['user_id']}",
    groups=lambda _row: (),
)


class _Entry:
    """The live consents of one user: for each tool, the agents and the expiries in Unix time. No agent: any."""

    __slots__ = ("consents", "fresh_until", "is_distrusted", "stale_until")

    def __init__(
        self, consents: dict[str, list[tuple[str | None, float]]], fresh_until: float, stale_until: float
    ) -> None:
        self.consents = consents
        self.fresh_until = fresh_until
        self.stale_until = stale_until
        self.is_distrusted = False


class ConsentCache:
    """The cache of consents: see the module. Follows the change feed."""

    table: Final = "consents"

    def __init__(
        self, database: Database, main: Database, cache: Cache, *, feed: FeedState, now: Callable[[], Moment]
    ) -> None:
        """`main`: the part of the store that notices an outage and its end. `now`: the clock."""
        self.counts = LookupCounts()
        self._main = main
        self._cache = cache
        self._feed = feed
        self._now = now
        self._entries: collections.OrderedDict[str, _Entry] = collections.OrderedDict()
        self._look_ups = LookupBatcher(database, _BY_USER, self._settle, look_ups_max=1)

    def __len__(self) -> int:
        """How many users are in memory."""
        return len(self._entries)

    def has_consent(self, identity: Identity, tool: str, now: Moment, *, is_first_lookup: bool = True) -> bool:
        """See the port Approvals."""
        found = self._consents_of(identity.user_id, now, is_first_lookup).get(tool)
        if found is None:
            return False
        token = identity.agent_token
        agent = None if token is None else token.agents[0]
        wall = now.wall_seconds
        return any(expires > wall and of_agent in (None, agent) for of_agent, expires in found)

    def _consents_of(
        self, user_id: str, now: Moment, is_first_lookup: bool
    ) -> dict[str, list[tuple[str | None, float]]]:
        entry, mono = self._entries.get(user_id), now.mono_seconds
        if entry is not None and (mono < entry.fresh_until or self._may_serve_stale(entry, user_id, mono)):
            if is_first_lookup:
                if mono < entry.fresh_until:
                    self.counts.hit += 1
                else:
                    self.counts.stale += 1
            return entry.consents
        if self._main.is_down:
            if is_first_lookup:
                self.counts.refused += 1
            raise Refusal(Reason.APPROVALS_UNAVAILABLE, self._main.down_because)
        raise Missing("consents", lambda _patience: self._fetch(user_id))

    def _may_serve_stale(self, entry: _Entry, user_id: str, mono: float) -> bool:
        if mono >= entry.stale_until:
            return False
        if self._main.is_down:
            return True
        if entry.is_distrusted or mono >= self._feed.current_until:
            return False
        self._look_ups.enqueue(user_id, is_known=True)
        return True

    # -- called by the change feed

    def changed(self, subject: str) -> None:
        """The user got or lost a consent."""
        self._entries.pop(subject, None)
        self._look_ups.subject_changed(subject)

    def distrust_all(self) -> None:
        """Changes may have been missed: look every user up before it is served again, unless the store is down."""
        for entry in self._entries.values():
            entry.fresh_until = 0.0
            entry.is_distrusted = True
        self._look_ups.all_changed()

    def forget_all(self) -> None:
        """Any consent may have been revoked: serve none before it is looked up, even while the store is down."""
        self._entries.clear()
        self._look_ups.all_changed()

    # -- the cold path

    async def _fetch(self, user_id: str) -> None:
        self.counts.miss += 1
        try:
            await self._look_ups.fetch_missing(
                user_id, is_known=user_id in self._entries, is_kept=lambda: user_id in self._entries
            )
        except Refusal as refusal:
            if refusal.reason is not Reason.STORE_UNAVAILABLE:
                raise
            raise Refusal(Reason.APPROVALS_UNAVAILABLE, refusal.detail) from refusal

    def _settle(self, user_id: str, row: Row | None) -> None:
        consents: dict[str, list[tuple[str | None, float]]] = {}
        for tool, agent, expires in json.loads("[]" if row is None else row["consents"]):
            consents.setdefault(tool, []).append((agent, float(expires)))
        self._entries.pop(user_id, None)
        # Full: evict the entry that was looked up longest ago.
        if len(self._entries) >= self._cache.entries_max:
            self._entries.popitem(last=False)
        mono = self._now().mono_seconds
        self._entries[user_id] = _Entry(consents, mono + self._cache.fresh_seconds, mono + self._cache.stale_seconds)

    async def close(self) -> None:
        """Cancel all lookups. Requests that wait for one are refused."""
        await self._look_ups.close()
