"""A fleet of proxies on one ledger, all possible faults, and the invariants that are checked after every step.

The proxies run the real keyproxy.store.ledger.Ledger. The world simulates the gateway, an upstream that counts what it
receives, the network, the ledger's server and faults. A seed determines all of it.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from keyproxy.config import schema
from keyproxy.limits.allowance import Allowance, Hold, Need
from keyproxy.limits.calendar_windows import span
from keyproxy.limits.ledger.accounts import WindowAccount
from keyproxy.limits.ledger.report_pace import LINES_PER_SECOND
from keyproxy.limits.ledger.rules import LedgerRules
from keyproxy.limits.ledger_protocol import BUDGETS, CONCURRENCY, RATES, TOKEN_POOL, Pool
from keyproxy.limits.plan import PER_REQUEST, SPEND, TOKEN_RATE, TOKENS, Limit, Plan
from keyproxy.model import PATIENCE_SECONDS, Missing, Moment, TimeBudget
from keyproxy.ports import ledger as ledger_port
from keyproxy.reasons import SPENT, Reason, Refusal
from keyproxy.store.ledger.charge_dedup import Claims
from keyproxy.store.ledger.ledger import Ledger
from tests.reference_ledger import ReferenceLedger
from tests.simulation.clockwork import Clock, VirtualLoop
from tests.simulation.network import Network, RemoteClaims, RemoteLedger, Weather
from tests.simulation.upstream import BrokenError, Upstream, Work

LEASE_SECONDS = 3.0
#: No decision may take longer, whatever happens, unless its process is stopped. Clocks drift a little.
DECIDED_SECONDS = PATIENCE_SECONDS + 0.05
#: When the last admitted request has ended.
LONGEST_SECONDS = 120.0
_ROUNDS_MAX = 8
_METERED = (TOKENS, SPEND, TOKEN_RATE)
MODELS = ("gpt", "mini", "other")


def _repeated(most: int) -> Need:
    """The need of a request that is sent again; a token costs one micro-unit."""
    return Need(min(5, most), most, min(5, most), most)


@dataclass
class Fate:
    """The faults of one run: how many per second, over all processes."""

    weather: Weather = field(default_factory=Weather)
    kills: float = 0.0
    pauses: float = 0.0
    cuts: float = 0.0
    restarts: float = 0.0
    outages: float = 0.0
    failovers: int = 0
    plan_changes: float = 0.0
    evictions: float = 0.0
    wall_jumps: float = 0.0
    drift: float = 0.0
    #: No faults: credits that an operator grants, and the share of requests that use more than they hold.
    credits: float = 0.0
    underestimates: float = 0.0

    @property
    def is_kind(self) -> bool:
        """Whether nothing goes wrong."""
        harmless = Fate(evictions=self.evictions, credits=self.credits, underestimates=self.underestimates)
        return self == harmless


@dataclass
class Scenario:
    """One run."""

    seed: int
    plans: dict[Pool, Plan]
    owners: list[tuple[Pool, ...]]
    fate: Fate
    proxies: int = 3
    seconds: float = 30.0
    requests_per_second: float = 12.0
    starts_wall: float = 1_706_745_580.0  # 20 seconds before February 2024
    hold_seconds: float = 0.3
    settle_seconds: float = 0.5
    #: The ledger takes few processes for many, by this factor: it paces their messages and recalls units.
    crowding: int = 1
    #: How many reports a process sends per second: few, and it reports its few leases as rarely as others do thousands.
    lines_per_second: float = LINES_PER_SECOND
    #: The share of requests with an Idempotency-Key, of which there are few different ones.
    repeats: float = 0.0


class ReportingLedger(ledger_port.Ledger):
    """A ledger for claims that also reports their settlements to the upstream."""

    def __init__(self, ledger: Ledger, upstream: Upstream) -> None:
        self.work: Work | None = None
        self._ledger, self._upstream = ledger, upstream
        self._works: dict[int, tuple[Hold, Work]] = {}

    def take(self, allowance: Allowance, now: Moment, need: Need | None = None, *, may_be_paid: bool = False) -> Hold:
        """See the port Ledger."""
        return self._ledger.take(allowance, now, need, may_be_paid=may_be_paid)

    def take_again(self, allowance: Allowance, now: Moment, need: Need | None, paid: int) -> Hold:
        """See the port Ledger."""
        return self._ledger.take_again(allowance, now, need, paid)

    def extend(self, hold: Hold, tokens: int, spend: int = 0) -> Hold:
        """See the port Ledger."""
        return self._ledger.extend(hold, tokens, spend)

    def release(self, hold: Hold) -> Hold:
        """See the port Ledger."""
        assert self.work is not None
        rest = self._ledger.release(hold)
        self._works[id(rest)] = (rest, self.work)
        return rest

    def settle(self, hold: Hold, *, was_sent: bool, tokens: int = 0, spend: int = 0, is_repeat: bool = False) -> None:
        """See the port Ledger."""
        _, work = self._works.pop(id(hold))
        self._ledger.settle(hold, was_sent=was_sent, tokens=tokens, spend=spend, is_repeat=is_repeat)
        self._upstream.finish(work, tokens, spend, is_repeat=is_repeat)


class CrowdedAccount(WindowAccount):
    """The account of a window whose holders count several times each."""

    crowding = 1

    def holders(self, now: float) -> int:
        """See WindowAccount."""
        return super().holders(now) * self.crowding


class CrowdedRules(LedgerRules):
    """The rules of the ledger for few processes that are treated as many."""

    def __init__(self, *, lease_seconds: float, crowding: int) -> None:
        super().__init__(lease_seconds=lease_seconds)
        self.crowding = crowding

    def account(self, carried: int) -> WindowAccount:
        """See LedgerRules."""
        account = CrowdedAccount(carried=carried)
        account.crowding = self.crowding
        return account


@dataclass(eq=False)
class Process:
    """One proxy process."""

    loop: VirtualLoop
    backend: RemoteLedger
    ledger: Ledger
    claims: Claims
    reporting: ReportingLedger
    store: RemoteClaims
    now: Callable[[], Moment]
    allowances: dict[tuple[Pool, ...], Allowance]
    deciding: dict[object, float] = field(default_factory=dict)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    is_closing: bool = False
    slept_until: float = 0.0

    @property
    def holder(self) -> str:
        """The holder under which it talks to the ledger."""
        return self.ledger.conversation._holder


class World:
    """The simulation of one scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.chance = random.Random(scenario.seed)
        self.clock = Clock()
        self.plans = dict(scenario.plans)
        self.reference = ReferenceLedger(self.wall, lease_seconds=LEASE_SECONDS)
        if scenario.crowding > 1:
            self.reference.rules = CrowdedRules(lease_seconds=LEASE_SECONDS, crowding=scenario.crowding)
        self.network = Network(self.clock, self.chance, self.reference, scenario.fate.weather)
        self.network.after_message = self.check
        self.upstream = Upstream(self.clock, self.reference, scenario)
        self.fleet: list[Process] = []
        self.graves: list[Process] = []
        self.calm_until = self.calm_from = -1.0
        self.decided = dict.fromkeys(("admitted", "refused", "unavailable", "overloaded"), 0)
        self.refused_at = dict.fromkeys(scenario.owners, 0.0)
        self.is_quiet = False
        for _ in range(scenario.proxies):
            self._start()

    def wall(self) -> float:
        """The Unix time of the ledger's server, which is the true one here."""
        return self.scenario.starts_wall + self.clock.now

    # -- processes

    def _start(self) -> None:
        chance, fate = self.chance, self.scenario.fate
        loop = VirtualLoop(self.clock)  # type: ignore[abstract]  # as much of a loop as is needed
        speed = 1.0 + chance.uniform(-fate.drift, fate.drift)
        offset, began = chance.uniform(0, 1e6), self.clock.now
        jump = [0.0]
        if fate.wall_jumps:
            self.clock.at(self.clock.now + chance.expovariate(fate.wall_jumps),
                          lambda: jump.__setitem__(0, chance.uniform(-1e6, 1e6)))  # fmt: skip

        def now() -> Moment:
            return Moment(self.wall() + jump[0], offset + (self.clock.now - began) * speed)

        backend = RemoteLedger(self.network, loop)
        config = schema.LedgerSettings(lease_seconds=LEASE_SECONDS, settle_seconds=self.scenario.settle_seconds)
        asyncio._set_running_loop(loop)
        try:
            ledger = Ledger(backend, config, now, lines_per_second=self.scenario.lines_per_second)
            ledger.start()
            store = RemoteClaims(self.network, loop)
            reporting = ReportingLedger(ledger, self.upstream)
            claims = Claims(store, reporting, config, now)
            claims.start()
        finally:
            asyncio._set_running_loop(None)
        process = Process(loop, backend, ledger, claims, reporting, store, now, {})
        self.fleet.append(process)
        if self.scenario.crowding > 1 or self.scenario.lines_per_second < LINES_PER_SECOND:
            self.clock.at(self.clock.now + chance.uniform(0, 0.5), lambda: self._poll(process))
        self._spawn(process, self._traffic(process))

    def _poll(self, process: Process) -> None:
        """Deliver recalls as the change feed does. A poll is lost like any message."""
        if process not in self.fleet:
            return
        leases = self.reference.recalled(process.holder)
        is_lost = process.backend.is_cut or self.network.is_down or self.chance.random() < self.network.weather.lost
        if leases and not is_lost:
            process.loop.call_soon(process.ledger.conversation.recall, leases)
        self.clock.at(self.clock.now + 0.5, lambda: self._poll(process))

    def _spawn(self, process: Process, work: Coroutine[Any, Any, None]) -> None:
        task = process.loop.create_task(work)
        process.tasks.add(task)
        task.add_done_callback(process.tasks.discard)

    async def _traffic(self, process: Process) -> None:
        while not self.is_quiet and not process.is_closing:
            await asyncio.sleep(self.chance.expovariate(self.scenario.requests_per_second))
            if not self.is_quiet and not process.is_closing:
                self._spawn(process, self._request(process))

    async def _request(self, process: Process) -> None:
        chance = self.chance
        owner = chance.choice(self.scenario.owners)
        need = None
        if any(limit.measure in _METERED for pool in owner for limit in self.plans[pool].limits):
            # Half of the requests set a maximum; the others are limited to what they hold.
            most = chance.choice([5, 20, 60, 400])
            least = most if chance.random() < 0.5 else chance.randint(1, min(5, most))
            price = chance.choice([0, 1, 10])
            need = Need(least, most, least * price, most * price, models=(chance.choice(MODELS),))
        fingerprint = None
        if self.scenario.repeats and chance.random() < self.scenario.repeats:
            number = chance.randrange(8)
            need = need and _repeated((5, 20, 60, 400)[number % 4])
            fingerprint = f"{owner[0].owner} {number}".encode()
        mark = object()
        process.deciding[mark] = self.clock.now
        try:
            hold, paid = await self._decided(process, owner, need, fingerprint)
        except Refusal as refusal:
            self._note_refusal(owner, refusal)
            return
        finally:
            del process.deciding[mark]
        self.decided["admitted"] += 1
        await self._serve(process, hold, fingerprint, paid)

    async def _decided(
        self, process: Process, owner: tuple[Pool, ...], need: Need | None, fingerprint: bytes | None
    ) -> tuple[Hold, int | None]:
        """Decide as the gateway does."""
        failure: Refusal | None = None
        paid, is_asked, patience = None, fingerprint is None, TimeBudget()
        for _ in range(_ROUNDS_MAX + 1):
            now = process.now()
            allowance = process.allowances.get(owner)
            if allowance is None:
                allowance = Allowance(tuple((pool, self.plans[pool]) for pool in owner))
                process.allowances[owner] = allowance
            try:
                if paid is not None:
                    return process.ledger.take_again(allowance, now, need, paid), paid
                return process.ledger.take(allowance, now, need, may_be_paid=not is_asked), None
            except Missing as missing:
                if failure is not None:
                    raise failure from None
                try:
                    await missing.fetch_missing(patience)
                except Refusal as refusal:
                    failure = refusal
            except Refusal as refusal:
                if is_asked or refusal.reason not in SPENT or fingerprint is None:
                    raise
                paid, is_asked = await process.claims.paid(fingerprint, patience), True
        raise Refusal(Reason.OVERLOADED)

    def _note_refusal(self, owner: tuple[Pool, ...], refusal: Refusal) -> None:
        if refusal.reason is Reason.LEDGER_UNAVAILABLE:
            self.decided["unavailable"] += 1
        elif refusal.reason is Reason.OVERLOADED:
            self.decided["overloaded"] += 1
        else:
            self.decided["refused"] += 1
            self.refused_at[owner] = self.clock.now

    async def _serve(self, process: Process, hold: Hold, fingerprint: bytes | None, paid: int | None) -> None:
        chance = self.chance
        if chance.random() < 0.05:
            process.ledger.settle(hold, was_sent=False)
            return
        work = self.upstream.admit(process, hold, fingerprint)
        await asyncio.sleep(chance.expovariate(1 / self.scenario.hold_seconds))
        while hold.limits_tokens and chance.random() < 0.2:
            try:
                hold = await self._extended(process, hold, chance.randint(1, 30))
            except Refusal:
                break
            self.upstream.extended(work, hold)
            await asyncio.sleep(chance.expovariate(1 / self.scenario.hold_seconds))
        used = self._used(hold.total_tokens)
        if fingerprint is not None:
            used += paid or 0
            self.upstream.answer(work, used)
            process.reporting.work = work
            process.claims.add(hold, fingerprint, used, paid, spend=used)
            return
        spend = self._used(hold.total_spend)
        process.ledger.settle(hold, was_sent=True, tokens=used, spend=spend)
        self.upstream.finish(work, used, spend)

    def _used(self, held: int) -> int:
        """What a request uses of what it holds; more than that if it was estimated."""
        chance = self.chance
        if self.scenario.fate.underestimates and chance.random() < self.scenario.fate.underestimates:
            return held + chance.choice([1, held // 3, 50])
        return chance.choice([0, held, chance.randint(0, held)])

    async def _extended(self, process: Process, hold: Hold, tokens: int) -> Hold:
        """Extend as the gateway does."""
        mark, patience = object(), TimeBudget()
        process.deciding[mark] = self.clock.now
        try:
            while True:
                try:
                    return process.ledger.extend(hold, tokens, tokens)
                except Missing as missing:
                    await missing.fetch_missing(patience)
        finally:
            del process.deciding[mark]

    # -- fate

    @property
    def is_calm(self) -> bool:
        """Whether a failover is near: stopped or cut off then, a process could not report its leases in time."""
        return self.calm_from <= self.clock.now <= self.calm_until

    def _again(self, per_second: float, happens: Callable[[], None]) -> None:
        if per_second <= 0:
            return

        def now() -> None:
            if not self.is_quiet:
                happens()
                self.clock.at(self.clock.now + self.chance.expovariate(per_second), now)

        self.clock.at(self.chance.expovariate(per_second), now)

    def _unleash(self) -> None:
        fate, chance = self.scenario.fate, self.chance
        self._again(fate.kills, self._kill)
        self._again(fate.pauses, self._pause)
        self._again(fate.cuts, self._cut)
        self._again(fate.restarts, self._restart)
        self._again(fate.outages, self._outage)
        self._again(fate.plan_changes, self._change_plan)
        self._again(fate.evictions, self._evict)
        self._again(fate.credits, self._credit)
        for number in range(fate.failovers):
            at = 4.0 + 12.0 * number + chance.uniform(0, 3)
            lag = chance.uniform(0.01, 0.9)
            self.clock.at(at, lambda lag=lag: self._fail_over(lag))  # type: ignore[misc]

    def _victim(self) -> Process | None:
        awake = [process for process in self.fleet if process.loop.runs and not process.is_closing]
        return self.chance.choice(awake) if awake and not self.is_calm else None

    def _kill(self) -> None:
        process = self._victim()
        if process is not None:
            self._bury(process)
            self._start()

    def _bury(self, process: Process) -> None:
        process.loop.runs = False
        process.backend.is_dead = process.store.is_dead = True
        self.fleet.remove(process)
        self.graves.append(process)
        self.upstream.lose(process)

    def _pause(self) -> None:
        process = self._victim()
        if process is not None:
            process.loop.runs = False
            seconds = self.chance.choice([0.2, 1.5, LEASE_SECONDS + 0.5, 3 * LEASE_SECONDS, 7 * LEASE_SECONDS])
            process.slept_until = self.clock.now + seconds
            self.clock.at(process.slept_until, lambda: setattr(process.loop, "runs", process in self.fleet))

    def _cut(self) -> None:
        process = self._victim()
        if process is not None:
            process.backend.is_cut = process.store.is_cut = True
            seconds = self.chance.choice([0.2, 2.5, LEASE_SECONDS + 0.5, 3 * LEASE_SECONDS])
            for remote in (process.backend, process.store):
                self.clock.at(self.clock.now + seconds, lambda remote=remote: setattr(remote, "is_cut", False))  # type: ignore[misc]

    def _restart(self) -> None:
        """A rolling restart: one process drains while its replacement starts."""
        process = self._victim()
        if process is not None:
            process.is_closing = True
            self._start()
            self._spawn(process, self._drain(process))

    async def _drain(self, process: Process) -> None:
        while len(process.tasks) > 1 and self.upstream.is_serving(process):
            await asyncio.sleep(0.1)
        await process.claims.close()
        await process.ledger.close()
        self.clock.at(self.clock.now, lambda: self._bury(process) if process in self.fleet else None)

    def _outage(self) -> None:
        if not self.is_calm:
            self.network.is_down = True
            seconds = self.chance.choice([0.1, 1.0, LEASE_SECONDS + 1.0])
            self.clock.at(self.clock.now + seconds, lambda: setattr(self.network, "is_down", False))

    def _change_plan(self) -> None:
        if self.is_calm:
            return
        pool = self.chance.choice([pool for pool in self.plans if pool.kind != TOKEN_POOL])
        plan = self.plans[pool]
        changes: dict[str, Limit | None] = {
            limit.name: replace(limit, amount=max(1, int(limit.amount * self.chance.choice([0.3, 0.8, 1.5]))))
            for limit in plan.limits
            if not limit.is_rate and limit.per != PER_REQUEST
        }
        self.plans[pool] = plan.changed(changes)
        self.upstream.note_plan(pool, self.plans[pool])
        for process in self.fleet:
            self.clock.at(self.clock.now + self.chance.uniform(0, 1), process.allowances.clear)

    def _evict(self) -> None:
        self.chance.choice(self.fleet).allowances.clear()
        gc.collect()

    def _credit(self) -> None:
        """An operator adds to a current window. Credits in lost history are lost."""
        now = self.wall()
        current = [key for key in self.reference.windows if span(key[0].measure, now)[0] == key[1]]
        credited = [key for key in sorted(current) if key[0].measure not in (*RATES, CONCURRENCY, *BUDGETS)]
        if credited and not self.network.is_lagging:
            window, starts = self.chance.choice(credited)
            amount = self.chance.choice([1, 40, 500])
            self.upstream.credited[window, starts] += amount
            self.reference.rules.credit(window, amount, now)

    def _break_the_calm(self) -> None:
        if not self.is_quiet:
            self.network.weather = self.scenario.fate.weather

    def _fail_over(self, lag: float) -> None:
        """Promote a replica that lacks the latest history. No process that knows this history may die meanwhile."""
        if self.is_quiet:
            return
        midnight = self.clock.now < 20.0 < self.clock.now + 3 * LEASE_SECONDS
        if (
            midnight
            or self.network.is_down
            or any(not one.loop.runs or one.backend.is_cut or one.is_closing for one in self.fleet)
        ):
            self.clock.at(self.clock.now + 1.0, lambda: self._fail_over(lag))
            return
        self.calm_from, self.calm_until = self.clock.now, self.clock.now + lag + 3 * LEASE_SECONDS
        # A process that is cut off while the ledger settles counts as dead: docs/ledger.md describes the cost.
        self.network.weather = Weather()
        self.network.is_lagging = True
        self.clock.at(self.calm_until, self._break_the_calm)
        replica = self.reference.rules.replica()
        claims = self.network.claims
        charges, batches = dict(claims.charges), dict(claims.batches)
        self.upstream.history_lost(self.clock.now, self.calm_until)

        def promoted() -> None:
            self.reference.fail_over(replica)
            self.network.is_lagging = False
            claims.charges, claims.batches = charges, batches

        self.clock.at(self.clock.now + lag, promoted)

    # -- the run

    def run(self) -> None:
        """Run the scenario. Raises BrokenError, which names the seed."""
        # Objects are freed by reference count or by an explicit collection, for deterministic runs.
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            self._unleash()
            while self.clock.now < self.scenario.seconds:
                self.clock.run(self.clock.now + 0.25)
                self._check_waiting()
            self._settle_down()
        except BrokenError as error:
            raise BrokenError(f"seed {self.scenario.seed}, second {self.clock.now:.3f}: {error}") from None
        finally:
            for process in (*self.fleet, *self.graves):
                process.loop.runs = False
            gc.enable()
            gc.unfreeze()

    def _settle_down(self) -> None:
        """Stop requests and faults: after a while no units may be held."""
        self.is_quiet = True
        self.network.weather = Weather()
        self.clock.run(self.clock.now + 4 * LEASE_SECONDS)
        # Some requests take very long, and extend their holds until their end.
        gives_up = self.clock.now + LONGEST_SECONDS
        while self.clock.now < gives_up and any(map(self.upstream.is_serving, self.fleet)):
            self.clock.run(self.clock.now + 1.0)
        # Idle units of a window with many holders are returned after two intervals of reports; its lease closes later.
        # So are those of a process that reports its leases rarely, after two pauses.
        is_rare = self.scenario.crowding > 1 or self.scenario.lines_per_second < LINES_PER_SECOND
        self.clock.run(self.clock.now + (150.0 if is_rare else 12.0))
        self.check()
        for process in self.fleet:
            for context in process.loop.errors:
                raise BrokenError(f"{context['message']}: {context.get('exception')!r}")
            if self.upstream.is_serving(process):
                raise BrokenError("requests still run")
        for key, row in self.reference.windows.items():
            if row.held:
                raise BrokenError(f"{row.held} of {key} are still held")
        for process in self.fleet:
            if process.ledger.conversation.lease_sync.has_leases:
                raise BrokenError(f"leases are left: {process.ledger.conversation.lease_sync.outstanding}")
        self.upstream.check_end(is_kind=self.scenario.fate.is_kind)

    def _check_waiting(self) -> None:
        for process in self.fleet:
            for since in process.deciding.values():
                if process.loop.runs and self.clock.now - max(since, process.slept_until) > DECIDED_SECONDS:
                    raise BrokenError(f"a request waits since {since:.3f}")

    def check(self) -> None:
        """Check the invariants that hold at every instant."""
        held = dict.fromkeys(self.reference.windows, 0)
        for holder in self.reference.holders.values():
            for account in holder.leases.values():
                held[account.key] += account.outstanding
        for key, row in self.reference.windows.items():
            if row.held != held[key] or row.held < 0 or row.spent < 0:
                raise BrokenError(f"{key}: {row.held} held, but {held[key]} in leases")
        self.upstream.check()
