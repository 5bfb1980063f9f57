"""Load by wrk, and the cost to the processes under it."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Result:
    """The results of one run. CPU and memory are totals of the measured processes."""

    requests: int
    per_second: float
    cpu_microseconds: float
    user_share: float
    p50_milliseconds: float
    p99_milliseconds: float
    peak_mib: float
    refused: int


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU of all threads of the processes so far, as the scheduler counts it, to the nanosecond."""
    return sum(
        int(thread.joinpath("schedstat").read_text(encoding="ascii").split()[0])
        for pid in pids
        for thread in Path(f"/proc/{pid}/task").iterdir()
    ) / 1e9  # fmt: skip


def user_share(pids: Sequence[int], before: tuple[int, int] = (0, 0)) -> float:
    """The user's share of the CPU since `before`, by clock ticks."""
    user, system = (now - then for now, then in zip(cpu_ticks(pids), before, strict=True))
    return user / max(user + system, 1)


def cpu_ticks(pids: Sequence[int]) -> tuple[int, int]:
    """User and system CPU so far, in clock ticks."""
    user = system = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
        user += int(fields[11])
        system += int(fields[12])
    return user, system


def peak_mib(pids: Sequence[int]) -> float:
    """Peak memory of the processes, in MiB."""
    return sum(_status(pid, "VmHWM") for pid in pids) / 1024


def rss_mib(pids: Sequence[int]) -> float:
    """Current memory of the processes, in MiB."""
    return sum(_status(pid, "VmRSS") for pid in pids) / 1024


def _status(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) if match else 0


def run(
    url: str, lua: Path, pids: Sequence[int], *, seconds: float, connections: int = 32, warm_seconds: float = 0.0
) -> Result:
    """Load a URL with wrk and measure what it costs the processes `pids`."""
    if warm_seconds:
        _wrk(url, lua, warm_seconds, connections)
    ticks, before = cpu_ticks(pids), cpu_seconds(pids)
    output = _wrk(url, lua, seconds, connections)
    used = cpu_seconds(pids) - before
    requests = int(_found(r"(\d+) requests in", output))
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    return Result(
        requests=requests,
        per_second=float(_found(r"Requests/sec:\s+([\d.]+)", output)),
        cpu_microseconds=used * 1e6 / max(requests, 1),
        user_share=user_share(pids, ticks),
        p50_milliseconds=_latency("50", output),
        p99_milliseconds=_latency("99", output),
        peak_mib=peak_mib(pids),
        refused=int(failed[1]) if failed else 0,
    )


def _wrk(url: str, lua: Path, seconds: float, connections: int) -> str:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}", "--latency", "-s", str(lua), url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"wrk's output does not match {pattern!r}: {text}")
    return match[1]


def _latency(percentile: str, output: str) -> float:
    match = re.search(rf"^\s+{percentile}%\s+([\d.]+)(us|ms|s)\s*$", output, re.MULTILINE)
    return float(match[1]) * _UNITS[match[2]] if match else float("nan")


class MemoryWatch:
    """Peak memory of processes during the context, sampled."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.peak_mib = 0.0
        self._pids = pids
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak_mib = max(self.peak_mib, rss_mib(self._pids))


def rounds(number: int) -> Iterator[int]:
    """Yield 1 to number and print the progress."""
    for one in range(1, number + 1):
        print(f"  round {one} of {number}", flush=True)
        yield one
        time.sleep(0.1)
