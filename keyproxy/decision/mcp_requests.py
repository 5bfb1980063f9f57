"""Read the MCP message of one exchange."""

from __future__ import annotations

from typing import Final

from keyproxy.ai.requests.request_facts import malformed
from keyproxy.ai.tools.mcp_message import AT_ONCE_BYTES, McpMessage, McpReading, McpRules, check_head, too_large
from keyproxy.http_messages import RequestHead
from keyproxy.model import Missing
from keyproxy.ports.exchange import Exchange

_POST: Final = b"POST"


def read(exchange: Exchange, head: RequestHead, rules: McpRules) -> McpMessage | None:
    """The message of an exchange; None for a method without one, which belongs to a session and calls nothing.

    Raises Missing until the body has arrived and is read, a Refusal (REQUEST_MALFORMED, BODY_TOO_LARGE).
    """
    if head.line.method != _POST:
        if head.has_body:
            # A server that takes the request for a POST, by a header or by itself, must not find a call in it.
            raise malformed("Only POST has a body on this route.")
        return None
    reading = exchange.mcp
    if reading is None:
        reading = exchange.mcp = _begin(exchange, head, rules)
        if len(exchange.body) <= AT_ONCE_BYTES:
            while not _advance(exchange, reading):
                pass
    if reading.message is None:
        raise Missing("reading", lambda _patience: exchange.in_turns(lambda: _advance(exchange, reading)))
    return reading.message


def _begin(exchange: Exchange, head: RequestHead, rules: McpRules) -> McpReading:
    if not exchange.is_complete:
        check_head(head)
        if head.content_length > rules.body_bytes_max:
            raise too_large(rules)
        bytes_max = rules.body_bytes_max
        raise Missing("body", lambda _patience: exchange.whole_body(too_large(rules), bytes_max=bytes_max))
    return McpReading(head, exchange.body, rules)


def _advance(exchange: Exchange, reading: McpReading) -> bool:
    try:
        return reading.advance()
    finally:
        exchange.rpc_id = reading.rpc_id
