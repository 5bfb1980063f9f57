"""The change feed: changes by any SQL client reach this proxy within a second.

Each poll reads the rows of `keyproxy.changes` that are visible now and were not in the snapshot of the previous poll. A
notification only triggers the next poll early. So lost notifications lose no changes: a pooler in transaction mode, a
dropped connection or a missed wake-up costs half a second at most. And since snapshots are compared rather than serial
numbers, a transaction that began early and committed late is not missed.

After an outage the same query returns the changes made meanwhile, as long as the rows still exist. If they may have been
deleted, or the server has another history (a restored backup, a failover that lost commits), the cache is made to
distrust all of its entries.

Only the primary is polled. Other servers may be ahead of one that has become read-only but stays up: see `database`. When
the database moves, the feed also listens for notifications on the server that the name now resolves to.
"""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from keyproxy.limits.ledger_protocol import Pool, Window
from keyproxy.model import KeyDigest, Moment
from keyproxy.store.background import BackgroundTask
from keyproxy.store.housekeeping import Chore
from keyproxy.store.identities.cache import FeedState, IdentityCache
from keyproxy.store.identities.owned_ids import OwnedId, OwnedIdCache
from keyproxy.store.postgres.database import Database, NotificationListener, Row, StoreConflict, StoreUnavailable
from keyproxy.store.postgres.failures import took_too_long
from keyproxy.store.prompt_templates import TemplateCache
from keyproxy.store.signing_keys import SigningKeyCache

_log = logging.getLogger(__name__)

CHANNEL: Final = "keyproxy_changes"
_POLL_SECONDS: Final = 0.5

#: How long the feed counts as current after a poll: until the next poll, plus time for its response.
_CURRENT_SECONDS: Final = 1.5
_RETRY_SECONDS: Final = (0.1, 0.2, 0.4, 0.8, 1.5)
_LISTEN_RETRY_SECONDS: Final = 5.0

#: With more changes than this in one poll, looking up every key at its next use is cheaper.
_CHANGES_MAX: Final = 20_000

#: The kinds of changes of limits alone. The statement returns all other changes before these.
_LIMITS: Final = ("plan", "key_limits", "user_limits", "tenant_limits", "window")

#: No change, but a lease whose idle units the ledger recalls. These rows come after all changes.
_RECALL: Final = "recall"

#: Changes are kept for at least `_KEPT_SECONDS`; a proxy that has not polled for longer than `_GAP_SECONDS` may have
#: missed some. The difference allows for clock drift.
_GAP_SECONDS: Final = 600.0
_KEPT_SECONDS: Final = 1200.0
_SAMPLE_SECONDS: Final = 60.0

#: How many changes one statement deletes, one statement between two polls: a bulk change may have left millions.
_FORGET_PORTION: Final = 2_000


class LeaseHolder(Protocol):
    """The process as a holder of leases, from which the ledger recalls idle units."""

    @property
    def holder(self) -> str:
        """Its name in the ledger."""
        ...

    def recall(self, leases: Sequence[int]) -> None:
        """Return the idle units of these leases."""
        ...


class ChangeFollower(Protocol):
    """A cache of the rows of one table, whose changes have a kind of their own."""

    @property
    def table(self) -> str:
        """The name of the table."""
        ...

    def changed(self, subject: str) -> None:
        """Rows of this subject have changed: do not serve them before they are looked up again."""
        ...

    def distrust_all(self) -> None:
        """Changes may have been missed: look everything up before it is served again, unless the store is down."""
        ...

    def forget_all(self) -> None:
        """Anything may have changed: serve nothing before it is looked up, even while the store is down."""
        ...


#: For a feed of identities alone.
_NO_FOLLOWERS: Final[Mapping[str, ChangeFollower]] = {}


