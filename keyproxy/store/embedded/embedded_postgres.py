"""An embedded, real PostgreSQL server, for evaluation, tests, and single machines: `store.dsn = "embedded"`.

One directory holds one cluster. The first process starts its server, later ones attach to it, and all are equal: a
separate process (see server_keeper) keeps the server running while any process uses it, and shuts it down when the last
one has stopped or exited, even by `kill -9`. If the server crashes, processes inside `watched` restart it. It listens on
a unix socket in a directory that only its user can enter.

Rejected: the wheel's own `get_server()`. As root it adds a system user and loosens permissions up to `/`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import pwd
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

from keyproxy.store.embedded import cluster, launcher, postgres_binaries
from keyproxy.store.embedded.cluster import DATABASE, PORT, SUPERUSER, ServerPaths, opened, postmaster
from keyproxy.store.embedded.postgres_binaries import EmbeddedError

__all__ = ["DATABASE", "EmbeddedError", "EmbeddedServer", "default_directory", "exists", "start"]

_log = logging.getLogger(__name__)

#: sun_path holds 108 bytes with its final NUL.
_SOCKET_PATH_BYTES_MAX: Final = 107

#: How often a watched server is checked, and the pauses between attempts to restart it.
_LOOK_SECONDS: Final = 1.0
_BACKOFF_SECONDS: Final = (1.0, 2.0, 5.0, 10.0, 30.0)
_GIVE_UP_SECONDS: Final = 5.0

_SETTINGS: Final = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "log_min_messages": "warning",
}


class EmbeddedServer:
    """A running server. This process uses it until `stop` is called or the process exits."""

    def __init__(self, paths: ServerPaths, settings: Mapping[str, str], users: int) -> None:
        """`users`: a file descriptor that holds the shared lock; `stop` closes it."""
        self.socket_directory = paths.sockets
        self._paths = paths
        self._settings = settings
        self._users: int | None = users

    def dsn(self, database: str = DATABASE) -> str:
        """The connection URI of a database."""
        return f"postgresql://{SUPERUSER}@/{database}?host={quote(str(self.socket_directory))}&port={PORT}"

    def stop(self) -> None:
        """Stop using the server. If no other process uses it, wait for it to shut down, so that everything is on disk."""
        users, self._users = self._users, None
        if users is None:
            return
        running = postmaster(self._paths.cluster)
        try:
            # No other process uses it, or its keeper found that out between our two lock calls.
            is_last = _is_locked(users, fcntl.LOCK_EX) or not _is_locked(users, fcntl.LOCK_SH)
        finally:
            os.close(users)
        if is_last and running is not None:
            cluster.wait_until_gone(running.pid, self._paths.cluster)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Restart the server whenever it exits while the context is active."""
        over = threading.Event()
        watching = threading.Thread(target=self._watch, args=(over,), name="embedded-postgresql", daemon=True)
        watching.start()
        try:
            yield
        finally:
            over.set()
            # Bounded: a server that is being started for this process alone exits after `stop`.
            watching.join(_GIVE_UP_SECONDS)

    def _watch(self, over: threading.Event) -> None:
        pause, failures = _LOOK_SECONDS, 0
        while not over.wait(pause):
            pause = _LOOK_SECONDS
            if postmaster(self._paths.cluster) is not None:
                continue
            try:
                if _bring_up(self._paths, self._settings, is_made=True):
                    _log.warning("the embedded PostgreSQL had exited and was restarted")
                failures = 0
            except EmbeddedError as error:
                pause = _BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)]
                failures += 1
                _log.log(logging.ERROR if failures == 1 else logging.DEBUG, "%s; retrying in %g s", error, pause)


def default_directory(environment: Mapping[str, str]) -> Path:
    """`keyproxy/postgres` in the user's data directory."""
    data = environment.get("XDG_DATA_HOME", "")
    base = Path(data) if data.startswith("/") else Path(environment.get("HOME") or "~").expanduser() / ".local/share"
    return base / "keyproxy" / "postgres"


def exists(directory: Path) -> bool:
    """Whether this directory has a database already, so that `start` creates none. Raises EmbeddedError."""
    with _errors_translated(directory):
        directory = directory.resolve()
        if os.geteuid() == 0 and _launch_kind() == launcher.NOBODY:
            directory = _of_nobody(directory)
        return (ServerPaths(directory, directory).cluster / "PG_VERSION").exists()


