"""Streams of events as a chat completion sends them: relayed, with their usage read, and read under limits."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Mapping

from bench import load, traffic
from bench.events import EVENTS
from bench.peers import free_port, running
from bench.site import Site
from bench.tables import print_table

RELAYED = "relayed"
READ = "usage read"
LIMITED = "usage read, under limits"

_BODY = '{"model":"gpt-4o","stream":true,"max_tokens":400,"messages":[{"role":"user","content":"What does it cost?"}]}'


def streams(ours: Site, builds: Mapping[str, str], *, seconds: int, rounds: int) -> dict[tuple[str, str], float]:
    """By build and kind, the CPU of a stream relative to that of one that is only relayed. Prints the table."""
    plain, limited = ours.keys(1)[0], ours.keys(1, limited=True)[0]
    kinds = {RELAYED: ("plain", plain), READ: ("metered", plain), LIMITED: ("metered", limited)}
    ratios, rows = {}, []
    upstream = free_port()
    with contextlib.ExitStack() as stack:
        log = ours.home / "events.log"
        stack.enter_context(running([sys.executable, "-m", "bench.events", str(upstream)], upstream, log))
        for name, python in builds.items():
            port = free_port()
            pids = stack.enter_context(ours.serving(port, python=python, upstream=upstream))
            runs: dict[str, list[load.Result]] = {kind: [] for kind in kinds}
            for _ in range(rounds):
                for kind, (path, secret) in kinds.items():
                    script = traffic.repeated(
                        ours.home / "stream.lua",
                        header=traffic.API_KEY + secret,
                        to=f"/v1/ai/streams/{path}",
                        body=_BODY,
                    )
                    url = f"http://127.0.0.1:{port}"
                    # The first streams under limits open leases.
                    run = load.run(url, script, pids, seconds=seconds, connections=16, warm_seconds=1)
                    if run.refused:
                        raise RuntimeError(f"{name} refused {kind} streams")
                    runs[kind].append(run)
            for kind, those in runs.items():
                pairs = zip(those, runs[RELAYED], strict=True)
                ratios[name, kind] = statistics.median(
                    one.cpu_microseconds / two.cpu_microseconds for one, two in pairs
                )
                cpu = statistics.median(run.cpu_microseconds for run in those)
                rate = statistics.median(run.per_second for run in those)
                rows.append([f"{name}, {kind}", f"{cpu:,.0f}", f"{rate:,.0f}", f"{ratios[name, kind]:.2f}"])
    print_table([f"streams of {EVENTS} events", "µs CPU", "streams/s", "/ relayed"], rows)
    return ratios
