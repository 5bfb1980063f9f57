"""The received bytes of a client that are not processed yet, split into requests. Sans-IO.

    head -> its body -> head …  -> tunnel

All bytes that have arrived are checked before any of them is acted upon. So if a request's body turns out malformed, or
is followed by bytes that cannot begin a request, the request has not been forwarded when that is detected.

The connection sets timeouts and buffer bounds.
"""

from __future__ import annotations

from typing import Final

from keyproxy.http.headers import NOT_IN_TRAILERS
from keyproxy.http_messages import RequestHead
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.parsing.framing import Body, ChunkedBody, CountedBody, EmptyBody, EndlessBody
from keyproxy.wire.parsing.head_beginnings import HEAD_END, check_beginning
from keyproxy.wire.parsing.head_cache import RequestReader

_SURPLUS_CHECKED_BYTES: Final = 2_048

_NO_BODY: Final = EmptyBody()


class RequestStream:
    """Splits the received bytes of one connection into requests."""

    __slots__ = ("_has_skipped_line", "body", "buffer", "checked_bytes", "last_head")

    def __init__(self) -> None:
        #: Received bytes that are not processed yet.
        self.buffer = b""
        #: The body of the request that was begun last, if it was not complete at once.
        self.body: Body = _NO_BODY
        #: The head that the next one is compared with. It contains a key, so it is dropped soon when the connection is
        #: idle.
        self.last_head: RequestHead | None = None
        #: How many bytes of an incomplete head were checked. 0: none has arrived.
        self.checked_bytes = 0
        self._has_skipped_line = False

    def begin(self, reader: RequestReader, bytes_max: int) -> tuple[RequestHead, bytes] | None:
        """Return the next request's head, and what has arrived of its content. None if the head is incomplete.

        Raises FramingError or a Refusal (REQUEST_MALFORMED, HEADERS_TOO_LARGE), also for bytes after the request.
        """
        buffer = self.buffer
        if buffer.startswith(b"\r\n") and not self._has_skipped_line:
            # One empty line before a request is tolerated, RFC 9112 section 2.2; a second one is not.
            self._has_skipped_line = True
            buffer = self.buffer = buffer[2:]
        last = self.last_head
        head = None if last is None else reader.read_alike(buffer, last, bytes_max)
        if head is not None:
            head_bytes = len(head.raw)
        else:
            end = buffer.find(HEAD_END)
            if end < 0 or end > bytes_max:
                self._check_unfinished(buffer, reader, bytes_max)
                return None
            head = reader.read(buffer, end, last)
            head_bytes = end + len(HEAD_END)
        self.last_head = head
        content, rest = b"", buffer[head_bytes:]
        if head.has_body:
            body = _chunked(reader) if head.fields.is_chunked else CountedBody(head.content_length)
            content, rest = body.feed(rest)
            # A complete one is not kept: the connection may be idle for long.
            self.body = _NO_BODY if body.is_complete else body
        else:
            self.body = _NO_BODY
        if rest == b"\r\n" and not head.fields.opens_tunnel:
            rest = b""  # some clients have always sent an empty line after a body: it belongs to no request
        elif rest:
            _check_surplus(head, rest, reader)
        self.buffer = rest
        self.checked_bytes = 0
        self._has_skipped_line = False
        return head, content

    def more(self) -> bytes:
        """Return the next content of the current request. Raises FramingError."""
        data, self.buffer = self.buffer, b""
        content, self.buffer = self.body.feed(data)
        return content

    def enter_tunnel(self) -> None:
        """From now on all bytes are content, and no request follows."""
        self.body = EndlessBody()

    def forget(self) -> None:
        """Drop all received bytes."""
        self.buffer = b""
        self.last_head = None

    def _check_unfinished(self, buffer: bytes, reader: RequestReader, bytes_max: int) -> None:
        """Raise a Refusal if these bytes can never become a head."""
        if len(buffer) > bytes_max:
            raise Refusal(Reason.HEADERS_TOO_LARGE)
        if len(buffer) >= 2 * self.checked_bytes:
            # Only once the length has doubled: otherwise single bytes would each cause a check of all received bytes.
            self.checked_bytes = len(buffer)
            check_beginning(buffer, reader.methods)


def _chunked(reader: RequestReader) -> Body:
    return ChunkedBody(lambda name: reader.kind(name) in NOT_IN_TRAILERS)


def _check_surplus(head: RequestHead, rest: bytes, reader: RequestReader) -> None:
    """Refuse bytes after a request that cannot begin another one: the two ends disagree about where this one ends.

    After `Connection: close` further bytes are no request, whatever they look like: they are not read, and so not
    forwarded (RFC 9112 section 9.6). An HTTP/1.0 client without it may assume that it has sent another request.
    """
    if head.fields.opens_tunnel:
        raise Refusal(Reason.REQUEST_MALFORMED, "bytes after an upgrade request")
    if head.fields.has_close_option:
        return
    if not head.fields.keeps_alive:
        raise Refusal(Reason.REQUEST_MALFORMED, "bytes after an HTTP/1.0 request that ends the connection")
    # Only the beginning: if a client sends thousands of requests at once, each must not cause a check of all the
    # others.
    beginning = rest[:_SURPLUS_CHECKED_BYTES].removeprefix(b"\r\n")
    check_beginning(beginning, reader.methods, follows=True)
