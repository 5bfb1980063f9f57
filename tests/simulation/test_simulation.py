"""The simulation with some seeds; `make simulate` runs thousands. It also detects faulty ledgers and stores."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from keyproxy.limits.budgets import budget_plan
from keyproxy.limits.ledger.rules import LedgerRules
from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Pool, Window
from keyproxy.limits.plan import Plan
from keyproxy.store.ledger.charge_dedup import Answer, Claim
from tests.reference_claims import ReferenceClaims
from tests.simulation.network import Weather
from tests.simulation.scenarios import scenario
from tests.simulation.upstream import BrokenError
from tests.simulation.world import Fate, Scenario, World

USER = Pool("user", "u_42", False)
_AT_NOON = 1_705_320_000.0


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Suppress the thousands of warnings that are expected here."""
    logger = logging.getLogger("keyproxy")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def kind(plan: Plan, *, seed: int = 1, seconds: float = 20.0, requests_per_second: float = 10.0) -> Scenario:
    """Three proxies, one user, no faults."""
    return Scenario(
        seed,
        {USER: plan},
        [(USER,)],
        Fate(),
        seconds=seconds,
        requests_per_second=requests_per_second,
        starts_wall=_AT_NOON,
    )


@pytest.mark.parametrize("seed", range(16))
def test_nothing_overspends_leaks_or_waits_for_ever_under_any_fault(seed: int) -> None:
    World(scenario(seed)).run()


def test_seed_determines_the_whole_run() -> None:
    worlds = [World(scenario(21)) for _ in range(2)]
    for world in worlds:
        world.run()
    one, other = worlds
    assert one.decided == other.decided
    assert one.upstream.used == other.upstream.used
    assert one.clock.now == other.clock.now


@pytest.mark.parametrize("limit", [1, 2, 137])
def test_with_no_faults_a_quota_is_spent_to_its_last_request(limit: int) -> None:
    world = World(kind(Plan(requests_per_day=limit)))
    world.run()
    assert world.upstream.used[Window(USER, "requests_per_day")] == limit
    assert world.decided["unavailable"] == world.decided["overloaded"] == 0


@pytest.mark.parametrize("limit", [1, 2, 137])
def test_processes_that_report_rarely_spend_a_quota_to_its_last_request(limit: int) -> None:
    world = World(replace(kind(Plan(requests_per_day=limit), seconds=40.0), lines_per_second=0.2))
    world.run()
    assert world.upstream.used[Window(USER, "requests_per_day")] == limit
    assert world.decided["unavailable"] == world.decided["overloaded"] == 0


def test_with_no_faults_a_token_budget_is_spent_until_the_smallest_request_does_not_fit() -> None:
    world = World(kind(Plan(tokens_per_day=2_000, tokens_per_request=60)))
    world.run()
    assert 2_000 - 5 < world.upstream.used[Window(USER, "tokens_per_day")] <= 2_000


TOKEN, CHILDREN = Pool("token", "agt_0", False), [Pool("token", f"agt_{number}", False) for number in (1, 2)]


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 137])
def test_with_no_faults_a_request_budget_is_spent_to_its_last_request(limit: int) -> None:
    world = World(replace(kind(Plan()), plans={TOKEN: budget_plan(None, limit)}, owners=[(TOKEN,)]))
    world.run()
    assert world.upstream.used[Window(TOKEN, "requests_total")] == limit
    assert world.decided["unavailable"] == world.decided["overloaded"] == 0


@pytest.mark.parametrize("fate", [Fate(), Fate(kills=0.3, pauses=0.1), Fate(weather=Weather(lost=0.1, doubled=0.2))])
def test_children_of_a_token_together_spend_no_more_than_its_budget(fate: Fate) -> None:
    plans = {TOKEN: budget_plan(3_000, 60), **dict.fromkeys(CHILDREN, budget_plan(2_000, 60))}
    world = World(replace(kind(Plan()), plans=plans, owners=[(child, TOKEN) for child in CHILDREN], fate=fate))
    world.run()
    used = world.upstream.used
    for measure, most in (("tokens_total", 3_000), ("requests_total", 60)):
        assert sum(used[Window(child, measure)] for child in CHILDREN) == used[Window(TOKEN, measure)] <= most
        assert used[Window(TOKEN, measure)] > 0


def test_in_steady_state_99_of_100_requests_do_not_wait() -> None:
    plan = Plan(rate=1000.0, requests_per_day=10**9, requests_per_month=10**9, concurrency=1000)
    world = World(kind(plan, seconds=40.0, requests_per_second=30.0))
    world.run()
    counts = [process.ledger.counts.by_name() for process in world.fleet]
    taken, waited = (sum(count[what] for count in counts) for what in ("taken", "waited"))
    assert taken > 3_000
    assert waited <= 0.01 * taken


def test_with_no_faults_all_attempts_at_a_request_are_charged_as_one() -> None:
    plan = Plan(requests_per_day=300, tokens_per_day=5_000, tokens_per_request=60)
    world = World(replace(kind(plan, seconds=30.0), repeats=0.7))
    world.run()
    assert sum(process.claims.counts["repeats"] for process in world.fleet) > 100
    assert {requests for requests, _ in world.upstream.charged.values()} == {1}


class Forgetful(ReferenceClaims):
    """A faulty store: a batch that is sent twice counts twice."""

    def hear(self, process: str, number: int, claims: Sequence[Claim]) -> Sequence[Answer] | None:
        self.batches.clear()
        return super().hear(process, number, claims)


def test_faulty_store_is_detected() -> None:
    plan = Plan(requests_per_day=400)
    fate = Fate(weather=Weather(doubled=0.5, delay_seconds=0.02))
    world = World(replace(kind(plan), fate=fate, repeats=0.7))
    world.network.claims.__class__ = Forgetful
    with pytest.raises(BrokenError, match="charged 0 requests"):
        world.run()


class Generous(LedgerRules):
    """A faulty ledger: it treats every limit as one higher."""

    def sync(self, name: str, serial: int, lines: Sequence[LeaseReport], now: float) -> list[LeaseGrant] | None:
        """Grant one unit too many."""
        return super().sync(name, serial, [line._replace(limit=line.limit + 1) for line in lines], now)


class Forgiving(LedgerRules):
    """A faulty ledger: it releases the units of a dead process, although they may have been used."""

    def end(self, name: str) -> None:
        """Return what is outstanding."""
        for account in self.holders[name].leases.values():
            account.returned = account.granted - account.used
            self.windows[account.key].held = 0
        super().end(name)


@pytest.mark.parametrize("faulty", [Generous, Forgiving])
def test_faulty_ledger_is_detected(faulty: type[LedgerRules]) -> None:
    world = World(replace(kind(Plan(requests_per_day=400)), fate=Fate(kills=0.3), seconds=30.0, hold_seconds=2.0))
    world.reference.rules.__class__ = faulty
    with pytest.raises(BrokenError, match="seed 1"):
        world.run()
