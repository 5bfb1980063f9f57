"""Parse and validate a complete head, request or response, from its bytes.

Two checks have to agree on every head. llhttp parses it, strictly; and what llhttp is lenient about, or does not know,
is checked on the raw bytes here: one space in the request line, no line that is not a field, one Host, one
Content-Length, a Transfer-Encoding that is exactly `chunked`, names that every server reads alike.

llhttp gets the head only. `framing` finds the end of the body: httptools does not report how many bytes it has
consumed, and a proxy must know that before it forwards anything.

`head_cache` caches the results, since clients send nearly the same head repeatedly.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Final

import httptools

from keyproxy.http import content_type, idempotency_key, request_target
from keyproxy.http.headers import FieldNames, states_limits
from keyproxy.http.routes import KNOWN_METHODS
from keyproxy.http_messages import RequestFields, RequestLine, ResponseFields, ResponseHead, StatusLine
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.parsing.head_beginnings import with_uniform_method
from keyproxy.wire.parsing.header_fields import Fields, ParsedFields, malformed, parse_fields

SWITCHING_PROTOCOLS: Final = 101
FIELDS_MAX: Final = 256

_NOT_MODIFIED: Final = 304
_OWS: Final = b" \t"
_PHRASE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")

_WEBSOCKET_VERSION: Final = b"13"

#: Fields that sign or digest the body.
_DIGESTS: Final = frozenset({b"content-digest", b"digest", b"x-amz-content-sha256"})


def parse_request(
    raw: bytes,
    names: FieldNames,
    holds_key: Callable[[bytes], bool],
    methods: Collection[bytes] = KNOWN_METHODS,
    *,
    line: RequestLine | None = None,
    accepts_encoded_slash: bool = False,
) -> tuple[RequestLine, RequestFields, ParsedFields]:
    """Parse a request head from its bytes, which end with the empty line.

    `holds_key`: whether a target contains a key. `methods`: the served methods. `line`: the request line, if it was
    judged before. `accepts_encoded_slash`: whether a path may have `%2F`.

    Raises a Refusal: REQUEST_MALFORMED or HEADERS_TOO_LARGE, and for a well-formed head METHOD_NOT_ALLOWED,
    METHOD_NOT_IMPLEMENTED or EXPECTATION_FAILED.
    """
    parts = _Parts()
    parser = httptools.HttpRequestParser(parts)
    method = raw.partition(b" ")[0]
    _parse(parser, parts, with_uniform_method(raw, method))
    version = parser.get_http_version()
    if not raw.startswith(b"%b %b HTTP/%b\r\n" % (method, parts.start, version.encode())):
        raise malformed("the request line is not 'METHOD target HTTP/1.x'")
    minor = _minor(version)
    if method == b"CONNECT":
        raise malformed("CONNECT is not supported")
    parsed = parse_fields(parts.fields, names, is_request=True)
    if parsed.host is not None:
        request_target.check_host(parsed.host)
    elif minor == 1:
        raise malformed("HTTP/1.1 without a Host")
    if parsed.is_chunked and (parsed.content_length is not None or minor == 0):
        raise malformed("Transfer-Encoding beside Content-Length, or in HTTP/1.0")
    opens_tunnel = minor == 1 and parsed.names_websocket
    if opens_tunnel:
        _check_handshake(method, parts.fields, parsed)
    if line is None:
        try:
            going = request_target.judge(method, parts.start, parsed.host, accepts_encoded_slash=accepts_encoded_slash)
        except Refusal:
            # An agent token in a path may be encoded in a way that makes the path ambiguous: `%2E` for its dots.
            if holds_key(parts.start):
                raise Refusal(Reason.KEY_IN_URL) from None
            raise
        line = request_line(method, going, minor, holds_key=holds_key(going.decoded))
    _check_is_served(method, parsed, methods)
    media_type, codings = _content(parts.fields, parsed)
    sent = [name.lower() for name, _ in parts.fields]
    fields = RequestFields(
        host=parsed.host,
        host_block=b"X-Forwarded-Host: %b\r\n" % parsed.host if parsed.host is not None else b"",
        has_content_length=parsed.content_length is not None,
        is_chunked=parsed.is_chunked,
        keeps_alive=parsed.keeps_alive(minor),
        has_close_option=b"close" in parsed.options,
        expects_continue=parsed.expects_continue and minor == 1,
        opens_tunnel=opens_tunnel,
        media_type=media_type,
        codings=codings,
        has_idempotency_key=sent.count(idempotency_key.NAME) == 1,
        has_traceparent=sent.count(b"traceparent") == 1,
        accepts_codings=b"accept-encoding" in sent,
        digests_body=not _DIGESTS.isdisjoint(sent),
        has_clear_type=parsed.content_type is None or content_type.is_unambiguous(parsed.content_type.lower()),
    )
    return line, fields, parsed


def _check_handshake(method: bytes, fields: Fields, parsed: ParsedFields) -> None:
    """Raise the Refusal for a WebSocket handshake that lacks something. RFC 6455 section 4.2.1."""
    fault = ""
    if method != b"GET" or parsed.content_length is not None or parsed.is_chunked:
        fault = "must be a GET without a body"
    elif b"upgrade" not in parsed.options:
        fault = "must have the Connection option Upgrade"
    else:
        key = [value for name, value in fields if name.lower() == b"sec-websocket-key"]
        version = [value for name, value in fields if name.lower() == b"sec-websocket-version"]
        if len(key) != 1 or not key[0]:
            fault = "must have one Sec-WebSocket-Key"
        elif version != [_WEBSOCKET_VERSION]:
            fault = "must have one Sec-WebSocket-Version, which is 13"
    if fault:
        sentence = f"A WebSocket handshake {fault}."
        raise Refusal(Reason.REQUEST_MALFORMED, sentence, caller_text=sentence, replaces_sentence=True)


def _check_is_served(method: bytes, parsed: ParsedFields, methods: Collection[bytes]) -> None:
    """Raise the Refusal for a well-formed request that this proxy does not serve."""
    if method == b"TRACE":
        raise Refusal(Reason.METHOD_NOT_ALLOWED, "TRACE")
    if method not in methods:
        raise Refusal(Reason.METHOD_NOT_IMPLEMENTED, "a method that is neither registered nor named by a route")
    if parsed.fails_expectation:
        raise Refusal(Reason.EXPECTATION_FAILED, "an Expect other than 100-continue")


def request_line(method: bytes, going: request_target.Target, minor_version: int, *, holds_key: bool) -> RequestLine:
    """Build a request line from its parsed parts."""
    start = b"%b %b HTTP/1.1\r\n" % (method, going.target)
    is_plain = going.path.find(b"%") < 0 and going.path.find(b";") < 0
    return RequestLine(method, going.target, going.path, minor_version, start, holds_key, is_plain=is_plain)


def parse_response(raw: bytes, names: FieldNames) -> tuple[StatusLine, ResponseFields, ParsedFields]:
    """Parse a response head from its bytes. Raises a Refusal (UPSTREAM_INVALID)."""
    parts = _Parts()
    parser = httptools.HttpResponseParser(parts)
    try:
        _parse(parser, parts, raw)
        minor = _minor(parser.get_http_version())
        status = parser.get_status_code()
        if not 100 <= status <= 599 or not raw.startswith(b"HTTP/1.%d %d" % (minor, status)):
            raise malformed("the status line is not 'HTTP/1.x NNN phrase'")
        if not _PHRASE.fullmatch(parts.start):
            raise malformed("the reason phrase holds a control character")
        parsed = parse_fields(parts.fields, names, is_request=False)
    except Refusal as refusal:
        raise Refusal(Reason.UPSTREAM_INVALID, refusal.detail) from refusal
    if parsed.is_chunked and (parsed.content_length is not None or minor == 0):
        raise Refusal(Reason.UPSTREAM_INVALID, "Transfer-Encoding beside Content-Length, or in HTTP/1.0")
    media_type, codings = _content(parts.fields, parsed)
    line = StatusLine(status, minor, b"HTTP/1.1 %d %b\r\n" % (status, parts.start.strip(_OWS)))
    going = [name for (name, _), goes_on in zip(parts.fields, parsed.is_forwarded, strict=True) if goes_on]
    fields = ResponseFields(
        has_content_length=parsed.content_length is not None,
        is_chunked=parsed.is_chunked,
        keeps_alive=parsed.keeps_alive(minor),
        opens_tunnel=parsed.opens_tunnel and status == SWITCHING_PROTOCOLS,
        media_type=media_type,
        codings=codings,
        has_date=any(name.lower() == b"date" for name in going),
        states_limits=any(states_limits(name) for name in going),
    )
    return line, fields, parsed


def has_no_body(method: bytes, line: StatusLine) -> bool:
    """Whether a response to this method with this status line ends with its head. RFC 9112 section 6.3."""
    return method == b"HEAD" or line.ends_with_head or line.status == _NOT_MODIFIED


def without_length(head: ResponseHead) -> ResponseHead:
    """Return the head without its Content-Length, for which a client might wait. RFC 9110 section 8.6."""
    lines = head.block.splitlines(keepends=True)
    block = b"".join(line for line in lines if not line.lower().startswith(b"content-length:"))
    without = ResponseHead(head.line, dataclasses.replace(head.fields, has_content_length=False), block, 0)
    without.usage_tokens = head.usage_tokens
    return without


class _Parts:
    """Collects the callbacks of httptools."""

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
        self.fields.append((name, value.strip(_OWS)))

    def on_headers_complete(self) -> None:
        self.is_complete = True


def _content(fields: Fields, parsed: ParsedFields) -> tuple[bytes, tuple[bytes, ...]]:
    """Return the media type, without parameters, and the content codings, from the forwarded lines."""
    lines = zip(fields, parsed.is_forwarded, strict=True)
    going = [(name.lower(), value.lower()) for (name, value), goes_on in lines if goes_on]
    types = [value for name, value in going if name == b"content-type"]
    codings = tuple([value for name, value in going if name == b"content-encoding"])
    return types[-1].partition(b";")[0].strip() if types else b"", codings


def _parse(parser: httptools.HttpRequestParser | httptools.HttpResponseParser, parts: _Parts, raw: bytes) -> None:
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass  # llhttp stops after a head with Upgrade; it has read all of it
    except httptools.HttpParserError as error:
        raise malformed(f"llhttp: {error}") from error
    # As many lines as fields: llhttp has folded no lines, and there is no other CR or LF.
    lines = len(parts.fields) + 2
    if not parts.is_complete or not raw.count(b"\r\n") == raw.count(b"\n") == raw.count(b"\r") == lines:
        raise malformed("a line ends in something other than CRLF, or is no header")
    if lines > FIELDS_MAX:
        raise Refusal(Reason.HEADERS_TOO_LARGE, f"more than {FIELDS_MAX} header lines")


def _minor(version: str) -> int:
    if version == "1.1":
        return 1
    if version == "1.0":
        return 0
    raise malformed("the version is neither HTTP/1.1 nor HTTP/1.0")
