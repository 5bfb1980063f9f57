"""Latency at a fixed rate (open loop), with varied requests: of each proxy, and what it adds to the upstream's."""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Sequence

from bench import paced
from bench.peers import PATH, Peer, free_port
from bench.tables import print_table

_REQUESTS = 5_000
_POINTS = (0.5, 0.99, 0.999)
DIRECT = "the upstream, directly"


def latencies(
    upstream: int, servers: Sequence[Peer], secrets: Sequence[str], *, rate: int, seconds: float, rounds: int
) -> dict[str, list[list[float]]]:
    """By server, for each round, milliseconds at p50, p99 and p99.9. Prints the table."""
    found: dict[str, list[list[float]]] = {DIRECT: [], **{server.name: [] for server in servers}}
    with contextlib.ExitStack() as stack:
        ports = {DIRECT: upstream}
        for server in servers:
            ports[server.name] = free_port()
            stack.enter_context(server.start(ports[server.name]))
        sent = {server.name: _requests(server.scheme, secrets) for server in servers}
        sent[DIRECT] = _requests("X-Key: ", secrets)
        for _ in range(rounds):
            for name, port in ports.items():
                taken = paced.latencies(port, sent[name], per_second=rate, seconds=seconds)
                found[name].append([taken[int(len(taken) * point)] * 1e3 for point in _POINTS])
    rows = []
    for name in found:
        middles = [statistics.median(column) for column in zip(*found[name], strict=True)]
        added = [statistics.median(differences(found, name, DIRECT, place)) for place in range(len(_POINTS))]
        rows.append(
            [name, *(f"{one:.2f}" for one in middles), *("" if name == DIRECT else f"{one:.2f}" for one in added)]
        )
    headings = [f"{rate:,} requests/s, open loop", "p50 ms", "p99 ms", "p99.9 ms", "added: p50", "p99", "p99.9"]
    print_table(headings, rows)
    return found


def differences(found: dict[str, list[list[float]]], name: str, base: str, place: int) -> list[float]:
    """Milliseconds of one over another by round. `place`: 0 is p50, 1 is p99, 2 is p99.9."""
    return [one[place] - other[place] for one, other in zip(found[name], found[base], strict=True)]


def _requests(scheme: str, secrets: Sequence[str]) -> list[bytes]:
    rng = random.Random(20_261_126)
    made = []
    for _ in range(_REQUESTS):
        body = "x" * rng.randint(20, 400)
        made.append(
            (
                f"POST {PATH}/{rng.getrandbits(64):016x} HTTP/1.1\r\nHost: 127.0.0.1\r\n{scheme}{rng.choice(secrets)}\r\n"
                f"Content-Type: application/json\r\nUser-Agent: python-requests/2.32\r\nAccept: */*\r\n"
                f"traceparent: 00-{rng.getrandbits(128):032x}-{rng.getrandbits(64):016x}-01\r\n"
                f"X-Request-Id: {rng.getrandbits(64):016x}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            ).encode()
        )
    return made
