"""Changes to plans: what is named changes, everything else stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.limits.limit_text import parse_limit
from keyproxy.limits.plan import NO_LIMITS, InvalidPlanError, Limit, Plan
from keyproxy.limits.plans.plan_changes import (
    change_to,
    changed_plan,
    differences,
    named_amounts,
    plan_warnings,
    removal_of,
)

BASIC = Plan(rate=5.0, burst=9, tokens_per_day=100)

LIMITS = st.builds(
    Limit,
    st.sampled_from(["requests", "tokens", "spend"]),
    st.sampled_from(["minute", "hour", "day", "week", "month"]),
    st.integers(0, 10**15 - 1),
    model=st.sampled_from(["", "gpt-4o", "a/b:c"]),
    route=st.sampled_from(["", "POST /v1/chat/completions"]),
    mode=st.sampled_from(["", "live", "test"]),
) | st.builds(
    Limit,
    st.sampled_from(["request-rate", "token-rate"]),
    st.sampled_from(["second", "minute", "hour"]),
    st.integers(1, 10_000),
    st.none() | st.integers(1, 10_000),
)
PLANS = st.lists(LIMITS, max_size=6, unique_by=lambda limit: limit.name).map(Plan)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, BASIC),
        ([], BASIC),
        ({"burst": None}, Plan(rate=5.0, tokens_per_day=100)),
        ({"rate": 7.0}, Plan(rate=7.0, burst=9, tokens_per_day=100)),
        ({"rate": None, "burst": None}, Plan(tokens_per_day=100)),
        ({"tokens_per_day": None, "concurrency": 2}, Plan(rate=5.0, burst=9, concurrency=2)),
        ([{"measure": "request-rate", "burst": 3}], Plan(rate=5.0, burst=3, tokens_per_day=100)),
        ([{"measure": "request-rate", "amount": 6}], Plan(rate=6.0, burst=9, tokens_per_day=100)),
        ([{"measure": "tokens", "per": "day", "amount": 0}], Plan(rate=5.0, burst=9, tokens_per_day=0)),
        ([{"measure": "tokens", "per": "month", "amount": None}], BASIC),
    ],
)
def test_limits_that_are_not_named_stay(changes: object, wanted: Plan) -> None:
    assert changed_plan(BASIC, changes) == wanted


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ("rate", "must be an object or an array"),
        ({"rat": 1}, "there is no such limit"),
        ({"rate": None}, "burst: means nothing without a rate"),
        ({"tokens_per_day": -1}, "tokens_per_day: must be a whole number"),
        ({"tokens_per_day": "1"}, "tokens_per_day: must be a number"),
        ([1], "entry 1 must be an object"),
        ([{"measure": "tokens", "per": "day"}], "entry 1 must have a measure and an amount"),
        ([{"measure": "tokens", "amount": 1}], "tokens: must be per minute"),
        ([{"measure": "tokens", "per": "day", "amount": 1, "colour": "red"}], "there is no 'colour'"),
        ([{"measure": "tokens", "per": "day", "amount": 1}] * 2, "tokens/day: appears twice"),
        ([{"measure": "tokens", "per": "day", "burst": 3}], "only a rate has a burst"),
    ],
)
def test_invalid_changes_are_refused_with_the_fault(changes: object, sentence: str) -> None:
    with pytest.raises(InvalidPlanError, match=sentence):
        changed_plan(BASIC, changes)


@given(PLANS, PLANS)
def test_the_differences_of_two_plans_lead_from_one_to_the_other(before: Plan, after: Plan) -> None:
    found = differences(before, after)
    changes = [removal_of(name) if new is None else change_to(new) for name, (_, new) in found.items()]
    assert changed_plan(before, changes) == after
    assert set(found) == {
        limit.name for plan, other in ((before, after), (after, before)) for limit in plan.limits
        if limit not in other.limits
    }  # fmt: skip


@given(LIMITS)
def test_a_limit_that_is_removed_by_its_text_is_gone(limit: Limit) -> None:
    name, nothing = parse_limit(f"{limit.name}=none")
    assert nothing is None
    assert changed_plan(Plan([limit]), [removal_of(name)]) == NO_LIMITS


def test_amounts_have_the_names_of_policies() -> None:
    plan = Plan([Limit("token-rate", "minute", 60, 5, model="m"), Limit("spend", "week", 7)], rate=2.0)
    assert named_amounts(plan) == {
        "token_rate@model:m": 1.0, "token_burst@model:m": 5, "spend_per_week": 7, "rate": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "is_warned"),
    [
        (["tokens/request=101", "tokens/day=100"], True),
        (["tokens/request=100", "tokens/day=100"], False),
        (["spend/request=2.00", "spend/week=1.00", "spend/day=1.50"], True),
        (["spend/request=2.00", "tokens/day=1"], False),
        (["tokens/request=101", "token-rate=1/s:100"], True),
        (["tokens/request@model:a=101", "tokens/day@model:b=100"], False),
        (["tokens/request@model:a=101", "tokens/day=100"], True),
    ],
)
def test_a_limit_per_request_above_a_window_that_it_counts_in_is_warned_of(limits: list[str], is_warned: bool) -> None:
    plan = Plan([limit for _, limit in map(parse_limit, limits) if limit is not None])
    warnings = plan_warnings(plan)
    assert bool(warnings) == is_warned
    assert all(one.startswith(f"{limits[0].split('=')[0]}=") for one in warnings)
