"""Build the refusal for an exceeded limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from keyproxy.limits.lease import Lease
from keyproxy.limits.ledger_protocol import CONCURRENCY, RATE, REQUESTS, TOKENS
from keyproxy.limits.ratelimit_headers import state
from keyproxy.reasons import Reason, Refusal

_REASONS: Final = {RATE: Reason.RATE_LIMITED, CONCURRENCY: Reason.CONCURRENCY_LIMITED}
_REASONS.update(dict.fromkeys(REQUESTS, Reason.QUOTA_EXHAUSTED))
_REASONS.update(dict.fromkeys(TOKENS, Reason.TOKEN_BUDGET_EXHAUSTED))

#: Reservations of requests in flight can be released at any moment. Retries are spread over this many seconds.
_HELD_SECONDS_MAX: Final = 5


def refusal(lease: Lease, need: int, now_mono: float, leases: Sequence[Lease] = ()) -> Refusal:
    """Build the refusal of a request that needs more than a lease has left. `leases`: all that apply to it."""
    exceeded = state(lease, now_mono)
    applied = [state(other, now_mono) for other in leases or (lease,)]
    measure = lease.window.measure
    if measure == RATE:
        return Refusal(
            Reason.RATE_LIMITED,
            limit=exceeded,
            applied=applied,
            retry_after_seconds=max(1, math.ceil(lease.retry_mono - now_mono)),
        )
    is_held = measure != CONCURRENCY and lease.spent + need <= lease.limit
    return Refusal(
        _REASONS[measure],
        limit=exceeded,
        applied=applied,
        caller_text=_caller_text(need, is_held=is_held) if measure in TOKENS else "",
        retry_after_seconds=_held_seconds(now_mono) if is_held else None,
        is_held=is_held,
    )


def never_fits(lease: Lease, need: int, now_mono: float, leases: Sequence[Lease]) -> Refusal:
    """Build the refusal of a request that needs more tokens than the whole window has."""
    return Refusal(
        Reason.TOKEN_LIMIT_PER_REQUEST,
        limit=state(lease, now_mono),
        applied=[state(other, now_mono) for other in leases],
        caller_text=f"The request may use up to {need} tokens; the whole window has {lease.limit}.",
    )


def _caller_text(need: int, *, is_held: bool) -> str:
    held = " Requests in flight reserve what is left." if is_held else ""
    return f"The request may use up to {need} tokens.{held}"


def _held_seconds(now_mono: float) -> int:
    """Return 1 to `_HELD_SECONDS_MAX` from the clock's milliseconds, so that clients refused together retry apart."""
    return 1 + int(now_mono * 1000.0) % _HELD_SECONDS_MAX
