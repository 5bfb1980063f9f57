"""What callers are told of the limit that refused them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from keyproxy.limits.leases import Lease
from keyproxy.limits.messages import CONCURRENCY, RATE, REQUESTS, TOKENS
from keyproxy.limits.statement import state
from keyproxy.reasons import Reason, Refusal

_REASONS: Final = {RATE: Reason.RATE_LIMITED, CONCURRENCY: Reason.CONCURRENCY_LIMITED}
_REASONS.update(dict.fromkeys(REQUESTS, Reason.QUOTA_EXHAUSTED))
_REASONS.update(dict.fromkeys(TOKENS, Reason.TOKEN_BUDGET_EXHAUSTED))


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
