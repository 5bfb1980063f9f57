"""Several books over one ledger, whatever happens in whatever order: no window is overspent, nothing is counted twice.

Hypothesis chooses the events (requests of every kind, messages, lost answers, processes that die or sleep, time that
passes) and makes a sequence that breaks a rule as short as it can. What was admitted is counted here by the requests
themselves, beside the ledger.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from keyproxy.limits.allowance import Allowance, Hold, TokenNeed
from keyproxy.limits.book import Short
from keyproxy.limits.leases import CONCURRENCY, Lease, Window
from keyproxy.limits.plan import Plan
from keyproxy.reasons import Refusal
from tests.unit.test_book import KEY, LEASE_SECONDS, TENANT, USER, Fleet, Process

MEASURES = ("concurrency", "requests_per_day", "requests_per_month", "tokens_per_day", "tokens_per_month")
PLANS = st.fixed_dictionaries({}, optional={measure: st.integers(0, 30) for measure in MEASURES})


class Request(NamedTuple):
    """One that is under way, and the process that let it in."""

    process: Process
    hold: Hold


class Spending(RuleBasedStateMachine):
    """See the module."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.processes: list[Process] = []
        #: What requests have used, as the compute server would count it.
        self.used: Counter[tuple[Window, int]] = Counter()

    @initialize(plans=st.tuples(PLANS, PLANS, PLANS), number=st.integers(1, 3))
    def begin(self, plans: tuple[dict[str, int], dict[str, int], dict[str, int]], number: int) -> None:
        """Somebody's limits, and some processes."""
        self.pools = tuple(zip((USER, TENANT, KEY), (Plan(**limits) for limits in plans), strict=True))
        self.processes = [self.fleet.process() for _ in range(number)]
        self.allowances = {process: Allowance(self.pools) for process in self.processes}

    def _process(self, number: int) -> Process:
        return self.processes[number % len(self.processes)]

    # -- requests

    @rule(target=requests, number=st.integers(0, 2), least=st.integers(0, 12), more=st.none() | st.integers(0, 12))
    def request(self, number: int, least: int, more: int | None) -> object:
        """One arrives; what it waits for is asked for."""
        process = self._process(number)
        need = TokenNeed(least, None if more is None else least + more)
        try:
            hold = process.take(self.allowances[process], need)
        except (Short, Refusal):
            return multiple()
        return Request(process, hold)

    @rule(request=consumes(requests), share=st.floats(0.0, 1.0))
    def answered(self, request: Request, share: float) -> None:
        """It was answered, and used at most what it held."""
        parts = _parts(request.hold)
        tokens = int(sum(part.tokens for part in parts) * share)
        left = tokens
        for part in parts:
            self._count(part.budgets, min(left, part.tokens))
            left -= min(left, part.tokens)
        self._count(request.hold.units, 1)
        request.process.book.settle(request.hold, was_sent=True, tokens=tokens)

    @rule(request=consumes(requests))
    def never_sent(self, request: Request) -> None:
        """The upstream could not be had."""
        request.process.book.settle(request.hold, was_sent=False)

    @rule(target=requests, request=consumes(requests), tokens=st.integers(1, 12))
    def stream_goes_on(self, request: Request, tokens: int) -> Request:
        """A stream needs more than it holds."""
        process = request.process
        if not request.hold.budgets:
            return request
        try:
            return request._replace(hold=process.book.extend(request.hold, tokens, process.now))
        except Short as short:
            process.book.ask(short)
            return request
        except Refusal:
            return request

    # -- messages, and what becomes of processes

    @rule(number=st.integers(0, 2), everything=st.booleans(), answer_is_lost=st.booleans())
    def message(self, number: int, everything: bool, answer_is_lost: bool) -> None:
        """A process and the ledger speak."""
        self._process(number).sync(everything=everything, answer_is_lost=answer_is_lost)

    @rule(seconds=st.sampled_from([0.1, 0.6, 1.1, 2.5, LEASE_SECONDS * 0.96, LEASE_SECONDS + 1, 43_200.0]))
    def time_passes(self, seconds: float) -> None:
        """For all of them; whoever has not spoken for as long as a lease lasts is dead to the ledger."""
        self.fleet.now += seconds
        self.fleet.ledger.reap()

    @rule(number=st.integers(0, 2))
    def dies(self, number: int) -> None:
        """Without a word. Another one comes; what requests of the dead one do is not heard of any more."""
        dead = self._process(number)
        successor = self.fleet.process()
        self.processes[self.processes.index(dead)] = successor
        self.allowances[successor] = Allowance(self.pools)

    # -- what holds

    def _count(self, leases: tuple[Lease, ...], units: int) -> None:
        for lease in leases:
            if not lease.is_rate:
                self.used[lease.window, lease.starts] += units

    @invariant()
    def no_window_is_overspent(self) -> None:
        """In the ledger at every instant, and by what was really used."""
        for (window, starts), row in self.fleet.ledger.rows.items():
            assert row.held >= 0
            assert row.spent + row.held <= row.limit, (window, row)
            if window.measure != CONCURRENCY:
                assert self.used[window, starts] <= row.spent + row.held, (window, row)

    def teardown(self) -> None:
        """All leave, the dead are buried: nothing is held, and spent is what was used and what was forfeited."""
        if not self.processes:
            return
        for process in self.processes:
            for _ in range(3):
                process.sync(is_last=True)
            self.fleet.ledger.end(process.name)
        self.fleet.now += LEASE_SECONDS + 1
        self.fleet.ledger.reap()
        for (window, starts), row in self.fleet.ledger.rows.items():
            if window.measure != CONCURRENCY:
                used = self.used[window, starts]
                assert row.held == 0
                assert row.spent - row.forfeited <= used <= row.spent <= row.limit, (window, row, used)


def _parts(hold: Hold) -> list[Hold]:
    """A hold and those that it goes on from, in the order in which their tokens are used."""
    return [*([] if hold.earlier is None else _parts(hold.earlier)), hold]


TestSpending = Spending.TestCase
TestSpending.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
