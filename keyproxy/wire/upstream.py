"""One connection to the upstream: writes a request, reads its answer, and is reused only after a clean exchange.

Clean means: the request was written whole, the answer was read whole and well-formed, nothing came after it, and both
sides want to go on. Anything else closes the connection: a byte that nobody asked for would be the start of somebody
else's answer (CVE-2023-28859 is that mistake in another protocol).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import select
import ssl
from typing import TYPE_CHECKING, Final, cast

from keyproxy.headers import Kind
from keyproxy.model import Owner, ResponseHead
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire.beginnings import HEAD_END, check_response_beginning
from keyproxy.wire.deadlines import NO_DEADLINE
from keyproxy.wire.framing import Body, ChunkedBody, CountedBody, EndlessBody, FramingError, NoBody
from keyproxy.wire.handshake import TlsObject
from keyproxy.wire.heads import SWITCHING_PROTOCOLS, has_no_body
from keyproxy.wire.outflow import Outflow
from keyproxy.wire.pace import Pace
from keyproxy.wire.tls import was_closed

if TYPE_CHECKING:
    from keyproxy.wire.exchange import Exchange
    from keyproxy.wire.pool import UpstreamPool

HEAD_BYTES_MAX: Final = 65_536
_INTERIM_MAX: Final = 16
_FINAL: Final = 200
_ERROR: Final = 400

#: What is held of a request while an answer is being read. Then its client is read no further.
_KEPT_BYTES_MAX: Final = 65_536

#: How much is read of an answer whose upstream has reset the connection.
_LEFT_READ_BYTES: Final = 65_536
_LEFT_READS_MAX: Final = 16

_log = logging.getLogger(__name__)


class UpstreamConnection(asyncio.Protocol):
    """See the module. Lives in exactly one place: lent to an exchange, idle in the pool, or closed."""

    def __init__(self, pool: UpstreamPool, loop: asyncio.AbstractEventLoop) -> None:
        self.host = pool.host
        self.deadline = NO_DEADLINE
        self.idle_since = 0.0
        self.is_reused = False
        #: Whose request it is lent to; None if it is lent to none.
        self.owner: Owner | None = None
        self._pool = pool
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._method = b""
        self._buffer = b""
        self._like: ResponseHead | None = None
        self._body: Body | None = None
        self._keeps_alive = False
        self._is_paused = False
        self._request_is_written = False
        self._interim = 0
        self._is_suspect = False
        self._is_refused = False
        #: What is to be written once it is clear that the upstream has not answered already.
        self._kept = b""
        #: Of the socket below TLS, while a request is being sent in pieces.
        self._duplicate = -1
        self._is_finishing = False
        self._outflow = Outflow()
        self._begun_at_bytes = 0
        #: Of a request body that did not come with its head.
        self._body_pace: Pace | None = None
        self._tls: ssl.SSLObject | None = None
        self._clock = pool.clock
        self._first_byte_seconds = pool.settings.first_byte_timeout_seconds
        self._idle_seconds = pool.settings.idle_timeout_seconds

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._tls = transport.get_extra_info("ssl_object")

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
            _log.exception("reading an answer failed", extra={"request_id": exchange.request_id.decode("ascii")})
            self._fail(Refusal(Reason.INTERNAL_ERROR))

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and self._exchange is not None:
            self._read_what_is_left()
        self._forget_duplicate()
        self._transport = None
        self._kept = b""
        self._pool.forget(self)
        exchange = self._exchange
        if exchange is None:
            return
        is_whole = self._body is not None and exc is None and self._body.ends_with_connection()
        if is_whole and (exchange.is_tunnel or was_closed(self._tls)):
            self._keeps_alive = False
            exchange.answer_arrived(b"", self._clock(), is_last=True)
        else:
            self._exchange = None
            where = "in the middle of its answer" if exchange.has_answer else "without an answer"
            exchange.upstream_lost(Refusal(Reason.UPSTREAM_UNREACHABLE, f"the upstream closed the connection {where}"))

    def pause_writing(self) -> None:
        now = self._clock()
        self._outflow.stall(self._transport, now)
        if self._exchange is not None:
            self._exchange.pause_request()
            self.deadline = now + self._idle_seconds

    def resume_writing(self) -> None:
        self._outflow.flow()
        if self._exchange is not None:
            now = self._clock()
            if self._body_pace is not None:
                # Its client was not read meanwhile: what came before says nothing about how fast it sends.
                self._body_pace = Pace(now)
            self._exchange.resume_request()
            self._watch(now)

    # -- what the exchange asks for

    def begin(self, exchange: Exchange, data: bytes, method: bytes, now: float, *, is_last: bool) -> None:
        """Lend the connection to this exchange and write the first bytes of its request."""
        self._exchange = exchange
        self._method = method
        self._body = None
        self._interim = 0
        self._is_suspect = False
        self._is_refused = False
        self._request_is_written = is_last
        self._body_pace = None
        self._begun_at_bytes = self._outflow.written_bytes
        # While the request is still being sent, how long that may take is the client side's to say.
        self.deadline = now + self._first_byte_seconds if is_last else NO_DEADLINE
        if self._tls is not None and (not is_last or len(data) > _KEPT_BYTES_MAX):
            with contextlib.suppress(OSError):
                self._duplicate = os.dup(self.fileno())
        if self._transport is not None:
            self._outflow.written_bytes += len(data)
            self._transport.write(data)
        if not is_last:
            self._body_pace = Pace(now)
            self._body_pace.add(len(data), now)

    def send(self, data: bytes, *, is_last: bool) -> None:
        """Write more of the request.

        An upstream may answer before it has got all of it, and close: writing on meets a reset, after which a part of the
        answer may not be had any more. So what has arrived is read before more is written.
        """
        now = self._clock()
        self._request_is_written = is_last
        if self._body_pace is not None:
            self._body_pace.add(len(data), now)
        if not self._outflow.is_stalled:
            self._watch(now)
        if not data or self._transport is None or not self.is_open:
            return
        if self._kept or self._must_read_first():
            is_first, self._kept = not self._kept, self._kept + data
            if is_first:
                self._loop.call_soon(self._send_kept)
            if len(self._kept) > _KEPT_BYTES_MAX and self._exchange is not None:
                self._exchange.pause_request()
        elif not self._is_refused:
            self._outflow.written_bytes += len(data)
            self._transport.write(data)

    def exchange_over(self, now: float, *, is_clean: bool) -> None:
        """The exchange is over: the connection goes back to the pool if it can be reused."""
        self._exchange = None
        self._forget_duplicate()
        body, self._body = self._body, None
        is_written, self._kept = not self._kept, b""
        if self._outflow.is_stalled:
            self._outflow.flow()
            is_written = is_written and self._transport is not None and not self._transport.get_write_buffer_size()
        if is_clean and is_written and self._keeps_alive and not self._buffer and body is not None and body.is_complete:
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
        return self._outflow.is_stalled

    def give_way(self, now: float, patience_seconds: float) -> None:
        """Others wait for a connection: end this exchange if all that holds it up is a client that hardly moves."""
        exchange = self._exchange
        if exchange is None:
            if self._is_finishing and now > self.deadline - self._idle_seconds + patience_seconds:
                self.abort()
            return
        pace = self._body_pace
        if exchange.is_tunnel:
            return
        if exchange.has_answer:
            if exchange.is_read_slowly(now, for_seconds=patience_seconds):
                exchange.give_way(Refusal(Reason.REQUEST_TIMEOUT, "the answer was read too slowly while others waited"))
            return
        if pace is None or self._request_is_written or self._outflow.is_stalled:
            return
        if pace.seconds(now) > patience_seconds and pace.is_slow(now):
            exchange.give_way(Refusal(Reason.REQUEST_TIMEOUT, "the body came too slowly while others waited"))

    def end_for_others(self) -> None:
        """Others wait for a connection, and the user who has this one holds more than a share."""
        exchange = self._exchange
        if exchange is not None:
            exchange.give_way(
                Refusal(Reason.OVERLOADED, "the user held more than a share of the connections while others waited")
            )

    @property
    def is_for_tunnel(self) -> bool:
        """Whether its exchange is a tunnel, or asks to become one."""
        return self._exchange is not None and self._exchange.asks_for_tunnel

    @property
    def is_lent(self) -> bool:
        """Whether an exchange has it that could be ended."""
        return self._exchange is not None and self.is_open

    def loss(self, now: float) -> tuple[int, float]:
        """What is lost if the exchange is ended for the sake of others: the smaller, the less.

        First what the upstream has not got whole; then tunnels, the one first that has been silent longest; then what
        may be asked for again without harm. Last a request that is not idempotent, of which its client could not know
        whether it was carried out. Among equals the one that began last has lost least.
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
        return (3 if exchange.has_answer else 4), -exchange.sent_mono

    def finish(self, now: float) -> None:
        """The tunnel is over: close once everything is sent, within the time that silence is given."""
        self._exchange = None
        self._is_finishing = True
        if self._transport is not None:
            self._transport.close()
            self.deadline = now + self._idle_seconds

    def pause(self) -> None:
        """Read no further: the client does not keep up. Its own deadline counts meanwhile, not the upstream's."""
        if self._transport is not None and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
            self.deadline = NO_DEADLINE

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
            self._watch(self._clock())

    def abort(self) -> None:
        """Close at once. What is unsent is not worth sending."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_open(self) -> bool:
        """Whether the connection can still be written to, as far as is known."""
        return self._transport is not None and not self._transport.is_closing()

    def _send_kept(self) -> None:
        """Write what was kept back; once more later if there is still something to read."""
        if self._transport is None or self._exchange is None:
            self._kept = b""
        elif self._must_read_first():
            self._loop.call_soon(self._send_kept)
        else:
            kept, self._kept = self._kept, b""
            if not self._is_refused:
                self._outflow.written_bytes += len(kept)
                self._transport.write(kept)
            if not self._outflow.is_stalled:
                self._exchange.resume_request()

    def _must_read_first(self) -> bool:
        """Whether there is something to read that may be an answer: bytes, or the end of the connection."""
        if self._body is not None or self._is_paused:
            return False
        fileno = self.fileno()
        if fileno < 0:
            return True
        poll = select.poll()
        poll.register(fileno, select.POLLIN)
        return bool(poll.poll(0))

    def _read_what_is_left(self) -> None:
        """Read what the upstream had sent before writing to it failed.

        The socket is open until this has returned; below TLS it is closed already, and its duplicate is open.
        """
        tls = self._tls
        fileno = self.fileno() if tls is None else self._duplicate
        if fileno < 0:
            return
        for _ in range(_LEFT_READS_MAX):
            try:
                data = os.read(fileno, _LEFT_READ_BYTES)
            except OSError:
                return
            if not data:
                return
            if isinstance(tls, TlsObject):
                data = tls.decrypt(data)
            if data and self._exchange is not None:
                self.data_received(data)

    def _forget_duplicate(self) -> None:
        if self._duplicate >= 0:
            os.close(self._duplicate)
            self._duplicate = -1

    def fileno(self) -> int:
        """The socket's file descriptor, -1 if closed."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        return -1 if sock is None else int(sock.fileno())

    def deadline_passed(self, now: float) -> None:
        """First byte or the next byte did not come in time, or what was written was not taken."""
        if self._still_takes_request(now):
            return
        if self._exchange is not None and self._exchange.is_tunnel:
            self._exchange.close_tunnel()
            return
        self._fail(Refusal(Reason.UPSTREAM_TIMEOUT, "no byte of an answer in time"))

    # -- reading

    def _read(self, exchange: Exchange, buffer: bytes, now: float) -> None:
        body = self._body
        checked_bytes = len(self._buffer)
        while body is None:
            end = buffer.find(HEAD_END)
            if not 0 <= end <= HEAD_BYTES_MAX:
                if len(buffer) > HEAD_BYTES_MAX:
                    raise Refusal(Reason.UPSTREAM_INVALID, f"the answer's head has more than {HEAD_BYTES_MAX} bytes")
                check_response_beginning(buffer, checked_bytes)
                # Its deadline stays: a head may not trickle for as long as it likes.
                self._buffer = buffer
                return
            head = self._pool.responses.read(buffer, end, self._like)
            self._like = head
            buffer, checked_bytes = buffer[end + 4 :], 0
            status = head.line.status
            if head.line.ends_with_head and (head.fields.has_content_length or head.fields.is_chunked):
                # What it announces does not belong to it, and may come all the same: nobody else is to get that.
                self._is_suspect = self._is_suspect or head.content_length > 0 or head.fields.is_chunked
                head = _without_length(head)
            if status >= _FINAL:
                self._keeps_alive = head.fields.keeps_alive and not self._is_suspect
                # It will not read the rest of the request. RFC 9112 section 9.3: cease to send it.
                self._is_refused = status >= _ERROR and not head.fields.keeps_alive
                body = self._body = self._body_of(head)
                exchange.answer_begins(head, now)
            elif head.fields.opens_tunnel and exchange.asks_for_tunnel:
                self._keeps_alive = False
                body = self._body = EndlessBody()
                exchange.tunnel_begins(head, now)
            elif status == SWITCHING_PROTOCOLS or self._interim >= _INTERIM_MAX:
                raise Refusal(Reason.UPSTREAM_INVALID, "an upgrade nobody asked for, or endless interim answers")
            else:
                self._interim += 1
                self._watch(now)
                exchange.interim_arrived(head)
        content, self._buffer = body.feed(buffer)
        if body.is_complete:
            exchange.answer_arrived(content, now, is_last=True)
        else:
            self._watch(now)
            exchange.answer_arrived(content, now, is_last=False)

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
        """At a deadline: whether the upstream is still taking what was written. It then gets as long again."""
        outflow, transport = self._outflow, self._transport
        waits_for_answer = self._body is None and self._request_is_written
        seconds = self._first_byte_seconds if waits_for_answer else self._idle_seconds
        if outflow.is_stalled:
            goes_on = outflow.has_moved(transport, now, in_seconds=seconds)
        else:
            # The request has left our buffers, but megabytes of it may be in the kernel's.
            goes_on = waits_for_answer and outflow.is_being_taken(transport, since_bytes=self._begun_at_bytes)
            if goes_on:
                outflow.stall(transport, now)
        if goes_on:
            self.deadline = now + seconds
        return goes_on

    def _watch(self, now: float) -> None:
        if self._body is not None:
            self.deadline = now + self._idle_seconds
        elif self._request_is_written:
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


def _without_length(head: ResponseHead) -> ResponseHead:
    """The head without its Content-Length, which a client might wait for. RFC 9110 section 8.6."""
    lines = head.block.splitlines(keepends=True)
    block = b"".join(line for line in lines if not line.lower().startswith(b"content-length:"))
    without = ResponseHead(head.line, dataclasses.replace(head.fields, has_content_length=False), block, 0)
    without.usage_tokens = head.usage_tokens
    return without
