"""Read the MCP message of one exchange, whose body has arrived; and prepare the response to a list of tools."""

from __future__ import annotations

from keyproxy.ai.requests.forwarded_headers import for_metering
from keyproxy.ai.tools.mcp_message import AT_ONCE_BYTES, McpMessage, McpReading, McpRules
from keyproxy.ai.tools.tool_list_filter import ToolListFilter
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


def filter_list(exchange: Exchange, head: RequestHead, allowed: frozenset[str]) -> None:
    """Let the response list only these tools, and request it in an encoding that can be read."""
    if exchange.tool_list is None:
        exchange.tool_list = ToolListFilter(allowed)
        block = head.block if exchange.block is None else exchange.block
        exchange.block = for_metering(block, accepts_codings=head.fields.accepts_codings)
