"""What a request holds: caps within what is left, tokens and money together, limits per model and route, credits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from keyproxy.limits.allowance import BUNDLES_MAX, Allowance, Hold, Need
from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Window
from keyproxy.limits.plan import Limit, Plan
from keyproxy.reasons import LimitReason, Reason, Refusal
from tests.limits.test_lease_table import NOON, TENANT, USER, Fleet, Process, under


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
def process(fleet: Fleet) -> Process:
    return fleet.process()


def settled(process: Process, hold: Hold, tokens: int = 0, spend: int = 0) -> None:
    process.table.settle(hold, was_sent=True, tokens=tokens, spend=spend)


# -- refusals


def test_refusal_of_what_is_spent_reaches_the_ledger_in_full_although_a_part_is_free_here(
    fleet: Fleet, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger writes the alert of 100 per cent for it, and compares what is asked for with what remains."""
    allowance = under(Plan(tokens_per_day=1_000))
    process.used(process.take(allowance, Need(1_000, 1_000)), tokens=700)
    asked: list[LeaseReport] = []
    sync = fleet.ledger.sync

    def recorded(holder: str, serial: int, lines: Sequence[LeaseReport]) -> Sequence[LeaseGrant] | None:
        asked.extend(lines)
        return sync(holder, serial, lines)

    monkeypatch.setattr(fleet.ledger, "sync", recorded)
    refusal = process.refused(allowance, Need(301, 301))
    assert (refusal.limit_reason, refusal.limit and refusal.limit.remaining) == (LimitReason.SPENT, 300)
    assert [line.at_least for line in asked if line.want] == [301]
    assert (fleet.row("tokens_per_day").spent, fleet.row("tokens_per_day").held) == (700, 0)
    assert process.take(allowance, Need(300, 300)).tokens == 300


def test_part_that_is_free_here_stays_while_requests_in_flight_may_return_the_rest(
    fleet: Fleet, process: Process
) -> None:
    allowance = under(Plan(tokens_per_day=1_000))
    process.take(allowance, Need(600, 600))
    process.used(process.take(allowance, Need(400, 400)), tokens=0)
    assert process.refused(allowance, Need(401, 401)).limit_reason is LimitReason.HELD
    assert fleet.row("tokens_per_day").held == 1_000


# -- caps


@pytest.mark.parametrize(
    ("left", "held"), [(10_000, 4_114), (4_114, 4_114), (4_113, 4_113), (300, 300), (34, 34), (33, None), (0, None)]
)
def test_a_request_without_a_maximum_holds_what_is_left_and_never_less_than_it_needs(
    process: Process, left: int, held: int | None
) -> None:
    allowance = under(Plan(tokens_per_day=10_000))
    if left < 10_000:
        process.used(process.take(allowance, Need(10_000 - left, 10_000 - left)), tokens=10_000 - left)
        process.sync()
    if held is not None:
        assert process.take(allowance, Need(34, 4_114)).tokens == held
        return
    refusal = process.refused(allowance, Need(34, 4_114))
    assert (refusal.reason, refusal.limit_reason) == (Reason.TOKEN_BUDGET_EXHAUSTED, LimitReason.SPENT)
    assert refusal.retry_after_seconds == 43_200


def test_what_is_left_is_held_in_one_round_trip_although_other_processes_are_active(fleet: Fleet) -> None:
    one, other = fleet.process(), fleet.process()
    plan = Plan(tokens_per_day=300)
    other.used(other.take(under(plan), Need(1, 1)))
    for _ in range(3):
        fleet.now += 1.1
        other.sync()
    serial = one.serial
    assert one.take(under(plan), Need(34, 4_114)).tokens == 300
    assert one.serial - serial == 1


def test_the_smallest_rest_of_all_windows_is_held(process: Process) -> None:
    limits = [Limit("tokens", "day", 900), Limit("tokens", "week", 500), Limit("tokens", "minute", 700)]
    hold = process.take(under(Plan(limits), Plan(tokens_per_month=600)), Need(34, 4_114))
    assert hold.tokens == 500
    settled(process, hold, tokens=22)
    process.leave()


def test_a_hold_learns_at_once_of_units_that_other_requests_returned(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(tokens_per_day=5_000))
    first = process.take(allowance, Need(4_900, 4_900))
    assert process.take(allowance, Need(34, 4_114)).tokens == 100
    settled(process, first, tokens=10)
    assert process.take(allowance, Need(34, 4_114)).tokens == 4_114
    other = fleet.process()
    process.sync()
    fleet.now += 1.5
    process.sync()
    # What the ledger had left a while ago does not cap a request now.
    assert other.take(under(Plan(tokens_per_day=5_000)), Need(34, 500)).tokens == 500


