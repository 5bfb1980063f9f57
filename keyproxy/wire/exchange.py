"""One request and its response, between one client connection and at most one upstream connection.

    deciding -> serving, or (awaiting body, connecting) -> requested -> responding (or tunnel) -> over

`phases` has the table of all transitions. The exchange owns no socket. The client connection passes it the request as
it arrives, the upstream connection the response; it reframes both and sends them on, the response with its
`ResponseWriter`. In every case `_end` runs exactly once. It is the only place that closes or returns both connections
and records the outcome.

Nothing is sent upstream before a Permit, nor before the first byte of an announced body: a client that sends a head and
then stalls occupies no upstream connection, and a body that is malformed from its start never begins there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from keyproxy.http.own_response import OwnResponse
from keyproxy.http_messages import RequestHead, ResponseHead
from keyproxy.model import COMPLETED, PUBLIC_OWNER, Ending, Permit
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire import phases, usage_reads
from keyproxy.wire.body_buffer import BodyBuffer, InflatedContent, owner_of
from keyproxy.wire.client.exchange_owner import ExchangeOwner
from keyproxy.wire.context import ServerContext
from keyproxy.wire.responses import own_responses, response_begun, response_heads, stream_cut
from keyproxy.wire.responses.response_writer import ResponseWriter
from keyproxy.wire.upstream.connection import UpstreamConnection
from keyproxy.wire.upstream.identity_assertion import unsigned_because
from keyproxy.wire.upstream.pool import PoolUser, UpstreamPool
from keyproxy.wire.upstream.request_head import request_head
from keyproxy.wire.usage_reads import NOT_REPORTED, REPORTED

#: Body bytes buffered while there is no upstream connection to write them to; beyond that the client is not read.
_PENDING_BYTES_MAX: Final = 65_536

#: The status recorded if the client left before there was a response. As in nginx.
_CLIENT_GONE_STATUS: Final = 499

_CONTINUE: Final = 100


class Exchange(PoolUser):
    """A request and its response; implements what both connections and the gateway call."""

    __slots__ = ("_client", "_gate", "_server", "response")

    _phase: int = phases.DECIDING
    _collector: BodyBuffer | None = None
    _upstream: UpstreamConnection | None = None
    _pool: UpstreamPool | None = None
    _is_retry: bool = False
    #: Since when it waits for the first byte of its body, and for an upstream connection; 0.0: it does not.
    _body_since_mono: float = 0.0
    _connection_since_mono: float = 0.0
    #: Whether the client has left, and the exchange lasts: the response is read on for its usage, or not made yet.
    _has_left: bool = False

    def __init__(
        self,
        client: ExchangeOwner,
        server: ServerContext,
        head: RequestHead | None,
        started_mono: float,
        *,
        content: bytes = b"",
        is_complete: bool = True,
    ) -> None:
        """`head` is None if it could not be read; then the request can only be refused.

        `content`: what has arrived of the body so far; `is_complete`: whether that is all of it.
        """
        self._client = client
        self._server = server
        #: The gate that decides on this request also settles it, even if the configuration is reloaded in between.
        self._gate = server.gate
        self.head = head
        self.peer = client.forwarding
        self.request_id = server.request_ids.choose(head, server.key_format)
        self.response: Final = ResponseWriter(client.transport, self.request_id)
        self.started_mono = started_mono
        self.bytes_in = len(content)
        self.is_complete = is_complete
        self.body = content

    def forward(self, permit: Permit) -> None:
        self.permit, head = permit, self.head
        if head is None or self.is_over:
            self._gate.settle(self)
            return
        if not self.is_complete:
            self._invite_body(head)
        self._go(permit)

    def serve(self, permit: Permit) -> None:
        self.permit = permit
        self._phase = phases.EXCHANGE.step(self._phase, phases.SERVING)

    def respond(self, response: OwnResponse) -> None:
        if self._has_left or self.is_over:
            self._leave()
            return
        closes = own_responses.send_served(response, self, self.response, self._server)
        self._end(COMPLETED, self._server.clock(), closes=closes)

    def refuse(self, refusal: Refusal) -> None:
        if self._has_left or self.is_over:
            self._server.usage_reads.end(self, NOT_REPORTED)
            self._leave()
            return
        own_responses.note(refusal, self)
        if self.response.is_replaceable:
            closes = own_responses.send(refusal, self, self.response, self._server)
            self._end(Ending.REFUSED, self._server.clock(), closes=closes)
        else:
            self._end(Ending.CUT, self._server.clock(), closes=True)

    async def whole_body(self, otherwise: Refusal | None = None, *, bytes_max: int | None = None) -> None:
        head = self.head
        if self.is_complete or self.is_over or head is None:
            return
        since = self._server.clock()
        collector = self._collector = BodyBuffer(self._server.room, owner_of(self), since, otherwise)
        collector.begin(head.content_length, self.body, bytes_max)
        self.body = b""
        self._invite_body(head)
        self._client.resume()
        await collector.wait()
        self.body_wait_seconds += self._server.clock() - since

    async def in_turns(self, advance: Callable[[], bool]) -> None:
        await self._server.turns.work(owner_of(self), lambda: self.is_over or advance())

    def content_memory(self) -> InflatedContent:
        return InflatedContent(self._server.room, owner_of(self), self._collector)

    def _invite_body(self, head: RequestHead) -> None:
        if head.fields.expects_continue and not self.bytes_in:
            self._client.transport.send(response_heads.CONTINUE)

    def extend(self, permit: Permit) -> None:
        self.permit = permit
        if self._phase == phases.PAUSED:
            self._phase = phases.EXCHANGE.step(self._phase, phases.RESPONDING)
            if not self._client.transport.is_stalled:
                self.resume_response()

    def pause_stream(self) -> None:
        if self._phase != phases.PAUSED:
            self._phase = phases.EXCHANGE.step(self._phase, phases.PAUSED)
        self.pause_response()

    def end_stream(self, refusal: Refusal) -> None:
        is_open = not (self.is_over or self._has_left)
        if is_open and stream_cut.send_error_event(refusal, self, self.response, self._server):
            own_responses.note(refusal, self)
            self._end(Ending.CUT, self._server.clock(), closes=self.response.closes, resets=False)
        else:
            self.refuse(refusal)

    # -- called by the client connection

    def body_arrived(self, content: bytes, *, is_complete: bool) -> None:
        """Take the next content of the request body, and whether it was the last."""
        self.bytes_in += len(content)
        self.is_complete = is_complete
        if self.fingerprint is not None:
            self.fingerprint.feed(content)
        if self._upstream is not None:
            self._upstream.send(content, is_last=is_complete)
        elif self._collector is not None:
            self._collect(content, self._collector)
        else:
            self.body += content
            if len(self.body) > _PENDING_BYTES_MAX:
                self._client.pause()
            if self.permit is not None and self._phase == phases.AWAITING_BODY:
                self._go(self.permit)

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
        """The client connection is lost: end the upstream exchange, unless only the usage of its response is missing."""
        if self.is_over:
            return
        upstream, seconds = self._upstream, self._gate.usage_wait_seconds
        if self._phase == phases.SERVING:
            # What is being made is charged if it comes to exist, so the exchange lasts until that is known.
            self._has_left = True
        elif usage_reads.is_missed(self.meter) and upstream is not None and seconds > 0.0:
            self._has_left = True
            if self._phase == phases.PAUSED:
                self._phase = phases.EXCHANGE.step(self._phase, phases.RESPONDING)
            self._server.usage_reads.begin(self, self._leave, seconds)
            upstream.resume()
        else:
            self._leave()

    def _leave(self) -> None:
        self.status = self.status or _CLIENT_GONE_STATUS
        self._end(Ending.CLIENT_GONE, self._server.clock(), closes=True)

    def close_tunnel(self) -> None:
        """One side of the tunnel has ended, or it has to end now. Bytes in flight are still delivered."""
        if self._phase == phases.TUNNEL:
            self._end(COMPLETED, self._server.clock(), closes=True)

    def pause_response(self) -> None:
        """The client does not read fast enough."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume_response(self) -> None:
        """The client reads again."""
        if self._upstream is not None and self._phase != phases.PAUSED:
            self._upstream.resume()

    # -- called by the upstream connection and the pool

    def pause_request(self) -> None:
        if not self.is_complete:
            self._client.pause()

    def resume_request(self) -> None:
        if self._collector is not None and self._upstream is not None and not self._upstream.is_full:
            # The upstream has taken the collected body, so its memory is free again.
            self._collector.leave()
        if not self.is_complete:
            self._client.resume()

    def connected(self, upstream: UpstreamConnection) -> None:
        """Take an upstream connection, and write everything that is ready in one piece."""
        permit = self.permit
        assert permit is not None  # noqa: S101 - for the type checker: forward() has seen it
        now, assertions = self._server.clock(), self._server.assertions
        if self._connection_since_mono:
            self.connection_wait_seconds += now - self._connection_since_mono
            self._connection_since_mono = 0.0
            if assertions is not None and (refusal := unsigned_because(assertions, permit, now)):
                upstream.abort()
                self.refuse(refusal)
                return
        self._phase = phases.EXCHANGE.step(self._phase, phases.REQUESTED)
        self._upstream, self.sent_mono = upstream, now
        body, self.body = self.body, b""
        upstream.begin(self, request_head(self, permit, upstream.host, is_signed=assertions is not None), body, now)
        self.resume_request()

    def interim_arrived(self, response: ResponseHead) -> None:
        """Relay an interim response, such as 103 (RFC 9110 section 15.2). HTTP/1.0 has none. 100 is ours."""
        if self._phase != phases.INFORMED:
            self._phase = phases.EXCHANGE.step(self._phase, phases.INFORMED)
        head = self.head
        if head is None or head.line.minor_version == 0:
            return
        if response.line.status != _CONTINUE or not head.fields.expects_continue:
            self.response.send_interim(response)

    def response_begins(self, response: ResponseHead, now: float) -> None:
        head = self.head
        assert head is not None  # noqa: S101 - for the type checker: it was forwarded
        self._phase = phases.EXCHANGE.step(self._phase, phases.RESPONDING)
        self.responded_mono = now
        self.status = response.line.status
        response = response_begun.prepare(self, response, self._gate, now)
        lines = response_heads.client_lines(response, self, self._server, now)
        may_continue = head.fields.keeps_alive and self.is_complete and not self._server.is_draining
        self.response.begin(head, response, lines, may_continue=may_continue)

    def tunnel_begins(self, response: ResponseHead, now: float) -> None:
        self._phase = phases.EXCHANGE.step(self._phase, phases.TUNNEL)
        self.responded_mono = now
        self.status = response.line.status
        self.is_complete = False
        response_begun.note_credential(self)
        lines = response_heads.client_lines(response, self, self._server, now)
        self.response.begin_tunnel(response, lines)
        self._client.enter_tunnel()

    def response_arrived(self, content: bytes, now: float, *, is_last: bool) -> None:
        meter, response = self.meter, self.response
        if meter is not None:
            content = meter.feed(content)
            if is_last:
                content += meter.finish()
            if self._has_left:
                if meter.is_reported or is_last:
                    self._server.usage_reads.end(self, REPORTED if meter.is_reported else NOT_REPORTED)
                return
        if self.tool_list is not None:
            content = self.tool_list.feed(content, is_last=is_last)
            if not content and not is_last:
                return
        self.bytes_out += len(content)
        response.write(content, is_last=is_last)
        if is_last:
            self._end(COMPLETED, now, closes=response.closes)
        elif meter is not None and meter.is_stream:
            self._gate.watch(self)

    def upstream_lost(self, refusal: Refusal) -> None:
        upstream, self._upstream = self._upstream, None
        is_first = self._phase == phases.REQUESTED and not self._is_retry
        is_reused = upstream is not None and upstream.is_reused
        if self.permit is not None and is_first and self.may_retry(refusal, is_reused=is_reused):
            self._is_retry = True
            self._connection_since_mono = self.sent_mono
            self._go(self.permit)
        else:
            self.refuse(refusal)

    def is_read_slowly(self, now: float, *, for_seconds: float) -> bool:
        return self._client.transport.reads_slowly(now, for_seconds=for_seconds)

    def preempt(self, refusal: Refusal) -> None:
        if self._phase == phases.TUNNEL:
            self.close_tunnel()
        else:
            self.end_stream(refusal)

    @property
    def is_tunnel(self) -> bool:
        return self._phase == phases.TUNNEL

    @property
    def has_response(self) -> bool:
        return phases.RESPONDING <= self._phase < phases.OVER

    @property
    def has_upstream(self) -> bool:
        """Whether bytes of the request were sent upstream."""
        return self._upstream is not None

    def _go(self, permit: Permit) -> None:
        """Request an upstream connection, once there is something to send on it."""
        if not (self.is_complete or self.body):
            self._phase = phases.EXCHANGE.step(self._phase, phases.AWAITING_BODY)
            self._body_since_mono = self._server.clock()
            return
        if self._body_since_mono:
            self.body_wait_seconds += self._server.clock() - self._body_since_mono
            self._body_since_mono = 0.0
        assertions = self._server.assertions
        if assertions is not None and (refusal := unsigned_because(assertions, permit, self._server.clock())):
            self.refuse(refusal)
            return
        owner = PUBLIC_OWNER if self.identity is None else self.identity.owner
        pool = self._pool = self._server.upstreams.for_owner(owner)
        upstream = None if self._is_retry or not self.may_reuse else pool.take(owner, self.started_mono)
        if upstream is not None:
            self.connected(upstream)
        else:
            self._phase = phases.EXCHANGE.step(self._phase, phases.CONNECTING)
            self._connection_since_mono = self._connection_since_mono or self._server.clock()
            pool.wait(self, owner)

    def _end(self, ending: Ending, now: float, *, closes: bool, resets: bool = True) -> None:
        """End the exchange. `closes`: close the client's connection too. Not `resets`: a cut that ends it cleanly."""
        if self.is_over:
            return
        before, self._phase = self._phase, phases.EXCHANGE.step(self._phase, phases.OVER)
        self.is_over = True
        self.ending = ending
        self.ended_mono = now
        upstream = self._upstream
        if self.metered is not None:
            self.metered.forget_content()
            self.was_sent_whole = ending is not COMPLETED and upstream is not None and upstream.has_sent_all
        if before == phases.CONNECTING and self._pool is not None:
            self._pool.wait_no_more(self)
        if upstream is not None:
            self._upstream = None
            if before == phases.TUNNEL:
                upstream.finish(now)
            else:
                # A response may be complete before its request.
                upstream.exchange_over(now, is_clean=ending is COMPLETED and self.is_complete)
        self.body = b""
        if self._collector is not None:
            self._collector.leave()
        if self.permit is not None or self.slots is not None or self.tool_call is not None:
            self._gate.settle(self)
        self._server.recorder.record(self)
        self._client.exchange_over(now, closes=closes, is_cut=resets and ending is Ending.CUT)

    def __repr__(self) -> str:
        return f"<Exchange {self.request_id.decode('ascii')} {phases.EXCHANGE.names[self._phase]}>"
