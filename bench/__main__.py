"""`make bench`: the cost of a request through keyproxy and other proxies, measured in one run.

All proxy the same nginx with one worker each. wrk loads them in turn, several times, over 32 keep-alive connections on
which no two requests are alike (bench.traffic). Then latency at a fixed rate, misses, streams, memory, and the limits
that all of these are compared with.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bench import memory, rows
from bench.comparison import Comparison, compare
from bench.goals import Goal, print_goals
from bench.latency import differences, latencies
from bench.misses import MISS, REMEMBERED, UNKNOWN, misses
from bench.peers import Peer, free_port, nginx_upstream, peers
from bench.rows import COMPILED, OURS
from bench.site import Site, machine, site
from bench.streams import LIMITED, streams

_RATE = 2_000

#: Bytes in a KiB; the milliseconds that the tail may be above HAProxy's.
_KIB = 1_024
_P99, _P999 = 1, 2


def main(arguments: Sequence[str]) -> int:
    """Run the measurements and print their tables. Returns 0 if wrk and nginx are installed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--seconds", type=int, default=2, help="of load per row and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="names of rows, separated by semicolons: no other table is printed")
    parser.add_argument("--pure", action="store_true", help="all rows of the pure build too, not only the main ones")
    parser.add_argument("--envoy", default=".venv-bench", help="the environment that Envoy is installed in")
    parser.add_argument("--compiled", default=".venv-compiled", help="the environment of the compiled build")
    options = parser.parse_args(arguments)
    if not shutil.which("wrk") or not shutil.which("nginx"):
        print("wrk and nginx are needed: make bench-setup", file=sys.stderr)
        return 1
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}")
    python = (Path(options.compiled) / "bin" / "python").absolute()
    missing = "" if python.exists() else f"{options.compiled} (make compiled)"
    builds = {OURS: (sys.executable, ""), COMPILED: (str(python), missing)}
    with tempfile.TemporaryDirectory(prefix="kpb-", dir="/tmp") as directory, contextlib.ExitStack() as stack:
        home, upstream = Path(directory), free_port()
        stack.enter_context(nginx_upstream(home, upstream))
        ours = stack.enter_context(site(home, upstream))
        compared = _compare(ours, builds, options)
        if not options.only:
            print_goals([*_cpu_goals(compared), *_other_goals(ours, str(python) if not missing else "", options)])
    return 0


def _compare(ours: Site, builds: dict[str, tuple[str, str]], options: argparse.Namespace) -> Comparison:
    wanted = {name.strip() for name in options.only.split(";") if name.strip()}
    chosen = []
    for row in rows.everything(ours, builds, _envoy(options)):
        is_ours_in_part = row.name.startswith(OURS) and not row.name.startswith(COMPILED) and not options.pure
        is_left_out = is_ours_in_part and row.name not in {OURS, OURS + rows.WINDOWS, OURS + rows.REPEATED}
        if row.name in wanted if wanted else not is_left_out:
            chosen.append(row)
    compared = compare(ours.home, chosen, seconds=options.seconds, rounds=options.rounds)
    compared.print(OURS, COMPILED)
    return compared


def _cpu_goals(compared: Comparison) -> list[Goal]:
    """The limits of the CPU of a request, relative to peers and to requests without the feature."""

    def median(of: Callable[[str, str], list[float]], one: str, other: str) -> float | None:
        return statistics.median(of(one, other)) if one in compared.runs and other in compared.runs else None

    ratio, added = compared.ratios, compared.differences
    chat, plain = COMPILED + rows.CHAT, COMPILED
    return [
        Goal("compiled, CPU / Envoy's", 0.65, "", median(ratio, COMPILED, "Envoy")),
        Goal("compiled, CPU / nginx + Lua's", 1.25, "", median(ratio, COMPILED, "nginx + Lua")),
        Goal("pure, CPU / Envoy's", 1.0, "", median(ratio, OURS, "Envoy")),
        Goal("compiled, windows on key, user and tenant", 3.0, "µs", median(added, plain + rows.WINDOWS, plain)),
        Goal("compiled, metered chat under limits", 12.0, "µs", median(added, plain + rows.METERED_CHAT, chat)),
        Goal("compiled, acting for a user", 1.0, "µs", median(added, plain + rows.ACTING, plain)),
        Goal("compiled, agent token", 1.0, "µs", median(added, plain + rows.TOKEN, plain)),
        Goal("compiled, assertion", 0.5, "µs", median(added, plain + rows.ASSERTION, plain)),
    ]


def _other_goals(ours: Site, compiled: str, options: argparse.Namespace) -> list[Goal]:
    """The limits of latency, misses, streams and memory. `compiled`: that build's Python; empty: the pure build's."""
    python = compiled or sys.executable
    secrets = ours.keys(1_000)
    installed = {one.name: one for one in peers(ours.home, ours.upstream, secrets, _envoy(options)) if not one.missing}
    build = Peer(COMPILED if compiled else OURS, "", lambda port: ours.serving(port, python=python))
    servers = [*(installed[name] for name in ("HAProxy", "Envoy") if name in installed), build]
    if compiled:
        servers.append(replace(build, name=OURS, start=ours.serving))
    taken = latencies(ours.upstream, servers, secrets, rate=_RATE, seconds=6.0, rounds=5)
    tails: list[float | None] = [
        statistics.median(differences(taken, build.name, "HAProxy", place)) if "HAProxy" in taken else None
        for place in (_P99, _P999)
    ]
    missed = misses(ours, python, keys=20_000)
    ratios = streams(ours, {build.name: python}, seconds=2, rounds=4)
    idle = memory.idle_connections(servers, secrets[0])
    key, user = memory.per_key(python, 50_000), memory.per_user(python, 15_000)
    print(f"\nmemory per cached key {key:.0f} bytes, per active user under limits {user:.0f} bytes more")
    return [
        Goal(f"p99 at {_RATE}/s, over HAProxy's", 0.2, "ms", tails[0]),
        Goal(f"p99.9 at {_RATE}/s, over HAProxy's", 2.0, "ms", tails[1]),
        Goal("cold miss", 250, "µs", missed[MISS].cpu_microseconds),
        Goal("unknown key, refused", 120, "µs", missed[UNKNOWN].cpu_microseconds),
        Goal("unknown key, remembered, refused", 40, "µs", missed[REMEMBERED].cpu_microseconds),
        Goal("stream with usage under limits / relayed", 1.1, "", ratios[build.name, LIMITED]),
        Goal("memory per cached key", 1.2 * _KIB, "bytes", key),
        Goal("memory per idle connection", 2 * _KIB, "bytes", idle[build.name]),
        Goal("memory per active user under limits", 3 * _KIB, "bytes", user),
    ]


def _envoy(options: argparse.Namespace) -> Path:
    return next(Path(options.envoy).glob("lib/python*/site-packages/envoy/_bin/envoy"), Path("/nonexistent"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
