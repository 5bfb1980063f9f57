"""A token rate over several processes: whatever they take, use, return and lose, the bound holds."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from keyproxy.limits import gcra
from keyproxy.limits.allowance import Allowance, Hold, Need
from keyproxy.limits.lease import RATE_SECONDS
from keyproxy.limits.lease_sync import Short
from keyproxy.limits.plan import Limit, Plan
from keyproxy.reasons import Refusal
from tests.limits.test_lease_table import USER, Fleet, Process

RATES = st.tuples(st.sampled_from([1, 10, 200]), st.sampled_from([5, 50, 400]))


class Step(NamedTuple):
    """Time passes; then a request arrives, the oldest one ends, or a message is exchanged, lost or late."""

    seconds: float
    action: str
    process: int
    units: int
    share: float


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from([0.0, 0.0, 0.1, 0.7, 1.3, 5.0]),
        st.sampled_from(["take", "take", "take", "end", "end", "sync", "lost answer", "lost message"]),
        st.integers(0, 1),
        st.integers(1, 400),
        st.floats(0.0, 1.0),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(RATES, STEPS)
def test_over_any_time_at_most_the_burst_and_the_rate_with_one_second_more_is_used(
    rate: tuple[int, int], steps: list[Step]
) -> None:
    per_second, burst = rate
    fleet = Fleet()
    processes = [fleet.process() for _ in range(2)]
    pools = ((USER, Plan([Limit("token-rate", "second", per_second, burst)])),)
    allowances = [Allowance(pools) for _ in processes]
    flying: list[tuple[Process, Hold, float]] = []
    used: list[tuple[float, int]] = []
    for step in steps:
        fleet.now += step.seconds
        process = processes[step.process]
        if step.action == "take":
            units = min(step.units, burst)
            with contextlib.suppress(Short, Refusal):
                flying.append((process, process.take(allowances[step.process], Need(1, units)), fleet.now))
        elif step.action == "end" and flying:
            process, hold, at = flying.pop(0)
            tokens = int(hold.tokens * step.share)
            used.append((at, tokens))
            process.table.settle(hold, was_sent=True, tokens=tokens)
        elif step.action == "lost message":
            process.lease_sync.gather(process.now)
            process.lease_sync.resend(process.lease_sync.lines(process.now, 10))
        elif step.action != "end":
            process.sync(answer_is_lost=step.action == "lost answer")
    used += [(at, hold.tokens) for _, hold, at in flying]
    fewest, number = float("inf"), 0
    for at, units in sorted(used):
        fewest = min(fewest, number - per_second * at)
        number += units
        assert number - per_second * at - fewest <= burst + per_second * RATE_SECONDS + 1e-6


@settings(max_examples=300)
@given(
    st.integers(1, 500),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60), st.integers(0, 100)), max_size=25),
)
def test_returned_units_never_admit_more_than_the_bucket_would(burst: int, steps: list[tuple[int, int, int]]) -> None:
    """In the arithmetic alone, with every return applied at once: burst + rate * t, without the additional second."""
    interval, now, theoretical = 0.25, 1_000.0, 0.0
    flying: list[tuple[float, int]] = []
    used: list[tuple[float, int]] = []
    for quarters, units, percent in steps:
        now += quarters * 0.25
        ahead = gcra.ahead_seconds(theoretical, now, burst, interval)
        if percent > 50 and flying:
            at, taken = flying.pop(0)
            spent = taken * (percent - 50) // 50
            used.append((at, spent))
            ahead = gcra.ahead_after_return(ahead, taken - spent, burst, interval, now - at)
        else:
            taken = min(units, gcra.units_available(ahead, burst, interval))
            flying.append((now, taken))
            ahead += taken * interval
        theoretical = now + ahead
    fewest, number = float("inf"), 0
    for at, units in sorted(used + flying):
        fewest = min(fewest, number - 4 * at)
        number += units
        assert number - 4 * at - fewest <= burst + 1e-6


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 50)), min_size=1, max_size=9))
def test_returns_of_several_times_are_merged_into_no_more_than_each_of_them_in_turn(
    returns: list[tuple[int, int]],
) -> None:
    unused = gcra.UnusedUnits()
    for at, units in returns:
        unused.add(units, float(at + 1), 1.0)
    units, granted_at = unused.taken()
    assert units <= sum(units for _, units in returns)
    assert unused.taken() == (0, 0.0)
    if units:
        assert granted_at in {float(at + 1) for at, _ in returns}
