"""Keep one PostgreSQL server running while any process uses it, and shut it down after the last one.

Run as a script, `server_keeper.py DIRECTORY SOCKETS PROGRAM [ARG ...]`. Each process that uses the server has a shared
lock on the file `users` of its directory; the kernel releases it when the process exits, for whatever reason. The keeper
blocks on the exclusive lock, in the kernel. Once it has that lock, until the server is gone, no process can start using
the server.

There is one server per directory: the server and all its processes inherit the lock on the file `server`. That lock also
works across containers that share the volume, where the processes of the other container are not visible.

The keeper is the server's parent; if the keeper is killed, the kernel makes the server shut down in order. The keeper is
independent of the process that started it: it is not its child, has its own session, and shares only a pipe with it,
whose end-of-file means that the server is gone. It ignores signals; only the locks decide when it shuts the server down.

Rejected: the first user as the owner, since its exit would stop the server for all others; polling for live users.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path

#: Time for a shutdown. After it the server gets SIGQUIT, exits without a checkpoint, and recovers at its next start.
_STOP_SECONDS = 20.0

#: How long to wait for the remaining processes of a killed server.
_PREDECESSOR_SECONDS = 2.0

_UNHEARD = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Start the server, and run until it exits."""
    directory, sockets, *command = sys.argv[1:]
    users = os.open(Path(directory, "users"), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    if os.fork() != 0:
        os._exit(0)
    _take(Path(directory, "server"))
    _release(Path(directory, "pgdata"), Path(sockets))
    launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("launcher.py")), str(os.getpid())]
    # The server's output goes to the log, our stderr: the pipe on stdout must end with the keeper.
    # A service manager sends SIGTERM to all processes of a service at once, while those that use the server still have
    # work to finish. The server itself must not ignore signals: SIGINT notifies it of the keeper's death.
    for number in _UNHEARD:
        signal.signal(number, signal.SIG_IGN)
    server = os.posix_spawn(
        sys.executable,
        [*launcher, *command],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)],
        setsid=True,
        setsigdef=_UNHEARD,
    )
    threading.Thread(target=_end_when_unused, args=(users, server), daemon=True).start()
    os.waitpid(server, 0)
    os._exit(0)


def _take(path: Path) -> None:
    """Lock the file for the server and this process. Waits for the remaining processes of a killed server."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    os.set_inheritable(lock, True)
    deadline = time.monotonic() + _PREDECESSOR_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                sys.exit(
                    "a server of this directory is running, but its processes are not visible: in another container?"
                )
            time.sleep(0.02)


def _end_when_unused(users: int, server: int) -> None:
    try:
        fcntl.flock(users, fcntl.LOCK_EX)
    finally:
        # Also if taking the lock fails: no server is better than one that never stops.
        os.kill(server, signal.SIGINT)
    time.sleep(_STOP_SECONDS)
    os.kill(server, signal.SIGQUIT)


def _release(cluster: Path, sockets: Path) -> None:
    """Make the lock files of a killed server acceptable to the next one.

    PostgreSQL refuses to start if the pid in the file is that of any process except its parent, which is this one. The
    rest of the file must stay: from it PostgreSQL detects whether children of the old server are still running.
    """
    for lock in sockets.glob(".s.PGSQL.*.lock"):
        lock.unlink()
    left = cluster / "postmaster.pid"
    if left.exists():
        lines = left.read_bytes().splitlines(keepends=True)
        left.write_bytes(b"".join([b"%d\n" % os.getpid(), *lines[1:]]))


if __name__ == "__main__":
    main()
