"""What the head of an upstream's response means to its exchange, before it is relayed."""

from __future__ import annotations

from typing import Final

from keyproxy.http_messages import ResponseHead
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.gate import Gate
from keyproxy.wire.parsing.head_parser import has_no_body, without_length

_UNAUTHORIZED: Final = 401


def prepare(exchange: Exchange, response: ResponseHead, gate: Gate, now: float) -> ResponseHead:
    """Select what reads and edits the content; return the head for the client. Raises a Refusal (UPSTREAM_INVALID)."""
    credential = exchange.upstream_credential
    if credential is not None:
        if response.line.status == _UNAUTHORIZED:
            gate.credential_refused(exchange, credential, now)
        else:
            credential.note_response(response.line.status, exchange.sent_mono)
    if exchange.metered is not None:
        exchange.meter = gate.meter(exchange, response)
    if exchange.tool_list is not None:
        return _begin_filter(exchange, response)
    return response


def note_credential(exchange: Exchange) -> None:
    """Note that the upstream has accepted the credential of a WebSocket handshake."""
    if exchange.upstream_credential is not None:
        exchange.upstream_credential.note_response(exchange.status, exchange.sent_mono)


def _begin_filter(exchange: Exchange, response: ResponseHead) -> ResponseHead:
    head, tool_list = exchange.head, exchange.tool_list
    is_empty = head is None or has_no_body(head.line.method, response.line)
    if tool_list is None or is_empty or (response.fields.has_content_length and not response.content_length):
        exchange.tool_list = None
        return response
    tool_list.begin(response.fields)
    # The content can become shorter.
    return without_length(response) if response.fields.has_content_length else response
