"""keyproxy in other regimes: with two workers, and for long bodies.

Run as `python -m bench.regimes [workers] [bodies]`; without a name, both.
Measures the installed peers too, and the compiled build if it exists (`make compiled`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import load, traffic
from bench.peers import PATH, Peer, family, free_port, nginx_upstream, peers
from bench.site import Site, machine, site

_SIZES = {"16 KiB": 16_384, "1 MiB": 1_048_576}
_MIB = 1_048_576


class Stage:
    """Shared by all regimes: a site, its key, keyproxy's builds and the installed peers."""

    def __init__(self, ours: Site, options: argparse.Namespace) -> None:
        self.site = ours
        self.options = options
        self.secret = ours.keys(1)[0]
        envoy = next(Path(options.envoy).glob("lib/python*/site-packages/envoy/_bin/envoy"), Path("/nonexistent"))
        self.peers = {one.name: one for one in peers(ours.home, ours.upstream, [self.secret], envoy) if not one.missing}
        self.builds = {"keyproxy": sys.executable}
        compiled = (Path(options.compiled) / "bin" / "python").absolute()
        if compiled.exists():
            self.builds["keyproxy, compiled"] = str(compiled)

    def ours(self) -> list[Peer]:
        """keyproxy's builds as peers."""
        return [Peer(name, "", self._serving(python)) for name, python in self.builds.items()]

    def chosen(self, *names: str) -> list[Peer]:
        """keyproxy's builds, and those of these peers that are installed."""
        return [*(self.peers[name] for name in names if name in self.peers), *self.ours()]

    def script(self, peer: Peer, method: str = "POST", body_bytes: int = 90, *, to: str = PATH) -> Path:
        """What wrk is to send."""
        path, header = self.site.home / "one.lua", peer.scheme + self.secret
        return traffic.repeated(path, header=header, to=to, method=method, body="x" * body_bytes)

    def _serving(self, python: str) -> Callable[[int], contextlib.AbstractContextManager[list[int]]]:
        return lambda port: self.site.serving(port, python=python)


@contextlib.contextmanager
def started(chosen: Sequence[Peer]) -> Iterator[list[tuple[Peer, int, list[int]]]]:
    """Start all of them: (peer, port, processes)."""
    with contextlib.ExitStack() as stack:
        ports = [free_port() for _ in chosen]
        yield [(peer, port, stack.enter_context(peer.start(port))) for peer, port in zip(chosen, ports, strict=True)]


def workers(stage: Stage) -> None:
    """CPU per request with one worker and with two."""
    print("\nworkers                        µs CPU   req/s   all processes")
    for name, python in stage.builds.items():
        runs: dict[int, list[load.Result]] = {1: [], 2: []}
        with contextlib.ExitStack() as stack:
            ports = {number: free_port() for number in runs}
            first = {
                number: stack.enter_context(stage.site.serving(port, python=python, listen=f"workers = {number}"))[0]
                for number, port in ports.items()
            }
            for _ in range(stage.options.rounds):
                for number, port in ports.items():
                    url, script = f"http://127.0.0.1:{port}", stage.script(stage.ours()[0])
                    pids = family(first[number])  # list the processes now: all workers have started
                    runs[number].append(load.run(url, script, pids, seconds=stage.options.seconds))
        cpu = {number: statistics.median(one.cpu_microseconds for one in those) for number, those in runs.items()}
        for number, those in runs.items():
            rate = statistics.median(one.per_second for one in those)
            print(f"  {name:<20} {number}  {cpu[number]:8.1f} {rate:7.0f}  {cpu[number] / cpu[1]:5.2f} x")


def bodies(stage: Stage) -> None:
    """CPU per MiB relayed, both ways."""
    files = stage.site.home / "files"
    files.mkdir(exist_ok=True)
    print("\nµs CPU per MiB relayed          down 16 KiB  down 1 MiB   up 16 KiB    up 1 MiB")
    with started(stage.chosen("nginx bare")) as running:
        found: dict[tuple[str, str, str], list[float]] = {}
        for _ in range(stage.options.rounds):
            for size, length in _SIZES.items():
                (files / f"{length}.bin").write_bytes(b"x" * length)
                for peer, port, pids in running:
                    ways = (("down", "GET", f"/files/{length}.bin", 0), ("up", "POST", PATH, length))
                    for way, method, path, body in ways:
                        script = stage.script(peer, method, body, to=path)
                        url = f"http://127.0.0.1:{port}"
                        run = load.run(url, script, pids, seconds=stage.options.seconds, connections=8)
                        if run.refused:
                            raise RuntimeError(f"{peer.name} refused {run.refused} requests")
                        found.setdefault((peer.name, way, size), []).append(run.cpu_microseconds * _MIB / length)
        for peer, *_ in running:
            cells = [statistics.median(found[peer.name, way, size]) for way in ("down", "up") for size in _SIZES]
            print(f"  {peer.name:<24}" + "".join(f"{cell:12.0f}" for cell in cells))


REGIMES = {"workers": workers, "bodies": bodies}


def main(arguments: Sequence[str]) -> int:
    """Measure the selected regimes."""
    parser = argparse.ArgumentParser(prog="python -m bench.regimes", description=__doc__)
    parser.add_argument("regimes", nargs="*", choices=[*REGIMES, []], help="which of them")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--envoy", default=".venv-bench")
    parser.add_argument("--compiled", default=".venv-compiled")
    options = parser.parse_args(arguments)
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}")
    with tempfile.TemporaryDirectory(prefix="kpb-", dir="/tmp") as directory, contextlib.ExitStack() as stack:
        home, upstream = Path(directory), free_port()
        stack.enter_context(nginx_upstream(home, upstream))
        stage = Stage(stack.enter_context(site(home, upstream)), options)
        for name in options.regimes or REGIMES:
            REGIMES[name](stage)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
