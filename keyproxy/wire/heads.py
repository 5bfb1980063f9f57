"""Read a complete head, request or response, into the value that the rest of the program judges.

Two opinions have to agree on every head. llhttp parses it, strictly; and what llhttp is lenient about, or does not
know, is checked on the raw bytes here: one space in the request line, no line that is not a field, one Host, one
Content-Length, a Transfer-Encoding that is exactly `chunked`, names that every server reads alike. What was judged is
then written anew from its parts, so an upstream never sees the client's own spelling of anything that frames a message.

llhttp gets the head alone. Where a body ends is `framing`'s to say: httptools does not tell how many bytes it has
consumed, and a proxy must know that before it sends anything on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

import httptools

from keyproxy import target
from keyproxy.headers import NOT_HOP_BY_HOP, FieldNames, Kind
from keyproxy.model import CredentialField, RequestHead, ResponseHead
from keyproxy.reasons import Reason, Refusal

HEAD_END: Final = b"\r\n\r\n"
FIELDS_MAX: Final = 256

_CONTENT_LENGTH_DIGITS_MAX: Final = 18
_KEEP_ALIVE: Final = frozenset({b"keep-alive"})
_KNOWN_OPTIONS: Final = frozenset({b"close", b"keep-alive", b"upgrade", b"te", b"http2-settings", b""})
_NO_BODY_STATUSES: Final = frozenset({204, 304})


class _Parts:
    """What httptools calls back with."""

    __slots__ = ("fields", "is_complete", "start")

    def __init__(self) -> None:
        self.start = b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.is_complete = False

    def on_url(self, url: bytes) -> None:
        self.start += url

    def on_status(self, phrase: bytes) -> None:
        self.start += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self.is_complete = True


class _Framing:
    """What the fields say about the message around them, gathered in one pass."""

    __slots__ = ("chunked", "content_length", "content_type", "host", "options")

    def __init__(self) -> None:
        self.host: bytes | None = None
        self.content_length: int | None = None
        self.content_type = False
        self.chunked = False
        self.options: list[bytes] = []


def read_request_head(raw: bytes, names: FieldNames) -> RequestHead:
    """A request head out of its bytes, which end with an empty line and hold nothing after it.

    Raises a Refusal (REQUEST_MALFORMED).
    """
    parts = _Parts()
    parser = httptools.HttpRequestParser(parts)
    _parse(parser, parts, raw)
    method, version = parser.get_method(), parser.get_http_version()
    if not raw.startswith(b"%b %b HTTP/1.%b\r\n" % (method, parts.start, version[2:].encode())):
        raise _malformed("the request line is not 'METHOD target HTTP/1.x'")
    minor = _minor(version)
    if method == b"CONNECT":
        raise _malformed("CONNECT is not for a reverse proxy")
    head = _take_apart(parts.fields, names, Reason.REQUEST_MALFORMED)
    framing = head.framing
    if framing.host is None:
        if minor == 1:
            raise _malformed("HTTP/1.1 without a Host")
    else:
        target.check_host(framing.host)
    if framing.chunked and (framing.content_length is not None or minor == 0):
        raise _malformed("Transfer-Encoding beside Content-Length, or in HTTP/1.0")
    judged = target.judge(method, parts.start, framing.host)
    return RequestHead(
        method=method,
        target=judged.target,
        path=judged.path,
        minor_version=minor,
        host=framing.host,
        fields=head.block,
        credentials=tuple(head.credentials),
        forwarded=tuple(head.forwarded),
        request_id=head.request_id,
        content_length=framing.content_length,
        is_chunked=framing.chunked,
        keeps_alive=_keeps_alive(framing.options, minor),
        expects_continue=head.expects_continue and minor == 1,
    )


def read_response_head(raw: bytes, names: FieldNames) -> ResponseHead:
    """A response head out of its bytes. Raises a Refusal (UPSTREAM_INVALID)."""
    parts = _Parts()
    parser = httptools.HttpResponseParser(parts)
    try:
        _parse(parser, parts, raw)
        minor = _minor(parser.get_http_version())
        head = _take_apart(parts.fields, names, Reason.UPSTREAM_INVALID)
        status = parser.get_status_code()
        if not 100 <= status <= 599:
            raise _malformed("the status is not between 100 and 599")
        if not raw.startswith(b"HTTP/1.%d %d" % (minor, status)):
            raise _malformed("the status line is not 'HTTP/1.x NNN phrase'")
    except Refusal as refusal:
        raise Refusal(Reason.UPSTREAM_INVALID, refusal.detail) from refusal
    framing = head.framing
    if framing.chunked and framing.content_length is not None:
        raise Refusal(Reason.UPSTREAM_INVALID, "Transfer-Encoding beside Content-Length")
    return ResponseHead(
        status=status,
        reason_phrase=parts.start.strip(b" \t"),
        minor_version=minor,
        fields=head.block,
        content_length=framing.content_length,
        is_chunked=framing.chunked,
        keeps_alive=_keeps_alive(framing.options, minor),
    )


def check_beginning(buffer: bytes) -> None:
    """Raise the Refusal for bytes that cannot begin a request, so that they need not be waited upon.

    Asked once per request that arrives in pieces: a peer that sends single bytes must not make us parse for each.
    """
    if buffer.count(b"\n") != buffer.count(b"\r\n"):
        raise _malformed("a line ends in a bare LF")
    try:
        httptools.HttpRequestParser(_Parts()).feed_data(buffer)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as error:
        raise _malformed(f"llhttp: {error}") from error


def has_no_body(method: bytes, status: int) -> bool:
    """Whether a response to this method with this status ends with its head. RFC 9112 section 6.3."""
    return method == b"HEAD" or status in _NO_BODY_STATUSES or status < 200


class _Fields:
    """The fields of one head, sorted by what they mean."""

    __slots__ = ("block", "credentials", "expects_continue", "forwarded", "framing", "request_id")

    def __init__(self) -> None:
        self.framing = _Framing()
        self.block = b""
        self.credentials: list[CredentialField] = []
        self.forwarded: list[tuple[bytes, bytes]] = []
        self.request_id: bytes | None = None
        self.expects_continue = False


def _take_apart(
    fields: list[tuple[bytes, bytes]], names: FieldNames, whose: Reason, hops: Collection[bytes] = ()
) -> _Fields:
    head = _Fields()
    lines: list[bytes] = []
    for name, value in fields:
        kind = names.kind(name)
        if kind is Kind.PLAIN:
            if not hops or name.lower() not in hops:
                lines += (name, b": ", value, b"\r\n")
        elif kind is Kind.UNREADABLE:
            # An upstream may name its own fields as it likes: they go to the client, who is not misled by them.
            if whose is Reason.REQUEST_MALFORMED:
                raise _malformed("a header name has characters other than letters, digits and '-'")
            lines += (name, b": ", value, b"\r\n")
        elif kind is Kind.CREDENTIAL:
            head.credentials.append(CredentialField(name.lower(), value))
        elif kind is Kind.FORWARDED:
            head.forwarded.append((name.lower(), value))
        elif kind is Kind.REQUEST_ID:
            head.request_id = value
        elif kind is Kind.EXPECT:
            if value.lower() != b"100-continue":
                raise _malformed("an Expect other than 100-continue")
            head.expects_continue = True
        elif kind is not Kind.HOP and kind is not Kind.RESERVED:
            _frame(head.framing, kind, value)
            if kind is not Kind.CONNECTION and kind is not Kind.TRANSFER_ENCODING:
                lines += (name, b": ", value, b"\r\n")
    named = set(head.framing.options) - _KNOWN_OPTIONS
    if named and not hops:
        for option in named:
            if names.kind(option) in NOT_HOP_BY_HOP:
                raise _malformed("Connection names a field that is not hop-by-hop")
        return _take_apart(fields, names, whose, hops=named)
    head.block = b"".join(lines)
    return head


def _frame(framing: _Framing, kind: Kind, value: bytes) -> None:
    if kind is Kind.HOST:
        if framing.host is not None:
            raise _malformed("more than one Host")
        framing.host = value
    elif kind is Kind.CONTENT_LENGTH:
        if framing.content_length is not None:
            raise _malformed("more than one Content-Length")
        if not value.isdigit() or len(value) > _CONTENT_LENGTH_DIGITS_MAX:
            raise _malformed("Content-Length is not a number")
        framing.content_length = int(value)
    elif kind is Kind.TRANSFER_ENCODING:
        if framing.chunked or value.lower() != b"chunked":
            raise _malformed("Transfer-Encoding is not exactly 'chunked', once")
        framing.chunked = True
    elif kind is Kind.CONTENT_TYPE:
        if framing.content_type:
            raise _malformed("more than one Content-Type")
        framing.content_type = True
    else:
        framing.options += (option.strip(b" \t").lower() for option in value.split(b","))


def _parse(parser: httptools.HttpRequestParser | httptools.HttpResponseParser, parts: _Parts, raw: bytes) -> None:
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass  # llhttp stops after a head with Upgrade; it has read all of it
    except httptools.HttpParserError as error:
        raise _malformed(f"llhttp: {error}") from error
    # As many lines as fields: llhttp has folded nothing together, and no CR or LF stands anywhere else.
    lines = len(parts.fields) + 2
    if not parts.is_complete or not raw.count(b"\r\n") == raw.count(b"\n") == raw.count(b"\r") == lines:
        raise _malformed("a line ends in something other than CRLF, or is no header")
    if lines > FIELDS_MAX:
        raise Refusal(Reason.HEADERS_TOO_LARGE, f"more than {FIELDS_MAX} header lines")


def _minor(version: str) -> int:
    if version == "1.1":
        return 1
    if version == "1.0":
        return 0
    raise _malformed("the version is neither HTTP/1.1 nor HTTP/1.0")


def _keeps_alive(options: Iterable[bytes], minor: int) -> bool:
    if b"close" in options:
        return False
    return minor == 1 or b"keep-alive" in options


def _malformed(detail: str) -> Refusal:
    return Refusal(Reason.REQUEST_MALFORMED, detail)
