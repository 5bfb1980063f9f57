"""Generate the scenario of a seed: owners, plans and faults."""

from __future__ import annotations

import random

from keyproxy.limits.budgets import budget_plan
from keyproxy.limits.ledger.report_pace import LINES_PER_SECOND
from keyproxy.limits.ledger_protocol import Pool
from keyproxy.limits.plan import Limit, Plan
from tests.simulation.network import Weather
from tests.simulation.world import Fate, Scenario

#: 20 seconds before midnight, in the middle of a month and at its end.
_DAY_ENDS, _MONTH_ENDS = 1_705_363_180.0, 1_706_745_580.0


def scenario(seed: int) -> Scenario:
    """The scenario of this seed. Every eighth one has no faults."""
    chance = random.Random(f"scenario {seed}")
    owners, plans = _owners(chance)
    owners = _with_tokens(random.Random(f"tokens {seed}"), owners, plans)
    # A third of the ledgers treat the few processes as many.
    crowding = random.Random(f"crowding {seed}").choice([1, 1, 1, 1, 70, 300])
    # Half of the processes report as rarely as if they had thousands of leases.
    lines_per_second = random.Random(f"lines {seed}").choice([LINES_PER_SECOND, LINES_PER_SECOND, 0.3, 3.0])
    return Scenario(
        seed,
        plans,
        owners,
        _harmless(chance) if seed % 8 == 0 else _fate(chance),
        proxies=chance.randint(1, 4),
        seconds=chance.choice([12.0, 30.0]),
        requests_per_second=chance.choice([3.0, 10.0, 25.0]),
        starts_wall=chance.choice([_DAY_ENDS, _MONTH_ENDS, _DAY_ENDS - 40_000]),
        hold_seconds=chance.choice([0.02, 0.3, 2.0]),
        settle_seconds=chance.choice([0.1, 0.5, 1.0]),
        repeats=chance.choice([0.0, 0.2, 0.6]),
        crowding=crowding,
        lines_per_second=lines_per_second,
    )


def _owners(chance: random.Random) -> tuple[list[tuple[Pool, ...]], dict[Pool, Plan]]:
    tenant = Pool("tenant", "acme", False)
    users = [Pool("user", f"u_{number}", chance.random() < 0.2) for number in range(chance.randint(1, 3))]
    owners: list[tuple[Pool, ...]] = []
    for user in users:
        keys = [Pool("key", f"key_{number}_of_{user.owner}", user.is_test) for number in range(chance.randint(0, 2))]
        owners += [(key, user, tenant._replace(is_test=user.is_test)) for key in keys] or [
            (user, tenant._replace(is_test=user.is_test))
        ]
    plans = {pool: _plan(chance) for owner in owners for pool in owner}
    return owners, plans


def _with_tokens(
    chance: random.Random, owners: list[tuple[Pool, ...]], plans: dict[Pool, Plan]
) -> list[tuple[Pool, ...]]:
    """The owners of a ledger, half of which have agent tokens with budgets; the pools of a child are its parent's too."""
    if chance.random() < 0.5:
        return owners
    tokens: list[tuple[Pool, ...]] = []
    for number in range(chance.randint(1, 4)):
        above = chance.choice(owners + tokens)
        pool = Pool("token", f"agt_{number}", above[-1].is_test)
        token_budget, request_budget = chance.choice([None, 300, 2_000, 20_000]), chance.choice([None, 1, 5, 60, 1_000])
        plans[pool] = budget_plan(token_budget, request_budget)
        tokens.append((pool, *above))
    return owners + tokens


def _plan(chance: random.Random) -> Plan:
    def maybe(*values: int) -> int | None:
        return chance.choice(values) if chance.random() < 0.35 else None

    rate = chance.choice([0.2, 1.0, 5.0, 40.0]) if chance.random() < 0.3 else None
    more = [
        Limit(
            "tokens", chance.choice(["minute", "week"]), chance.choice([500, 5_000]), model=chance.choice(["", "gpt"])
        ),
        Limit("spend", chance.choice(["minute", "day", "month"]), chance.choice([2_000, 20_000, 10**6])),
        Limit("spend", "day", chance.choice([1_000, 50_000]), model="mini"),
        Limit("requests", "hour", chance.choice([20, 500]), model="other"),
        Limit("token-rate", "second", chance.choice([20, 300]), chance.choice([400, 2_000])),
        Limit("spend", "request", chance.choice([200, 3_000])),
    ]
    return Plan(
        [limit for limit in more if chance.random() < 0.25],
        rate=rate,
        burst=None if rate is None else chance.choice([1, 5, 50]),
        concurrency=maybe(1, 3, 10),
        requests_per_day=maybe(7, 40, 300, 10_000),
        requests_per_month=maybe(30, 200, 10_000),
        tokens_per_request=maybe(30, 100),
        tokens_per_day=maybe(200, 2_000, 10_000, 100_000),
        tokens_per_month=maybe(1_000, 10_000, 100_000),
    )


def _harmless(chance: random.Random) -> Fate:
    evictions, credited, underestimates = (chance.choice([0.0, 0.3]) for _ in range(3))
    return Fate(evictions=evictions, credits=credited, underestimates=underestimates)


def _fate(chance: random.Random) -> Fate:
    def maybe(*values: float) -> float:
        return chance.choice(values) if chance.random() < 0.5 else 0.0

    weather = Weather(
        lost=maybe(0.02, 0.2),
        answer_lost=maybe(0.02, 0.2),
        doubled=maybe(0.05, 0.3),
        late=maybe(0.02, 0.2),
        delay_seconds=chance.choice([0.001, 0.02, 0.2]),
    )
    return Fate(
        weather,
        kills=maybe(0.05, 0.3),
        pauses=maybe(0.05, 0.3),
        cuts=maybe(0.05, 0.2),
        restarts=maybe(0.05, 0.2),
        outages=maybe(0.03, 0.1),
        failovers=chance.choice([0, 0, 0, 1, 2]),
        plan_changes=maybe(0.1, 0.5),
        evictions=maybe(0.1, 1.0),
        wall_jumps=maybe(0.2),
        drift=maybe(0.005),
        credits=maybe(0.1, 0.5),
        underestimates=maybe(0.1, 0.5),
    )
