"""One request and its answer, between one client connection and at most one upstream connection.

    reading head -> deciding -> (waiting for body, connecting) -> relaying (-> tunnel) -> over

The exchange owns no socket. The client connection tells it what arrives of the request, the upstream connection what
arrives of the answer; it frames both anew and pushes them on. Whatever happens, `_end` is reached exactly once, and it
is the one place that settles both connections' fate and has the outcome recorded.

Nothing goes upstream before a Permit, and nothing before the first byte of an announced body: a client that sends a head
and then dawdles holds no upstream connection, and a body that is malformed from its start is never begun.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from keyproxy import headers, ports
from keyproxy.model import ANSWERED, Ending, Permit, RequestHead, ResponseHead
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire import answers
from keyproxy.wire.collector import Collector
from keyproxy.wire.framing import LAST_CHUNK, chunk
from keyproxy.wire.heads import has_no_body

if TYPE_CHECKING:
    from keyproxy.wire.client import ClientConnection
    from keyproxy.wire.pool import UpstreamPool
    from keyproxy.wire.upstream import UpstreamConnection

#: Body bytes held while there is no upstream connection to write them to; then the client is read no further.
_PENDING_BYTES_MAX: Final = 65_536

#: The status that is recorded where the client left before there was one. As nginx does.
_CLIENT_GONE_STATUS: Final = 499

_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})


class Exchange(ports.Exchange):
    """See the module. `head` is None if the request's head could not be read; then it can only be refused."""

    is_tunnel: bool = False
    _collector: Collector | None = None
    _is_held_up: bool = False
    _answer: ResponseHead | None = None
    _upstream: UpstreamConnection | None = None
    _pool: UpstreamPool | None = None
    _is_waiting: bool = False
    _is_retry: bool = False
    _has_begun_status_line: bool = False
    _is_answer_chunked: bool = False
    _closes: bool = False
    _out: bytes = b""

    def __init__(
        self,
        client: ClientConnection,
        head: RequestHead | None,
        request_id: bytes,
        started_mono: float,
        *,
        content: bytes = b"",
        is_complete: bool = True,
    ) -> None:
        """`content`: what has arrived of the body already; `is_complete`: whether that is all of it."""
        self._client = client
        self._server = client.server
        #: The one that decides on this request is the one that settles it, whatever configuration comes into force.
        self._gate = client.server.gate
        self.head = head
        self.request_id = request_id
        self.started_mono = started_mono
        self.bytes_in = len(content)
        self.is_complete = is_complete
        #: What has arrived of the body and is not sent yet.
        self.body = content

    # -- what the gateway decides

    def forward(self, permit: Permit) -> None:
        """Send the request upstream and relay the answer."""
        self.permit = permit
        head = self.head
        if head is None or self.is_over:
            self._gate.settle(self)
            return
        if not self.is_complete and head.fields.expects_continue and not self.bytes_in:
            self._client.send(answers.CONTINUE)
        self._go()

    def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal. If an answer has begun already, it is cut off so that the client can tell."""
        if self.is_over:
            return
        self.reason = refusal.reason
        self.refusal_detail = refusal.detail
        if self._answer is not None and not self._out:
            self._end(Ending.CUT, self._server.clock(), closes=True)
            return
        head, server = self.head, self._server
        answer = server.problems.answer(refusal, self.request_id.decode("ascii"), self._gate.error_shape(head))
        if self.permit is not None and not refusal.applied:
            answer = answer._replace(fields=answer.fields + self._gate.limit_fields(self.permit, server.clock()))
        closes = (
            head is None
            or not self.is_complete
            or not head.fields.keeps_alive
            or refusal.reason is Reason.REQUEST_MALFORMED
            or server.is_draining
        )
        is_head = head is not None and head.line.method == b"HEAD"
        self.status = answer.status
        self.bytes_out = 0 if is_head else len(answer.body)
        own = answers.own(answer, self.request_id, closes=closes, without_body=is_head)
        self._client.send(own.removeprefix(answers.BEGINNING) if self._has_begun_status_line else own)
        self._end(Ending.REFUSED, server.clock(), closes=closes)

    async def whole_body(self, otherwise: Refusal | None = None) -> None:
        """Wait until the body has arrived whole, or the exchange is over. `otherwise`: what one too large is told."""
        head = self.head
        if self.is_complete or self.is_over or head is None:
            return
        collector = self._collector = Collector(self._server.room, head.content_length, otherwise)
        collector.take(self.body)
        if head.fields.expects_continue and not self.bytes_in:
            self._client.send(answers.CONTINUE)
        self._client.resume()
        await collector.wait()

    def extend(self, permit: Permit) -> None:
        """Go on with a permit that holds more."""
        self.permit = permit
        if self._is_held_up:
            self._is_held_up = False
            if not self._client.is_stalled:
                self.resume_answer()

    def hold_up(self) -> None:
        """Read no more of the answer until more is held for it."""
        self._is_held_up = True
        self.pause_answer()

    def end_stream(self, refusal: Refusal) -> None:
        """End a stream of events here: its last event says why, and the answer ends as one that is whole does."""
        if self.is_over or self.meter is None or not self.meter.is_stream or not self._is_answer_chunked:
            self.refuse(refusal)
            return
        self.reason = refusal.reason
        self.refusal_detail = refusal.detail
        shape = self._gate.error_shape(self.head)
        told = self._server.problems.last_event(refusal, self.request_id.decode("ascii"), shape)
        out, self._out = self._out + chunk(self.meter.cut(told)) + LAST_CHUNK, b""
        self._client.send(out)
        self._end(Ending.CUT, self._server.clock(), closes=self._closes, resets=False)

    # -- what the client connection tells

    def body_arrived(self, content: bytes, *, is_complete: bool) -> None:
        """The next content of the request body, and whether it was the last."""
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

    def _collect(self, content: bytes, collector: Collector) -> None:
        try:
            collector.take(content)
        except Refusal as refusal:
            self.refuse(refusal)
        else:
            if self.is_complete:
                self.body = collector.whole()

    def client_gone(self) -> None:
        """The client connection is lost: whatever is under way upstream is ended."""
        if not self.is_over:
            if not self.status:
                self.status = _CLIENT_GONE_STATUS
            self._end(Ending.CLIENT_GONE, self._server.clock(), closes=True)

    def begin_status_line(self) -> None:
        """Send what every answer begins with, if nothing of one was sent yet.

        For a client that has closed its side: if it has left altogether, this makes its kernel say so, and what nobody
        waits for is ended. One that listens on gets the same answer, in two pieces.
        """
        if not self._has_begun_status_line and self._answer is None and not self.is_over:
            self._has_begun_status_line = True
            self._client.send(answers.BEGINNING)

    def close_tunnel(self) -> None:
        """One side of the tunnel has ended, or it has to end now. What is under way still arrives."""
        if self.is_tunnel and not self.is_over:
            self._end(ANSWERED, self._server.clock(), closes=True)

    def pause_answer(self) -> None:
        """The client does not read fast enough."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume_answer(self) -> None:
        """The client reads again."""
        if self._upstream is not None and not self._is_held_up:
            self._upstream.resume()

    # -- what the upstream connection tells

    def pause_request(self) -> None:
        """The upstream does not read fast enough."""
        if not self.is_complete:
            self._client.pause()

    def resume_request(self) -> None:
        """The upstream reads again."""
        if not self.is_complete:
            self._client.resume()

    def connected(self, upstream: UpstreamConnection) -> None:
        """An upstream connection is ours. Everything that is ready is written to it in one piece."""
        head, permit = self.head, self.permit
        assert head is not None  # noqa: S101 - for the type checker: forward() has seen both
        assert permit is not None  # noqa: S101
        self._is_waiting = False
        self._upstream = upstream
        block = head.block if self.block is None else self.block
        data = headers.dress(
            head, block, permit, request_id=self.request_id, forwarding=self._client.forwarding, host=upstream.host
        )
        if self.body:
            data += self._framed(self.body)
            self.body = b""
        elif head.fields.is_chunked:
            data += self._framed(b"")
        self.sent_mono = self._server.clock()
        upstream.begin(self, data, head.line.method, self.sent_mono, is_last=self.is_complete)
        if not self.is_complete:
            self._client.resume()

    def answer_begins(self, answer: ResponseHead, now: float) -> None:
        """The head of the answer. It is written with the first content, or at once if there is none yet."""
        head = self.head
        assert head is not None  # noqa: S101
        self.answered_mono = now
        self._answer = answer
        self.status = answer.line.status
        is_http_11 = head.line.minor_version == 1
        has_end = answer.fields.has_content_length or has_no_body(head.line.method, answer.line)
        self._is_answer_chunked = is_http_11 and not has_end
        self._closes = (
            not head.fields.keeps_alive
            or not self.is_complete
            or self._server.is_draining
            or not (has_end or is_http_11)
        )
        permit = self.permit
        own = b"" if permit is None or permit.hold is None else self._gate.limit_fields(permit, now)
        if self.identity is not None and self.identity.retiring_field is not None:
            own += self._gate.retiring_line(self.identity)
        if self.ask is not None:
            self.meter = self._gate.meter(self, answer)
        out = answers.relayed(
            answer,
            own,
            self.request_id,
            is_chunked=self._is_answer_chunked,
            closes=self._closes,
            is_http_11=is_http_11,
        )
        self._out = out.removeprefix(answers.BEGINNING) if self._has_begun_status_line else out

    def tunnel_begins(self, answer: ResponseHead, now: float) -> None:
        """The upstream has taken up the WebSocket handshake: from now on bytes travel as they are, both ways."""
        self.answered_mono = now
        self._answer = answer
        self.status = answer.line.status
        self._closes = self.is_tunnel = True
        self.is_complete = False
        own = b"" if self.identity is None else self._gate.retiring_line(self.identity)
        out = answers.switching(answer, own, self.request_id)
        self._client.send(out.removeprefix(answers.BEGINNING) if self._has_begun_status_line else out)
        self._client.enter_tunnel()

    def answer_arrived(self, content: bytes, now: float, *, is_last: bool) -> None:
        """The next content of the answer, and whether it was the last."""
        meter = self.meter
        if meter is not None:
            content = meter.feed(content)
            if is_last:
                content += meter.finish()
        out = self._out
        self.bytes_out += len(content)
        if not self._is_answer_chunked:
            out += content
        elif content or is_last:
            out += (chunk(content) if content else b"") + (LAST_CHUNK if is_last else b"")
        if out:
            self._out = b""
            self._client.send(out)
        if is_last:
            self._end(ANSWERED, now, closes=self._closes)
        elif meter is not None and meter.is_stream:
            self._gate.watch(self)

    def upstream_lost(self, refusal: Refusal) -> None:
        """The upstream failed this exchange, before or in the middle of its answer; or could not be had."""
        upstream, self._upstream = self._upstream, None
        self._is_waiting = False
        if upstream is not None and upstream.is_reused and self._may_repeat(refusal):
            # A connection that lay in the pool was closed by the other side as we took it.
            self._is_retry = True
            self._go()
        else:
            self.refuse(refusal)

    # -- the rest

    @property
    def asks_for_tunnel(self) -> bool:
        """Whether the request is a WebSocket handshake."""
        return self.head is not None and self.head.fields.opens_tunnel

    @property
    def has_answer(self) -> bool:
        """Whether the upstream has begun to answer."""
        return self._answer is not None

    def _go(self) -> None:
        """Take an upstream connection, once there is something to send on it."""
        permit = self.permit
        if permit is None or self._is_waiting or not (self.is_complete or self.body):
            return
        pool = self._server.upstreams.pool(is_test=permit.grant.identity.is_test)
        self._pool = pool
        upstream = None if self._is_retry else pool.take(self.started_mono)
        if upstream is not None:
            self.connected(upstream)
        else:
            self._is_waiting = True
            pool.wait(self)

    def _may_repeat(self, refusal: Refusal) -> bool:
        """Whether a second attempt changes nothing: never answered, idempotent, and without a body to send again."""
        head = self.head
        return (
            refusal.reason is Reason.UPSTREAM_UNREACHABLE
            and self._answer is None
            and not self._is_retry
            and head is not None
            and head.line.method in _IDEMPOTENT
            and not head.has_body
        )

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
                upstream.exchange_over(now, is_clean=was_answered and self.is_complete)
        self.body = b""
        if self._collector is not None:
            self._collector.leave()
        if self.permit is not None:
            self._gate.settle(self)
        server.recorder.record(self)
        self._client.exchange_over(now, closes=closes, is_cut=not was_answered and resets and ending is Ending.CUT)

    def __repr__(self) -> str:
        state = "over" if self.is_over else "relaying" if self._upstream else "waiting"
        return f"<Exchange {self.request_id.decode('ascii')} {state}>"
