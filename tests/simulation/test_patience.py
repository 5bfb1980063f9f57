"""The wait of a request for its limits is bounded, however slow the ledger and the store are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import pytest

from keyproxy.config import schema
from keyproxy.limits.allowance import Allowance, Hold, Need
from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Pool, Window
from keyproxy.limits.plan import Plan
from keyproxy.model import PATIENCE_SECONDS, Missing, Moment, TimeBudget
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.ledger.backend import REAP_PORTION
from keyproxy.store.ledger.charge_dedup import Answer, Claim, Claims, Cover
from keyproxy.store.ledger.ledger import Ledger
from keyproxy.store.postgres.database import StoreUnavailable
from tests.reference_claims import ReferenceClaims
from tests.reference_ledger import ReferenceLedger
from tests.simulation.clockwork import Clock, VirtualLoop
from tests.simulation.scenarios import scenario
from tests.simulation.world import World

T = TypeVar("T")
USER = Pool("user", "u_42", False)
_NOON = 1_705_320_000.0
_CONFIG = schema.LedgerSettings(lease_seconds=10.0, settle_seconds=0.5)
#: A tolerance: many times the duration of one iteration of the virtual loop.
_TURNS_SECONDS = 0.01


class SlowLedger:
    """A ledger that responds after `seconds`. `is_deaf`: never, with a timeout of 2. Implements LedgerBackend."""

    def __init__(self, clock: Clock, seconds: float, *, is_deaf: bool = False) -> None:
        self.reference = ReferenceLedger(lambda: _NOON + clock.now, lease_seconds=_CONFIG.lease_seconds)
        self.seconds, self.is_deaf = seconds, is_deaf

    async def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> Sequence[LeaseGrant] | None:
        if self.is_deaf:
            await asyncio.sleep(2.0)
            raise StoreUnavailable("no response")
        await asyncio.sleep(self.seconds)
        return self.reference.sync(holder, serial, lines)

    async def reap(self, portion: int = REAP_PORTION) -> bool:
        """No holder expires here."""
        del portion
        return False

    async def forget(self, portion: int) -> bool:
        """No holder is deleted here."""
        del portion
        return False

    async def end(self, holder: str) -> None:
        self.reference.end(holder)

    async def close(self) -> None:
        """Nothing to close."""


class SlowClaims(ReferenceClaims):
    """A record of charges that responds after `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    async def claim(self, process: str, number: int, claims: Sequence[Claim]) -> Sequence[Answer] | None:
        await asyncio.sleep(self.seconds)
        return await super().claim(process, number, claims)

    async def cover(self, fingerprints: Sequence[bytes]) -> Mapping[bytes, Cover]:
        await asyncio.sleep(self.seconds)
        return await super().cover(fingerprints)


class Stage:
    """One process with its own clock."""

    def __init__(self, seconds: float, *, is_deaf: bool = False, store_seconds: float = 0.01) -> None:
        self.clock = Clock()
        self.loop = VirtualLoop(self.clock)  # type: ignore[abstract]  # as much of a loop as is needed
        self.backend = SlowLedger(self.clock, seconds, is_deaf=is_deaf)
        asyncio._set_running_loop(self.loop)
        try:
            self.ledger = Ledger(self.backend, _CONFIG, self.now)
            self.claims = Claims(SlowClaims(store_seconds), self.ledger, _CONFIG, self.now)
            self.ledger.start()
            self.claims.start()
        finally:
            asyncio._set_running_loop(None)

    def now(self) -> Moment:
        return Moment(_NOON + self.clock.now, 5_000.0 + self.clock.now)

    def waited(self, work: Callable[[], Awaitable[T]]) -> tuple[T | Reason, float]:
        """The result, or the reason of a Refusal, and the seconds that it took."""
        began = self.clock.now
        ended: list[float] = []

        async def working() -> T | Reason:
            try:
                return await work()
            except Refusal as refusal:
                return refusal.reason
            finally:
                ended.append(self.clock.now)

        task = self.loop.create_task(working())
        self.clock.run(began + 60.0)
        return task.result(), ended[0] - began

    async def take(self, plan: Plan, patience: TimeBudget, need: Need | None = None) -> Hold:
        """Take as the gateway does."""
        allowance = Allowance(((USER, plan),))
        while True:
            try:
                return self.ledger.take(allowance, self.now(), need)
            except Missing as missing:
                await missing.fetch_missing(patience)

    def others_hold(self, plan: Plan) -> None:
        """Let another process hold all of a day's requests, and never return them."""
        window = Window(USER, "requests_per_day")
        (limit,) = plan.limits
        most = limit.quota
        self.backend.reference.sync(
            "other", 1, [LeaseReport(1, window, 0, most, 0.0, 0, 0, 0, most, most, most, False)]
        )


@pytest.mark.parametrize(
    ("seconds", "reason"),
    [
        (0.001, Reason.QUOTA_EXHAUSTED),
        (0.5, Reason.QUOTA_EXHAUSTED),
        (1.9, Reason.LEDGER_UNAVAILABLE),
        (3.98, Reason.QUOTA_EXHAUSTED),
        (4.1, Reason.LEDGER_UNAVAILABLE),
        (50.0, Reason.LEDGER_UNAVAILABLE),
    ],
)
def test_request_is_decided_within_its_budget_however_slow_the_ledger_is(seconds: float, reason: Reason) -> None:
    stage, plan = Stage(seconds), Plan(requests_per_day=1)
    stage.others_hold(plan)
    outcome, waited = stage.waited(lambda: stage.take(plan, TimeBudget()))
    assert outcome is reason
    assert waited <= PATIENCE_SECONDS + _TURNS_SECONDS


def test_wait_for_units_of_others_is_shorter_if_the_ledger_responds_at_once() -> None:
    stage, plan = Stage(0.001), Plan(requests_per_day=1)
    stage.others_hold(plan)
    outcome, waited = stage.waited(lambda: stage.take(plan, TimeBudget()))
    assert outcome is Reason.QUOTA_EXHAUSTED
    assert 1.6 <= waited <= 1.6 + 0.3 + _TURNS_SECONDS


def test_request_that_arrives_during_a_message_waits_no_longer() -> None:
    stage, plan = Stage(3.0), Plan(requests_per_day=1)
    stage.others_hold(plan)
    stage.loop.create_task(stage.take(plan, TimeBudget()))
    stage.clock.run(0.1)
    outcome, waited = stage.waited(lambda: stage.take(plan, TimeBudget()))
    assert outcome is Reason.LEDGER_UNAVAILABLE
    assert waited <= PATIENCE_SECONDS + _TURNS_SECONDS


def test_response_at_the_last_moment_admits_the_request() -> None:
    stage = Stage(3.95)
    outcome, waited = stage.waited(lambda: stage.take(Plan(requests_per_day=1), TimeBudget()))
    assert isinstance(outcome, Hold)
    assert waited == pytest.approx(3.95, abs=_TURNS_SECONDS)


def test_all_rounds_of_a_decision_share_one_budget() -> None:
    stage, patience = Stage(1.5), TimeBudget()
    _, waited = stage.waited(lambda: stage.take(Plan(requests_per_day=1), patience))
    assert patience.seconds_left == pytest.approx(PATIENCE_SECONDS - 1.5, abs=_TURNS_SECONDS)
    stage.backend.seconds = 50.0
    outcome, more = stage.waited(lambda: stage.take(Plan(requests_per_month=1), patience))
    assert outcome is Reason.LEDGER_UNAVAILABLE
    assert waited + more == pytest.approx(PATIENCE_SECONDS, abs=2 * _TURNS_SECONDS)
    # Then the budget is spent.
    stage.backend.seconds = 0.001
    outcome, waited = stage.waited(lambda: stage.take(Plan(requests_per_month=1), patience))
    assert outcome is Reason.LEDGER_UNAVAILABLE
    assert waited <= _TURNS_SECONDS


def test_lookup_of_earlier_charges_uses_the_same_budget() -> None:
    stage, patience = Stage(1.5, store_seconds=1.0), TimeBudget()
    stage.waited(lambda: stage.take(Plan(requests_per_day=1), patience))
    outcome, waited = stage.waited(lambda: stage.claims.paid(b"f", patience))
    assert outcome is None
    assert waited == pytest.approx(1.0, abs=_TURNS_SECONDS)
    assert patience.seconds_left == pytest.approx(PATIENCE_SECONDS - 2.5, abs=2 * _TURNS_SECONDS)
    patience.seconds_left = 0.4
    outcome, waited = stage.waited(lambda: stage.claims.paid(b"g", patience))
    assert outcome is Reason.LEDGER_UNAVAILABLE
    assert waited == pytest.approx(0.4, abs=_TURNS_SECONDS)


def test_lookup_of_earlier_charges_is_not_starved_by_a_stream_of_claims() -> None:
    stage = Stage(0.01, store_seconds=0.05)

    async def ending() -> None:
        while stage.clock.now < 20.0:
            hold = await stage.take(Plan(requests_per_day=10**6), TimeBudget())
            stage.claims.add(hold, b"%d" % round(stage.clock.now * 1e6), 0, None)
            await asyncio.sleep(0.01)

    stage.loop.create_task(ending())
    stage.clock.run(2.0)
    outcome, waited = stage.waited(lambda: stage.claims.paid(b"f", TimeBudget()))
    assert outcome is None
    # The batch in flight, its own batch, and the lookup.
    assert waited <= 4 * 0.05 + _TURNS_SECONDS


def test_only_the_first_request_waits_for_an_unavailable_ledger() -> None:
    stage, plan = Stage(0.0, is_deaf=True), Plan(requests_per_day=1)
    outcome, waited = stage.waited(lambda: stage.take(plan, TimeBudget()))
    assert outcome is Reason.LEDGER_UNAVAILABLE
    assert waited == pytest.approx(2.0, abs=_TURNS_SECONDS)
    outcome, waited = stage.waited(lambda: stage.take(plan, TimeBudget()))
    assert outcome is Reason.LEDGER_UNAVAILABLE
    assert waited == pytest.approx(0.0, abs=_TURNS_SECONDS)


def test_closed_ledger_refuses_at_once() -> None:
    stage = Stage(0.01)
    stage.waited(stage.ledger.close)
    outcome, waited = stage.waited(lambda: stage.take(Plan(requests_per_day=1), TimeBudget()))
    assert outcome is Reason.LEDGER_UNAVAILABLE
    assert waited == pytest.approx(0.0, abs=_TURNS_SECONDS)


def test_closed_claims_refuse_a_lookup_at_once() -> None:
    stage = Stage(0.01)
    stage.waited(stage.claims.close)
    outcome, waited = stage.waited(lambda: stage.claims.paid(b"f", TimeBudget()))
    assert outcome is Reason.LEDGER_UNAVAILABLE
    assert waited == pytest.approx(0.0, abs=_TURNS_SECONDS)


def test_closing_the_ledger_refuses_waiting_requests() -> None:
    stage = Stage(3.0)
    waiting = stage.loop.create_task(stage.take(Plan(requests_per_day=1), TimeBudget()))
    stage.clock.run(0.1)
    stage.waited(stage.ledger.close)
    assert isinstance(waiting.exception(), Refusal)


def test_lost_responses_evictions_and_repeats_together_do_not_exceed_the_budget() -> None:
    # With this seed a request was refused, then looked up as not charged before, and then its refusal had expired:
    # three waits, each with its own budget.
    World(scenario(202_013)).run()


def test_simulation_detects_a_request_that_waits_too_long() -> None:
    world = World(scenario(202_013))
    for process in world.fleet:
        process.deciding[object()] = 0.0
    with pytest.raises(AssertionError, match="a request waits since"):
        world.run()
