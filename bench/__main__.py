"""`make bench`: CPU per request of keyproxy and other proxies, measured in one run.

All peers proxy the same nginx and get the same load from wrk, with one worker each, in turn and several times: 32
keep-alive connections on which no two requests are alike (bench.traffic). Figures are medians over the rounds; a ratio or
a difference is the median of those within a round, so that a machine whose speed drifts does not distort it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import load, traffic
from bench.load import Result
from bench.peers import CHAT_PATH, METERED_CHAT_PATH, PATH, Peer, family, free_port, nginx_upstream, peers
from bench.site import Site, machine, site
from keyproxy.auth.api_key import KeyFormat

_OURS = "keyproxy"
_COMPILED = "keyproxy, compiled"
_KEYS = 1_000


def main(arguments: Sequence[str]) -> int:
    """Run the comparison and print its tables. Returns 0 if wrk is installed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--seconds", type=int, default=1, help="of load per row and round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="names of rows, separated by semicolons")
    parser.add_argument("--envoy", default=".venv-bench", help="the environment that Envoy is installed in")
    parser.add_argument("--compiled", default=".venv-compiled", help="the environment of the compiled build")
    parser.add_argument("--keys", type=int, default=20_000, help="for the table of misses")
    options = parser.parse_args(arguments)
    if not shutil.which("wrk") or not shutil.which("nginx"):
        print("wrk and nginx are needed: make bench-setup", file=sys.stderr)
        return 1
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}")
    with tempfile.TemporaryDirectory(prefix="kpb-", dir="/tmp") as directory, contextlib.ExitStack() as stack:
        home, upstream = Path(directory), free_port()
        stack.enter_context(nginx_upstream(home, upstream))
        ours = stack.enter_context(site(home, upstream))
        compare(ours, options)
        misses(ours, options)
    return 0


@dataclass(frozen=True)
class Row:
    """Traffic to a server. `base`: the row that it is compared with in the last column, besides keyproxy's."""

    name: str
    server: Peer
    script: Callable[[Path], Path]
    base: str = ""


def compare(ours: Site, options: argparse.Namespace) -> dict[str, list[Result]]:
    """Measure all rows and print the table."""
    wanted = {name.strip() for name in options.only.split(";") if name.strip()}
    rows = [row for row in _rows(ours, options) if not wanted or row.name in wanted | {_OURS, _COMPILED}]
    for name in {row.server.name: row.server for row in rows if row.server.missing}.values():
        print(f"{name.name} is left out: {name.missing} is not installed")
    rows = [row for row in rows if not row.server.missing]
    results: dict[str, list[Result]] = {row.name: [] for row in rows}
    with contextlib.ExitStack() as stack:
        started: dict[str, tuple[int, list[int]]] = {}
        for row in rows:
            if row.server.name not in started:
                port = free_port()
                started[row.server.name] = port, stack.enter_context(row.server.start(port))
        scripts = {row.name: row.script(ours.home / f"row-{number}.lua") for number, row in enumerate(rows)}
        for number in load.rounds(options.rounds):
            for row in rows:
                port, pids = started[row.server.name]
                # List the processes now: a worker may have started after its parent began to listen.
                measured = family(pids[0])
                result = load.run(
                    f"http://127.0.0.1:{port}", scripts[row.name], measured,
                    seconds=options.seconds, warm_seconds=1 if number == 1 else 0,
                )  # fmt: skip
                if result.refused:
                    print(f"{row.name} refused {result.refused} of {result.requests} requests", file=sys.stderr)
                results[row.name].append(result)
    _print(results, rows)
    return results


def _rows(ours: Site, options: argparse.Namespace) -> list[Row]:
    """Everything that is measured, in the order of the table."""
    envoy = next(Path(options.envoy).glob("lib/python*/site-packages/envoy/_bin/envoy"), Path("/nonexistent"))
    secrets = ours.keys(_KEYS)
    known, limited = _file(ours, "known", secrets), _file(ours, "limited", ours.keys(_KEYS, limited=True))
    secret, users, tokens = ours.delegated(_KEYS)
    acting = _file(ours, "acting", [f"{secret}\tX-Keyproxy-Act-For: {user}" for user in users])
    delegated = _file(ours, "tokens", tokens)
    jobs = functools.partial(traffic.varied, credentials=known, to=PATH)
    rows = [
        Row(peer.name, peer, functools.partial(jobs, scheme=peer.scheme))
        for peer in peers(ours.home, ours.upstream, secrets, envoy)
    ]
    python = Path(options.compiled) / "bin" / "python"
    missing = "" if python.exists() else f"{options.compiled} (make compiled)"
    for name, program, absent in ((_OURS, sys.executable, ""), (_COMPILED, str(python.absolute()), missing)):
        server = Peer(name, absent, functools.partial(ours.serving, python=program))
        signed = functools.partial(ours.serving, python=program, access="assertion = true")
        signing = Peer(f"{name}, assertion", absent, signed)
        unlogged = functools.partial(ours.serving, python=program, log='access = "refusals"')
        header = f"Authorization: Api-Key {secrets[0]}\nUser-Agent: python-requests/2.32\nAccept: */*"
        chat = functools.partial(traffic.varied, body=traffic.CHAT, has_id=False)
        rows += [
            Row(name, server, jobs),
            Row(f"{name}, windows", server, functools.partial(jobs, credentials=limited), name),
            Row(f"{name}, acting for a user", server, functools.partial(jobs, credentials=acting), name),
            Row(
                f"{name}, agent token", server,
                functools.partial(jobs, credentials=delegated, scheme="Authorization: Bearer "), name,
            ),
            Row(f"{name}, assertion", signing, jobs, name),
            Row(f"{name}, chat", server, functools.partial(chat, credentials=known, to=CHAT_PATH), name),
            Row(
                f"{name}, chat, metered under limits", server,
                functools.partial(chat, credentials=limited, to=METERED_CHAT_PATH), f"{name}, chat",
            ),
            Row(f"{name}, logs refusals only", Peer(f"{name}, refusals", absent, unlogged), jobs, name),
            Row(f"{name}, best case: one request repeated", server, functools.partial(_repeated, header=header), name),
        ]  # fmt: skip
    return rows


