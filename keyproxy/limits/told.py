"""What callers are told of the limits they are under."""

from __future__ import annotations

import math
from typing import Final

from keyproxy.limits.leases import CONCURRENCY, RATE, REQUESTS, TOKENS, Lease
from keyproxy.reasons import LimitState, Reason, Refusal

_WINDOW_SECONDS: Final = {"requests_per_day": 86_400, "tokens_per_day": 86_400, "requests_per_month": 2_592_000,
                          "tokens_per_month": 2_592_000}  # fmt: skip

_REASONS: Final = {RATE: Reason.RATE_LIMITED, CONCURRENCY: Reason.CONCURRENCY_LIMITED}
_REASONS.update(dict.fromkeys(REQUESTS, Reason.QUOTA_EXHAUSTED))
_REASONS.update(dict.fromkeys(TOKENS, Reason.TOKEN_BUDGET_EXHAUSTED))


def state(lease: Lease, now_mono: float) -> LimitState:
    """How it stands with one limit."""
    if lease.is_rate:
        window = max(1, math.ceil(lease.limit * lease.interval_seconds))
        reset = math.ceil(max(0.0, (lease.limit - lease.remaining) * lease.interval_seconds))
        return LimitState(lease.window.policy, lease.limit, window, lease.remaining, reset)
    window_seconds = _WINDOW_SECONDS.get(lease.window.measure)
    ends = (
        None
        if window_seconds is None or lease.ends_mono <= now_mono
        else math.ceil(max(0.0, lease.ends_mono - now_mono))
    )
    return LimitState(lease.window.policy, lease.limit, window_seconds, lease.remaining, ends)


def refusal(lease: Lease, need: int, now_mono: float) -> Refusal:
    """The Refusal of a request that needs so much of a lease that cannot give it."""
    told = state(lease, now_mono)
    measure = lease.window.measure
    retry: int | None = 1
    if measure == RATE:
        retry = max(1, math.ceil(lease.retry_mono - now_mono))
    elif measure != CONCURRENCY:
        retry = told.reset_seconds
    said = f"It may use {need}." if measure in TOKENS else ""
    return Refusal(_REASONS[measure], told.policy, said=said, retry_after_seconds=retry, limit=told)
