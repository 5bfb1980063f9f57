"""One connection to the upstream: writes a request, reads its response, and is reused only after a clean exchange.

Clean means: the request was written whole, the response was read whole and well-formed, nothing came after it, and both
sides keep the connection alive. Otherwise the connection is closed: an unexpected byte would become the start of
another user's response (CVE-2023-28859 is that mistake in another protocol).
"""

from __future__ import annotations

import asyncio
import logging
import select
import ssl
from collections.abc import Callable
from typing import Final, cast

from keyproxy.config.schema import Upstream as UpstreamSettings
from keyproxy.model import Owner
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.deadlines import NO_DEADLINE
from keyproxy.wire.parsing.framing import FramingError, chunks
from keyproxy.wire.parsing.head_cache import ResponseReader
from keyproxy.wire.parsing.head_parser import SWITCHING_PROTOCOLS
from keyproxy.wire.tls import was_closed
from keyproxy.wire.upstream.long_body import LongBody
from keyproxy.wire.upstream.request_writer import KEPT_BYTES_MAX, RequestWriter
from keyproxy.wire.upstream.response_stream import ResponseStream
from keyproxy.wire.upstream.upstream_user import UpstreamUser

_ERROR: Final = 400

#: A longer body is written after the head, not joined to it: that would be a copy.
_JOINED_BYTES_MAX: Final = 65_536


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
        #: The exchange that it is lent to.
        self.exchange: UpstreamUser | None = None
        self.writer = RequestWriter()
        self._stream = ResponseStream(pool.responses)
        self._is_chunked = False
        self._long_body: LongBody | None = None
        #: Whether the next portion of it is due in the loop's next iteration.
        self._is_portion_due = False
        self._is_paused = False
        self._is_finishing = False
        self._tls: ssl.SSLObject | None = None
        self._clock = pool.clock
        self._first_byte_seconds = pool.settings.first_byte_timeout_seconds
        self._idle_seconds = pool.settings.idle_timeout_seconds

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._tls = transport.get_extra_info("ssl_object")
        self.writer.attach(self._transport, self._tls)

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            self.abort()
            return
        try:
            self._read(exchange, data, self._clock())
        except Refusal as refusal:
            self._fail(refusal)
        except FramingError as error:
            self._fail(Refusal(Reason.UPSTREAM_INVALID, str(error)))
        except Exception:  # noqa: BLE001 - the outermost boundary of this side
            _log.exception("reading a response failed", extra={"request_id": exchange.request_id.decode("ascii")})
            self._fail(Refusal(Reason.INTERNAL_ERROR))

    def eof_received(self) -> None:
        """The event loop closes the connection once all is written: what the upstream does not read is dropped."""
        exchange, transport = self.exchange, self._transport
        if exchange is None or exchange.is_tunnel or transport is None:
            return
        if self.writer.kept_bytes or transport.get_write_buffer_size():
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and self.exchange is not None:
            for data in self.writer.left_to_read():
                if self.exchange is not None:
                    self.data_received(data)
        self.writer.detach()
        self._transport = None
        self._pool.forget(self)
        exchange = self.exchange
        if exchange is None:
            return
        is_whole = exc is None and self._stream.ends_with_connection()
        if is_whole and (exchange.is_tunnel or was_closed(self._tls)):
            self._stream.keeps_alive = False
            try:
                exchange.response_arrived(b"", self._clock(), is_last=True)
            except Refusal as refusal:
                self._fail(refusal)
        else:
            self.exchange = None
            where = "in the middle of its response" if exchange.has_response else "without a response"
            exchange.upstream_lost(Refusal(Reason.UPSTREAM_UNREACHABLE, f"the upstream closed the connection {where}"))

    def pause_writing(self) -> None:
        now = self._clock()
        self.writer.outflow.stall(self._transport, now)
        if self.exchange is not None:
            self.exchange.pause_request()
            self.deadline = now + self._idle_seconds

    def resume_writing(self) -> None:
        self.writer.outflow.flow()
        if self.exchange is not None:
            now = self._clock()
            self.writer.restart_pace(now)
            self._continue_request(self.exchange)
            self._watch(now)

    # -- called by the exchange

    def begin(self, exchange: UpstreamUser, head: bytes, body: bytes, now: float) -> None:
        """Lend the connection to this exchange and write its request: the head and what has arrived of the body."""
        assert exchange.head is not None  # noqa: S101 - for the type checker: it has a permit
        self.exchange = exchange
        self._stream.begin(exchange.head)
        self._is_chunked = exchange.head.fields.is_chunked
        is_complete, is_joined = exchange.is_complete, len(body) <= _JOINED_BYTES_MAX
        if is_joined and (body or self._is_chunked):
            head = head + (chunks(body, is_last=is_complete) if self._is_chunked else body)
        is_last = is_complete and is_joined
        # While the request is still being sent, the client connection's timeouts apply.
        self.deadline = now + self._first_byte_seconds if is_last else NO_DEADLINE
        self.writer.begin(head, now, is_last=is_last)
        if is_joined:
            return
        if is_complete:
            self._long_body = LongBody(body, is_chunked=self._is_chunked)
            if self._is_chunked:
                self._send(b"%x\r\n" % len(body), is_last=False)
            self._send_portion()
        else:
            self.send(body, is_last=False)

    def send(self, content: bytes, *, is_last: bool) -> None:
        """Send more of the request's body."""
        self._send(self._framed(content, is_last=is_last), is_last=is_last)

    def _framed(self, content: bytes, *, is_last: bool) -> bytes:
        return chunks(content, is_last=is_last) if self._is_chunked else content

    def _send(self, data: bytes, *, is_last: bool) -> None:
        """Write more of the request, or hold it back until the arrived part of a response is read."""
        writer, now = self.writer, self._clock()
        writer.count(data, now, is_last=is_last)
        if not writer.outflow.is_stalled:
            self._watch(now)
        if not data or not self.is_open:
            return
        if writer.kept_bytes or self._must_read_first():
            if writer.keep(data):
                self._loop.call_soon(self._send_kept)
            if writer.kept_bytes > KEPT_BYTES_MAX and self.exchange is not None:
                self.exchange.pause_request()
        else:
            writer.write(data)

    def _send_portion(self) -> None:
        """Send the next portion of a long body. If the upstream is full, `_continue_request` goes on with it."""
        self._is_portion_due = False
        long_body, exchange = self._long_body, self.exchange
        if long_body is None or exchange is None or self.writer.is_full:
            return
        portion = long_body.next_portion()
        if long_body.is_written:
            self._long_body = None
        self._send(portion, is_last=long_body.is_written)
        self._continue_unless_full(exchange)

    def _continue_unless_full(self, exchange: UpstreamUser) -> None:
        if not self.writer.is_full:
            self._continue_request(exchange)

    def _continue_request(self, exchange: UpstreamUser) -> None:
        """The upstream reads again, or still: send what is left of a long body, else let the exchange send more."""
        if self._long_body is None:
            exchange.resume_request()
        elif not self._is_portion_due:
            self._is_portion_due = True
            self._loop.call_soon(self._send_portion)

    def exchange_over(self, now: float, *, is_clean: bool) -> None:
        """The exchange is over: return the connection to the pool if it can be reused."""
        self.exchange = None
        # Unwritten bytes of a request would become the start of the next one.
        is_whole = self.writer.end() and self._long_body is None
        self._long_body = None
        is_reusable = self._stream.end() and is_whole and self._transport is not None
        if is_clean and is_reusable:
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
        return self.writer.is_full or self._long_body is not None

    @property
    def has_sent_all(self) -> bool:
        """Whether the whole request has left our buffers."""
        writer, transport = self.writer, self._transport
        is_written = writer.is_whole and not writer.is_full and self._long_body is None
        return is_written and (transport is None or not transport.get_write_buffer_size())

    def has_lingered(self, now: float, patience_seconds: float) -> bool:
        """Whether a tunnel is over, and the upstream has not read the rest of it for this long."""
        return self._is_finishing and now > self.deadline - self._idle_seconds + patience_seconds

    def finish(self, now: float) -> None:
        """The tunnel is over: close once everything is sent, within the idle timeout."""
        self.exchange = None
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
    def is_new(self) -> bool:
        """Whether it was neither lent nor idle before, so that no timeout of the upstream may be closing it."""
        return not self.is_reused and not self.idle_since

    def was_closed_by_peer(self) -> bool:
        """Whether it became readable while idle: the upstream has closed it, or sent unexpected bytes."""
        fileno = self.fileno()
        if fileno < 0:
            return True  # below TLS, whose transport does not know yet
        poll = select.poll()
        poll.register(fileno, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def is_open(self) -> bool:
        """Whether the connection can still be written to, as far as is known."""
        return self._transport is not None and not self._transport.is_closing()

    def _send_kept(self) -> None:
        """Write what was held back; try again later if there is still something to read."""
        if self.exchange is None or not self.is_open:
            # A closing connection is at end of file, so its socket always polls readable: nothing more is written.
            self.writer.drop_kept()
        elif self._must_read_first():
            self._loop.call_soon(self._send_kept)
        else:
            self.writer.write_kept()
            self._continue_unless_full(self.exchange)

    def _must_read_first(self) -> bool:
        """Whether something has arrived that may be a response, and is not being read."""
        return self._stream.body is None and not self._is_paused and self.writer.has_arrived()

    def fileno(self) -> int:
        """The socket's file descriptor, -1 if closed."""
        return self.writer.fileno()

    def deadline_passed(self, now: float) -> None:
        """The first or next byte did not arrive in time, or the upstream did not read."""
        if self._still_takes_request(now):
            return
        if self.exchange is not None and self.exchange.is_tunnel:
            self.exchange.close_tunnel()
            return
        self._fail(Refusal(Reason.UPSTREAM_TIMEOUT, "no byte of a response in time"))

    # -- reading

    def _read(self, exchange: UpstreamUser, data: bytes, now: float) -> None:
        stream = self._stream
        body = stream.body
        while body is None:
            head = stream.next_head(data)
            if head is None:
                # Keep the deadline: a head must not trickle in indefinitely.
                return
            data, body = b"", stream.body
            if body is None:
                self._watch(now)
                exchange.interim_arrived(head)
            elif head.line.status == SWITCHING_PROTOCOLS:
                exchange.tunnel_begins(head, now)
            else:
                stream.keeps_alive = stream.keeps_alive and not self.writer.leaves_unread(head.line.status)
                # The upstream will not read the rest of the request. RFC 9112 section 9.3: stop sending it.
                self.writer.is_refused = head.line.status >= _ERROR and not head.fields.keeps_alive
                exchange.response_begins(head, now)
        content = stream.content(body, data)
        if body.is_complete:
            exchange.response_arrived(content, now, is_last=True)
        else:
            self._watch(now)
            exchange.response_arrived(content, now, is_last=False)

    def _still_takes_request(self, now: float) -> bool:
        """At a deadline: return whether the upstream is still reading. If so, extend the deadline."""
        waits_for_response = self._stream.body is None and self.writer.is_whole
        seconds = self._first_byte_seconds if waits_for_response else self._idle_seconds
        goes_on = self.writer.goes_on(now, seconds, waits_for_response=waits_for_response)
        if goes_on:
            self.deadline = now + seconds
        return goes_on

    def _watch(self, now: float) -> None:
        if self._stream.body is not None:
            self.deadline = now + self._idle_seconds
        elif self.writer.is_whole:
            self.deadline = now + self._first_byte_seconds
        else:
            self.deadline = NO_DEADLINE

    def _fail(self, refusal: Refusal) -> None:
        exchange, self.exchange = self.exchange, None
        self.abort()
        if exchange is not None:
            exchange.upstream_lost(refusal)

    def __repr__(self) -> str:
        state = "closed" if not self.is_open else "idle" if self.exchange is None else "busy"
        return f"<UpstreamConnection {state}>"
