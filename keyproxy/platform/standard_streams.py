"""The standard streams of a process that was started without some of them (`<&-`, `>&-`, `2>&-`).

The next file or socket gets a descriptor that is not open, and would receive everything printed; libraries that expect
0, 1 and 2 to be open abort. So missing streams are opened before anything else.
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
    """Whether stdout was closed when the process started, so that output is discarded."""
    return 1 in _missing


def abandon(fd: int) -> None:
    """Discard the buffered and all further output of this stream.

    For use after a failed write: the interpreter would retry it at exit and print an error.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


def _text(fd: int, mode: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(open(fd, f"{mode}b", closefd=False), encoding="utf-8", errors="backslashreplace")
