"""A primary that dies and a replica that is promoted without the latest commits, under load from two proxies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from keyproxy.store.embedded import launcher, postgres_binaries
from keyproxy.store.postgres import migrations
from tests.acceptance.conftest import Configure, until
from tests.acceptance.fleet import Fleet, beside
from tests.rawhttp import Message, answer_with
from tests.store.harness import Relay

LEASE_SECONDS = 1.5
REQUESTS, TOKENS, TOKENS_EACH = 1_500, 9_000, 7

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Usage-Tokens: %d\r\n\r\nok" % TOKENS_EACH


class Server:
    """A PostgreSQL on its own unix socket."""

    def __init__(self, home: Path, name: str) -> None:
        self.data, self.sockets = home / name, home / f"{name}-run"
        self.sockets.mkdir(mode=0o700)
        self._binaries = postgres_binaries.find_binaries(os.environ)[0].directory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def dsn(self) -> str:
        """Its only database."""
        return f"postgresql://keyproxy@/postgres?host={self.sockets}&port=5432"

    def run(self, program: str, *arguments: str) -> None:
        """Run one of its programs to completion."""
        done = subprocess.run(
            self._command(program, *arguments), capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr

    def copy(self, primary: Server) -> None:
        """Become a replica of another."""
        source = ("-h", str(primary.sockets), "-U", "keyproxy")
        self.run("pg_basebackup", *source, "-D", str(self.data), "-R", "-c", "fast")

    def start(self) -> None:
        """Start without waiting."""
        command = self._command("postgres", "-D", str(self.data), "-k", str(self.sockets), "-c", "listen_addresses=")
        with (self.data.parent / f"{self.data.name}.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def crash(self) -> None:
        """Kill the server without a checkpoint or a shutdown."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(20)
            self._process = None

    async def connect(self) -> asyncpg.Connection:
        """Wait until it accepts connections."""
        async with asyncio.timeout(30):
            while True:
                try:
                    return await asyncpg.connect(self.dsn)
                except (OSError, asyncpg.PostgresError):
                    await asyncio.sleep(0.05)

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [
            sys.executable,
            "-I",
            "-S",
            launcher.__file__,
            str(os.getpid()),
            str(self._binaries / program),
            *arguments,
        ]


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    """A running primary and its future replica."""
    if not (postgres_binaries.find_binaries(os.environ)[0].directory / "pg_basebackup").exists():
        pytest.skip("this PostgreSQL comes without pg_basebackup")
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory:
        primary, replica = Server(Path(directory), "a"), Server(Path(directory), "b")
        primary.run("initdb", "--pgdata", str(primary.data), "--username", "keyproxy", "--auth", "trust", "--no-locale")
        primary.start()
        yield primary, replica
        primary.crash()
        replica.crash()


async def test_a_replica_that_is_promoted_without_the_latest_commits_overspends_nothing(
    configure: Configure, servers: tuple[Server, Server]
) -> None:
    primary, replica = servers
    async with contextlib.AsyncExitStack() as stack:
        sql = await primary.connect()
        await migrations.migrate(primary.dsn)
        site = configure(
            primary.dsn,
            routes=[{"match": "POST /v1/ai/jobs", "tokens": "header"}],
            ledger={"lease_seconds": LEASE_SECONDS},
            store={"statement_timeout_seconds": 1.0},
        )
        site.upstream.answering = answer_with(_ANSWER)
        secret = (await site.key())["secret"]
        limits = f'{{"requests_per_day": {REQUESTS}, "tokens_per_day": {TOKENS}, "tokens_per_request": 60}}'
        await sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('p', $1::text::jsonb)", limits)
        await sql.execute("UPDATE keyproxy.users SET plan_id = 'p'")
        replica.copy(primary)
        replica.start()
        copied = await replica.connect()
        stack.push_async_callback(copied.close)

        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp")))
        relay = Relay(directory, primary.dsn)
        await relay.mend()
        stack.push_async_callback(relay.cut)
        fleet = Fleet([beside(site, relay.dsn) for _ in range(2)], [relay, relay], secret)
        stack.push_async_callback(fleet.close)
        await asyncio.gather(*(fleet.start(number) for number in range(2)))
        ends = asyncio.get_running_loop().time() + 2 * LEASE_SECONDS + 3
        clients = [asyncio.create_task(fleet.load(ends)) for _ in range(3)]

        # The replica does not receive any later commit.
        await until(lambda: _has_spent(copied, 100), seconds=20)
        await copied.execute("ALTER SYSTEM SET primary_conninfo = ''")
        await copied.execute("SELECT pg_reload_conf()")
        await until(lambda: _is_alone(copied), seconds=20)
        await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ('lost')")
        seen = len(site.upstream.heads)
        await until(lambda: _has_seen(site.upstream.heads, seen + 20), seconds=20)
        primary.crash()
        await relay.cut()
        relay.lead_to(replica.dsn)
        await copied.execute("SELECT pg_promote()")
        assert not await copied.fetchval("SELECT count(*) FROM keyproxy.tenants WHERE id = 'lost'")
        await relay.mend()

        await asyncio.gather(*clients)
        # Spend the rest on the new timeline.
        await until(lambda: _is_spent(fleet), seconds=60)
        await fleet.close()
        rows = {row["measure"]: row for row in await copied.fetch("SELECT * FROM keyproxy.windows")}
        requests, tokens, seen = rows["requests_per_day"], rows["tokens_per_day"], len(site.upstream.heads)
        print(f"upstream saw {seen}; {dict(requests)}; {dict(tokens)}; answers {dict(fleet.answers)}")
        assert seen <= requests["spent"] <= REQUESTS
        assert seen * TOKENS_EACH <= tokens["spent"] <= TOKENS
        assert tokens["held"] == requests["held"] == 0


async def _has_spent(sql: asyncpg.Connection, requests: int) -> bool:
    spent = await sql.fetchval("SELECT spent FROM keyproxy.windows WHERE measure = 'requests_per_day'")
    return (spent or 0) >= requests


async def _is_alone(sql: asyncpg.Connection) -> bool:
    return not await sql.fetchval("SELECT count(*) FROM pg_stat_wal_receiver")


async def _has_seen(heads: list[Message], number: int) -> bool:
    return len(heads) >= number


async def _is_spent(fleet: Fleet) -> bool:
    await fleet.load(asyncio.get_running_loop().time() + 0.1)
    return fleet.answers[429] > 0
