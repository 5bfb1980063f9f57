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
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.upstream.connection import UpstreamConnection
from keyproxy.wire.upstream.fair_queue import Turns

User = TypeVar("User")

#: How long to wait for connections to become free before requests beyond a user's share end: this fraction of the queue
#: timeout, and at most this long.
_PATIENT_PART: Final = 0.5
_PATIENT_SECONDS_MAX: Final = 1.0


def end_stalled(
    connections: Collection[UpstreamConnection],
    turns: Turns[User],
    now: float,
    patience_seconds: float,
    *,
    is_full: bool,
) -> None:
    """End exchanges that were too slow for longer than `patience_seconds`, as far as that helps a waiting exchange."""
    helps_all = is_full and turns.may_have_place(now)
    for connection in list(connections):
        # For a waiting user at the cap, only the user's own connections can be freed.
        if helps_all or (connection.owner is not None and turns.waits(connection.owner)):
            _end_if_slow(connection, now, patience_seconds)


def end_slow_of(connections: Collection[UpstreamConnection], owner: Owner, now: float, patience_seconds: float) -> None:
    """End the exchanges of one owner that were too slow for longer than `patience_seconds`."""
    for connection in list(connections):
        if connection.owner == owner:
            _end_if_slow(connection, now, patience_seconds)


def end_beyond_share(
    connections: Collection[UpstreamConnection],
    turns: Turns[User],
    now: float,
    patience_seconds: float,
    *,
    connecting: int,
) -> None:
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
        for connection in _least_loss_first(connections, owner)[: min(wanted, excess[owner])]:
            _end_for_others(connection)
            wanted -= 1
        if wanted <= 0:
            return


def make_room_for_tunnel(
    connections: Collection[UpstreamConnection], waiting: int, owner: Owner, tunnels_max: int
) -> bool:
    """Whether the user may begin one more tunnel; `waiting` are about to begin.

    At the bound the tunnel that has been silent longest, of a user who has more than half of them, ends for a user who
    has less.
    """
    held = collections.Counter(one.owner for one in connections if _is_for_tunnel(one) and one.owner is not None)
    if held.total() + waiting < tunnels_max:
        return True
    share = max(1, tunnels_max // 2)
    if held[owner] >= share or waiting >= tunnels_max:
        return False
    for largest, number in held.most_common(1):
        if number > share:
            tunnels = [one for one in _least_loss_first(connections, largest) if _is_for_tunnel(one)]
            _end_for_others(tunnels[0])
            return True
    return False


def _least_loss_first(connections: Collection[UpstreamConnection], owner: Owner) -> list[UpstreamConnection]:
    held = [one for one in connections if one.owner == owner and one.exchange is not None and one.is_open]
    return sorted(held, key=_loss)


def _end_if_slow(connection: UpstreamConnection, now: float, patience_seconds: float) -> None:
    """End the exchange if its client is the only reason for the delay."""
    exchange, writer = connection.exchange, connection.writer
    if exchange is None:
        if connection.has_lingered(now, patience_seconds):
            connection.abort()
        return
    if exchange.is_tunnel:
        return
    if exchange.has_response:
        if exchange.is_read_slowly(now, for_seconds=patience_seconds):
            exchange.preempt(Refusal(Reason.REQUEST_TIMEOUT, "the response was read too slowly while others waited"))
        return
    pace = writer.body_pace
    if pace is None or writer.is_whole or writer.outflow.is_stalled:
        return
    if pace.seconds(now) > patience_seconds and pace.is_slow(now):
        exchange.preempt(Refusal(Reason.REQUEST_TIMEOUT, "the body arrived too slowly while others waited"))


def _end_for_others(connection: UpstreamConnection) -> None:
    """End an exchange of a user with more than a share."""
    if connection.exchange is not None:
        connection.exchange.preempt(
            Refusal(Reason.OVERLOADED, "the user held more than a share of the connections while others waited")
        )


def _is_for_tunnel(connection: UpstreamConnection) -> bool:
    """Whether its exchange is a tunnel, or is a handshake for one."""
    return connection.exchange is not None and connection.exchange.is_tunnel_request


def _loss(connection: UpstreamConnection) -> tuple[int, float]:
    """Return the sort key: the smaller, the less is lost if the exchange is ended for others.

    First requests that the upstream has not received completely; then tunnels, the one silent longest first; then
    requests that are safe to retry. Last a request that is not idempotent, since its client could not know whether
    it was executed. Among equals, the one that began last loses least.
    """
    exchange = connection.exchange
    if exchange is None:
        return 0, 0.0
    if exchange.is_tunnel:
        return 1, connection.deadline
    if not exchange.is_complete:
        return 0, -exchange.sent_mono
    if exchange.is_idempotent:
        return 2, -exchange.sent_mono
    return (3 if exchange.has_response else 4), -exchange.sent_mono
