"""The identity cache: memory per key, and lookup time of a known key under a flood of unknown keys.

Run as `python -m bench.cache`. A real PostgreSQL and the real cache, in one process without sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import uvloop

from bench.load import rss_mib
from bench.site import machine
from keyproxy.config import schema
from keyproxy.model import KeyDigest, Missing
from keyproxy.platform import clock
from keyproxy.reasons import Refusal
from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.postgres import migrations
from keyproxy.store.store import Store

_BATCH = 2_000
_SELF = [int(Path("/proc/self").resolve().name)]


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.cache", description=__doc__)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--strangers", type=int, default=250_000)
    options = parser.parse_args(arguments)
    print(machine())
    with tempfile.TemporaryDirectory(prefix="kpb-", dir="/tmp") as directory:
        server = embedded_postgres.start(Path(directory) / "pg", {"fsync": "off"})
        try:
            uvloop.run(migrations.migrate(server.dsn()))
            uvloop.run(_measure(server.dsn(), options.keys, options.strangers))
        finally:
            server.stop()
    return 0


async def _measure(dsn: str, keys: int, strangers: int) -> None:
    await fill(dsn, keys)
    store = Store(
        schema.StoreSettings(),
        schema.Cache(),
        schema.LedgerSettings(),
        schema.Usage(),
        dsn=dsn,
        header_prefix="X-Keyproxy-",
        now=clock.now,
    )
    await store.open()
    while not store.feed.is_current():
        await asyncio.sleep(0.01)
    # What the first fifth takes is in part not for keys: tasks and buffers of the look-ups, modules.
    first = keys // 5
    for start in range(0, first, _BATCH):
        await _look_up(store, "key", start, min(start + _BATCH, first))
    before = rss_mib(_SELF)
    for start in range(first, keys, _BATCH):
        await _look_up(store, "key", start, min(start + _BATCH, keys))
    each = (rss_mib(_SELF) - before) * 1048576 / (keys - first)
    print(f"{store.identities.sizes()['known']} keys cached: {each:.0f} bytes of memory per key")
    print(f"known key, alone:            {_timing(_looks(store, keys, 20_000))}")
    seconds: list[float] = []
    for start in range(0, strangers, _BATCH):
        await _look_up(store, "stranger", start, min(start + _BATCH, strangers))
        seconds += _looks(store, keys, 200)
    sizes = store.identities.sizes()
    print(f"known key, with a flood:     {_timing(seconds)}")
    print(f"after {strangers} unknown keys: {sizes['known']} known and {sizes['unknown']} unknown keys are cached")
    await store.close()


async def fill(dsn: str, keys: int) -> None:
    """Users with a key each, and 1,000 tenants for them."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "INSERT INTO keyproxy.tenants (id) SELECT 'tenant_' || n FROM generate_series(0, 999) AS n"
    )
    rows = [(f"user_{number}", f"tenant_{number % 1000}") for number in range(keys)]
    await connection.copy_records_to_table("users", schema_name="keyproxy", columns=["id", "tenant_id"], records=rows)
    made = [(f"key_{number:020}", f"user_{number}", digest("key", number), ["jobs:write"]) for number in range(keys)]
    await connection.copy_records_to_table(
        "api_keys", schema_name="keyproxy", columns=["id", "user_id", "digest", "scopes"], records=made
    )
    await connection.close()


async def _look_up(store: Store, kind: str, start: int, end: int) -> None:
    """Load these keys into the cache concurrently."""

    async def one(presented: KeyDigest) -> None:
        try:
            store.identities.known(presented, clock.now())
        except Missing as missing:
            await missing.fetch_missing()
        except Refusal:
            return

    await asyncio.gather(*(one(digest(kind, number)) for number in range(start, end)))


def _looks(store: Store, keys: int, times: int) -> list[float]:
    """Lookup times of known keys in seconds, one per lookup."""
    digests = [digest("key", number * 7919 % keys) for number in range(times)]
    taken = []
    for one in digests:
        now = clock.now()
        began = time.perf_counter()
        store.identities.known(one, now)
        taken.append(time.perf_counter() - began)
    return taken


def digest(kind: str, number: int) -> KeyDigest:
    """The digest of a key of this kind."""
    return KeyDigest(hashlib.sha256(f"{kind}{number}".encode()).digest())


def _timing(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(len(ordered) * share)] * 1e6 for share in (0.5, 0.99))
    return f"p50 {p50:.2f} µs, p99 {p99:.2f} µs"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
