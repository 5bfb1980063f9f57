"""Check the start of a head: bytes that can never become one are refused without waiting for more."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Final

import httptools

from keyproxy.http import request_target
from keyproxy.http.routes import KNOWN_METHODS
from keyproxy.http_messages import RequestLine
from keyproxy.reasons import Reason, Refusal

HEAD_END: Final = b"\r\n\r\n"

_RESPONSE_BEGINNING: Final = b"HTTP/1."

#: An LF without a CR before it, or a CR that no LF follows; one at the very end may still be followed.
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")

#: A method by RFC 9110 section 9.1, of a length that a request can be expected to have.
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
_UNIFORM_METHOD: Final = b"POST"

#: The beginning of a refused head: a method too short to be a key, and a target if the line has arrived whole.
_REFUSED_LINE = re.compile(rb"([A-Za-z-]{1,20}) (?:([!-~]+) HTTP/1\.[01]\r\n)?")

#: Methods that are not served and are still the beginning of a request.
_REFUSED_METHODS: Final = (b"TRACE", b"CONNECT")


def check_beginning(buffer: bytes, methods: Collection[bytes] = KNOWN_METHODS, *, follows: bool = False) -> None:
    """Raise the Refusal for bytes that cannot begin a request, without waiting for more.

    Called once per request that arrives in pieces: single bytes must not cause a parse each.

    `follows`: the bytes come right after another request, and may be the rest of its body. Then the method has to be a
    known one; otherwise any token may become a request that is refused for its method.
    """
    if buffer.startswith(b"\r\n"):
        raise _malformed("more than one empty line before a request")
    head = buffer.partition(HEAD_END)[0]
    if head.count(b"\n") != head.count(b"\r\n"):
        raise _malformed("a line ends in a bare LF")
    method, space, _ = buffer.partition(b" ")
    if follows and not _begins_known(method, methods, is_whole=bool(space)):
        raise _malformed("the bytes after the request do not begin with a known method")
    if not space and _METHOD.fullmatch(method):
        return
    try:
        httptools.HttpRequestParser(object()).feed_data(with_uniform_method(buffer, method))
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as error:
        raise _malformed(f"llhttp: {error}") from error


def check_response_beginning(buffer: bytes, checked_bytes: int) -> None:
    """Raise the Refusal for bytes that cannot begin a response head, without waiting for more.

    `checked_bytes`: how many of them were already checked.
    """
    if not buffer.startswith(_RESPONSE_BEGINNING[: len(buffer)]):
        raise Refusal(Reason.UPSTREAM_INVALID, "the response does not begin with an HTTP/1.x status line")
    if _BARE_LINE_END.search(buffer, max(0, checked_bytes - 1)):
        raise Refusal(Reason.UPSTREAM_INVALID, "a line of the response head ends in something other than CRLF")


def refused_line(
    buffer: bytes, holds_key: Callable[[bytes], bool], *, accepts_encoded_slash: bool = False
) -> RequestLine | None:
    """Return what the access log may show of the request line of a refused head; None without a method.

    An invalid target is left out: in one that decodes ambiguously, a key might not be found.
    """
    match = _REFUSED_LINE.match(buffer)
    if match is None:
        return None
    method, sent = match.groups()
    try:
        target = request_target.judge(method, sent or b"", None, accepts_encoded_slash=accepts_encoded_slash)
    except Refusal:
        return RequestLine(method, b"", b"", 1, b"")
    return RequestLine(method, target.target, target.path, 1, b"", holds_key(target.decoded))


def _begins_known(method: bytes, methods: Collection[bytes], *, is_whole: bool) -> bool:
    """Whether these bytes are one of the methods, or the beginning of one."""
    known = (*methods, *_REFUSED_METHODS)
    if is_whole:
        return method in known
    method = method.removeprefix(b"\r")  # of an empty line that has not arrived whole
    return any(one.startswith(method) for one in known)


def with_uniform_method(buffer: bytes, method: bytes) -> bytes:
    """The bytes with a method that llhttp knows. The method does not affect the parsing of the rest."""
    return _UNIFORM_METHOD + buffer[len(method) :] if _METHOD.fullmatch(method) else buffer


def _malformed(detail: str) -> Refusal:
    return Refusal(Reason.REQUEST_MALFORMED, detail)
