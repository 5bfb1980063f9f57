"""Leases per second of the ledger's backends, and their CPU cost by process.

Run as `python -m bench.ledger`. Each holder is a process, like a proxy; it reports its usage of some users' windows and
requests more of each, one message after another, without pauses. All holders share the same users. The servers are real,
PostgreSQL with its default fsync. Holders and servers share this machine's cores, so a server's scalability follows from
the CPU per lease of each process.
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

import asyncpg
import uvloop

from bench.site import machine
from keyproxy.config import schema
from keyproxy.limits.ledger_protocol import LeaseReport, Pool, Window
from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.ledger.select_backend import ledger_backend
from keyproxy.store.postgres import migrations
from keyproxy.store.postgres.database import Database

_USERS = 2_000
_UNITS = 20
_LEASE_LASTS_SECONDS = 2.0
_WARM_SECONDS = 5.0
#: PostgreSQL's names for the processes that write in the background.
_WRITERS = (b"walwriter", b"checkpointer", b"background writer", b"autovacuum", b"io worker")
_TICKS = os.sysconf("SC_CLK_TCK")


class Run(NamedTuple):
    """The results of one holder: messages, their durations, and its CPU."""

    seconds: float
    cpu_seconds: float
    latencies: list[float]


class Cpu(NamedTuple):
    """CPU seconds of the servers so far: PostgreSQL's backends, its background writers, Redis."""

    postgres: float
    writers: float
    redis: float


class Row(NamedTuple):
    """One backend under one load. CPU is in microseconds per lease; the holders' column is their own CPU only."""

    messages_per_second: float
    p50_ms: float
    p99_ms: float
    postgres: float
    writers: float
    redis: float
    holders: float
    wal_bytes: float


class Servers(NamedTuple):
    """The measured servers: their addresses and processes."""

    dsn: str
    postgres: int
    backends: dict[str, str]
    redis: int | None


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of load for each row of each round")
    parser.add_argument("--rounds", type=int, default=1, help="all rows in turn, so often; medians are printed")
    parser.add_argument("--lines", default="1,10,100,200", help="leases in a message")
    parser.add_argument("--holders", default="1,4")
    parser.add_argument("--backends", default="postgres,redis", help="or one of them")
    parser.add_argument("--redis-server", default=shutil.which("redis-server") or shutil.which("valkey-server") or "")
    options = parser.parse_args(arguments)
    names = options.backends.split(",")
    if unknown := set(names) - {"postgres", "redis"}:
        parser.error(f"unknown backend {', '.join(sorted(unknown))}: choose from postgres and redis")
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}")
    with tempfile.TemporaryDirectory(prefix="kpb-", dir="/tmp") as directory, contextlib.ExitStack() as stack:
        servers = _servers(stack, Path(directory), options.redis_server if "redis" in names else "")
        loads = [
            (name, holders, lines)
            for holders in map(int, options.holders.split(","))
            for lines in map(int, options.lines.split(","))
            for name in names
            if name in servers.backends
        ]
        if len({name for name, _, _ in loads}) < len(names):
            print("redis is skipped: neither redis-server nor valkey-server is installed")
        rows: dict[tuple[str, int, int], list[Row]] = {load: [] for load in loads}
        for _ in range(options.rounds):
            for load in loads:
                rows[load].append(_measure(servers, load, options.seconds))
        _print(rows)
    return 0


def _print(rows: dict[tuple[str, int, int], list[Row]]) -> None:
    print(
        "                                                    | CPU, µs per lease             | WAL     |"
        " leases/s of one core\n"
        "backend   holders  lines  leases/s  p50 ms   p99 ms | PostgreSQL WAL&c. Redis holder | B/lease |"
        " of the busiest server"
    )
    for (name, holders, lines), measured in rows.items():
        row = Row(*(statistics.median(column) for column in zip(*measured, strict=True)))
        # PostgreSQL's work is shared by its backends, Redis' is one thread's.
        busiest = row.redis if name == "redis" else row.postgres + row.writers
        print(
            f"{name:<9} {holders:>7} {lines:>6} {row.messages_per_second * lines:>9,.0f}"
            f" {row.p50_ms:>7.2f} {row.p99_ms:>8.2f} | {row.postgres:>10.1f} {row.writers:>6.1f} {row.redis:>5.1f}"
            f" {row.holders:>6.1f} | {row.wal_bytes:>7.0f} | {1e6 / busiest:>21,.0f}"
        )


