"""Read heads, remembering how heads like them were judged.

Clients send nearly the same head again and again: what differs is the key, a length, a trace id. So a head is read line
by line, each looked up among the lines seen before; the lines together are its *shape*, and a shape that was judged
once need not be judged again. Everything that is judged is judged by `heads`: a shape is remembered only from there, and
any line that is not recognised beyond doubt sends the whole head back there.

Within a remembered shape a line may differ only if its name was judged, its value holds nothing but field characters,
and its meaning is one of those below, which all say "any value will do, and goes here". A Host, a Connection or a
Transfer-Encoding never differs within a shape. No key is remembered: the line that holds it is cut out.

Rejected: remembering whole heads, which a single trace header defeats and which keeps keys in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from keyproxy import target
from keyproxy.headers import FieldNames, Kind
from keyproxy.model import (
    CredentialField,
    RequestFields,
    RequestHead,
    RequestLine,
    ResponseFields,
    ResponseHead,
    StatusLine,
)
from keyproxy.reasons import Refusal
from keyproxy.wire.heads import (
    CONTENT_LENGTH_DIGITS_MAX,
    JudgedFields,
    judge_request,
    judge_response,
    request_line,
)

_CRLF: Final = b"\r\n"

#: Full: all is forgotten and learnt anew. Whoever sends ever new heads pays for their judgement, nobody else for long.
_LINES_MAX: Final = 2048
_SHAPES_MAX: Final = 2048
_START_LINES_MAX: Final = 4096
_LINE_BYTES_MAX: Final = 512

#: Lines with these names tend to be the same from one request to the next, and are remembered whole. The kinds other
#: than PLAIN have to be: what they say is part of the shape.
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

#: Deleting these from a value must leave nothing. RFC 9110 section 5.5: visible, space, tab, obs-text.
_FIELD_CHARACTERS: Final = bytes([0x09, *range(0x20, 0x7F), *range(0x80, 0x100)])

_PLAIN_REQUEST_LINE = re.compile(rb"(GET|POST|PUT|PATCH|DELETE|HEAD|OPTIONS) (/[!-~]*) HTTP/1\.([01])")

_Fields = TypeVar("_Fields")


class _Meaning:
    """What any line with this name means, or (`is_whole_line`) what this very line does. Compared by identity."""

    __slots__ = ("is_whole_line", "kind")

    def __init__(self, kind: Kind, *, is_whole_line: bool) -> None:
        self.kind = kind
        self.is_whole_line = is_whole_line


class _Shape(Generic[_Fields]):
    """A remembered judgement. `pieces` and, between them, the lines at `varying` make the block of forwarded lines."""

    __slots__ = ("fields", "pieces", "varying")

    def __init__(self, fields: _Fields, lines: list[bytes], judged: JudgedFields, meanings: list[_Meaning]) -> None:
        self.fields = fields
        pieces, varying = [b""], []
        for place, (line, is_forwarded) in enumerate(zip(lines, judged.is_forwarded, strict=True)):
            if not is_forwarded:
                continue
            if meanings[place].is_whole_line:
                pieces[-1] += line + _CRLF
            else:
                varying.append(place)
                pieces.append(_CRLF)
        self.pieces = pieces
        self.varying = varying

    def block(self, lines: list[bytes]) -> bytes:
        """The forwarded lines of a head of this shape."""
        block = self.pieces[0]
        if self.varying:
            for place, piece in zip(self.varying, self.pieces[1:], strict=True):
                block += lines[place] + piece
        return block


class _Reader(Generic[_Fields]):
    """What request and response heads have in common: remembered lines, names and shapes."""

    #: Kinds of which a line may differ within a shape.
    _varies: frozenset[Kind] = frozenset()

    def __init__(self, names: FieldNames) -> None:
        self._names = names
        self._meanings: dict[bytes, _Meaning] = {}
        self._lines: dict[bytes, _Meaning] = {}
        self._shapes: dict[tuple[object, ...], _Shape[_Fields]] = {}

    def kind(self, name: bytes) -> Kind:
        """The Kind of a header name."""
        return self._names.kind(name)

    def _remember(
        self, minor_version: int, fields: _Fields, lines: list[bytes], judged: JudgedFields
    ) -> _Shape[_Fields]:
        """The shape of a head that was judged just now; remembered if all its lines can be recognised again."""
        if any(len(line) > _LINE_BYTES_MAX for line in lines):
            return _Shape(fields, lines, judged, [_Meaning(Kind.PLAIN, is_whole_line=True)] * len(lines))
        meanings = [self._meaning(line) for line in lines]
        shape = _Shape(fields, lines, judged, meanings)
        if len(self._shapes) >= _SHAPES_MAX or len(self._lines) >= _LINES_MAX or len(self._meanings) >= _LINES_MAX:
            self._shapes.clear()
            self._lines.clear()
            self._meanings.clear()
        else:
            self._shapes[(minor_version, *meanings)] = shape
        return shape

    def _meaning(self, line: bytes) -> _Meaning:
        name = line.partition(b":")[0]
        kind = self._names.kind(name)
        whole = kind in _STABLE_KINDS or (
            kind not in self._varies and kind is not Kind.HOP and kind is not Kind.RESERVED
        )
        if whole or name.lower() in _STABLE_NAMES:
            return self._lines.setdefault(line, _Meaning(kind, is_whole_line=True))
        return self._meanings.setdefault(name, _Meaning(kind, is_whole_line=False))


class RequestReader(_Reader[RequestFields]):
    """Reads request heads."""

    _varies = frozenset(
        {Kind.PLAIN, Kind.CONTENT_TYPE, Kind.CONTENT_LENGTH, Kind.CREDENTIAL, Kind.FORWARDED, Kind.REQUEST_ID}
    )

    def __init__(self, names: FieldNames, holds_key: Callable[[bytes], bool]) -> None:
        """`holds_key`: whether a target has a key in it; such a line is not remembered."""
        super().__init__(names)
        self._holds_key = holds_key
        self._start_lines: dict[bytes, RequestLine] = {}

    def read(self, buffer: bytes, end: int) -> RequestHead:
        """The request head that stands at the beginning of a buffer; its empty line begins at `end`.

        Raises a Refusal (REQUEST_MALFORMED, HEADERS_TOO_LARGE).
        """
        lines = buffer[:end].split(_CRLF)
        line = self._start_lines.get(lines[0]) or self._start_line(lines[0])
        if line is None:
            return self._judge(buffer[: end + 4])
        key: list[object] = [*map(self._lines.get, lines)]
        key[0] = line.minor_version
        credentials: tuple[CredentialField, ...] = ()
        forwarded: tuple[tuple[bytes, bytes], ...] = ()
        request_id = None
        content_length = 0
        while None in key:
            place = key.index(None)
            name, separator, value = lines[place].partition(b": ")
            meaning = self._meanings.get(name)
            if meaning is None or not separator or value.translate(None, _FIELD_CHARACTERS):
                return self._judge(buffer[: end + 4])
            key[place] = meaning
            kind = meaning.kind
            if kind is Kind.CONTENT_LENGTH:
                if not value.isdigit() or len(value) > CONTENT_LENGTH_DIGITS_MAX:
                    return self._judge(buffer[: end + 4])
                content_length = int(value)
            elif kind is Kind.CREDENTIAL:
                credentials = (*credentials, CredentialField(name.lower(), value.strip(b" \t")))
            elif kind is Kind.REQUEST_ID:
                request_id = value.strip(b" \t")
            elif kind is Kind.FORWARDED:
                forwarded = (*forwarded, (name.lower(), value.strip(b" \t")))
        shape = self._shapes.get(tuple(key))
        if shape is None:
            return self._judge(buffer[: end + 4])
        del lines[0]
        head = RequestHead(line, shape.fields, shape.block(lines), credentials, content_length)
        head.request_id = request_id
        head.forwarded = forwarded
        return head

    def _start_line(self, text: bytes) -> RequestLine | None:
        """A request line that needs nothing else to be judged: any target in origin form."""
        match = _PLAIN_REQUEST_LINE.fullmatch(text)
        if match is None:
            return None
        method, sent, minor = match.groups()
        try:
            going = target.judge(method, sent, None)
        except Refusal:
            return None
        return request_line(method, going, int(minor), holds_key=self._holds_key(going.target))

    def _judge(self, raw: bytes) -> RequestHead:
        line, fields, judged = judge_request(raw, self._names, self._holds_key)
        start, *lines = raw[:-4].split(_CRLF)
        if len(self._start_lines) >= _START_LINES_MAX:
            self._start_lines.clear()
        # A query seldom comes twice, and may hold what should not be kept.
        is_worth_it = b"?" not in start and not line.holds_key and len(start) <= _LINE_BYTES_MAX
        if is_worth_it and _PLAIN_REQUEST_LINE.fullmatch(start):
            self._start_lines[start] = line
        shape = self._remember(line.minor_version, fields, lines, judged)
        block = shape.block(lines)
        head = RequestHead(line, fields, block, tuple(judged.credentials), judged.content_length or 0)
        head.request_id = judged.request_id
        head.forwarded = tuple(judged.forwarded)
        return head


class ResponseReader(_Reader[ResponseFields]):
    """Reads response heads."""

    _varies = frozenset(
        {
            Kind.PLAIN,
            Kind.UNREADABLE,
            Kind.CONTENT_TYPE,
            Kind.CONTENT_LENGTH,
            Kind.CREDENTIAL,
            Kind.FORWARDED,
            Kind.REQUEST_ID,
        }
    )

    def __init__(self, names: FieldNames) -> None:
        super().__init__(names)
        self._start_lines: dict[bytes, StatusLine] = {}

    def read(self, buffer: bytes, end: int) -> ResponseHead:
        """The response head at the beginning of a buffer; its empty line begins at `end`.

        Raises a Refusal (UPSTREAM_INVALID).
        """
        lines = buffer[:end].split(_CRLF)
        line = self._start_lines.get(lines[0])
        if line is None:
            return self._judge(buffer[: end + 4])
        key: list[object] = [*map(self._lines.get, lines)]
        key[0] = line.minor_version
        content_length = 0
        while None in key:
            place = key.index(None)
            name, separator, value = lines[place].partition(b": ")
            meaning = self._meanings.get(name)
            if meaning is None or not separator or value.translate(None, _FIELD_CHARACTERS):
                return self._judge(buffer[: end + 4])
            key[place] = meaning
            if meaning.kind is Kind.CONTENT_LENGTH:
                if not value.isdigit() or len(value) > CONTENT_LENGTH_DIGITS_MAX:
                    return self._judge(buffer[: end + 4])
                content_length = int(value)
        shape = self._shapes.get(tuple(key))
        if shape is None:
            return self._judge(buffer[: end + 4])
        del lines[0]
        return ResponseHead(line, shape.fields, shape.block(lines), content_length)

    def _judge(self, raw: bytes) -> ResponseHead:
        line, fields, judged = judge_response(raw, self._names)
        start, *lines = raw[:-4].split(_CRLF)
        if len(self._start_lines) >= _START_LINES_MAX:
            self._start_lines.clear()
        if len(start) <= _LINE_BYTES_MAX:
            self._start_lines[start] = line
        shape = self._remember(line.minor_version, fields, lines, judged)
        return ResponseHead(line, fields, shape.block(lines), judged.content_length or 0)
