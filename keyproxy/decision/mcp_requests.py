"""Read the MCP message of one exchange, whose body has arrived."""

from __future__ import annotations

from keyproxy.ai.tools.mcp_message import AT_ONCE_BYTES, McpMessage, McpReading, McpRules
from keyproxy.http_messages import RequestHead
from keyproxy.model import Missing
from keyproxy.ports.exchange import Exchange


def read(exchange: Exchange, head: RequestHead, rules: McpRules) -> McpMessage:
    """The message of an exchange whose body is complete.

    Raises Missing until a large one is read, a Refusal (REQUEST_MALFORMED, BODY_TOO_LARGE).
    """
    reading = exchange.mcp
    if reading is None:
        reading = exchange.mcp = McpReading(head, exchange.body, rules)
        if len(exchange.body) <= AT_ONCE_BYTES:
            while not _advance(exchange, reading):
                pass
    if reading.message is None:
        raise Missing("reading", lambda _patience: exchange.in_turns(lambda: _advance(exchange, reading)))
    return reading.message


def _advance(exchange: Exchange, reading: McpReading) -> bool:
    try:
        return reading.advance()
    finally:
        exchange.rpc_id = reading.rpc_id
