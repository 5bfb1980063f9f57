"""Write the response to a client: one of ours, or the upstream's, reframed.

    unsent -> held back -> begun -> ended

A client gets one response. Its head is held back until the bytes that arrived with it are checked, so that both are
sent in one write; until then one of ours can still replace it.
"""

from __future__ import annotations

from keyproxy.http.own_response import OwnResponse
from keyproxy.http_messages import RequestHead, ResponseHead
from keyproxy.wire.client.transport import ClientTransport
from keyproxy.wire.parsing.framing import CHUNK_BEGINNING, chunks
from keyproxy.wire.parsing.head_parser import has_no_body
from keyproxy.wire.phases import BEGUN, ENDED, HELD_BACK, RESPONSE, UNSENT
from keyproxy.wire.responses import response_heads


class ResponseWriter:
    """Writes the response to one request.

    `is_chunked`: the client gets it in chunks. `closes`: the connection ends with it. `ends_with_close`: only the end
    of the connection marks the end of the response.
    """

    is_chunked: bool = False
    closes: bool = False
    ends_with_close: bool = False
    _phase: int = UNSENT
    #: The head of the upstream's response, until the bytes that arrived with it are checked.
    _held_back: bytes = b""
    #: The first bytes of the next head, if they were sent ahead of it.
    _sent_ahead: bytes = b""
    _has_probed: bool = False

    def __init__(self, transport: ClientTransport, request_id: bytes) -> None:
        self._transport = transport
        self._request_id = request_id

    @property
    def is_replaceable(self) -> bool:
        """Whether a response of ours can still be sent instead."""
        return self._phase <= HELD_BACK

    def send_own(self, head: RequestHead | None, response: OwnResponse, date_line: bytes, *, closes: bool) -> None:
        """Send a response of ours to `head`, complete; None: the head could not be read."""
        self._phase = RESPONSE.step(self._phase, ENDED)
        self._held_back = b""
        self.closes = closes
        own = response_heads.own(
            response,
            self._request_id,
            date_line,
            closes=closes,
            without_body=head is not None and head.line.method == b"HEAD",
            is_http_11=head is None or head.line.minor_version == 1,
        )
        self._transport.send(own.removeprefix(self._sent_ahead))

    def probe_client(self) -> None:
        """Find out whether a client that has closed its sending side still reads: send the first bytes of what follows.

        If it has closed the connection entirely, its kernel responds with a reset, and the abandoned exchange ends. A
        half-closed client gets the same response, in more pieces.
        """
        if self._has_probed:
            return
        if self._phase == UNSENT:
            self._sent_ahead = response_heads.BEGINNING
            self._transport.send(response_heads.BEGINNING)
        elif self._phase == BEGUN and self.is_chunked:
            self._transport.send(CHUNK_BEGINNING)
        self._has_probed = True

    def send_interim(self, response: ResponseHead) -> None:
        """Send an interim response, before the final one."""
        out = response_heads.interim(response, self._request_id)
        self._transport.send(out.removeprefix(self._sent_ahead))
        self._sent_ahead = b""

    def begin(self, head: RequestHead, response: ResponseHead, lines: bytes, *, may_continue: bool) -> None:
        """Begin a relayed response to `head`. `lines`: the upstream's and ours.

        `may_continue`: another request may follow on this connection, as far as the caller knows.
        """
        self._phase = RESPONSE.step(self._phase, HELD_BACK)
        is_http_11 = head.line.minor_version == 1
        has_end = response.fields.has_content_length or has_no_body(head.line.method, response.line)
        self.is_chunked = is_http_11 and not has_end
        self.ends_with_close = not (has_end or is_http_11)
        self.closes = not may_continue or self.ends_with_close
        out = response_heads.relayed(
            response, lines, self._request_id, is_chunked=self.is_chunked, closes=self.closes, is_http_11=is_http_11
        )
        self._held_back = out.removeprefix(self._sent_ahead) if self._sent_ahead else out

    def begin_tunnel(self, response: ResponseHead, lines: bytes) -> None:
        """Accept a WebSocket handshake: from now on content is written unchanged."""
        self._phase = RESPONSE.step(self._phase, BEGUN)
        self.closes = True
        out = response_heads.switching(response, lines, self._request_id)
        self._transport.send(out.removeprefix(self._sent_ahead))

    def write(self, content: bytes, *, is_last: bool) -> None:
        """Write the next content, with the head if it is held back."""
        out = self._held_back
        if not self.is_chunked:
            out = out + content
        elif content or is_last:
            out = out + chunks(content, is_last=is_last)
        if is_last:
            self._phase = RESPONSE.step(self._phase, ENDED)
        elif self._held_back:
            self._phase = RESPONSE.step(self._phase, BEGUN)
        if out:
            self._held_back = b""
            self._transport.send(out)

    def end_early(self, last_chunks: bytes) -> None:
        """End a stream of events here, as if it were complete."""
        self._phase = RESPONSE.step(self._phase, ENDED)
        out, self._held_back = self._held_back + last_chunks, b""
        self._transport.send(out)

    def __repr__(self) -> str:
        return f"<ResponseWriter {RESPONSE.names[self._phase]}>"
