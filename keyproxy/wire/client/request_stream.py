"""What a client has sent and nobody has acted upon yet: where its requests begin, and where they end. Sans-IO.

    head -> its body -> head …  -> tunnel

All bytes that have arrived are judged before any of them is acted upon. So a request whose body turns out malformed, or
that is followed by something that begins no request, has not been forwarded when that is found out.

What a request is worth, how long its bytes may take, and how many of them are held, is the connection's to say.
"""

from __future__ import annotations

from typing import Final

from keyproxy.http.headers import NOT_IN_TRAILERS
from keyproxy.model import RequestHead
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.parsing.framing import Body, ChunkedBody, CountedBody, EndlessBody, NoBody
from keyproxy.wire.parsing.head_beginnings import HEAD_END, check_beginning
from keyproxy.wire.parsing.head_cache import RequestReader

_SURPLUS_CHECKED_BYTES: Final = 2_048

_NO_BODY: Final = NoBody()


class RequestStream:
    """See the module."""

    __slots__ = ("_has_skipped_line", "body", "buffer", "checked_bytes", "last_head")

    def __init__(self) -> None:
        #: What has arrived and is not read yet.
        self.buffer = b""
        #: The body of the request that was begun last.
        self.body: Body = _NO_BODY
        #: What the next head is compared with. It holds a key: when nothing is under way it is soon forgotten.
        self.last_head: RequestHead | None = None
        #: How much of a head that has not arrived whole was looked at. 0: nothing of one is there.
        self.checked_bytes = 0
        self._has_skipped_line = False

    def begin(self, reader: RequestReader, bytes_max: int) -> tuple[RequestHead, bytes] | None:
        """The next request: its head, and what has arrived of its content. None if its head has not arrived whole.

        Raises FramingError or a Refusal (REQUEST_MALFORMED, HEADERS_TOO_LARGE), also for what follows the request.
        """
        buffer = self.buffer
        if buffer.startswith(b"\r\n") and not self._has_skipped_line:
            # One empty line before a request is forgiven, RFC 9112 section 2.2; a second one is not.
            self._has_skipped_line = True
            buffer = self.buffer = buffer[2:]
        end = buffer.find(HEAD_END)
        if end < 0 or end > bytes_max:
            self._check_unfinished(buffer, reader, bytes_max)
            return None
        head = self.last_head = reader.read(buffer, end, self.last_head)
        content, rest = b"", buffer[end + 4 :]
        if head.has_body:
            body = self.body = _chunked(reader) if head.fields.is_chunked else CountedBody(head.content_length)
            content, rest = body.feed(rest)
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
        """The next content of the request that was begun. Raises FramingError."""
        data, self.buffer = self.buffer, b""
        content, self.buffer = self.body.feed(data)
        return content

    def enter_tunnel(self) -> None:
        """From now on bytes are content as they are, and no request follows."""
        self.body = EndlessBody()

    def forget(self) -> None:
        """Nothing of it will be read any more."""
        self.buffer = b""
        self.last_head = None

    def _check_unfinished(self, buffer: bytes, reader: RequestReader, bytes_max: int) -> None:
        """Raises a Refusal if this will never become a head."""
        if len(buffer) > bytes_max:
            raise Refusal(Reason.HEADERS_TOO_LARGE)
        if len(buffer) >= 2 * self.checked_bytes:
            # Only once it has doubled: single bytes must not make us judge all that has come, for each.
            self.checked_bytes = len(buffer)
            check_beginning(buffer, reader.methods)


def _chunked(reader: RequestReader) -> Body:
    return ChunkedBody(lambda name: reader.kind(name) in NOT_IN_TRAILERS)


def _check_surplus(head: RequestHead, rest: bytes, reader: RequestReader) -> None:
    """Bytes after a request must be able to begin another one; else the two ends disagree where this one ends.

    After `Connection: close` they are no request, whatever they look like: they are not read, and so not forwarded
    (RFC 9112 section 9.6). An HTTP/1.0 client without it may assume that it has sent another request.
    """
    if head.fields.opens_tunnel:
        raise Refusal(Reason.REQUEST_MALFORMED, "bytes after an upgrade request")
    if head.fields.says_close:
        return
    if not head.fields.keeps_alive:
        raise Refusal(Reason.REQUEST_MALFORMED, "bytes after an HTTP/1.0 request that ends the connection")
    # The beginning of it: a client that sends thousands of requests at once must not make us parse all for each.
    beginning = rest[:_SURPLUS_CHECKED_BYTES].removeprefix(b"\r\n")
    check_beginning(beginning, reader.methods, follows=True)
