"""Budgets of agent tokens: spent once, to the last unit, over any number of processes, and never replenished."""

from __future__ import annotations

import gc
import json
import weakref

import pytest

from keyproxy.http.error_responses import ErrorRenderer
from keyproxy.limits.allowance import Allowance, Need
from keyproxy.limits.budgets import budget_plan
from keyproxy.limits.lease import IDLE_SECONDS
from keyproxy.limits.lease_sync import Short
from keyproxy.limits.ledger_protocol import Pool
from keyproxy.limits.limit_text import parse_limit
from keyproxy.limits.plan import LIMIT_MAX, InvalidPlanError, Plan
from keyproxy.limits.plans.plan_changes import changed_plan
from keyproxy.reasons import LimitReason, Reason, Refusal
from tests.limits.test_lease_table import TOKEN, USER, Fleet, Process

CHILDREN = [Pool("token", f"agt_child_{number}", False) for number in range(2)]


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
def process(fleet: Fleet) -> Process:
    return fleet.process()


def with_budgets(tokens: int | None, requests: int | None, *more: tuple[Pool, Plan]) -> Allowance:
    return Allowance(((TOKEN, budget_plan(tokens, requests)), *more))


def response(refusal: Refusal) -> tuple[int, str, dict[str, object]]:
    """The status, header fields and body of its response."""
    rendered = ErrorRenderer().render(refusal, "req_1")
    return rendered.status, rendered.fields.decode(), json.loads(rendered.body)


# -- the values


@pytest.mark.parametrize(
    ("tokens", "requests", "expected"),
    [
        (None, None, {}),
        (0, None, {"tokens_total": 0}),
        (None, 0, {"requests_total": 0}),
        (10_000, 200, {"requests_total": 200, "tokens_total": 10_000}),
        (LIMIT_MAX, 10**15, {"requests_total": LIMIT_MAX, "tokens_total": LIMIT_MAX}),
    ],
)
def test_budgets_are_limits_without_a_period(
    tokens: int | None, requests: int | None, expected: dict[str, int]
) -> None:
    assert {limit.window_measure: limit.quota for limit in budget_plan(tokens, requests).limits} == expected


def test_budget_below_0_is_invalid() -> None:
    for budgets in ((-1, None), (None, -1)):
        with pytest.raises(InvalidPlanError):
            budget_plan(*budgets)


@pytest.mark.parametrize("measure", ["tokens", "requests", "spend"])
def test_no_plan_has_a_budget(measure: str) -> None:
    entry = {"measure": measure, "per": "total", "amount": 5}
    for text in (f"{measure}/total=5", f"{measure}/total=none"):
        with pytest.raises(InvalidPlanError, match="must be per"):
            parse_limit(text)
    with pytest.raises(InvalidPlanError, match="must be per"):
        Plan.from_json([entry])
    with pytest.raises(InvalidPlanError, match="must be per"):
        changed_plan(Plan(), [entry])


# -- refusals and headers


def test_spent_request_budget_refuses_for_good(process: Process) -> None:
    allowance = with_budgets(None, 2)
    for _ in range(2):
        process.used(process.take(allowance))
    status, fields, body = response(process.refused(allowance))
    assert status == 429
    assert "Retry-After" not in fields
    assert "x-should-retry: false" in fields
    assert 'RateLimit-Policy: "token.requests_total";q=2\r\nRateLimit: "token.requests_total";r=0\r\n' in fields
    expected = {
        "code": "quota_exhausted", "policy": "token.requests_total", "limit": 2, "remaining": 0, "reset_seconds": None,
        "retryable": False, "reason": "spent", "detail": "The request budget of the agent token is exhausted.",
    }  # fmt: skip
    assert body == body | expected


@pytest.mark.parametrize(("spent", "need"), [(0, 101), (40, 61), (100, 1)])
def test_request_beyond_what_is_left_of_a_token_budget_is_refused_for_good_whether_or_not_the_whole_budget_has_it(
    process: Process, spent: int, need: int
) -> None:
    allowance = with_budgets(100, None)
    if spent:
        process.used(process.take(allowance, Need(spent, spent)), tokens=spent)
    status, fields, body = response(process.refused(allowance, Need(need, need)))
    assert status == 429
    assert "Retry-After" not in fields
    assert "x-should-retry: false" in fields
    assert 'RateLimit-Policy: "token.tokens_total";q=100;qu="tokens"\r\n' in fields
    assert body == body | {
        "code": "token_budget_exhausted", "policy": "token.tokens_total", "retryable": False, "reason": "spent",
        "reset_seconds": None,
    }  # fmt: skip
    if spent < 100:
        assert process.take(allowance, Need(100 - spent, 100 - spent)).tokens == 100 - spent


