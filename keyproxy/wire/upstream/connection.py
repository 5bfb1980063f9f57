"""One connection to the upstream: writes a request, reads its response, and is reused only after a clean exchange.

Clean means: the request was written whole, the response was read whole and well-formed, nothing came after it, and both
sides keep the connection alive. Otherwise the connection is closed: an unexpected byte would become the start of
another user's response (CVE-2023-28859 is that mistake in another protocol).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Final, cast

from keyproxy.config.schema import Upstream as UpstreamSettings
from keyproxy.http.headers import Kind
from keyproxy.model import Owner, ResponseHead
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.deadlines import NO_DEADLINE
from keyproxy.wire.parsing.framing import Body, ChunkedBody, CountedBody, EndlessBody, FramingError, NoBody
from keyproxy.wire.parsing.head_beginnings import HEAD_END, check_response_beginning
from keyproxy.wire.parsing.head_cache import ResponseReader
from keyproxy.wire.parsing.head_parser import SWITCHING_PROTOCOLS, has_no_body, without_length
from keyproxy.wire.tls import was_closed
from keyproxy.wire.upstream.request_writer import KEPT_BYTES_MAX, RequestWriter
from keyproxy.wire.upstream.upstream_user import UpstreamUser

HEAD_BYTES_MAX: Final = 65_536
_INTERIM_MAX: Final = 16
_FINAL: Final = 200
_ERROR: Final = 400


_log = logging.getLogger(__name__)


class ConnectionOwner:
    """The interface of the pool that owns a connection."""

    host: bytes
    clock: Callable[[], float]
    settings: UpstreamSettings
    responses: ResponseReader

    def release(self, connection: UpstreamConnection, now: float) -> None:
        """Take back a free connection."""
        raise NotImplementedError

    def forget(self, connection: UpstreamConnection) -> None:
        """Remove a lost connection."""
        raise NotImplementedError


class UpstreamConnection(asyncio.Protocol):
    """An upstream connection. It is in exactly one state: lent to an exchange, idle in the pool, or closed."""

    def __init__(self, pool: ConnectionOwner, loop: asyncio.AbstractEventLoop) -> None:
        self.host = pool.host
        self.deadline = NO_DEADLINE
        self.idle_since = 0.0
        self.is_reused = False
        #: The user of the exchange that it is lent to; None if it is not lent.
        self.owner: Owner | None = None
        self._pool = pool
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._exchange: UpstreamUser | None = None
        self._method = b""
        self._buffer = b""
        self._like: ResponseHead | None = None
        self._body: Body | None = None
        self._keeps_alive = False
        self._is_paused = False
        self._interim = 0
        self._is_suspect = False
        self._is_finishing = False
        self._writer = RequestWriter()
        self._tls: ssl.SSLObject | None = None
        self._clock = pool.clock
        self._first_byte_seconds = pool.settings.first_byte_timeout_seconds
        self._idle_seconds = pool.settings.idle_timeout_seconds

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._tls = transport.get_extra_info("ssl_object")
        self._writer.attach(self._transport, self._tls)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            self.abort()
            return
        try:
            self._read(exchange, self._buffer + data if self._buffer else data, self._clock())
        except Refusal as refusal:
            self._fail(refusal)
        except FramingError as error:
            self._fail(Refusal(Reason.UPSTREAM_INVALID, str(error)))
        except Exception:  # noqa: BLE001 - the outermost boundary of this side
            _log.exception("reading a response failed", extra={"request_id": exchange.request_id.decode("ascii")})
            self._fail(Refusal(Reason.INTERNAL_ERROR))

    def eof_received(self) -> None:
        """The event loop closes the connection once all is written: what the upstream does not read is dropped."""
        exchange, transport = self._exchange, self._transport
        if exchange is None or exchange.is_tunnel or transport is None:
            return
        if self._writer.kept_bytes or transport.get_write_buffer_size():
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and self._exchange is not None:
            for data in self._writer.left_to_read():
                if self._exchange is not None:
                    self.data_received(data)
        self._writer.detach()
        self._transport = None
        self._pool.forget(self)
        exchange = self._exchange
        if exchange is None:
            return
        is_whole = self._body is not None and exc is None and self._body.ends_with_connection()
        if is_whole and (exchange.is_tunnel or was_closed(self._tls)):
            self._keeps_alive = False
            exchange.response_arrived(b"", self._clock(), is_last=True)
        else:
            self._exchange = None
            where = "in the middle of its response" if exchange.has_response else "without a response"
            exchange.upstream_lost(Refusal(Reason.UPSTREAM_UNREACHABLE, f"the upstream closed the connection {where}"))

    def pause_writing(self) -> None:
        now = self._clock()
        self._writer.outflow.stall(self._transport, now)
        if self._exchange is not None:
            self._exchange.pause_request()
            self.deadline = now + self._idle_seconds

    def resume_writing(self) -> None:
        self._writer.outflow.flow()
        if self._exchange is not None:
            now = self._clock()
            self._writer.restart_pace(now)
            self._exchange.resume_request()
            self._watch(now)

    # -- called by the exchange

    def begin(self, exchange: UpstreamUser, data: bytes, method: bytes, now: float, *, is_last: bool) -> None:
        """Lend the connection to this exchange and write the first bytes of its request."""
        self._exchange = exchange
        self._method = method
        self._body = None
        self._interim = 0
        self._is_suspect = False
        # While the request is still being sent, the client connection's timeouts apply.
        self.deadline = now + self._first_byte_seconds if is_last else NO_DEADLINE
        self._writer.begin(data, now, is_last=is_last)

    def send(self, data: bytes, *, is_last: bool) -> None:
        """Write more of the request, or hold it back until the arrived part of a response is read."""
        writer, now = self._writer, self._clock()
        writer.count(data, now, is_last=is_last)
        if not writer.outflow.is_stalled:
            self._watch(now)
        if not data or not self.is_open:
            return
        if writer.kept_bytes or self._must_read_first():
            if writer.keep(data):
                self._loop.call_soon(self._send_kept)
            if writer.kept_bytes > KEPT_BYTES_MAX and self._exchange is not None:
                self._exchange.pause_request()
        else:
            writer.write(data)

    def exchange_over(self, now: float, *, is_clean: bool) -> None:
        """The exchange is over: return the connection to the pool if it can be reused."""
        self._exchange = None
        body, self._body = self._body, None
        is_reusable = self._writer.end() and self._keeps_alive and self.is_open and not self._buffer
        if is_clean and is_reusable and body is not None and body.is_complete:
            self.deadline = NO_DEADLINE
            if self._is_paused:
                self.resume()
            self.is_reused = True
            self._pool.release(self, now)
        else:
            self.abort()

    @property
    def is_full(self) -> bool:
        """Whether the upstream does not read as fast as the request is written."""
        return self._writer.is_full

    def preempt_if_slow(self, now: float, patience_seconds: float) -> None:
        """Others wait for a connection: end this exchange if its client is the only reason for the delay."""
        exchange = self._exchange
        if exchange is None:
            if self._is_finishing and now > self.deadline - self._idle_seconds + patience_seconds:
                self.abort()
            return
        pace = self._writer.body_pace
        if exchange.is_tunnel:
            return
        if exchange.has_response:
            if exchange.is_read_slowly(now, for_seconds=patience_seconds):
                exchange.preempt_if_slow(
                    Refusal(Reason.REQUEST_TIMEOUT, "the response was read too slowly while others waited")
                )
            return
        if pace is None or self._writer.is_whole or self._writer.outflow.is_stalled:
            return
        if pace.seconds(now) > patience_seconds and pace.is_slow(now):
            exchange.preempt_if_slow(Refusal(Reason.REQUEST_TIMEOUT, "the body arrived too slowly while others waited"))

    def end_for_others(self) -> None:
        """Others wait for a connection, and this exchange's user holds more than a share."""
        exchange = self._exchange
        if exchange is not None:
            exchange.preempt_if_slow(
                Refusal(Reason.OVERLOADED, "the user held more than a share of the connections while others waited")
            )

    @property
    def is_for_tunnel(self) -> bool:
        """Whether its exchange is a tunnel, or is a handshake for one."""
        return self._exchange is not None and self._exchange.asks_for_tunnel

    @property
    def is_lent(self) -> bool:
        """Whether it is lent to an exchange that could be ended."""
        return self._exchange is not None and self.is_open

    def loss(self, now: float) -> tuple[int, float]:
        """Return the sort key for preemption: the smaller, the less is lost if the exchange is ended for others.

        First requests that the upstream has not received completely; then tunnels, the one silent longest first; then
        requests that are safe to retry. Last a request that is not idempotent, since its client could not know whether
        it was executed. Among equals, the one that began last loses least.
        """
        exchange = self._exchange
        if exchange is None:
            return 0, 0.0
        if exchange.is_tunnel:
            return 1, self.deadline
        if not exchange.is_complete:
            return 0, -exchange.sent_mono
        if exchange.is_idempotent:
            return 2, -exchange.sent_mono
        return (3 if exchange.has_response else 4), -exchange.sent_mono

    def finish(self, now: float) -> None:
        """The tunnel is over: close once everything is sent, within the idle timeout."""
        self._exchange = None
        self._is_finishing = True
        if self._transport is not None:
            self._transport.close()
            self.deadline = now + self._idle_seconds

    def pause(self) -> None:
        """Pause reading: the client does not keep up. Meanwhile its deadline applies, not the upstream's."""
        if self._transport is not None and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
            self.deadline = NO_DEADLINE

    def resume(self) -> None:
        """Resume reading."""
        if self._transport is not None and self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
            self._watch(self._clock())

    def abort(self) -> None:
        """Close immediately and discard unsent bytes."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_open(self) -> bool:
        """Whether the connection can still be written to, as far as is known."""
        return self._transport is not None and not self._transport.is_closing()

    def _send_kept(self) -> None:
        """Write what was held back; try again later if there is still something to read."""
        if self._exchange is None or not self.is_open:
            # A closing connection is at end of file, so its socket always polls readable: nothing more is written.
            self._writer.drop_kept()
        elif self._must_read_first():
            self._loop.call_soon(self._send_kept)
        else:
            self._writer.write_kept()
            if not self._writer.is_full:
                self._exchange.resume_request()

    def _must_read_first(self) -> bool:
        """Whether something has arrived that may be a response, and is not being read."""
        return self._body is None and not self._is_paused and self._writer.has_arrived()

    def fileno(self) -> int:
        """The socket's file descriptor, -1 if closed."""
        return self._writer.fileno()

    def deadline_passed(self, now: float) -> None:
        """The first or next byte did not arrive in time, or the upstream did not read."""
        if self._still_takes_request(now):
            return
        if self._exchange is not None and self._exchange.is_tunnel:
            self._exchange.close_tunnel()
            return
        self._fail(Refusal(Reason.UPSTREAM_TIMEOUT, "no byte of a response in time"))

    # -- reading

    def _read(self, exchange: UpstreamUser, buffer: bytes, now: float) -> None:
        body = self._body
        checked_bytes = len(self._buffer)
        while body is None:
            end = buffer.find(HEAD_END)
            if not 0 <= end <= HEAD_BYTES_MAX:
                if len(buffer) > HEAD_BYTES_MAX:
                    raise Refusal(Reason.UPSTREAM_INVALID, f"the response head has more than {HEAD_BYTES_MAX} bytes")
                check_response_beginning(buffer, checked_bytes)
                # Keep the deadline: a head must not trickle in indefinitely.
                self._buffer = buffer
                return
            head = self._pool.responses.read(buffer, end, self._like)
            self._like = head
            buffer, checked_bytes = buffer[end + 4 :], 0
            status = head.line.status
            if head.line.ends_with_head and (head.fields.has_content_length or head.fields.is_chunked):
                # A bodiless response may announce content, and a faulty upstream may send it: no other user may get
                # that.
                self._is_suspect = self._is_suspect or head.content_length > 0 or head.fields.is_chunked
                head = without_length(head)
            if status >= _FINAL:
                self._keeps_alive = head.fields.keeps_alive and not self._is_suspect
                self._keeps_alive = self._keeps_alive and not self._writer.leaves_unread(status)
                # The upstream will not read the rest of the request. RFC 9112 section 9.3: stop sending it.
                self._writer.is_refused = status >= _ERROR and not head.fields.keeps_alive
                body = self._body = self._body_of(head)
                exchange.response_begins(head, now)
            elif head.fields.opens_tunnel and exchange.asks_for_tunnel:
                self._keeps_alive = False
                body = self._body = EndlessBody()
                exchange.tunnel_begins(head, now)
            elif status == SWITCHING_PROTOCOLS or self._interim >= _INTERIM_MAX:
                raise Refusal(Reason.UPSTREAM_INVALID, "an unrequested upgrade, or too many interim responses")
            else:
                self._interim += 1
                self._watch(now)
                exchange.interim_arrived(head)
        content, self._buffer = body.feed(buffer)
        if body.is_complete:
            exchange.response_arrived(content, now, is_last=True)
        else:
            self._watch(now)
            exchange.response_arrived(content, now, is_last=False)

    def _body_of(self, head: ResponseHead) -> Body:
        if has_no_body(self._method, head.line):
            return NoBody()
        if head.fields.is_chunked:
            return ChunkedBody(self._is_forbidden_trailer)
        if head.fields.has_content_length:
            return CountedBody(head.content_length)
        return EndlessBody()

    def _is_forbidden_trailer(self, name: bytes) -> bool:
        return self._pool.responses.kind(name) in (Kind.CONTENT_LENGTH, Kind.TRANSFER_ENCODING)

    def _still_takes_request(self, now: float) -> bool:
        """At a deadline: return whether the upstream is still reading. If so, extend the deadline."""
        waits_for_response = self._body is None and self._writer.is_whole
        seconds = self._first_byte_seconds if waits_for_response else self._idle_seconds
        goes_on = self._writer.goes_on(now, seconds, waits_for_response=waits_for_response)
        if goes_on:
            self.deadline = now + seconds
        return goes_on

    def _watch(self, now: float) -> None:
        if self._body is not None:
            self.deadline = now + self._idle_seconds
        elif self._writer.is_whole:
            self.deadline = now + self._first_byte_seconds
        else:
            self.deadline = NO_DEADLINE

    def _fail(self, refusal: Refusal) -> None:
        exchange, self._exchange = self._exchange, None
        self.abort()
        if exchange is not None:
            exchange.upstream_lost(refusal)

    def __repr__(self) -> str:
        state = "closed" if not self.is_open else "idle" if self._exchange is None else "busy"
        return f"<UpstreamConnection {state}>"
