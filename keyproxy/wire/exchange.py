"""One request and its response, between one client connection and at most one upstream connection.

    reading head -> deciding -> (waiting for body, connecting) -> relaying (-> tunnel) -> over

The exchange owns no socket. The client connection passes it the request as it arrives, the upstream connection the
response; it reframes both and sends them on. `response_writer` writes to the client; this module sends the request to
the upstream, and ends the exchange. In every case `_end` runs exactly once. It is the only place that closes or returns
both connections and records the outcome.

Nothing is sent upstream before a Permit, nor before the first byte of an announced body: a client that sends a head and
then stalls occupies no upstream connection, and a body that is malformed from its start never begins there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from keyproxy.http import headers
from keyproxy.model import ANSWERED, Ending, Permit
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire import response_heads
from keyproxy.wire.body_buffer import BodyBuffer
from keyproxy.wire.parsing.framing import LAST_CHUNK, chunk
from keyproxy.wire.response_writer import ResponseWriter
from keyproxy.wire.upstream.connection import UpstreamConnection
from keyproxy.wire.upstream.pool import UpstreamPool

#: Body bytes buffered while there is no upstream connection to write them to; beyond that the client is not read.
_PENDING_BYTES_MAX: Final = 65_536

#: A longer body is written after the head, not joined to it: that would be a copy. A collected body is written in
#: portions, with other work between them: TLS would encrypt 32 MiB for a tenth of a second.
_JOINED_BYTES_MAX: Final = 65_536
_PORTION_BYTES: Final = 262_144

#: The status recorded if the client left before there was a response. As in nginx.
_CLIENT_GONE_STATUS: Final = 499

_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})


class Exchange(ResponseWriter):
    """A request and its response; implements what both connections call."""

    _collector: BodyBuffer | None = None
    _is_held_up: bool = False
    _upstream: UpstreamConnection | None = None
    _pool: UpstreamPool | None = None
    _is_waiting: bool = False
    _is_retry: bool = False
    #: Since when it waits for the first byte of its body, and for an upstream connection; 0.0: it does not.
    _body_since_mono: float = 0.0
    _connection_since_mono: float = 0.0
    #: A long body, how much of it is written, and whether more of it is due in the loop's next iteration.
    _long_body: bytes = b""
    _written_bytes: int = 0
    _will_write: bool = False

    # -- what the gateway decides

    def forward(self, permit: Permit) -> None:
        """Send the request upstream and relay the response."""
        self.permit = permit
        head = self.head
        if head is None or self.is_over:
            self._gate.settle(self)
            return
        if not self.is_complete and head.fields.expects_continue and not self.bytes_in:
            self._client.send(response_heads.CONTINUE)
        self._go()

    async def whole_body(self, otherwise: Refusal | None = None) -> None:
        """Wait until the whole body has arrived, or the exchange is over. `otherwise`: the refusal of one too large."""
        head = self.head
        identity = self.identity
        if self.is_complete or self.is_over or head is None or identity is None:
            return
        owner = (identity.tenant_id, identity.user_id)
        collector = self._collector = BodyBuffer(self._server.room, owner, self._server.clock(), otherwise)
        collector.expect(head.content_length)
        collector.take(self.body)
        self.body = b""
        if head.fields.expects_continue and not self.bytes_in:
            self._client.send(response_heads.CONTINUE)
        self._client.resume()
        since = self._server.clock()
        await collector.wait()
        self.body_wait_seconds += self._server.clock() - since

    async def in_turns(self, advance: Callable[[], bool]) -> None:
        """Call `advance` until it returns True or the exchange is over, with other work between two calls."""
        identity, turns = self.identity, self._server.turns
        assert identity is not None  # noqa: S101 - for the type checker: no body is read before its key is known
        owner = (identity.tenant_id, identity.user_id)
        while not self.is_over:
            await turns.enter(owner)
            try:
                if self.is_over or advance():
                    return
                # Keep the turn until all other work has run once.
                await asyncio.sleep(0)
            finally:
                turns.leave()

    def extend(self, permit: Permit) -> None:
        """Continue with a permit that holds more."""
        self.permit = permit
        if self._is_held_up:
            self._is_held_up = False
            if not self._client.is_stalled:
                self.resume_response()

    def pause_stream(self) -> None:
        """Stop reading the response until more tokens are held for it."""
        self._is_held_up = True
        self.pause_response()

    # -- called by the client connection

    def body_arrived(self, content: bytes, *, is_complete: bool) -> None:
        """Take the next content of the request body, and whether it was the last."""
        self.bytes_in += len(content)
        self.is_complete = is_complete
        if self.fingerprint is not None:
            self.fingerprint.feed(content)
        if self._upstream is not None:
            self._upstream.send(self._framed(content), is_last=is_complete)
        elif self._collector is not None:
            self._collect(content, self._collector)
        else:
            self.body += content
            if len(self.body) > _PENDING_BYTES_MAX:
                self._client.pause()
            if self.permit is not None:
                self._go()

    def _collect(self, content: bytes, collector: BodyBuffer) -> None:
        try:
            collector.take(content)
        except Refusal as refusal:
            self.refuse(refusal)
        else:
            if self.is_complete:
                self.body = collector.whole()

    def check_pace(self) -> None:
        """Refuse a request whose awaited body arrives too slowly."""
        if self._collector is not None and self._collector.is_slow(self._server.clock()):
            self.refuse(Refusal(Reason.REQUEST_TIMEOUT, "the body, which is needed whole, arrived too slowly"))

    def client_gone(self) -> None:
        """The client connection is lost: end the upstream exchange."""
        if not self.is_over:
            if not self.status:
                self.status = _CLIENT_GONE_STATUS
            self._end(Ending.CLIENT_GONE, self._server.clock(), closes=True)

    def close_tunnel(self) -> None:
        """One side of the tunnel has ended, or it has to end now. Bytes in flight are still delivered."""
        if self.is_tunnel and not self.is_over:
            self._end(ANSWERED, self._server.clock(), closes=True)

    def pause_response(self) -> None:
        """The client does not read fast enough."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume_response(self) -> None:
        """The client reads again."""
        if self._upstream is not None and not self._is_held_up:
            self._upstream.resume()

    # -- called by the upstream connection

    def pause_request(self) -> None:
        """The upstream does not read fast enough."""
        if not self.is_complete:
            self._client.pause()

    def resume_request(self) -> None:
        """The upstream reads again."""
        if self._long_body:
            self._write_soon()
        elif self._collector is not None:
            self._collector.leave()
        if not self.is_complete:
            self._client.resume()

    def connected(self, upstream: UpstreamConnection) -> None:
        """Take an upstream connection, and write everything that is ready in one piece."""
        head, permit = self.head, self.permit
        assert head is not None  # noqa: S101 - for the type checker: forward() has seen both
        assert permit is not None  # noqa: S101
        self._is_waiting = False
        self._upstream = upstream
        block = head.block if self.block is None else self.block
        data = headers.build_upstream_head(
            head, block, permit, request_id=self.request_id, forwarding=self._client.forwarding, host=upstream.host
        )
        body, self.body = self.body, b""
        if len(body) <= _JOINED_BYTES_MAX:
            if body or head.fields.is_chunked:
                data += self._framed(body)
            body = b""
        now = self.sent_mono = self._server.clock()
        if self._connection_since_mono:
            self.connection_wait_seconds += now - self._connection_since_mono
            self._connection_since_mono = 0.0
        upstream.begin(self, data, head.line.method, now, is_last=self.is_complete and not body)
        if body and self.is_complete:
            if head.fields.is_chunked:
                upstream.send(b"%x\r\n" % len(body), is_last=False)
            self._long_body = body
            self._write_on()
        elif body:
            upstream.send(self._framed(body), is_last=False)
        elif self._collector is not None and not upstream.is_full:
            self._collector.leave()
        if not self.is_complete:
            self._client.resume()

    def upstream_lost(self, refusal: Refusal) -> None:
        """The upstream failed before or during its response, or no connection was available."""
        upstream, self._upstream = self._upstream, None
        self._is_waiting = False
        if upstream is not None and upstream.is_reused and self._may_repeat(refusal):
            # The upstream closed an idle connection just as the pool lent it.
            self._is_retry = True
            self._connection_since_mono = self.sent_mono
            self._go()
        else:
            self.refuse(refusal)

    # -- for the pool

    def is_read_slowly(self, now: float, *, for_seconds: float) -> bool:
        """Whether the client reads the response so slowly that it occupies the upstream connection."""
        return self._client.reads_slowly(now, for_seconds=for_seconds)

    def preempt_if_slow(self, refusal: Refusal) -> None:
        """End the exchange, to free the connection for other requests."""
        if self.is_tunnel:
            self.close_tunnel()
        else:
            self.end_stream(refusal)

    @property
    def has_upstream(self) -> bool:
        """Whether bytes of the request were sent upstream."""
        return self._upstream is not None

    @property
    def is_idempotent(self) -> bool:
        """Whether the request may be sent again without harm."""
        return self.head is not None and self.head.line.method in _IDEMPOTENT

    # -- the rest

    @property
    def asks_for_tunnel(self) -> bool:
        """Whether the request is a WebSocket handshake."""
        return self.head is not None and self.head.fields.opens_tunnel

    def _go(self) -> None:
        """Request an upstream connection, once there is something to send on it."""
        permit = self.permit
        if permit is None or self._is_waiting:
            return
        if not (self.is_complete or self.body):
            self._body_since_mono = self._server.clock()
            return
        if self._body_since_mono:
            self.body_wait_seconds += self._server.clock() - self._body_since_mono
            self._body_since_mono = 0.0
        identity = permit.grant.identity
        pool = self._server.upstreams.pool(is_test=identity.is_test)
        self._pool = pool
        upstream = None if self._is_retry or self.asks_for_tunnel else pool.take(identity.owner, self.started_mono)
        if upstream is not None:
            self.connected(upstream)
        else:
            self._is_waiting = True
            self._connection_since_mono = self._connection_since_mono or self._server.clock()
            pool.wait(self, identity.owner)

    def _may_repeat(self, refusal: Refusal) -> bool:
        """Whether a retry is safe: no response yet, an idempotent method, and no body to send again."""
        head = self.head
        return (
            refusal.reason is Reason.UPSTREAM_UNREACHABLE
            and not self.has_response
            and not self._has_interim
            and not self._is_retry
            and head is not None
            and head.line.method in _IDEMPOTENT
            and not head.has_body
        )

    def _write_soon(self) -> None:
        if not self._will_write:
            self._will_write = True
            self._server.loop.call_soon(self._write_on)

    def _write_on(self) -> None:
        """Write the next portion of a long body. If the upstream is full, `resume_request` continues it."""
        self._will_write = False
        upstream, head, body = self._upstream, self.head, self._long_body
        if upstream is None or head is None or not body or upstream.is_full:
            return
        begin = self._written_bytes
        end = self._written_bytes = begin + _PORTION_BYTES
        portion = body[begin:end]
        if end < len(body):
            upstream.send(portion, is_last=False)
            self._write_soon()
            return
        self._long_body = b""
        upstream.send(portion + b"\r\n" + LAST_CHUNK if head.fields.is_chunked else portion, is_last=True)
        if self._collector is not None and not upstream.is_full:
            self._collector.leave()

    def _framed(self, content: bytes) -> bytes:
        if self.head is None or not self.head.fields.is_chunked:
            return content
        return (chunk(content) if content else b"") + (LAST_CHUNK if self.is_complete else b"")

    def _end(self, ending: Ending, now: float, *, closes: bool, resets: bool = True) -> None:
        if self.is_over:
            return
        self.is_over = True
        self.ending = ending
        was_answered = ending is ANSWERED
        self.ended_mono = now
        server, upstream = self._server, self._upstream
        if self._is_waiting and self._pool is not None:
            self._pool.wait_no_more(self)
        if upstream is not None:
            self._upstream = None
            if self.is_tunnel:
                upstream.finish(now)
            else:
                # A response may be complete before its request: unwritten bytes would become the start of the next one.
                is_clean = was_answered and self.is_complete and not self._long_body
                upstream.exchange_over(now, is_clean=is_clean)
        self.body = self._long_body = b""
        self.reading = None
        if self._collector is not None:
            self._collector.leave()
        if self.permit is not None:
            self._gate.settle(self)
        server.recorder.record(self)
        self._client.exchange_over(now, closes=closes, is_cut=not was_answered and resets and ending is Ending.CUT)

    def __repr__(self) -> str:
        state = "over" if self.is_over else "relaying" if self._upstream else "waiting"
        return f"<Exchange {self.request_id.decode('ascii')} {state}>"
