"""Bytes of the responses to a client: our own, and the heads of relayed ones."""

from __future__ import annotations

import time
from typing import Final

from keyproxy.http import headers
from keyproxy.http.own_response import OwnResponse
from keyproxy.http_messages import ResponseHead
from keyproxy.ports.exchange import Exchange
from keyproxy.wire.context import ServerContext

#: The first bytes of every response.
BEGINNING = b"HTTP/1.1 "

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_NO_CONTENT: Final = 204

_CLOSE: Final = b"Connection: close\r\n"
_KEEP_ALIVE: Final = b"Connection: keep-alive\r\n"


#: Not by strftime, whose names follow the locale.
_DAYS: Final = (b"Mon", b"Tue", b"Wed", b"Thu", b"Fri", b"Sat", b"Sun")
_MONTHS: Final = (
    b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec",
)  # fmt: skip


class DateField:
    """The Date line of a response, made once per second. RFC 9110 section 5.6.7, IMF-fixdate."""

    __slots__ = ("_line", "_second")

    def __init__(self) -> None:
        self._second = -1
        self._line = b""

    def line(self, wall_seconds: float) -> bytes:
        """The line at this moment, in Unix time."""
        second = int(wall_seconds)
        if second != self._second:
            at = time.gmtime(second)
            self._line = b"Date: %b, %02d %b %04d %02d:%02d:%02d GMT\r\n" % (
                _DAYS[at.tm_wday],
                at.tm_mday,
                _MONTHS[at.tm_mon - 1],
                at.tm_year,
                at.tm_hour,
                at.tm_min,
                at.tm_sec,
            )
            self._second = second
        return self._line


def own(
    response: OwnResponse,
    request_id: bytes,
    date: bytes,
    *,
    closes: bool,
    without_body: bool = False,
    is_http_11: bool = True,
) -> bytes:
    """A complete response of ours. `date`: the Date line. `without_body`: the response to a HEAD."""
    kept = b"" if is_http_11 else _KEEP_ALIVE
    # RFC 9110 section 8.6: a 204 must not have one.
    length = b"" if response.status == _NO_CONTENT else b"Content-Length: %d\r\n" % len(response.body)
    return b"HTTP/1.1 %d %b\r\n%b%b%bX-Request-Id: %b\r\n%b\r\n%b" % (
        response.status,
        response.reason_phrase,
        date,
        response.fields,
        length,
        request_id,
        _CLOSE if closes else kept,
        b"" if without_body else response.body,
    )


def own_lines(exchange: Exchange, server: ServerContext) -> bytes:
    """The header lines about limits and the key, for a response of ours to a request that was served."""
    permit, identity, lines = exchange.permit, exchange.identity, b""
    if permit is not None:
        lines = permit.limit_headers(server.clock())
    if identity is not None and identity.retiring_field is not None:
        lines += identity.retiring_header(server.wall())
    return lines


def client_lines(response: ResponseHead, exchange: Exchange, server: ServerContext, now: float) -> bytes:
    """The client's header lines: the upstream's and ours. If our limits apply, only ours describe limits."""
    block, permit, identity = response.block, exchange.permit, exchange.identity
    if permit is not None and permit.hold is not None:
        limits = permit.limit_headers(now)
        if limits and response.fields.states_limits:
            block = headers.without_limits(block)
        block = block + limits
    if identity is not None and identity.retiring_field is not None:
        block = block + identity.retiring_header(server.wall())
    if not response.fields.has_date:
        # RFC 9110 section 6.6.1: a recipient with a clock adds what the origin server left out.
        block = block + server.date_line()
    metered = exchange.metered
    if metered is not None and metered.uses_tokens:
        block = b"%bX-Keyproxy-Tokens-Reserved: %d\r\n" % (block, metered.tokens_reserved)
        if metered.cap:
            block = b"%bX-Keyproxy-Output-Cap: %d\r\n" % (block, metered.cap)
    return block


def interim(head: ResponseHead, request_id: bytes) -> bytes:
    """An interim response (1xx), relayed."""
    return b"%b%bX-Request-Id: %b\r\n\r\n" % (head.line.start, head.block, request_id)


def relayed(
    head: ResponseHead, lines: bytes, request_id: bytes, *, is_chunked: bool, closes: bool, is_http_11: bool
) -> bytes:
    """The head of a relayed response, reframed. `lines`: the upstream's and ours. `is_http_11`: of the client."""
    end = b"\r\nTransfer-Encoding: chunked\r\n\r\n" if is_chunked else b"\r\n\r\n"
    if closes or not is_http_11:
        end = b"\r\n" + (_CLOSE if closes else _KEEP_ALIVE) + end.removeprefix(b"\r\n")
    return head.line.start + lines + b"X-Request-Id: " + request_id + end


def switching(head: ResponseHead, lines: bytes, request_id: bytes) -> bytes:
    """The head of a relayed response that opens a tunnel. `lines`: the upstream's and ours."""
    return b"%b%bX-Request-Id: %b\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" % (
        head.line.start,
        lines,
        request_id,
    )
