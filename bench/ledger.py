"""How many leases a second the ledger's backends carry, and from that how many proxies with how many active users.

Run as `python -m bench.ledger`. Each holder is a process, as a proxy is; it tells what it used of some users' windows and
asks for more of each, one message after another, as fast as they are answered. All holders draw on the same users. The
servers are real, PostgreSQL with fsync as it is installed. CPU is the servers' alone: with Redis, PostgreSQL's too.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import uvloop

from bench.site import machine
from keyproxy import settings
from keyproxy.limits.leases import Line, Pool, Window
from keyproxy.store import embedded, migrations
from keyproxy.store.backends import ledger_backend
from keyproxy.store.database import Database

_USERS = 2_000
_UNITS = 20
_LEASE_LASTS_SECONDS = 2.0
_WARM_SECONDS = 5.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Run(NamedTuple):
    """What one holder did: messages, and how long each took."""

    seconds: float
    latencies: list[float]


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of load for each row")
    parser.add_argument("--lines", default="1,10,100,200", help="leases in a message")
    parser.add_argument("--holders", default="1,4")
    parser.add_argument("--backends", default="postgres,redis")
    parser.add_argument("--redis-server", default=shutil.which("valkey-server") or shutil.which("redis-server") or "")
    options = parser.parse_args(arguments)
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}")
    with tempfile.TemporaryDirectory(prefix="kpb-", dir="/tmp") as directory, contextlib.ExitStack() as stack:
        server = embedded.start(Path(directory) / "pg", {})
        stack.callback(server.stop)
        uvloop.run(migrations.migrate(server.dsn()))
        postgres = int(next(Path(directory).rglob("postmaster.pid")).read_text().split()[0])
        backends = {"postgres": ("postgres", [postgres])}
        if options.redis_server and "redis" in options.backends:
            url, pid = stack.enter_context(_redis(options.redis_server, Path(directory)))
            backends["redis"] = (url, [postgres, pid])
        print(
            "backend   holders  lines  messages/s  leases/s  p50 ms  p99 ms  server CPU µs/lease  active users at 2 s"
        )
        for name in options.backends.split(","):
            if name not in backends:
                print(f"{name} is left out: no server")
                continue
            backend, pids = backends[name]
            for holders in map(int, options.holders.split(",")):
                for lines in map(int, options.lines.split(",")):
                    _measure(name, backend, server.dsn(), holders, lines, options.seconds, pids)
    return 0


def _measure(name: str, backend: str, dsn: str, holders: int, lines: int, seconds: float, pids: list[int]) -> None:
    with ProcessPoolExecutor(holders, multiprocessing.get_context("spawn")) as processes:
        # They take a while to come up; whoever is up waits for the same moment.
        list(processes.map(abs, range(holders)))
        start = time.time() + _WARM_SECONDS
        futures = [processes.submit(_process, backend, dsn, lines, seconds, start, seed) for seed in range(holders)]
        time.sleep(max(0.0, start - time.time()))
        before = _cpu_seconds(pids)
        runs = [future.result() for future in futures]
        cpu = _cpu_seconds(pids) - before
    latencies = sorted(latency for run in runs for latency in run.latencies)
    per_second = sum(len(run.latencies) / run.seconds for run in runs)
    print(
        f"{name:<9} {holders:>7} {lines:>6} {per_second:>11,.0f} {per_second * lines:>9,.0f}"
        f" {statistics.median(latencies) * 1e3:>7.2f} {latencies[int(len(latencies) * 0.99)] * 1e3:>7.2f}"
        f" {cpu / (len(latencies) * lines) * 1e6:>20.1f} {per_second * lines * _LEASE_LASTS_SECONDS:>20,.0f}",
        flush=True,
    )


def _process(backend: str, dsn: str, lines: int, seconds: float, start: float, seed: int) -> Run:
    return uvloop.run(_hold(backend, dsn, lines, seconds, start, seed))


async def _hold(backend: str, dsn: str, lines: int, seconds: float, start: float, seed: int) -> Run:
    database = Database(dsn, pool_size_max=2, statement_timeout_seconds=30.0)
    await database.open()
    ledger = ledger_backend(database, settings.Ledger(backend=backend, lease_seconds=60.0))
    holder, serial, chance = f"{os.getpid()}-{time.time()}", 0, random.Random(seed)
    granted = [0] * _USERS
    windows = [Window(Pool("user", f"user_{number}", False), "requests_per_day") for number in range(_USERS)]

    async def say(users: Sequence[int]) -> None:
        nonlocal serial
        serial += 1
        message = [
            Line(user + 1, windows[user], 0, 10**12, 0.0, granted[user], granted[user], 0, _UNITS, 1, False, False)
            for user in users
        ]
        for reply in await ledger.sync(holder, serial, message) or []:
            granted[reply.lease - 1] = reply.granted

    for first in range(0, _USERS, 200):
        await say(range(first, first + 200))
    # Leases and shares find their size: as much as is used in a while.
    while time.time() < start:
        first = chance.randrange(_USERS - 200)
        await say(range(first, first + 200))
    latencies: list[float] = []
    began = now = time.perf_counter()
    while now < began + seconds:
        first = chance.randrange(_USERS - lines)
        await say(range(first, first + lines))
        before, now = now, time.perf_counter()
        latencies.append(now - before)
    # Its leases lapse: a fleet goes on, and so do the shares it has found.
    await ledger.close()
    await database.close()
    return Run(now - began, latencies)


@contextlib.contextmanager
def _redis(program: str, home: Path) -> Iterator[tuple[str, int]]:
    path = home / "redis.sock"
    command = [program, "--unixsocket", str(path), "--port", "0", "--save", "", "--dir", str(home)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while not path.exists():
                time.sleep(0.01)
            yield f"unix://{path}", process.pid
        finally:
            process.terminate()


def _cpu_seconds(pids: Sequence[int]) -> float:
    """Of processes and all their descendants, the dead ones included."""
    of: dict[int, float] = {}
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid], of[pid] = int(fields[1]), sum(map(int, fields[11:15])) / _TICKS
    wanted = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in wanted} - wanted:
        wanted |= more
    return sum(of.get(pid, 0.0) for pid in wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
