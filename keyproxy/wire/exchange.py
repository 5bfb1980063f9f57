"""One request and its answer, between one client connection and at most one upstream connection.

    reading head -> deciding -> (waiting for body, connecting) -> relaying -> over

The exchange owns no socket. The client connection tells it what arrives of the request, the upstream connection what
arrives of the answer; it frames both anew and pushes them on. Whatever happens, `_end` is reached exactly once, and it
is the one place that settles both connections' fate and has the outcome recorded.

Nothing goes upstream before a Permit, and nothing before the first byte of an announced body: a client that sends a head
and then dawdles holds no upstream connection, and a body that is malformed from its start is never begun.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from keyproxy import headers
from keyproxy.model import Ending, Identity, Permit, RequestHead, ResponseHead, Route
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire import answers
from keyproxy.wire.framing import LAST_CHUNK, chunk
from keyproxy.wire.heads import has_no_body

if TYPE_CHECKING:
    from keyproxy.wire.client import ClientConnection
    from keyproxy.wire.upstream import UpstreamConnection

#: Body bytes held while there is no upstream connection to write them to; then the client is read no further.
_PENDING_BYTES_MAX: Final = 65_536

_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})


class Exchange:
    """See the module. `head` is None if the request's head could not be read; then it can only be refused."""

    __slots__ = (
        "_answer",
        "_client",
        "_closes",
        "_is_retry",
        "_is_waiting",
        "_out",
        "_pending",
        "_pending_bytes",
        "_upstream",
        "answered_mono",
        "bytes_in",
        "bytes_out",
        "ended_mono",
        "ending",
        "head",
        "identity",
        "is_complete",
        "is_over",
        "permit",
        "reason",
        "refusal_detail",
        "request_id",
        "route",
        "sent_mono",
        "started_mono",
        "status",
    )  # fmt: skip

    def __init__(self, client: ClientConnection, head: RequestHead | None, request_id: bytes) -> None:
        self._client = client
        self.head = head
        self.request_id = request_id
        self.started_mono = client.server.clock()
        self.sent_mono = 0.0
        self.answered_mono = 0.0
        self.ended_mono = 0.0
        self.identity: Identity | None = None
        self.route: Route | None = None
        self.permit: Permit | None = None
        self.reason: Reason | None = None
        self.refusal_detail = ""
        self.ending = Ending.ANSWERED
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.is_complete = head is None
        self.is_over = False
        self._answer: ResponseHead | None = None
        self._upstream: UpstreamConnection | None = None
        self._is_waiting = False
        self._is_retry = False
        self._closes = False
        self._out = b""
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    # -- what the gateway decides

    def forward(self, permit: Permit) -> None:
        """Send the request upstream and relay the answer."""
        self.permit = permit
        head = self.head
        if head is None or self.is_over:
            return
        if head.fields.expects_continue and not self.is_complete and not self.bytes_in:
            self._client.send(answers.CONTINUE)
        self._go()

    def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal. If an answer has begun already, it is cut off so that the client can tell."""
        if self.is_over:
            return
        self.reason = refusal.reason
        self.refusal_detail = refusal.detail
        if self.bytes_out:
            self._end(Ending.CUT, closes=True)
            return
        head, server = self.head, self._client.server
        shape = server.gate.error_shape(head)
        answer = server.problems.answer(refusal, self.request_id.decode("ascii"), shape)
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
        self._client.send(answers.own(answer, self.request_id, closes=closes, without_body=is_head))
        self._end(Ending.REFUSED, closes=closes)

    # -- what the client connection tells

    def body_arrived(self, content: bytes, *, is_complete: bool) -> None:
        """The next content of the request body, and whether it was the last."""
        self.bytes_in += len(content)
        self.is_complete = is_complete
        limit = self._client.server.listen.body_bytes_max
        if limit and self.bytes_in > limit:
            self.refuse(Refusal(Reason.BODY_TOO_LARGE))
        elif self._upstream is not None:
            self._upstream.send(self._framed(content), is_last=is_complete)
        else:
            if content:
                self._pending.append(content)
                self._pending_bytes += len(content)
            if self._pending_bytes > _PENDING_BYTES_MAX:
                self._client.pause()
            if self.permit is not None:
                self._go()

    def client_gone(self) -> None:
        """The client connection is lost: whatever is under way upstream is ended."""
        if not self.is_over:
            if not self.status:
                self.status = 499
            self._end(Ending.CLIENT_GONE, closes=True)

    def pause_answer(self) -> None:
        """The client does not read fast enough."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume_answer(self) -> None:
        """The client reads again."""
        if self._upstream is not None:
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
        head, permit, server = self.head, self.permit, self._client.server
        assert head is not None  # noqa: S101 - for the type checker: forward() has seen both
        assert permit is not None  # noqa: S101
        self._is_waiting = False
        self._upstream = upstream
        first = headers.dress(
            head, permit, request_id=self.request_id, forwarding=self._client.forwarding, host=upstream.host
        )
        pending, self._pending = self._pending, []
        self._pending_bytes = 0
        body = self._framed(pending[0] if len(pending) == 1 else b"".join(pending)) if head.has_body else b""
        self.sent_mono = server.clock()
        upstream.begin(self, first + body, method=head.line.method, is_last=self.is_complete)
        if not self.is_complete:
            self._client.resume()

    def answer_begins(self, answer: ResponseHead) -> None:
        """The head of the answer. It is written with the first content, or at once if there is none yet."""
        head = self.head
        assert head is not None  # noqa: S101
        self.answered_mono = self._client.server.clock()
        self._answer = answer
        status = self.status = answer.line.status
        has_length = answer.fields.has_content_length or has_no_body(head.line.method, status)
        self._closes = (
            not head.fields.keeps_alive
            or not self.is_complete
            or self._client.server.is_draining
            or (not has_length and not head.line.minor_version)
        )
        self._out = answers.relayed(
            answer,
            self.request_id,
            is_chunked=not has_length and bool(head.line.minor_version),
            closes=self._closes,
            client_minor_version=head.line.minor_version,
        )

    def answer_arrived(self, content: bytes, *, is_last: bool) -> None:
        """The next content of the answer, and whether it was the last."""
        head, answer = self.head, self._answer
        assert head is not None  # noqa: S101
        assert answer is not None  # noqa: S101
        out, self._out = self._out, b""
        self.bytes_out += len(content)
        if (
            answer.fields.has_content_length
            or not head.line.minor_version
            or has_no_body(head.line.method, self.status)
        ):
            out += content
        else:
            out += (chunk(content) if content else b"") + (LAST_CHUNK if is_last else b"")
        if out:
            self._client.send(out)
        if is_last:
            self._end(Ending.ANSWERED, closes=self._closes)

    def upstream_lost(self, refusal: Refusal) -> None:
        """The upstream failed this exchange, before or in the middle of its answer."""
        upstream, self._upstream = self._upstream, None
        if self._answer is not None:
            self.reason, self.refusal_detail = refusal.reason, refusal.detail
            self._end(Ending.CUT, closes=True)
        elif upstream is not None and upstream.is_reused and self._may_repeat(refusal) and not self._is_retry:
            # A connection that lay in the pool was closed by the other side as we took it.
            self._is_retry = True
            self._go()
        else:
            self.refuse(refusal)

    # -- the rest

    @property
    def has_answer(self) -> bool:
        """Whether the upstream has begun to answer."""
        return self._answer is not None

    def _go(self) -> None:
        """Take an upstream connection, once there is something to send on it."""
        head, permit = self.head, self.permit
        if head is None or permit is None or self._is_waiting or self._upstream is not None:
            return
        if head.has_body and not self.is_complete and not self._pending:
            return
        pool = self._client.server.upstreams.pool(is_test=permit.grant.identity.is_test)
        upstream = None if self._is_retry else pool.take()
        if upstream is not None:
            self.connected(upstream)
        else:
            self._is_waiting = True
            pool.wait(self)

    def _may_repeat(self, refusal: Refusal) -> bool:
        """Whether a second attempt changes nothing: idempotent, without a body to send again, and never answered."""
        head = self.head
        is_lost = refusal.reason is Reason.UPSTREAM_UNREACHABLE
        return is_lost and head is not None and head.line.method in _IDEMPOTENT and not head.has_body

    def _framed(self, content: bytes) -> bytes:
        if self.head is None or not self.head.fields.is_chunked:
            return content
        return (chunk(content) if content else b"") + (LAST_CHUNK if self.is_complete else b"")

    def _end(self, ending: Ending, *, closes: bool) -> None:
        if self.is_over:
            return
        self.is_over = True
        self.ending = ending
        server = self._client.server
        self.ended_mono = server.clock()
        if self._is_waiting and self.permit is not None:
            server.upstreams.pool(is_test=self.permit.grant.identity.is_test).wait_no_more(self)
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.exchange_over(is_clean=ending is Ending.ANSWERED and self.is_complete)
        self._pending.clear()
        server.gate.over(self)
        self._client.exchange_over(closes=closes, is_cut=ending is Ending.CUT)

    def __repr__(self) -> str:
        state = "over" if self.is_over else "relaying" if self._upstream else "waiting"
        return f"<Exchange {self.request_id.decode('ascii')} {state}>"
