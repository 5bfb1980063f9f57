"""The access log: one JSON line per request on stdout, written without delaying requests.

Lines are formatted in batches many times a second, collected, and passed to a writer thread less often: each time, the
two threads exchange the GIL, which cost 3 % of a request at a hundred times a second. So a stalled reader of stdout
delays no request. The backlog is bounded; lines beyond the bound are dropped and counted.

Logged: the outcome, the identity, and the reason for a refusal. Never logged: a header value other than a valid request
id, a trace id or an address; a query, a body, a key, or a path that contains one.

The log may be limited to a fraction of the successes; refusals and failures are always logged.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from keyproxy.metrics.access_log_lines import AccessLogLines, LabelledExchange

_log = logging.getLogger(__name__)

_UNWRITTEN_BYTES_MAX: Final = 16 << 20

#: As many bytes are passed to the thread without waiting for `flush`.
_COLLECTED_BYTES: Final = 128 << 10
_CLOSE_SECONDS: Final = 2.0
_PIPE_BYTES: Final = 4096
_STDERR: Final = 2

_OK: Final = "ok"
_CLIENT_ERROR: Final = 400
_SERVER_ERROR: Final = 500


class AccessLog:
    """Writes the access log. Lines beyond the bound are dropped and counted."""

    def __init__(self, fd: int, *, wall_offset: Callable[[], float], has_siblings: bool = True) -> None:
        """`fd`: the output. `wall_offset`: the difference between Unix time and the clock of the exchanges.

        `has_siblings`: other processes may write to the same output.
        """
        self.dropped = 0
        #: The fraction of successes that is logged.
        self.success_share = 1.0
        self._fd = fd
        self._wall_offset = wall_offset
        #: Lines that the thread does not have yet.
        self._collected: list[bytes] = []
        self._collected_bytes = 0
        # The loop alone writes the first and the thread alone the second; their difference is the backlog.
        self._queued_bytes = 0
        self._written_bytes = 0
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="access-log", daemon=True)
        self._lines = AccessLogLines()
        self._writes_portions = _needs_portions(fd, has_siblings=has_siblings)

    def start(self) -> None:
        """Start the writer thread."""
        self._writer.start()

    def close(self) -> None:
        """Flush the backlog, within a timeout, and stop."""
        if self._writer.is_alive():
            self.flush()
            self._queue.put(None)
            self._writer.join(_CLOSE_SECONDS)

    def write(self, rows: Sequence[LabelledExchange]) -> None:
        """Log exchanges that have ended, by the next `flush`."""
        if self.success_share < 1.0:
            rows = [row for row in rows if row[3] != _OK or self._takes(row[0].status)]
            if not rows:
                return
        if self._queued_bytes - self._written_bytes > _UNWRITTEN_BYTES_MAX:
            self.dropped += len(rows)
            return
        self._collect(self._lines.text(rows, self._wall_offset()))
        if self._collected_bytes >= _COLLECTED_BYTES:
            self.flush()

    def write_line(self, line: bytes, status: int) -> None:
        """Log a finished line, with its line end, about a response with this status."""
        if status < _CLIENT_ERROR and not self._takes(status):
            return
        if self._queued_bytes - self._written_bytes > _UNWRITTEN_BYTES_MAX:
            self.dropped += 1
            return
        self._collect(line)
        self.flush()

    def flush(self) -> None:
        """Pass the collected lines to the writer thread."""
        if self._collected:
            self._queue.put(b"".join(self._collected))
            self._collected.clear()
            self._collected_bytes = 0

    def _takes(self, status: int) -> bool:
        """Whether to log a response that was relayed completely. A server error is not a success."""
        share = self.success_share
        if status >= _SERVER_ERROR or share >= 1.0:
            return True
        return share > 0.0 and random.random() < share  # noqa: S311 - no secret

    def _collect(self, lines: bytes) -> None:
        self._queued_bytes += len(lines)
        self._collected.append(lines)
        self._collected_bytes += len(lines)

    def _write_all(self) -> None:
        is_failing = False
        while (lines := self._queue.get()) is not None:
            try:
                for portion in _portions(lines) if self._writes_portions else (lines,):
                    view = memoryview(portion)
                    while view:
                        # Bound to a name, because mypyc evaluates the bound of a slice twice and would write twice.
                        written_bytes = os.write(self._fd, view)
                        view = view[written_bytes:]
                is_failing = False
            except OSError as error:
                self.dropped += lines.count(b"\n")
                if not is_failing:
                    _log.warning("cannot write the access log: %s; dropping lines until it is writable", error)
                is_failing = True
            self._written_bytes += len(lines)


def _needs_portions(fd: int, *, has_siblings: bool) -> bool:
    """Whether only short writes keep lines whole: several writers share a pipe, or it does not block.

    Each portion exchanges the GIL between the two threads: once per eight requests.
    """
    output = os.fstat(fd)
    if not stat.S_ISFIFO(output.st_mode):
        return False
    return has_siblings or not os.get_blocking(fd) or _is_stderr(output)


def _is_stderr(output: os.stat_result) -> bool:
    try:
        return os.path.samestat(output, os.fstat(_STDERR))
    except OSError:  # it is closed
        return False


def _portions(lines: bytes) -> Iterator[bytes]:
    """Split into groups of whole lines that a pipe writes atomically. pipe(7), PIPE_BUF."""
    start = 0
    while len(lines) - start > _PIPE_BYTES:
        end = lines.rfind(b"\n", start, start + _PIPE_BYTES) + 1 or lines.index(b"\n", start) + 1
        yield lines[start:end]
        start = end
    yield lines[start:]