class ChangeFeed:
    """Polls for changes and applies them to the caches of identities, ownership, templates and signing keys."""

    def __init__(
        self,
        database: Database,
        listener: NotificationListener | None,
        cache: IdentityCache,
        state: FeedState,
        now: Callable[[], Moment],
        *,
        owned: OwnedIdCache | None = None,
        templates: TemplateCache | None = None,
        signing_keys: SigningKeyCache | None = None,
        lease_holder: LeaseHolder | None = None,
        followers: Mapping[str, ChangeFollower] = _NO_FOLLOWERS,
    ) -> None:
        """Without a `listener` the feed only polls. Without a `lease_holder` it delivers no recalls.

        `followers`: further caches, by the kind of the changes that concern them.
        """
        self._followers = dict(followers)
        self._follower_of_table = {follower.table: follower for follower in followers.values()}
        self._owned = owned
        self._templates = templates
        self._signing_keys = signing_keys
        self._lease_holder = lease_holder
        self._database = database
        self._listener = listener
        self._cache = cache
        self._state = state
        self._now = now
        self._wake = asyncio.Event()
        self._snapshot: str | None = None
        self._history = ""
        self._was_slow = False
        self._moves = 0
        self._looked_at = now().mono_seconds
        self._server_seconds = 0.0
        self.lasting = BackgroundTask("change_feed")
        self.forgetting = Chore("changes", "delete old rows of the change feed", portion=_FORGET_PORTION)
        self._samples: collections.deque[tuple[float, str]] = collections.deque()
        #: Changes before this snapshot are to be deleted; empty for none.
        self._forget_before = ""
        self.is_listening = False
        #: Called with each window whose limit was changed by a credit.
        self.window_changed: Callable[[Window], None] = lambda _window: None

    def start(self) -> None:
        """Start polling, and listening for notifications."""
        self.lasting.start(self._follow)
        if self._listener is not None:
            listener = self._listener
            self.lasting.start(lambda: self._listen(listener), pause_seconds=_LISTEN_RETRY_SECONDS)

    async def close(self) -> None:
        """Stop polling and listening."""
        await self.lasting.end()
        if self._listener is not None:
            await self._listener.close()

    def lag_seconds(self) -> float:
        """How long ago the feed was last known to be current."""
        return max(0.0, self._now().mono_seconds - self._looked_at)

    def is_current(self) -> bool:
        """Whether cached identities include all changes."""
        return self._now().mono_seconds < self._state.current_until

    async def poll(self) -> None:
        """Poll: apply all changes since the previous poll. Raises StoreUnavailable or StoreConflict."""
        queried = self._now()
        queried_at = queried.mono_seconds
        first, rows = await self._changes()
        # By half of the round trip more or less.
        middle = (queried.wall_seconds + self._now().wall_seconds) / 2
        self._state.server_ahead_seconds = first["server_seconds"] - middle
        snapshot: str = first["snapshot"]
        history: str = first["history"]
        if self._snapshot is None or history != self._history or _is_older(snapshot, self._snapshot):
            # Snapshots of another history do not apply to this one.
            self._samples.clear()
            self._forget_before = ""
            self._distrust_all()
        elif rows is None:
            self._forget_all()
        else:
            if max(queried_at - self._looked_at, first["server_seconds"] - self._server_seconds) > _GAP_SECONDS:
                # By the server's clock too: the monotonic clock stops while a machine is suspended.
                self._distrust_all()
            if first["kind"] is not None:
                self._apply(rows)
        self._snapshot, self._history = snapshot, history
        self._looked_at, self._server_seconds = queried_at, first["server_seconds"]
        self._state.current_until = queried_at + _CURRENT_SECONDS
        if self._templates is not None:
            self._templates.confirm(queried_at)

    async def _changes(self) -> tuple[Row, Sequence[Row] | None]:
        """The first row of `changes_since`, with the present snapshot, and all rows, or None if reading them timed out.

        After a timeout, the present snapshot is first read alone: on a server that is slow in general, this fails too.
        """
        present = None
        if self._was_slow and self._snapshot is not None:
            (present,) = await self._database.fetch("changes_since", None, 1, "")
        try:
            holder = "" if self._lease_holder is None else self._lease_holder.holder
            rows = await self._database.fetch("changes_since", self._snapshot, _CHANGES_MAX + 1, holder)
        except StoreUnavailable as error:
            self._was_slow = took_too_long(error)
            if present is None or not self._was_slow:
                raise
            _log.warning("reading changes timed out, there are too many: looking up every key again")
            self._was_slow = False
            return present, None
        self._was_slow = False
        return rows[0], rows

    def _apply(self, rows: Sequence[Row]) -> None:
        is_cut_off = len(rows) > _CHANGES_MAX
        if rows[-1]["kind"] == _RECALL and self._lease_holder is not None:
            self._lease_holder.recall([int(row["subject"]) for row in rows if row["kind"] == _RECALL])
        if is_cut_off and rows[-1]["kind"] not in (*_LIMITS, _RECALL):
            # A change beyond these rows may have revoked any key.
            self._forget_all()
            return
        may_end_any_key = False
        concerns_all = is_cut_off
        for row in rows:
            match row["kind"]:
                case "key" if (digest := _digest(row["subject"])) is not None:
                    self._cache.forget_key(digest)
                case "user":
                    self._cache.forget_user(row["subject"])
                case "tenant":
                    self._cache.forget_tenant(row["subject"])
                case "role":
                    may_end_any_key = True
                case "owned" if (owned := _owned_id(row["subject"])) is not None:
                    if self._owned is not None:
                        self._owned.forget(owned)
                case "template" if (template := _digest(row["subject"])) is not None:
                    if self._templates is not None:
                        self._templates.changed(template)
                case "signing":
                    if self._signing_keys is not None:
                        self._signing_keys.changed()
                case "key_limits" if (digest := _digest(row["subject"])) is not None:
                    self._cache.distrust_key(digest)
                case "user_limits":
                    self._cache.distrust_user(row["subject"])
                case "tenant_limits":
                    self._cache.distrust_tenant(row["subject"])
                case "recall":
                    pass  # delivered above
                case "window":
                    if (window := _window(row["subject"])) is not None:
                        self.window_changed(window)
                case "plan":
                    concerns_all = True
                case "all" if row["subject"] == "plans":
                    concerns_all = True
                case "all" if row["subject"] == "prompt_templates":
                    if self._templates is not None:
                        self._templates.forget_all()
                case "all" if (emptied := self._follower_of_table.get(row["subject"])) is not None:
                    emptied.forget_all()
                case kind if (follower := self._followers.get(kind)) is not None:
                    follower.changed(row["subject"])
                case _:
                    # A whole table changed, or a kind that no trigger of ours writes: any key may have been revoked.
                    self._forget_all()
                    return
        # Once for any number of roles or plans: it visits every entry.
        if may_end_any_key:
            self._cache.forget_all()
        elif concerns_all:
            self._cache.distrust_all()

    def _distrust_all(self) -> None:
        self._cache.distrust_all()
        if self._owned is not None:
            self._owned.distrust_all()
        if self._templates is not None:
            self._templates.distrust_all()
        if self._signing_keys is not None:
            self._signing_keys.changed()
        for follower in self._followers.values():
            follower.distrust_all()

    def _forget_all(self) -> None:
        self._cache.forget_all()
        if self._owned is not None:
            self._owned.forget_all()
        if self._templates is not None:
            self._templates.forget_all()
        if self._signing_keys is not None:
            self._signing_keys.changed()
        for follower in self._followers.values():
            follower.forget_all()

    async def _follow(self) -> None:
        failures = 0
        while True:
            # Cleared before the poll, so that a notification during it causes another one.
            self._wake.clear()
            try:
                await self.poll()
                await self._forget_old()
                failures = 0
                pause = _POLL_SECONDS
            except (StoreUnavailable, StoreConflict) as error:
                _log.debug("reading the change feed failed, retrying: %s", error)
                pause = _retry_seconds(failures)
                failures += 1
            if self._database.moves != self._moves:
                self._moves = self._database.moves
                if self._listener is not None:
                    # The old server may no longer receive any writes.
                    await self._listener.close()
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _listen(self, listener: NotificationListener) -> None:
        while True:
            ended = asyncio.Event()
            try:
                await listener.open(self._wake.set, ended.set)
                self.is_listening = True
                await ended.wait()
            except StoreUnavailable as error:
                _log.debug("listening for notifications failed, reconnecting: %s", error)
            finally:
                self.is_listening = False
            await asyncio.sleep(_LISTEN_RETRY_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries

    async def _forget_old(self) -> None:
        """Delete changes that every live proxy has read. By snapshot, so that a late commit is not lost."""
        if self._snapshot is None:
            return
        if not self._samples or self._looked_at - self._samples[-1][0] >= _SAMPLE_SECONDS:
            self._samples.append((self._looked_at, self._snapshot))
            if self._looked_at - self._samples[0][0] >= _KEPT_SECONDS:
                self._forget_before = self._samples.popleft()[1]
        if self._forget_before and not await self.forgetting.advance(self._forget):
            self._forget_before = ""

    async def _forget(self, portion: int) -> bool:
        return len(await self._database.fetch("forget_changes", self._forget_before, portion)) >= portion


def _retry_seconds(failures: int) -> float:
    return _RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)] * random.uniform(0.75, 1.25)  # noqa: S311 - spreads


def _digest(subject: str) -> KeyDigest | None:
    try:
        return KeyDigest(bytes.fromhex(subject))
    except ValueError:
        return None


def _owned_id(subject: str) -> OwnedId | None:
    try:
        kind, object_id, tenant_id = json.loads(subject)
    except (ValueError, TypeError):
        return None
    return OwnedId(str(kind), str(object_id), str(tenant_id))


def _window(subject: str) -> Window | None:
    try:
        kind, owner, is_test, measure, selector = json.loads(subject)
    except (ValueError, TypeError):
        return None
    return Window(Pool(str(kind), str(owner), bool(is_test)), str(measure), str(selector))


def _is_older(snapshot: str, than: str) -> bool:
    """Whether a snapshot, `xmin:xmax:…`, is behind the other one, and so belongs to another history."""
    return int(snapshot.split(":")[1]) < int(than.split(":")[1])
