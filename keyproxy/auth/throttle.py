"""Throttling by peer: a burst is allowed, a steady stream must wait. Failed logins are throttled, and some requests.

A token bucket per peer, pure arithmetic over the given clock. An IPv6 host can use a whole /64, so each /64 is one peer.
"""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from typing import Final

_BURST: Final = 10
_SECONDS_EACH: Final = 6.0
_PEERS_MAX: Final = 10_000


class Throttle:
    """Counts events by peer: failures to authenticate, or requests."""

    def __init__(
        self, *, burst: int = _BURST, seconds_each: float = _SECONDS_EACH, peers_max: int = _PEERS_MAX
    ) -> None:
        """Allows `burst` events at once, then one every `seconds_each`."""
        self._burst = burst
        self._seconds_each = seconds_each
        self._peers_max = peers_max
        # The monotonic time at which the peer's bucket is full again.
        self._good_from: OrderedDict[str, float] = OrderedDict()

    def count(self, peer: str, now_mono: float) -> int:
        """Count an event. Returns the seconds that the peer must wait, 0 for none."""
        name = whole(peer)
        good_from = max(self._good_from.pop(name, now_mono), now_mono)
        ahead = good_from - now_mono
        over = ahead - (self._burst - 1) * self._seconds_each
        if over <= 0:
            good_from += self._seconds_each
        self._good_from[name] = good_from
        if len(self._good_from) > self._peers_max:
            # Full: evict the peer with the oldest event.
            self._good_from.popitem(last=False)
        return math.ceil(over) if over > 0 else 0

    def __len__(self) -> int:
        return len(self._good_from)


def whole(peer: str) -> str:
    """The throttling key of a peer: its address, or its /64."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)
