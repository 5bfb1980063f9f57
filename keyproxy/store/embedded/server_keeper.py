"""Keep one PostgreSQL for as long as anybody uses it, and end it when nobody does any more.

Run as a script, `pg_keeper.py DIRECTORY SOCKETS PROGRAM [ARG ...]`. Who uses the server holds a shared lock on the file
`users` of its directory; the kernel takes it from whoever ends, however he ends. The keeper waits for the exclusive lock,
for which it sleeps in the kernel. While it holds it, until the server is gone, nobody can begin to use the server.

There is one server for a directory: it inherits, with all its processes, the lock on the file `server`. The kernel knows
that lock also where it does not know the processes, in another container that shares the volume.

The server has the keeper as its parent, and is told by the kernel to end in order should the keeper be killed. The keeper
belongs to nobody: it is no child of whoever started it, has a session of its own, holds no file of its starter's but a
pipe, whose end says that there is no server any more, and asks nobody's signals when to end but its users' locks.

Rejected: the first user as the owner, with whom the server ends under all others; asking again and again who still lives.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path

#: After which a server that is asked to end is told to, without writing out what it has: it recovers at its next start.
_STOP_SECONDS = 20.0

#: For which the processes of a server that was killed are waited for.
_PREDECESSOR_SECONDS = 2.0

_UNHEARD = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """See the module."""
    directory, sockets, *command = sys.argv[1:]
    users = os.open(Path(directory, "users"), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    if os.fork() != 0:
        os._exit(0)
    _take(Path(directory, "server"))
    _release(Path(directory, "pgdata"), Path(sockets))
    launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("launcher.py")), str(os.getpid())]
    # Its output goes to the log, which is our stderr: the pipe on stdout is the keeper's alone.
    # A service manager sends SIGTERM to all processes of a service at once, and those that use the server have yet to
    # finish. The server itself ignores nothing, whatever its starter did: it has to hear of the keeper's end.
    for number in _UNHEARD:
        signal.signal(number, signal.SIG_IGN)
    server = os.posix_spawn(
        sys.executable, [*launcher, *command], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)], setsid=True,
        setsigdef=_UNHEARD,
    )  # fmt: skip
    threading.Thread(target=_end_when_unused, args=(users, server), daemon=True).start()
    os.waitpid(server, 0)
    os._exit(0)


def _take(path: Path) -> None:
    """Lock the file for the server and this process. What is left of one that was killed is waited for."""
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
                    "a server of this directory runs where its processes are not to be seen: in another container?"
                )
            time.sleep(0.02)


def _end_when_unused(users: int, server: int) -> None:
    try:
        fcntl.flock(users, fcntl.LOCK_EX)
    finally:
        # Also if it cannot be waited for: rather no server than one that nobody ends.
        os.kill(server, signal.SIGINT)
    time.sleep(_STOP_SECONDS)
    os.kill(server, signal.SIGQUIT)


def _release(cluster: Path, sockets: Path) -> None:
    """Make what a server that was killed has left behind acceptable to the next one.

    PostgreSQL refuses to start if the pid in the file is anybody's, except its parent's, which we are. The rest of the
    file has to stay: by it PostgreSQL sees whether children of the old server are still at work.
    """
    for lock in sockets.glob(".s.PGSQL.*.lock"):
        lock.unlink()
    left = cluster / "postmaster.pid"
    if left.exists():
        lines = left.read_bytes().splitlines(keepends=True)
        left.write_bytes(b"".join([b"%d\n" % os.getpid(), *lines[1:]]))


if __name__ == "__main__":
    main()
