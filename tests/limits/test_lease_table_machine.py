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

from keyproxy.limits.allowance import Allowance, Hold, TokenNeed
from keyproxy.limits.lease import Lease
from keyproxy.limits.lease_sync import Short
from keyproxy.limits.ledger_protocol import CONCURRENCY, REQUESTS, TOKENS, Pool, Window
from keyproxy.limits.plan import Plan
from keyproxy.reasons import Refusal
from tests.limits.test_lease_table import KEY, LEASE_SECONDS, TENANT, USER, Fleet, Process

POOLS = (USER, TENANT, KEY)
LIMITS = st.one_of(
    st.tuples(st.sampled_from(POOLS), st.just(CONCURRENCY), st.integers(2, 12)),
    st.tuples(st.sampled_from(POOLS), st.sampled_from(REQUESTS), st.integers(5, 60)),
    st.tuples(st.sampled_from(POOLS), st.sampled_from(TOKENS), st.integers(30, 600)),
)


class Request(NamedTuple):
    """A request in flight, and the process that admitted it."""

    process: Process
    hold: Hold


def _need(least: int, more: int) -> TokenNeed:
    # A request without a maximum takes all that is left; the others should get a chance.
    return TokenNeed(least, None if (least, more) == (9, 9) else least + more)


class Spending(RuleBasedStateMachine):
    """The state machine of processes, requests and one ledger."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.processes: list[Process] = []
        #: What requests have used, as the compute server would count it.
        self.used: Counter[tuple[Window, int]] = Counter()
        self.under_way: list[Request] = []
        #: Whether anything was charged without having been used.
        self.has_lapsed = False

    @initialize(limits=st.lists(LIMITS, min_size=1, max_size=6), number=st.integers(1, 3))
    def begin(self, limits: list[tuple[Pool, str, int]], number: int) -> None:
        """Set the limits, and start some processes."""
        plans: dict[Pool, dict[str, int]] = {pool: {} for pool in POOLS}
        for pool, measure, limit in limits:
            plans[pool][measure] = limit
        self.pools = tuple((pool, Plan(**plan)) for pool, plan in plans.items())
        self.processes = [self.fleet.process() for _ in range(number)]
        self.allowances = {process: Allowance(self.pools) for process in self.processes}

    def _process(self, number: int) -> Process:
        return self.processes[number % len(self.processes)]

    # -- requests

    @rule(
        target=requests, number=st.integers(0, 2),
        needs=st.lists(st.builds(_need, st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    )  # fmt: skip
    def arrive(self, number: int, needs: list[TokenNeed]) -> object:
        """Several requests arrive at once; the units that they wait for are requested."""
        process = self._process(number)
        let_in = []
        for need in needs:
            with contextlib.suppress(Short, Refusal):
                let_in.append(Request(process, process.take(self.allowances[process], need)))
        self.under_way += let_in
        return multiple(*let_in)

    @rule(answered=st.lists(consumes(requests), min_size=1, max_size=4), share=st.floats(0.0, 1.0))
    def are_answered(self, answered: list[Request], share: float) -> None:
        """Some requests completed, and used at most what they held."""
        for request in answered:
            self._answer(request, share)

    def _answer(self, request: Request, share: float) -> None:
        self.under_way.remove(request)
        parts = _parts(request.hold)
        tokens = left = int(sum(part.tokens for part in parts) * share)
        for part in parts:
            self._count(part.budgets, min(left, part.tokens))
            left -= min(left, part.tokens)
        self._count(request.hold.bundle.counted, 1)
        request.process.table.settle(request.hold, was_sent=True, tokens=tokens)

    @rule(request=consumes(requests))
    def never_sent(self, request: Request) -> None:
        """The upstream was unavailable."""
        self.under_way.remove(request)
        request.process.table.settle(request.hold, was_sent=False)

    @rule(target=requests, request=consumes(requests), tokens=st.integers(1, 12))
    def stream_goes_on(self, request: Request, tokens: int) -> Request:
        """A stream needs more than it holds."""
        process, longer = request.process, request
        try:
            longer = request._replace(hold=process.table.extend(request.hold, tokens, process.now))
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
            assert row.spent + row.held <= row.limit, (window, row)
            if window.measure != CONCURRENCY:
                assert self.used[window, starts] <= row.spent + row.held, (window, row)

    def teardown(self) -> None:
        """All requests end, all processes leave, dead holders expire: spent is what was used or forfeited."""
        if not self.processes:
            return
        for request in list(self.under_way):
            self._answer(request, 1.0)
        for process in self.processes:
            process.leave()
            self.fleet.ledger.end(process.name)
        self.fleet.now += LEASE_SECONDS + 1
        self.fleet.ledger.reap()
        for (window, starts), row in self.fleet.ledger.windows.items():
            if window.measure != CONCURRENCY:
                used = self.used[window, starts]
                assert row.held == 0
                assert row.spent - row.forfeited <= used <= row.spent <= row.limit, (window, row, used)
                assert self.has_lapsed or not row.forfeited, (window, row)


def _parts(hold: Hold) -> list[Hold]:
    """A hold and those that it goes on from, in the order in which their tokens are used."""
    return [*([] if hold.earlier is None else _parts(hold.earlier)), hold]


TestSpending = Spending.TestCase
TestSpending.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
