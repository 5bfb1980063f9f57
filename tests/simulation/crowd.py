"""Many processes that share one window: how many messages they send about it, and how soon its last unit is found.

The processes run the real keyproxy.store.ledger.Ledger on virtual time, against the rules of the ledger, like those of
`world`. Instead of checking every kind of fault, a crowd counts messages. `python -m tests.simulation.crowd` prints the
table of docs/ledger.md.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from keyproxy.config import schema
from keyproxy.limits.allowance import Allowance, Hold
from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Pool
from keyproxy.limits.plan import Plan
from keyproxy.model import Missing, Moment, TimeBudget
from keyproxy.reasons import Refusal
from keyproxy.store.ledger.ledger import Ledger
from tests.reference_ledger import ReferenceLedger
from tests.simulation.clockwork import Clock, VirtualLoop
from tests.simulation.network import Network, RemoteLedger, Weather
from tests.simulation.upstream import BrokenError

NOON = 1_705_320_000.0
#: A minute before the next day.
EVENING = NOON + 43_140.0
_TENANT = Pool("tenant", "acme", False)
LEASE_SECONDS = 10.0
#: How often a proxy polls the change feed.
_POLL_SECONDS = 0.5
#: A client that is refused sends its request again after a second, the shortest Retry-After.
_RETRY_SECONDS = 1.0

STORM = Weather(lost=0.05, answer_lost=0.05, doubled=0.05, late=0.05, late_seconds=4.0, delay_seconds=0.02)


@dataclass(eq=False)
class Member:
    """One process of a crowd."""

    loop: VirtualLoop
    backend: RemoteLedger
    ledger: Ledger
    now: Moment


class _CountedLedger(ReferenceLedger):
    """The rules of the ledger, and how many messages concern the window."""

    def __init__(self, clock: Clock, starts_wall: float) -> None:
        super().__init__(lambda: starts_wall + clock.now, lease_seconds=LEASE_SECONDS)
        self._time = clock
        #: By second: messages about the window, and all messages.
        self.of_window: Counter[int] = Counter()
        self.messages: Counter[int] = Counter()
        self._reaped_at = -1.0

    def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> list[LeaseGrant] | None:
        """See ReferenceLedger."""
        second = int(self._time.now)
        self.messages[second] += 1
        self.of_window[second] += bool(lines)
        return super().sync(holder, serial, lines)

    def reap(self) -> None:
        """Once a second, though every process does it: it looks at every holder here."""
        if self._time.now >= self._reaped_at + 1.0:
            self._reaped_at = self._time.now
            super().reap()


class Crowd:
    """Processes with requests of one tenant under a limit of requests per day."""

    def __init__(
        self, processes: int, *, limit: int = 10**12, requests_per_second: float = 1.0, weather: Weather | None = None,
        kills_per_second: float = 0.0, seed: int = 1, starts_wall: float = NOON,
    ) -> None:  # fmt: skip
        self.chance = random.Random(f"crowd {seed}")
        self.clock = Clock()
        self.limit, self.requests_per_second = limit, requests_per_second
        self.allowance_plan = Plan(requests_per_day=limit)
        self.starts_wall = starts_wall
        self.reference = _CountedLedger(self.clock, starts_wall)
        self.weather = weather or Weather()
        self.network = Network(self.clock, self.chance, self.reference, self.weather)
        self.network.after_message = self._check
        self.members: list[Member] = []
        self.is_quiet = False
        self.refused = self.unavailable = self.in_flight = 0
        #: Requests received, by the start of the window in which they are charged.
        self.received_in: Counter[int] = Counter()
        #: When requests were admitted, and for how many seconds they waited for that.
        self.waited: list[tuple[float, float]] = []
        self.first_refused = math.inf
        for _ in range(processes):
            self.join()
        if kills_per_second:
            self._kill_again(kills_per_second)

    # -- processes

    def join(self) -> Member:
        """Start a process, which joins the traffic after a moment."""
        loop = VirtualLoop(self.clock)  # type: ignore[abstract]  # as much of a loop as is needed
        backend, starts_wall = RemoteLedger(self.network, loop), self.starts_wall
        offset = self.chance.uniform(0, 1e6)
        asyncio._set_running_loop(loop)
        try:
            ledger = Ledger(
                backend, schema.LedgerSettings(lease_seconds=LEASE_SECONDS),
                lambda: Moment(starts_wall + self.clock.now, offset + self.clock.now),
            )  # fmt: skip
            ledger.start()
        finally:
            asyncio._set_running_loop(None)
        member = Member(loop, backend, ledger, Moment(starts_wall, offset))
        self.members.append(member)
        loop.create_task(self._traffic(member))
        self.clock.at(self.clock.now + self.chance.uniform(0, _POLL_SECONDS), lambda: self._poll(member))
        return member

    def _poll(self, member: Member) -> None:
        """Deliver recalls as the change feed does. A poll is lost or late like any message."""
        if member.backend.is_dead:
            return
        leases = self.reference.recalled(member.ledger.conversation.holder)
        if leases and self.chance.random() >= self.network.weather.lost + self.network.weather.answer_lost:
            member.loop.call_soon(member.ledger.conversation.recall, leases)
        self.clock.at(self.clock.now + _POLL_SECONDS, lambda: self._poll(member))

    def _kill_again(self, per_second: float) -> None:
        def kill() -> None:
            if self.is_quiet:
                return
            victim = self.members.pop(self.chance.randrange(len(self.members)))
            victim.loop.runs = False
            victim.backend.is_dead = True
            self.join()
            self.clock.at(self.clock.now + self.chance.expovariate(per_second), kill)

        self.clock.at(self.chance.expovariate(per_second), kill)

    # -- requests

    @property
    def received(self) -> int:
        """The number of requests that were received."""
        return self.received_in.total()

    async def _traffic(self, member: Member) -> None:
        # A fleet does not start within one second.
        await asyncio.sleep(self.chance.uniform(0, 10.0))
        while True:
            await asyncio.sleep(self.chance.expovariate(self.requests_per_second))
            if self.is_quiet:
                return
            member.loop.create_task(self._request(member))

    async def _request(self, member: Member) -> bool:
        began = self.clock.now
        try:
            hold = await self._decided(member)
        except Refusal as refusal:
            self.refused += 1
            self.first_refused = min(self.first_refused, self.clock.now)
            self.unavailable += refusal.limit is None
            return False
        self.waited.append((self.clock.now, self.clock.now - began))
        (lease,) = hold.bundle.counted
        self.received_in[lease.starts] += 1
        if self.received_in[lease.starts] > self.limit:
            raise BrokenError(f"{self.received_in[lease.starts]} received, {self.limit} allowed")
        if lease.starts > self.starts_wall + self.clock.now:
            raise BrokenError(f"received {lease.starts - self.starts_wall - self.clock.now} s before the window begins")
        self.in_flight += 1
        await asyncio.sleep(self.chance.expovariate(5.0))
        self.in_flight -= 1
        member.ledger.settle(hold, was_sent=True)
        return True

    async def _decided(self, member: Member) -> Hold:
        patience = TimeBudget()
        allowance = Allowance(((_TENANT, self.allowance_plan),))
        while True:
            now = Moment(self.starts_wall + self.clock.now, member.now.mono_seconds + self.clock.now)
            try:
                return member.ledger.take(allowance, now)
            except Missing as missing:
                await missing.fetch_missing(patience)

    def seconds_to_a_unit(self, member: Member, gives_up_seconds: float = 60.0) -> float:
        """How long one client needs that sends its request again until a unit is found. Only it sends requests."""
        began = self.clock.now

        async def insist() -> None:
            while not await self._request(member):
                await asyncio.sleep(_RETRY_SECONDS)

        received = self.received
        task = member.loop.create_task(insist())
        while self.received == received and self.clock.now < began + gives_up_seconds:
            self.clock.run(self.clock.now + 0.05)
        seconds = self.clock.now - began
        if self.received == received:
            task.cancel()
        return seconds

    def units_of(self, member: Member) -> int:
        """The units that the ledger holds for a process."""
        holder = self.reference.holders.get(member.ledger.conversation.holder)
        return 0 if holder is None else sum(lease.outstanding for lease in holder.leases.values())

    # -- invariants and results

    def _check(self) -> None:
        for row in self.reference.windows.values():
            if row.spent + row.held > self.limit:
                raise BrokenError(f"{row.spent} spent + {row.held} held > {self.limit}")

    def check_leases(self) -> None:
        """What the window holds is the sum of its leases, and every request that was received is spent or held."""
        for key, row in self.reference.windows.items():
            leases = [lease for holder in self.reference.holders.values() for lease in holder.leases.values()]
            held = sum(lease.outstanding for lease in leases if lease.key == key)
            received = self.received_in[key[1]]
            if row.held != held or received > row.spent + row.held:
                raise BrokenError(f"{row.held} held, {held} in leases, {row.spent} spent, {received} received")

    def run(self, seconds: float) -> None:
        """Advance, and check the leases every second."""
        until = self.clock.now + seconds
        while self.clock.now < until:
            self.clock.run(min(until, self.clock.now + 1.0))
            self.check_leases()
            for member in self.members:
                for context in member.loop.errors:
                    raise BrokenError(f"{context['message']}: {context.get('exception')!r}")

    def messages_per_second(self, since: float, until: float) -> tuple[float, int]:
        """The mean and the highest number of messages about the window in one second."""
        counts = [self.reference.of_window[second] for second in range(int(since), int(until))]
        return statistics.fmean(counts), max(counts)


def main(arguments: Sequence[str]) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.crowd", description=__doc__)
    parser.add_argument("--processes", default="1,32,1000")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    logging.getLogger("keyproxy").setLevel(logging.CRITICAL)
    print("processes  faults  phase        messages/s: mean  highest   waited p99 s  received  refused")
    for processes in map(int, options.processes.split(",")):
        for weather, kills in ((None, 0.0), (STORM, 0.2)):
            name = "lost, killed" if weather else "none"
            for rate in (1.0, 0.1):
                crowd = Crowd(processes, requests_per_second=rate, weather=weather, kills_per_second=kills,
                              seed=options.seed)  # fmt: skip
                crowd.run(60.0)
                _print(processes, name, f"{rate:g} requests/s", crowd, 25.0)
            crowd = Crowd(processes, limit=processes * 40, weather=weather, kills_per_second=kills, seed=options.seed)
            crowd.run(75.0)
            _print(processes, name, "runs out", crowd, 25.0)
    return 0


def _print(processes: int, faults: str, phase: str, crowd: Crowd, since: float) -> None:
    mean, highest = crowd.messages_per_second(since, crowd.clock.now)
    waits = sorted(seconds for _, seconds in crowd.waited)
    print(
        f"{processes:>9}  {faults:<12}  {phase:<14} {mean:>8.1f} {highest:>8} {waits[int(len(waits) * 0.99)]:>9.3f}"
        f" {crowd.received:>9} {crowd.refused:>8}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