def test_a_limit_per_request_caps_what_is_held(process: Process) -> None:
    allowance = under(Plan(tokens_per_request=500, tokens_per_day=10_000))
    assert process.take(allowance, Need(34, 4_114)).tokens == 500
    refusal = process.refused(allowance, Need(501, 4_114))
    assert (refusal.reason, refusal.limit_reason) == (Reason.TOKEN_LIMIT_PER_REQUEST, LimitReason.NEVER_FITS)
    assert refusal.retry_after_seconds is None
    assert refusal.limit is not None
    assert refusal.limit.policy.name == "user.tokens_per_request"
    assert process.table.per_request(allowance, process.now, Need(0, 0)) == (500, None)


def test_an_admitted_request_puts_back_what_its_cap_excludes(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan([Limit("tokens", "day", 5_000), Limit("spend", "day", 1_000)]))
    hold = process.take(allowance, Need(34, 4_114, 340, 41_140))
    assert (hold.tokens, hold.spend) == (4_114, 1_000)
    hold = process.table.trim(hold, 100, 1_000)
    assert (hold.tokens, hold.spend) == (100, 1_000)
    assert process.take(under(Plan([Limit("tokens", "day", 5_000), Limit("spend", "day", 1_000)])), Need(4_900, 4_900))
    settled(process, hold, tokens=100, spend=1_000)


@pytest.mark.parametrize("used", [0, 22, 300, 301, 5_000])
def test_exactly_what_was_used_is_charged_also_beyond_the_hold(fleet: Fleet, process: Process, used: int) -> None:
    plan = Plan([Limit("tokens", "day", 300), Limit("spend", "week", 3_000)])
    hold = process.take(under(plan), Need(34, 4_114, 340, 41_140))
    assert (hold.tokens, hold.spend) == (300, 3_000)
    settled(process, hold, tokens=used, spend=10 * used)
    process.sync()
    if used >= 300:
        assert process.refused(under(plan), Need(1, 1, 10, 10)).limit_reason is LimitReason.SPENT
    process.leave()
    for measure, charged in (("tokens_per_day", used), ("spend_per_week", 10 * used)):
        assert (fleet.row(measure).spent, fleet.row(measure).held) == (charged, 0)


def test_a_request_that_needs_no_tokens_passes_a_spent_budget_and_is_charged_what_it_reports(
    fleet: Fleet, process: Process
) -> None:
    allowance = under(Plan(tokens_per_day=10))
    process.used(process.take(allowance, Need(10, 10)), tokens=10)
    settled(process, process.take(allowance, Need(0, 0)), tokens=3)
    process.leave()
    assert fleet.row("tokens_per_day").spent == 13


def test_the_slots_of_a_request_can_be_held_while_its_body_is_read(process: Process) -> None:
    allowance, need = under(Plan(concurrency=2, requests_per_day=9, tokens_per_day=100)), Need(1, 1)
    assert process.table.take_slots(allowance, process.now, need) is None
    first = process.take(allowance, need)
    early = process.table.take_slots(allowance, process.now, need)
    assert early is not None
    assert process.refused(allowance, need).reason is Reason.CONCURRENCY_LIMITED
    with pytest.raises(Refusal):
        process.table.take_slots(allowance, process.now, need)
    process.table.release(early)
    settled(process, process.take(allowance, need), tokens=1)
    settled(process, first, tokens=1)
    process.leave()


# -- money


@pytest.mark.parametrize(
    ("need", "reason", "limit_reason"),
    [
        (Need(1, 1, 501, 501), Reason.SPEND_LIMIT_PER_REQUEST, LimitReason.NEVER_FITS),
        (Need(1, 1, 401, 401), Reason.SPEND_LIMIT_PER_REQUEST, LimitReason.NEVER_FITS),
        (Need(1, 1, 301, 301), Reason.SPEND_BUDGET_EXHAUSTED, LimitReason.SPENT),
        (Need(1, 1, 201, 201), Reason.SPEND_BUDGET_EXHAUSTED, LimitReason.HELD),
        (Need(1, 1, 0, 0, is_priced=False), Reason.MODEL_UNPRICED, LimitReason.NONE),
    ],
)
def test_money_is_refused_as_tokens_are(
    process: Process, need: Need, reason: Reason, limit_reason: LimitReason
) -> None:
    allowance = under(Plan([Limit("spend", "day", 400), Limit("spend", "request", 450)]))
    settled(process, process.take(allowance, Need(1, 1, 100, 100)), spend=100)
    process.take(allowance, Need(1, 1, 100, 100))
    refusal = process.refused(allowance, need)
    assert (refusal.reason, refusal.limit_reason) == (reason, limit_reason)
    assert refusal.is_futile is (limit_reason in (LimitReason.NEVER_FITS, LimitReason.SPENT))


