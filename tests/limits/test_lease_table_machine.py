"""Several lease tables over one ledger, with events in any order: no window is overspent, nothing is counted twice.

Hypothesis chooses the events (requests of every kind, messages, lost answers, processes that die or sleep, time that
passes) and makes a sequence that breaks a rule as short as it can. What was admitted is counted here by the requests
themselves, beside the ledger.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from keyproxy.limits.allowance import Allowance, Hold, Need
from keyproxy.limits.lease import Lease
from keyproxy.limits.lease_sync import Short
from keyproxy.limits.ledger_protocol import BUDGETS, CONCURRENCY, Pool, Window
from keyproxy.limits.plan import PERIODS, TOTAL, Limit, Plan
from keyproxy.reasons import Refusal
from tests.limits.test_lease_table import KEY, LEASE_SECONDS, NOON, TENANT, TOKEN, USER, Fleet, Process

POOLS = (USER, TENANT, KEY, TOKEN)
MODELS = st.sampled_from(["", "", "gpt", "mini"])
LIMITS = st.tuples(
    st.sampled_from(POOLS),
    st.one_of(
        st.builds(Limit, st.just("concurrency"), st.just(""), st.integers(2, 12)),
        st.builds(Limit, st.just("requests"), st.sampled_from((*PERIODS, TOTAL)), st.integers(5, 60)),
        st.builds(Limit, st.just("tokens"), st.sampled_from((*PERIODS, TOTAL)), st.integers(30, 600), model=MODELS),
        st.builds(Limit, st.just("spend"), st.sampled_from(PERIODS), st.integers(100, 3_000), model=MODELS),
        st.builds(Limit, st.sampled_from(["tokens", "spend"]), st.just("request"), st.integers(20, 300)),
    ),
)


class Request(NamedTuple):
    """A request in flight, and the process that admitted it."""

    process: Process
    hold: Hold


def _need(least: int, more: int, price: int, model: str) -> Need:
    return Need(least, least + more, least * price, (least + more) * price, models=(model,) if model else ())


class Spending(RuleBasedStateMachine):
    """The state machine of processes, requests and one ledger."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.processes: list[Process] = []
        #: What requests have used, as the compute server would count it; and the part that they did not hold.
        self.used: Counter[tuple[Window, int]] = Counter()
        self.excess: Counter[tuple[Window, int]] = Counter()
        self.under_way: list[Request] = []
        #: Whether anything was charged without having been used.
        self.has_lapsed = False

    @initialize(limits=st.lists(LIMITS, min_size=1, max_size=6), number=st.integers(1, 3))
    def begin(self, limits: list[tuple[Pool, Limit]], number: int) -> None:
        """Set the limits, and start some processes."""
        plans: dict[Pool, dict[str, Limit | None]] = {pool: {} for pool in POOLS}
        for pool, limit in limits:
            plans[pool][limit.name] = limit
        self.pools = tuple((pool, Plan().changed(plan)) for pool, plan in plans.items())
        self.processes = [self.fleet.process() for _ in range(number)]
        self.allowances = {process: Allowance(self.pools) for process in self.processes}

    def _process(self, number: int) -> Process:
        return self.processes[number % len(self.processes)]

    # -- requests

    @rule(
        target=requests, number=st.integers(0, 2),
        needs=st.lists(
            st.builds(_need, st.integers(0, 9), st.integers(0, 90), st.sampled_from([0, 1, 7]), MODELS),
            min_size=1, max_size=5,
        ),
    )  # fmt: skip
    def arrive(self, number: int, needs: list[Need]) -> object:
        """Several requests arrive at once; the units that they wait for are requested."""
        process = self._process(number)
        let_in = []
        for need in needs:
            with contextlib.suppress(Short, Refusal):
                hold = process.take(self.allowances[process], need)
                if hold.meters is not None:
                    assert need.tokens_least <= hold.tokens <= need.tokens_most
                    assert need.spend_least <= hold.spend <= need.spend_most
                let_in.append(Request(process, hold))
        self.under_way += let_in
        return multiple(*let_in)

    @rule(
        answered=st.lists(consumes(requests), min_size=1, max_size=4),
        share=st.floats(0.0, 1.3), of_spend=st.floats(0.0, 1.3),
    )  # fmt: skip
    def are_answered(self, answered: list[Request], share: float, of_spend: float) -> None:
        """Some requests completed: they used less than they held, all of it, or more, where that was an estimate."""
        for request in answered:
            self._answer(request, share, of_spend)

    def _answer(self, request: Request, share: float, of_spend: float) -> None:
        self.under_way.remove(request)
        hold = request.hold
        tokens, spend = int(hold.total_tokens * share), int(hold.total_spend * of_spend)
        parts = [(part, part.meters) for part in _parts(hold)]
        windows = [() if meters is None else meters.token_windows for _, meters in parts]
        self._charge(windows, [part.tokens for part, _ in parts], tokens)
        windows = [() if meters is None else meters.spend_windows for _, meters in parts]
        self._charge(windows, [part.spend for part, _ in parts], spend)
        self._count(hold.bundle.counted, 1)
        request.process.table.settle(hold, was_sent=True, tokens=tokens, spend=spend)

    def _charge(self, windows: list[tuple[Lease, ...]], held: list[int], used: int) -> None:
        """Count a use in the windows from which a request took units, in order; the excess in the last of them."""
        for leases, units in zip(windows, held, strict=True):
            is_last = leases is windows[-1]
            charged = used if is_last else min(used, units)
            self._count(leases, charged)
            used -= charged
            for lease in leases:
                self.excess[lease.window, lease.starts] += max(0, charged - units)

    @rule(number=st.integers(0, 9), amount=st.integers(0, 40))
    def is_credited(self, number: int, amount: int) -> None:
        """An operator adds an amount to a window."""
        keys = sorted(key for key in self.fleet.ledger.windows if key[0].measure not in BUDGETS)
        if keys:
            window, starts = keys[number % len(keys)]
            self.fleet.ledger.rules.credit(window, amount, starts or NOON)

    @rule(request=consumes(requests), target=requests, tokens=st.integers(0, 60), spend=st.integers(0, 60))
    def is_capped(self, request: Request, tokens: int, spend: int) -> Request:
        """A request keeps less than it took, because its cap is lower."""
        capped = request._replace(hold=request.process.table.trim(request.hold, tokens, spend))
        self.under_way[self.under_way.index(request)] = capped
        return capped

    @rule(request=consumes(requests))
    def never_sent(self, request: Request) -> None:
        """The upstream was unavailable."""
        self.under_way.remove(request)
        request.process.table.settle(request.hold, was_sent=False)

    @rule(target=requests, request=consumes(requests), tokens=st.integers(1, 12), spend=st.integers(0, 12))
    def stream_goes_on(self, request: Request, tokens: int, spend: int) -> Request:
        """A stream needs more than it holds."""
        process, longer = request.process, request
        try:
            longer = request._replace(hold=process.table.extend(request.hold, tokens, process.now, spend))
        except Short as short:
            process.lease_sync.request(short)
        except Refusal:
            pass
        self.under_way[self.under_way.index(request)] = longer
        return longer

    # -- messages, and the ends of processes

    @rule(number=st.integers(0, 2), everything=st.booleans(), answer_is_lost=st.booleans())
    def message(self, number: int, everything: bool, answer_is_lost: bool) -> None:
        """A process exchanges a message with the ledger."""
        self._process(number).sync(everything=everything, answer_is_lost=answer_is_lost)

    @rule(seconds=st.sampled_from([0.1, 0.1, 0.6, 1.1, 2.5, LEASE_SECONDS * 0.96, LEASE_SECONDS + 1, 43_200.0]))
    def time_passes(self, seconds: float) -> None:
        """Advance the time of all; the ledger ends holders that sent nothing for the duration of a lease."""
        self.fleet.now += seconds
        self.has_lapsed = self.has_lapsed or seconds >= LEASE_SECONDS * 0.9
        self.fleet.ledger.reap()

    @rule(number=st.integers(0, 2))
    def dies(self, number: int) -> None:
        """Kill a process and start another one; the dead one's requests are not reported any more."""
        self.has_lapsed = True
        dead = self._process(number)
        successor = self.fleet.process()
        self.processes[self.processes.index(dead)] = successor
        self.allowances[successor] = Allowance(self.pools)

    # -- invariants

    def _count(self, leases: tuple[Lease, ...], units: int) -> None:
        for lease in leases:
            if not lease.is_rate:
                self.used[lease.window, lease.starts] += units

    @invariant()
    def no_window_is_overspent(self) -> None:
        """In the ledger at every instant, and by what was really used."""
        for (window, starts), row in self.fleet.ledger.windows.items():
            assert row.held >= 0
            used, excess = self.used[window, starts], self.excess[window, starts]
            assert row.spent + row.held <= row.limit + row.credited + excess, (window, row)
            if window.measure != CONCURRENCY:
                assert used - excess <= row.spent + row.held, (window, row)

    def teardown(self) -> None:
        """All requests end, all processes leave, dead holders expire: spent is what was used or forfeited."""
        if not self.processes:
            return
        for request in list(self.under_way):
            self._answer(request, 1.0, 1.0)
        for process in self.processes:
            process.leave()
            self.fleet.ledger.end(process.name)
        self.fleet.now += LEASE_SECONDS + 1
        self.fleet.ledger.reap()
        for (window, starts), row in self.fleet.ledger.windows.items():
            if window.measure != CONCURRENCY:
                used, excess = self.used[window, starts], self.excess[window, starts]
                # What a process uses beyond its grants and does not report before it dies is lost.
                lost = excess if self.has_lapsed else 0
                assert row.held == 0
                assert row.spent - row.forfeited <= used <= row.spent + lost, (window, row, used)
                assert row.spent <= row.limit + row.credited + excess, (window, row, used)
                assert self.has_lapsed or not row.forfeited, (window, row)


def _parts(hold: Hold) -> list[Hold]:
    """A hold and those that it goes on from, in the order in which their tokens are used."""
    return [*([] if hold.earlier is None else _parts(hold.earlier)), hold]


TestSpending = Spending.TestCase
TestSpending.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
