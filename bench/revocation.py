"""Time from the commit of a revocation to the last accepted request with the key, over many proxies under load.

Run as `python -m bench.revocation`. All proxies are processes over one PostgreSQL. Each gets requests with
the same key, on its own connection and at a fixed rate, until it refuses the key. Then the next key follows. The time is
when the last accepted request was *sent*; 0 if it was sent before the commit returned.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import uvloop

from bench.peers import PATH, free_port, nginx_upstream
from bench.site import Site, machine, site
from keyproxy.auth.api_key import KeyFormat
from keyproxy.store.directory.directory import Actor, Directory, KeyWish
from keyproxy.store.postgres.database import Database

#: How long a key is used before its revocation, so that every proxy has it cached.
_KNOWN_SECONDS = 0.5
_GIVE_UP_SECONDS = 5.0


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.revocation", description=__doc__)
    parser.add_argument("--proxies", type=int, default=20)
    parser.add_argument("--revocations", type=int, default=40)
    parser.add_argument("--per-second", type=float, default=50.0, help="requests to each proxy")
    options = parser.parse_args(arguments)
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}")
    with tempfile.TemporaryDirectory(prefix="kpb-", dir="/tmp") as directory, contextlib.ExitStack() as stack:
        home, upstream = Path(directory), free_port()
        stack.enter_context(nginx_upstream(home, upstream))
        ours = stack.enter_context(site(home, upstream))
        ports = [free_port() for _ in range(options.proxies)]
        for port in ports:
            stack.enter_context(ours.serving(port))
        late = sorted(uvloop.run(_revocations(ours, ports, options)))
    number = options.proxies * options.revocations
    print(f"{options.proxies} proxies, {options.per_second:g} requests/s each, {options.revocations} revocations:")
    print(f"milliseconds from commit to the last accepted request, {number} times:", end=" ")
    points = {"p50": 0.5, "p99": 0.99}
    print(*(f"{name} {late[int(len(late) * share)] * 1e3:.1f}" for name, share in points.items()), end=" ")
    print(f"max {late[-1] * 1e3:.1f}")
    return 0


async def _revocations(ours: Site, ports: Sequence[int], options: argparse.Namespace) -> list[float]:
    database = Database(ours.dsn, pool_size_max=2, statement_timeout_seconds=30.0)
    await database.open()
    directory = Directory(database, KeyFormat(), Actor("bench", "local"))
    await directory.tenants.create("acme", "")
    await directory.users.create("u_1", "acme", None)
    late: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for number in range(options.revocations):
            key = await directory.keys.issue("u_1", KeyWish(scopes=("jobs:write",)))
            clients = [
                asyncio.create_task(_last_let_in(session, port, key["secret"], 1 / options.per_second, share))
                for port, share in ((port, at / len(ports)) for at, port in enumerate(ports))
            ]
            # A random pause, so that revocations are not in step with periodic work.
            await asyncio.sleep(_KNOWN_SECONDS + (number * 0.137) % 1.0)
            await directory.keys.revoke(key["id"], "measured")
            committed = time.monotonic()
            late += [max(0.0, last - committed) for last in await asyncio.gather(*clients)]
    await database.close()
    return late


async def _last_let_in(session: aiohttp.ClientSession, port: int, secret: str, gap: float, share: float) -> float:
    """Send requests until one is refused. Returns when the last accepted one was sent."""
    last = 0.0
    await asyncio.sleep(gap * share)
    due = time.monotonic()
    give_up = due + _GIVE_UP_SECONDS
    while True:
        sent = time.monotonic()
        url, headers = f"http://127.0.0.1:{port}{PATH}", {"Authorization": f"Api-Key {secret}"}
        async with session.post(url, data=b"{}", headers=headers) as response:
            status = response.status
            await response.read()
        if status == 401:
            return last
        if status != 200 or sent > give_up:
            raise RuntimeError(f"a request got {status}, {sent - due:.1f} s after the first")
        last = sent
        due += gap
        await asyncio.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
