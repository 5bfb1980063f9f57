"""The state of a limit in header fields."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy import limit_state
from keyproxy.limit_state import LimitPolicy, LimitState

DAILY = LimitPolicy("requests-per-day", 100, 86_400)
CONCURRENCY = LimitPolicy("concurrency", 8, unit=limit_state.CONCURRENT_REQUESTS)

#: One list member: a string, then parameters that are integers or strings. RFC 9651 sections 3.1 to 3.3.
MEMBER = re.compile(rb'"[\x20-\x7e]*?"(?:;[a-z*][a-z0-9_.*-]*=(?:-?[0-9]{1,15}|"[\x20-\x7e]*?"))*')


def test_both_lines_name_the_limits_in_order() -> None:
    states = [LimitState(DAILY, 50, 3600), LimitState(CONCURRENCY, 7)]
    assert limit_state.lines(states) == (
        b'RateLimit-Policy: "requests-per-day";q=100;w=86400, "concurrency";q=8;qu="concurrent-requests"\r\n'
        b'RateLimit: "requests-per-day";r=50;t=3600, "concurrency";r=7\r\n'
    )


def test_no_limit_no_line() -> None:
    assert limit_state.lines([]) == limit_state.policy_line(()) == limit_state.state_line([]) == b""


@pytest.mark.parametrize(
    ("remaining", "reset_seconds", "told"),
    [
        (0, 0, b"r=0;t=0"),
        (-3, 1, b"r=0;t=1"),
        (1, 0.001, b"r=1;t=1"),
        (1, 1.0, b"r=1;t=1"),
        (1, 1.001, b"r=1;t=2"),
        (1, -5.0, b"r=1;t=0"),
        (1, None, b"r=1"),
        (10**15 - 1, 5, b"r=999999999999999;t=5"),
        (10**15, 5, b"r=999999999999999;t=5"),
    ],
)
def test_the_remaining_amount_is_never_negative_and_no_wait_is_too_short(
    remaining: int, reset_seconds: float | None, told: bytes
) -> None:
    state = LimitState(DAILY, remaining, reset_seconds)
    assert limit_state.state_line([state]) == b'RateLimit: "requests-per-day";%b\r\n' % told


@pytest.mark.parametrize(
    ("name", "quota", "window", "unit"),
    [
        ("", 1, None, "requests"),
        ('a"b', 1, None, "requests"),
        ("a b", 1, None, "requests"),
        ("ä", 1, None, "requests"),
        ("a\r\nX: y", 1, None, "requests"),
        ("a", -1, None, "requests"),
        ("a", 1, 0, "requests"),
        ("a", 1, None, 'x"'),
    ],
)
def test_a_policy_that_cannot_be_serialised_cannot_be_created(
    name: str, quota: int, window: int | None, unit: str
) -> None:
    with pytest.raises(ValueError, match=r"a name may contain only|negative"):
        LimitPolicy(name, quota, window, unit)


states = st.builds(
    LimitState,
    st.builds(
        LimitPolicy,
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}", fullmatch=True),
        st.integers(0, 10**18),
        st.none() | st.integers(1, 10**18),
        st.sampled_from([limit_state.REQUESTS, limit_state.TOKENS, limit_state.CONCURRENT_REQUESTS]),
    ),
    st.integers(-(10**18), 10**18),
    st.none() | st.floats(-1e6, 1e9),
)


@given(st.lists(states, min_size=1, max_size=6))
def test_every_line_is_a_list_of_strings_with_parameters(given_states: list[LimitState]) -> None:
    for line in limit_state.lines(given_states).splitlines():
        members = line.partition(b": ")[2].split(b", ")
        assert len(members) == len(given_states)
        assert all(MEMBER.fullmatch(member) for member in members)


@given(states)
def test_the_body_and_the_field_agree(state: LimitState) -> None:
    line = limit_state.state_line([state])
    found = re.search(rb";r=(\d+)(?:;t=(\d+))?\r\n\Z", line)
    assert found is not None
    assert int(found[1]) == min(state.remaining_shown, 10**15 - 1)
    assert (None if found[2] is None else int(found[2])) == state.reset_seconds_shown
    if state.reset_seconds is not None:
        assert state.reset_seconds_shown == max(0, math.ceil(state.reset_seconds))
