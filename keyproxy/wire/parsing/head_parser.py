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
from collections.abc import Callable, Collection, Sequence
from typing import Final

import httptools

from keyproxy.http import idempotency_key, request_target
from keyproxy.http.headers import NOT_HOP_BY_HOP, FieldNames, Kind, states_limits
from keyproxy.http.routes import KNOWN_METHODS
from keyproxy.model import CredentialField, RequestFields, RequestLine, ResponseFields, ResponseHead, StatusLine
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.parsing.head_beginnings import with_uniform_method

SWITCHING_PROTOCOLS: Final = 101
FIELDS_MAX: Final = 256
CONTENT_LENGTH_DIGITS_MAX: Final = 18

_OPTIONS_WITHOUT_FIELD: Final = frozenset({b"close", b"keep-alive", b"upgrade", b"te", b"http2-settings", b""})
_NOT_MODIFIED: Final = 304
_OWS: Final = b" \t"
_PHRASE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")

_WEBSOCKET_VERSION: Final = b"13"

Fields = Sequence[tuple[bytes, bytes]]


class JudgedFields:
    """The parsed fields of one head. `is_forwarded`: for each field, in order, whether it is forwarded."""

    __slots__ = (
        "content_length",
        "content_length_place",
        "content_type",
        "credentials",
        "expects_continue",
        "fails_expectation",
        "forwarded",
        "host",
        "is_chunked",
        "is_forwarded",
        "options",
        "request_id",
        "upgrades",
        "usages",
    )

    def __init__(self) -> None:
        self.is_forwarded: list[bool] = []
        self.credentials: list[CredentialField] = []
        self.forwarded: list[tuple[bytes, bytes]] = []
        self.request_id: bytes | None = None
        self.host: bytes | None = None
        self.content_length: int | None = None
        #: The index of Content-Length among the fields; -1 without one.
        self.content_length_place = -1
        self.content_type: bytes | None = None
        self.is_chunked = False
        self.expects_continue = False
        self.fails_expectation = False
        self.options: list[bytes] = []
        self.upgrades: list[bytes] = []
        self.usages: list[bytes] = []

    @property
    def usage_tokens(self) -> bytes | None:
        """The value of X-Usage-Tokens; None if there is not exactly one."""
        return self.usages[0] if len(self.usages) == 1 else None

    @property
    def opens_tunnel(self) -> bool:
        """Whether this is one side of a WebSocket handshake. RFC 6455 section 4. Any other upgrade is ignored."""
        return self.names_websocket and b"upgrade" in self.options and not self.is_chunked

    @property
    def names_websocket(self) -> bool:
        """Whether an Upgrade field names WebSocket."""
        return any(b"websocket" in [one.strip(_OWS) for one in value.split(b",")] for value in self.upgrades)

    def keeps_alive(self, minor_version: int) -> bool:
        """Whether this side of the connection is persistent. RFC 9112 section 9.3."""
        if b"close" in self.options:
            return False
        return minor_version == 1 or b"keep-alive" in self.options


