"""What an answer says of the limits its request was under: the two header lines, made anew for every answer.

Of many limits those nearest to their end are told, at most `TOLD_MAX`; which ones, and when they reset, is looked at once
a second. How much remains is looked at for every answer. A time is never told too short: who waits for it is let in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from keyproxy import ratelimit
from keyproxy.limits.leases import Lease
from keyproxy.ratelimit import LimitState

#: Formatting costs more than deciding: with limits of key, user and tenant there may be fifteen.
TOLD_MAX: Final = 3

_KEPT_SECONDS: Final = 1.0


class Statement:
    """See the module. Belongs to one set of leases."""

    __slots__ = ("_format", "_leases", "_policies", "_told", "_until_mono")

    def __init__(self, leases: Sequence[Lease]) -> None:
        self._leases = tuple(leases)
        self._policies = ratelimit.policy_line(tuple([lease.policy for lease in leases]))
        #: Which leases are told, and the line with a place for what remains of each.
        self._told: list[Lease] = []
        self._format = b""
        self._until_mono = -math.inf

    def lines(self, now_mono: float) -> bytes:
        """The lines at this moment; empty if there are no limits to tell of."""
        if now_mono >= self._until_mono:
            if not self._leases:
                return b""
            self._told = sorted(self._leases, key=_nearness)[:TOLD_MAX]
            self._format = b"RateLimit: %b\r\n" % b", ".join([_item(lease, now_mono) for lease in self._told])
            self._until_mono = now_mono + _KEPT_SECONDS
        remaining = []
        for lease in self._told:
            left = lease.seen_available + lease.free
            remaining.append(max(left, 0))
        return self._policies + self._format % tuple(remaining)


def state(lease: Lease, now_mono: float) -> LimitState:
    """How it stands with one limit."""
    remaining = lease.remaining
    if lease.is_rate:
        # What comes back since the ledger answered is not counted: who waits for it does not come too early.
        return LimitState(lease.policy, remaining, (lease.limit - remaining) * lease.interval_seconds)
    is_known = lease.policy.window_seconds is not None and now_mono < lease.ends_mono < math.inf
    return LimitState(lease.policy, remaining, lease.ends_mono - now_mono if is_known else None)


def _nearness(lease: Lease) -> float:
    return lease.remaining / lease.limit if lease.limit else 0.0


def _item(lease: Lease, now_mono: float) -> bytes:
    """One limit as it is told, with a place for what remains of it."""
    reset_seconds = state(lease, now_mono).told_reset_seconds
    return (
        lease.policy.key.replace(b"%", b"%%") + b";r=%d" + (b"" if reset_seconds is None else b";t=%d" % reset_seconds)
    )
