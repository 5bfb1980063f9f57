"""The upstream's own count of requests, tokens and money: the truth that the ledger is compared with.

A request may use more than it holds, because its input is estimated. Such an *excess* is charged exactly; a window may
exceed its limit by the excess of the requests that were in flight when it ran out, and by nothing else. If a process
dies or the ledger ends its holder, an excess that the ledger has not confirmed may be lost; it is never counted twice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from keyproxy.limits.allowance import Hold
from keyproxy.limits.calendar_windows import span
from keyproxy.limits.lease import RATE_SECONDS, Lease
from keyproxy.limits.ledger_protocol import CONCURRENCY, RATES, SPEND, Pool, Window
from keyproxy.limits.plan import PER_REQUEST, Plan
from tests.reference_ledger import ReferenceLedger

if TYPE_CHECKING:
    from tests.simulation.clockwork import Clock
    from tests.simulation.world import Process, Scenario

#: A lease of yesterday ends a little later here than in the ledger: clocks run at different speeds.
_MIDNIGHT_SECONDS = 0.1


class BrokenError(AssertionError):
    """An invariant is violated."""


@dataclass(eq=False)
class Work:
    """One request in flight."""

    process: Process
    hold: Hold
    fingerprint: bytes | None = None
    is_answered: bool = False
    used: int = 0
    counted: list[tuple[Window, int]] = field(default_factory=list)
    #: When it took tokens, and how many.
    takes: list[tuple[float, int]] = field(default_factory=list)


class Upstream:
    """Count requests and tokens, and check them against the limits and the ledger."""

    def __init__(self, clock: Clock, ledger: ReferenceLedger, scenario: Scenario) -> None:
        self._clock, self._ledger, self._scenario = clock, ledger, scenario
        self._works: dict[Work, None] = {}
        #: Requests sent, tokens and money used, by window, over all periods; and the part beyond what requests held.
        self.used: Counter[Window] = Counter()
        self.excess: Counter[Window] = Counter()
        #: The credits of windows by their starts, also those in history that the ledger lost.
        self.credited: Counter[tuple[Window, int]] = Counter()
        #: For requests with a fingerprint: the tokens of the largest finished attempt; the number of attempts that were
        #: charged as requests, and the tokens charged to all attempts.
        self.most: dict[bytes, int] = {}
        self.charged: dict[bytes, tuple[int, int]] = {}
        self._lost: Counter[bytes] = Counter()
        self._by_day: Counter[tuple[Window, int]] = Counter()
        self._sent_at: dict[Window, list[tuple[float, int]]] = {}
        self._limits: dict[Window, int] = {}
        #: The periods in which the ledger has lost history, and leases are reported again.
        self._forgetful: list[tuple[float, float]] = []
        for pool, plan in scenario.plans.items():
            self.note_plan(pool, plan)

    def note_plan(self, pool: Pool, plan: Plan) -> None:
        """Record a plan. The largest limit that ever applied counts."""
        for limit in plan.limits:
            if not limit.is_rate and limit.per != PER_REQUEST:
                window = Window(pool, limit.window_measure, limit.selector)
                self._limits[window] = max(limit.quota, self._limits.get(window, 0))

    def history_lost(self, since: float, until: float) -> None:
        """Record that the ledger loses the history between two times."""
        self._forgetful.append((since, until))

    # -- requests

    def admit(self, process: Process, hold: Hold, fingerprint: bytes | None = None) -> Work:
        """Count a request that arrives."""
        work = Work(process, hold, fingerprint, takes=[(self._clock.now, hold.total_tokens)])
        self._works[work] = None
        for lease in _counted(hold):
            self.used[lease.window] += 1
            if lease.is_rate:
                self._sent_at.setdefault(lease.window, []).append((self._clock.now, 1))
            else:
                self._count(work, lease.window)
        for lease in hold.bundle.slots:
            self._check_slots(lease.window)
        return work

    def extended(self, work: Work, hold: Hold) -> None:
        """Record that a request holds more."""
        work.takes.append((self._clock.now, hold.total_tokens - work.hold.total_tokens))
        work.hold = hold

    def _count(self, work: Work, window: Window) -> None:
        wall = self._scenario.starts_wall + self._clock.now
        starts, _ = span(window.measure, wall)
        if wall - starts < _MIDNIGHT_SECONDS:
            return
        self._by_day[window, starts] += 1
        work.counted.append((window, starts))
        allowed = self._limits[window] + self.credited[window, starts]
        if self._by_day[window, starts] > allowed:
            raise BrokenError(f"{window}: {self._by_day[window, starts]} received, {allowed} allowed")

    def _check_slots(self, window: Window) -> None:
        under_way = 0
        for work in self._works:
            holder = self._ledger.holders.get(work.process.holder)
            if work.is_answered:
                continue
            if holder is None or holder.has_ended:
                # Requests of a process that the ledger has ended are not counted.
                continue
            under_way += sum(1 for lease in work.hold.bundle.slots if lease.window == window and lease.is_current)
        if under_way > self._limits[window]:
            raise BrokenError(f"{window}: {under_way} concurrent, {self._limits[window]} allowed")

    def finish(self, work: Work, tokens: int, spend: int, *, is_repeat: bool = False) -> None:
        """Count a finished request with what it is charged. `is_repeat`: it is charged no request."""
        del self._works[work]
        hold = work.hold
        for window in _windows(hold):
            is_spend = window.measure in SPEND
            used, held = (spend, hold.total_spend) if is_spend else (tokens, hold.total_tokens)
            self.used[window] += used
            self.excess[window] += max(0, used - held)
        for lease in () if hold.meters is None else hold.meters.token_rates:
            left = tokens
            for at, units in work.takes:
                self._sent_at.setdefault(lease.window, []).append((at, min(left, units)))
                left -= min(left, units)
        if is_repeat:
            for lease in _counted(work.hold):
                self.used[lease.window] -= not lease.is_rate
            for counted in work.counted:
                self._by_day[counted] -= 1
        if work.fingerprint is not None:
            requests, charged = self.charged.get(work.fingerprint, (0, 0))
            self.charged[work.fingerprint] = (requests + (not is_repeat), charged + tokens)

    def answer(self, work: Work, used: int) -> None:
        """Record the tokens that a request used. Its charge is decided later; it holds no slot until then."""
        assert work.fingerprint is not None
        work.is_answered, work.used = True, used
        self.most[work.fingerprint] = max(used, self.most.get(work.fingerprint, 0))

    def lose(self, process: Process) -> None:
        """Count the requests of a dead process as having used everything that they were allowed."""
        for work in [work for work in self._works if work.process is process]:
            if work.fingerprint is not None:
                self._lost[work.fingerprint] += max(0, work.used - work.hold.total_tokens)
            self.finish(work, work.hold.total_tokens, work.hold.total_spend)

    def is_serving(self, process: Process) -> bool:
        """Whether a request of this process is in flight."""
        return any(work.process is process for work in self._works)

    # -- invariants

    def check(self) -> None:
        """At every instant: no window exceeds its limit, and everything admitted is spent or held."""
        accounted: Counter[Window] = Counter()
        is_forgetful = any(since <= self._clock.now <= until for since, until in self._forgetful)
        for (window, starts), row in self._ledger.windows.items():
            accounted[window] += row.spent + row.held
            limit = self._limits.get(window)
            # Units that one process returned and another got may be held twice until the first reports the return again.
            allowed = (limit or 0) + self.credited[window, starts] + self.excess[window]
            if limit is not None and not is_forgetful and row.spent + row.held > allowed:
                raise BrokenError(f"{window} {starts}: {row.spent} spent + {row.held} held > {allowed}")
        if is_forgetful:
            return
        under_way: Counter[Window] = Counter()
        for work in self._works:
            for window in _windows(work.hold):
                is_spend = window.measure in SPEND
                under_way[window] += work.hold.total_spend if is_spend else work.hold.total_tokens
        for window, used in (self.used + under_way).items():
            # What a request used beyond its hold is reported with the next message.
            if window.measure not in RATES and used - self.excess[window] > accounted[window]:
                raise BrokenError(f"{window}: {used} admitted, {accounted[window]} accounted")

    def check_end(self, *, is_kind: bool) -> None:
        """At the end: everything spent was used, or was charged because its holder died."""
        for window, times in self._sent_at.items():
            self._check_rate(window, times)
        self._check_repeats(is_kind=is_kind)
        spent: Counter[Window] = Counter()
        forfeited: Counter[Window] = Counter()
        for (window, _), row in self._ledger.windows.items():
            spent[window] += row.spent
            forfeited[window] += row.forfeited
        for window in spent:
            if window.measure in (*RATES, CONCURRENCY):
                continue
            used, lost = self.used[window], 0 if is_kind else self.excess[window]
            if not spent[window] - forfeited[window] <= used <= spent[window] + lost:
                raise BrokenError(f"{window}: {used} used, {spent[window]} spent, {forfeited[window]} forfeited")
            if is_kind and forfeited[window]:
                raise BrokenError(f"{window}: {forfeited[window]} forfeited although no process died")

    def _check_repeats(self, *, is_kind: bool) -> None:
        """All attempts at a request are charged at least as the largest one; without faults, exactly so."""
        for fingerprint, most in self.most.items():
            requests, tokens = self.charged[fingerprint]
            if requests < 1 or tokens + self._lost[fingerprint] < most or (is_kind and (requests, tokens) != (1, most)):
                raise BrokenError(f"{fingerprint!r}: charged {requests} requests, {tokens} tokens; {most} used")

    def _check_rate(self, window: Window, times: list[tuple[float, int]]) -> None:
        """In any t seconds at most burst + rate * (t + RATE_SECONDS), plus two bursts for each lost history.

        Of a token rate, what requests used of what they took counts, at the time at which they took it.
        """
        (rate,) = [one for one in self._scenario.plans[window.pool].limits if one.window_measure == window.measure]
        slack = RATE_SECONDS * (1 + 2 * self._scenario.fate.drift)
        bound = rate.quota * (1 + 2 * len(self._forgetful)) + rate.per_second * slack
        fewest, number = float("inf"), 0
        for at, units in sorted(times):
            fewest = min(fewest, number - rate.per_second * at)
            number += units
            most = number - rate.per_second * at - fewest
            if most > bound + 1e-6:
                raise BrokenError(f"{window}: {most:.1f} more than rate * t within some seconds, {bound:.1f} allowed")


def _counted(hold: Hold) -> list[Lease]:
    """The leases from which this request took a unit that is not returned."""
    return [lease for lease in hold.bundle.counted if lease.is_rate or hold.paid is None]


def _windows(hold: Hold) -> set[Window]:
    """The windows of tokens and money from which a request took."""
    meters = hold.meters
    windows = set() if meters is None else {lease.window for lease in (*meters.token_windows, *meters.spend_windows)}
    return windows | _windows(hold.earlier) if hold.earlier is not None else windows
