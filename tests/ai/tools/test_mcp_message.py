"""Which messages of MCP are read, and what each refusal is: every row on both sides of its edge."""

from __future__ import annotations

import json
from typing import Any

import pytest

from keyproxy.ai.tools.mcp_message import McpMessage, McpRules, parse_mcp
from keyproxy.http_messages import RequestFields, RequestHead, RequestLine
from keyproxy.reasons import Reason, Refusal

RULES = McpRules(("2025-06-18", "2025-11-25", "2026-07-28"), 4096)
LINE = RequestLine(b"POST", b"/mcp", b"/mcp", 1, b"POST /mcp HTTP/1.1\r\n")
JSON = b"application/json"

#: The codes, by their meaning.
NOT_JSON = -32700
INVALID = -32600
MISMATCH = -32020
UNSUPPORTED = -32022

CALL: dict[str, Any] = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "search"}}
STATED = {"io.modelcontextprotocol/protocolVersion": "2026-07-28"}
STATELESS_CALL: dict[str, Any] = {**CALL, "params": {"name": "search", "arguments": {}, "_meta": STATED}}
STATELESS = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": "search"}


def head(lines: bytes = b"", *, media_type: bytes = JSON, codings: tuple[bytes, ...] = (), clear: bool = True) -> Any:
    fields = RequestFields(
        host=b"h", host_block=b"", media_type=media_type, codings=codings, has_clear_type=clear, has_content_length=True
    )
    return RequestHead(LINE, fields, b"Host: h\r\n" + lines + b"Accept: */*\r\n", (), 1)


def lines(headers: dict[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()


def read(body: bytes | dict[str, Any], headers: dict[str, str] | bytes = b"") -> McpMessage:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_mcp(head(headers if isinstance(headers, bytes) else lines(headers)), content, RULES)


def refusal(body: bytes | dict[str, Any], headers: dict[str, str] | bytes = b"") -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(body, headers)
    assert caught.value.reason is Reason.REQUEST_MALFORMED
    return caught.value


def code(body: bytes | dict[str, Any], headers: dict[str, str] | bytes = b"") -> int:
    found = refusal(body, headers).rpc_code
    return INVALID if found is None else found


def test_call_names_its_tool_and_keeps_its_parameters_as_written() -> None:
    body = b'{"id":"a\\u0062","params": {"arguments":{"n":1.50},"name":"s\\u0065arch"} ,"method":"tools/call","jsonrpc":"2.0"}'
    message = read(body, {"mcp-protocol-version": "2025-06-18"})
    assert (message.method, message.tool, message.rpc_id, message.version) == (
        "tools/call", "search", b'"a\\u0062"', "2025-06-18",
    )  # fmt: skip
    assert message.params == b'{"arguments":{"n":1.50},"name":"s\\u0065arch"}'


@pytest.mark.parametrize(
    ("body", "method", "rpc_id"),
    [
        (b'{"jsonrpc":"2.0","id":-1,"method":"ping"}', "ping", b"-1"),
        (b'{"jsonrpc":"2.0","id":0,"method":"ping","params":null}', "ping", b"0"),
        (b'{"jsonrpc":"2.0","method":"notifications/initialized"}', "notifications/initialized", b""),
        (b'{"jsonrpc":"2.0","id":1,"result":{}}', "", b""),
        (b'{"jsonrpc":"2.0","id":"x","error":{"code":1,"message":"m"}}', "", b""),
        (b'{"jsonrpc":"2.0","id":1,"method":"x/y","params":{"list":[[]],"Key":1,"key":2}}', "x/y", b"1"),
        (b'{"jsonrpc":"2.0","id":"%b","method":"ping"}' % (b"i" * 128), "ping", b'"%b"' % (b"i" * 128)),
    ],
)
def test_message_that_calls_no_tool_is_read(body: bytes, method: str, rpc_id: bytes) -> None:
    message = read(body)
    assert (message.method, message.tool, message.rpc_id, message.version) == (method, None, rpc_id, "")