def _servers(stack: contextlib.ExitStack, home: Path, redis_server: str) -> Servers:
    server = embedded_postgres.start(home / "pg", {})
    stack.callback(server.stop)
    uvloop.run(migrations.migrate(server.dsn()))
    postgres = int(next(home.rglob("postmaster.pid")).read_text().split()[0])
    backends, redis = {"postgres": "postgres"}, None
    if redis_server:
        backends["redis"], redis = stack.enter_context(_redis(redis_server, home))
    return Servers(server.dsn(), postgres, backends, redis)


def _measure(servers: Servers, load: tuple[str, int, int], seconds: float) -> Row:
    name, holders, lines = load
    with ProcessPoolExecutor(holders, multiprocessing.get_context("spawn")) as processes:
        # Holders start at different speeds, so all wait for the same start time.
        list(processes.map(abs, range(holders)))
        start = time.time() + _WARM_SECONDS
        futures = [
            processes.submit(_process, servers.backends[name], servers.dsn, lines, seconds, start, seed)
            for seed in range(holders)
        ]
        time.sleep(max(0.0, start - time.time()))
        before, wal = _cpu(servers), uvloop.run(_wal_bytes(servers.dsn))
        runs = [future.result() for future in futures]
        cpu = [after - was for after, was in zip(_cpu(servers), before, strict=True)]
        wal = uvloop.run(_wal_bytes(servers.dsn)) - wal
    latencies = sorted(latency for run in runs for latency in run.latencies)
    leases = len(latencies) * lines
    postgres, writers, redis = (spent / leases * 1e6 for spent in cpu)
    return Row(
        messages_per_second=sum(len(run.latencies) / run.seconds for run in runs),
        p50_ms=statistics.median(latencies) * 1e3,
        p99_ms=latencies[int(len(latencies) * 0.99)] * 1e3,
        postgres=postgres,
        writers=writers,
        redis=redis,
        holders=sum(run.cpu_seconds for run in runs) / leases * 1e6,
        wal_bytes=wal / leases,
    )


async def _wal_bytes(dsn: str) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))
    finally:
        await connection.close()


def _process(backend: str, dsn: str, lines: int, seconds: float, start: float, seed: int) -> Run:
    return uvloop.run(_hold(backend, dsn, lines, seconds, start, seed))


async def _hold(backend: str, dsn: str, lines: int, seconds: float, start: float, seed: int) -> Run:
    database = Database(dsn, pool_size_max=2, statement_timeout_seconds=30.0)
    await database.open()
    ledger = ledger_backend(database, schema.LedgerSettings(backend=backend, lease_seconds=60.0))
    holder, serial, chance = f"{os.getpid()}-{time.time()}", 0, random.Random(seed)
    granted = [0] * _USERS
    windows = [Window(Pool("user", f"user_{number}", False), "requests_per_day") for number in range(_USERS)]

    async def report(users: Sequence[int]) -> None:
        nonlocal serial
        serial += 1
        message = [
            LeaseReport(user + 1, windows[user], 0, 10**12, 0.0, granted[user], granted[user], 0, _UNITS, 1, 0, False)
            for user in users
        ]
        for reply in await ledger.sync(holder, serial, message) or []:
            granted[reply.lease - 1] = reply.granted

    for first in range(0, _USERS, 200):
        await report(range(first, first + 200))
    # Warm-up: leases and shares adapt their size to the usage.
    while time.time() < start:
        first = chance.randrange(_USERS - 200)
        await report(range(first, first + 200))
    latencies: list[float] = []
    began = now = time.perf_counter()
    cpu = time.process_time()
    while now < began + seconds:
        first = chance.randrange(_USERS - lines)
        await report(range(first, first + lines))
        before, now = now, time.perf_counter()
        latencies.append(now - before)
    cpu = time.process_time() - cpu
    # The leases expire; the shares remain, as in a running fleet.
    await ledger.close()
    await database.close()
    return Run(now - began, cpu, latencies)


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


def _cpu(servers: Servers) -> Cpu:
    """An exited backend counts with its parent. Every process that is not a known writer counts as a backend."""
    family = {servers.postgres: 0}
    cpu: dict[int, float] = {}
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid], cpu[pid] = int(fields[1]), sum(map(int, fields[11:15])) / _TICKS
    while more := {pid: 0 for pid, parent in parents.items() if parent in family and pid not in family}:
        family |= more
    writers = sum(cpu[pid] for pid in family if _is_writer(pid))
    everybody = sum(cpu.get(pid, 0.0) for pid in family)
    return Cpu(everybody - writers, writers, cpu.get(servers.redis or 0, 0.0))


def _is_writer(pid: int) -> bool:
    with contextlib.suppress(OSError):
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
        return any(role in title for role in _WRITERS)
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
