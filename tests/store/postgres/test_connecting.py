"""Connections by libpq's rules: parameters, TLS, several hosts, another user's home, names in error messages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
import trustme

from keyproxy.store.embedded import postgres_binaries
from keyproxy.store.identities.change_feed import CHANNEL
from keyproxy.store.identities.identity_rows import BY_DIGEST
from keyproxy.store.identities.lookup_batcher import LookupBatcher
from keyproxy.store.postgres import migrations
from keyproxy.store.postgres.connecting import Connection, Connector, standing
from keyproxy.store.postgres.database import NotificationListener, StoreConflict, StoreUnavailable
from tests.acceptance.test_promotion import Server
from tests.store.conftest import StartServer
from tests.store.harness import Sql, StatementRunner, add_key, add_user


class TcpServer(Server):
    """A PostgreSQL on a TCP port, with or without TLS."""

    def __init__(self, home: Path, name: str, *, needs_tls: bool = False) -> None:
        super().__init__(home, name)
        if needs_tls:
            self._binaries = _with_tls()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port: int = sock.getsockname()[1]

    def configure(self, *lines: str) -> None:
        """Append to the configuration."""
        with (self.data / "postgresql.auto.conf").open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def hba(self, *lines: str) -> None:
        """Write pg_hba.conf."""
        (self.data / "pg_hba.conf").write_text("".join(f"{line}\n" for line in ("local all all trust", *lines)))

    def start_tcp(self) -> None:
        """Start, and listen on the port too."""
        self.configure("listen_addresses = '127.0.0.1'", f"unix_socket_directories = '{self.sockets}'")
        # Server's command line only sets the socket; this one adds TCP.
        command = self._command("postgres", "-D", str(self.data), "-k", str(self.sockets), "-p", str(self.port))
        with (self.data.parent / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    @property
    def major(self) -> int:
        """The PostgreSQL version."""
        return int((self.data / "PG_VERSION").read_text())

    @property
    def dsn(self) -> str:
        """Its only database, over the socket."""
        return f"postgresql://keyproxy@/postgres?host={self.sockets}&port={self.port}"

    def tcp(self, parameters: str = "", user: str = "keyproxy") -> str:
        """Its only database, over TCP."""
        return f"postgresql://{user}@localhost:{self.port}/postgres?{parameters}"


def _with_tls() -> Path:
    """A PostgreSQL that was built with TLS. Skips where there is none."""
    for found in postgres_binaries.find_binaries(os.environ):
        program = found.directory / "pg_config"
        if (
            program.exists()
            and b"openssl" in subprocess.run([program, "--configure"], capture_output=True, check=True).stdout
        ):
            return found.directory
    pytest.skip("no installed PostgreSQL was built with TLS")


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A directory for servers."""
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """The certificate authority."""
    return trustme.CA()


@pytest.fixture(scope="module")
def roots(home: Path, authority: trustme.CA) -> Path:
    """The certificate of the authority."""
    file = home / "roots.pem"
    authority.cert_pem.write_to_path(str(file))
    file.chmod(0o644)
    return file


@pytest.fixture(scope="module")
def plain(home: Path) -> Iterator[TcpServer]:
    """A server without TLS."""
    server = TcpServer(home, "plain")
    server.run("initdb", "--pgdata", str(server.data), "--username", "keyproxy", "--auth", "trust", "--no-locale")
    server.start_tcp()
    asyncio.run(_wait(server))
    yield server
    server.crash()


@pytest.fixture(scope="module")
def secure(home: Path, authority: trustme.CA) -> Iterator[TcpServer]:
    """A server that requires TLS over TCP."""
    server = TcpServer(home, "secure", needs_tls=True)
    server.run("initdb", "--pgdata", str(server.data), "--username", "keyproxy", "--auth", "trust", "--no-locale")
    issued = authority.issue_cert("localhost")
    for name, blob in (("server.key", issued.private_key_pem), ("server.crt", issued.cert_chain_pems[0])):
        blob.write_to_path(str(server.data / name))
        (server.data / name).chmod(0o600)
    server.configure("ssl = on")
    server.hba("hostssl all all 127.0.0.1/32 trust", "hostssl all all ::1/128 trust")
    server.start_tcp()
    asyncio.run(_wait(server))
    yield server
    server.crash()


