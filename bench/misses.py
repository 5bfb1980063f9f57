"""The costs that a known key avoids: a first lookup, and the refusal of an unknown key. A new key in every request."""

from __future__ import annotations

from bench import load, traffic
from bench.load import Result
from bench.peers import PATH, free_port
from bench.site import Site
from bench.tables import print_table
from keyproxy.auth.api_key import KeyFormat

KNOWN = "known key"
MISS = "cold miss: looked up, then forwarded"
UNKNOWN = "unknown key: looked up, refused"
REMEMBERED = "unknown key, remembered: refused"

_STRANGERS = 200_000
_SECONDS = 3


def misses(ours: Site, python: str, keys: int) -> dict[str, Result]:
    """Measure with `keys` different ones, and print the table."""
    known, strangers = ours.home / "many.txt", ours.home / "strangers.txt"
    known.write_text("\n".join(ours.keys(keys)) + "\n", encoding="ascii")
    made = (KeyFormat().make(number.to_bytes(32, "big"), is_test=False).reveal() for number in range(1, _STRANGERS))
    strangers.write_bytes(b"\n".join(made) + b"\n")
    cases = {
        KNOWN: (known, "fresh_seconds = 600.0", 4 * _SECONDS),
        MISS: (known, "fresh_seconds = 600.0\nentries_max = 1", 1),
        UNKNOWN: (strangers, "unknown_entries_max = 1", 1),
        REMEMBERED: (strangers, "unknown_seconds = 600.0\nunknown_entries_max = 1000000", 6 * _SECONDS),
    }
    found = {}
    for name, (credentials, cache, warm_seconds) in cases.items():
        port, script = free_port(), traffic.varied(ours.home / "many.lua", credentials, to=PATH, in_order=True)
        with ours.serving(port, cache=cache, python=python) as pids:
            url = f"http://127.0.0.1:{port}"
            found[name] = load.run(url, script, pids, seconds=_SECONDS, warm_seconds=warm_seconds)
    rows = [
        [
            name, f"{one.cpu_microseconds:.1f}", f"{one.per_second:,.0f}", f"{one.p50_milliseconds:.2f}",
            f"{one.p99_milliseconds:.2f}", f"{one.peak_mib:.1f}",
        ]
        for name, one in found.items()
    ]  # fmt: skip
    print_table(["a new key in every request", "µs CPU", "requests/s", "p50 ms", "p99 ms", "peak MiB"], rows)
    return found
