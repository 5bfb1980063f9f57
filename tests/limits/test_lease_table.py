"""The lease table of one process, rule by rule: what can be taken, what is returned, what is requested."""

from __future__ import annotations

import pytest

from keyproxy.limits.allowance import Allowance, Hold, Need
from keyproxy.limits.lease_sync import LeaseSync, Short
from keyproxy.limits.lease_table import LeaseTable
from keyproxy.limits.ledger.accounts import WindowAccount
from keyproxy.limits.ledger.report_pace import ReportPace
from keyproxy.limits.ledger_protocol import Pool, Window
from keyproxy.limits.plan import Plan
from keyproxy.reasons import LimitReason, Reason, Refusal
from tests.reference_ledger import ReferenceLedger

LEASE_SECONDS = 10.0
LINES_MAX = 1_000
NOON = 1_706_700_000.0 - 1_706_700_000.0 % 86_400 + 43_200
USER, TENANT, KEY = Pool("user", "u_42", False), Pool("tenant", "acme", False), Pool("key", "key_1", False)
TOKEN = Pool("token", "agt_1", False)


class Fleet:
    """One ledger, one clock, and processes that draw on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.processes = 0
        self.ledger = ReferenceLedger(lambda: NOON + self.now, lease_seconds=LEASE_SECONDS)

    def process(self, pace: ReportPace | None = None) -> Process:
        """One more."""
        self.processes += 1
        return Process(self, f"p{self.processes}", pace)

    def row(self, measure: str, pool: Pool = USER) -> WindowAccount:
        """The latest window of this measure."""
        return self.ledger.windows[max(key for key in self.ledger.windows if key[0] == Window(pool, measure))]


class Process:
    """A lease table with its own clock, and its exchange with the ledger."""

    def __init__(self, fleet: Fleet, name: str, pace: ReportPace | None = None) -> None:
        self.fleet, self.name, self.serial, self.wakes = fleet, name, 0, 0
        self.lease_sync = LeaseSync(self._wake, pace=pace)
        self.table = LeaseTable(self.lease_sync)

    def _wake(self) -> None:
        self.wakes += 1

    @property
    def now(self) -> float:
        """Monotonic seconds."""
        return self.fleet.now + 5_000.0

    def sync(self, *, everything: bool = True, is_last: bool = False, answer_is_lost: bool = False) -> int:
        """Send one message and apply its reply. Return its number of lines."""
        if everything or is_last:
            self.lease_sync.gather(self.now, is_last=is_last)
        lines = self.lease_sync.lines(self.now, LINES_MAX)
        self.serial += 1
        replies = self.fleet.ledger.sync(self.name, self.serial, lines)
        if answer_is_lost:
            self.lease_sync.resend(lines)
        elif replies is None:
            self.lease_sync.end_holder()
            self.name, self.serial = self.name + "'", 0
        else:
            self.lease_sync.apply(lines, replies, self.now, valid_seconds=LEASE_SECONDS * 0.95)
        return len(lines)

    def take(self, allowance: Allowance, tokens: Need | None = None) -> Hold:
        """Take like a request: with as many ledger requests as necessary."""
        for _ in range(4):
            try:
                return self.table.take(allowance, self.now, tokens)
            except Short as short:
                last = short
                self.lease_sync.request(short)
                self.sync(everything=False)
        self.lease_sync.mark_exhausted(last, self.now)
        return self.table.take(allowance, self.now, tokens)

    def again(self, allowance: Allowance, tokens: Need | None, paid: int) -> Hold:
        """Take like a request that was charged before."""
        for _ in range(4):
            try:
                return self.table.take_again(allowance, self.now, tokens, paid)
            except Short as short:
                self.lease_sync.request(short)
                self.sync(everything=False)
        raise AssertionError("not decided")

    def refused(self, allowance: Allowance, tokens: Need | None = None) -> Refusal:
        """The Refusal of one more request."""
        with pytest.raises(Refusal) as caught:
            self.take(allowance, tokens)
        return caught.value

    def used(self, hold: Hold, tokens: int = 0) -> None:
        """End a request that was sent."""
        self.table.settle(hold, was_sent=True, tokens=tokens)

    def leave(self) -> None:
        """Return everything."""
        for _ in range(3):
            self.sync(is_last=True)
        assert not self.lease_sync.has_leases


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
def process(fleet: Fleet) -> Process:
    return fleet.process()


def under(*plans: Plan, pools: tuple[Pool, ...] = (USER, TENANT, KEY)) -> Allowance:
    return Allowance(tuple(zip(pools, plans, strict=False)))


# -- windows


@pytest.mark.parametrize(
    ("plan", "tokens"),
    [
        (Plan(requests_per_day=1), None),
        (Plan(rate=0.1, burst=1), None),
        (Plan(concurrency=1), None),
        (Plan(tokens_per_day=5, tokens_per_request=5), Need(5, 5)),
    ],
)
def test_a_limit_that_just_refused_refuses_every_request(
    fleet: Fleet, process: Process, plan: Plan, tokens: Need | None
) -> None:
    allowance, other = under(plan), under(plan, pools=(TENANT,))
    assert not process.table.has_refused(allowance, process.now)
    process.take(allowance, tokens)
    assert not process.table.has_refused(allowance, process.now)
    process.refused(allowance, None if tokens is None else Need(1, 1))
    assert process.table.has_refused(allowance, process.now)
    with pytest.raises(Refusal):
        process.table.check(allowance, process.now, Need(1, 1))
    assert not process.table.has_refused(other, process.now)
    # The ledger request is retried after a while.
    fleet.now += 11.0
    assert not process.table.has_refused(allowance, process.now)


def test_a_budget_that_was_too_small_for_one_request_is_not_known_to_refuse_others(process: Process) -> None:
    allowance = under(Plan(tokens_per_day=100, tokens_per_request=200))
    process.refused(allowance, Need(150, 150))
    assert not process.table.has_refused(allowance, process.now)
    assert process.take(allowance, Need(50, 50)).tokens == 50


@pytest.mark.parametrize("limit", [0, 1, 2, 7])
def test_as_many_requests_pass_as_the_window_allows_and_not_one_more(
    fleet: Fleet, process: Process, limit: int
) -> None:
    allowance = under(Plan(requests_per_day=limit))
    for _ in range(limit):
        process.used(process.take(allowance))
    refusal = process.refused(allowance)
    assert refusal.reason is Reason.QUOTA_EXHAUSTED
    assert refusal.limit is not None
    assert (refusal.limit.remaining, refusal.limit.reset_seconds) == (0, 43_200)
    process.leave()
    assert (fleet.row("requests_per_day").spent, fleet.row("requests_per_day").held) == (limit, 0)


@pytest.mark.parametrize(("used", "in_flight", "is_held"), [(3, 0, False), (2, 1, True), (0, 3, True)])
def test_a_window_is_held_while_requests_in_flight_may_give_it_back_and_spent_when_none_can(
    fleet: Fleet, used: int, in_flight: int, is_held: bool
) -> None:
    one, other = fleet.process(), fleet.process()
    plan = Plan(requests_per_day=3)
    allowances = {process: under(plan) for process in (one, other)}
    holds = [one.take(allowances[one]) for _ in range(used + in_flight)]
    for hold in holds[:used]:
        one.used(hold)
    one.sync()
    for process in (one, other):
        refusal = process.refused(allowances[process])
        assert (refusal.reason, refusal.is_held, refusal.is_futile) == (Reason.QUOTA_EXHAUSTED, is_held, not is_held)
        assert refusal.retry_after_seconds is not None
        assert (1 <= refusal.retry_after_seconds <= 5) is is_held
        assert is_held or refusal.retry_after_seconds == 43_200


@pytest.mark.parametrize("ends", [True, False])
def test_a_window_is_spent_once_its_last_request_ends_even_before_it_is_settled(process: Process, ends: bool) -> None:
    allowance = under(Plan(requests_per_day=2))
    process.used(process.take(allowance))
    last = process.take(allowance)
    process.sync()
    assert process.refused(allowance).is_held
    if ends:
        process.used(last)
    refusal = process.refused(allowance)
    assert (refusal.is_held, refusal.is_futile) == (not ends, ends)
    assert (refusal.retry_after_seconds == 43_200) is ends


@pytest.mark.parametrize(("need", "is_spent"), [(41, True), (40, False)])
def test_tokens_that_would_fit_if_all_in_flight_came_back_are_held(
    fleet: Fleet, process: Process, need: int, is_spent: bool
) -> None:
    allowance = under(Plan(tokens_per_day=100))
    process.used(process.take(allowance, Need(60, 60)), tokens=60)
    process.sync()
    process.take(allowance, Need(10, 10))
    refusal = process.refused(allowance, Need(need, need))
    assert (refusal.reason, refusal.is_futile) == (Reason.TOKEN_BUDGET_EXHAUSTED, is_spent)


@pytest.mark.parametrize(("need", "reason"), [(100, None), (101, Reason.TOKEN_LIMIT_PER_REQUEST)])
def test_a_request_that_needs_more_than_a_whole_window_is_refused_once_the_ledger_has_confirmed_its_credits(
    fleet: Fleet, process: Process, need: int, reason: Reason | None
) -> None:
    allowance = under(Plan(tokens_per_day=1_000, tokens_per_month=100))
    if reason is None:
        process.take(allowance, Need(need, need))
        return
    refusal = process.refused(allowance, Need(need, need))
    assert (refusal.reason, refusal.is_futile, refusal.retry_after_seconds) == (reason, True, None)
    assert refusal.limit is not None
    assert refusal.limit.policy.name == "user.tokens_per_month"
    # The window is asked about, and no units of it are requested, which others might have to return.
    process.sync()
    assert (process.serial, fleet.row("tokens_per_month").held) == (2, 0)


def test_the_last_unit_can_be_spent_by_any_process(fleet: Fleet) -> None:
    fleet_of_three = [fleet.process() for _ in range(3)]
    allowances = [under(Plan(requests_per_day=50)) for _ in range(3)]
    for number in range(50):
        one = fleet_of_three[number % 3 if number < 40 else 2]
        for process in fleet_of_three:
            process.sync()
        one.used(one.take(allowances[fleet_of_three.index(one)]))
        fleet.now += 0.3
    for process, allowance in zip(fleet_of_three, allowances, strict=True):
        assert process.refused(allowance).reason is Reason.QUOTA_EXHAUSTED


def test_a_new_window_begins_when_the_day_ends_and_not_before(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(requests_per_day=2))
    holds = [process.take(allowance) for _ in range(2)]
    fleet.now = 43_199.9
    process.sync()
    assert process.refused(allowance).reason is Reason.QUOTA_EXHAUSTED
    fleet.now = 43_200.0
    process.used(process.take(allowance))
    yesterday, today = sorted(fleet.ledger.windows)
    for hold in holds:
        process.used(hold)
    process.leave()
    assert (fleet.ledger.windows[yesterday].spent, fleet.ledger.windows[today].spent) == (2, 1)


def test_what_is_free_of_a_window_that_is_over_is_not_taken_today(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(requests_per_day=100))
    process.used(process.take(allowance))
    fleet.now = 43_200.0
    with pytest.raises(Short):
        process.table.take(allowance, process.now)


def test_a_lease_whose_first_reply_is_lost_at_midnight_stays_in_its_day(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(requests_per_day=100))
    with pytest.raises(Short) as short:
        process.table.take(allowance, process.now)
    process.lease_sync.request(short.value)
    fleet.now = 43_199.9
    process.sync(answer_is_lost=True)
    fleet.now = 43_200.1
    process.leave()
    assert [row.held for row in fleet.ledger.windows.values()] == [0]


# -- all or none


def test_a_refusal_by_one_limit_consumes_nothing_of_the_others(fleet: Fleet, process: Process) -> None:
    plan = Plan(requests_per_day=100, requests_per_month=100, concurrency=10, tokens_per_day=1000)
    allowance = under(plan, plan, Plan(requests_per_day=1))
    process.used(process.take(allowance, Need(10, 10)), tokens=10)
    for _ in range(5):
        assert process.refused(allowance, Need(10, 10)).limit.policy.name == "key.requests_per_day"  # type: ignore[union-attr]
    process.leave()
    for pool in (USER, TENANT):
        for measure, spent in (("requests_per_day", 1), ("requests_per_month", 1), ("concurrency", 0),
                               ("tokens_per_day", 10)):  # fmt: skip
            assert (fleet.row(measure, pool).spent, fleet.row(measure, pool).held) == (spent, 0)


def test_all_keys_of_a_user_draw_on_one_pool_and_test_keys_on_another(process: Process) -> None:
    plan = Plan(requests_per_day=2)
    one = Allowance(((KEY, Plan()), (USER, plan)))
    other = Allowance(((KEY._replace(owner="key_2"), Plan()), (USER, plan)))
    test = Allowance(((KEY._replace(is_test=True), Plan()), (USER._replace(is_test=True), plan)))
    process.used(process.take(one))
    process.used(process.take(other))
    assert process.refused(one).reason is Reason.QUOTA_EXHAUSTED
    assert process.refused(other).reason is Reason.QUOTA_EXHAUSTED
    process.used(process.take(test))


def test_a_request_that_was_not_sent_is_released(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(requests_per_day=1, concurrency=1, tokens_per_day=10))
    for _ in range(3):
        process.table.settle(process.take(allowance, Need(10, 10)), was_sent=False, tokens=10)
    process.used(process.take(allowance, Need(10, 10)), tokens=10)
    process.leave()
    assert (fleet.row("requests_per_day").spent, fleet.row("tokens_per_day").spent) == (1, 10)


def test_slots_are_free_again_when_requests_end_however_they_end(process: Process) -> None:
    allowance = under(Plan(concurrency=2))
    holds = [process.take(allowance) for _ in range(2)]
    assert process.refused(allowance).reason is Reason.CONCURRENCY_LIMITED
    process.used(holds[0])
    process.table.settle(holds[1], was_sent=False)
    assert len([process.take(allowance) for _ in range(2)]) == 2


def test_what_was_granted_a_moment_ago_is_not_idle(fleet: Fleet, process: Process) -> None:
    # The request may still wait for another lease: if this one were returned meanwhile, it might never hold both.
    allowance = under(Plan(requests_per_day=9))
    with pytest.raises(Short) as short:
        process.table.take(allowance, process.now)
    fleet.now += 2.0
    process.lease_sync.request(short.value)
    process.sync(everything=False)
    fleet.now += 0.9
    process.sync()
    assert fleet.row("requests_per_day").held > 0
    fleet.now += 0.2
    process.sync()
    assert fleet.row("requests_per_day").held == 0


# -- requests that are sent again


def test_a_repeat_releases_its_request_and_is_charged_the_given_tokens(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(requests_per_day=2, tokens_per_day=100, rate=0.001, burst=2))
    process.used(process.take(allowance, Need(10, 10)), tokens=10)
    process.table.settle(process.take(allowance, Need(10, 10)), was_sent=True, tokens=3, is_repeat=True)
    # Units of a rate stay used: the request was served.
    assert process.refused(allowance).reason is Reason.RATE_LIMITED
    process.leave()
    assert (fleet.row("requests_per_day").spent, fleet.row("tokens_per_day").spent) == (1, 13)


def test_what_waits_to_be_settled_holds_no_slot_and_everything_else(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(concurrency=1, requests_per_day=2))
    rest = [process.table.release(process.take(allowance)) for _ in range(2)]
    assert process.refused(allowance).reason is Reason.QUOTA_EXHAUSTED
    process.sync()
    assert (fleet.row("requests_per_day").spent, fleet.row("requests_per_day").held) == (0, 2)
    process.used(rest[0])
    process.table.settle(rest[1], was_sent=True, is_repeat=True)
    process.used(process.take(allowance))
    process.leave()
    assert fleet.row("requests_per_day").spent == 2
    assert (fleet.row("concurrency").spent, fleet.row("concurrency").held) == (0, 0)


@pytest.mark.parametrize("spent", [0, 1])
def test_what_was_charged_before_passes_a_quota_that_is_spent(fleet: Fleet, process: Process, spent: int) -> None:
    allowance = under(Plan(requests_per_day=spent, concurrency=1))
    for _ in range(spent):
        process.used(process.take(allowance))
    process.refused(allowance)
    hold = process.again(allowance, None, 0)
    with pytest.raises(Refusal) as caught:
        process.again(allowance, None, 0)
    assert caught.value.reason is Reason.CONCURRENCY_LIMITED
    process.table.settle(hold, was_sent=True, is_repeat=True)
    process.leave()
    assert spent == 0 or fleet.row("requests_per_day").spent == 1


@pytest.mark.parametrize(("paid", "held"), [(0, 50), (1, 49), (49, 1), (50, 0), (70, 0)])
def test_a_repeat_holds_the_tokens_that_it_may_use_beyond_those_it_has_paid(
    fleet: Fleet, process: Process, paid: int, held: int
) -> None:
    allowance = under(Plan(tokens_per_day=100))
    process.used(process.take(allowance, Need(100 - held, 100 - held)), tokens=100 - held)
    hold = process.again(allowance, Need(50, 50), paid)
    assert (hold.tokens, hold.covers) == (held, held + paid)
    process.table.settle(hold, was_sent=True, tokens=held, is_repeat=True)
    process.leave()
    assert (fleet.row("tokens_per_day").spent, fleet.row("tokens_per_day").held) == (100, 0)


@pytest.mark.parametrize("paid", [0, 1, 49])
def test_a_repeat_is_refused_if_the_budget_lacks_what_it_may_use_beyond_them(process: Process, paid: int) -> None:
    allowance = under(Plan(tokens_per_day=100))
    process.used(process.take(allowance, Need(51 + paid, 51 + paid)), tokens=51 + paid)
    with pytest.raises(Refusal) as caught:
        process.again(allowance, Need(50, 50), paid)
    assert caught.value.reason is Reason.TOKEN_BUDGET_EXHAUSTED


def test_a_repeat_that_uses_more_than_it_holds_is_charged_that_too(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(tokens_per_day=100))
    hold = process.again(allowance, Need(50, 50), 50)
    process.table.settle(hold, was_sent=True, tokens=7, is_repeat=True)
    process.leave()
    assert (fleet.row("tokens_per_day").spent, fleet.row("tokens_per_day").held) == (7, 0)


# -- plans that change


def test_a_raised_limit_applies_in_the_current_window(process: Process) -> None:
    allowance = under(Plan(requests_per_day=1))
    process.used(process.take(allowance))
    process.refused(allowance)
    raised = under(Plan(requests_per_day=3))
    for _ in range(2):
        process.used(process.take(raised))
    assert process.refused(raised).reason is Reason.QUOTA_EXHAUSTED


def test_a_lowered_limit_applies_immediately_although_more_was_leased(fleet: Fleet, process: Process) -> None:
    process.used(process.take(under(Plan(requests_per_day=100))))
    lowered = under(Plan(requests_per_day=2))
    process.used(process.take(lowered))
    assert process.refused(lowered).reason is Reason.QUOTA_EXHAUSTED
    process.leave()
    assert fleet.row("requests_per_day").spent == 2


def test_a_grant_under_a_plan_that_was_lowered_meanwhile_is_returned(fleet: Fleet, process: Process) -> None:
    before = under(Plan(requests_per_day=100))
    with pytest.raises(Short) as short:
        process.table.take(before, process.now)
    process.lease_sync.request(short.value)
    lines = process.lease_sync.lines(process.now, LINES_MAX)
    lowered = under(Plan(requests_per_day=1))
    with pytest.raises(Short):
        process.table.take(lowered, process.now)
    process.serial += 1
    replies = fleet.ledger.sync(process.name, process.serial, lines)
    assert replies is not None
    assert replies[0].granted > 1
    process.lease_sync.apply(lines, replies, process.now, valid_seconds=9.0)
    process.used(process.take(lowered))
    assert process.refused(lowered).reason is Reason.QUOTA_EXHAUSTED


def test_a_removed_limit_stops_applying_and_an_added_one_starts(process: Process) -> None:
    process.used(process.take(under(Plan(requests_per_day=1))))
    without = under(Plan(concurrency=5))
    for _ in range(5):
        process.used(process.take(without))
    added = under(Plan(concurrency=5, requests_per_month=1))
    process.used(process.take(added))
    assert process.refused(added).limit.policy.name == "user.requests_per_month"  # type: ignore[union-attr]
    process.leave()


# -- tokens


def test_the_known_maximum_is_held_and_what_was_not_used_is_free_again(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(tokens_per_day=100))
    hold = process.take(allowance, Need(60, 60))
    assert hold.tokens == 60
    assert process.refused(allowance, Need(41, 41)).reason is Reason.TOKEN_BUDGET_EXHAUSTED
    # Released tokens are available immediately, although the ledger refused a moment ago.
    process.used(hold, tokens=0)
    hold = process.take(allowance, Need(100, 100))
    process.used(hold, tokens=100)
    process.leave()
    assert fleet.row("tokens_per_day").spent == 100


def test_without_a_maximum_a_request_holds_at_most_what_the_plan_allows_per_request(process: Process) -> None:
    allowance = under(Plan(tokens_per_day=100, tokens_per_request=30))
    assert process.take(allowance, Need(5, 4_096)).tokens == 30
    assert process.refused(allowance, Need(31, 31)).reason is Reason.TOKEN_LIMIT_PER_REQUEST
    assert process.refused(allowance, Need(31, 4_096)).reason is Reason.TOKEN_LIMIT_PER_REQUEST
    assert process.take(allowance, Need(30, 30)).tokens == 30


@pytest.mark.parametrize("need", [Need(1, 4_096), Need(1, 1)])
def test_a_spent_budget_refuses_every_request_however_little_it_needs(process: Process, need: Need) -> None:
    allowance = under(Plan(tokens_per_day=10))
    process.used(process.take(allowance, Need(10, 10)), tokens=10)
    assert process.refused(allowance, need).reason is Reason.TOKEN_BUDGET_EXHAUSTED


def test_more_used_than_held_is_charged_and_drawn_from_what_comes_next(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(tokens_per_day=100))
    process.used(process.take(allowance, Need(10, 10)), tokens=60)
    process.sync()
    assert process.refused(allowance, Need(41, 41)).reason is Reason.TOKEN_BUDGET_EXHAUSTED
    process.used(process.take(allowance, Need(40, 40)), tokens=40)
    process.leave()
    assert (fleet.row("tokens_per_day").spent, fleet.row("tokens_per_day").held) == (100, 0)


def test_more_used_than_held_of_a_window_that_is_over_is_charged_once(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(tokens_per_day=100))
    hold = process.take(allowance, Need(10, 10))
    fleet.now = 43_200.0
    process.take(allowance, Need(10, 10))
    process.used(hold, tokens=15)
    for _ in range(4):
        process.sync()
    yesterday = fleet.ledger.windows[min(fleet.ledger.windows)]
    assert (yesterday.spent, yesterday.held) == (15, 0)
    assert process.lease_sync.outstanding == 1


def test_an_extension_holds_more_until_the_budget_is_gone(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(tokens_per_day=100))
    hold = process.take(allowance, Need(40, 40))
    for _ in range(2):
        try:
            hold = process.table.extend(hold, 60, process.now)
            break
        except Short as short:
            process.lease_sync.request(short)
            process.sync(everything=False)
    assert hold.tokens == 100
    with pytest.raises(Short) as short_of_more:
        process.table.extend(hold, 1, process.now)
    process.lease_sync.request(short_of_more.value)
    process.sync(everything=False)
    process.lease_sync.mark_exhausted(short_of_more.value, process.now)
    with pytest.raises(Refusal) as refused:
        process.table.extend(hold, 1, process.now)
    assert (refused.value.reason, refused.value.limit_reason) == (Reason.TOKEN_BUDGET_EXHAUSTED, LimitReason.SPENT)
    assert refused.value.caller_text == "The request may use up to 101 tokens."
    process.used(hold, tokens=100)
    process.leave()
    assert fleet.row("tokens_per_day").spent == 100


@pytest.mark.parametrize(
    ("used", "in_flight", "extension", "reason"),
    [(0, 60, 61, LimitReason.SPENT), (0, 60, 60, LimitReason.HELD), (1, 59, 60, LimitReason.SPENT),
     (1, 59, 59, LimitReason.HELD), (60, 0, 1, LimitReason.SPENT)],
)  # fmt: skip
def test_an_extension_is_held_if_it_fits_once_other_requests_release_their_reservations_and_spent_otherwise(
    process: Process, used: int, in_flight: int, extension: int, reason: LimitReason
) -> None:
    """Its own reservation is not one that it could wait for."""
    allowance = under(Plan(tokens_per_day=100))
    hold = process.take(allowance, Need(40, 40))
    if in_flight:
        process.take(allowance, Need(in_flight, in_flight))
    if used:
        process.used(process.take(allowance, Need(used, used)), tokens=used)
        process.sync()
    with pytest.raises(Short) as short:
        process.table.extend(hold, extension, process.now)
    process.lease_sync.request(short.value)
    process.sync(everything=False)
    process.lease_sync.mark_exhausted(short.value, process.now)
    with pytest.raises(Refusal) as refused:
        process.table.extend(hold, extension, process.now)
    assert refused.value.limit_reason is reason


@pytest.mark.parametrize("what_ends", ["the day", "the holder"])
def test_an_extension_draws_on_the_lease_of_now_when_the_first_is_over(
    fleet: Fleet, process: Process, what_ends: str
) -> None:
    allowance = under(Plan(tokens_per_day=1000))
    hold = process.take(allowance, Need(40, 40))
    if what_ends == "the day":
        fleet.now = 43_200.0
    else:
        fleet.ledger.end(process.name)
        process.sync()
    with pytest.raises(Short) as short:
        process.table.extend(hold, 30, process.now)
    process.lease_sync.request(short.value)
    process.sync(everything=False)
    hold = process.table.extend(hold, 30, process.now)
    process.used(hold, tokens=55)
    process.leave()
    rows = [row for _, row in sorted(fleet.ledger.windows.items())]
    assert all(row.held == 0 for row in rows)
    if what_ends == "the day":
        assert [row.spent for row in rows] == [40, 15]
    else:
        # What the holder had when it ended is charged in full, once; and the 15 that came after.
        assert rows[0].spent == rows[0].forfeited + 15


# -- leases that end


def test_nothing_is_taken_of_leases_when_their_holders_time_is_over(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(requests_per_day=100))
    process.used(process.take(allowance))
    fleet.now = LEASE_SECONDS * 0.95 - 0.001
    process.used(process.table.take(allowance, process.now))
    fleet.now = LEASE_SECONDS * 0.95
    with pytest.raises(Short):
        process.table.take(allowance, process.now)


def test_a_process_suspended_past_its_leases_spends_none_of_them_and_starts_over(
    fleet: Fleet, process: Process
) -> None:
    allowance = under(Plan(requests_per_day=100))
    hold = process.take(allowance)
    held = fleet.row("requests_per_day").held
    fleet.now = LEASE_SECONDS + 1
    fleet.ledger.reap()
    process.sync()
    process.used(hold)
    process.used(process.take(allowance))
    process.leave()
    row = fleet.row("requests_per_day")
    assert (row.spent, row.forfeited, row.held) == (held + 1, held, 0)


def test_units_idle_for_a_second_are_returned_and_the_lease_is_closed(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(requests_per_day=100))
    process.used(process.take(allowance))
    process.sync()
    fleet.now += 0.99
    process.sync()
    assert fleet.row("requests_per_day").held > 0
    fleet.now += 0.02
    process.sync()
    process.sync()
    assert (fleet.row("requests_per_day").held, process.lease_sync.has_leases) == (0, False)
    assert process.sync() == 0


def test_long_holds_are_not_reviewed_repeatedly(fleet: Fleet, process: Process) -> None:
    plan, pools = Plan(tokens_per_day=1_000), [Pool("user", f"u_{number}", False) for number in range(50)]
    holds = [process.take(under(plan, pools=(pool,)), Need(90, 90)) for pool in pools]
    for _ in range(4):
        fleet.now += 1.1
        process.sync()
    process.lease_sync.gather(fleet.now)
    assert not process.lease_sync.reviews.due
    process.used(holds[7], tokens=30)
    process.lease_sync.gather(fleet.now)
    assert list(process.lease_sync.reviews.due) == list(holds[7].bundle.token_windows)


def test_a_message_that_has_to_claim_does_so_even_if_closing_leases_fill_it(process: Process, fleet: Fleet) -> None:
    plan = Plan(requests_per_day=100)
    busy = process.take(under(plan, pools=(Pool("user", "busy", False),)))
    for number in range(20):
        process.used(process.take(under(plan, pools=(Pool("user", f"u_{number}", False),))))
    process.sync()
    fleet.now += 1.1
    process.sync()
    process.lease_sync.gather(process.now)
    process.lease_sync.resend(process.lease_sync.lines(process.now, LINES_MAX))
    without = process.lease_sync.lines(process.now, 8)
    assert [line.is_closing for line in without] == [True] * 8
    process.lease_sync.resend(without)
    lines = process.lease_sync.lines(process.now, 8, must_claim=True)
    assert [line.is_closing for line in lines] == [False] + [True] * 7
    assert (lines[0].window.pool.owner, lines[0].granted > 0) == ("busy", True)
    process.lease_sync.resend(lines)
    process.used(busy)
    process.leave()
    assert {row.held for row in fleet.ledger.windows.values()} == {0}
    assert sum(row.spent for row in fleet.ledger.windows.values()) == 21


def test_of_many_leases_those_with_waiting_requests_are_sent_first(process: Process) -> None:
    pools = [Pool("user", f"u_{number}", False) for number in range(20)]
    for pool in pools[:10]:
        process.used(process.take(under(Plan(requests_per_day=5), pools=(pool,))))
    process.lease_sync.gather(process.now)
    for pool in pools[10:]:
        with pytest.raises(Short) as caught:
            process.table.take(under(Plan(requests_per_day=5), pools=(pool,)), process.now)
        process.lease_sync.request(caught.value)
    told = [line.window.pool for line in process.lease_sync.lines(process.now, 8)]
    assert told == [*pools[10:16], *pools[:2]]


def test_units_that_another_process_needs_are_returned_with_the_next_message(fleet: Fleet) -> None:
    rich, poor = fleet.process(), fleet.process()
    allowance = under(Plan(requests_per_day=5))
    rich.used(rich.take(allowance))
    with pytest.raises(Short) as short:
        poor.table.take(under(Plan(requests_per_day=5)), poor.now)
    poor.lease_sync.request(short.value)
    poor.sync(everything=False)
    rich.used(rich.take(allowance))
    rich.sync()
    rich.sync()
    assert fleet.row("requests_per_day").held == 0


def test_a_lost_reply_leaves_nothing_behind(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(requests_per_day=100))
    process.used(process.take(allowance))
    for _ in range(3):
        process.sync(answer_is_lost=True)
        fleet.now += 0.6
    process.leave()
    assert (fleet.row("requests_per_day").spent, fleet.row("requests_per_day").held) == (1, 0)


def test_requests_that_arrive_before_the_first_reply_wait_for_the_same_lease(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(requests_per_day=100))
    with pytest.raises(Short) as first:
        process.table.take(allowance, process.now)
    process.lease_sync.request(first.value)
    lines = process.lease_sync.lines(process.now, LINES_MAX)
    with pytest.raises(Short) as second:
        process.table.take(allowance, process.now)
    assert second.value.needs[0][0] is first.value.needs[0][0]
    process.serial += 1
    replies = fleet.ledger.sync(process.name, process.serial, lines)
    assert replies is not None
    process.lease_sync.apply(lines, replies, process.now, valid_seconds=9.0)
    process.table.take(allowance, process.now)


def test_a_forgotten_identity_draws_on_the_same_lease_when_it_comes_back(process: Process) -> None:
    process.used(process.take(under(Plan(requests_per_day=100))))
    process.used(process.take(under(Plan(requests_per_day=100))))
    assert process.lease_sync.outstanding == 1


def test_two_leases_of_one_window_in_one_message_are_not_granted_the_same_units(fleet: Fleet) -> None:
    process = fleet.process()
    process.used(process.take(under(Plan(requests_per_day=5))))
    process.lease_sync.gather(process.now)
    lines = process.lease_sync.lines(process.now, LINES_MAX)
    (line,) = lines
    both = [line._replace(want=5, at_least=1), line._replace(lease=99, granted=0, used=0, want=5, at_least=1)]
    fleet.ledger.sync(process.name, 9, both)
    row = fleet.row("requests_per_day")
    assert row.spent + row.held == 5


def test_what_lies_ahead_at_most_doubles_so_that_a_spike_does_not_take_all(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(requests_per_day=1_000_000))
    for _ in range(20):
        process.used(process.take(allowance))
    assert fleet.row("requests_per_day").held + fleet.row("requests_per_day").spent <= 40


def test_no_request_waits_in_steady_state(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(requests_per_day=1_000_000, rate=1000.0))
    waited = 0
    for number in range(2000):
        fleet.now += 0.01
        if process.wakes or number % 50 == 0:
            process.wakes = 0
            process.sync(everything=number % 50 == 0)
        try:
            process.used(process.table.take(allowance, process.now))
        except Short:
            waited += number > 200
            process.used(process.take(allowance))
    assert waited == 0


# -- when the ledger cannot be asked


def test_lenient_admits_although_nothing_is_left_and_settles_everything_later(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(requests_per_day=3, tokens_per_day=10))
    process.table.is_lenient = True
    for _ in range(5):
        process.used(process.take(allowance, Need(10, 10)), tokens=4)
    assert process.lease_sync.outstanding == 2
    process.table.is_lenient = False
    process.leave()
    assert (fleet.row("requests_per_day").spent, fleet.row("tokens_per_day").spent) == (5, 20)
    assert (fleet.row("requests_per_day").held, fleet.row("tokens_per_day").held) == (0, 0)
    assert process.refused(allowance, Need(1, 1)).reason in (Reason.QUOTA_EXHAUSTED, Reason.TOKEN_BUDGET_EXHAUSTED)


def test_units_taken_beyond_the_leases_are_charged_although_the_holder_was_ended(
    fleet: Fleet, process: Process
) -> None:
    allowance = under(Plan(requests_per_day=100, tokens_per_day=1000, concurrency=2))
    process.used(process.take(allowance, Need(10, 10)), tokens=4)
    process.sync()
    process.table.is_lenient = True
    for _ in range(50):
        process.used(process.take(allowance, Need(10, 10)), tokens=10)
    fleet.ledger.end(process.name)
    process.table.is_lenient = False
    process.sync()
    assert process.name.endswith("'"), "the process learnt that its holder ended"
    process.leave()
    # All leases were charged in full, and nothing else that was used is missing or counted twice.
    assert fleet.row("requests_per_day").spent == 51
    assert 504 <= fleet.row("tokens_per_day").spent <= 504 + fleet.row("tokens_per_day").forfeited
    assert [fleet.row(measure).held for measure in ("requests_per_day", "tokens_per_day", "concurrency")] == [0, 0, 0]


def test_a_ledger_that_lost_history_receives_all_held_used_and_closed_leases_again(
    fleet: Fleet, process: Process
) -> None:
    quiet, busy = under(Plan(requests_per_day=100)), under(Plan(requests_per_month=100), pools=(TENANT,))
    process.used(process.take(busy))
    process.sync()
    replica = fleet.ledger.rules.replica()
    hold = process.take(quiet)
    process.used(process.take(busy))
    fleet.now += 0.6
    process.sync()
    fleet.ledger.fail_over(replica)
    assert not fleet.ledger.windows.get((Window(USER, "requests_per_day"), int(NOON - 43_200)))
    process.lease_sync.gather(process.now)
    lines = process.lease_sync.lines(process.now, LINES_MAX)
    process.serial += 1
    replies = fleet.ledger.sync(process.name, process.serial, lines)
    assert replies is not None
    assert process.lease_sync.apply(lines, replies, process.now, valid_seconds=9.0) == LEASE_SECONDS
    process.lease_sync.resend_all()
    process.sync()
    assert fleet.row("requests_per_month", TENANT).spent == 2
    assert fleet.row("requests_per_day").held == hold.bundle.counted[0].outstanding > 0


# -- rates


def test_a_rate_admits_its_burst_and_then_one_after_the_other(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(rate=0.5, burst=3))
    for _ in range(3):
        process.used(process.take(allowance))
    refusal = process.refused(allowance)
    assert (refusal.reason, refusal.retry_after_seconds) == (Reason.RATE_LIMITED, 2)
    for _ in range(5):
        retry = process.refused(allowance).retry_after_seconds
        assert retry is not None
        fleet.now += retry
        process.used(process.take(allowance))


@pytest.mark.parametrize(("rate", "burst"), [(0.01, 10), (1.0, 5), (3.0, 3)])
def test_idle_units_of_a_slow_rate_are_not_lost(fleet: Fleet, process: Process, rate: float, burst: int) -> None:
    allowance = under(Plan(rate=rate, burst=burst))
    for _ in range(burst):
        process.used(process.take(allowance))
        fleet.now += 1.5
        process.sync()


def test_units_of_a_rate_lapse_a_second_after_their_request(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(rate=100.0, burst=100))
    for _ in range(4):
        for _ in range(20):
            process.used(process.take(allowance))
        fleet.now += 0.2
    process.take(allowance)
    assert allowance.bundle is not None
    (lease,) = allowance.bundle.counted
    assert lease.free > 0
    first, last = lease.lapses[0][0], lease.lapses[-1][0]
    assert process.now < first <= last <= process.now + 1.0
    fleet.now += last - process.now
    with pytest.raises(Short):
        process.table.take(allowance, process.now)


def test_a_clock_of_the_ledger_that_is_set_back_does_not_close_a_rate(fleet: Fleet, process: Process) -> None:
    allowance = under(Plan(rate=1.0, burst=2))
    for _ in range(2):
        process.used(process.take(allowance))
    fleet.ledger.clock = lambda: NOON - 3600 + fleet.now
    fleet.now += 1.0
    process.refused(allowance)
    fleet.now += 1.0
    process.used(process.take(allowance))