def test_without_a_spend_limit_a_model_needs_no_price(process: Process) -> None:
    assert process.take(under(Plan(tokens_per_day=10)), Need(1, 1, is_priced=False)).tokens == 1


@pytest.mark.parametrize(
    "short", [Limit("concurrency", "", 0), Limit("requests", "hour", 0), Limit("spend", "day", 5),
              Limit("token-rate", "minute", 5), Limit("request-rate", "day", 1, 1)],
)  # fmt: skip
def test_tokens_money_requests_slots_and_rates_are_taken_together_or_not_at_all(
    fleet: Fleet, process: Process, short: Limit
) -> None:
    plenty = [
        Limit("concurrency", "", 9), Limit("requests", "hour", 9), Limit("spend", "day", 900),
        Limit("tokens", "day", 900), Limit("token-rate", "minute", 900), Limit("request-rate", "second", 9),
    ]  # fmt: skip
    plan = Plan([limit for limit in plenty if limit.name != short.name] + [short])
    allowance, need = under(plan), Need(10, 20, 10, 20)
    if short.measure == "request-rate":
        process.take(allowance, need)
    for _ in range(3):
        process.refused(allowance, need)
    for _ in range(4):
        fleet.now += 1.1
        process.sync()
    for (window, _), row in fleet.ledger.windows.items():
        is_first = short.measure == "request-rate" and not window.measure.endswith("rate")
        expected = {"tokens_per_day": 20, "spend_per_day": 20}.get(window.measure, 1) if is_first else 0
        assert (row.spent, row.held) == (0, expected), window


# -- limits per model, route and mode


def test_a_limit_counts_only_requests_with_its_model_and_route(fleet: Fleet, process: Process) -> None:
    plan = Plan(
        [
            Limit("tokens", "day", 1_000),
            Limit("tokens", "day", 100, model="gpt"),
            Limit("requests", "day", 2, route="chat"),
            Limit("requests", "day", 1, model="gpt", route="chat"),
        ]
    )
    allowance = under(plan)
    settled(process, process.take(allowance, Need(60, 60, models=("gpt",), route="files")), tokens=60)
    assert process.refused(allowance, Need(60, 60, models=("gpt",))).limit is not None
    settled(process, process.take(allowance, Need(60, 60, models=("mini",), route="chat")), tokens=60)
    settled(process, process.take(allowance, Need(40, 40, models=("gpt",), route="chat")), tokens=40)
    assert process.refused(allowance, Need(0, 0, route="chat")).reason is Reason.QUOTA_EXHAUSTED
    settled(process, process.take(allowance), tokens=0)
    process.leave()
    spent = {window.policy: row.spent for (window, _), row in fleet.ledger.windows.items()}
    assert spent == {
        "user.tokens_per_day": 160,
        "user.tokens_per_day@model:gpt": 100,
        "user.requests_per_day@route:chat": 2,
        "user.requests_per_day@model:gpt,route:chat": 1,
    }


def test_all_models_that_may_serve_a_request_have_to_allow_it(process: Process) -> None:
    allowance = under(Plan([Limit("tokens", "day", 10, model="dear")]))
    refusal = process.refused(allowance, Need(20, 20, models=("cheap", "dear")))
    assert refusal.limit is not None
    assert refusal.limit.policy.name == "user.tokens_per_day@model:dear"


def test_a_limit_of_a_mode_applies_to_pools_of_that_mode_only(process: Process) -> None:
    plan = Plan([Limit("requests", "day", 0, mode="test")])
    process.take(Allowance(((USER, plan),)))
    refusal = process.refused(Allowance(((USER._replace(is_test=True), plan),)))
    assert refusal.limit is not None
    assert refusal.limit.policy.name == "user.requests_per_day@mode:test"


def test_only_the_limits_that_apply_to_a_request_are_in_its_headers(process: Process) -> None:
    allowance = under(Plan([Limit("tokens", "day", 100, model="gpt"), Limit("tokens", "week", 9)]))
    for models, lines in (("gpt", 2), ("mini", 1)):
        hold = process.take(allowance, Need(1, 1, models=(models,)))
        text = hold.bundle.statement.lines(process.now)
        assert text.count(b";r=") == lines
        assert (b'"user.tokens_per_day@model:gpt";q=100;w=86400;qu="tokens"' in text) is (models == "gpt")


