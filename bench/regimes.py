"""keyproxy in other regimes: at a fixed rate, with two workers, for long bodies, for metered streams, and in memory.

Run as `python -m bench.regimes [latency] [workers] [streaming] [metered] [memory]`; without a name, all of them.
Measures the installed peers too, and the compiled build if it exists (`make compiled`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import load, paced, traffic
from bench.events import EVENTS
from bench.peers import PATH, Peer, family, free_port, nginx_upstream, peers, running
from bench.site import Site, machine, site

_SHARES = (0.3, 0.7)
_SIZES = {"16 KiB": 16_384, "1 MiB": 1_048_576}
_IDLE_CONNECTIONS = 5_000
_MIB = 1_048_576


class Stage:
    """Shared by all regimes: a site, its key, keyproxy's builds and the installed peers."""

    def __init__(self, ours: Site, options: argparse.Namespace) -> None:
        self.site = ours
        self.options = options
        self.secret = ours.keys(1)[0]
        self.limited = ours.keys(1, limited=True)[0]
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


def latency(stage: Stage) -> None:
    """p50 and p99 at shares of keyproxy's maximum rate, and the latency added to direct upstream requests."""
    seconds = stage.options.seconds
    direct = Peer("direct", "", lambda _: contextlib.nullcontext([]))
    with started([direct, *stage.chosen("HAProxy", "Envoy")]) as running:
        own_port, own_pids = next((port, pids) for peer, port, pids in running if peer.name == "keyproxy")
        own = next(peer for peer, *_ in running if peer.name == "keyproxy")
        most = load.run(f"http://127.0.0.1:{own_port}", stage.script(own), own_pids, seconds=seconds).per_second
        print(f"\nlatency at a fixed rate; our maximum (pure build) is {most:.0f} requests/s")
        print("                            rate    p50 ms    p99 ms   p99 added")
        for share in _SHARES:
            found: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer, *_ in running}
            for _ in range(stage.options.rounds):
                for peer, port, _pids in running:
                    request = _request(peer.scheme + stage.secret)
                    to = stage.site.upstream if peer is direct else port
                    taken = paced.latencies(to, request, per_second=most * share, seconds=seconds)
                    found[peer.name].append((_at(taken, 0.5), _at(taken, 0.99)))
            base = statistics.median(p99 for _, p99 in found["direct"])
            for name, runs in found.items():
                p50, p99 = (statistics.median(column) for column in zip(*runs, strict=True))
                print(f"  {name:<22} {share:>6.0%}  {p50:8.2f}  {p99:8.2f}  {p99 - base:+8.2f}")


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


def streaming(stage: Stage) -> None:
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


def metered(stage: Stage) -> None:
    """CPU of a metered stream, and of the same stream without metering."""
    print(f"\nstreams of {EVENTS} events          µs CPU per stream    streams/s   metered / plain")
    body = '{"model":"m","stream":true,"max_tokens":400,"messages":[{"role":"user","content":"What does it cost?"}]}'
    keys = {"plain": stage.secret, "metered": stage.secret, "metered, limits": stage.limited}
    upstream, home = free_port(), stage.site.home
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            running([sys.executable, "-m", "bench.events", str(upstream)], upstream, home / "events.log")
        )
        for name, python in stage.builds.items():
            port = free_port()
            pids = stack.enter_context(stage.site.serving(port, python=python, upstream=upstream))
            runs: dict[str, list[load.Result]] = {kind: [] for kind in keys}
            for _ in range(stage.options.rounds):
                for kind, secret in keys.items():
                    to = f"/v1/ai/streams/{kind.partition(',')[0]}"
                    script = traffic.repeated(home / "stream.lua", header=traffic.API_KEY + secret, to=to, body=body)
                    url = f"http://127.0.0.1:{port}"
                    runs[kind].append(load.run(url, script, pids, seconds=stage.options.seconds, connections=16))
            for kind, those in runs.items():
                if any(run.refused for run in those):
                    raise RuntimeError(f"{name} refused {kind} streams")
                pairs = zip(those, runs["plain"], strict=True)
                ratio = statistics.median(one.cpu_microseconds / other.cpu_microseconds for one, other in pairs)
                cpu = statistics.median(run.cpu_microseconds for run in those)
                rate = statistics.median(run.per_second for run in those)
                print(f"  {name + ', ' + kind:<36} {cpu:11.0f} {rate:12.0f} {ratio:12.2f} x")


def memory(stage: Stage) -> None:
    """Memory of the process after its start, and per idle connection. Per cached key: `python -m bench.cache`."""
    print("\nmemory                      after start, MiB   per idle connection, bytes")
    for peer in stage.chosen("nginx bare", "HAProxy", "Envoy"):
        with started([peer]) as [(_, port, pids)]:
            request = _request(peer.scheme + stage.secret)
            _send_once(port, request).close()
            before = load.rss_mib(pids)
            number = _IDLE_CONNECTIONS if peer.name != "HAProxy" else 2_000
            connections = [_send_once(port, request) for _ in range(number)]
            after = load.rss_mib(pids)
            for one in connections:
                one.close()
            print(f"  {peer.name:<24} {before:10.1f} {(after - before) * _MIB / number:24.0f}   ({number} of them)")


def _send_once(port: int, request: bytes) -> socket.socket:
    """A connection that was used once and is idle."""
    sock = socket.create_connection(("127.0.0.1", port), 10)
    sock.sendall(request)
    response = b""
    while b'"queued"}' not in response:
        part = sock.recv(65_536)
        if not part:
            raise RuntimeError(f"the connection was closed after {response[:200]!r}")
        response += part
    return sock


def _request(header: str) -> bytes:
    return (
        f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\n{header}\r\nContent-Type: application/json\r\n"
        f"Content-Length: 90\r\n\r\n{'x' * 90}"
    ).encode()


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[int(len(ordered) * share)] * 1e3


REGIMES = {"latency": latency, "workers": workers, "streaming": streaming, "metered": metered, "memory": memory}


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
