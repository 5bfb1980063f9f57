"""The standard streams of a process that was started without some of them (`<&-`, `>&-`, `2>&-`).

A descriptor that is not open is given to the next file or socket that is opened, and everything printed would end up in
it; libraries that expect 0, 1 and 2 to be open abort. So what is missing is opened before anything else.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Final

#: Which of the three were missing when the process started.
_missing: Final[set[int]] = set()


def open_missing() -> None:
    """Connect each standard stream that is not open to /dev/null. To be called before anything is opened."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest descriptor that is free is the missing one.
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)
            _missing.add(opened)
    if sys.stdin is None:
        sys.stdin = _text(0, "r")
    if sys.stdout is None:
        sys.stdout = _text(1, "w")
    if sys.stderr is None:
        sys.stderr = _text(2, "w")


def is_stdout_missing() -> bool:
    """Whether what is printed on stdout reaches nothing: there was no stdout when the process started."""
    return 1 in _missing


def abandon(fd: int) -> None:
    """Let what is printed on this stream from now on, or is still in a buffer, reach nothing.

    After a write has failed: the interpreter would try it again at exit, and complain.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


def _text(fd: int, mode: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(open(fd, f"{mode}b", closefd=False), encoding="utf-8", errors="backslashreplace")
