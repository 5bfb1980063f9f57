"""Rate limit headers of responses: every number is current, however it was joined."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from keyproxy import limit_state
from keyproxy.limits.lease import Lease
from keyproxy.limits.ledger_protocol import Pool, Window
from keyproxy.limits.plan import Plan
from keyproxy.limits.ratelimit_headers import REPORTED_MAX, RateLimitHeaders, state

PLAN = Plan(
    requests_per_day=10**12, requests_per_month=2_000, tokens_per_day=10**9, tokens_per_month=1_500, concurrency=7
)
MEASURES = ("requests_per_day", "requests_per_month", "tokens_per_day", "tokens_per_month", "concurrency")

#: Around the places where a number becomes longer or a new thousand begins, and below zero.
AMOUNTS = st.one_of(
    st.integers(-1_000, 2_100), st.integers(9_990, 10_010), st.integers(999_990, 1_000_010), st.integers(0, 10**12)
)


def leases(count: int) -> list[Lease]:
    pool = Pool("user", "u_1", False)
    limits = {limit.window_measure: limit for limit in PLAN.limits}
    return [Lease(Window(pool, measure), limits[measure], 0.0) for measure in MEASURES[:count]]


@given(st.integers(1, 5), st.lists(st.lists(AMOUNTS, min_size=5, max_size=5), min_size=1, max_size=8))
def test_the_remaining_amount_is_current(count: int, moments: list[list[int]]) -> None:
    of = leases(count)
    statement = RateLimitHeaders(tuple(of))
    told = []
    for number, amounts in enumerate(moments):
        for lease, amount in zip(of, amounts, strict=False):
            # Some of it here and some there: their sum is what remains.
            lease.free = amount // 3
            lease.seen_available = amount - lease.free
            lease.ends_mono = 3_600.0
        if not number:
            told = sorted(of, key=lambda lease: lease.remaining / lease.limit)[:REPORTED_MAX]
        expected = limit_state.policy_line(tuple(lease.policy for lease in of)) + limit_state.state_line(
            [state(lease, 10.0) for lease in told]
        )
        assert statement.lines(10.0 + number / 100) == expected


def test_the_reported_limits_are_selected_again_after_a_second() -> None:
    of = leases(4)
    for lease in of:
        lease.seen_available = lease.limit
    statement = RateLimitHeaders(tuple(of))
    assert b"tokens_per_month" not in statement.lines(0.0).partition(b"RateLimit: ")[2]
    of[3].seen_available = 1
    of[3].ends_mono = 100.0
    assert b"tokens_per_month" not in statement.lines(0.9).partition(b"RateLimit: ")[2]
    assert statement.lines(1.0).partition(b"RateLimit: ")[2].startswith(b'"user.tokens_per_month";r=1;t=99, ')


def test_no_limits_no_lines() -> None:
    assert RateLimitHeaders(()).lines(0.0) == b""