async def _wait(server: TcpServer) -> None:
    await (await server.connect()).close()


async def connected(dsn: str) -> Connection:
    """A connection like those of the store."""
    return await Connector(dsn).connect(command_seconds=5.0)


@contextlib.asynccontextmanager
async def opened(dsn: str) -> AsyncIterator[StatementRunner]:
    """A database that is open in the context."""
    door = StatementRunner(dsn)
    await door.open()
    try:
        yield door
    finally:
        await door.close()


# -- parameters


@pytest.mark.parametrize(
    "parameters",
    [
        "channel_binding=prefer", "channel_binding=disable", "gssencmode=disable", "gssencmode=prefer",
        "connect_timeout=10", "connect_timeout=0", "connect_timeout=-1", "keepalives=0", "keepalives=1&keepalives_idle=9",
        "keepalives_interval=5&keepalives_count=3&tcp_user_timeout=10000", "sslcompression=0", "sslsni=1", "requiressl=0",
        "application_name=billing", "fallback_application_name=x", "options=-c%20work_mem%3D8MB", "client_encoding=auto",
        "target_session_attrs=any", "target_session_attrs=read-write", "target_session_attrs=primary", "sslmode=prefer",
        "sslmode=allow", "sslmode=disable", "sslcertmode=disable", "load_balance_hosts=random", "gssdelegation=0",
        "replication=false", "require_auth=", "hostaddr=127.0.0.1", "work_mem=8MB", "max_protocol_version=latest",
        "options=-c%20default_transaction_isolation%3Dserializable", "default_transaction_isolation=serializable",
    ],
)  # fmt: skip
async def test_parameters_of_libpq_are_accepted(plain: TcpServer, parameters: str) -> None:
    connection = await connected(plain.tcp(parameters))
    assert connection.is_pinned
    assert await connection.fetchval("SHOW default_transaction_isolation") == "read committed"
    name = await connection.fetchval("SHOW application_name")
    assert name == (
        "billing" if "application_name=billing" in parameters else "x" if "=x" in parameters else "keyproxy"
    )
    if "work_mem" in parameters:
        assert await connection.fetchval("SHOW work_mem") == "8MB"
    await connection.close()


async def test_keepalives_are_on_and_as_configured(plain: TcpServer) -> None:
    for parameters, expected in (("", (1, None)), ("keepalives_idle=33", (1, 33)), ("keepalives=0", (0, None))):
        connection = await connected(plain.tcp(parameters))
        sock = connection.wire.get_extra_info("socket")
        own = socket.socket(fileno=os.dup(sock.fileno()))
        with own:
            assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == expected[0]
            if expected[1] is not None:
                assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == expected[1]
        await connection.close()


