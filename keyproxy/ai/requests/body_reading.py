"""Read a long request body in portions, so that other work runs between two of them.

    scanning -> (splicing) -> asked

Each call of `advance` does a bounded amount of work: a few milliseconds. Compressed content is inflated piece by piece,
scanned and dropped; if `include_usage` has to be added, the content is inflated a second time and deflated again piece
by piece. So reading takes the memory of a piece or two, and splicing that of one more body.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Final

from keyproxy.ai.requests import request_bound
from keyproxy.ai.requests.member_names import DECISIVE, outline_of
from keyproxy.ai.requests.outline_scanner import PIECE_BYTES, JsonError, OutlineScanner, TooManyStepsError
from keyproxy.ai.requests.request_bound import TokenBound, malformed
from keyproxy.model import RequestHead
from keyproxy.reasons import Reason, Refusal

#: The work of one call of `advance`: the steps of two to four milliseconds, and bytes that take as long.
_STEPS: Final = 2_048
_BYTES: Final = 262_144

#: The inflated length that is always allowed, and the largest expansion ratio beyond it. Prompt text expands 3 to 20
#: times.
INFLATED_BYTES_MAX: Final = 1_048_576
INFLATED_TIMES_MAX: Final = 50

#: Requests have a dozen significant names. If there are more than this, some have spellings that are refused.
_MEMBERS_MAX: Final = 64

_SPACE: Final = b" \t\r\n"
_COMMA: Final = b","


class BodyReading:
    """A body that is being read; it is stored nowhere else in the meantime.

    `asked` is set once `advance` has returned True; `body` is then the body to forward.
    """

    def __init__(self, kind: str, head: RequestHead, body: bytes, *, bytes_max: int) -> None:
        """`bytes_max`: the maximum length of the content. Raises a Refusal, as `advance` does."""
        self.asked: TokenBound | None = None
        self._kind = kind
        self._head = head
        self.body = body
        self._bits = request_bound.compression_of(head, body)
        grown_max = max(INFLATED_BYTES_MAX, INFLATED_TIMES_MAX * len(body))
        self._bytes_max = bytes_max if self._bits is None else min(bytes_max, grown_max)
        self._source = _Source(body, self._bits)
        self._scanner: OutlineScanner | None = request_bound.outline_scanner()
        self._content_bytes = 0
        self._is_blank = True
        self._splice: _Splice | None = None
        self._deflate: zlib._Compress | None = None
        self._out: list[bytes] = []

    def advance(self) -> bool:
        """Read the next portion. True: it was the last. Raises a Refusal (REQUEST_MALFORMED, BODY_TOO_LARGE)."""
        if self._splice is not None and self._deflate is not None:
            return self._write(self._splice, self._deflate)
        scanner = self._scanner
        steps_max = 0 if scanner is None else scanner.steps + _STEPS
        bytes_max = self._content_bytes + _BYTES
        while self._content_bytes < bytes_max and (scanner is None or scanner.steps < steps_max):
            piece = self._source.read()
            if not piece:
                return self._is_read()
            self._content_bytes += len(piece)
            if self._content_bytes > self._bytes_max:
                raise Refusal(Reason.BODY_TOO_LARGE, f"its content has more than {self._bytes_max} bytes")
            scanner = self._scan(piece)
        return False

    def _scan(self, piece: bytes) -> OutlineScanner | None:
        if self._is_blank:
            begins = piece.lstrip(_SPACE)
            if begins and not self._head.fields.is_json and not begins.startswith(b"{"):
                self._scanner = None
            self._is_blank = not begins
        scanner = self._scanner
        if scanner is None:
            return None
        try:
            scanner.feed(piece)
        except JsonError as error:
            return self._is_not_json(error)
        except TooManyStepsError as too_many:  # another name: the compiled build gives a name one type
            raise Refusal(
                Reason.BODY_TOO_LARGE, "too many parts", caller_text="Its JSON has too many names, values and brackets."
            ) from too_many
        document = scanner.document
        if document is not None and (len(document) > _MEMBERS_MAX or len(_options(document)) > _MEMBERS_MAX):
            raise malformed(request_bound.SPELT)
        return scanner

    def _is_not_json(self, error: JsonError) -> OutlineScanner | None:
        if self._head.fields.is_json:
            raise malformed(f"{request_bound.NOT_JSON[:-1]}: {error}.") from error
        self._scanner = None
        return None

    def _is_read(self) -> bool:
        scanner = self._scanner
        if scanner is not None and not self._is_blank:
            try:
                scanner.finish()
            except JsonError as error:
                scanner = self._is_not_json(error)
        document = None if scanner is None or self._is_blank else scanner.document
        if scanner is None or document is None:
            self.asked = request_bound.unread(self._kind, self._head, self._content_bytes, is_blank=self._is_blank)
            return True
        return self._is_outlined(scanner, document)

    def _is_outlined(self, scanner: OutlineScanner, document: dict[str, Any]) -> bool:
        outline = outline_of(document)
        if outline.is_ambiguous or outline_of(_options(document)).is_ambiguous:
            raise malformed(request_bound.SPELT)
        for name in scanner.doubled:
            if name in DECISIVE:
                raise request_bound.doubled(name)
        maximum = request_bound.maximum_of(document, outline, self._head.line.path, scanner.elements)
        bound = self._content_bytes + request_bound.tools_tokens(self._kind, document)
        bound += request_bound.MEDIA_TOKENS * scanner.parts - scanner.image_bytes
        streams = document.get("stream") is True
        if self._kind != "openai" or not streams or not request_bound.lacks_usage(document):
            self.asked = TokenBound(bound, maximum, streams=streams)
            return True
        self._scanner = None
        self.asked = TokenBound(bound, maximum, streams=True, hides_usage=True)
        self._splice = _Splice(*_edit(scanner, document))
        if self._bits is not None:
            self._source = _Source(self.body, self._bits)
            self._deflate = zlib.compressobj(level=1, wbits=self._bits)
            return False
        self.body = self._splice.whole(self.body)
        return True

    def _write(self, splice: _Splice, deflate: zlib._Compress) -> bool:
        until = splice.at + _BYTES
        while splice.at < until:
            piece = self._source.read()
            if not piece:
                self._out.append(deflate.flush())
                self._source = _Source(b"", None)
                self.body = b""
                self.body = b"".join(self._out)
                self._out = []
                return True
            self._out.append(deflate.compress(splice.next(piece)))
        return False


class _Source:
    """The content of a body in pieces. If it is compressed, `bits` is zlib's number for the format."""

    def __init__(self, body: bytes, bits: int | None) -> None:
        self._body = body
        self._at = 0
        self._inflate = None if bits is None else zlib.decompressobj(wbits=bits)
        self._left = b""

    def read(self) -> bytes:
        """Return the next piece, empty at the end. Raises a Refusal for content that cannot be inflated."""
        inflate = self._inflate
        if inflate is None:
            return self._next()
        while not inflate.eof:
            self._left = self._left or self._next()
            try:
                piece = inflate.decompress(self._left, PIECE_BYTES)
            except zlib.error as error:
                raise malformed(request_bound.NOT_AS_ENCODED) from error
            was_empty = not self._left
            self._left = inflate.unconsumed_tail
            if piece:
                return piece
            if was_empty:
                break
        if not inflate.eof or inflate.unused_data or self._at < len(self._body):
            raise malformed(request_bound.ENDS_ELSEWHERE)
        return b""

    def _next(self) -> bytes:
        piece = self._body[self._at : self._at + PIECE_BYTES]
        self._at += len(piece)
        return piece


