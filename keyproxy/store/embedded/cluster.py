"""One cluster of the embedded PostgreSQL: create it, start a server on it, find out whether one is running."""

from __future__ import annotations

import logging
import os
import secrets
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final, NamedTuple

from keyproxy.store.embedded import launcher, server_keeper
from keyproxy.store.embedded.postgres_binaries import Binaries, EmbeddedError

_log = logging.getLogger(__name__)

DATABASE: Final = "keyproxy"
SUPERUSER: Final = "keyproxy"
PORT: Final = 5432

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 20.0
_POLL_SECONDS: Final = 0.02

#: In postmaster.pid, the pid is on the first line and the state on the eighth.
_STATE_LINE: Final = 7

#: The environment variables that the server and its keeper inherit. Both may outlive the process that started them, so no
#: secret is passed on.
_ENVIRONMENT: Final = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TZ")


class ServerPaths(NamedTuple):
    """The directories of a server: one for the cluster and its files, one for the socket, which needs a short path."""

    root: Path
    sockets: Path

    @property
    def cluster(self) -> Path:
        """The data directory."""
        return self.root / "pgdata"


class Postmaster(NamedTuple):
    """A running server. `state` is `ready`, `starting` or `stopping`, read from postmaster.pid."""

    pid: int
    state: str


def initialise(binaries: Binaries, cluster: Path) -> None:
    """Create the cluster and its database. Raises EmbeddedError, OSError, SubprocessError."""
    # Create it elsewhere, then rename it: an interruption never leaves half a cluster behind.
    # The name is unique because the processes of an interrupted attempt may still be running for a moment.
    for left in cluster.parent.glob("pgdata.new*"):
        shutil.rmtree(left, ignore_errors=True)
    draft = cluster.with_name(f"pgdata.new-{secrets.token_hex(4)}")
    command = [
        str(binaries.directory / "initdb"),
        "--pgdata",
        str(draft),
        "--username",
        SUPERUSER,
        "--auth",
        "trust",
        "--encoding",
        "UTF8",
        "--no-locale",
        "--no-instructions",
    ]
    done = subprocess.run(_launcher(command), capture_output=True, text=True, timeout=300, check=False, cwd="/")
    if done.returncode != 0:
        raise EmbeddedError(f"initdb failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    _create_database(binaries, draft)
    draft.rename(cluster)


def _create_database(binaries: Binaries, cluster: Path) -> None:
    command = [str(binaries.directory / "postgres"), "--single", "-D", str(cluster), "postgres"]
    done = subprocess.run(
        _launcher(command),
        input=f"CREATE DATABASE {DATABASE};\n",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd="/",
    )
    if done.returncode != 0 or "ERROR" in done.stderr:
        raise EmbeddedError(f"the database could not be created: {done.stderr.strip()[-2000:]}")


def launch(binaries: Binaries, paths: ServerPaths, settings: Mapping[str, str]) -> None:
    """Start a keeper with the server and wait until it is ready. Raises EmbeddedError, OSError, SubprocessError."""
    command = [str(binaries.directory / "postgres"), "-D", str(paths.cluster), "-k", str(paths.sockets)]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    path = paths.root / "server.log"
    with (
        os.fdopen(opened(path, os.O_TRUNC), "wb") as log,
        subprocess.Popen(
            [sys.executable, "-I", "-S", server_keeper.__file__, str(paths.root), str(paths.sockets), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env=environment,
        ) as keeper,
    ):
        assert keeper.stdout is not None  # noqa: S101 - for the type checker
        _wait_until_ready(paths.cluster, keeper.stdout, path)


def _launcher(command: list[str]) -> list[str]:
    return [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), *command]


def _wait_until_ready(cluster: Path, kept: IO[bytes], log: Path) -> None:
    """`kept` reaches its end when the keeper exits, and the keeper exits with the server."""
    deadline = time.monotonic() + _START_SECONDS
    ended = select.poll()
    ended.register(kept, select.POLLIN)
    while (running := postmaster(cluster)) is None or running.state != "ready":
        if ended.poll(_POLL_SECONDS * 1000):
            raise EmbeddedError(f"PostgreSQL did not start: {_tail(log)}")
        if time.monotonic() > deadline:
            raise EmbeddedError(f"PostgreSQL was not ready after {_START_SECONDS:g} s: {_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " / ".join(lines[-5:])


def wait_until_settled(cluster: Path) -> bool:
    """Whether a server is already running on this cluster. Waits for one that is stopping. Raises EmbeddedError."""
    deadline = time.monotonic() + _STOP_SECONDS
    while (running := postmaster(cluster)) is not None:
        if running.state == "ready":
            return True
        if time.monotonic() > deadline:
            raise EmbeddedError(f"the server of {cluster} has been {running.state!r} for {_STOP_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)
    return False


def wait_until_gone(pid: int, cluster: Path) -> None:
    """Wait for this server of the cluster, which is shutting down, to exit."""
    deadline = time.monotonic() + 2 * _STOP_SECONDS
    while is_postmaster(pid, cluster):
        if time.monotonic() > deadline:
            _log.warning("the server of %s did not exit within %g s", cluster, 2 * _STOP_SECONDS)
            return
        time.sleep(_POLL_SECONDS)


def postmaster(cluster: Path) -> Postmaster | None:
    """The server running on this cluster, or None."""
    try:
        lines = (cluster / "postmaster.pid").read_bytes().splitlines()
        pid = int(lines[0])
    except (FileNotFoundError, IndexError, ValueError):
        return None
    if not is_postmaster(pid, cluster):
        return None
    return Postmaster(pid, lines[_STATE_LINE].decode().strip() if len(lines) > _STATE_LINE else "starting")


def is_postmaster(pid: int, cluster: Path) -> bool:
    """Whether this process is the server of this cluster, rather than another process that reuses the pid."""
    try:
        if b"postgres" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return False
        return Path(f"/proc/{pid}/cwd").samefile(cluster)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError:
        return True  # another user's PostgreSQL: waiting in vain is better than starting a second one


def opened(path: Path, flags: int = 0) -> int:
    """Open a file of the directory without following links: a user with fewer rights may own the directory."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