async def test_service_file_is_read(plain: TcpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "services"
    file.write_text(
        f"[db]\nhost=localhost\nport={plain.port}\nuser=keyproxy\ndbname=postgres\nchannel_binding=prefer\n"
        "[bad]\nhost=localhost\nchannel_binding=require\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    connection = await connected("postgresql:///?service=db")
    await connection.close()
    for service, why in (("bad", "channel_binding=require"), ("nobody", "nobody")):
        with pytest.raises(StoreUnavailable, match=why):
            await connected(f"postgresql:///?service={service}")


# -- TLS


@pytest.mark.parametrize("mode", ["", "prefer", "allow", "require", "verify-ca", "verify-full", "direct", "system"])
async def test_server_that_requires_tls_gets_it(secure: TcpServer, roots: Path, mode: str) -> None:
    parameters = {
        "": "",
        "direct": f"sslmode=require&sslrootcert={roots}&sslnegotiation=direct",
        "system": "sslrootcert=system",
    }.get(mode, f"sslmode={mode}" + (f"&sslrootcert={roots}" if mode.startswith("verify") else ""))
    if mode == "system":
        # The test authority is not among the system's roots.
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            await connected(secure.tcp(parameters))
        return
    if mode == "direct" and secure.major < 17:
        pytest.skip("direct TLS needs PostgreSQL 17 or later")
    for _ in range(2):
        connection = await connected(secure.tcp(parameters))
        assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        await connection.close()


@pytest.mark.parametrize("mode", ["", "prefer", "allow", "disable"])
async def test_server_without_tls_is_accepted_if_tls_is_only_preferred(plain: TcpServer, mode: str) -> None:
    for _ in range(2):
        await (await connected(plain.tcp(f"sslmode={mode}" if mode else ""))).close()


@pytest.mark.parametrize("mode", ["require", "verify-full"])
async def test_server_without_tls_is_rejected_if_tls_is_required(plain: TcpServer, roots: Path, mode: str) -> None:
    async with opened(plain.tcp(f"sslmode={mode}&sslrootcert={roots}")) as door:
        with pytest.raises(StoreUnavailable, match=f"localhost:{plain.port}, database 'postgres': .*SSL"):
            await door.fetch("tenants", "", 1)


async def test_wrong_certificate_is_rejected(secure: TcpServer, home: Path) -> None:
    other = home / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    for mode in ("require", "verify-ca", "verify-full"):
        async with opened(secure.tcp(f"sslmode={mode}&sslrootcert={other}")) as door:
            with pytest.raises(StoreUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await door.fetch("tenants", "", 1)


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ("sslmode=verify-full", "sslmode=verify-full needs sslrootcert"),
        ("sslmode=verify-ca&sslrootcert=/nowhere", "sslrootcert=/nowhere cannot be read"),
        ("sslmode=require&sslcert=/nowhere", "sslcert=/nowhere"),
        ("sslmode=require&ssl_min_protocol_version=TLSv9", "ssl_min_protocol_version=TLSv9"),
    ],
)  # fmt: skip
async def test_error_message_names_an_unreadable_file(
    secure: TcpServer, parameters: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    async with opened(secure.tcp(parameters)) as door:
        with pytest.raises(StoreUnavailable, match=why):
            await door.fetch("tenants", "", 1)


@pytest.mark.parametrize("mode", ["", "prefer", "require", "disable"])
async def test_home_of_another_user_does_not_prevent_connecting(
    secure: TcpServer, plain: TcpServer, mode: str, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can run a process as another user")
    tmp_path.chmod(0o700)
    program = (
        "import asyncio, concurrent.futures.thread, encodings.idna, os, sys\n"
        "from keyproxy.store.postgres.connecting import Connector\n"
        "async def connect():\n    await (await Connector(sys.argv[1]).connect(command_seconds=5.0)).close()\n"
        # After the imports: the other user may lack access to this Python.
        "os.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\nasyncio.run(connect())\n"
    )
    server = plain if mode == "disable" else secure
    dsn = server.tcp(f"sslmode={mode}" if mode else "")
    done = await asyncio.to_thread(
        lambda: subprocess.run(
            [sys.executable, "-c", program, dsn],
            env=os.environ | {"HOME": str(tmp_path)},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    )
    assert done.returncode == 0, done.stderr


# -- several hosts


async def test_unresponsive_host_times_out_once_and_the_next_one_is_used(plain: TcpServer) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        where = f"localhost:{silent.getsockname()[1]},localhost:{plain.port}"
        target = Connector(f"postgresql://keyproxy@{where}/postgres?sslmode=disable")
        started = time.monotonic()
        await (await target.connect(command_seconds=1.0)).close()
        assert 0.5 < time.monotonic() - started < 3.0
        started = time.monotonic()
        await (await target.connect(command_seconds=1.0)).close()
        assert time.monotonic() - started < 0.5
        assert target.where == f"{where}, database 'postgres'"


# -- messages


async def test_failures_name_the_server_and_never_the_password(short_directory: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    for dsn, where in (
        (f"postgresql://kp:hunter2@localhost:{port}/billing", f"localhost:{port}, database 'billing'"),
        (f"postgresql://kp:hunter2@/billing?host={short_directory}", f"{short_directory}/.s.PGSQL.5432"),
        (f"postgresql://kp@[::1]:{port}/billing?password=hunter2", f"[::1]:{port}, database 'billing'"),
    ):
        async with opened(dsn) as door:
            with pytest.raises(StoreUnavailable) as caught:
                await door.fetch("tenants", "", 1)
            assert where in str(caught.value)
            assert where in door.down_because
            assert "hunter2" not in str(caught.value)
        with pytest.raises(StoreUnavailable) as raised:
            await NotificationListener(dsn, CHANNEL).open(lambda: None, lambda: None)
        assert where in str(raised.value)
        with pytest.raises(StoreUnavailable) as migrating:
            await migrations.migrate(dsn)
        assert where in str(migrating.value)
        assert "hunter2" not in f"{raised.value}{migrating.value}"


# -- a server that becomes read-only


async def test_results_of_a_server_that_became_read_only_are_discarded(start_server: StartServer) -> None:
    server = start_server()
    await migrations.migrate(server.dsn())
    sql: Sql = await asyncpg.connect(server.dsn())
    await add_user(sql)
    secret = await add_key(sql)
    kept: list[object] = []
    async with opened(server.dsn()) as door:
        look_ups = LookupBatcher(door, BY_DIGEST, lambda _digest, row: kept.append(row), look_ups_max=2)
        await door.fetch("tenants", "", 1)
        moves = door.moves
        try:
            await _make_read_only(sql, server.dsn(), "on")
            with pytest.raises(Exception, match="read-only"):
                await look_ups.fetch_missing(secret.digest(), is_known=False, is_kept=lambda: True)
            assert not kept
            assert door.moves > moves
            assert "read-only" in door.down_because
            with pytest.raises(StoreUnavailable, match="read-only"):
                async with door.transaction() as transaction:
                    await transaction.fetch("tenants", "", 1)
            with pytest.raises(StoreUnavailable, match="read-only"):
                await NotificationListener(server.dsn(), CHANNEL).open(lambda: None, lambda: None)
        finally:
            await _make_read_only(sql, server.dsn(), "off")
        await door.fetch("tenants", "", 1)
        assert door.is_up
        await look_ups.fetch_missing(secret.digest(), is_known=False, is_kept=lambda: True)
        assert len(kept) == 1
        await look_ups.close()
        await sql.execute("DELETE FROM keyproxy.tenants")
    await sql.close()


async def _make_read_only(sql: Sql, dsn: str, value: str) -> None:
    """Make the server read-only, as in a switchover; it reports this to open connections soon after."""
    await sql.execute("SET default_transaction_read_only = off")
    await sql.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
    await sql.execute("SELECT pg_reload_conf()")
    async with asyncio.timeout(10):
        while True:
            other: Sql = await asyncpg.connect(dsn)
            is_in_effect = bool(standing(other)) == (value == "on")
            await other.close()
            if is_in_effect:
                return


async def test_error_raised_by_our_ledger_does_not_count_as_a_failover(dsn: str) -> None:
    async with opened(dsn) as door:
        empty: list[list[object]] = [[] for _ in range(18)]
        await door.fetch("sync_leases", "holder", 5, 10.0, *empty)
        with pytest.raises(StoreUnavailable, match="later message"):
            await door.fetch("sync_leases", "holder", 4, 10.0, *empty)
        assert door.moves == 0


async def test_refused_statement_does_not_count_as_a_failover(dsn: str) -> None:
    async with opened(dsn) as door:
        with pytest.raises(StoreConflict):
            await door.fetch("create_tenant", "a b", "", None)
        assert door.moves == 0


async def test_lost_connection_replaces_every_connection(dsn: str, sql: Sql) -> None:
    pids = "SELECT pid FROM pg_stat_activity WHERE application_name = 'keyproxy' AND datname = current_database()"

    async def lose(door: StatementRunner) -> None:
        async with door.transaction() as transaction:
            await transaction.fetch("tenants", "", 1)
            # The only connection in a transaction.
            await sql.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE state LIKE 'idle in %'"
            )
            await transaction.fetch("tenants", "", 1)

    async with opened(dsn) as door:
        await asyncio.gather(*(door.fetch("tenants", "", 1) for _ in range(4)))
        before = {row["pid"] for row in await sql.fetch(pids)}
        with pytest.raises(StoreUnavailable):
            await lose(door)
        assert door.moves == 1
        await door.fetch("tenants", "", 1)
        assert {row["pid"] for row in await sql.fetch(pids)} - before
        assert door.is_up
