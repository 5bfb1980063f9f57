"""Become a PostgreSQL program that may run here and that does not outlive its owner: its keeper, or who initialises it.

Run as a script, `pg_launcher.py OWNER_PID PROGRAM [ARG ...]`, so that none of this happens in the owner's process.
PostgreSQL refuses to run as root, and as a user that has no name, which is what a container with an arbitrary uid has. As
either this process therefore moves into a user namespace of its own, in which it is `nobody` and whose files still belong
to the same user outside; where namespaces are denied, root becomes `nobody`. Either way it asks the kernel to be sent
SIGINT, PostgreSQL's fast shutdown, when its owner dies, however the owner dies.

`pg_launcher.py --probe` exits 0 if a namespace can be had, 3 if root has to become `nobody`, 4 if nothing is needed, 5 if
the user has no name and nothing can be done about it.
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
            "PostgreSQL does not run as root, user namespaces are denied, and the user nobody cannot reach "
            f"{program}: open its directories to all users, or run as another user"
        )


def _die_with(owner: int) -> None:
    # After the change of user, which clears the setting; before exec, which keeps it.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0) != 0:
        sys.exit("prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != owner:
        sys.exit("the owner is gone already")


def main() -> None:
    """See the module."""
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
