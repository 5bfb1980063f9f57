"""One connection from a client: reads requests one at a time, responds to them in order.

    idle -> head -> (exchange) -> idle …  -> tunnel, lingering or closed

The connection manages the client's timeouts; its transport is the socket. The stream finds where messages begin and
end, the gateway decides on requests, the exchange carries them out. During an exchange, bytes of the next request stay
in the stream, and past a bound the socket is not read: at most one request per connection is being decided on at any
time.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Final, cast

from keyproxy.auth import credentials
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.client.exchange_owner import ExchangeOwner
from keyproxy.wire.client.request_stream import RequestStream
from keyproxy.wire.client.transport import ClientTransport
from keyproxy.wire.context import ServerContext
from keyproxy.wire.deadlines import NO_DEADLINE
from keyproxy.wire.exchange import Exchange
from keyproxy.wire.parsing.framing import FramingError
from keyproxy.wire.parsing.head_beginnings import refused_line
from keyproxy.wire.phases import DUE, HALF_CLOSED, LINGERING, LOST, READ, READING, RESTING
from keyproxy.wire.tls import certificate_digest, certificate_subject

#: Bytes of later requests that are buffered during an exchange.
_PIPELINED_BYTES_MAX: Final = 65_536

#: The most requests begun in one go, and the bytes of requests after which no more are begun. A client that has sent
#: thousands, all refused immediately, waits for its next turn like all others.
_REQUESTS_IN_ONE_GO: Final = 4
_BYTES_IN_ONE_GO: Final = 16_384

_log = logging.getLogger(__name__)


class ClientConnection(ExchangeOwner):
    """A client connection: its deadline, and the current exchange."""

    def __init__(self, server: ServerContext) -> None:
        self.server = server
        self.deadline = NO_DEADLINE
        self.transport = ClientTransport(server.listen.body_idle_timeout_seconds)
        self.exchange: Exchange | None = None
        self.stream = RequestStream()
        #: Whether it counts towards the connection bound, and the start of its idle time.
        self.has_place = False
        self.quiet_since = server.clock()
        self._reading: int = RESTING
        self._clock = server.clock

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport.attach(cast("asyncio.Transport", transport))
        peer = transport.get_extra_info("peername")
        tls = transport.get_extra_info("ssl_object")
        self.forwarding = self.server.trust.forwarding(
            peer[0] if isinstance(peer, tuple) else "",
            is_tls=tls is not None,
            subject=certificate_subject(tls) if tls is not None else None,
            certificate_digest=certificate_digest(tls) if tls is not None else b"",
        )
        self._watch()
        if not self.server.admit(self):
            self.refuse_without_exchange(Refusal(Reason.OVERLOADED, "connections_max is reached"))

    def data_received(self, data: bytes) -> None:
        try:
            phase = self.transport.phase
            if phase <= HALF_CLOSED:
                stream = self.stream
                stream.buffer = stream.buffer + data if stream.buffer else data
                self._pump()
            elif phase == LINGERING:
                self.deadline = self.transport.discard(data, self._clock())
        except Exception:  # noqa: BLE001 - the outermost boundary of this side
            self._defect()

    def eof_received(self) -> bool:
        stays_open = self.transport.end_of_input()
        if self.transport.is_open:
            self._pump()
        return stays_open

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport.lose()
        self.stream.forget()
        self.server.forget(self)
        if self.exchange is not None:
            self.exchange.client_gone()

    def pause_writing(self) -> None:
        self.transport.stall(self._clock())
        self._watch()
        if self.exchange is not None:
            self.exchange.pause_response()

    def resume_writing(self) -> None:
        self.transport.outflow.flow()
        self._watch()
        if self.exchange is not None:
            self.exchange.resume_response()
        else:
            self.resume()
            self._pump()

    # -- called by the exchange

    def pause(self) -> None:
        """Stop reading."""
        if self.transport.pause():
            self._watch()

    def resume(self) -> None:
        """Read again."""
        if self.transport.resume():
            self._watch()

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
        transport = self.transport
        if transport.phase == LOST:
            return
        if is_cut:
            self.abort()
        elif closes:
            is_read = exchange is not None and exchange.head is not None and exchange.is_complete
            lingers = not is_read or bool(self.stream.buffer)
            ends_response = exchange is not None and exchange.response.ends_with_close
            self.deadline = transport.finish(self._clock(), lingers=lingers, ends_response=ends_response)
        else:
            if exchange is not None and exchange.identity is not None:
                # Requests without a key do not keep their place against clients with a key.
                self.quiet_since = now
            if not transport.outflow.is_stalled:
                self.deadline = now + self.server.keepalive_seconds
            if transport.is_paused:
                self.resume()
            if self.stream.buffer or transport.phase == HALF_CLOSED:
                self._pump()

    # -- shutting down

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight or has begun to arrive."""
        return self.exchange is None and not self.stream.buffer

    def close_if_idle(self) -> None:
        """Close the connection if it is idle. Used while draining."""
        if self.is_idle:
            self.close()

    def close(self) -> None:
        """Close once everything is sent, within the time that a stalled reader gets."""
        self.deadline = self.transport.close(self._clock())

    def abort(self) -> None:
        """Cut the connection visibly."""
        self.transport.abort()

    def deadline_passed(self, now: float) -> None:
        """The client did not send, or did not read, in time."""
        transport = self.transport
        if transport.has_kept_reading(now):
            self.deadline = now + transport.close_seconds
        elif transport.phase == LINGERING and not transport.has_outstanding:
            self.close()
        elif transport.is_stalled or not transport.is_open:
            self.abort()
        elif self.exchange is not None:
            self.exchange.refuse(Refusal(Reason.REQUEST_TIMEOUT, "the body stopped arriving"))
        elif self.stream.buffer:
            self.refuse_without_exchange(Refusal(Reason.REQUEST_TIMEOUT, "the head did not arrive in time"))
        else:
            self.close()

    # -- reading

    def _pump(self) -> None:
        """Process the buffer as far as possible."""
        if self._reading != RESTING:
            return  # called from a response further up the stack: that loop continues, or the next iteration does
        self._reading = READING
        stream, transport = self.stream, self.transport
        begun, before_bytes = 0, len(stream.buffer)
        try:
            while stream.buffer and transport.phase <= HALF_CLOSED:
                exchange = self.exchange
                if exchange is None:
                    is_much = begun > 0 and before_bytes - len(stream.buffer) > _BYTES_IN_ONE_GO
                    if begun == _REQUESTS_IN_ONE_GO or is_much:
                        self._pump_later()
                        return
                    begun += 1
                    if transport.outflow.is_stalled:
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
            if transport.phase == HALF_CLOSED:
                self._no_more_comes()
        finally:
            if self._reading == READING:
                self._reading = RESTING

    def _pump_later(self) -> None:
        """Continue in the loop's next iteration."""
        self._reading = READ.step(self._reading, DUE)
        self.pause()
        self.server.loop.call_soon(self._pump_on)

    def _pump_on(self) -> None:
        self._reading = READ.step(self._reading, RESTING)
        try:
            self.resume()
            self._pump()
        except Exception:  # noqa: BLE001 - the outermost boundary of this turn
            self._defect()

    def _no_more_comes(self) -> None:
        """The client has closed its sending side. It may still be reading: respond to its complete requests."""
        exchange = self.exchange
        if exchange is None:
            if self.transport.is_stalled:
                return
            if not self.stream.buffer:
                self.close()
            else:
                self.refuse_without_exchange(Refusal(Reason.REQUEST_MALFORMED, "the request ended within its head"))
        elif exchange.is_tunnel:
            exchange.close_tunnel()
        elif not exchange.is_complete:
            exchange.refuse(Refusal(Reason.REQUEST_MALFORMED, "the request ended within its body"))
        else:
            # Or it has closed both directions, which only a write can reveal.
            exchange.response.probe_client()

    def _read_head(self) -> bool:
        """Begin the next exchange. False if its head is incomplete."""
        stream, server = self.stream, self.server
        is_new = not stream.checked_bytes
        try:
            begun = stream.begin(server.requests, server.header_bytes_max)
        except FramingError as error:
            self.refuse_without_exchange(Refusal(Reason.REQUEST_MALFORMED, str(error)))
            return True
        except Refusal as refusal:
            self.refuse_without_exchange(refusal)
            return True
        now = server.clock()
        if begun is None:
            if is_new and stream.checked_bytes:
                self.quiet_since = now
                self.deadline = now + server.listen.header_timeout_seconds
            return False
        head, content = begun
        is_complete = stream.body.is_complete
        exchange = self.exchange = Exchange(self, server, head, now, content=content, is_complete=is_complete)
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
        limit = self.server.body_bytes_max
        body_bytes = exchange.bytes_in + more_bytes + self.stream.body.remaining_bytes
        if not limit or body_bytes <= limit or exchange.is_tunnel:
            return False
        exchange.refuse(Refusal(Reason.BODY_TOO_LARGE))
        return True

    # -- ending

    def refuse_without_exchange(self, refusal: Refusal) -> None:
        """Refuse bytes that never became a request. The refusal is recorded like any other."""
        server = self.server
        exchange = self.exchange = Exchange(self, server, None, server.clock())
        holds_key = functools.partial(credentials.holds_key, key_format=server.key_format)
        exchange.refused_line = refused_line(
            self.stream.buffer, holds_key, accepts_encoded_slash=server.routes.forwards_encoded_slash
        )
        exchange.refuse(refusal)

    def _defect(self) -> None:
        """Handle an internal error: log it, and respond to the client if that is still possible."""
        exchange = self.exchange
        request_id = exchange.request_id.decode("ascii") if exchange is not None else "-"
        _log.exception("handling a request failed", extra={"request_id": request_id})
        if exchange is not None:
            exchange.refuse(Refusal(Reason.INTERNAL_ERROR))
        if self.transport.is_open:
            self.close()

    def _watch(self) -> None:
        """Set the deadline for what the client has to do next."""
        listen, now = self.server.listen, self._clock()
        if not self.transport.is_open:
            return
        exchange = self.exchange
        if self.transport.is_stalled:
            self.deadline = now + listen.body_idle_timeout_seconds
        elif exchange is not None:
            self.quiet_since = now
            waits = self.waits_for_client(exchange)
            self.deadline = now + listen.body_idle_timeout_seconds if waits else NO_DEADLINE
        elif not self.stream.buffer:
            self.deadline = now + listen.keepalive_timeout_seconds

    def waits_for_client(self, exchange: Exchange) -> bool:
        """Whether the next step is the client's: to send more of the body."""
        return not (exchange.is_complete or exchange.is_tunnel or self.transport.is_paused)

    def __repr__(self) -> str:
        return f"<ClientConnection {READ.names[self._reading]} {self.transport} {self.exchange or 'idle'}>"
