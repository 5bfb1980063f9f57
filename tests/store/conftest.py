"""Fixtures: a database that is emptied for each test, rigs over it, private servers that tests may stop, a pooler."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from keyproxy.config.schema import Cache
from keyproxy.model import Moment
from keyproxy.signing.token_check import ACCEPTS_NONE
from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.embedded.embedded_postgres import EmbeddedServer
from keyproxy.store.identities.cache import FeedState, IdentityCache
from keyproxy.store.identities.change_feed import CHANNEL, ChangeFeed
from keyproxy.store.identities.identity_rows import NO_RESOURCES, TokenResources
from keyproxy.store.identities.last_used import LastUsed
from keyproxy.store.identities.owned_ids import OwnedIdCache
from keyproxy.store.identities.unknown_credentials import TokenVerifier
from keyproxy.store.postgres import migrations
from keyproxy.store.postgres.database import NotificationListener
from keyproxy.store.prompt_templates import TemplateCache
from keyproxy.store.signing_keys import SigningKeyCache
from tests.server import password_of
from tests.store.harness import Clock, Relay, Rig, Sql, StatementRunner
from tests.store.redis_harness import MakeServer, servers
from tests.store.redis_server import RedisServer
from tests.waiting import until

_FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

MakeRig = Callable[..., Awaitable[Rig]]
StartServer = Callable[..., EmbeddedServer]


@pytest.fixture
def dsn(shared_dsn: str) -> str:
    """A migrated, empty database. Emptying a shared one is much faster than cloning one, which takes 0.25 s."""
    return shared_dsn


@pytest.fixture
async def own_dsn(empty_dsn: str) -> str:
    """A migrated, empty database that this test may break."""
    await migrations.migrate(empty_dsn)
    return empty_dsn


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory with a path short enough for sockets, accessible to all users."""
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
async def relay(dsn: str, short_directory: Path) -> AsyncIterator[Relay]:
    """A relay to this test's database."""
    relay = Relay(short_directory, dsn)
    await relay.mend()
    yield relay
    await relay.cut()


@pytest.fixture
async def make_rig(dsn: str, sql: Sql, relay: Relay) -> AsyncIterator[MakeRig]:
    """Make a rig: `await make_rig(cache=Cache(...), look_ups_max=..., listener=..., now=...)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def making(
            *,
            cache: Cache | None = None,
            look_ups_max: int = 3,
            pool_size_max: int = 4,
            statement_timeout_seconds: float = 5.0,
            listener: NotificationListener | str | None = None,
            now: Callable[[], Moment] | None = None,
            door: StatementRunner | None = None,
            verifier: TokenVerifier | None = None,
            resources: TokenResources = NO_RESOURCES,
        ) -> Rig:
            clock, state = Clock(), FeedState()
            door = door or StatementRunner(
                relay.dsn, pool_size_max=pool_size_max, statement_timeout_seconds=statement_timeout_seconds
            )
            last_used = LastUsed(door)
            identities = IdentityCache(
                door,
                cache or Cache(),
                feed=state,
                last_used=last_used,
                header_prefix="X-Keyproxy-",
                look_ups_max=look_ups_max,
                now=now or clock,
                verifier=verifier,
                resources=resources,
            )
            listening = NotificationListener(dsn, CHANNEL) if listener == "real" else listener
            assert not isinstance(listening, str)
            owned = OwnedIdCache(door, cache or Cache(), feed=state, look_ups_max=look_ups_max, now=now or clock)
            templates = TemplateCache(door, cache or Cache(), now or clock)
            signing_keys = SigningKeyCache(door, ACCEPTS_NONE, now or clock)
            feed = ChangeFeed(
                door, listening, identities, state, now or clock,
                owned=owned, templates=templates, signing_keys=signing_keys,
            )  # fmt: skip
            await door.open()
            stack.push_async_callback(door.close)
            stack.push_async_callback(identities.close)
            stack.push_async_callback(owned.close)
            stack.push_async_callback(templates.close)
            stack.push_async_callback(signing_keys.close)
            stack.push_async_callback(feed.close)
            return Rig(
                dsn, sql, relay, door, clock, state, last_used, identities, owned, templates, signing_keys, feed,
                now or clock,
            )  # fmt: skip

        yield making


@pytest.fixture
async def rig(make_rig: MakeRig) -> Rig:
    """A rig with the default configuration and a feed that has polled once."""
    rig = await make_rig()
    await rig.feed.poll()
    return rig


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """The directory of an embedded server for the store tests. A test that starts it stops it."""
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory:
        embedded_postgres.start(Path(directory), _FAST).stop()
        yield Path(directory)


@pytest.fixture
def start_server(home: Path) -> Iterator[StartServer]:
    """Start the embedded server of `home`. It is always stopped after the test."""
    with contextlib.ExitStack() as stack:

        def starting(settings: Mapping[str, str] | None = None) -> EmbeddedServer:
            server = embedded_postgres.start(home, {**_FAST, **(settings or {})})
            stack.callback(server.stop)
            return server

        yield starting


class Pooler:
    """A running pgbouncer in transaction mode."""

    def __init__(self, directory: Path, database: str) -> None:
        self._directory = directory
        self._database = database

    @property
    def dsn(self) -> str:
        """This test's database, through the pooler."""
        return f"postgresql://keyproxy@/{self._database}?host={self._directory}&port=6432"


MakePooler = Callable[[int], Awaitable[Pooler]]


@pytest.fixture
async def make_pooler(relay: Relay, short_directory: Path) -> AsyncIterator[MakePooler]:
    """Start a pgbouncer in front of this test's database: `await make_pooler(server_connections)`."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    async with contextlib.AsyncExitStack() as stack:

        async def making(server_connections: int) -> Pooler:
            directory = short_directory / "pool"
            directory.mkdir()
            file = directory / "pgbouncer.ini"
            password = f"password={password_of(relay.dsn)}" if password_of(relay.dsn) else ""
            file.write_text(
                f"[databases]\n* = host={short_directory} port=5432 user=keyproxy {password}\n"
                f"[pgbouncer]\nunix_socket_dir = {directory}\nlisten_port = 6432\nauth_type = any\n"
                f"pool_mode = transaction\ndefault_pool_size = {server_connections}\nmax_client_conn = 200\n"
                f"logfile = {directory}/log\n"
            )
            command = [program, str(file)]
            if os.geteuid() == 0:
                nobody = pwd.getpwnam("nobody")
                os.chown(directory, nobody.pw_uid, nobody.pw_gid)
                command[1:1] = ["-u", "nobody"]
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            stack.push_async_callback(_end, process)
            await until(lambda: _accepts(directory / ".s.PGSQL.6432"), "pgbouncer listens")
            return Pooler(directory, urlsplit(relay.dsn).path[1:])

        yield making


def _accepts(path: Path) -> bool:
    """Whether a program listens on this socket. The file is there a moment earlier, while it refuses connections."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    await process.wait()


@pytest.fixture
def make_server(short_directory: Path) -> Iterator[MakeServer]:
    """Start private Valkey servers."""
    with servers(short_directory) as making:
        yield making


@pytest.fixture
def server(make_server: MakeServer) -> RedisServer:
    """A Valkey that this test may break."""
    return make_server()
