"""Plans: valid and invalid limits in their three forms, and that storing or printing a plan changes nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyproxy.limits.limit_text import amount_text, limit_text, money_text, parse_limit, rate_per_second
from keyproxy.limits.plan import (
    INTERVAL_SECONDS,
    LIMIT_MAX,
    LIMITS,
    LIMITS_MAX,
    NO_LIMITS,
    PERS,
    InvalidPlanError,
    Limit,
    Plan,
)


def any_limit() -> st.SearchStrategy[Limit]:
    """Limits of every measure, with and without selectors."""

    def of(measure: str) -> st.SearchStrategy[Limit]:
        is_rate = measure.endswith("-rate")
        return st.builds(
            Limit,
            st.just(measure),
            st.sampled_from(PERS[measure]),
            st.integers(1, 10**6) if is_rate else st.integers(0, LIMIT_MAX),
            st.none() | st.integers(1, LIMIT_MAX) if is_rate else st.none(),
            st.sampled_from(["", "gpt-4o", "org/model:tag@2"]),
            st.sampled_from(["", "chat", "POST /v1/chat=x/completions"]),
            st.sampled_from(["", "live", "test"]),
        )

    return st.sampled_from(sorted(PERS)).flatmap(of)


@pytest.mark.parametrize(
    ("text", "per_second"),
    [("50/s", 50), ("50", 50), ("3000/min", 50), ("3000/m", 50), ("180/h", 0.05), ("86400/d", 1), ("0.5/s", 0.5)],
)
def test_common_spellings_of_a_rate_are_parsed(text: str, per_second: float) -> None:
    assert rate_per_second(text) == pytest.approx(per_second)


@pytest.mark.parametrize("text", ["", "/s", "50/", "50/w", "-1/s", "1e3/s", "fast", "50 /s", "nan", "5,0/s", "5/s:1"])
def test_an_invalid_rate_is_refused_with_the_valid_forms(text: str) -> None:
    with pytest.raises(InvalidPlanError, match="50/s"):
        rate_per_second(text)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **{name: st.none() | st.integers(1, LIMIT_MAX) for name in LIMITS if name not in ("rate", "burst")},
            "rate": st.floats(0.001, 1e6),
        },
    )
)
def test_a_stored_object_is_the_same_plan(limits: dict[str, float | None]) -> None:
    plan = Plan.from_json(limits)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.to_json() == {name: value for name, value in limits.items() if value is not None}


@given(st.lists(any_limit(), max_size=LIMITS_MAX, unique_by=lambda limit: limit.name))
def test_a_stored_plan_has_the_same_effect(limits: list[Limit]) -> None:
    def effects(plan: Plan) -> list[tuple[object, ...]]:
        return [(one.name, one.quota, one.burst, one.interval_seconds) for one in plan.limits]

    plan = Plan(limits)
    stored = json.loads(json.dumps(plan.to_json()))
    again = Plan.from_json(stored)
    assert effects(again) == effects(plan)
    assert again == plan or isinstance(stored, dict)


@given(any_limit())
def test_a_printed_limit_is_parsed_to_the_same_limit(limit: Limit) -> None:
    assert parse_limit(limit_text(limit)) == (limit.name, limit)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("tokens/day=1000000", Limit("tokens", "day", 1_000_000)),
        ("tokens/week@model:gpt-4o=7", Limit("tokens", "week", 7, model="gpt-4o")),
        ("requests/minute@mode:test,route:chat=7", Limit("requests", "minute", 7, route="chat", mode="test")),
        ("spend/month=50.00", Limit("spend", "month", 50_000_000)),
        ("spend/request=0.000001", Limit("spend", "request", 1)),
        ("spend/day=3", Limit("spend", "day", 3_000_000)),
        ("concurrency=8", Limit("concurrency", "", 8)),
        ("request-rate=50/s:100", Limit("request-rate", "second", 50, 100)),
        ("token-rate=100000/min:20000", Limit("token-rate", "minute", 100_000, 20_000)),
        ("token-rate@model:m@v=1/d", Limit("token-rate", "day", 1, model="m@v")),
    ],
)
def test_the_text_form_of_each_measure_is_parsed(text: str, limit: Limit) -> None:
    assert parse_limit(text) == (limit.name, limit)


def test_selectors_are_canonical_whatever_their_order() -> None:
    name, limit = parse_limit("tokens/day@route:r,model:m,mode:live=1")
    assert (name, limit and limit.selector) == ("tokens/day@mode:live,model:m,route:r", "mode:live,model:m,route:r")
    assert parse_limit("tokens/day@route:r,mode:live,model:m=none") == (name, None)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is no limit"), ("tokens/day", "is no limit"), ("=5", "is no limit"), ("token/day=5", "no measure"),
        ("tokens=5", "must be per minute"), ("tokens/year=5", "must be per minute"), ("concurrency/day=5", "no period"),
        ("tokens/day@=5", "a selector is"), ("tokens/day@user:u=5", "a selector is"),
        ("tokens/day@model:=5", "a selector is"), ("tokens/day@model:a,model:b=5", "appears twice"),
        ("tokens/day@mode:prod=5", "live or test"), ("tokens/day@model:a b=5", "letters, digits"),
        ("tokens/day=-1", "whole number"), ("tokens/day=1.5", "whole number"), ("tokens/day=1e3", "whole number"),
        ("tokens/day=" + "9" * 16, "too large"), ("tokens/day=9" + "0" * 5_000, "too large"),
        ("spend/day=1.0000001", "six places"), ("spend/day=.5", "six places"),
        ("request-rate=50", "50/s"), ("request-rate/s=50", "belongs to the amount"), ("request-rate=50/s:0", "burst"),
        ("request-rate=1000001/s", "1000000/s"),
    ],
)  # fmt: skip
def test_an_invalid_text_is_refused_with_its_fault_in_one_line(text: str, fault: str) -> None:
    with pytest.raises(InvalidPlanError, match=fault) as refused:
        parse_limit(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("micros", "text"), [(0, "0.00"), (1, "0.000001"), (50_000_000, "50.00"), (123, "0.000123"),
                                              (-1_500_000, "-1.50"), (LIMIT_MAX, "999999999.999999")])  # fmt: skip
def test_money_is_printed_with_two_to_six_places(micros: int, text: str) -> None:
    assert money_text(micros) == text


def test_the_interval_of_a_rate_is_kept_in_the_array_and_in_text() -> None:
    limit = Limit("request-rate", "minute", 3_000, 100, model="m")
    assert Plan.from_json(Plan([limit]).to_json()).limits == (limit,)
    assert amount_text(limit) == "3000/min:100"
    assert Plan([Limit("request-rate", "minute", 3_000)]).to_json() == {"rate": 50.0}
    assert Plan.from_json({"rate": 100 / 60}).limits == (Limit("request-rate", "minute", 100),)


@pytest.mark.parametrize("limit", [Limit("tokens", "week", 1), Limit("spend", "day", 1), Limit("requests", "hour", 1),
                                   Limit("token-rate", "minute", 1), Limit("tokens", "day", 1, model="m"),
                                   Limit("spend", "request", 1)])  # fmt: skip
def test_the_array_is_written_only_where_the_object_cannot_express_the_plan(limit: Limit) -> None:
    assert isinstance(Plan([limit, Limit("requests", "day", 5)]).to_json(), list)
    assert Plan([Limit("requests", "day", 5)]).to_json() == {"requests_per_day": 5}


def test_a_plan_has_at_most_32_limits_each_once() -> None:
    limits = [Limit("tokens", "day", 1, model=f"m{number}") for number in range(LIMITS_MAX + 1)]
    assert len(Plan(limits[1:]).limits) == LIMITS_MAX
    with pytest.raises(InvalidPlanError, match="at most 32"):
        Plan(limits)
    with pytest.raises(InvalidPlanError, match="twice"):
        Plan([limits[0], Limit("tokens", "day", 2, model="m0")])
    with pytest.raises(InvalidPlanError, match="twice"):
        Plan.from_json([{"measure": "request-rate", "per": per, "amount": 1} for per in ("second", "day")])


def test_a_change_replaces_and_removes_limits_by_name() -> None:
    plan = Plan(tokens_per_day=5, concurrency=2)
    changed = plan.changed({"tokens/day": Limit("tokens", "day", 6), "concurrency": None, "spend/day": None})
    assert changed == Plan(tokens_per_day=6)


@pytest.mark.parametrize(
    ("limit", "quota"),
    [
        (Limit("token-rate", "minute", 100), 100),
        (Limit("token-rate", "second", 2), 120),
        (Limit("token-rate", "day", 1), 1),
        (Limit("request-rate", "minute", 90), 2),
    ],
)
def test_a_burst_defaults_to_a_minute_of_tokens_and_a_second_of_requests(limit: Limit, quota: int) -> None:
    assert limit.quota == quota
    assert limit.interval_seconds == pytest.approx(INTERVAL_SECONDS[limit.per] / limit.amount)


@pytest.mark.parametrize(
    "entry",
    [
        {}, {"measure": "tokens"}, {"measure": "tokens", "per": "day"}, {"measure": "x", "per": "day", "amount": 1},
        {"measure": "tokens", "per": "", "amount": 1}, {"measure": "tokens", "per": "day", "amount": True},
        {"measure": "tokens", "per": "day", "amount": 1.5}, {"measure": "tokens", "per": "day", "amount": -1},
        {"measure": "tokens", "per": "day", "amount": 1, "burst": 5}, {"measure": "tokens", "per": 1, "amount": 1},
        {"measure": "tokens", "per": "day", "amount": 1, "user": "u"},
        {"measure": "tokens", "per": "day", "amount": None},
        {"measure": "request-rate", "per": "s", "amount": 1}, {"measure": "token-rate", "per": "second", "amount": 0},
        {"measure": "request-rate", "per": "second", "amount": 1, "burst": 1.5}, 5, None,
    ],
)  # fmt: skip
def test_an_invalid_entry_of_the_array_is_refused(entry: object) -> None:
    with pytest.raises(InvalidPlanError):
        Plan.from_json([entry])


@pytest.mark.parametrize(
    "limits",
    [
        None, "x", {"rates": 1}, {"rate": "50/s"}, {"rate": 0}, {"rate": -1}, {"rate": float("nan")},
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
    assert [limit.quota for limit in plan.limits] == ([burst] if burst else [])


def test_zero_is_a_limit() -> None:
    assert Plan(requests_per_day=0).has_limits
    assert not NO_LIMITS.has_limits


def test_the_largest_limit_is_the_largest_number_of_the_header_and_one_more_in_a_table_is_read_as_that() -> None:
    assert len(str(LIMIT_MAX)) == 15
    plan = Plan.from_json({"requests_per_day": LIMIT_MAX + 1, "tokens_per_day": LIMIT_MAX})
    assert [limit.quota for limit in plan.limits] == [LIMIT_MAX, LIMIT_MAX]
    with pytest.raises(InvalidPlanError):
        Plan(requests_per_day=LIMIT_MAX + 1)


def test_a_rate_that_is_too_large_to_read_is_reported_as_such() -> None:
    with pytest.raises(InvalidPlanError, match="too large a rate"):
        rate_per_second("9" * 40 + "/s")
