"""One window that many processes share: messages per second, waits, and how soon the last unit is found.

Run as `python -m bench.shared_window`. Holders are real ledger clients with change feeds over a real PostgreSQL; some
share an OS process and its connections, since a machine carries fewer processes than a fleet has. Every row is measured
twice: *before*, with clients that report every `settle_seconds` however many they are, and as they are now. Then the
limit is so low that the window runs out. `spent + held` is compared with the limit four times a second.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import logging
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, cast

import asyncpg
import uvloop

from bench.site import machine
from keyproxy.config import schema
from keyproxy.limits.allowance import Allowance, Hold
from keyproxy.limits.ledger_protocol import LeaseGrant, LeaseReport, Pool
from keyproxy.limits.plan import Plan
from keyproxy.model import Missing, Moment, TimeBudget
from keyproxy.reasons import Refusal
from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.identities.cache import FeedState, IdentityCache
from keyproxy.store.identities.change_feed import ChangeFeed
from keyproxy.store.ledger.ledger import Ledger
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.postgres import migrations
from keyproxy.store.postgres.database import Database

_OS_PROCESSES = 2
_CONNECTIONS = 12
_LIMIT = 10**12
_TAKEN = "SELECT coalesce(sum(spent + held), 0)::bigint FROM keyproxy.windows WHERE pool_id = $1"


class Load(NamedTuple):
    """What the holders of one row do."""

    tenant: str
    holders: int
    requests_per_second: float
    limit: int
    is_before: bool
    start: float
    warm_seconds: float
    seconds: float


class Run(NamedTuple):
    """What the holders of one OS process did, in the measured time; `received` and `refused_at` are of all the time."""

    messages: list[float]
    round_trips: list[float]
    waits: list[float]
    received: int
    refused: int
    last_received: float
    first_refused: float


class _Backend(PostgresLedger):
    """Records the messages about windows. Before: hides from the client how many holders there are."""

    is_before = False

    def __init__(self, database: Database, load: Load) -> None:
        super().__init__(database, lease_seconds=10.0)
        self.is_before = load.is_before
        self.messages: list[tuple[float, float]] = []

    async def sync(self, holder: str, serial: int, lines: Sequence[LeaseReport]) -> Sequence[LeaseGrant] | None:
        """See LedgerBackend."""
        began = time.time()
        replies = await super().sync(holder, serial, lines)
        if lines:
            self.messages.append((began, time.time() - began))
        if self.is_before and replies is not None:
            return [reply._replace(holders=1, wait_seconds=0.0) if reply.lease else reply for reply in replies]
        return replies


class _NoCache:
    """In place of the identity cache, whose entries are not used here."""

    def distrust_all(self) -> None:
        """Nothing is cached."""

    forget_all = distrust_all


class Client:
    """One holder with its requests."""

    def __init__(self, database: Database, load: Load, seed: int) -> None:
        self.backend = _Backend(database, load)
        self.ledger = Ledger(self.backend, schema.LedgerSettings(), _now)
        self.feed = ChangeFeed(
            database, None, cast("IdentityCache", _NoCache()), FeedState(), _now,
            lease_holder=None if load.is_before else self.ledger.conversation,
        )  # fmt: skip
        self._load, self._chance = load, random.Random(seed)
        self._allowance = Allowance(((Pool("tenant", load.tenant, False), Plan(requests_per_day=load.limit)),))
        self.waits: list[tuple[float, float]] = []
        self.received_at: list[float] = []
        self.refused_at: list[float] = []
        self._requests: set[asyncio.Task[None]] = set()

    async def work(self) -> None:
        """Send requests until the measured time is over."""
        load = self._load
        self.ledger.start()
        self.feed.start()
        await asyncio.sleep(max(0.0, load.start - time.time()) + self._chance.uniform(0, load.warm_seconds / 2))
        ends = load.start + load.warm_seconds + load.seconds
        while time.time() < ends:
            task = asyncio.get_running_loop().create_task(self._request())
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)
            await asyncio.sleep(self._chance.expovariate(load.requests_per_second))
        await asyncio.gather(*self._requests)
        await self.feed.close()

    async def _request(self) -> None:
        began = time.time()
        try:
            hold = await self._decided()
        except Refusal:
            self.refused_at.append(time.time())
            return
        self.received_at.append(time.time())
        self.waits.append((began, time.time() - began))
        await asyncio.sleep(self._chance.expovariate(10.0))
        self.ledger.settle(hold, was_sent=True)

    async def _decided(self) -> Hold:
        patience = TimeBudget()
        while True:
            try:
                return self.ledger.take(self._allowance, _now())
            except Missing as missing:
                await missing.fetch_missing(patience)


def _now() -> Moment:
    return Moment(time.time(), time.monotonic())


def _process(dsn: str, load: Load, part: int) -> Run:
    return uvloop.run(_hold(dsn, load, part))


async def _hold(dsn: str, load: Load, part: int) -> Run:
    logging.getLogger("keyproxy").setLevel(logging.CRITICAL)
    database = Database(dsn, pool_size_max=_CONNECTIONS, statement_timeout_seconds=10.0)
    await database.open()
    clients = [Client(database, load, seed) for seed in range(part, load.holders, _OS_PROCESSES)]
    await asyncio.gather(*(client.work() for client in clients))
    await asyncio.gather(*(client.ledger.close() for client in clients))
    await database.close()
    since = load.start + load.warm_seconds

    def measured(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [pair for pair in pairs if since <= pair[0] < since + load.seconds]

    messages = measured([pair for client in clients for pair in client.backend.messages])
    refused = [at for client in clients for at in client.refused_at]
    received = [at for client in clients for at in client.received_at]
    return Run(
        [at for at, _ in messages], [seconds for _, seconds in messages],
        [seconds for client in clients for _, seconds in measured(client.waits)],
        len(received), len(refused), max(received, default=0.0), min(refused, default=0.0),
    )  # fmt: skip


async def _watch(dsn: str, load: Load) -> int:
    """The most that was ever spent and held."""
    connection = await asyncpg.connect(dsn)
    most = 0
    try:
        while time.time() < load.start + load.warm_seconds + load.seconds:
            most = max(most, await connection.fetchval(_TAKEN, load.tenant))
            await asyncio.sleep(0.25)
        return most
    finally:
        await connection.close()


def _measure(dsn: str, load: Load) -> None:
    with ProcessPoolExecutor(_OS_PROCESSES, multiprocessing.get_context("spawn")) as processes:
        list(processes.map(abs, range(_OS_PROCESSES)))
        load = load._replace(start=time.time() + 2.0)
        futures = [processes.submit(_process, dsn, load, part) for part in range(_OS_PROCESSES)]
        most = uvloop.run(_watch(dsn, load))
        runs = [future.result() for future in futures]
    messages = sorted(at for run in runs for at in run.messages)
    by_second = [
        sum(1 for at in messages if second <= at - load.start - load.warm_seconds < second + 1)
        for second in range(int(load.seconds))
    ]
    waits = [seconds for run in runs for seconds in run.waits] or [0.0]
    round_trips = [seconds for run in runs for seconds in run.round_trips] or [0.0]
    received, refused = sum(run.received for run in runs), sum(run.refused for run in runs)
    last = max(run.last_received for run in runs) - min((run.first_refused or float("inf")) for run in runs)
    is_low = load.limit < _LIMIT
    waited = sum(1 for wait in waits if wait > 0.001) / len(waits)
    print(
        f"{load.holders:>7}  {'before' if load.is_before else 'now':<6} {'runs out' if is_low else 'ample':<8}"
        f" {statistics.fmean(by_second):>8.1f} {max(by_second):>7} {_p99(round_trips) * 1e3:>7.1f} {waited:>8.2%}"
        f" {_p99(waits) * 1e3:>8.1f} {received:>9} {refused:>8} {max(0, received - load.limit, most - load.limit):>6}"
        f" {f'{received - load.limit:+} at {last:.1f}' if is_low else '':>16}",
        flush=True,
    )


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.shared_window", description=__doc__)
    parser.add_argument("--holders", default="1,32,100")
    parser.add_argument("--requests-per-second", type=float, default=1.0, help="of each holder")
    parser.add_argument("--warm-seconds", type=float, default=12.0, help="holders start in the first half of it")
    parser.add_argument("--seconds", type=float, default=12.0)
    options = parser.parse_args(arguments)
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}")
    print(
        "                        messages/s    | trip | requests                              over  last unit,\n"
        "holders         limit      mean highest  p99 ms   waited   p99 ms  received  refused  limit  s after refusal"
    )
    with tempfile.TemporaryDirectory(prefix="kpb-", dir="/tmp") as directory:
        server = embedded_postgres.start(Path(directory) / "pg", {})
        try:
            uvloop.run(migrations.migrate(server.dsn()))
            for holders in map(int, options.holders.split(",")):
                used = int(holders * options.requests_per_second * (options.warm_seconds * 0.75 + options.seconds / 3))
                for limit in (_LIMIT, max(1, used)):
                    for is_before in (True, False):
                        tenant = f"t_{holders}_{limit}_{is_before}"
                        _measure(server.dsn(), Load(
                            tenant, holders, options.requests_per_second, limit, is_before, 0.0,
                            options.warm_seconds, options.seconds,
                        ))  # fmt: skip
        finally:
            server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
