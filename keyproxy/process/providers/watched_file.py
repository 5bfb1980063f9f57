"""A file that is examined again and again, and whose last good content stays in use.

It is examined by its identity, size and times. A file that was modified less than two seconds before it was read is read
again: within the granularity of file times, another change could leave no trace.

Content that was modified just now is read twice, so that a file that is being written in place is not used half-written.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

_log = logging.getLogger(__name__)

_CONTENT_BYTES_MAX: Final = 1 << 20

#: The coarsest granularity of file times, of FAT.
_GRANULARITY_NS: Final = 2_000_000_000

#: How long new content must stay unchanged, and how many examinations in a row may find it changing until it is used.
_QUIET_SECONDS: Final = 0.2
_POSTPONED_MAX: Final = 5

_Stamp = tuple[int, int, int, int, int]


class WatchedFileError(Exception):
    """A file cannot be read, or its content is invalid. The text is the reason, and quotes nothing of the content."""


class Sighting(NamedTuple):
    """What an examination has found: the content and the time of its modification, or why there is none."""

    content: bytes
    modified_wall_seconds: float
    because: str = ""


class WatchedFile:
    """One file. `take` receives its content and the time of its modification, at first and whenever it has changed; it
    raises ValueError for invalid content, which is then ignored."""

    def __init__(self, path: str, what: str, take: Callable[[bytes, float], None]) -> None:
        """`what`: the name of the file in the log."""
        self.path: Final = path
        self._what = what
        self._take = take
        self._stamp: _Stamp | None = None
        self._content: bytes | None = None
        self._failure: tuple[str, bytes] | None = None
        self._postponed = 0

    def load(self) -> None:
        """Read the file for the first time. Raises WatchedFileError."""
        sighting = self.examine()
        assert sighting is not None, "a file that was not read yet counts as changed"  # noqa: S101
        if sighting.because:
            raise WatchedFileError(f"{self._what}: {self.path}: cannot be read: {sighting.because}")
        try:
            self._take(sighting.content, sighting.modified_wall_seconds)
        except ValueError as error:
            raise WatchedFileError(f"{self._what}: {self.path}: {error}") from None
        self._content = sighting.content

    def examine(self) -> Sighting | None:
        """Read the file if it may have changed; None if it has not. Blocks, so it runs in a thread."""
        try:
            stamp = _stamp(Path(self.path).stat())
            if stamp == self._stamp:
                return None
            with open(self.path, "rb", opener=_open_without_waiting) as file:
                # Of the file that is open: another one may have replaced it.
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise ValueError("not a regular file")
                content = file.read(_CONTENT_BYTES_MAX + 1)
        except (OSError, ValueError) as error:
            self._stamp = None
            return Sighting(b"", 0.0, str(getattr(error, "strerror", None) or error))
        is_settled = time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > _GRANULARITY_NS
        self._stamp = _stamp(found) if is_settled else None
        return Sighting(content, found.st_mtime_ns / 1e9)

    def may_be_incomplete(self, sighting: Sighting) -> bool:
        """Whether the content is new, and was modified just now."""
        age_seconds = time.time() - sighting.modified_wall_seconds
        return not sighting.because and sighting.content != self._content and age_seconds < _QUIET_SECONDS

    def postpones(self, before: Sighting, after: Sighting | None) -> bool:
        """Whether the content changes between two examinations, so that the next one decides."""
        is_changing = after is not None and after.content != before.content
        self._postponed = self._postponed + 1 if is_changing else 0
        return is_changing and self._postponed < _POSTPONED_MAX

    def settle(self, sighting: Sighting) -> None:
        """Use what an examination has found. A failure leaves the content as it was."""
        because = sighting.because
        if not because and sighting.content != self._content:
            try:
                self._take(sighting.content, sighting.modified_wall_seconds)
                self._content = sighting.content
                _log.info("%s: new content is in use", self._what)
            except ValueError as error:
                because = str(error)
        failure = (because, sighting.content)
        if because and failure != self._failure:
            _log.error("%s: the last good content stays in use: %s: %s", self._what, self.path, because)
        elif self._failure and not because:
            _log.warning("%s: readable and valid again", self._what)
        self._failure = failure if because else None


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file as `open` does. A named pipe without a writer would block until one appears, and with it the
    examination of all other files."""
    return os.open(path, flags | os.O_NONBLOCK)


def examine_all(files: Sequence[WatchedFile]) -> list[Sighting | None]:
    """What to settle of each file, None for nothing. Blocks, so it runs in a thread."""
    found = [file.examine() for file in files]
    written = [n for n, sighting in enumerate(found) if sighting is not None and files[n].may_be_incomplete(sighting)]
    if written:
        time.sleep(_QUIET_SECONDS)
    for number in written:
        before, after = found[number], files[number].examine()
        if before is not None:
            found[number] = None if files[number].postpones(before, after) else after or before
    return found


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