def judge_request(
    raw: bytes,
    names: FieldNames,
    holds_key: Callable[[bytes], bool],
    methods: Collection[bytes] = KNOWN_METHODS,
    *,
    line: RequestLine | None = None,
) -> tuple[RequestLine, RequestFields, JudgedFields]:
    """Parse a request head from its bytes, which end with the empty line.

    `holds_key`: whether a target contains a key. `methods`: the served methods. `line`: the request line, if it was
    judged before.

    Raises a Refusal: REQUEST_MALFORMED or HEADERS_TOO_LARGE, and for a well-formed head METHOD_NOT_ALLOWED,
    METHOD_NOT_IMPLEMENTED or EXPECTATION_FAILED.
    """
    parts = _Parts()
    parser = httptools.HttpRequestParser(parts)
    method = raw.partition(b" ")[0]
    _parse(parser, parts, with_uniform_method(raw, method))
    version = parser.get_http_version()
    if not raw.startswith(b"%b %b HTTP/%b\r\n" % (method, parts.start, version.encode())):
        raise _malformed("the request line is not 'METHOD target HTTP/1.x'")
    minor = _minor(version)
    if method == b"CONNECT":
        raise _malformed("CONNECT is not for a reverse proxy")
    judged = _judge_fields(parts.fields, names, is_request=True)
    if judged.host is not None:
        request_target.check_host(judged.host)
    elif minor == 1:
        raise _malformed("HTTP/1.1 without a Host")
    if judged.is_chunked and (judged.content_length is not None or minor == 0):
        raise _malformed("Transfer-Encoding beside Content-Length, or in HTTP/1.0")
    opens_tunnel = minor == 1 and judged.names_websocket
    if opens_tunnel:
        _check_handshake(method, parts.fields, judged)
    if line is None:
        going = request_target.judge(method, parts.start, judged.host)
        line = request_line(method, going, minor, holds_key=holds_key(going.decoded))
    _check_is_served(method, judged, methods)
    media_type, codings = _content(parts.fields, judged)
    sent = [name.lower() for name, _ in parts.fields]
    fields = RequestFields(
        host=judged.host,
        host_block=b"X-Forwarded-Host: %b\r\n" % judged.host if judged.host is not None else b"",
        has_content_length=judged.content_length is not None,
        is_chunked=judged.is_chunked,
        keeps_alive=judged.keeps_alive(minor),
        says_close=b"close" in judged.options,
        expects_continue=judged.expects_continue and minor == 1,
        opens_tunnel=opens_tunnel,
        media_type=media_type,
        codings=codings,
        has_idempotency_key=sent.count(idempotency_key.NAME) == 1,
        has_traceparent=sent.count(b"traceparent") == 1,
        accepts_codings=b"accept-encoding" in sent,
    )
    return line, fields, judged


def _check_handshake(method: bytes, fields: Fields, judged: JudgedFields) -> None:
    """Raise the Refusal for a WebSocket handshake that lacks something. RFC 6455 section 4.2.1."""
    fault = ""
    if method != b"GET" or judged.content_length is not None or judged.is_chunked:
        fault = "must be a GET without a body"
    elif b"upgrade" not in judged.options:
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


def _check_is_served(method: bytes, judged: JudgedFields, methods: Collection[bytes]) -> None:
    """Raise the Refusal for a well-formed request that this proxy does not serve."""
    if method == b"TRACE":
        raise Refusal(Reason.METHOD_NOT_ALLOWED, "TRACE")
    if method not in methods:
        raise Refusal(Reason.METHOD_NOT_IMPLEMENTED, "a method that is neither registered nor named by a route")
    if judged.fails_expectation:
        raise Refusal(Reason.EXPECTATION_FAILED, "an Expect other than 100-continue")


def request_line(method: bytes, going: request_target.Target, minor_version: int, *, holds_key: bool) -> RequestLine:
    """Build a request line from its parsed parts."""
    start = b"%b %b HTTP/1.1\r\n" % (method, going.target)
    return RequestLine(method, going.target, going.path, minor_version, start, holds_key)


def judge_response(raw: bytes, names: FieldNames) -> tuple[StatusLine, ResponseFields, JudgedFields]:
    """Parse a response head from its bytes. Raises a Refusal (UPSTREAM_INVALID)."""
    parts = _Parts()
    parser = httptools.HttpResponseParser(parts)
    try:
        _parse(parser, parts, raw)
        minor = _minor(parser.get_http_version())
        status = parser.get_status_code()
        if not 100 <= status <= 599 or not raw.startswith(b"HTTP/1.%d %d" % (minor, status)):
            raise _malformed("the status line is not 'HTTP/1.x NNN phrase'")
        if not _PHRASE.fullmatch(parts.start):
            raise _malformed("the reason phrase holds a control character")
        judged = _judge_fields(parts.fields, names, is_request=False)
    except Refusal as refusal:
        raise Refusal(Reason.UPSTREAM_INVALID, refusal.detail) from refusal
    if judged.is_chunked and (judged.content_length is not None or minor == 0):
        raise Refusal(Reason.UPSTREAM_INVALID, "Transfer-Encoding beside Content-Length, or in HTTP/1.0")
    media_type, codings = _content(parts.fields, judged)
    line = StatusLine(status, minor, b"HTTP/1.1 %d %b\r\n" % (status, parts.start.strip(_OWS)))
    going = [name for (name, _), goes_on in zip(parts.fields, judged.is_forwarded, strict=True) if goes_on]
    fields = ResponseFields(
        has_content_length=judged.content_length is not None,
        is_chunked=judged.is_chunked,
        keeps_alive=judged.keeps_alive(minor),
        opens_tunnel=judged.opens_tunnel and status == SWITCHING_PROTOCOLS,
        media_type=media_type,
        codings=codings,
        has_date=any(name.lower() == b"date" for name in going),
        states_limits=any(states_limits(name) for name in going),
    )
    return line, fields, judged


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


