"""The received bytes of an upstream that are not processed yet, split into the responses to one request. Sans-IO.

interim heads -> the head -> its body, or a tunnel
"""

from __future__ import annotations

from typing import Final

from keyproxy.http.headers import Kind
from keyproxy.http_messages import RequestHead, ResponseHead
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.parsing.framing import Body, ChunkedBody, CountedBody, EmptyBody, EndlessBody
from keyproxy.wire.parsing.head_beginnings import HEAD_END, check_response_beginning
from keyproxy.wire.parsing.head_cache import ResponseReader
from keyproxy.wire.parsing.head_parser import SWITCHING_PROTOCOLS, has_no_body, without_length

HEAD_BYTES_MAX: Final = 65_536
_INTERIM_MAX: Final = 16
_FINAL: Final = 200


class ResponseStream:
    """Splits the received bytes of one connection into heads and content; `begin` starts the next exchange.

    `body`: of the final response, once its head was returned. `keeps_alive`: the connection may be used again after it.
    """

    __slots__ = (
        "_buffer",
        "_checked_bytes",
        "_interim",
        "_is_suspect",
        "_is_tunnel_request",
        "_last_head",
        "_method",
        "_reader",
        "body",
        "keeps_alive",
    )

    def __init__(self, reader: ResponseReader) -> None:
        self.body: Body | None = None
        self.keeps_alive = False
        self._reader = reader
        self._buffer = b""
        #: How many bytes of an incomplete head were checked.
        self._checked_bytes = 0
        #: The head that the next one is compared with.
        self._last_head: ResponseHead | None = None
        self._method = b""
        self._is_tunnel_request = False
        self._interim = 0
        self._is_suspect = False

    def begin(self, request: RequestHead) -> None:
        """Expect the response to this request."""
        self._method = request.line.method
        self._is_tunnel_request = request.fields.opens_tunnel
        self.body = None
        self._interim = 0
        self._is_suspect = False

    def end(self) -> bool:
        """End the exchange. Return whether a response was read whole, and the connection may be used again."""
        body, self.body = self.body, None
        return body is not None and body.is_complete and self.keeps_alive and not self._buffer

    def next_head(self, data: bytes) -> ResponseHead | None:
        """Take received bytes and return the next head; None if it is incomplete. It was final if `body` is set.

        Raises a Refusal (UPSTREAM_INVALID).
        """
        buffer = self._buffer + data if self._buffer else data
        last = self._last_head
        head = None if last is None else self._reader.read_alike(buffer, last)
        if head is not None:
            head_bytes = len(head.raw)
        else:
            end = buffer.find(HEAD_END)
            if not 0 <= end <= HEAD_BYTES_MAX:
                self._keep_unfinished(buffer)
                return None
            head = self._reader.read(buffer, end)
            head_bytes = end + len(HEAD_END)
        self._last_head = head
        self._buffer = buffer[head_bytes:]
        self._checked_bytes = 0
        if head.line.ends_with_head and (head.fields.has_content_length or head.fields.is_chunked):
            # A bodiless response may announce content, and a faulty upstream may send it: no other user may get that.
            self._is_suspect = self._is_suspect or head.content_length > 0 or head.fields.is_chunked
            head = without_length(head)
        if head.line.status >= _FINAL:
            self.keeps_alive = head.fields.keeps_alive and not self._is_suspect
            self.body = self._body_of(head)
        elif head.fields.opens_tunnel and self._is_tunnel_request:
            self.keeps_alive = False
            self.body = EndlessBody()
        elif head.line.status == SWITCHING_PROTOCOLS or self._interim >= _INTERIM_MAX:
            raise Refusal(Reason.UPSTREAM_INVALID, "an unrequested upgrade, or too many interim responses")
        else:
            self._interim += 1
        return head

    def _keep_unfinished(self, buffer: bytes) -> None:
        """Keep the bytes of an incomplete head. Raises a Refusal if they can never become one."""
        if len(buffer) > HEAD_BYTES_MAX:
            raise Refusal(Reason.UPSTREAM_INVALID, f"the response head has more than {HEAD_BYTES_MAX} bytes")
        check_response_beginning(buffer, self._checked_bytes)
        self._buffer = buffer
        self._checked_bytes = len(buffer)

    def content(self, body: Body, data: bytes) -> bytes:
        """Take received bytes and return the next content of the response. Raises FramingError."""
        content, self._buffer = body.feed(self._buffer + data if self._buffer else data)
        return content

    def ends_with_connection(self) -> bool:
        """Whether the end of the connection is the end of the response."""
        return self.body is not None and self.body.ends_with_connection()

    def _body_of(self, head: ResponseHead) -> Body:
        if has_no_body(self._method, head.line):
            return EmptyBody()
        if head.fields.is_chunked:
            return ChunkedBody(self._is_forbidden_trailer)
        if head.fields.has_content_length:
            return CountedBody(head.content_length)
        return EndlessBody()

    def _is_forbidden_trailer(self, name: bytes) -> bool:
        return self._reader.kind(name) in (Kind.CONTENT_LENGTH, Kind.TRANSFER_ENCODING)
