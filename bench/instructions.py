"""Where a request's instructions go: machine instructions by part, counted by valgrind, without noise and sockets.

Run as `python -m bench.instructions [varied] [path] [repeated] [--compiled DIR]`. Each part includes what it calls, other
parts of the table excepted. Needs valgrind; it can distinguish the functions of the compiled build only.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.tables import print_table

_ROOT: Final = Path(__file__).parents[1]
_MEASURED: Final = 1_000
_WARMING: Final = 3_000

#: Parts of the table, by the C name of the function without `CPyDef_`.
_PARTS: Final = {
    "read the head of the request": "request_stream___RequestStream___begin",
    "choose the request id": "request_ids___RequestIds___choose",
    "decide": "gateway___Gateway___decide",
    "of it: find the key, hash it, look it up": "identification___identify",
    "take an upstream connection, write the head": "wire___exchange___Exchange____go",
    "read the head of the response": "response_stream___ResponseStream___next_head",
    "begin the response": "wire___exchange___Exchange___response_begins",
    "end the exchange": "wire___exchange___Exchange____end",
    "of it: record": "recorder___Recorder___count_pending",
    "of that: the access log": "access_log___AccessLog___write",
    "of that: usage": "journal___UsageJournal___take",
}

KINDS: Final = {
    "varied": "no two requests alike",
    "path": "the same path, all else varies",
    "repeated": "one request repeated",
}


def main(arguments: Sequence[str]) -> int:
    """Count and print, or as a process under valgrind send the requests."""
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []])
    parser.add_argument("--compiled", default=".venv-compiled", help="the environment of the compiled build")
    options = parser.parse_args(arguments)
    if "BENCH_UNDER_VALGRIND" in os.environ:
        _send(options.kinds[0])
        return 0
    kinds = options.kinds or list(KINDS)
    python = (Path(options.compiled) / "bin" / "python").absolute()
    counted = {kind: _counted(python, kind) for kind in kinds}
    rows = [
        [part, *(f"{counted[kind].get(function, 0.0):,.0f}" for kind in kinds)] for part, function in _PARTS.items()
    ]
    rows.append(["**all**", *(f"**{counted[kind]['']:,.0f}**" for kind in kinds)])
    print_table(["instructions per request", *(KINDS[kind] for kind in kinds)], rows)
    return 0


def _counted(python: Path, kind: str) -> dict[str, float]:
    """Instructions per request, inclusive, by function; of all under the empty name."""
    with tempfile.TemporaryDirectory(prefix="kpb-", dir="/tmp") as directory:
        output = Path(directory) / "callgrind.out"
        # The package first, as it is installed: this directory, once on the path, has its sources.
        code = (
            "import keyproxy.gateway, runpy, sys\n"
            f"sys.path.append({str(_ROOT)!r})\n"
            "sys.argv[0] = 'bench.instructions'\n"
            "runpy.run_module('bench.instructions', run_name='__main__', alter_sys=True)\n"
        )
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={output}"]
        environment = {**os.environ, "BENCH_UNDER_VALGRIND": "1", "PYTHONHASHSEED": "0"}
        subprocess.run(
            [*command, str(python), "-P", "-c", code, kind], check=True, env=environment, capture_output=True
        )
        text = subprocess.run(
            ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(output)],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = re.match(r"\s*([\d,]+) \(.*?%\)\s+(?:.*:CPyDef_(\w+)|(PROGRAM TOTALS))", line)
        if match is not None:
            each = int(match[1].replace(",", "")) / _MEASURED
            name = match[2] or ""
            found[name] = max(found.get(name, 0.0), each)
    return found


def _send(kind: str) -> None:
    """Send requests of a kind through a proxy without sockets; valgrind counts the last ones."""
    import uvloop

    from bench.delegation import KEYS, warm_cache
    from bench.phases import Bench, Calling
    from keyproxy.config import schema
    from keyproxy.process.run import freeze_garbage

    loop, rng = uvloop.new_event_loop(), random.Random(20_261_126)
    with open("/dev/null", "wb") as null:  # noqa: PTH123
        calling = Calling(routes=(schema.RouteRow("POST /v1/ai/jobs/{id}", ["jobs:write"]),))
        bench = Bench(loop, null.fileno(), identities=warm_cache(loop), calling=calling)
        secrets = [key.reveal() for key in KEYS]
        raws = [request(rng, rng.choice(secrets), has_id=kind == "varied") for _ in range(_WARMING + _MEASURED)]
        if kind == "repeated":
            raws = raws[:1] * len(raws)
        freeze_garbage()  # as a worker does
        for raw in raws[:_WARMING]:
            bench.whole(raw)
        bench.recorder.count_pending()
        _switch("on")
        for raw in raws[_WARMING:]:
            bench.whole(raw)
        bench.recorder.count_pending()
        _switch("off")
        bench.close()


def _switch(state: str) -> None:
    subprocess.run(["callgrind_control", "-i", state, str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def request(rng: random.Random, secret: bytes, *, has_id: bool) -> bytes:
    """A request of an instrumented worker."""
    body = b"x" * rng.randint(20, 400)
    return (
        b"POST /v1/ai/jobs%b HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nAuthorization: Api-Key %b\r\n"
        b"Content-Type: application/json\r\nUser-Agent: python-requests/2.32\r\nAccept: */*\r\n"
        b"Accept-Encoding: gzip, deflate\r\ntraceparent: 00-%032x-%016x-01\r\nX-Request-Id: %016x\r\n"
        b"Content-Length: %d\r\n\r\n%b"
    ) % (
        b"/%016x" % rng.getrandbits(64) if has_id else b"", secret, rng.getrandbits(128), rng.getrandbits(64),
        rng.getrandbits(64), len(body), body,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
