"""Bytes of the answers that go to a client: our own, and the head of one that is relayed."""

from __future__ import annotations

from keyproxy.model import ResponseHead
from keyproxy.problems import Answer

#: What every answer begins with.
BEGINNING = b"HTTP/1.1 "

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_CLOSE = b"Connection: close\r\n"
_KEEP_ALIVE = b"Connection: keep-alive\r\n"


def own(answer: Answer, request_id: bytes, *, closes: bool, without_body: bool) -> bytes:
    """A complete answer of ours. `without_body`: the answer to a HEAD."""
    return b"HTTP/1.1 %d %b\r\n%bContent-Length: %d\r\nX-Request-Id: %b\r\n%b\r\n%b" % (
        answer.status,
        answer.reason_phrase,
        answer.fields,
        len(answer.body),
        request_id,
        _CLOSE if closes else b"",
        b"" if without_body else answer.body,
    )


def interim(head: ResponseHead, request_id: bytes) -> bytes:
    """An interim response (1xx), relayed."""
    return b"%b%bX-Request-Id: %b\r\n\r\n" % (head.line.start, head.block, request_id)


def relayed(
    head: ResponseHead, own: bytes, request_id: bytes, *, is_chunked: bool, closes: bool, is_http_11: bool
) -> bytes:
    """The head of a relayed answer, framed anew. `own`: header lines of ours. `is_http_11`: the client is."""
    kept = b"" if is_http_11 else _KEEP_ALIVE
    return b"".join(
        (
            head.line.start,
            head.block,
            own,
            b"X-Request-Id: ",
            request_id,
            b"\r\nTransfer-Encoding: chunked\r\n" if is_chunked else b"\r\n",
            _CLOSE if closes else kept,
            b"\r\n",
        )
    )


def switching(head: ResponseHead, own: bytes, request_id: bytes) -> bytes:
    """The head of a relayed answer that begins a tunnel. `own`: header lines of ours."""
    return b"%b%b%bX-Request-Id: %b\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" % (
        head.line.start,
        head.block,
        own,
        request_id,
    )
