"""Build the rate limit header lines of a response: `RateLimit-Policy` and `RateLimit`.

If many limits apply, the headers name the ones nearest to exhaustion, at most `REPORTED_MAX`. The selection and the reset
times are refreshed once a second; the remaining amounts are current in every response. A reset time is never too short:
a client that waits for it is admitted.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

from keyproxy import limit_state
from keyproxy.limit_state import LimitPolicy, LimitState
from keyproxy.limits.lease import Lease
from keyproxy.mypyc_compat import mypyc_attr

#: Formatting costs more than deciding: with limits of key, user and tenant there may be fifteen.
REPORTED_MAX: Final = 3

_KEPT_SECONDS: Final = 1.0

#: A limit that no time alone resets.
_NEVER: Final = -1


class _Beginning:
    """The text before the first limit's state, and the limits that it lists."""

    __slots__ = ("policies", "text")

    def __init__(self, policies: tuple[LimitPolicy, ...]) -> None:
        self.policies: Final = policies
        self.text: Final = limit_state.policy_line(policies) + b"RateLimit: "

    def lists(self, leases: tuple[Lease, ...]) -> bool:
        """Whether these are the limits of the leases. Policies are shared, so that identity suffices."""
        policies = self.policies
        number = len(policies)
        while number and leases[number - 1].policy is policies[number - 1]:
            number -= 1
        return not number


@mypyc_attr(acyclic=True)
class RateLimitHeaders:
    """The header lines for one set of leases."""

    # Each active user has one, and most requests are the first of their user in a second: selecting has to be cheap, and
    # the result small.
    __slots__ = ("_beginning", "_leases", "_nearest", "_resets", "_until_mono")

    def __init__(self, leases: tuple[Lease, ...]) -> None:
        self._leases: Final = leases
        self._beginning: _Beginning | None = None
        #: The limits to report, and in how many seconds each is reset.
        self._nearest: tuple[Lease, ...] = ()
        self._resets: tuple[int, ...] = ()
        self._until_mono = -math.inf

    def lines(self, now_mono: float) -> bytes:
        """Return the current lines; empty if no limits are reported."""
        if now_mono >= self._until_mono:
            if not self._leases:
                return b""
            self._select(now_mono)
        beginning = self._beginning
        assert beginning is not None  # noqa: S101 - for the type checker
        nearest, resets = self._nearest, self._resets
        if len(nearest) == REPORTED_MAX and _NEVER not in resets:
            # One format call instead of three: 3 % of a request in the compiled build.
            one, two, three = nearest
            return b"%b%b;r=%d;t=%d, %b;r=%d;t=%d, %b;r=%d;t=%d\r\n" % (
                beginning.text,
                one.policy.key, one.remaining, resets[0],
                two.policy.key, two.remaining, resets[1],
                three.policy.key, three.remaining, resets[2],
            )  # fmt: skip
        items = [_item(lease, reset) for lease, reset in zip(nearest, resets, strict=True)]
        return beginning.text + b", ".join(items) + b"\r\n"

    def _select(self, now_mono: float) -> None:
        """Select the limits to report for a second."""
        leases = self._leases
        if self._beginning is None or not self._beginning.lists(leases):
            self._beginning = _beginning(tuple([lease.policy for lease in leases]))
        self._nearest = nearest = leases if len(leases) <= 1 else _nearest(leases)
        self._resets = tuple([_reset_seconds(lease, now_mono) for lease in nearest])
        self._until_mono = now_mono + _KEPT_SECONDS


def _nearest(leases: tuple[Lease, ...]) -> tuple[Lease, ...]:
    """The limits nearest to exhaustion, at most `REPORTED_MAX`; of equally near ones those that come first.

    Sorting with a key function takes five times as long.
    """
    first, second, third = leases[0], leases[0], leases[0]
    of_first = of_second = of_third = math.inf
    for lease in leases:
        nearness = lease.remaining / lease.quota if lease.quota > 0 else 0.0
        if nearness < of_first:
            third, of_third, second, of_second, first, of_first = second, of_second, first, of_first, lease, nearness
        elif nearness < of_second:
            third, of_third, second, of_second = second, of_second, lease, nearness
        elif nearness < of_third:
            third, of_third = lease, nearness
    return (first, second) if len(leases) < REPORTED_MAX else (first, second, third)


def state(lease: Lease, now_mono: float) -> LimitState:
    """The current state of one limit."""
    remaining = lease.remaining
    if lease.is_rate:
        # Units refilled since the ledger's reply are not counted, so that a client that waits does not return too
        # early.
        return LimitState(lease.policy, remaining, (lease.limit - remaining) * lease.interval_seconds)
    is_known = lease.policy.window_seconds is not None and now_mono < lease.ends_mono < math.inf
    return LimitState(lease.policy, remaining, lease.ends_mono - now_mono if is_known else None)


def _reset_seconds(lease: Lease, now_mono: float) -> int:
    """`reset_seconds_shown` of the state of a limit, `_NEVER` for None."""
    if not lease.is_rate and (not now_mono < lease.ends_mono < math.inf or lease.policy.window_seconds is None):
        return _NEVER
    seconds = (lease.limit - lease.remaining) * lease.interval_seconds if lease.is_rate else lease.ends_mono - now_mono
    return max(0, math.ceil(seconds))


def _item(lease: Lease, reset_seconds: int) -> bytes:
    if reset_seconds == _NEVER:
        return b"%b;r=%d" % (lease.policy.key, lease.remaining)
    return b"%b;r=%d;t=%d" % (lease.policy.key, lease.remaining, reset_seconds)


@lru_cache(maxsize=1_024)
def _beginning(policies: tuple[LimitPolicy, ...]) -> _Beginning:
    """The text before the first limit's state. Shared by all responses under the same limits."""
    return _Beginning(policies)