def test_models_without_a_limit_of_their_own_share_a_bundle_and_the_number_of_bundles_is_bounded(
    process: Process,
) -> None:
    plan = Plan([Limit("tokens", "day", 10**6, model=f"m{number}") for number in range(30)])
    routes = Plan([Limit("requests", "day", 10**6, route=f"r{number}") for number in range(30)])
    allowance = under(plan, routes)
    for number in range(500):
        process.take(allowance, Need(1, 1, models=(f"unlisted {number}",)))
    assert len(allowance.selected) == 1
    for number in range(30):
        for route in range(30):
            process.take(allowance, Need(1, 1, models=(f"m{number}",), route=f"r{route}"))
    assert len(allowance.selected) <= BUNDLES_MAX
    for number in range(30):
        settled(process, process.take(allowance, Need(1, 1, models=(f"m{number}",))), tokens=1)


# -- credits


def test_a_credit_admits_what_the_limit_alone_refuses(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(tokens_per_day=100))
    process.used(process.take(allowance, Need(100, 100)), tokens=100)
    process.sync()
    refusal = process.refused(allowance, Need(10, 10))
    assert (refusal.limit_reason, process.refused(allowance, Need(110, 110)).limit_reason) == (
        LimitReason.SPENT, LimitReason.NEVER_FITS,
    )  # fmt: skip
    fleet.ledger.rules.credit(Window(USER, "tokens_per_day"), 50, NOON)
    fleet.now += 1.1
    hold = process.take(allowance, Need(10, 400))
    assert hold.tokens == 50
    assert b'user.tokens_per_day";q=150;' in hold.bundle.statement.lines(process.now + 2.0)
    fleet.now += 1.1
    assert process.refused(allowance, Need(140, 140)).limit_reason is LimitReason.SPENT


# -- token rates


def rated(amount: int, per: str, burst: int) -> Allowance:
    return under(Plan([Limit("token-rate", per, amount, burst)]), pools=(TENANT,))


def test_a_token_rate_admits_its_burst_and_then_its_rate(fleet: Fleet, process: Process) -> None:
    allowance = rated(10, "second", 100)
    hold = process.take(allowance, Need(60, 60))
    settled(process, hold, tokens=60)
    refusal = process.refused(allowance, Need(60, 60))
    assert (refusal.reason, refusal.limit_reason) == (Reason.RATE_LIMITED, LimitReason.PACE)
    assert refusal.retry_after_seconds == 2
    refusal = process.refused(allowance, Need(101, 101))
    assert (refusal.reason, refusal.limit_reason) == (Reason.TOKEN_LIMIT_PER_REQUEST, LimitReason.NEVER_FITS)
    fleet.now += 2.0
    process.take(allowance, Need(60, 60))


def test_a_request_without_a_maximum_is_capped_by_what_a_token_rate_has_left(process: Process) -> None:
    allowance = rated(10, "second", 100)
    assert process.take(allowance, Need(34, 4_114)).tokens == 100


def test_units_of_a_token_rate_that_a_request_did_not_use_come_back(fleet: Fleet, process: Process) -> None:
    allowance = rated(1, "second", 100)
    hold = process.take(allowance, Need(100, 100))
    process.refused(allowance, Need(50, 50))
    fleet.now += 5.0
    settled(process, hold, tokens=30)
    # 5 of the 70 unused units have been refilled since, and count once.
    assert process.take(allowance, Need(1, 100)).tokens == 70
    process.refused(allowance, Need(2, 2))


def test_use_beyond_the_hold_slows_a_token_rate_down(fleet: Fleet, process: Process) -> None:
    allowance = rated(10, "second", 100)
    settled(process, process.take(allowance, Need(40, 40)), tokens=80)
    process.sync()
    assert process.refused(allowance, Need(30, 30)).retry_after_seconds == 1
    fleet.now += 1.1
    process.take(allowance, Need(30, 30))


def test_units_in_a_message_that_is_lost_are_not_returned(fleet: Fleet, process: Process) -> None:
    allowance = rated(1, "hour", 100)
    settled(process, process.take(allowance, Need(100, 100)), tokens=0)
    process.lease_sync.gather(process.now)
    process.lease_sync.resend(process.lease_sync.lines(process.now, 10))
    process.sync()
    assert process.refused(allowance, Need(1, 1)).reason is Reason.RATE_LIMITED
