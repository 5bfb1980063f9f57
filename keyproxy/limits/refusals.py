"""Build the refusal for an exceeded limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from keyproxy import limit_state
from keyproxy.limit_state import LimitState
from keyproxy.limits.lease import Lease
from keyproxy.limits.ledger_protocol import (
    BUDGETS,
    CONCURRENCY,
    REQUESTS,
    REQUESTS_TOTAL,
    SPEND,
    TOKENS,
    TOKENS_TOTAL,
)
from keyproxy.limits.ratelimit_headers import state
from keyproxy.reasons import LimitReason, Reason, Refusal

_REASONS: Final = {CONCURRENCY: Reason.CONCURRENCY_LIMITED}
_REASONS.update(dict.fromkeys(REQUESTS, Reason.QUOTA_EXHAUSTED))
_REASONS.update(dict.fromkeys(TOKENS, Reason.TOKEN_BUDGET_EXHAUSTED))
_REASONS.update(dict.fromkeys(SPEND, Reason.SPEND_BUDGET_EXHAUSTED))

#: They replace the sentences of the reasons, which are about the current window.
_BUDGET_SENTENCES: Final = {
    REQUESTS_TOTAL: "The request budget of the agent token is exhausted.",
    TOKENS_TOTAL: "The request may use more tokens than remain in the token budget of the agent token.",
}

#: Reservations of requests in flight can be released at any moment. Retries are spread over this many seconds.
_HELD_SECONDS_MAX: Final = 5


def refusal(lease: Lease, need: int, now_mono: float, leases: Sequence[Lease] = ()) -> Refusal:
    """Build the refusal of a request that needs more than a lease has left. `leases`: all that apply to it."""
    exceeded = state(lease, now_mono)
    applied = [state(other, now_mono) for other in leases or (lease,)]
    measure = lease.measure
    if lease.is_rate:
        return Refusal(
            Reason.RATE_LIMITED,
            limit=exceeded,
            applied=applied,
            retry_after_seconds=max(1, math.ceil(lease.retry_mono - now_mono)),
            limit_reason=LimitReason.PACE,
        )
    if measure == CONCURRENCY:
        return Refusal(Reason.CONCURRENCY_LIMITED, limit=exceeded, applied=applied)
    is_held = lease.spent + need <= lease.quota
    is_budget = measure in BUDGETS
    text = "" if measure in REQUESTS else _caller_text(lease, need, is_held=is_held)
    return Refusal(
        _REASONS[measure],
        limit=exceeded,
        applied=applied,
        caller_text=f"{_BUDGET_SENTENCES[measure]} {text}".rstrip() if is_budget else text,
        replaces_sentence=is_budget,
        retry_after_seconds=_held_seconds(now_mono) if is_held else None,
        limit_reason=LimitReason.HELD if is_held else LimitReason.SPENT,
    )


def wait_order(lease: Lease, need: int) -> tuple[bool, float]:
    """The order of exceeded limits by how long they refuse the request: a spent budget always does."""
    is_spent_budget = lease.measure in BUDGETS and lease.spent + need > lease.quota
    return is_spent_budget, lease.retry_mono


def never_fits(lease: Lease, need: int, now_mono: float, leases: Sequence[Lease]) -> Refusal:
    """Build the refusal of a request that needs more than the whole window has, or than the burst of a token rate."""
    whole = f"the burst is {lease.limit}" if lease.is_rate else f"the whole window has {max(0, lease.quota)}"
    return Refusal(
        Reason.SPEND_LIMIT_PER_REQUEST if lease.measure in SPEND else Reason.TOKEN_LIMIT_PER_REQUEST,
        limit=state(lease, now_mono),
        applied=[state(other, now_mono) for other in leases],
        caller_text=f"The request needs {_amount(need, _unit(lease))}; {whole}.",
        limit_reason=LimitReason.NEVER_FITS,
    )


def exceeds_limit_per_request(bound: LimitState, need: int, now_mono: float, leases: Sequence[Lease]) -> Refusal:
    """Build the refusal of a request that needs more than the plan allows per request."""
    is_spend = bound.policy.unit != limit_state.TOKENS
    most = _amount(need, limit_state.MONEY if is_spend else limit_state.TOKENS)
    return Refusal(
        Reason.SPEND_LIMIT_PER_REQUEST if is_spend else Reason.TOKEN_LIMIT_PER_REQUEST,
        limit=bound,
        applied=[bound, *(state(other, now_mono) for other in leases)],
        caller_text=f"The request may use up to {most}; the plan allows {bound.remaining} per request.",
        limit_reason=LimitReason.NEVER_FITS,
    )


def _unit(lease: Lease) -> str:
    return limit_state.MONEY if lease.measure in SPEND else limit_state.TOKENS


def _amount(number: int, unit: str) -> str:
    """A number with its unit: `1 token`, `2 tokens`."""
    return f"{number} {unit.removesuffix('s') if number == 1 else unit}"


def _caller_text(lease: Lease, need: int, *, is_held: bool) -> str:
    held = " Requests in flight reserve what is left." if is_held else ""
    return f"The request may use up to {_amount(need, _unit(lease))}.{held}"


def _held_seconds(now_mono: float) -> int:
    """Return 1 to `_HELD_SECONDS_MAX` from the clock's milliseconds, so that clients refused together retry apart."""
    return 1 + int(now_mono * 1000.0) % _HELD_SECONDS_MAX
