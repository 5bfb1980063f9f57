"""Write the response to a client: a refusal of ours, or the upstream's response, reframed.

    nothing -> head held back -> begun -> whole, or cut off

A client gets one response. Its head is held back until the bytes that arrived with it are checked, so that both are
sent in one write; until then a refusal can still replace it. A response that has begun continues, or is cut off
visibly: by a reset of the connection, or for a stream by a last event with the reason.

The exchange handles the request and the upstream.
"""

from __future__ import annotations

from typing import Final

from keyproxy.ai.dialects.endpoint import StreamFormat
from keyproxy.ai.dialects.error_shapes import bedrock_error_type
from keyproxy.http import headers
from keyproxy.model import ANSWERED, Ending, RequestHead, ResponseHead
from keyproxy.reasons import Reason, Refusal
from keyproxy.wire import response_heads
from keyproxy.wire.client.transport import ClientTransport
from keyproxy.wire.context import ServerContext
from keyproxy.wire.parsing.framing import LAST_CHUNK, chunk
from keyproxy.wire.parsing.head_parser import has_no_body
from keyproxy.wire.upstream.pool import PoolUser

_CONTINUE: Final = 100


class ResponseWriter(PoolUser):
    """Writes responses to the client. `Exchange` is the subclass, and defines how an exchange ends."""

    _answer: ResponseHead | None = None
    _has_begun_status_line: bool = False
    #: Whether only the end of the connection marks the end of the response.
    ends_with_close: bool = False
    _has_interim: bool = False
    _is_chunked: bool = False
    _closes: bool = False
    #: The head of the upstream's response, until the bytes that arrived with it are checked.
    _held_back: bytes = b""

    def __init__(
        self,
        client: ClientTransport,
        server: ServerContext,
        head: RequestHead | None,
        request_id: bytes,
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
        self.request_id = request_id
        self.started_mono = started_mono
        self.bytes_in = len(content)
        self.is_complete = is_complete
        #: The part of the body that has arrived and is not sent yet.
        self.body = content

    # -- by us

    def refuse(self, refusal: Refusal) -> None:
        """Respond with a refusal. If a response has begun already, it is cut off visibly."""
        if self.is_over:
            return
        self._note(refusal)
        if self._answer is not None and not self._held_back:
            self._end(Ending.CUT, self._server.clock(), closes=True)
            return
        head, server = self.head, self._server
        answer = server.problems.answer(refusal, self.request_id.decode("ascii"), self._gate.error_shape(head))
        if self.permit is not None and not refusal.applied:
            answer = answer._replace(fields=answer.fields + self._gate.limit_headers(self.permit, server.clock()))
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
        own = response_heads.own(answer, self.request_id, server.date_line(), closes=closes, without_body=is_head)
        self._client.send(own.removeprefix(response_heads.BEGINNING) if self._has_begun_status_line else own)
        self._end(Ending.REFUSED, server.clock(), closes=closes)

    def _note(self, refusal: Refusal) -> None:
        self.reason = refusal.reason
        self.refusal_detail = refusal.detail
        if refusal.limit is not None:
            self.policy = refusal.limit.policy.name

    def end_stream(self, refusal: Refusal) -> None:
        """End a stream here: its last event has the reason, and the response ends like a complete one."""
        if self.is_over or self.meter is None or not self.meter.is_stream or not self._is_chunked:
            self.refuse(refusal)
            return
        self._note(refusal)
        shape = self._gate.error_shape(self.head)
        problems, request_id = self._server.problems, self.request_id.decode("ascii")
        if self.meter.format is StreamFormat.SSE:
            end = self.meter.cut(problems.last_event(refusal, request_id, shape))
        else:
            exception = bedrock_error_type(problems.status_of(refusal))
            end = self.meter.cut(problems.last_document(refusal, request_id, shape), exception=exception)
        out, self._held_back = self._held_back + (chunk(end) if end else b"") + LAST_CHUNK, b""
        self._client.send(out)
        self._end(Ending.CUT, self._server.clock(), closes=self._closes, resets=False)

    def begin_status_line(self) -> None:
        """Send the first bytes that all responses have in common, if nothing was sent yet.

        For a client that has closed its sending side: if it has closed the connection entirely, its kernel responds
        with a reset, and the abandoned exchange ends. A half-closed client gets the same response, in two pieces.
        """
        if not self._has_begun_status_line and self._answer is None and not self.is_over:
            self._has_begun_status_line = True
            self._client.send(response_heads.BEGINNING)

    # -- by the upstream

    @property
    def has_response(self) -> bool:
        """Whether the upstream has begun to respond."""
        return self._answer is not None

    def interim_arrived(self, answer: ResponseHead) -> None:
        """An interim response, such as 103. RFC 9110 section 15.2: relay it, unless keyproxy sends it itself.

        HTTP/1.0 has none. A client that expects 100 gets it from keyproxy.
        """
        self._has_interim = True
        head = self.head
        if head is None or head.line.minor_version == 0:
            return
        if answer.line.status == _CONTINUE and head.fields.expects_continue:
            return
        out = response_heads.interim(answer, self.request_id)
        self._client.send(out.removeprefix(response_heads.BEGINNING) if self._has_begun_status_line else out)
        self._has_begun_status_line = False

    def response_begins(self, answer: ResponseHead, now: float) -> None:
        """Take the head of the response. `response_arrived` writes it, together with the first content."""
        head = self.head
        assert head is not None  # noqa: S101 - for the type checker: it was forwarded
        self.answered_mono = now
        self._answer = answer
        self.status = answer.line.status
        is_http_11 = head.line.minor_version == 1
        has_end = answer.fields.has_content_length or has_no_body(head.line.method, answer.line)
        self._is_chunked = is_http_11 and not has_end
        self._closes = (
            not head.fields.keeps_alive
            or not self.is_complete
            or self._server.is_draining
            or not (has_end or is_http_11)
        )
        self.ends_with_close = not (has_end or is_http_11)
        lines = self._lines(answer, now)
        if not answer.fields.has_date:
            # RFC 9110 section 6.6.1: a recipient with a clock adds what the origin server left out.
            lines += self._server.date_line()
        if self.ask is not None:
            self.meter = self._gate.meter(self, answer)
        out = response_heads.relayed(
            answer,
            lines,
            self.request_id,
            is_chunked=self._is_chunked,
            closes=self._closes,
            is_http_11=is_http_11,
        )
        self._held_back = out.removeprefix(response_heads.BEGINNING) if self._has_begun_status_line else out

    def tunnel_begins(self, answer: ResponseHead, now: float) -> None:
        """The upstream accepted the WebSocket handshake: from now on bytes are relayed unchanged, both ways."""
        self.answered_mono = now
        self._answer = answer
        self.status = answer.line.status
        self._closes = self.is_tunnel = True
        self.is_complete = False
        out = response_heads.switching(answer, self._lines(answer, now), self.request_id)
        self._client.send(out.removeprefix(response_heads.BEGINNING) if self._has_begun_status_line else out)
        self._client.enter_tunnel()

    def _lines(self, answer: ResponseHead, now: float) -> bytes:
        """Return the client's header lines: the upstream's and ours. If our limits apply, only ours describe limits."""
        block, permit = answer.block, self.permit
        if permit is not None and permit.hold is not None:
            limits = self._gate.limit_headers(permit, now)
            if limits and answer.fields.states_limits:
                block = headers.without_limits(block)
            block += limits
        if self.identity is not None and self.identity.retiring_field is not None:
            block += self._gate.retiring_header(self.identity)
        return block

    def response_arrived(self, content: bytes, now: float, *, is_last: bool) -> None:
        """Take the next content of the response, and whether it was the last."""
        meter = self.meter
        if meter is not None:
            content = meter.feed(content)
            if is_last:
                content += meter.finish()
        out = self._held_back
        self.bytes_out += len(content)
        if not self._is_chunked:
            out += content
        elif content or is_last:
            out += (chunk(content) if content else b"") + (LAST_CHUNK if is_last else b"")
        if out:
            self._held_back = b""
            self._client.send(out)
        if is_last:
            self._end(ANSWERED, now, closes=self._closes)
        elif meter is not None and meter.is_stream:
            self._gate.watch(self)

    def _end(self, ending: Ending, now: float, *, closes: bool, resets: bool = True) -> None:
        """End the exchange. `closes`: close the client's connection too. Not `resets`: a cut that ends it cleanly."""
        raise NotImplementedError
