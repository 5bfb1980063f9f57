"""Build the rate limit header lines of a response: `RateLimit-Policy` and `RateLimit`.

If many limits apply, the headers name the ones nearest to exhaustion, at most `REPORTED_MAX`. The selection and the reset
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
REPORTED_MAX: Final = 3

_KEPT_SECONDS: Final = 1.0


class RateLimitHeaders:
    """The header lines for one set of leases."""

    __slots__ = ("_leases", "_selection")

    def __init__(self, leases: Sequence[Lease]) -> None:
        self._leases = tuple(leases)
        self._selection: _Selection | None = None

    def lines(self, now_mono: float) -> bytes:
        """Return the current lines; empty if no limits are reported."""
        selection = self._selection
        if selection is None or now_mono >= selection.until_mono:
            if not self._leases:
                return b""
            selection = self._selection = _Selection(self._leases, now_mono)
        return selection.lines()


class _Selection:
    """The limits selected for one second, and the texts between their remaining amounts."""

    __slots__ = ("_leases", "_texts", "until_mono")

    def __init__(self, leases: Sequence[Lease], now_mono: float) -> None:
        nearest = sorted(leases, key=_nearness)[:REPORTED_MAX]
        texts = [_beginning(tuple([lease.policy for lease in leases]))]
        for lease in nearest:
            texts[-1] += b"%b;r=" % lease.policy.key
            texts.append(_reset_parameter(lease, now_mono) + b", ")
        texts[-1] = texts[-1].removesuffix(b", ") + b"\r\n"
        self._leases = nearest
        self._texts = texts
        self.until_mono = now_mono + _KEPT_SECONDS

    def lines(self) -> bytes:
        """Return the lines with the current remaining amounts."""
        leases, texts = self._leases, self._texts
        if len(leases) == REPORTED_MAX:
            # One format call instead of three: 3 % of a request in the compiled build.
            return b"%b%d%b%d%b%d%b" % (
                texts[0], leases[0].remaining, texts[1], leases[1].remaining, texts[2], leases[2].remaining, texts[3],
            )  # fmt: skip
        lines = texts[0]
        for lease, text in zip(leases, texts[1:], strict=True):
            lines = b"%b%d%b" % (lines, lease.remaining, text)
        return lines


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
    return lease.remaining / lease.quota if lease.quota > 0 else 0.0


@lru_cache(maxsize=1_024)
def _beginning(policies: tuple[LimitPolicy, ...]) -> bytes:
    """The text before the first limit's state. Shared by all responses under the same limits."""
    return limit_state.policy_line(policies) + b"RateLimit: "


def _reset_parameter(lease: Lease, now_mono: float) -> bytes:
    reset_seconds = state(lease, now_mono).reset_seconds_shown
    return b"" if reset_seconds is None else b";t=%d" % reset_seconds
