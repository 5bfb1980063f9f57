"""One connection from a client: reads requests one at a time, answers them in order.

    idle -> head -> (exchange) -> idle …  -> lingering or closed

The connection knows where a message begins and ends, and what a client may take its time for. What a request is worth is
the gateway's to say, what happens to it the exchange's. While an exchange is under way, bytes of the next request stay in
the buffer, and past a bound the socket is read no further: at most one request per connection is ever decided upon.

All bytes that have arrived are judged before any of them is acted upon. So a request whose body turns out malformed, or
that is followed by something that begins no request, has not been forwarded when that is found out.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from typing import TYPE_CHECKING, Final, cast

from keyproxy.headers import NOT_IN_TRAILERS
from keyproxy.model import RequestHead
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.deadlines import NO_DEADLINE
from keyproxy.wire.exchange import Exchange
from keyproxy.wire.framing import Body, ChunkedBody, CountedBody, FramingError, NoBody
from keyproxy.wire.heads import HEAD_END, check_beginning

if TYPE_CHECKING:
    from keyproxy.wire.server import ProxyServer

#: Bytes of later requests that are held while an answer is under way.
_PIPELINED_BYTES_MAX: Final = 65_536

_SURPLUS_CHECKED_BYTES: Final = 2_048

#: After a refusal the rest of a request is read and thrown away, within these bounds, so that the client gets to read
#: the answer: closing at once would make the kernel reset the connection. RFC 9112 section 9.6.
_LINGER_BYTES_MAX: Final = 1_048_576
_LINGER_SECONDS: Final = 2.0

_log = logging.getLogger(__name__)


class _State(enum.Enum):
    OPEN = enum.auto()
    LINGERING = enum.auto()
    CLOSING = enum.auto()


class ClientConnection(asyncio.Protocol):
    """See the module."""

    def __init__(self, server: ProxyServer) -> None:
        self.server = server
        self.deadline = NO_DEADLINE
        self._transport: asyncio.Transport | None = None
        self._state = _State.OPEN
        self._buffer = b""
        self._exchange: Exchange | None = None
        self._body: Body = NoBody()
        self._is_pumping = False
        self._is_paused = False
        self._has_checked_beginning = False
        self._has_ended = False
        self._lingered_bytes = 0
        self._stalled_bytes: int | None = None

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        address = peer[0] if isinstance(peer, tuple) else ""
        self.forwarding = self.server.trust.forwarding(address, is_tls=False)
        self._watch()
        if not self.server.admit(self):
            self._refuse_without_exchange(Refusal(Reason.OVERLOADED, "connections_max is reached"))

    def data_received(self, data: bytes) -> None:
        try:
            if self._state is _State.OPEN:
                self._buffer = self._buffer + data if self._buffer else data
                self._pump()
            elif self._state is _State.LINGERING:
                self._lingered_bytes += len(data)
                if self._lingered_bytes > _LINGER_BYTES_MAX:
                    self._close()
        except Exception:  # noqa: BLE001 - the outermost boundary of this side
            self._defect()

    def eof_received(self) -> bool:
        self._has_ended = True
        if self._state is not _State.OPEN:
            return False
        exchange = self._exchange
        if exchange is None:
            if not self._buffer:
                return False
            self._refuse_without_exchange(Refusal(Reason.REQUEST_MALFORMED, "the request ended within its head"))
        elif not exchange.is_complete:
            exchange.refuse(Refusal(Reason.REQUEST_MALFORMED, "the request ended within its body"))
        # The client has said all it will, and may still listen: what it has asked for is answered.
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._state = _State.CLOSING
        self._buffer = b""
        self.server.forget(self)
        if self._exchange is not None:
            self._exchange.client_gone()

    def pause_writing(self) -> None:
        self._stalled_bytes = self._unsent()
        self._watch()
        if self._exchange is not None:
            self._exchange.pause_answer()

    def resume_writing(self) -> None:
        self._stalled_bytes = None
        self._watch()
        if self._exchange is not None:
            self._exchange.resume_answer()

    # -- what the exchange asks for

    def send(self, data: bytes) -> None:
        """Write to the client."""
        if self._transport is not None:
            self._transport.write(data)

    def pause(self) -> None:
        """Read no further for now."""
        if self._transport is not None and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
            self._watch()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and self._is_paused and self._state is not _State.CLOSING:
            self._is_paused = False
            self._transport.resume_reading()
            self._watch()

    def exchange_over(self, now: float, *, closes: bool, is_cut: bool) -> None:
        """The answer has been written, or given up. Go on with the next request, or close."""
        exchange, self._exchange = self._exchange, None
        if self._transport is None:
            return
        if is_cut:
            self._abort()
        elif closes or self._has_ended:
            has_unread = exchange is None or exchange.head is None or not exchange.is_complete or bool(self._buffer)
            self._finish(lingers=has_unread)
        else:
            self._has_checked_beginning = False
            if self._is_paused:
                self.resume()
            if self._buffer:
                self._pump()
            elif self._stalled_bytes is None:
                self.deadline = now + self.server.listen.keepalive_timeout_seconds

    # -- shutting down

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way or has begun to arrive."""
        return self._exchange is None and not self._buffer

    def close_if_idle(self) -> None:
        """Used while draining."""
        if self.is_idle:
            self._close()

    def abort(self) -> None:
        """Used when draining has taken too long."""
        self._abort()

    def deadline_passed(self, now: float) -> None:
        """The client did not send, or did not read, in time."""
        if self._stalled_bytes is not None and self._state is not _State.LINGERING:
            unsent = self._unsent()
            if unsent < self._stalled_bytes:
                self._stalled_bytes = unsent
                self.deadline = now + self.server.listen.body_idle_timeout_seconds
            else:
                self._abort()
        elif self._state is not _State.OPEN:
            self._abort()
        elif self._exchange is not None:
            self._exchange.refuse(Refusal(Reason.REQUEST_TIMEOUT, "the body stopped arriving"))
        elif self._buffer:
            self._refuse_without_exchange(Refusal(Reason.REQUEST_TIMEOUT, "the head did not arrive in time"))
        else:
            self._close()

    # -- reading

    def _pump(self) -> None:
        """Go on with what is in the buffer, as far as it goes."""
        if self._is_pumping:
            return  # a request was answered at once, further up: that loop goes on
        self._is_pumping = True
        try:
            while self._buffer and self._state is _State.OPEN:
                exchange = self._exchange
                if exchange is None:
                    if not self._read_head():
                        break
                elif exchange.is_complete:
                    if len(self._buffer) > _PIPELINED_BYTES_MAX:
                        self.pause()
                    break
                else:
                    self._read_body(exchange)
        finally:
            self._is_pumping = False

    def _read_head(self) -> bool:
        """Begin the next exchange. False if its head has not arrived whole."""
        buffer = self._buffer
        if buffer.startswith(b"\r\n"):
            # One empty line before a request is forgiven, RFC 9112 section 2.2; a second one is not.
            buffer = buffer[2:]
        bytes_max = self.server.listen.header_bytes_max
        end = buffer.find(HEAD_END)
        try:
            if end < 0 or end > bytes_max:
                if len(buffer) > bytes_max:
                    raise Refusal(Reason.HEADERS_TOO_LARGE)
                if buffer and not self._has_checked_beginning:
                    self._has_checked_beginning = True
                    check_beginning(buffer)
                    self._watch(starts_head=True)
                return False
            self._begin(self.server.requests.read(buffer, end), buffer[end + 4 :])
        except FramingError as error:
            self._refuse_without_exchange(Refusal(Reason.REQUEST_MALFORMED, str(error)))
        except Refusal as refusal:
            self._refuse_without_exchange(refusal)
        return True

    def _begin(self, head: RequestHead, rest: bytes) -> None:
        server = self.server
        now = server.clock()
        content, is_complete = b"", True
        if head.has_body:
            body = self._body = self._body_of(head)
            content, rest = body.feed(rest)
            is_complete = body.is_complete
        if rest:
            _check_surplus(head, rest)
        self._buffer = rest
        request_id = server.gate.request_id(head)
        exchange = self._exchange = Exchange(self, head, request_id, now, content=content, is_complete=is_complete)
        limit = server.listen.body_bytes_max
        if limit and (head.content_length > limit or len(content) > limit):
            exchange.refuse(Refusal(Reason.BODY_TOO_LARGE))
            return
        self.deadline = NO_DEADLINE if is_complete else now + server.listen.body_idle_timeout_seconds
        server.gate.begin(exchange)

    def _read_body(self, exchange: Exchange) -> None:
        data, self._buffer = self._buffer, b""
        try:
            content, rest = self._body.feed(data)
        except FramingError as error:
            exchange.refuse(Refusal(Reason.REQUEST_MALFORMED, str(error)))
            return
        self._buffer = rest
        if content or self._body.is_complete:
            exchange.body_arrived(content, is_complete=self._body.is_complete)
        if self._exchange is exchange:
            self._watch()

    def _body_of(self, head: RequestHead) -> Body:
        if head.fields.is_chunked:
            return ChunkedBody(self._is_forbidden_trailer)
        return CountedBody(head.content_length)

    def _is_forbidden_trailer(self, name: bytes) -> bool:
        return self.server.names.kind(name) in NOT_IN_TRAILERS

    # -- ending

    def _refuse_without_exchange(self, refusal: Refusal) -> None:
        """Refuse what never became a request. It is recorded like any other."""
        server = self.server
        exchange = self._exchange = Exchange(self, None, server.gate.request_id(None), server.clock())
        exchange.refuse(refusal)

    def _defect(self) -> None:
        """A defect of ours: say so to the client if it can still be told, and to the log."""
        exchange = self._exchange
        request_id = exchange.request_id.decode("ascii") if exchange is not None else "-"
        _log.exception("handling a request failed", extra={"request_id": request_id})
        if exchange is not None:
            exchange.refuse(Refusal(Reason.INTERNAL_ERROR))
        self._abort_after_flush()

    def _finish(self, *, lingers: bool) -> None:
        transport = self._transport
        if transport is None:
            return
        if not lingers or self._has_ended or not transport.can_write_eof():
            self._close()
            return
        self._state = _State.LINGERING
        self._buffer = b""
        self.resume()
        transport.write_eof()
        self.deadline = self.server.clock() + _LINGER_SECONDS

    def _close(self) -> None:
        """Close once everything is sent, within the time a stalled reader gets."""
        self._state = _State.CLOSING
        self._buffer = b""
        if self._transport is not None:
            self._transport.close()
            self.deadline = self.server.clock() + self.server.listen.body_idle_timeout_seconds

    def _abort_after_flush(self) -> None:
        if self._state is _State.OPEN:
            self._close()

    def _abort(self) -> None:
        """Cut the connection so that the peer can tell: a reset, never a clean end after half an answer."""
        self._state = _State.CLOSING
        self._buffer = b""
        if self._transport is not None:
            self.server.reset_on_close(self._transport)
            self._transport.abort()

    def _unsent(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def _watch(self, *, starts_head: bool = False) -> None:
        """Set the deadline for what the client has to do next."""
        listen, now = self.server.listen, self.server.clock()
        if self._state is not _State.OPEN:
            return
        if self._stalled_bytes is not None:
            self.deadline = now + listen.body_idle_timeout_seconds
        elif self._exchange is not None:
            waits_for_client = not self._exchange.is_complete and not self._is_paused
            self.deadline = now + listen.body_idle_timeout_seconds if waits_for_client else NO_DEADLINE
        elif starts_head:
            self.deadline = now + listen.header_timeout_seconds
        elif not self._buffer:
            self.deadline = now + listen.keepalive_timeout_seconds

    def __repr__(self) -> str:
        return f"<ClientConnection {self._state.name.lower()} {self._exchange or 'idle'}>"


def _check_surplus(head: RequestHead, rest: bytes) -> None:
    """Bytes after a request must be able to begin another one; else the two ends disagree where this one ends."""
    if not head.fields.keeps_alive:
        raise Refusal(Reason.REQUEST_MALFORMED, "bytes after a request that closes the connection")
    # The beginning of it: a client that sends thousands of requests at once must not make us parse all for each.
    check_beginning(rest[:_SURPLUS_CHECKED_BYTES].removeprefix(b"\r\n"))
