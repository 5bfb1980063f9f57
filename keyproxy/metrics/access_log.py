"""The access log: one JSON line a request on stdout, never in a request's way.

`add` appends to a list. A few times a second the list is turned into bytes and handed to a thread of its own, which is
the only one to write: a reader of stdout that stands still holds up nobody. Both the list and what the thread has yet to
write are bounded; what does not fit is dropped and counted.

Written: what happened, to whose request. Never: a header, a query, a body, a key, or a path that had one in it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from keyproxy.ports import Exchange
from keyproxy.reasons import Reason

_log = logging.getLogger(__name__)

_FLUSH_SECONDS: Final = 0.2
_ROWS_MAX: Final = 20_000
_UNWRITTEN_BYTES_MAX: Final = 16 << 20
_PATH_CHARACTERS_MAX: Final = 512
_CLOSE_SECONDS: Final = 2.0

_Row = tuple[Any, ...]


class AccessLog:
    """See the module."""

    def __init__(self, fd: int, *, wall_offset: Callable[[], float]) -> None:
        """`fd`: where lines go. `wall_offset`: what to add to the exchanges' clock to get Unix time."""
        self.dropped = 0
        self._fd = fd
        self._wall_offset = wall_offset
        self._rows: list[_Row] = []
        # Each has one writer, the loop and the thread; their difference is what the thread has yet to write.
        self._queued_bytes = 0
        self._written_bytes = 0
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="access-log", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to write."""
        self._loop = loop
        self._thread.start()
        self._handle = loop.call_later(_FLUSH_SECONDS, self._tick)

    def add(self, exchange: Exchange, route: str, mode: str, code: str) -> None:
        """Note one exchange that has ended."""
        if len(self._rows) >= _ROWS_MAX:
            self.dropped += 1
            return
        head, identity = exchange.head, exchange.identity
        self._rows.append(
            (
                exchange.started_mono,
                exchange.request_id,
                b"" if head is None else head.line.method,
                b"" if head is None or exchange.reason is Reason.KEY_IN_URL else head.line.path,
                route,
                exchange.status,
                code,
                exchange.ended_mono - exchange.started_mono,
                exchange.answered_mono - exchange.sent_mono if exchange.answered_mono else None,
                exchange.bytes_in,
                exchange.bytes_out,
                identity,
                mode,
            )
        )

    def close(self) -> None:
        """Write what there is, within a moment, and stop."""
        if self._handle is None:
            return
        self._handle.cancel()
        self._handle = None
        self._flush()
        self._queue.put(None)
        self._thread.join(_CLOSE_SECONDS)

    def _tick(self) -> None:
        assert self._loop is not None  # noqa: S101 - for the type checker
        self._handle = self._loop.call_later(_FLUSH_SECONDS, self._tick)
        self._flush()

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        if self._queued_bytes - self._written_bytes > _UNWRITTEN_BYTES_MAX:
            self.dropped += len(rows)
            return
        offset = self._wall_offset()
        lines = b"".join([_line(row, offset) for row in rows])
        self._queued_bytes += len(lines)
        self._queue.put(lines)

    def _write_all(self) -> None:
        while (lines := self._queue.get()) is not None:
            view = memoryview(lines)
            try:
                while view:
                    view = view[os.write(self._fd, view) :]
            except OSError as error:
                self.dropped += lines.count(b"\n")
                _log.warning("the access log cannot be written: %s", error)
            self._written_bytes += len(lines)


def _line(row: _Row, wall_offset: float) -> bytes:
    (started, request_id, method, path, route, status, code, seconds, upstream_seconds, bytes_in, bytes_out,
     identity, mode) = row  # fmt: skip
    text = path.decode("ascii", "replace")
    return orjson.dumps(
        {
            "time": datetime.fromtimestamp(started + wall_offset, UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id.decode("ascii"),
            "method": method.decode("ascii"),
            "path": text if len(text) <= _PATH_CHARACTERS_MAX else text[:_PATH_CHARACTERS_MAX] + "…",
            "route": route,
            "status": status,
            "code": code,
            "duration_seconds": round(seconds, 6),
            "upstream_seconds": None if upstream_seconds is None else round(upstream_seconds, 6),
            "request_bytes": bytes_in,
            "response_bytes": bytes_out,
            "tenant": None if identity is None else identity.tenant_id,
            "user": None if identity is None else identity.user_id,
            "key_id": None if identity is None else identity.key_id,
            "mode": mode,
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )
