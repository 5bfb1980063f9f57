"""Choose the exchanges that end when others wait for a connection to the upstream.

    immediately    requests with a client that sends or reads too slowly
    after a while  requests of a user beyond its share, if a user below its share waits: the least loss first

A request that makes progress, of a user within its share, is never ended for others. Nothing is resent to the upstream:
a request that is ended is refused, or its response is visibly truncated, and a tunnel is closed cleanly.
"""

from __future__ import annotations

import collections
from collections.abc import Collection
from typing import Final, TypeVar

from keyproxy.model import Owner
from keyproxy.wire.upstream.connection import UpstreamConnection
from keyproxy.wire.upstream.fair_queue import Turns

User = TypeVar("User")

#: How long to wait for connections to become free before requests beyond a user's share end: this fraction of the queue
#: timeout, and at most this long.
_PATIENT_PART: Final = 0.5
_PATIENT_SECONDS_MAX: Final = 1.0


def end_what_hardly_moves(
    connections: Collection[UpstreamConnection], turns: Turns[User], now: float, patience_seconds: float, *,
    is_full: bool,
) -> None:  # fmt: skip
    """End exchanges that were too slow for longer than `patience_seconds`, as far as that helps a waiting exchange."""
    helps_all = is_full and turns.may_have_place(now)
    for connection in list(connections):
        # For a waiting user at the cap, only the user's own connections can be freed.
        if helps_all or (connection.owner is not None and turns.waits(connection.owner)):
            connection.preempt_if_slow(now, patience_seconds)


def end_beyond_share(
    connections: Collection[UpstreamConnection], turns: Turns[User], now: float, patience_seconds: float, *,
    connecting: int,
) -> None:  # fmt: skip
    """End requests of users beyond their share, as far as users below theirs have waited long enough."""
    before = now - min(patience_seconds * _PATIENT_PART, _PATIENT_SECONDS_MAX)
    wanted = turns.starved(before, turns.places)
    if wanted:
        # These are about to become free.
        wanted -= connecting + sum(not connection.is_open for connection in connections)
    if wanted <= 0:
        return
    excess = turns.over_share()
    for owner in sorted(excess, key=lambda one: excess[one], reverse=True):
        for connection in _least_loss_first(connections, owner, now)[: min(wanted, excess[owner])]:
            connection.end_for_others()
            wanted -= 1
        if wanted <= 0:
            return


def make_room_for_tunnel(
    connections: Collection[UpstreamConnection], waiting: int, owner: Owner, now: float, tunnels_max: int
) -> bool:
    """Whether the user may begin one more tunnel; `waiting` are about to begin.

    At the bound the tunnel that has been silent longest, of a user who has more than half of them, ends for a user who
    has less.
    """
    held = collections.Counter(one.owner for one in connections if one.is_for_tunnel and one.owner is not None)
    if held.total() + waiting < tunnels_max:
        return True
    share = max(1, tunnels_max // 2)
    if held[owner] >= share or waiting >= tunnels_max:
        return False
    for largest, number in held.most_common(1):
        if number > share:
            tunnels = [one for one in _least_loss_first(connections, largest, now) if one.is_for_tunnel]
            tunnels[0].end_for_others()
            return True
    return False


def _least_loss_first(
    connections: Collection[UpstreamConnection], owner: Owner, now: float
) -> list[UpstreamConnection]:
    held = [one for one in connections if one.owner == owner and one.is_lent]
    return sorted(held, key=lambda one: one.loss(now))