def start(directory: Path, settings: Mapping[str, str] | None = None) -> EmbeddedServer:
    """Start the server of this directory, or attach to it. Raises EmbeddedError.

    A process that attaches gets the server with the settings of the process that started it.
    """
    wanted = {**_SETTINGS, **(settings or {})}
    launch = _launch_kind()
    with contextlib.ExitStack() as undo, _errors_translated(directory):
        directory = _prepared(directory, launch)
        paths = ServerPaths(directory, _socket_directory(directory, launch))
        users = opened(directory / "users")
        undo.callback(os.close, users)
        # Waits while an unused server is shutting down.
        fcntl.flock(users, fcntl.LOCK_SH)
        _bring_up(paths, wanted, is_made=False)
        undo.pop_all()
        return EmbeddedServer(paths, wanted, users)


@contextlib.contextmanager
def _errors_translated(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedError(f"the embedded PostgreSQL in {directory} cannot be used: {error}") from error


def _bring_up(paths: ServerPaths, settings: Mapping[str, str], *, is_made: bool) -> bool:
    """Start the server if none is running; whether it did. `is_made`: its data must exist. Raises EmbeddedError."""
    with _errors_translated(paths.root), _only_one(paths.root):
        if cluster.wait_until_settled(paths.cluster):
            return False
        if is_made and not (paths.cluster / "PG_VERSION").exists():
            raise EmbeddedError(f"the embedded PostgreSQL has exited, and {paths.cluster} is gone")
        binaries = postgres_binaries.matching(paths.cluster)
        if not (paths.cluster / "PG_VERSION").exists():
            cluster.initialise(binaries, paths.cluster)
        cluster.launch(binaries, paths, settings)
        return True


def _launch_kind() -> int:
    probe = [sys.executable, "-I", "-S", launcher.__file__, "--probe"]
    launch = subprocess.run(probe, timeout=20, check=False).returncode
    if launch == launcher.NAMELESS:
        raise EmbeddedError(
            "PostgreSQL does not run as a user without a name, and user namespaces are not allowed: add uid"
            f" {os.geteuid()} to /etc/passwd, or set store.dsn to your own PostgreSQL server"
        )
    return launch


def _prepared(directory: Path, launch: int) -> Path:
    """The directory, created if missing. If the server has to run as `nobody`, a directory that this user can use."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = directory.resolve()
    if launch == launcher.NOBODY:
        directory = _of_nobody(directory)
        nobody = pwd.getpwnam("nobody").pw_uid
        if not directory.exists():
            directory.mkdir(mode=0o700)
            os.chown(directory, nobody, -1)
        status = directory.lstat()
        if status.st_uid != nobody or status.st_mode & 0o077:
            raise EmbeddedError(f"{directory} is not a private directory of the user nobody")
    return directory


def _of_nobody(directory: Path) -> Path:
    """The directory that the user `nobody` uses in place of one of root's."""
    name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    return Path("/var/tmp") / f"keyproxy-{name}"  # noqa: S108 - its owner is checked before it is used


def _socket_directory(directory: Path, launch: int) -> Path:
    sockets = directory / "run"
    # PostgreSQL and its clients treat a comma as the end of a path.
    if len(os.fsencode(sockets / f".s.PGSQL.{PORT}")) > _SOCKET_PATH_BYTES_MAX or "," in str(sockets):
        name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
        sockets = Path("/tmp") / f"keyproxy-{os.geteuid()}-{name}"  # noqa: S108 - checked to be ours alone, below
    if not sockets.exists():
        sockets.mkdir(mode=0o700)
        if launch == launcher.NOBODY:
            os.chown(sockets, pwd.getpwnam("nobody").pw_uid, -1)
    status = sockets.lstat()
    owner = pwd.getpwnam("nobody").pw_uid if launch == launcher.NOBODY else os.geteuid()
    if status.st_uid != owner or status.st_mode & 0o077:
        raise EmbeddedError(f"{sockets} is not a private directory of the user the server runs as")
    return sockets


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Of several processes that start at once, only one starts the server; the others wait and attach."""
    lock = opened(directory / "lock")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _is_locked(file: int, kind: int) -> bool:
    """Try to take this lock; whether it is held now. A lock of the other kind is lost either way."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
