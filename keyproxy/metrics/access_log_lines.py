"""The lines of the access log: one JSON object for each exchange.

A line is joined from parts. Parts that depend on the identity, on the route and the outcome, or on the model are cached;
what differs in every request (the path, ids, times and sizes) is the only text that is made for one line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import orjson

from keyproxy.ai.metered_request import MeteredRequest
from keyproxy.http.headers import trace_id
from keyproxy.http.routes import KNOWN_METHODS
from keyproxy.http_messages import RequestHead
from keyproxy.model import Identity, Route
from keyproxy.platform.decimal_text import THREE_DIGITS, decimal, decimal_seconds
from keyproxy.ports.exchange import Exchange

_PATH_CHARACTERS_MAX: Final = 512
_DETAIL_CHARACTERS_MAX: Final = 256

#: Matches anything that may be a key or a part of one: our own details contain no word that long.
_MAYBE_KEY = re.compile(r"[A-Za-z0-9_-]{24,}")
_HIDDEN: Final = "***"

#: A shorter credential cannot be a key, and may be part of a word.
_CREDENTIAL_BYTES_MIN: Final = 6

_NO_TOKENS: Final = b',"tokens_in":null,"tokens_out":null,"tokens_cached":null,"tokens_reasoning":null'

#: The number of parts of each kind that are cached; then the cache is cleared.
_CACHED_MAX: Final = 4096
_SECONDS_CACHED_MAX: Final = 512

_to_json: Final = orjson.dumps

_QUOTE: Final = 0x22

_METHODS: Final = {method: b'"method":"%b","path":' % method for method in KNOWN_METHODS}
_NO_LINE: Final = b'"method":"","path":""'
_NO_SUBJECT: Final = b',"model":null,"category":null,"tool":null,"approval":null'
_NO_WHY: Final = b',"policy":null,"reason":null,"detail":null'
_NO_TRACE: Final = b'","trace_id":null,"client":'

#: An exchange with its labels: route, mode, code.
LabelledExchange = tuple[Exchange, str, str, str]


class AccessLogLines:
    """Formats lines, and caches the parts that many of them share."""

    def __init__(self) -> None:
        #: The parts about the identity: before and after the part about the model.
        self._identities: dict[Identity | None, tuple[bytes, bytes]] = {}
        self._outcomes: dict[tuple[Route | None, int, str], bytes] = {}
        self._subjects: dict[tuple[object, ...], bytes] = {}
        self._second = -1
        self._second_text = b""
        #: Requests of different durations end together, so that one second does not follow the other.
        self._second_texts: dict[int, bytes] = {}

    def text(self, rows: Sequence[LabelledExchange], wall_offset: float) -> bytes:
        """The lines of these exchanges. `wall_offset`: the difference between Unix time and their clock."""
        return b"".join([self._line(row, wall_offset) for row in rows])

    def _line(self, row: LabelledExchange, wall_offset: float) -> bytes:
        exchange = row[0]
        head, identity, started = exchange.head, exchange.identity, exchange.started_mono
        wall = started + wall_offset
        second = int(wall)
        if second != self._second:
            self._second = second
            self._second_text = self._second_texts.get(second) or self._start(second)
        client = b"" if exchange.peer is None else exchange.peer.recorded_address(head)
        trace = b"" if head is None or not head.fields.has_traceparent else trace_id(head.block, head.traceparent)
        about, session = self._about(identity, row[2])
        # mypyc concatenates at once what a format has as %b only.
        return b'%b%bZ","request_id":"%b%b%b%b%b%b%b%b,"duration_seconds":%b,"upstream_seconds":%b%b%b%b}\n' % (
            self._second_text,
            THREE_DIGITS[int((wall - second) * 1000)],
            exchange.request_id,
            b'","trace_id":"%b","client":' % trace if trace else _NO_TRACE,
            b'"%b",' % client if client else b"null,",
            _request_line(exchange, head),
            self._outcome(exchange, row[1], row[3]),
            about,
            self._subject(exchange),
            session,
            decimal_seconds(exchange.ended_mono - started),
            decimal_seconds(exchange.responded_mono - exchange.sent_mono) if exchange.responded_mono else b"null",
            b',"request_bytes":%b,"response_bytes":%b' % (decimal(exchange.bytes_in), decimal(exchange.bytes_out)),
            b"" if exchange.metered is None else _tokens(exchange, exchange.metered),
            b"" if exchange.reason is None else _why(exchange, head),
        )

    def _start(self, second: int) -> bytes:
        text = datetime.fromtimestamp(second, UTC).strftime('{"time":"%Y-%m-%dT%H:%M:%S.').encode("ascii")
        if len(self._second_texts) >= _SECONDS_CACHED_MAX:
            self._second_texts.clear()
        self._second_texts[second] = text
        return text

    def _about(self, identity: Identity | None, mode: str) -> tuple[bytes, bytes]:
        parts = self._identities.get(identity)
        if parts is None:
            parts = _identity(identity, mode), _session(identity)
            if len(self._identities) >= _CACHED_MAX:
                self._identities.clear()
            self._identities[identity] = parts
        return parts

    def _outcome(self, exchange: Exchange, route: str, code: str) -> bytes:
        """The part about the route and what became of the request."""
        key = (exchange.route, exchange.status, code)
        part = self._outcomes.get(key)
        if part is None:
            content = {"route": route, "access": _access(exchange.route), "status": exchange.status, "code": code}
            part = b"," + orjson.dumps(content)[1:-1]
            if len(self._outcomes) >= _CACHED_MAX:
                self._outcomes.clear()
            self._outcomes[key] = part
        return part

    def _subject(self, exchange: Exchange) -> bytes:
        """The part about the model, the categories, the tool and the approval."""
        model, categories, call = exchange.model, exchange.categories, exchange.tool_call
        approval_id = exchange.approval_id
        if call is None:
            if not model and categories is None and not approval_id:
                return _NO_SUBJECT
        elif call.claim is not None:
            approval_id = call.claim.approval_id
        tool = None if call is None else call.tool.name
        key = (model, categories, tool)
        part = None if approval_id else self._subjects.get(key)
        if part is None:
            content = {
                "model": model or None,
                "category": None if categories is None else sorted({name for name, _ in categories}),
                "tool": tool,
                "approval": approval_id or None,
            }
            part = b"," + orjson.dumps(content)[1:-1]
            if not approval_id:
                # An approval does not come again.
                if len(self._subjects) >= _CACHED_MAX:
                    self._subjects.clear()
                self._subjects[key] = part
        return part


def _request_line(exchange: Exchange, head: RequestHead | None) -> bytes:
    """The method and the path. A line that contains a key is left out."""
    line = exchange.refused_line if head is None else head.line
    if line is None or line.holds_key:
        return _NO_LINE
    start = _METHODS.get(line.method)
    sent = line.path
    if start is not None and line.is_plain and _QUOTE not in sent and len(sent) <= _PATH_CHARACTERS_MAX:
        # Visible ASCII without a backslash, as every valid target: JSON has nothing to escape.
        return b'%b"%b"' % (start, sent)
    path = sent.decode("ascii", "replace")
    if len(path) > _PATH_CHARACTERS_MAX:
        path = path[:_PATH_CHARACTERS_MAX] + "…"
    if start is None:
        start = b'"method":%b,"path":' % orjson.dumps(line.method.decode("ascii", "replace"))
    return start + _to_json(path)


def _identity(identity: Identity | None, mode: str) -> bytes:
    """The part about the identity, as JSON members."""
    token = None if identity is None else identity.agent_token
    content = {
        "tenant": None if identity is None else identity.tenant_id,
        "user": None if identity is None else identity.user_id,
        "key_id": None if identity is None else identity.key_id,
        "actor": None if identity is None else identity.actor_user_id,
        "agent": None if token is None else token.agents[0],
        "token_id": None if token is None else token.token_id,
        "mode": mode,
    }
    return b"," + orjson.dumps(content)[1:-1]


def _session(identity: Identity | None) -> bytes:
    """The part about the OAuth session; empty without one."""
    session = None if identity is None else identity.oauth
    if session is None:
        return b""
    return b"," + orjson.dumps({"grant": session.grant_id, "oauth_client": session.client_id})[1:-1]


def _access(route: Route | None) -> str | None:
    """Whether the route needs a key; None if no route was decided on."""
    if route is None:
        return None
    return "public" if route.is_public else "key"


def _tokens(exchange: Exchange, metered: MeteredRequest) -> bytes:
    """The part of a log line about a request on a metered route."""
    use, cap = exchange.token_use, decimal(metered.cap) if metered.cap else b"null"
    if use is None:
        return b'%b,"tokens_reserved":%b,"output_cap":%b,"cost_micros":0,"estimated":false' % (
            _NO_TOKENS,
            # A refused request may have been read, and reserves nothing.
            b"null" if exchange.permit is None else decimal(metered.tokens_reserved),
            cap,
        )
    return (
        b',"tokens_in":%b,"tokens_out":%b,"tokens_cached":%b,"tokens_reasoning":%b,"tokens_reserved":%b,'
        b'"output_cap":%b,"cost_micros":%b,"estimated":%b'
    ) % (
        decimal(use.tokens_in), decimal(use.tokens_out), decimal(use.cached), decimal(use.reasoning),
        decimal(metered.tokens_reserved), cap, decimal(exchange.cost_micros),
        b"true" if exchange.is_estimated else b"false",
    )  # fmt: skip


def _why(exchange: Exchange, head: RequestHead | None) -> bytes:
    """The part of a log line with the reason for a refusal."""
    if not (exchange.refusal_detail or exchange.policy or exchange.limit_reason):
        return _NO_WHY
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