def _repeated(path: Path, *, header: str) -> Path:
    return traffic.repeated(path, header=header, to=PATH)


def _file(ours: Site, name: str, lines: Sequence[str]) -> Path:
    path = ours.home / f"{name}.txt"
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return path


def misses(ours: Site, options: argparse.Namespace) -> None:
    """The table of costs that a known key avoids: a first lookup, and the refusal of an unknown key."""
    rows = []
    known = ours.home / "known.txt"
    known.write_text("\n".join(ours.keys(options.keys)) + "\n", encoding="ascii")
    strangers = ours.home / "strangers.txt"
    formats = KeyFormat()
    made = (formats.make(number.to_bytes(32, "big"), is_test=False).reveal() for number in range(1, 200_000))
    strangers.write_bytes(b"\n".join(made) + b"\n")
    cases = {
        "known key": (known, 'fresh_seconds = 600.0', True),
        "cold miss": (known, "fresh_seconds = 600.0\nentries_max = 1", False),
        "unknown key": (strangers, "unknown_entries_max = 1", False),
        "unknown key, remembered": (strangers, "unknown_seconds = 600.0\nunknown_entries_max = 1000000", True),
    }  # fmt: skip
    for name, (keys, cache, is_warmed) in cases.items():
        port = free_port()
        lua = traffic.varied(ours.home / "many.lua", keys, to=PATH, in_order=True)
        with ours.serving(port, cache=cache) as pids:
            warm = 8 if is_warmed else 1
            result = load.run(f"http://127.0.0.1:{port}", lua, pids, seconds=3, warm_seconds=warm)
            rows.append((name, result))
    print("\na new key in every request              µs CPU   req/s  p50 ms  p99 ms  peak MiB")
    for name, result in rows:
        print(
            f"  {name:<36} {result.cpu_microseconds:7.1f} {result.per_second:7.0f} {result.p50_milliseconds:7.2f}"
            f" {result.p99_milliseconds:7.2f} {result.peak_mib:9.1f}"
        )


def _ratios(mine: Sequence[Result], others: Sequence[Result]) -> str:
    """Our CPU relative to another's by round: the median and the quartiles."""
    pairs = zip(mine, others, strict=True)
    return _spread([one.cpu_microseconds / max(other.cpu_microseconds, 1e-9) for one, other in pairs])


def _spread(values: Sequence[float]) -> str:
    if len(values) < 4:
        return f"{statistics.median(values):6.2f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:6.2f} ({low:.2f} to {high:.2f})"


def _print(results: dict[str, list[Result]], rows: Sequence[Row]) -> None:
    print(
        "\nno two requests alike                            µs CPU   user   req/s  p50 ms  p99 ms"
        "   keyproxy / it          compiled / it         µs over its base"
    )
    for row in rows:
        runs = results[row.name]

        def middle(attribute: str, of: Sequence[Result] = runs) -> float:
            return float(statistics.median(getattr(run, attribute) for run in of))

        ratios = [
            _ratios(results[name], runs) if name in results and not row.base else "" for name in (_OURS, _COMPILED)
        ]
        added = ""
        if row.base in results:
            pairs = zip(runs, results[row.base], strict=True)
            added = _spread([one.cpu_microseconds - other.cpu_microseconds for one, other in pairs])
        print(
            f"  {row.name:<46} {middle('cpu_microseconds'):6.1f} {middle('user_share'):6.0%} {middle('per_second'):7.0f}"
            f" {middle('p50_milliseconds'):7.2f} {middle('p99_milliseconds'):7.2f}"
            f"  {ratios[0]:<22} {ratios[1]:<22} {added}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
