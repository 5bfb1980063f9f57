"""Share the places of one pool: the places per user, the queue, and the next turn. Pure.

    held[user] <= cap                                                          always
    a place goes to a user who holds a share or more only if no other waits    always
    such users leave `spare` places free                                       while and shortly after others waited

A place that becomes free goes to a waiting user that holds less than a share, users taking turns; only if there is
none, to one that holds a share or more. A user at the cap waits until one of its own places becomes free. A user's
requests are served in order. No state is kept for a user that holds nothing and waits for nothing.
"""

from __future__ import annotations

import collections
import enum
from typing import Final, Generic, TypeVar

from keyproxy.model import Owner

T = TypeVar("T")

_WAITING_PER_PLACE: Final = 16

#: How long, after a user below its share had to wait, users at their share leave places free, and the fraction of
#: places (one in this many) that they leave: the next request of a user below its share gets one immediately.
_SPARE_SECONDS: Final = 10.0
_SPARE_DIVISOR: Final = 8


class Rank(enum.Enum):
    """The state of a waiting user."""

    BELOW_SHARE = 0
    BELOW_CAP = 1
    AT_CAP = 2


class Turns(Generic[T]):
    """Shares the places of one pool between users. `T` is the type of queued items."""

    def __init__(self, places: int, per_user_max: int = 0) -> None:
        """`per_user_max`: both the share and the cap. 0: the share is half of the places, and there is no cap."""
        self.share: Final = min(places, per_user_max) if per_user_max else max(1, places // 2)
        self.cap: Final = min(places, per_user_max) if per_user_max else places
        self.places: Final = places
        self.spare: Final = max(1, places // _SPARE_DIVISOR)
        self.waiting_max: Final = places * _WAITING_PER_PLACE
        self._held: dict[Owner, int] = {}
        self._total = 0
        self._spares_until = 0.0
        #: All queued items, longest wait first, with the time they were queued and their user.
        self._since: collections.OrderedDict[T, tuple[float, Owner]] = collections.OrderedDict()
        self._queues: dict[Owner, collections.OrderedDict[T, None]] = {}
        self._ranked: tuple[collections.OrderedDict[Owner, None], ...] = tuple(collections.OrderedDict() for _ in Rank)
        self._ranks: dict[Owner, Rank] = {}

    def may_take(self, user: Owner, now: float) -> bool:
        """Whether the user may take a free place."""
        held = self._held.get(user, 0)
        return held < self.share or (held < self.cap and self._may_exceed_share(now))

    def try_take(self, user: Owner, now: float) -> bool:
        """Give the user a free place, if it may take one. Return whether it has got it."""
        held = self._held.get(user, 0)
        if held >= self.share and (held >= self.cap or not self._may_exceed_share(now)):
            return False
        self._hold(user, held + 1, now)
        return True

    def take(self, user: Owner, now: float) -> None:
        """Record that the user got a place."""
        self._hold(user, self._held.get(user, 0) + 1, now)

    def _hold(self, user: Owner, held: int, now: float) -> None:
        self._held[user] = held
        self._total += 1
        if self._queues:
            self._rank(user)
        if now < self._spares_until and held <= self.share and self.places - self._total < self.spare:
            self._spares_until = now + _SPARE_SECONDS

    def give_back(self, user: Owner) -> None:
        """Record that a place of the user is free again."""
        held = self._held.pop(user) - 1
        self._total -= 1
        if held:
            self._held[user] = held
        if self._queues:
            self._rank(user)

    def held(self, user: Owner) -> int:
        """The number of places that the user holds."""
        return self._held.get(user, 0)

    def queued(self, user: Owner) -> int:
        """The number of queued items of the user."""
        return len(self._queues.get(user, ()))

    def wait(self, user: Owner, one: T, now: float) -> bool:
        """Queue an item. False: the queue is full."""
        if len(self._since) >= self.waiting_max:
            return False
        queue = self._queues.get(user)
        if queue is None:
            queue = self._queues[user] = collections.OrderedDict()
        queue[one] = None
        self._since[one] = (now, user)
        self._rank(user)
        if self._total >= self.places and self._ranks[user] is Rank.BELOW_SHARE:
            self._spares_until = now + _SPARE_SECONDS
        return True

    def last_of_most(self, user: Owner) -> T | None:
        """Return the item to drop from a full queue for this user's: the last one of the user with the most items.

        None if this user would have as many.
        """
        most = max(self._queues, key=lambda one: len(self._queues[one]), default=None)
        if most is None or len(self._queues[most]) <= len(self._queues.get(user, ())) + 1:
            return None
        return next(reversed(self._queues[most]))

    def leave(self, one: T) -> None:
        """Remove an item from the queue."""
        found = self._since.pop(one, None)
        if found is not None:
            self._left(found[1], one)

    def next(self, now: float) -> tuple[T, Owner] | None:
        """Dequeue the item that gets the next place, with its user. None if no item may have one."""
        user = self._next_user(now)
        if user is None:
            return None
        one = next(iter(self._queues[user]))
        del self._since[one]
        self._left(user, one)
        if user in self._ranks:
            # All other users have their turn before this user's next one.
            self._ranked[self._ranks[user].value].move_to_end(user)
        return one, user

    def first(self) -> T | None:
        """The item that has waited longest."""
        return next(iter(self._since), None)

    def since(self, one: T) -> float:
        """The time at which an item was queued."""
        return self._since[one][0]

    def owner(self, one: T) -> Owner:
        """The user of an item."""
        return self._since[one][1]

    def may_have_place(self, now: float) -> bool:
        """Whether any queued item would get a place if one were free."""
        return self._next_user(now) is not None

    def is_within_cap(self, user: Owner) -> bool:
        """Whether the user's places and queued items together stay within the cap."""
        return self.held(user) + self.queued(user) <= self.cap

    def waits(self, user: Owner) -> bool:
        """Whether any item of the user is queued."""
        return user in self._queues

    def starved(self, before: float, number: int) -> int:
        """Count the items, `number` at most, queued before this instant by users that hold less than a share.

        Each user counts for no more items than it needs to reach its share.
        """
        found = 0
        for user in self._ranked[Rank.BELOW_SHARE.value]:
            room = self.share - self.held(user)
            for one in self._queues[user]:
                if room <= 0 or found >= number or self._since[one][0] > before:
                    break
                room -= 1
                found += 1
            if found >= number:
                break
        return found

    def over_share(self) -> dict[Owner, int]:
        """Users that hold more than a share, with the number of places above it."""
        return {user: held - self.share for user, held in self._held.items() if held > self.share}

    def most_held(self) -> int:
        """The largest number of places that one user holds."""
        return max(self._held.values(), default=0)

    def __len__(self) -> int:
        """The number of queued items."""
        return len(self._since)

    def users(self) -> int:
        """The number of users that hold a place or wait."""
        return len(self._held.keys() | self._queues.keys())

    def _may_exceed_share(self, now: float) -> bool:
        return now >= self._spares_until or self.places - self._total > self.spare

    def _next_user(self, now: float) -> Owner | None:
        below_share, below_cap, _ = self._ranked
        if below_share:
            return next(iter(below_share))
        if below_cap and self._may_exceed_share(now):
            return next(iter(below_cap))
        return None

    def _left(self, user: Owner, one: T) -> None:
        queue = self._queues[user]
        del queue[one]
        if not queue:
            del self._queues[user]
            del self._ranked[self._ranks.pop(user).value][user]

    def _rank(self, user: Owner) -> None:
        """Update the position of a waiting user."""
        if user not in self._queues:
            return
        held = self._held.get(user, 0)
        rank = Rank.BELOW_SHARE if held < self.share else Rank.BELOW_CAP if held < self.cap else Rank.AT_CAP
        was = self._ranks.get(user)
        if was is rank:
            return
        if was is not None:
            del self._ranked[was.value][user]
        self._ranks[user] = rank
        self._ranked[rank.value][user] = None
