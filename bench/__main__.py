"""`make bench`: CPU per request of keyproxy and other proxies, measured in one run.

All peers proxy the same nginx and get the same load from wrk (keep-alive, a JSON POST of 90 bytes with a key), with one
worker each, in turn and several times. Figures are medians over the rounds; a ratio is the median of the rounds'
ratios, so that a machine whose speed drifts does not distort it.
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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench import load
from bench.load import Result
from bench.peers import METERED_BODY, METERED_PATH, PATH, Peer, family, free_port, nginx_upstream, peers
from bench.site import Site, machine, site
from keyproxy.auth.api_key import KeyFormat

_OURS = "keyproxy"
_COMPILED = "keyproxy, compiled"


def main(arguments: Sequence[str]) -> int:
    """Run the comparison and print its tables. Returns 0 if wrk is installed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of load per peer and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="names of peers, separated by commas")
    parser.add_argument("--envoy", default=".venv-bench", help="the environment that Envoy is installed in")
    parser.add_argument("--compiled", default=".venv-compiled", help="the environment of the compiled build")
    parser.add_argument("--limits", action="store_true", help="also with requests under limits")
    parser.add_argument("--delegation", action="store_true", help="also acting for a user, agent tokens, assertions")
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


def compare(ours: Site, options: argparse.Namespace) -> None:
    """The table of all peers."""
    secret = ours.keys(1)[0]
    envoy = next(Path(options.envoy).glob("lib/python*/site-packages/envoy/_bin/envoy"), Path("/nonexistent"))
    wanted = {name.strip() for name in options.only.split(",") if name.strip()}
    everyone = [
        *peers(ours.home, ours.upstream, secret, envoy),
        *_builds(ours, options),
    ]
    always = {peer.name for peer in everyone if peer.name.startswith(_OURS)}
    chosen = [peer for peer in everyone if not peer.missing and (not wanted or peer.name in wanted | always)]
    for peer in everyone:
        if peer.missing:
            print(f"{peer.name} is left out: {peer.missing} is not installed")
    results: dict[str, list[Result]] = {peer.name: [] for peer in chosen}
    with contextlib.ExitStack() as stack:
        ports = {peer.name: free_port() for peer in chosen}
        pids = {peer.name: stack.enter_context(peer.start(ports[peer.name])) for peer in chosen}
        scripts = {
            peer.name: load.script(ours.home / f"{number}.lua", header=peer.header.format(key=secret), body=peer.body)
            for number, peer in enumerate(chosen)
        }
        for number in load.rounds(options.rounds):
            for peer in chosen:
                url = f"http://127.0.0.1:{ports[peer.name]}{peer.path}"
                warm = 1.0 if number == 1 else 0.0
                # List the processes now: a worker may have started after its parent began to listen.
                measured = family(pids[peer.name][0])
                result = load.run(url, scripts[peer.name], measured, seconds=options.seconds, warm_seconds=warm)
                if result.refused:
                    print(f"{peer.name} refused {result.refused} requests", file=sys.stderr)
                results[peer.name].append(result)
    _print(results)


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
        lua = load.script(ours.home / "many.lua", header="", keys=keys)
        with ours.serving(port, cache=cache) as pids:
            warm = options.seconds * 4 if is_warmed else 1.0
            result = load.run(f"http://127.0.0.1:{port}{PATH}", lua, pids, seconds=options.seconds, warm_seconds=warm)
            rows.append((name, result))
    print("\na new key in every request              µs CPU   req/s  p50 ms  p99 ms  peak MiB")
    for name, result in rows:
        print(
            f"  {name:<36} {result.cpu_microseconds:7.1f} {result.per_second:7.0f} {result.p50_milliseconds:7.2f}"
            f" {result.p99_milliseconds:7.2f} {result.peak_mib:9.1f}"
        )


def _builds(ours: Site, options: argparse.Namespace) -> list[Peer]:
    """Both builds; with --limits each again, with windows on the key, the user and the tenant."""
    python = Path(options.compiled) / "bin" / "python"
    missing = "" if python.exists() else f"{options.compiled} (make compiled)"
    builds = [
        Peer(_OURS, "", ours.serving),
        Peer(_COMPILED, missing, lambda port: ours.serving(port, python=str(python.absolute()))),
    ]
    return [*builds, *_with_limits(ours, builds, options), *_delegated(ours, python, missing, options)]


def _with_limits(ours: Site, builds: Sequence[Peer], options: argparse.Namespace) -> list[Peer]:
    if not options.limits:
        return []
    header = f"Authorization: Api-Key {ours.limited_key()}"
    windows = [replace(build, name=f"{build.name}, windows", header=header) for build in builds]
    return [
        *windows,
        *(replace(one, name=f"{one.name}, tokens", path=METERED_PATH, body=METERED_BODY) for one in windows),
    ]


def _delegated(ours: Site, python: Path, missing: str, options: argparse.Namespace) -> list[Peer]:
    """Both builds with a key that acts for a user, with an agent token, and each and a plain key with assertions."""
    if not options.delegation:
        return []
    secret, token = ours.delegation()
    headers = {
        "": "Authorization: Api-Key {key}",
        ", acting": f"Authorization: Api-Key {secret}\nX-Keyproxy-Act-For: u_alice",
        ", agent token": f"Authorization: Bearer {token}",
    }
    found = []
    for build, program, absent in ((_OURS, sys.executable, ""), (_COMPILED, str(python.absolute()), missing)):
        for access, signed in (("", ""), ("assertion = true", ", assertion")):
            start = functools.partial(ours.serving, python=program, access=access)
            found += [
                Peer(f"{build}{kind}{signed}", absent, start, header)
                for kind, header in headers.items()
                if kind or signed
            ]
    return found


def _ratio(mine: Sequence[Result], others: Sequence[Result]) -> str:
    """keyproxy's CPU relative to a peer's by round: the median and the range."""
    pairs = zip(mine, others, strict=True)
    ratios = [one.cpu_microseconds / max(other.cpu_microseconds, 1e-9) for one, other in pairs]
    return f"{statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _print(results: dict[str, list[Result]]) -> None:
    print(
        "\none known key                          µs CPU   user   req/s  p50 ms  p99 ms  peak MiB"
        "  keyproxy / it          compiled / it"
    )
    for name, runs in results.items():

        def middle(attribute: str, of: Sequence[Result] = runs) -> float:
            return float(statistics.median(getattr(run, attribute) for run in of))

        print(
            f"  {name:<34} {middle('cpu_microseconds'):7.1f} {middle('user_share'):6.0%} {middle('per_second'):7.0f}"
            f" {middle('p50_milliseconds'):7.2f} {middle('p99_milliseconds'):7.2f} {middle('peak_mib'):9.1f}"
            f"  {_ratio(results[_OURS], runs)}  {_ratio(results[_COMPILED], runs) if _COMPILED in results else ''}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
