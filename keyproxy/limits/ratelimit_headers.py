"""Build the rate limit header lines of a response: `RateLimit-Policy` and `RateLimit`.

If many limits apply, the headers name the ones nearest to exhaustion, at most `TOLD_MAX`. The selection and the reset
times are refreshed once a second; the remaining amounts are current in every response. A reset time is never too short:
a client that waits for it is admitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from keyproxy import limit_state
from keyproxy.limit_state import LimitPolicy, LimitState
from keyproxy.limits.lease import Lease

#: Formatting costs more than deciding: with limits of key, user and tenant there may be fifteen.
TOLD_MAX: Final = 3

_KEPT_SECONDS: Final = 1.0

#: The last three digits of a number, and whole numbers of up to three digits: a number is joined from these instead of
#: formatted.
_DIGITS: Final[tuple[bytes, ...]] = tuple([b"%03d" % number for number in range(1000)])
_NUMBERS: Final[tuple[bytes, ...]] = tuple([b"%d" % number for number in range(1000)])


class RateLimitHeaders:
    """The header lines for one set of leases."""

    __slots__ = ("_beginning", "_leases", "_telling")

    def __init__(self, leases: Sequence[Lease]) -> None:
        self._leases = tuple(leases)
        self._beginning = _beginning(tuple([lease.policy for lease in leases]))
        self._telling: _Telling | None = None

    def lines(self, now_mono: float) -> bytes:
        """Return the current lines; empty if no limits are reported."""
        telling = self._telling
        if telling is None or now_mono >= telling.until_mono:
            if not self._leases:
                return b""
            telling = self._telling = _Telling(self._leases, self._beginning, now_mono)
        return telling.lines()


class _Telling:
    """The limits selected for one second, and the lines as last sent."""

    __slots__ = ("_pieces", "_thousands", "_told", "until_mono")

    def __init__(self, leases: Sequence[Lease], beginning: bytes, now_mono: float) -> None:
        self._told = sorted(leases, key=_nearness)[:TOLD_MAX]
        #: The remaining amount of each limit in whole thousands, as of its first piece.
        self._thousands = [lease.remaining // 1000 * 1000 for lease in self._told]
        #: A prefix, then for each limit: all but the last three digits, those digits, and the suffix.
        self._pieces = [beginning]
        for lease in self._told:
            self._pieces += _lead(lease, lease.remaining), b"", _tail(lease, now_mono) + b", "
        self._pieces[-1] = self._pieces[-1][:-2] + b"\r\n"
        self.until_mono = now_mono + _KEPT_SECONDS

    def lines(self) -> bytes:
        """Return the lines with the current remaining amounts."""
        pieces, thousands, at = self._pieces, self._thousands, 1
        for number, lease in enumerate(self._told):
            left = lease.seen_available + lease.free
            rest = left - thousands[number]
            if not 0 <= rest < 1000:
                left = max(left, 0)
                rest = left % 1000
                thousands[number] = left - rest
                pieces[at] = _lead(lease, left)
            pieces[at + 1] = _NUMBERS[rest] if left < 1000 else _DIGITS[rest]
            at += 3
        return b"".join(pieces)


def state(lease: Lease, now_mono: float) -> LimitState:
    """The current state of one limit."""
    remaining = lease.remaining
    if lease.is_rate:
        # Units refilled since the ledger's reply are not counted, so that a client that waits does not return too
        # early.
        return LimitState(lease.policy, remaining, (lease.limit - remaining) * lease.interval_seconds)
    is_known = lease.policy.window_seconds is not None and now_mono < lease.ends_mono < math.inf
    return LimitState(lease.policy, remaining, lease.ends_mono - now_mono if is_known else None)


def _nearness(lease: Lease) -> float:
    return lease.remaining / lease.limit if lease.limit else 0.0


@lru_cache(maxsize=1_024)
def _beginning(policies: tuple[LimitPolicy, ...]) -> bytes:
    """The text before the first limit's state. Shared by all responses under the same limits."""
    return limit_state.policy_line(policies) + b"RateLimit: "


def _lead(lease: Lease, remaining: int) -> bytes:
    """The text of a limit, up to the last three digits of its remaining amount."""
    return lease.policy.key + (b";r=" if remaining < 1000 else b";r=%d" % (remaining // 1000))


def _tail(lease: Lease, now_mono: float) -> bytes:
    """The text of a limit after its remaining amount."""
    reset_seconds = state(lease, now_mono).reset_seconds_shown
    return b"" if reset_seconds is None else b";t=%d" % reset_seconds
