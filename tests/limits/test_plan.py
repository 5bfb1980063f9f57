"""Plans: valid and invalid limits, and that storing a plan changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.limits.plan import LIMIT_MAX, NO_LIMITS, InvalidPlanError, Plan, rate_per_second

NAMES = [field.name for field in dataclasses.fields(Plan)]


@pytest.mark.parametrize(
    ("text", "per_second"),
    [("50/s", 50), ("50", 50), ("3000/min", 50), ("3000/m", 50), ("180/h", 0.05), ("86400/d", 1), ("0.5/s", 0.5)],
)
def test_common_spellings_of_a_rate_are_parsed(text: str, per_second: float) -> None:
    assert rate_per_second(text) == pytest.approx(per_second)


@pytest.mark.parametrize("text", ["", "/s", "50/", "50/w", "-1/s", "1e3/s", "fast", "50 /s", "nan", "5,0/s"])
def test_an_invalid_rate_is_refused_with_the_valid_forms(text: str) -> None:
    with pytest.raises(InvalidPlanError, match="50/s"):
        rate_per_second(text)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **{name: st.none() | st.integers(1, LIMIT_MAX) for name in NAMES if name not in ("rate", "burst")},
            "rate": st.floats(0.001, 1e6),
        },
    )
)
def test_a_stored_plan_is_the_same_plan(limits: dict[str, float | None]) -> None:
    plan = Plan.from_json(limits)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.to_json() == {name: value for name, value in limits.items() if value is not None}


@pytest.mark.parametrize(
    "limits",
    [
        None, [], "x", {"rates": 1}, {"rate": "50/s"}, {"rate": 0}, {"rate": -1}, {"rate": float("nan")},
        {"rate": float("inf")}, {"rate": True}, {"rate": 1_000_001}, {"burst": 5}, {"rate": 1, "burst": 0},
        {"concurrency": -1}, {"requests_per_day": 1.5}, {"requests_per_day": LIMIT_MAX + 2}, {"tokens_per_day": "9"},
        {"tokens_per_month": {}},
    ],
)  # fmt: skip
def test_invalid_limits_are_refused(limits: object) -> None:
    with pytest.raises(InvalidPlanError):
        Plan.from_json(limits)


@pytest.mark.parametrize(("plan", "burst"), [(Plan(rate=0.5), 1), (Plan(rate=50.0), 50), (Plan(rate=1.5), 2),
                                              (Plan(rate=50.0, burst=7), 7), (NO_LIMITS, 0)])  # fmt: skip
def test_a_burst_defaults_to_one_seconds_worth(plan: Plan, burst: int) -> None:
    assert plan.burst_requests == burst


def test_zero_is_a_limit() -> None:
    assert Plan(requests_per_day=0).has_limits
    assert not NO_LIMITS.has_limits


def test_the_largest_limit_is_the_largest_number_of_the_header_and_one_more_in_a_table_is_read_as_that() -> None:
    assert len(str(LIMIT_MAX)) == 15
    plan = Plan.from_json({"requests_per_day": LIMIT_MAX + 1, "tokens_per_day": LIMIT_MAX})
    assert (plan.requests_per_day, plan.tokens_per_day) == (LIMIT_MAX, LIMIT_MAX)
    with pytest.raises(InvalidPlanError):
        Plan(requests_per_day=LIMIT_MAX + 1)


def test_a_rate_that_is_too_large_to_read_is_reported_as_such() -> None:
    with pytest.raises(InvalidPlanError, match="too large a rate"):
        rate_per_second("9" * 40 + "/s")
