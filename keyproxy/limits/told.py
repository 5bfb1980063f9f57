"""What callers are told of the limits they are under."""

from __future__ import annotations

import math
from typing import Final

from keyproxy.limits.leases import CONCURRENCY, RATE, REQUESTS, TOKENS, Lease
from keyproxy.ratelimit import LimitState
from keyproxy.reasons import Reason, Refusal

_REASONS: Final = {RATE: Reason.RATE_LIMITED, CONCURRENCY: Reason.CONCURRENCY_LIMITED}
_REASONS.update(dict.fromkeys(REQUESTS, Reason.QUOTA_EXHAUSTED))
_REASONS.update(dict.fromkeys(TOKENS, Reason.TOKEN_BUDGET_EXHAUSTED))


def state(lease: Lease, now_mono: float) -> LimitState:
    """How it stands with one limit."""
    remaining = lease.remaining
    if lease.is_rate:
        # What comes back since the ledger answered is not counted: who waits for it does not come too early.
        return LimitState(lease.policy, remaining, (lease.limit - remaining) * lease.interval_seconds)
    is_known = lease.policy.window_seconds is not None and lease.ends_mono > now_mono
    return LimitState(lease.policy, remaining, lease.ends_mono - now_mono if is_known else None)


def refusal(lease: Lease, need: int, now_mono: float) -> Refusal:
    """The Refusal of a request that needs so much of a lease that cannot give it."""
    told = state(lease, now_mono)
    measure = lease.window.measure
    if measure == RATE:
        return Refusal(
            Reason.RATE_LIMITED, limit=told, retry_after_seconds=max(1, math.ceil(lease.retry_mono - now_mono))
        )
    return Refusal(_REASONS[measure], limit=told, said=f"It may use {need}." if measure in TOKENS else "")
