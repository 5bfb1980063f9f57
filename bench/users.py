"""The cost of active users with limits to one proxy: memory per user, and CPU per second once they are idle.

Run as `python -m bench.users`. A real PostgreSQL, the real cache and ledger, in one process without sockets. Every user
has a request in flight at the same time, with a concurrency limit, a daily quota and a daily token budget; then they end.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import uvloop

from bench.cache import digest, fill
from bench.load import rss_mib
from bench.site import machine
from keyproxy.config import schema
from keyproxy.limits.allowance import Allowance, Hold, Need
from keyproxy.model import Missing, TimeBudget
from keyproxy.platform import clock
from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.postgres import migrations
from keyproxy.store.store import Store

_BATCH = 2_000
_SELF = [int(Path("/proc/self").resolve().name)]
_PLAN = '{"concurrency": 100, "requests_per_day": 1000000, "tokens_per_day": 1000000000}'
_NEED = Need(1_100, 1_100)
_IDLE_SECONDS = 5.0

#: All requests start at once, and each must succeed.
_PATIENCE_SECONDS = 120.0


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.users", description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    options = parser.parse_args(arguments)
    print(machine())
    with tempfile.TemporaryDirectory(prefix="kpb-", dir="/tmp") as directory:
        server = embedded_postgres.start(Path(directory) / "pg", {"fsync": "off"})
        try:
            uvloop.run(migrations.migrate(server.dsn()))
            uvloop.run(_measure(server.dsn(), options.users))
        finally:
            server.stop()
    return 0


async def _measure(dsn: str, users: int) -> None:
    await fill(dsn, users)
    connection = await asyncpg.connect(dsn)
    await connection.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('p', $1::text::jsonb)", _PLAN)
    await connection.execute("UPDATE keyproxy.users SET plan_id = 'p'")
    await connection.close()
    store = Store(
        # Up to 2,000 requests wait for a lookup here; leases last for the whole run.
        schema.StoreSettings(statement_timeout_seconds=30.0),
        schema.Cache(fresh_seconds=600.0),
        schema.LedgerSettings(lease_seconds=60.0),
        schema.Usage(),
        dsn=dsn,
        header_prefix="X-Keyproxy-",
        now=clock.now,
    )
    await store.open()
    while not store.feed.is_current():
        await asyncio.sleep(0.01)
    allowances = [
        one for start in range(0, users, _BATCH) for one in await _known(store, start, min(start + _BATCH, users))
    ]
    print(f"{users} users known, with limits: {rss_mib(_SELF):.0f} MiB in all")
    began, worked = time.monotonic(), time.process_time()
    # What the first fifth takes is in part not for users: tasks and buffers of the first requests, modules.
    first = users // 5
    holds = await _take_all(store, allowances[:first])
    before = rss_mib(_SELF)
    holds += await _take_all(store, allowances[first:])
    seconds, worked = time.monotonic() - began, time.process_time() - worked
    each = (rss_mib(_SELF) - before) * 1048576 / (users - first)
    leases = store.ledger.conversation.lease_sync
    print(
        f"all of them active, {leases.outstanding} leases: {each:.0f} bytes more per user; "
        f"{seconds:.1f} s for all first requests, {worked / users * 1e6:.0f} µs of CPU each"
    )
    await _busy_and_idle(store, holds)
    print(f"once they are idle: {rss_mib(_SELF):.0f} MiB in all, {leases.outstanding} leases")
    await store.close()


async def _busy_and_idle(store: Store, holds: list[Hold]) -> None:
    # Wait until prefetched leases are released and only those of the requests remain.
    round_trips = -1
    while round_trips != store.ledger.conversation.counts["round_trips"]:
        round_trips = store.ledger.conversation.counts["round_trips"]
        await asyncio.sleep(2.0)
    worked = time.process_time()
    await asyncio.sleep(_IDLE_SECONDS)
    held = time.process_time() - worked
    for hold in holds:
        store.ledger.settle(hold, was_sent=True, tokens=500)
    began, leases = time.monotonic(), store.ledger.conversation.lease_sync
    while leases.outstanding or leases.has_news:
        await asyncio.sleep(0.1)
    back = time.monotonic() - began
    worked = time.process_time()
    await asyncio.sleep(_IDLE_SECONDS)
    idle = time.process_time() - worked
    print(
        f"CPU per second: {held / _IDLE_SECONDS * 1e3:.1f} ms with all requests under way, "
        f"{idle / _IDLE_SECONDS * 1e3:.1f} ms idle; all was settled and given back {back:.1f} s after the last one ended"
    )


async def _known(store: Store, start: int, end: int) -> list[Allowance]:
    async def known(number: int) -> Allowance:
        try:
            identity = store.identities.known(digest("key", number), clock.now())
        except Missing as missing:
            await missing.fetch_missing()
            identity = store.identities.known(digest("key", number), clock.now(), is_first_lookup=False)
        assert identity.allowance is not None
        return identity.allowance

    return await asyncio.gather(*map(known, range(start, end)))


async def _take_all(store: Store, allowances: Sequence[Allowance]) -> list[Hold]:
    holds: list[Hold] = []
    for start in range(0, len(allowances), _BATCH):
        holds += await asyncio.gather(*(_take(store, allowance) for allowance in allowances[start : start + _BATCH]))
    return holds


async def _take(store: Store, allowance: Allowance) -> Hold:
    while True:
        try:
            return store.ledger.take(allowance, clock.now(), _NEED)
        except Missing as missing:
            patience = TimeBudget()
            patience.seconds_left = _PATIENCE_SECONDS
            await missing.fetch_missing(patience)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
