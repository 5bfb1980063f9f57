"""Read heads, with a cache of the parse results of similar heads.

Clients send nearly the same head repeatedly: only the key, a length, a trace id differ. So lines are looked up among
the lines seen before; the lines of a head together are its *shape*, and a shape that was parsed once need not be parsed
again. All parsing is done by `head_parser`: a shape is cached only from its result, and any line that is not recognised
with certainty sends the whole head to it.

Within a cached shape a line may differ only if its name was parsed before, its value consists of field characters only,
and its kind is one of those below, for which every value is valid. A Host, a Connection or a Transfer-Encoding never
differs within a shape. No key is cached: the line with the key is removed.

Heads on one connection resemble each other, so the last one is compared first: equal bytes are the same head, and a
head that differs in values only usually has the same shape. A head of another shape is split into lines. The connection
keeps its last head, only as long as it is in use, because the head contains a key.

Rejected: a table of whole heads, which a single trace header defeats and which keeps keys in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from keyproxy.auth.agent_token_format import START_BYTES
from keyproxy.http import request_target
from keyproxy.http.headers import FieldNames, Kind
from keyproxy.http.routes import KNOWN_METHODS
from keyproxy.http_messages import (
    RequestFields,
    RequestHead,
    RequestLine,
    ResponseFields,
    ResponseHead,
    StatusLine,
)
from keyproxy.reasons import Refusal
from keyproxy.wire.parsing.head_filling import are_equal, filled_request, filled_response, forwarded_block
from keyproxy.wire.parsing.head_parser import parse_request, parse_response, request_line
from keyproxy.wire.parsing.head_templates import CRLF, Meaning, Shape
from keyproxy.wire.parsing.header_fields import ParsedFields

#: A full cache is emptied. A client that always sends new heads pays for parsing them; other clients only briefly.
_LINES_MAX: Final = 2048
_SHAPES_MAX: Final = 2048
_START_LINES_MAX: Final = 4096
_LINE_BYTES_MAX: Final = 512
_TAGS_COUNT: Final = 1 << 14
_TAG_SHIFT: Final = 24

#: A longer name may be a key, which must not be cached.
_NAME_BYTES_MAX: Final = 48

#: A longer head is not kept for comparison.
_RAW_BYTES_MAX: Final = 2048

#: Lines with these names are usually the same from one request to the next, and are cached whole. For kinds other than
#: PLAIN that is necessary: their values are part of the shape.
_STABLE_NAMES: Final = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"accept-language",
        b"accept-ranges",
        b"access-control-allow-origin",
        b"cache-control",
        b"content-encoding",
        b"content-type",
        b"pragma",
        b"server",
        b"strict-transport-security",
        b"user-agent",
        b"vary",
        b"x-content-type-options",
        b"x-frame-options",
        b"x-powered-by",
    }
)
_STABLE_KINDS: Final = frozenset({Kind.HOST, Kind.CONNECTION, Kind.TRANSFER_ENCODING, Kind.EXPECT, Kind.UPGRADE})

#: Kinds of lines that may differ within a request shape; responses have further kinds.
_VARYING_KINDS: Final = frozenset(
    {
        Kind.PLAIN, Kind.CONTENT_TYPE, Kind.CONTENT_LENGTH, Kind.CREDENTIAL, Kind.FORWARDED, Kind.REQUEST_ID,
        Kind.ACT_FOR, Kind.USAGE, Kind.DROPPED,
    }
)  # fmt: skip

#: The usual methods by the first bytes of a request line, and the end of a request line that is usual.
_METHOD_START_BYTES: Final = 4
_PLAIN_METHODS: Final = {
    b"GET ": b"GET", b"POST": b"POST", b"PUT ": b"PUT", b"PATC": b"PATCH", b"DELE": b"DELETE", b"HEAD": b"HEAD",
    b"OPTI": b"OPTIONS",
}  # fmt: skip
_PLAIN_VERSION: Final = b" HTTP/1.1"

_PLAIN_REQUEST_LINE = re.compile(rb"(GET|POST|PUT|PATCH|DELETE|HEAD|OPTIONS) (/[!-~]*) HTTP/1\.([01])")

_SPACE: Final = 0x20

_Fields = TypeVar("_Fields")


class _Reader(Generic[_Fields]):
    """The common part for request and response heads: cached lines, names and shapes."""

    #: Kinds of lines that may differ within a shape.
    _varies: frozenset[Kind] = frozenset()

    def __init__(self, names: FieldNames) -> None:
        self._names = names
        self._meanings: dict[bytes, Meaning] = {}
        self._lines: dict[bytes, Meaning] = {}
        self._shapes: dict[tuple[object, ...], Shape[_Fields]] = {}
        self._by_fields: dict[_Fields, Shape[_Fields]] = {}

    def kind(self, name: bytes) -> Kind:
        """The Kind of a header name."""
        return self._names.kind(name)

    def _is_again(self, raw: bytes, fields: _Fields, buffer: bytes) -> bool:
        """Whether a buffer begins with a head that this reader has read. The head ends with an empty line."""
        return raw != b"" and buffer.startswith(raw) and fields in self._by_fields

    def _recognised(self, lines: list[bytes], minor_version: int) -> Shape[_Fields] | None:
        """Return the shape of a head with these lines, including the start line; None if it is not cached."""
        key: list[object] = [*map(self._lines.get, lines)]
        key[0] = minor_version
        while None in key:
            place = key.index(None)
            meaning = self._meanings.get(lines[place].partition(b":")[0])
            if meaning is None:
                return None
            key[place] = meaning
        shape = self._shapes.get(tuple(key))
        if shape is not None:
            shape.sighted()
        return shape

    def _remember(self, minor_version: int, fields: _Fields, lines: list[bytes], parsed: ParsedFields) -> None:
        """Cache a head that was just parsed, if all its lines can be recognised again."""
        if not all(self._may_remember(line) for line in lines):
            return
        meanings = [self._meaning(line) for line in lines]
        if len(self._shapes) >= _SHAPES_MAX or len(self._lines) >= _LINES_MAX or len(self._meanings) >= _LINES_MAX:
            self._shapes.clear()
            self._by_fields.clear()
            self._lines.clear()
            self._meanings.clear()
        elif (minor_version, *meanings) not in self._shapes:
            shape = Shape(minor_version, fields, lines, parsed, meanings)
            self._shapes[(minor_version, *meanings)] = self._by_fields[fields] = shape

    def _may_remember(self, line: bytes) -> bool:
        """Whether a line is short enough. Of one that varies only the name is cached: an agent token has 700 bytes."""
        name = line.partition(b":")[0]
        if len(name) > _NAME_BYTES_MAX:
            return False
        return len(line) <= _LINE_BYTES_MAX or not self._is_stable(name, self._names.kind(name))

    def _is_stable(self, name: bytes, kind: Kind) -> bool:
        """Whether lines with this name are cached whole."""
        if kind in _STABLE_KINDS or name.lower() in _STABLE_NAMES:
            return True
        return kind not in self._varies and kind is not Kind.HOP and kind is not Kind.RESERVED

    def _meaning(self, line: bytes) -> Meaning:
        name = line.partition(b":")[0]
        kind = self._names.kind(name)
        if self._is_stable(name, kind):
            return self._lines.setdefault(line, Meaning(kind, is_whole_line=True))
        return self._meanings.setdefault(name, Meaning(kind, is_whole_line=False))


class RequestReader(_Reader[RequestFields]):
    """Reads request heads."""

    _varies = _VARYING_KINDS

    def __init__(
        self,
        names: FieldNames,
        holds_key: Callable[[bytes], bool],
        methods: frozenset[bytes] = KNOWN_METHODS,
        *,
        accepts_encoded_slash: bool = False,
    ) -> None:
        """`holds_key`: whether a target contains a key; such a line is not cached. `methods`: the served methods.
        `accepts_encoded_slash`: whether a path may have `%2F`."""
        super().__init__(names)
        self.methods: Final = methods
        self.accepts_encoded_slash: Final = accepts_encoded_slash
        self._holds_key = holds_key
        self._start_lines: dict[bytes, RequestLine] = {}
        #: One byte of the hash of the line that came last, by other bits of it.
        self._tags = bytearray(_TAGS_COUNT)

    def read_alike(self, buffer: bytes, like: RequestHead, bytes_max: int) -> RequestHead | None:
        """Return the request head at the beginning of a buffer if it resembles the last one on this connection; it has
        `raw`. None if it does not, is incomplete, or has more than `bytes_max` bytes before its empty line.

        Its end need not be known: to search for it takes as long as to match the whole head.

        Raises a Refusal, as `parse_request` does.
        """
        if self._is_again(like.raw, like.fields, buffer):
            return like
        shape = self._by_fields.get(like.fields)
        if shape is None:
            return None
        values = shape.values(buffer, min(bytes_max, _RAW_BYTES_MAX) + 4)
        if values is None:
            return None
        line = self._known_line(values[0])
        if line is None or line.minor_version != shape.minor_version:
            return None
        head = filled_request(line, shape, values)
        if are_equal(head.credentials, like.credentials):
            head.digest, head.key_part = like.digest, like.key_part
        head.raw = buffer[: shape.raw_bytes(values)]
        return head

    def read(self, buffer: bytes, end: int, like: RequestHead | None = None) -> RequestHead:
        """Return the request head at the beginning of a buffer; its empty line begins at `end`.

        `like`: the head that it may resemble, the last one on this connection. Equal bytes are the same head.

        Raises a Refusal, as `parse_request` does.
        """
        if like is not None and self._is_again(like.raw, like.fields, buffer):
            return like
        lines = buffer[:end].split(CRLF)
        line = self._known_line(lines[0])
        if line is None:
            return self._parse(buffer[: end + 4])
        shape = self._recognised(lines, line.minor_version)
        values = shape.values(buffer, end + 4) if shape is not None else None
        if shape is None or values is None:
            return self._parse(buffer[: end + 4], line)
        head = filled_request(line, shape, values)
        if like is not None and are_equal(head.credentials, like.credentials):
            head.digest, head.key_part = like.digest, like.key_part
        if end <= _RAW_BYTES_MAX:
            head.raw = buffer[: end + 4]
        return head

    def _known_line(self, text: bytes) -> RequestLine | None:
        """Return the request line with this text, unless it must be parsed with the whole head."""
        line = self._start_lines.get(text)
        if line is None:
            line = self._plain_line(text)
            if line is None:
                line = self._start_line(text)
        return line

    def _plain_line(self, text: bytes) -> RequestLine | None:
        """Return a request line with a target that needs no further checks; None for any other. It is cached.

        Paths with ids in them are nearly always new and plain.
        """
        if len(text) > _LINE_BYTES_MAX or not text.endswith(_PLAIN_VERSION):
            return None
        method = _PLAIN_METHODS.get(text[:_METHOD_START_BYTES])
        if method is None or not text.startswith(method) or text[len(method)] != _SPACE:
            return None
        target = text[len(method) + 1 : -len(_PLAIN_VERSION)]
        plainness = request_target.plainness(target)
        if plainness == request_target.NOT_PLAIN:
            return None
        # A key of ours has `_`, and an agent token is long.
        may_hold_key = plainness != request_target.PLAINEST or len(target) >= START_BYTES
        holds_key = may_hold_key and self._holds_key(target)
        line = RequestLine(method, target, target, 1, text + CRLF, holds_key, is_plain=True)
        if not holds_key:
            self._cache_line(text, line)
        return line

    def _start_line(self, text: bytes) -> RequestLine | None:
        """Return a request line that can be parsed on its own: any target in origin form. It is cached."""
        match = _PLAIN_REQUEST_LINE.fullmatch(text)
        if match is None:
            return None
        method, sent, minor = match.groups()
        try:
            going = request_target.judge(method, sent, None, accepts_encoded_slash=self.accepts_encoded_slash)
        except Refusal:
            return None
        line = request_line(method, going, int(minor), holds_key=self._holds_key(going.decoded))
        # A query is seldom repeated, and may contain secrets.
        if text.find(b"?") < 0 and not line.holds_key and len(text) <= _LINE_BYTES_MAX:
            self._cache_line(text, line)
        return line

    def _cache_line(self, text: bytes, line: RequestLine) -> None:
        """Cache a line at its second occurrence. Most lines with an id never come again, and would displace others."""
        number = hash(text)
        place, tag = number & (_TAGS_COUNT - 1), (number >> _TAG_SHIFT) & 0xFF
        if self._tags[place] != tag:
            self._tags[place] = tag
            return
        if len(self._start_lines) >= _START_LINES_MAX:
            self._start_lines.clear()
        self._start_lines[text] = line

    def _parse(self, raw: bytes, judged: RequestLine | None = None) -> RequestHead:
        line, fields, parsed = parse_request(
            raw, self._names, self._holds_key, self.methods,
            line=judged, accepts_encoded_slash=self.accepts_encoded_slash,
        )  # fmt: skip
        lines = raw[:-4].split(CRLF)[1:]
        # Handshakes are parsed each time: their completeness depends on the method and on values.
        if not fields.opens_tunnel:
            self._remember(line.minor_version, fields, lines, parsed)
        head = RequestHead(
            line, fields, forwarded_block(lines, parsed), tuple(parsed.credentials), parsed.content_length or 0
        )
        head.request_id = parsed.request_id
        head.act_for = parsed.act_for
        head.forwarded = tuple(parsed.forwarded)
        return head


class ResponseReader(_Reader[ResponseFields]):
    """Reads response heads."""

    _varies = _VARYING_KINDS | {Kind.UNREADABLE}

    def __init__(self, names: FieldNames) -> None:
        super().__init__(names)
        self._start_lines: dict[bytes, StatusLine] = {}

    def read_alike(self, buffer: bytes, like: ResponseHead) -> ResponseHead | None:
        """Return the response head at the beginning of a buffer if it resembles the last one; see requests."""
        if self._is_again(like.raw, like.fields, buffer):
            return like
        shape = self._by_fields.get(like.fields)
        values = None if shape is None else shape.values(buffer, _RAW_BYTES_MAX + 4)
        if shape is None or values is None:
            return None
        line = self._start_lines.get(values[0])
        if line is None or line.minor_version != shape.minor_version:
            return None
        head = filled_response(line, shape, values)
        head.raw = buffer[: shape.raw_bytes(values)]
        return head

    def read(self, buffer: bytes, end: int) -> ResponseHead:
        """Return the response head at the beginning of a buffer; its empty line begins at `end`.

        Raises a Refusal (UPSTREAM_INVALID).
        """
        lines = buffer[:end].split(CRLF)
        line = self._start_lines.get(lines[0])
        if line is None:
            return self._parse(buffer[: end + 4])
        shape = self._recognised(lines, line.minor_version)
        values = shape.values(buffer, end + 4) if shape is not None else None
        if shape is None or values is None:
            return self._parse(buffer[: end + 4])
        head = filled_response(line, shape, values)
        if end <= _RAW_BYTES_MAX:
            head.raw = buffer[: end + 4]
        return head

    def _parse(self, raw: bytes) -> ResponseHead:
        line, fields, parsed = parse_response(raw, self._names)
        start, *lines = raw[:-4].split(CRLF)
        if len(self._start_lines) >= _START_LINES_MAX:
            self._start_lines.clear()
        if len(start) <= _LINE_BYTES_MAX:
            self._start_lines[start] = line
        self._remember(line.minor_version, fields, lines, parsed)
        head = ResponseHead(line, fields, forwarded_block(lines, parsed), parsed.content_length or 0)
        head.usage_tokens = parsed.usage_tokens
        return head
