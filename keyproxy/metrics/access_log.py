"""The access log: one JSON line per request on stdout, written without delaying requests.

Lines are formatted in batches several times a second and passed to a writer thread, so a stalled reader of stdout delays
no request. The thread's backlog is bounded; lines beyond the bound are dropped and counted.

Logged: the outcome, the identity, and the reason for a refusal. Never logged: a header value other than a valid request
id, a trace id or an address; a query, a body, a key, or a path that contains one.

The log may be limited to a fraction of the successes; refusals and failures are always logged.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

import orjson

from keyproxy.ai.metered_request import MeteredRequest
from keyproxy.http.headers import trace_id
from keyproxy.http_messages import RequestHead, RequestLine
from keyproxy.model import Route
from keyproxy.ports.exchange import Exchange

_log = logging.getLogger(__name__)

_UNWRITTEN_BYTES_MAX: Final = 16 << 20
_PATH_CHARACTERS_MAX: Final = 512
_CLOSE_SECONDS: Final = 2.0
_PIPE_BYTES: Final = 4096

_DETAIL_CHARACTERS_MAX: Final = 256

#: Matches anything that may be a key or a part of one: our own details contain no word that long.
_MAYBE_KEY = re.compile(r"[A-Za-z0-9_-]{24,}")
_HIDDEN: Final = "***"

#: A shorter credential cannot be a key, and may be part of a word.
_CREDENTIAL_BYTES_MIN: Final = 6

_NO_TOKENS: Final = b',"tokens_in":null,"tokens_out":null,"tokens_cached":null,"tokens_reasoning":null'

_OK: Final = "ok"
_CLIENT_ERROR: Final = 400
_SERVER_ERROR: Final = 500

#: The number of shared parts of lines that are cached; then the cache is cleared.
_REMEMBERED_MAX: Final = 4096

#: An exchange with its labels: route, mode, code.
LabelledExchange = tuple[Exchange, str, str, str]


class AccessLog:
    """Writes the access log. Lines beyond the bound are dropped and counted."""

    def __init__(self, fd: int, *, wall_offset: Callable[[], float]) -> None:
        """`fd`: the output. `wall_offset`: the difference between Unix time and the clock of the exchanges."""
        self.dropped = 0
        #: The fraction of successes that is logged.
        self.success_share = 1.0
        self._fd = fd
        self._wall_offset = wall_offset
        # The loop alone writes the first and the thread alone the second; their difference is the backlog.
        self._queued_bytes = 0
        self._written_bytes = 0
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="access-log", daemon=True)
        self._alike: dict[tuple[object, ...], bytes] = {}
        # Several workers may write to one pipe, where only writes of up to PIPE_BUF are atomic.
        self._is_shared = stat.S_ISFIFO(os.fstat(fd).st_mode)
        self._second = 0
        self._second_text = b""

    def start(self) -> None:
        """Start the writer thread."""
        self._writer.start()

    def close(self) -> None:
        """Flush the backlog, within a timeout, and stop."""
        if self._writer.is_alive():
            self._queue.put(None)
            self._writer.join(_CLOSE_SECONDS)

    def write(self, rows: Sequence[LabelledExchange]) -> None:
        """Log exchanges that have ended."""
        if self.success_share < 1.0:
            rows = [row for row in rows if row[3] != _OK or self._takes(row[0].status)]
            if not rows:
                return
        if self._queued_bytes - self._written_bytes > _UNWRITTEN_BYTES_MAX:
            self.dropped += len(rows)
            return
        offset = self._wall_offset()
        self._put(b"".join([self._line(row, offset) for row in rows]))

    def write_line(self, line: bytes, status: int) -> None:
        """Log a finished line, with its line end, about a response with this status."""
        if status < _CLIENT_ERROR and not self._takes(status):
            return
        if self._queued_bytes - self._written_bytes > _UNWRITTEN_BYTES_MAX:
            self.dropped += 1
            return
        self._put(line)

    def _takes(self, status: int) -> bool:
        """Whether to log a response that was relayed completely. A server error is not a success."""
        return status >= _SERVER_ERROR or random.random() < self.success_share  # noqa: S311 - no secret

    def _put(self, lines: bytes) -> None:
        self._queued_bytes += len(lines)
        self._queue.put(lines)

    def _write_all(self) -> None:
        is_failing = False
        while (lines := self._queue.get()) is not None:
            try:
                for portion in _portions(lines) if self._is_shared else (lines,):
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

    def _line(self, row: LabelledExchange, wall_offset: float) -> bytes:
        exchange, code = row[0], row[3]
        wall = exchange.started_mono + wall_offset
        second = int(wall)
        if second != self._second:
            self._second = second
            self._second_text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S").encode("ascii")
        answered, head = exchange.responded_mono, exchange.head
        upstream_seconds = b"%.6f" % (answered - exchange.sent_mono) if answered else b"null"
        line = exchange.refused_line if head is None else head.line
        if line is not None and line.holds_key:
            line = None
        call = exchange.tool_call
        tool = None if call is None else call.tool.name
        approval_id = exchange.approval_id if call is None or call.claim is None else call.claim.approval_id
        key = (
            line,
            exchange.identity,
            exchange.status,
            exchange.route,
            code,
            exchange.model,
            exchange.categories,
            tool,
        )
        alike = None if approval_id else self._alike.get(key)
        if alike is None:
            alike = _alike(line, exchange, approval_id or None, labels=row[1:])
            # Neither a refused line, as this object, nor an approval comes again.
            if not approval_id and (head is not None or line is None):
                self._remember(key, alike)
        client = b"" if exchange.peer is None else exchange.peer.recorded_address(head)
        trace = b"" if head is None or not head.fields.has_traceparent else trace_id(head.block)
        return (
            b'{"time":"%b.%03dZ","request_id":"%b","trace_id":%b,"client":%b,%b"duration_seconds":%.6f,'
            b'"upstream_seconds":%b,"request_bytes":%d,"response_bytes":%d%b}\n'
        ) % (
            self._second_text,
            int((wall - second) * 1000),
            exchange.request_id,
            b'"%b"' % trace if trace else b"null",
            b'"%b"' % client if client else b"null",
            alike,
            exchange.ended_mono - exchange.started_mono,
            upstream_seconds,
            exchange.bytes_in,
            exchange.bytes_out,
            (b"" if exchange.metered is None else _tokens(exchange, exchange.metered))
            + (b"" if exchange.reason is None else _why(exchange, head)),
        )

    def _remember(self, key: tuple[object, ...], alike: bytes) -> None:
        if len(self._alike) >= _REMEMBERED_MAX:
            self._alike.clear()
        self._alike[key] = alike


def _portions(lines: bytes) -> Iterator[bytes]:
    """Split into groups of whole lines that a pipe writes atomically. pipe(7), PIPE_BUF."""
    start = 0
    while len(lines) - start > _PIPE_BYTES:
        end = lines.rfind(b"\n", start, start + _PIPE_BYTES) + 1 or lines.index(b"\n", start) + 1
        yield lines[start:end]
        start = end
    yield lines[start:]


def _tokens(exchange: Exchange, metered: MeteredRequest) -> bytes:
    """The part of a log line about a request on a metered route."""
    use, cap = exchange.token_use, b"%d" % metered.cap if metered.cap else b"null"
    if use is None:
        return b'%b,"tokens_reserved":%b,"output_cap":%b,"cost_micros":0,"estimated":false' % (
            _NO_TOKENS,
            # A refused request may have been read, and reserves nothing.
            b"null" if exchange.permit is None else b"%d" % metered.tokens_reserved,
            cap,
        )
    return (
        b',"tokens_in":%d,"tokens_out":%d,"tokens_cached":%d,"tokens_reasoning":%d,"tokens_reserved":%d,'
        b'"output_cap":%b,"cost_micros":%d,"estimated":%b'
    ) % (
        use.tokens_in, use.tokens_out, use.cached, use.reasoning, metered.tokens_reserved,
        cap, exchange.cost_micros, b"true" if exchange.is_estimated else b"false",
    )  # fmt: skip


def _why(exchange: Exchange, head: RequestHead | None) -> bytes:
    """The part of a log line with the reason for a refusal."""
    detail = _scrubbed(exchange.refusal_detail, head) if exchange.refusal_detail else None
    why = {"policy": exchange.policy or None, "reason": exchange.limit_reason or None, "detail": detail}
    return b"," + orjson.dumps(why)[1:-1]


def _scrubbed(detail: str, head: RequestHead | None) -> str:
    """Replace everything in a detail that could be a key."""
    detail = detail.encode("ascii", "backslashreplace").decode("ascii")
    for field in () if head is None else head.credentials:
        for token in field.value.split():
            if len(token) >= _CREDENTIAL_BYTES_MIN:
                detail = detail.replace(token.decode("latin-1"), _HIDDEN)
    detail = _MAYBE_KEY.sub(_HIDDEN, detail)
    return detail if len(detail) <= _DETAIL_CHARACTERS_MAX else detail[:_DETAIL_CHARACTERS_MAX] + "…"


def _alike(
    line: RequestLine | None, exchange: Exchange, approval_id: str | None, *, labels: tuple[str, str, str]
) -> bytes:
    """The part of a log line that similar requests share, as JSON members."""
    route, mode, code = labels
    identity, categories, call = exchange.identity, exchange.categories, exchange.tool_call
    token = None if identity is None else identity.agent_token
    path = "" if line is None else line.path.decode("ascii", "replace")
    content: dict[str, object] = {
        "method": "" if line is None else line.method.decode("ascii"),
        "path": path if len(path) <= _PATH_CHARACTERS_MAX else path[:_PATH_CHARACTERS_MAX] + "…",
        "route": route,
        "access": _access(exchange.route),
        "status": exchange.status,
        "code": code,
        "tenant": None if identity is None else identity.tenant_id,
        "user": None if identity is None else identity.user_id,
        "key_id": None if identity is None else identity.key_id,
        "actor": None if identity is None else identity.actor_user_id,
        "agent": None if token is None else token.agents[0],
        "token_id": None if token is None else token.token_id,
        "mode": mode,
        "model": exchange.model or None,
        "category": None if categories is None else sorted({name for name, _ in categories}),
        "tool": None if call is None else call.tool.name,
        "approval": approval_id,
    }
    session = None if identity is None else identity.oauth
    if session is not None:
        content |= {"grant": session.grant_id, "oauth_client": session.client_id}
    return orjson.dumps(content)[1:-1] + b","


def _access(route: Route | None) -> str | None:
    """Whether the route needs a key; None if no route was decided on."""
    if route is None:
        return None
    return "public" if route.is_public else "key"
