"""A second parser for HTTP/1.1, written from RFC 9110 and RFC 9112 independently of the product and of llhttp.

Slow and simple on purpose: it reads byte by byte and accepts only unambiguous input. `read` returns the requests in a
stream of bytes. A server that finds another request in it, or a request that ends elsewhere, reads the stream
differently, which makes request smuggling possible.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
NAME = frozenset(b"-._0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
VALUE = frozenset([0x09, *range(0x20, 0x7F), *range(0x80, 0x100)])
DIGITS = frozenset(b"0123456789")
HEX = frozenset(b"0123456789abcdefABCDEF")

#: Path characters that all servers read alike.
PLAIN = frozenset(b"-_~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
QUERY = frozenset(range(0x21, 0x7F)) - frozenset(b"\\#")

#: There are more than these, but these are unambiguous.
METHODS = (b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH")

SINGLE = (b"host", b"content-length", b"transfer-encoding")

#: Names that frame a message. With another separator, servers that pass names to programs take them for these.
JUDGED = frozenset({b"content-length", b"transfer-encoding", b"content-type", b"content-encoding"})
SEPARATORS = frozenset(b"_.")
FOLDED = bytes.maketrans(b"_.", b"--")


class Malformed(Exception):
    """No request, or one that could be read in more than one way."""


class Incomplete(Exception):
    """The bytes end within a request."""


@dataclass
class Request:
    """One request. `is_certain`: a server that refuses it is too strict."""

    method: bytes
    target: bytes
    body: bytes = b""
    fields: list[tuple[bytes, bytes]] = field(default_factory=list)
    is_certain: bool = True
    is_last: bool = False
    has_close_option: bool = False


@dataclass
class Reading:
    """The content of a stream: whole requests in order, and how it ends.

    The end is `clean`, `malformed` or `incomplete`; `ignored` if bytes follow a request with `Connection: close`.
    """

    requests: list[Request]
    ending: str


def read(stream: bytes) -> Reading:
    """All requests of a stream that its sender has closed."""
    requests: list[Request] = []
    at = 0
    while True:
        if stream[at : at + 2] == b"\r\n":
            at += 2  # one empty line before a request, or at the end
        if at == len(stream):
            return Reading(requests, "clean")
        if requests and requests[-1].is_last:
            return Reading(requests, "ignored" if requests[-1].has_close_option else "malformed")
        try:
            request, at = _request(stream, at)
        except (Malformed, Incomplete) as error:
            return Reading(requests, type(error).__name__.lower())
        requests.append(request)


def _request(stream: bytes, at: int) -> tuple[Request, int]:
    line, at = _line(stream, at)
    parts = line.split(b" ")
    if len(parts) != 3 or not parts[0] or set(parts[0]) - TOKEN or parts[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise Malformed
    fields: list[tuple[bytes, bytes]] = []
    is_odd = False
    while True:
        line, at = _line(stream, at)
        if not line:
            break
        name, colon, value = line.partition(b":")
        if not name or not colon or set(name) - NAME or set(value) - VALUE:
            raise Malformed
        if set(name) & SEPARATORS and name.lower().translate(FOLDED) in JUDGED:
            raise Malformed
        fields.append((name.lower(), value.strip(b" \t")))
        is_odd = is_odd or value.endswith(b"\t")  # llhttp, for one, does not take every space for one
    request = Request(parts[0], parts[1], fields=fields, is_certain=not is_odd)
    is_http_11 = parts[2] == b"HTTP/1.1"
    for name in SINGLE:
        if len(_all(fields, name)) > 1:
            raise Malformed
    if len(set(_all(fields, b"content-type"))) > 1:
        raise Malformed
    _judge_target(request, is_http_11=is_http_11)
    options = {option.strip(b" \t").lower() for value in _all(fields, b"connection") for option in value.split(b",")}
    request.is_last = b"close" in options or not (is_http_11 or b"keep-alive" in options)
    if options - {b"close", b"keep-alive", b""}:
        request.is_certain = False
    expected = {one.strip(b" \t").lower() for value in _all(fields, b"expect") for one in value.split(b",")}
    if expected - {b"100-continue", b""} or request.method == b"TRACE":
        raise Malformed  # well-formed, but has to be refused
    request.has_close_option = b"close" in options
    return request, _body(stream, at, request, is_http_11=is_http_11)


@dataclass
class Response:
    """The final response at the beginning of a stream, and what follows it. `is_clean`: another may come after it."""

    status: int
    body: bytes
    rest: bytes
    is_clean: bool


def read_response(stream: bytes, method: bytes) -> Response:
    """The response to one request on a connection that the server has closed after these bytes.

    Raises Malformed, or Incomplete if the connection was closed too early.
    """
    while True:
        status, fields, at, is_http_11 = _response_head(stream)
        if status >= 200:
            break
        if status == 101:
            raise Malformed
        stream = stream[at:]
    lengths, codings = _all(fields, b"content-length"), _all(fields, b"transfer-encoding")
    options = _options(fields)
    is_clean = b"close" not in options and (is_http_11 or b"keep-alive" in options)
    if method == b"HEAD" or status in (204, 304):
        return Response(status, b"", stream[at:], is_clean and not stream[at:])
    request = Request(method, b"/", fields=fields)
    if not lengths and not codings:
        return Response(status, stream[at:], b"", is_clean=False)
    at = _body(stream, at, request, is_http_11=is_http_11)
    return Response(status, request.body, stream[at:], is_clean and not stream[at:])


def _response_head(stream: bytes) -> tuple[int, list[tuple[bytes, bytes]], int, bool]:
    line, at = _line(stream, 0)
    version, _, rest = line.partition(b" ")
    status, space, phrase = rest[:3], rest[3:4], rest[4:]
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or len(status) != 3 or set(status) - DIGITS:
        raise Malformed
    if space not in (b" ", b"") or set(phrase) - VALUE or not 100 <= int(status) <= 599:
        raise Malformed
    fields: list[tuple[bytes, bytes]] = []
    while True:
        line, at = _line(stream, at)
        if not line:
            break
        name, colon, value = line.partition(b":")
        if not name or not colon or set(name) - TOKEN or set(value) - VALUE:
            raise Malformed
        fields.append((name.lower(), value.strip(b" \t")))
    lengths, codings = _all(fields, b"content-length"), _all(fields, b"transfer-encoding")
    if len(lengths) > 1 or len(codings) > 1 or (lengths and codings) or (codings and version == b"HTTP/1.0"):
        raise Malformed
    if (lengths and (not lengths[0] or set(lengths[0]) - DIGITS)) or (codings and codings[0].lower() != b"chunked"):
        raise Malformed
    return int(status), fields, at, version == b"HTTP/1.1"


def _options(fields: list[tuple[bytes, bytes]]) -> set[bytes]:
    return {option.strip(b" \t").lower() for value in _all(fields, b"connection") for option in value.split(b",")}


def _judge_target(request: Request, *, is_http_11: bool) -> None:
    hosts, target = _all(request.fields, b"host"), request.target
    if is_http_11 and not hosts:
        raise Malformed
    if (hosts and not hosts[0]) or set(target) - QUERY or not target:
        raise Malformed
    if request.method not in METHODS or (hosts and not _is_plain_host(hosts[0])):
        request.is_certain = False
    path, _, _ = target.partition(b"?")
    if target == b"*" and request.method == b"OPTIONS":
        return
    if not path.startswith(b"/"):
        # In absolute form it has to agree with Host; in any other it is not for a reverse proxy.
        scheme, found, rest = target.partition(b"://")
        authority = rest.partition(b"/")[0].partition(b"?")[0]
        if scheme.lower() not in (b"http", b"https") or not found or not hosts or hosts[0].lower() != authority.lower():
            raise Malformed
        request.is_certain = False
    for segment in path.split(b"/")[1:]:
        if segment in (b".", b".."):
            raise Malformed
        if set(segment) - PLAIN:
            request.is_certain = False
    if path.startswith(b"//"):
        request.is_certain = False


def _is_plain_host(host: bytes) -> bool:
    name, _, port = host.partition(b":")
    return bool(name) and not set(name) - PLAIN - {0x2E} and (not port or (port.isdigit() and len(port) < 6))


def _body(stream: bytes, at: int, request: Request, *, is_http_11: bool) -> int:
    lengths, codings = _all(request.fields, b"content-length"), _all(request.fields, b"transfer-encoding")
    if codings:
        if lengths or codings[0].lower() != b"chunked" or not is_http_11:
            raise Malformed
        return _chunks(stream, at, request)
    if not lengths:
        return at
    if not lengths[0] or set(lengths[0]) - DIGITS or len(lengths[0]) > 18:
        raise Malformed
    end = at + int(lengths[0])
    if end > len(stream):
        raise Incomplete
    request.body = stream[at:end]
    return end


def _chunks(stream: bytes, at: int, request: Request) -> int:
    while True:
        line, at = _line(stream, at)
        digits, semicolon, extension = line.partition(b";")
        if semicolon:
            digits = digits.rstrip(b" \t")
            request.is_certain = False  # a proxy may well refuse extensions
        if not digits or set(digits) - HEX or set(extension) - VALUE:
            raise Malformed
        if len(digits) > 16:
            request.is_certain = False
        size = int(digits, 16)
        if not size:
            break
        if at + size + 2 > len(stream):
            if len(stream) > at + size and stream[at + size :] != b"\r":
                raise Malformed
            raise Incomplete
        request.body += stream[at : at + size]
        at += size
        if stream[at : at + 2] != b"\r\n":
            raise Malformed
        at += 2
    while True:
        line, at = _line(stream, at)
        if not line:
            return at
        request.is_certain = False  # a proxy may well refuse some trailers
        name, colon, value = line.partition(b":")
        if not name or not colon or set(name) - TOKEN or set(value) - VALUE:
            raise Malformed


def _line(stream: bytes, at: int) -> tuple[bytes, int]:
    """The line at an offset without its CRLF, and where the next one begins. No CR or LF stands alone."""
    for place in range(at, len(stream)):
        if stream[place] == 0x0A:
            raise Malformed
        if stream[place] == 0x0D:
            if place + 1 == len(stream):
                break
            if stream[place + 1] != 0x0A:
                raise Malformed
            return stream[at:place], place + 2
    raise Incomplete


def _all(fields: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for one, value in fields if one == name]
