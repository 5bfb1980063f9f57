"""What callers are told of the limits they are under."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from keyproxy import ratelimit
from keyproxy.limits.allowance import Hold
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
    is_known = lease.policy.window_seconds is not None and now_mono < lease.ends_mono < math.inf
    return LimitState(lease.policy, remaining, lease.ends_mono - now_mono if is_known else None)


def lines(hold: Hold, now_mono: float) -> bytes:
    """The header lines of an answer to a request that holds this."""
    return hold.policy_line + ratelimit.state_line([state(lease, now_mono) for lease in hold.told])


def refusal(lease: Lease, need: int, now_mono: float, leases: Sequence[Lease] = ()) -> Refusal:
    """The Refusal of a request that needs so much of a lease that cannot give it. `leases`: all it was held against."""
    told = state(lease, now_mono)
    applied = [state(other, now_mono) for other in leases or (lease,)]
    measure = lease.window.measure
    if measure == RATE:
        return Refusal(
            Reason.RATE_LIMITED,
            limit=told,
            applied=applied,
            retry_after_seconds=max(1, math.ceil(lease.retry_mono - now_mono)),
        )
    return Refusal(
        _REASONS[measure], limit=told, applied=applied, said=f"It may use {need}." if measure in TOKENS else ""
    )
