"""One cluster of the embedded PostgreSQL: making it, having a server started on it, and whether one runs."""

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

#: Of postmaster.pid: the pid is on the first line, the state on the eighth.
_STATE_LINE: Final = 7

#: What the server and its keeper, who may outlive their starter, are given of its environment: no secret among it.
_ENVIRONMENT: Final = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TZ")


class Place(NamedTuple):
    """Where a server lives: the cluster and all that belongs to it, and the socket, which needs a short path."""

    directory: Path
    sockets: Path

    @property
    def cluster(self) -> Path:
        """The data directory."""
        return self.directory / "pgdata"


class Postmaster(NamedTuple):
    """A server that runs. `state` is `ready`, `starting` or `stopping`, as it says itself."""

    pid: int
    state: str


def initialise(binaries: Binaries, cluster: Path) -> None:
    """Make the cluster, with a database. Raises EmbeddedError, OSError, SubprocessError."""
    # Made aside and renamed: a cluster is either whole or not there, whenever this is interrupted.
    # Under a name of its own: what is left of an interrupted attempt may still be at work for a moment.
    for left in cluster.parent.glob("pgdata.new*"):
        shutil.rmtree(left, ignore_errors=True)
    draft = cluster.with_name(f"pgdata.new-{secrets.token_hex(4)}")
    command = [
        str(binaries.directory / "initdb"), "--pgdata", str(draft), "--username", SUPERUSER, "--auth", "trust",
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


def launch(binaries: Binaries, place: Place, settings: Mapping[str, str]) -> None:
    """Start a keeper with the server; it is ready when this returns. Raises EmbeddedError, OSError, SubprocessError."""
    command = [str(binaries.directory / "postgres"), "-D", str(place.cluster), "-k", str(place.sockets)]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    path = place.directory / "server.log"
    with os.fdopen(opened(path, os.O_TRUNC), "wb") as log, subprocess.Popen(
        [sys.executable, "-I", "-S", server_keeper.__file__, str(place.directory), str(place.sockets), *command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True, cwd="/", env=environment,
    ) as keeper:  # fmt: skip
        assert keeper.stdout is not None  # noqa: S101 - for the type checker
        _wait_until_ready(place.cluster, keeper.stdout, path)


def _launcher(command: list[str]) -> list[str]:
    return [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), *command]


def _wait_until_ready(cluster: Path, kept: IO[bytes], log: Path) -> None:
    """`kept` ends with the keeper, and he with the server."""
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
    """Whether a server runs on this cluster already; one that is just stopping is waited for. Raises EmbeddedError."""
    deadline = time.monotonic() + _STOP_SECONDS
    while (running := postmaster(cluster)) is not None:
        if running.state == "ready":
            return True
        if time.monotonic() > deadline:
            raise EmbeddedError(f"the server of {cluster} has been {running.state!r} for {_STOP_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)
    return False


def wait_until_gone(pid: int, cluster: Path) -> None:
    """Wait until this server of the cluster has ended, as it is about to."""
    deadline = time.monotonic() + 2 * _STOP_SECONDS
    while is_postmaster(pid, cluster):
        if time.monotonic() > deadline:
            _log.warning("the server of %s has not ended within %g s", cluster, 2 * _STOP_SECONDS)
            return
        time.sleep(_POLL_SECONDS)


def postmaster(cluster: Path) -> Postmaster | None:
    """The server that runs on this cluster, if there is one."""
    try:
        lines = (cluster / "postmaster.pid").read_bytes().splitlines()
        pid = int(lines[0])
    except (FileNotFoundError, IndexError, ValueError):
        return None
    if not is_postmaster(pid, cluster):
        return None
    return Postmaster(pid, lines[_STATE_LINE].decode().strip() if len(lines) > _STATE_LINE else "starting")


def is_postmaster(pid: int, cluster: Path) -> bool:
    """Whether this process is the server of this cluster, and not somebody else who has the pid by now."""
    try:
        if b"postgres" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return False
        return Path(f"/proc/{pid}/cwd").samefile(cluster)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError:
        return True  # a PostgreSQL of another user: rather wait for it in vain than start a second one


def opened(path: Path, flags: int = 0) -> int:
    """A file of the directory, which may be that of a user who has less rights than we have: no link is followed."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
