"""Become a PostgreSQL program that may run here and that does not outlive its owner.

Run as a script, `pg_launcher.py OWNER_PID PROGRAM [ARG ...]`, so that none of this happens in the owner's process.
PostgreSQL refuses to run as root. As root this process therefore moves into a user namespace of its own, in which it is
uid 1000 and whose files still belong to root outside; where namespaces are denied it becomes `nobody`. Either way it asks
the kernel to be sent SIGINT, PostgreSQL's fast shutdown, when its owner dies, however the owner dies.

`pg_launcher.py --probe` exits 0 if a namespace can be had, 3 if not, 4 if it is not needed.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
import sys
from pathlib import Path

NAMESPACE, NOBODY, PLAIN = 0, 3, 4

_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1
_INSIDE_ID = 1000


def _enter_namespace() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER) != 0:
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{_INSIDE_ID} 0 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{_INSIDE_ID} 0 1", encoding="ascii")
    except OSError:
        return False
    return True


def _become_nobody() -> None:
    nobody = pwd.getpwnam("nobody")
    os.setgroups([])
    os.setgid(nobody.pw_gid)
    os.setuid(nobody.pw_uid)


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
        sys.exit(PLAIN if os.geteuid() != 0 else NAMESPACE if _enter_namespace() else NOBODY)
    if os.geteuid() == 0 and not _enter_namespace():
        _become_nobody()
    _die_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
