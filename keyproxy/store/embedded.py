"""A real PostgreSQL of our own, for trying things out, tests, and single machines: `store.dsn = "embedded"`.

One directory holds one cluster. Whoever comes first starts its server and owns it; who comes while it runs attaches. The
server listens on a unix socket in a directory that only its user can enter, and is stopped when its owner ends, also by
`kill -9`, and whoever is attached.

Rejected: the wheel's own `get_server()`. As root it adds a system user and loosens permissions up to `/`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

from keyproxy.store import pg_binaries, pg_launcher
from keyproxy.store.pg_binaries import Binaries, EmbeddedError

__all__ = ["DATABASE", "EmbeddedError", "EmbeddedServer", "default_directory", "start"]

DATABASE: Final = "keyproxy"
_SUPERUSER: Final = "keyproxy"
_PORT: Final = 5432

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
        return f"postgresql://{_SUPERUSER}@/{database}?host={quote(str(self.socket_directory))}&port={_PORT}"

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
            binaries = pg_binaries.matching(cluster)
            if not (cluster / "PG_VERSION").exists():
                _initialise(binaries, cluster)
            process = _launch(binaries, cluster, sockets, {**_SETTINGS, **(settings or {})})
            server = EmbeddedServer(sockets, process)
            _wait_until_ready(cluster, process, directory / "server.log")
            return server
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedError(f"the embedded PostgreSQL in {directory} cannot be used: {error}") from error


def _launch_kind() -> int:
    probe = [sys.executable, "-I", "-S", pg_launcher.__file__, "--probe"]
    launch = subprocess.run(probe, timeout=20, check=False).returncode
    if launch == pg_launcher.NAMELESS:
        raise EmbeddedError(
            f"PostgreSQL does not run as a user without a name, and user namespaces are denied: give uid {os.geteuid()}"
            " an entry in /etc/passwd, or set store.dsn to a PostgreSQL of your own"
        )
    return launch


def _prepared(directory: Path, launch: int) -> Path:
    """The directory, made if need be. One that `nobody` can use, if that is who the server has to run as."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = directory.resolve()
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


def _socket_directory(directory: Path, launch: int) -> Path:
    sockets = directory / "run"
    # A comma ends a path, to PostgreSQL and to its clients.
    if len(os.fsencode(sockets / f".s.PGSQL.{_PORT}")) > _SOCKET_PATH_BYTES_MAX or "," in str(sockets):
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
        lines = (cluster / "postmaster.pid").read_bytes().splitlines()
        pid = int(lines[0])
    except (FileNotFoundError, IndexError, ValueError):
        return None
    if not _is_postmaster(pid, cluster):
        return None
    return lines[_STATE_LINE].decode().strip() if len(lines) > _STATE_LINE else "starting"


def _is_postmaster(pid: int, cluster: Path) -> bool:
    """Whether this process is the server of this cluster, and not somebody else who has the pid by now."""
    try:
        if b"postgres" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return False
        return Path(f"/proc/{pid}/cwd").samefile(cluster)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError:
        return True  # a PostgreSQL of another user: rather wait for it in vain than start a second one


def _release(cluster: Path, sockets: Path) -> None:
    """Make what a server that was killed has left behind acceptable to the next one.

    PostgreSQL refuses to start if the pid in the file is anybody's, except its parent's, which we are. The rest of the
    file has to stay: by it PostgreSQL sees whether children of the old server are still at work.
    """
    (sockets / f".s.PGSQL.{_PORT}.lock").unlink(missing_ok=True)
    left = cluster / "postmaster.pid"
    if left.exists():
        lines = left.read_bytes().splitlines(keepends=True)
        left.write_bytes(b"".join([b"%d\n" % os.getpid(), *lines[1:]]))


def _initialise(binaries: Binaries, cluster: Path) -> None:
    # Made aside and renamed: a cluster is either whole or not there, whenever this is interrupted.
    # Under a name of its own: what is left of an interrupted attempt may still be at work for a moment.
    for left in cluster.parent.glob("pgdata.new*"):
        shutil.rmtree(left, ignore_errors=True)
    draft = cluster.with_name(f"pgdata.new-{secrets.token_hex(4)}")
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
    _release(cluster, sockets)
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
