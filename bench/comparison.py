"""Rows of traffic to servers, measured in turn, and their table.

In each round every row has its turn; a ratio or a difference is the median of those within a round, so that a machine
whose speed drifts does not distort it.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import load
from bench.load import Result
from bench.peers import Peer, family, free_port
from bench.tables import print_table


@dataclass(frozen=True)
class Row:
    """Traffic to a server. `script` writes wrk's script to a path. `base`: the row that this one is compared with.

    `warm_seconds`: unmeasured load before each turn. Leases of users that were not active are given back within seconds,
    so traffic under limits needs some to reach its usual state.
    """

    name: str
    server: Peer
    script: Callable[[Path], Path]
    base: str = ""
    warm_seconds: int = 0


@dataclass(frozen=True)
class Comparison:
    """The results of all rounds by row."""

    rows: Sequence[Row]
    runs: dict[str, list[Result]]

    def ratios(self, name: str, other: str) -> list[float]:
        """The CPU of a row relative to another's, by round."""
        pairs = zip(self.runs[name], self.runs[other], strict=True)
        return [one.cpu_microseconds / max(two.cpu_microseconds, 1e-9) for one, two in pairs]

    def differences(self, name: str, base: str) -> list[float]:
        """The microseconds of CPU of a row over another's, by round."""
        pairs = zip(self.runs[name], self.runs[base], strict=True)
        return [one.cpu_microseconds - two.cpu_microseconds for one, two in pairs]

    def print(self, *ours: str) -> None:
        """Print the table, with the ratios of `ours` to the rows that have no base."""
        headings = ["no two requests alike", "µs CPU", "of it user", "requests/s", "p50 ms", "p99 ms"]
        headings += [f"{name} / this" for name in ours] + ["µs over the row without"]
        table = []
        for row in self.rows:
            runs = self.runs[row.name]
            middles = [_middle(runs, name) for name in ("cpu_microseconds", "user_share", "per_second")]
            times = [f"{_middle(runs, name):.2f}" for name in ("p50_milliseconds", "p99_milliseconds")]
            ratios = [
                _spread(self.ratios(name, row.name)) if name in self.runs and not row.base else "" for name in ours
            ]
            added = _spread(self.differences(row.name, row.base)) if row.base in self.runs else ""
            table.append(
                [row.name, f"{middles[0]:.1f}", f"{middles[1]:.0%}", f"{middles[2]:,.0f}", *times, *ratios, added]
            )
        print_table(headings, table)


def compare(home: Path, rows: Sequence[Row], *, seconds: int, rounds: int) -> Comparison:
    """Measure rows in turn, `seconds` each. Servers that are not installed are reported and left out."""
    for server in {row.server.name: row.server for row in rows if row.server.missing}.values():
        print(f"{server.name} is left out: {server.missing} is not installed")
    rows = [row for row in rows if not row.server.missing]
    runs: dict[str, list[Result]] = {row.name: [] for row in rows}
    with contextlib.ExitStack() as stack:
        ports: dict[str, int] = {}
        pids: dict[str, int] = {}
        for server in {row.server.name: row.server for row in rows}.values():
            ports[server.name] = free_port()
            pids[server.name] = stack.enter_context(server.start(ports[server.name]))[0]
        scripts = {row.name: row.script(home / f"row-{number}.lua") for number, row in enumerate(rows)}
        for number in load.rounds(rounds):
            for row in rows:
                result = load.run(
                    f"http://127.0.0.1:{ports[row.server.name]}",
                    scripts[row.name],
                    # List the processes now: a worker may have started after its parent began to listen.
                    family(pids[row.server.name]),
                    seconds=seconds,
                    warm_seconds=row.warm_seconds or (number == 1),
                )
                if result.refused:
                    print(f"{row.name} refused {result.refused} of {result.requests} requests", file=sys.stderr)
                runs[row.name].append(result)
    return Comparison(rows, runs)


def _middle(runs: Sequence[Result], attribute: str) -> float:
    return float(statistics.median(getattr(run, attribute) for run in runs))


def _spread(values: Sequence[float]) -> str:
    """The median, and the quartiles."""
    if len(values) < 4:
        return f"{statistics.median(values):.2f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