def _judge_fields(fields: Fields, names: FieldNames, *, is_request: bool, hops: Collection[bytes] = ()) -> JudgedFields:
    judged = JudgedFields()
    for name, value in fields:
        kind = names.kind(name)
        is_forwarded = False
        if kind is Kind.PLAIN or (kind is Kind.UNREADABLE and not is_request):
            # An upstream's field names are not restricted: they are relayed to the client, which they do not mislead.
            is_forwarded = name.lower() not in hops
        elif kind is Kind.USAGE:
            is_forwarded = name.lower() not in hops
            judged.usages += [value] if is_forwarded else []
        elif kind is Kind.UNREADABLE:
            raise _malformed("a header name has characters other than letters, digits and '-'")
        elif kind is Kind.CREDENTIAL and is_request:
            judged.credentials.append(CredentialField(name.lower(), value))
        elif kind is Kind.FORWARDED and is_request:
            judged.forwarded.append((name.lower(), value))
        elif kind is Kind.REQUEST_ID:
            judged.request_id = value
        elif kind is Kind.UPGRADE:
            judged.upgrades.append(value.lower())
        elif kind is Kind.EXPECT and is_request:
            for member in value.lower().split(b","):
                if member.strip(_OWS) == b"100-continue":
                    judged.expects_continue = True
                elif member.strip(_OWS):
                    judged.fails_expectation = True
        elif kind not in (Kind.HOP, Kind.RESERVED):
            is_forwarded = _judge_framing(judged, kind, value, is_request=is_request)
        judged.is_forwarded.append(is_forwarded)
    named = set(judged.options) - _OPTIONS_WITHOUT_FIELD
    if named and not hops:
        if not named.isdisjoint(NOT_HOP_BY_HOP):
            raise _malformed("Connection names a field that is not hop-by-hop")
        return _judge_fields(fields, names, is_request=is_request, hops=named)
    return judged


def _judge_framing(judged: JudgedFields, kind: Kind, value: bytes, *, is_request: bool) -> bool:
    """Process a framing, Host or Content-Type field; return whether it is forwarded."""
    if kind is Kind.CONNECTION:
        judged.options += (option.strip(_OWS).lower() for option in value.split(b","))
        return False
    if kind is Kind.TRANSFER_ENCODING:
        if judged.is_chunked or value.lower() != b"chunked":
            raise _malformed("Transfer-Encoding is not exactly 'chunked', once")
        judged.is_chunked = True
        return False
    if kind is Kind.CONTENT_LENGTH:
        if judged.content_length is not None:
            raise _malformed("more than one Content-Length")
        if not value.isdigit() or len(value) > CONTENT_LENGTH_DIGITS_MAX:
            raise _malformed("Content-Length is not a number")
        judged.content_length = int(value)
        judged.content_length_place = len(judged.is_forwarded)
    elif is_request and kind is Kind.HOST:
        if judged.host is not None:
            raise _malformed("more than one Host")
        judged.host = value
    elif is_request and kind is Kind.CONTENT_TYPE:
        if judged.content_type is not None:
            if judged.content_type != value:
                raise _malformed("conflicting Content-Type fields")
            return False
        judged.content_type = value
    return True


def _content(fields: Fields, judged: JudgedFields) -> tuple[bytes, tuple[bytes, ...]]:
    """Return the media type, without parameters, and the content codings, from the forwarded lines."""
    lines = zip(fields, judged.is_forwarded, strict=True)
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
        raise _malformed(f"llhttp: {error}") from error
    # As many lines as fields: llhttp has folded no lines, and there is no other CR or LF.
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


def _malformed(detail: str) -> Refusal:
    return Refusal(Reason.REQUEST_MALFORMED, detail)
