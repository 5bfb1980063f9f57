"""Failed attempts to get in, by peer: a few are let go, a stream of them is told to wait. Who gets in is never counted.

A token bucket per peer, pure arithmetic over a clock that is given. An IPv6 host has a whole /64 to come from, and is
counted as that.
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
    """See the module."""

    def __init__(
        self, *, burst: int = _BURST, seconds_each: float = _SECONDS_EACH, peers_max: int = _PEERS_MAX
    ) -> None:
        """`burst` failures are let go at once, then one in `seconds_each`."""
        self._burst = burst
        self._seconds_each = seconds_each
        self._peers_max = peers_max
        # The monotonic time at which the peer has made good for all its failures.
        self._good_from: OrderedDict[str, float] = OrderedDict()

    def failed(self, peer: str, now_mono: float) -> int:
        """Count a failure. Seconds that the peer is told to wait, 0 for none."""
        name = whole(peer)
        good_from = max(self._good_from.pop(name, now_mono), now_mono)
        ahead = good_from - now_mono
        over = ahead - (self._burst - 1) * self._seconds_each
        if over <= 0:
            good_from += self._seconds_each
        self._good_from[name] = good_from
        if len(self._good_from) > self._peers_max:
            # Full: the peer that has failed longest ago is forgotten.
            self._good_from.popitem(last=False)
        return math.ceil(over) if over > 0 else 0

    def __len__(self) -> int:
        return len(self._good_from)


def whole(peer: str) -> str:
    """What a peer is counted as."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)
