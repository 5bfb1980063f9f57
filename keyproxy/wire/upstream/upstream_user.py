"""The interface that an upstream connection and its pool require of an exchange. `Exchange` implements it."""

from __future__ import annotations

from keyproxy.http_messages import ResponseHead
from keyproxy.ports import exchange
from keyproxy.reasons import Refusal
from keyproxy.wire.upstream import retry


class UpstreamUser(exchange.Exchange):
    """An exchange, as seen by its upstream connection."""

    # What every exchange sets. Objects share the layout of 30 further attributes; one with more needs a dict of its own.
    __slots__ = ("body", "bytes_in", "head", "is_complete", "peer", "request_id", "started_mono")

    @property
    def is_tunnel_request(self) -> bool:
        """Whether the request is a WebSocket handshake."""
        return self.head is not None and self.head.fields.opens_tunnel

    @property
    def is_tunnel(self) -> bool:
        """Whether bytes are relayed unchanged."""
        raise NotImplementedError

    @property
    def has_response(self) -> bool:
        """Whether the upstream has begun to respond."""
        raise NotImplementedError

    @property
    def is_idempotent(self) -> bool:
        """Whether the request may be sent again without harm."""
        return retry.is_idempotent(self.head)

    @property
    def has_claim(self) -> bool:
        """Whether the request has used an approval, so that it is sent once, on a new connection."""
        return self.tool_call is not None and self.tool_call.claim is not None

    @property
    def may_reuse(self) -> bool:
        """Whether the request may go on a connection that is open."""
        head, call = self.head, self.tool_call
        return (head is None or not head.fields.opens_tunnel) and (call is None or call.claim is None)

    def may_retry(self, refusal: Refusal, *, is_reused: bool) -> bool:
        """Whether the request may be sent again, on another connection."""
        return not self.has_claim and retry.may_retry(self.head, refusal, is_reused=is_reused)

    def upstream_lost(self, refusal: Refusal) -> None:
        """No connection was available, or the upstream failed before its response was complete."""
        raise NotImplementedError

    def response_begins(self, response: ResponseHead, now: float) -> None:
        """Take the head of the response."""
        raise NotImplementedError

    def interim_arrived(self, response: ResponseHead) -> None:
        """Take an interim (1xx) response."""
        raise NotImplementedError

    def response_arrived(self, content: bytes, now: float, *, is_last: bool) -> None:
        """Take the next content of the response, and whether it was the last."""
        raise NotImplementedError

    def tunnel_begins(self, response: ResponseHead, now: float) -> None:
        """The upstream accepted the WebSocket handshake."""
        raise NotImplementedError

    def close_tunnel(self) -> None:
        """One side of the tunnel has ended."""
        raise NotImplementedError

    def pause_request(self) -> None:
        """The upstream does not read fast enough."""
        raise NotImplementedError

    def resume_request(self) -> None:
        """The upstream reads again."""
        raise NotImplementedError

    def is_read_slowly(self, now: float, *, for_seconds: float) -> bool:
        """Whether the client has read the response so slowly for so long that it holds up the upstream's connection."""
        raise NotImplementedError

    def preempt(self, refusal: Refusal) -> None:
        """End the exchange, to free the connection for other requests."""
        raise NotImplementedError
