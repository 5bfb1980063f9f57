"""One connection from a client: reads requests one at a time, responds to them in order.

    idle -> head -> (exchange) -> idle …  -> tunnel, lingering or closed

The connection manages the client's timeouts. The stream finds where messages begin and end, the gateway decides on
requests, the exchange carries them out. During an exchange, bytes of the next request stay in the stream, and past a
bound the socket is not read: at most one request per connection is being decided on at any time.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, cast

from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.client.request_stream import RequestStream
from keyproxy.wire.client.transport import OPEN, ClientTransport, State
from keyproxy.wire.context import ServerContext
from keyproxy.wire.deadlines import NO_DEADLINE
from keyproxy.wire.exchange import Exchange
from keyproxy.wire.idle_eviction import SPARED_SECONDS, SPARED_UNFINISHED_SECONDS
from keyproxy.wire.parsing.framing import FramingError
from keyproxy.wire.parsing.head_beginnings import refused_line
from keyproxy.wire.tls import certificate_subject

#: Bytes of later requests that are buffered during an exchange.
_PIPELINED_BYTES_MAX: Final = 65_536

#: The most requests begun in one go, and the bytes of requests after which no more are begun. A client that has sent
#: thousands, all refused immediately, waits for its next turn like all others.
_REQUESTS_IN_ONE_GO: Final = 4
_BYTES_IN_ONE_GO: Final = 16_384

_log = logging.getLogger(__name__)


class ClientConnection(ClientTransport):
    """A client connection: its state, its deadlines, and the current exchange."""

    def __init__(self, server: ServerContext) -> None:
        super().__init__(server.clock, server.listen.body_idle_timeout_seconds)
        self.server = server
        self.exchange: Exchange | None = None
        self.stream = RequestStream()
        #: Whether it counts towards the connection bound, and the start of its idle time.
        self.has_place = False
        self.quiet_since = server.clock()
        self._is_pumping = False
        #: Whether the loop's next iteration continues with the buffer. Until then nothing more is read.
        self._will_pump = False

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
                stream = self.stream
                stream.buffer = stream.buffer + data if stream.buffer else data
                self._pump()
            elif self._state is State.LINGERING:
                self._throw_away(data)
        except Exception:  # noqa: BLE001 - the outermost boundary of this side
            self._defect()

    def eof_received(self) -> bool:
        self._has_ended = True
        if self._state is OPEN:
            self._pump()
        # TLS has no half-closed connections: its transport closes regardless of this return value.
        return self._transport is not None and self._transport.can_write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._state = State.CLOSING
        self.stream.forget()
        self.server.forget(self)
        if self.exchange is not None:
            self.exchange.client_gone()

    def pause_writing(self) -> None:
        self._outflow.stall(self._transport, self._clock())
        self._watch()
        if self.exchange is not None:
            self.exchange.pause_response()

    def resume_writing(self) -> None:
        self._outflow.flow()
        self._watch()
        if self.exchange is not None:
            self.exchange.resume_response()
        else:
            self.resume()
            self._pump()

    # -- called by the exchange

    def enter_tunnel(self) -> None:
        """From now on bytes are relayed unchanged, until either side ends the connection."""
        self.stream.enter_tunnel()
        self.deadline = NO_DEADLINE
        self.resume()
        if self.stream.buffer:
            self._pump()

    def exchange_over(self, now: float, *, closes: bool, is_cut: bool) -> None:
        """The response was written or abandoned. Continue with the next request, or close."""
        exchange, self.exchange = self.exchange, None
        if self._transport is None:
            return
        if is_cut:
            self.abort()
        elif closes:
            is_read = exchange is not None and exchange.head is not None and exchange.is_complete
            ends_answer = exchange is not None and exchange.ends_with_close
            self._finish(lingers=not is_read or bool(self.stream.buffer), ends_answer=ends_answer)
        else:
            if exchange is not None and exchange.identity is not None:
                # Requests without a key do not keep their place against clients with a key.
                self.quiet_since = now
            if not self._outflow.is_stalled:
                self.deadline = now + self.server.listen.keepalive_timeout_seconds
            if self._is_paused:
                self.resume()
            if self.stream.buffer or self._has_ended:
                self._pump()

    # -- shutting down

    @property
    def is_stalled(self) -> bool:
        """Whether the client does not read what was sent to it."""
        return self._outflow.is_stalled

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight or has begun to arrive."""
        return self.exchange is None and not self.stream.buffer

    def close_if_idle(self) -> None:
        """Close the connection if it is idle. Used while draining."""
        if self.is_idle:
            self.close()

    # -- the bound on connections

    def spared_until(self, now: float) -> float:
        """Return until when the connection is spared at the bound; NO_DEADLINE: until its request is over."""
        exchange = self.exchange
        if self._state is not OPEN:
            return 0.0  # it is already closing
        if self._outflow.is_stalled:
            is_slow = exchange is None and self.reads_slowly(now, for_seconds=SPARED_UNFINISHED_SECONDS)
            return 0.0 if is_slow else NO_DEADLINE
        if exchange is None:
            return self.quiet_since + (SPARED_UNFINISHED_SECONDS if self.stream.buffer else SPARED_SECONDS)
        is_unfinished = not (exchange.is_complete or exchange.is_tunnel or self._is_paused or exchange.has_upstream)
        return self.quiet_since + SPARED_UNFINISHED_SECONDS if is_unfinished else NO_DEADLINE

    def give_up_place(self) -> None:
        """Close immediately, for another client."""
        if self._state is OPEN and self.exchange is not None:
            self.exchange.refuse(Refusal(Reason.REQUEST_TIMEOUT, "the body did not arrive while others connected"))
        elif self._state is OPEN and self.stream.buffer and not self._outflow.is_stalled:
            refusal = Refusal(Reason.REQUEST_TIMEOUT, "the head did not arrive while others connected")
            self._refuse_without_exchange(refusal)
        elif self._state is not OPEN or self._outflow.is_stalled:
            self.abort()
        if self._state is not State.CLOSING:
            self.close()

    def check_liveness(self, *, long_since: float) -> None:
        """Review a long exchange: whether its key is still valid, and whether the client is still connected.

        `long_since`: an exchange that began before this instant is long. An idle connection forgets its last key.
        """
        exchange = self.exchange
        if exchange is None:
            self.stream.last_head = None
            return
        if exchange.started_mono > long_since:
            return
        if self._outflow.is_stalled:
            self._outflow.sample(self._transport, self._clock())
        if self._has_ended and self.is_gone():
            self.abort()
        elif exchange.permit is not None:
            self.server.gate.review(exchange)
        else:
            exchange.check_pace()

    def deadline_passed(self, now: float) -> None:
        """The client did not send, or did not read, in time."""
        if self._goes_on_reading(now):
            return
        if self._state is State.LINGERING and not self._outflow.is_outstanding(self._transport):
            self.close()
        elif self._outflow.is_stalled or self._state is not OPEN:
            self.abort()
        elif self.exchange is not None:
            self.exchange.refuse(Refusal(Reason.REQUEST_TIMEOUT, "the body stopped arriving"))
        elif self.stream.buffer:
            self._refuse_without_exchange(Refusal(Reason.REQUEST_TIMEOUT, "the head did not arrive in time"))
        else:
            self.close()

    # -- reading

    def _pump(self) -> None:
        """Process the buffer as far as possible."""
        if self._is_pumping or self._will_pump:
            return  # called from a response further up the stack: that loop continues, or the next iteration does
        self._is_pumping = True
        stream = self.stream
        begun, before_bytes = 0, len(stream.buffer)
        try:
            while stream.buffer and self._state is OPEN:
                exchange = self.exchange
                if exchange is None:
                    is_much = begun > 0 and before_bytes - len(stream.buffer) > _BYTES_IN_ONE_GO
                    if begun == _REQUESTS_IN_ONE_GO or is_much:
                        self._pump_later()
                        return
                    begun += 1
                    if self._outflow.is_stalled:
                        # The client does not read the responses it has requested: more must not accumulate here.
                        self.pause()
                        break
                    if not self._read_head():
                        break
                elif exchange.is_complete:
                    if len(stream.buffer) > _PIPELINED_BYTES_MAX:
                        self.pause()
                    break
                else:
                    self._read_body(exchange)
            if self._has_ended and self._state is OPEN:
                self._no_more_comes()
        finally:
            self._is_pumping = False

    def _pump_later(self) -> None:
        """Continue in the loop's next iteration."""
        self._will_pump = True
        self.pause()
        self.server.loop.call_soon(self._pump_on)

    def _pump_on(self) -> None:
        self._will_pump = False
        try:
            self.resume()
            self._pump()
        except Exception:  # noqa: BLE001 - the outermost boundary of this turn
            self._defect()

    def _no_more_comes(self) -> None:
        """The client has closed its sending side. It may still be reading: respond to its complete requests."""
        exchange = self.exchange
        if exchange is None:
            if self._outflow.is_stalled:
                return
            if not self.stream.buffer:
                self.close()
            else:
                self._refuse_without_exchange(Refusal(Reason.REQUEST_MALFORMED, "the request ended within its head"))
        elif exchange.is_tunnel:
            exchange.close_tunnel()
        elif not exchange.is_complete:
            exchange.refuse(Refusal(Reason.REQUEST_MALFORMED, "the request ended within its body"))
        else:
            # Or it has closed both directions, which only a write can reveal.
            exchange.begin_status_line()

    def _read_head(self) -> bool:
        """Begin the next exchange. False if its head is incomplete."""
        stream, server = self.stream, self.server
        is_new = not stream.checked_bytes
        try:
            begun = stream.begin(server.requests, server.listen.header_bytes_max)
        except FramingError as error:
            self._refuse_without_exchange(Refusal(Reason.REQUEST_MALFORMED, str(error)))
            return True
        except Refusal as refusal:
            self._refuse_without_exchange(refusal)
            return True
        now = server.clock()
        if begun is None:
            if is_new and stream.checked_bytes:
                self.quiet_since = now
                self.deadline = now + server.listen.header_timeout_seconds
            return False
        head, content = begun
        is_complete = stream.body.is_complete
        request_id = server.gate.request_id(head)
        exchange = self.exchange = Exchange(
            self, server, head, request_id, now, content=content, is_complete=is_complete
        )
        if not (head.has_body and self._is_too_large(exchange)):
            if is_complete:
                self.deadline = NO_DEADLINE
            else:
                self.quiet_since = now
                self.deadline = now + server.listen.body_idle_timeout_seconds
            server.gate.begin(exchange)
        return True

    def _read_body(self, exchange: Exchange) -> None:
        stream = self.stream
        try:
            content = stream.more()
        except FramingError as error:
            exchange.refuse(Refusal(Reason.REQUEST_MALFORMED, str(error)))
            return
        if self._is_too_large(exchange, len(content)):
            return
        is_complete = stream.body.is_complete
        if content or is_complete:
            exchange.body_arrived(content, is_complete=is_complete)
        if self.exchange is exchange:
            self._watch()

    def _is_too_large(self, exchange: Exchange, more_bytes: int = 0) -> bool:
        """Refuse a body that exceeds the limit, or announces a length that does."""
        limit = self.server.listen.body_bytes_max
        body_bytes = exchange.bytes_in + more_bytes + self.stream.body.remaining_bytes
        if not limit or body_bytes <= limit or exchange.is_tunnel:
            return False
        exchange.refuse(Refusal(Reason.BODY_TOO_LARGE))
        return True

    # -- ending

    def _refuse_without_exchange(self, refusal: Refusal) -> None:
        """Refuse bytes that never became a request. The refusal is recorded like any other."""
        server = self.server
        exchange = self.exchange = Exchange(self, server, None, server.gate.request_id(None), server.clock())
        exchange.refused_line = refused_line(self.stream.buffer, server.gate.holds_key)
        exchange.refuse(refusal)

    def _defect(self) -> None:
        """Handle an internal error: log it, and respond to the client if that is still possible."""
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
        if self._outflow.is_stalled:
            self.deadline = now + listen.body_idle_timeout_seconds
        elif exchange is not None:
            self.quiet_since = now
            waits_for_client = not (exchange.is_complete or exchange.is_tunnel or self._is_paused)
            self.deadline = now + listen.body_idle_timeout_seconds if waits_for_client else NO_DEADLINE
        elif not self.stream.buffer:
            self.deadline = now + listen.keepalive_timeout_seconds

    def __repr__(self) -> str:
        return f"<ClientConnection {self._state.name.lower()} {self.exchange or 'idle'}>"
