"""Exec a PostgreSQL program as a user that it accepts, and tie its lifetime to its owner: the keeper or the initialiser.

Run as a script, `launcher.py OWNER_PID PROGRAM [ARG ...]`, so that the owner's own process does not change.
PostgreSQL refuses to run as root and as a user without a name, the usual case in a container with an arbitrary uid. For
either, this process enters a new user namespace, in which it is `nobody` while its files still belong to the same user
outside; where namespaces are not allowed, root becomes `nobody`. In every case the kernel sends it SIGINT, PostgreSQL's
fast shutdown, when its owner dies, for whatever reason.

`launcher.py --probe` exits with 0 if a namespace can be created, 3 if root has to become `nobody`, 4 if nothing is
needed, and 5 if the user has no name and namespaces are not allowed.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
import sys
from pathlib import Path

NAMESPACE, NOBODY, PLAIN, NAMELESS = 0, 3, 4, 5

_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1


def _is_needed() -> bool:
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        return True
    return os.geteuid() == 0


def _enter_namespace() -> bool:
    inside, user, group = pwd.getpwnam("nobody").pw_uid, os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER) != 0:
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{inside} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{inside} {group} 1", encoding="ascii")
    except OSError:
        return False
    return True


def _become_nobody(program: str) -> None:
    nobody = pwd.getpwnam("nobody")
    os.setgroups([])
    os.setgid(nobody.pw_gid)
    os.setuid(nobody.pw_uid)
    if not os.access(program, os.X_OK):
        sys.exit(
            "PostgreSQL does not run as root, user namespaces are not allowed, and the user nobody cannot access "
            f"{program}: make its directories accessible to all users, or run as another user"
        )


def _die_with(owner: int) -> None:
    # Must follow the change of user, which clears the setting, and precede exec, which keeps it.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0) != 0:
        sys.exit("prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != owner:
        sys.exit("the owner has already exited")


def main() -> None:
    """Probe, or change the user if needed and exec the program."""
    if sys.argv[1] == "--probe":
        if not _is_needed():
            sys.exit(PLAIN)
        sys.exit(NAMESPACE if _enter_namespace() else NOBODY if os.geteuid() == 0 else NAMELESS)
    if _is_needed() and not _enter_namespace():
        _become_nobody(sys.argv[2])
    _die_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
