"""One connection from a client: reads requests one at a time, answers them in order.

    idle -> head -> (exchange) -> idle …  -> tunnel, lingering or closed

The connection knows where a message begins and ends, and what a client may take its time for. What a request is worth is
the gateway's to say, what happens to it the exchange's. While an exchange is under way, bytes of the next request stay in
the buffer, and past a bound the socket is read no further: at most one request per connection is ever decided upon.

All bytes that have arrived are judged before any of them is acted upon. So a request whose body turns out malformed, or
that is followed by something that begins no request, has not been forwarded when that is found out.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, cast

from keyproxy.headers import NOT_IN_TRAILERS
from keyproxy.model import RequestHead
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.deadlines import NO_DEADLINE
from keyproxy.wire.exchange import Exchange
from keyproxy.wire.framing import Body, ChunkedBody, CountedBody, EndlessBody, FramingError, NoBody
from keyproxy.wire.heads import HEAD_END, check_beginning
from keyproxy.wire.line import OPEN, ClientLine, State
from keyproxy.wire.tls import certificate_subject

if TYPE_CHECKING:
    from keyproxy.wire.server import ProxyServer

#: Bytes of later requests that are held while an answer is under way.
_PIPELINED_BYTES_MAX: Final = 65_536

_SURPLUS_CHECKED_BYTES: Final = 2_048

_log = logging.getLogger(__name__)


class ClientConnection(ClientLine):
    """See the module."""

    def __init__(self, server: ProxyServer) -> None:
        super().__init__(server.clock, server.listen.body_idle_timeout_seconds)
        self.server = server
        self.exchange: Exchange | None = None
        self._buffer = b""
        self._body: Body = NoBody()
        self._is_pumping = False
        self._checked_bytes = 0
        self._has_skipped_line = False
        self._stalled_bytes: int | None = None
        #: What the next head is compared with. It holds a key: when nothing is under way it is soon forgotten.
        self.last_head: RequestHead | None = None

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        tls = transport.get_extra_info("ssl_object")
        self.forwarding = self.server.trust.forwarding(
            peer[0] if isinstance(peer, tuple) else "",
            is_tls=tls is not None,
            subject=certificate_subject(tls) if tls is not None else None,
        )
        self._watch()
        if not self.server.admit(self):
            self._refuse_without_exchange(Refusal(Reason.OVERLOADED, "connections_max is reached"))

    def data_received(self, data: bytes) -> None:
        try:
            if self._state is OPEN:
                self._buffer = self._buffer + data if self._buffer else data
                self._pump()
            elif self._state is State.LINGERING:
                self._throw_away(data)
        except Exception:  # noqa: BLE001 - the outermost boundary of this side
            self._defect()

    def eof_received(self) -> bool:
        self._has_ended = True
        if self._state is OPEN:
            self._pump()
        # TLS has no half-closed connections: its transport closes whatever is answered here.
        return self._transport is not None and self._transport.can_write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._state = State.CLOSING
        self._buffer = b""
        self.last_head = None
        self.server.forget(self)
        if self.exchange is not None:
            self.exchange.client_gone()

    def pause_writing(self) -> None:
        self._stalled_bytes = self._unsent()
        self._watch()
        if self.exchange is not None:
            self.exchange.pause_answer()

    def resume_writing(self) -> None:
        self._stalled_bytes = None
        self._watch()
        if self.exchange is not None:
            self.exchange.resume_answer()
        else:
            self.resume()
            self._pump()

    # -- what the exchange asks for

    def enter_tunnel(self) -> None:
        """From now on bytes travel as they are, until either side ends the connection."""
        self._body = EndlessBody()
        self.deadline = NO_DEADLINE
        self.resume()
        if self._buffer:
            self._pump()

    def exchange_over(self, now: float, *, closes: bool, is_cut: bool) -> None:
        """The answer has been written, or given up. Go on with the next request, or close."""
        exchange, self.exchange = self.exchange, None
        if self._transport is None:
            return
        if is_cut:
            self.abort()
        elif closes:
            has_unread = exchange is None or exchange.head is None or not exchange.is_complete or bool(self._buffer)
            self._finish(lingers=has_unread)
        else:
            self._checked_bytes = 0
            self._has_skipped_line = False
            if self._stalled_bytes is None:
                self.deadline = now + self.server.listen.keepalive_timeout_seconds
            if self._is_paused:
                self.resume()
            if self._buffer or self._has_ended:
                self._pump()

    # -- shutting down

    @property
    def is_stalled(self) -> bool:
        """Whether the client does not read what was sent to it."""
        return self._stalled_bytes is not None

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way or has begun to arrive."""
        return self.exchange is None and not self._buffer

    def close_if_idle(self) -> None:
        """Used while draining."""
        if self.is_idle:
            self.close()

    def look_after(self, *, long_since: float) -> None:
        """What takes long is looked at again now and then: by whom it was asked for, and whether anybody still waits.

        `long_since`: what began before this instant takes long. Where nothing is under way the last key is forgotten.
        """
        exchange = self.exchange
        if exchange is None:
            self.last_head = None
            return
        if exchange.started_mono > long_since:
            return
        if self._has_ended and self.is_gone():
            self.abort()
        elif exchange.permit is not None:
            self.server.gate.review(exchange)

    def deadline_passed(self, now: float) -> None:
        """The client did not send, or did not read, in time."""
        if self._stalled_bytes is not None and self._state is not State.LINGERING:
            unsent = self._unsent()
            if unsent < self._stalled_bytes:
                self._stalled_bytes = unsent
                self.deadline = now + self.server.listen.body_idle_timeout_seconds
            else:
                self.abort()
        elif self._state is not OPEN:
            self.abort()
        elif self.exchange is not None:
            self.exchange.refuse(Refusal(Reason.REQUEST_TIMEOUT, "the body stopped arriving"))
        elif self._buffer:
            self._refuse_without_exchange(Refusal(Reason.REQUEST_TIMEOUT, "the head did not arrive in time"))
        else:
            self.close()

    # -- reading

    def _pump(self) -> None:
        """Go on with what is in the buffer, as far as it goes."""
        if self._is_pumping:
            return  # a request was answered at once, further up: that loop goes on
        self._is_pumping = True
        try:
            while self._buffer and self._state is OPEN:
                exchange = self.exchange
                if exchange is None:
                    if self._stalled_bytes is not None:
                        # The client does not read what it has asked for already: its answers must not pile up here.
                        self.pause()
                        break
                    if not self._read_head():
                        break
                elif exchange.is_complete:
                    if len(self._buffer) > _PIPELINED_BYTES_MAX:
                        self.pause()
                    break
                else:
                    self._read_body(exchange)
            if self._has_ended and self._state is OPEN:
                self._no_more_comes()
        finally:
            self._is_pumping = False

    def _no_more_comes(self) -> None:
        """The client has closed its side. It may still listen: what it has asked for whole is answered."""
        exchange = self.exchange
        if exchange is None:
            if self._stalled_bytes is not None:
                return
            if not self._buffer:
                self.close()
            else:
                self._refuse_without_exchange(Refusal(Reason.REQUEST_MALFORMED, "the request ended within its head"))
        elif exchange.is_tunnel:
            exchange.close_tunnel()
        elif not exchange.is_complete:
            exchange.refuse(Refusal(Reason.REQUEST_MALFORMED, "the request ended within its body"))
        else:
            # Or it has left, which shows once something is sent to it.
            exchange.begin_status_line()

    def _read_head(self) -> bool:
        """Begin the next exchange. False if its head has not arrived whole."""
        buffer = self._buffer
        if buffer.startswith(b"\r\n") and not self._has_skipped_line:
            # One empty line before a request is forgiven, RFC 9112 section 2.2; a second one is not.
            self._has_skipped_line = True
            buffer = self._buffer = buffer[2:]
        bytes_max = self.server.listen.header_bytes_max
        end = buffer.find(HEAD_END)
        try:
            if end < 0 or end > bytes_max:
                if len(buffer) > bytes_max:
                    raise Refusal(Reason.HEADERS_TOO_LARGE)
                if buffer and not self._checked_bytes:
                    self.deadline = self._clock() + self.server.listen.header_timeout_seconds
                if len(buffer) >= 2 * self._checked_bytes:
                    # Only once it has doubled: single bytes must not make us judge all that has come, for each.
                    self._checked_bytes = len(buffer)
                    check_beginning(buffer)
                return False
            self._begin(self.server.requests.read(buffer, end, self.last_head), buffer[end + 4 :])
        except FramingError as error:
            self._refuse_without_exchange(Refusal(Reason.REQUEST_MALFORMED, str(error)))
        except Refusal as refusal:
            self._refuse_without_exchange(refusal)
        return True

    def _begin(self, head: RequestHead, rest: bytes) -> None:
        server = self.server
        now = server.clock()
        self.last_head = head
        content, is_complete = b"", True
        if head.has_body:
            body = self._body = self._body_of(head)
            content, rest = body.feed(rest)
            is_complete = body.is_complete
        if rest == b"\r\n" and not head.fields.opens_tunnel:
            rest = b""  # some clients have always sent an empty line after a body: it belongs to no request
        elif rest:
            _check_surplus(head, rest)
        self._buffer = rest
        request_id = server.gate.request_id(head)
        exchange = self.exchange = Exchange(self, head, request_id, now, content=content, is_complete=is_complete)
        if head.has_body and self._is_too_large(exchange):
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
        if self._is_too_large(exchange, len(content)):
            return
        if content or self._body.is_complete:
            exchange.body_arrived(content, is_complete=self._body.is_complete)
        if self.exchange is exchange:
            self._watch()

    def _is_too_large(self, exchange: Exchange, more_bytes: int = 0) -> bool:
        """Refuse a body that is, or says that it will be, larger than it may be."""
        limit = self.server.listen.body_bytes_max
        if not limit or exchange.bytes_in + more_bytes + self._body.remaining_bytes <= limit or exchange.is_tunnel:
            return False
        exchange.refuse(Refusal(Reason.BODY_TOO_LARGE))
        return True

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
        exchange = self.exchange = Exchange(self, None, server.gate.request_id(None), server.clock())
        exchange.refuse(refusal)

    def _defect(self) -> None:
        """A defect of ours: say so to the client if it can still be told, and to the log."""
        exchange = self.exchange
        request_id = exchange.request_id.decode("ascii") if exchange is not None else "-"
        _log.exception("handling a request failed", extra={"request_id": request_id})
        if exchange is not None:
            exchange.refuse(Refusal(Reason.INTERNAL_ERROR))
        if self._state is OPEN:
            self.close()

    def _watch(self) -> None:
        listen, now = self.server.listen, self._clock()
        if self._state is not OPEN:
            return
        exchange = self.exchange
        if self._stalled_bytes is not None:
            self.deadline = now + listen.body_idle_timeout_seconds
        elif exchange is not None:
            waits_for_client = not (exchange.is_complete or exchange.is_tunnel or self._is_paused)
            self.deadline = now + listen.body_idle_timeout_seconds if waits_for_client else NO_DEADLINE
        elif not self._buffer:
            self.deadline = now + listen.keepalive_timeout_seconds

    def __repr__(self) -> str:
        return f"<ClientConnection {self._state.name.lower()} {self.exchange or 'idle'}>"


def _check_surplus(head: RequestHead, rest: bytes) -> None:
    """Bytes after a request must be able to begin another one; else the two ends disagree where this one ends."""
    if not head.fields.keeps_alive or head.fields.opens_tunnel:
        raise Refusal(Reason.REQUEST_MALFORMED, "bytes after a request that closes the connection, or changes protocol")
    # The beginning of it: a client that sends thousands of requests at once must not make us parse all for each.
    check_beginning(rest[:_SURPLUS_CHECKED_BYTES].removeprefix(b"\r\n"))