def test_budget_that_requests_in_flight_hold_refuses_for_a_few_seconds(process: Process) -> None:
    for allowance, need in ((with_budgets(100, None), Need(60, 60)), (with_budgets(None, 1), None)):
        hold = process.take(allowance, need)
        refusal = process.refused(allowance, need)
        assert refusal.limit_reason is LimitReason.HELD
        assert refusal.retry_after_seconds is not None
        assert 1 <= refusal.retry_after_seconds <= 5
        _, fields, body = response(refusal)
        assert body["retryable"] is True
        assert "x-should-retry" not in fields
        process.table.settle(hold, was_sent=False)
        assert process.take(allowance, need) is not None


@pytest.mark.parametrize(("tokens", "need"), [(0, Need(1, 5)), (None, None)])
def test_budget_of_0_refuses_every_request_that_counts(process: Process, tokens: int | None, need: Need | None) -> None:
    refusal = process.refused(with_budgets(tokens, None if need else 0), need)
    assert (refusal.limit_reason, refusal.retry_after_seconds) == (LimitReason.SPENT, None)


def test_request_that_uses_no_tokens_needs_no_token_budget(process: Process) -> None:
    assert process.take(with_budgets(0, None)) is not None
    assert process.take(with_budgets(0, None), Need(0, 0)) is not None


def test_of_exceeded_limits_a_spent_budget_is_named_since_no_wait_helps(process: Process) -> None:
    busy = Plan(concurrency=1, tokens_per_day=100)
    allowance = with_budgets(None, 1, (USER, busy))
    process.take(with_budgets(None, 1), None)
    other = Allowance(((USER, busy),))
    process.take(other, Need(100, 100))
    allowance = with_budgets(60, None, (USER, busy))
    process.used(process.take(with_budgets(60, None), Need(60, 60)), tokens=60)
    refusal = process.refused(allowance, Need(1, 1))
    assert refusal.reason is Reason.TOKEN_BUDGET_EXHAUSTED
    assert refusal.limit is not None
    assert refusal.limit.policy.name == "token.tokens_total"


def test_stream_beyond_the_budget_ends(process: Process) -> None:
    hold = process.take(with_budgets(100, None), Need(100, 100))
    with pytest.raises(Short) as short:
        process.table.extend(hold, 1, process.now)
    process.lease_sync.request(short.value)
    process.sync(everything=False)
    process.lease_sync.mark_exhausted(short.value, process.now)
    with pytest.raises(Refusal) as caught:
        process.table.extend(hold, 1, process.now)
    assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.TOKEN_BUDGET_EXHAUSTED, None)


# -- many processes


@pytest.mark.parametrize(("tokens", "requests", "need"), [(None, 5, None), (10_000, None, Need(100, 100))])
def test_small_budget_is_spent_to_its_last_unit_over_two_processes(
    fleet: Fleet, tokens: int | None, requests: int | None, need: Need | None
) -> None:
    processes = [fleet.process() for _ in range(2)]
    allowances = [with_budgets(tokens, requests) for _ in processes]
    admitted = 0
    for number in range(400):
        process, allowance = processes[number % 2], allowances[number % 2]
        try:
            process.used(process.take(allowance, need), tokens=need.tokens_least if need else 0)
            admitted += 1
        except Refusal:
            fleet.now += 0.1
            for each in processes:
                each.sync()
    assert admitted == (requests or 100)
    for process, allowance in zip(processes, allowances, strict=True):
        assert process.refused(allowance, need).limit_reason is LimitReason.SPENT


def test_children_draw_on_the_budget_of_their_parent_and_none_is_set_aside(fleet: Fleet, process: Process) -> None:
    parent = (TOKEN, budget_plan(100, None))
    first, second = (Allowance(((child, budget_plan(100, None)), parent)) for child in CHILDREN)
    process.used(process.take(first, Need(30, 30)), tokens=30)
    # The first child is gone; what it did not use is left to the second.
    process.used(process.take(second, Need(70, 70)), tokens=70)
    refusal = process.refused(second, Need(1, 1))
    assert refusal.limit is not None
    assert refusal.limit.policy.name == "token.tokens_total"
    process.leave()
    spent = {window.pool: row.spent for (window, _), row in fleet.ledger.windows.items()}
    assert spent == {CHILDREN[0]: 30, CHILDREN[1]: 70, TOKEN: 100}


def test_units_of_a_token_that_died_return_to_the_ledger_and_its_leases_are_freed(
    fleet: Fleet, process: Process
) -> None:
    allowance = with_budgets(1_000, 50)
    process.used(process.take(allowance, Need(100, 100)), tokens=40)
    leases = weakref.ref(process.lease_sync.leases_of(TOKEN))
    assert process.lease_sync.outstanding == 2
    del allowance
    for _ in range(4):
        process.sync()
        fleet.now += IDLE_SECONDS
    gc.collect()
    assert not process.lease_sync.has_leases
    assert leases() is None
    tokens, requests = fleet.row("tokens_total", TOKEN), fleet.row("requests_total", TOKEN)
    assert (tokens.spent, tokens.held, requests.spent, requests.held) == (40, 0, 1, 0)