class _Splice:
    """Replaces the bytes from `start` to `end` of content that arrives in pieces with `new`."""

    def __init__(self, start: int, end: int, new: bytes) -> None:
        self.at = 0
        self._start = start
        self._end = end
        self._new = new

    def whole(self, content: bytes) -> bytes:
        """Replace the bytes in complete content. Copies it once."""
        view = memoryview(content)
        return b"".join((view[: self._start], self._new, view[self._end :]))

    def next(self, piece: bytes) -> bytes:
        """Return the replacement for the next piece."""
        begin = self.at
        self.at = end = begin + len(piece)
        if end <= self._start or (begin > self._start and begin >= self._end):
            return piece
        before = piece[: max(0, self._start - begin)]
        new = self._new if begin <= self._start else b""
        return before + new + piece[max(0, self._end - begin) :]


def _edit(scanner: OutlineScanner, document: Mapping[str, Any]) -> tuple[int, int, bytes]:
    """A replacement, and the range of bytes that it replaces."""
    options = scanner.spans.get(("stream_options", ""))
    if options is None:
        at = scanner.opening + 1
        return at, at, b'"stream_options":{"include_usage":true},'
    if document["stream_options"] is None:
        return *options, b'{"include_usage":true}'
    asked = scanner.spans.get(("stream_options", "include_usage"))
    if asked is not None:
        return *asked, b"true"
    at = options[0] + 1
    return at, at, b'"include_usage":true' + (b"" if scanner.expanded_is_empty else _COMMA)


def _options(document: Mapping[str, Any]) -> dict[str, Any]:
    options = document.get("stream_options")
    return options if isinstance(options, dict) else {}
