"""Which messages of MCP are read, and what each refusal is: every row on both sides of its edge."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from keyproxy.ai.tools.mcp_message import McpMessage, McpReading, McpRules, parse_mcp
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
    params = b'{"arguments":{"n":1.50},"name":"s\\u0065arch"}'
    body = b'{"id":"a\\u0062","params": %b ,"method":"tools/call","jsonrpc":"2.0"}' % params
    message = read(body, {"mcp-protocol-version": "2025-06-18"})
    assert (message.method, message.tool, message.rpc_id, message.version) == (
        "tools/call", "search", b'"a\\u0062"', "2025-06-18",
    )  # fmt: skip
    assert message.params == params


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


MALFORMED: list[tuple[bytes, int]] = [
    (b"", NOT_JSON),
    (b"{", NOT_JSON),
    (b'{"jsonrpc":"2.0","id":1,"method":"ping"}x', NOT_JSON),
    (b'{"jsonrpc":"2.0","id":1,"method":"\xff"}', NOT_JSON),
    (b'\xef\xbb\xbf{"jsonrpc":"2.0","id":1,"method":"ping"}', NOT_JSON),
    (b'{"jsonrpc":"2.0","id":1,"method":"\\ud800"}', NOT_JSON),
    (b"null", INVALID),
    (b"[]", INVALID),
    (b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]', INVALID),
    (b"{}", INVALID),
    (b'{"id":1,"method":"ping"}', INVALID),
    (b'{"jsonrpc":2.0,"id":1,"method":"ping"}', INVALID),
    (b'{"jsonrpc":"1.0","id":1,"method":"ping"}', INVALID),
    (b'{"jsonrpc":"2.0","id":1}', INVALID),
    (b'{"jsonrpc":"2.0","id":1,"method":null}', INVALID),
    (b'{"jsonrpc":"2.0","id":1,"method":["tools/call"]}', INVALID),
    (b'{"jsonrpc":"2.0","id":1,"method":""}', INVALID),
    (b'{"jsonrpc":"2.0","id":1,"method":"pi ng"}', INVALID),
    (b'{"jsonrpc":"2.0","id":1,"method":"p\\u00efng"}', INVALID),
    (b'{"jsonrpc":"2.0","id":null,"method":"ping"}', INVALID),
    (b'{"jsonrpc":"2.0","id":1.0,"method":"ping"}', INVALID),
    (b'{"jsonrpc":"2.0","id":1e1,"method":"ping"}', INVALID),
    (b'{"jsonrpc":"2.0","id":true,"method":"ping"}', INVALID),
    (b'{"jsonrpc":"2.0","id":{},"method":"ping"}', INVALID),
    (b'{"jsonrpc":"2.0","id":"%b","method":"ping"}' % (b"i" * 129), INVALID),
    (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}', INVALID),
    (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":"x"}', INVALID),
    (b'{"jsonrpc":"2.0","id":1,"method":"ping","result":{}}', INVALID),
    (b'{"jsonrpc":"2.0","id":1,"method":"ping","error":{}}', INVALID),
    (b'{"jsonrpc":"2.0","id":1,"result":{},"error":{}}', INVALID),
    (b'{"jsonrpc":"2.0","result":{}}', INVALID),
    (b'{"jsonrpc":"2.0","id":1,"result":{},"params":{"name":"search"}}', INVALID),
]


@pytest.mark.parametrize(("body", "expected"), MALFORMED)
def test_body_that_is_no_message_is_refused(body: bytes, expected: int) -> None:
    assert code(body) == expected


def call(members: str) -> bytes:
    return b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{%b}}' % members.encode()


@pytest.mark.parametrize(
    "members",
    [
        "", '"name":null', '"name":1', '"name":""', '"name":"a b"', '"name":"sear\\u00e7h"', '"name":"a/b"',
        '"name":"search\\u0000"', f'"name":"{"a" * 129}"', '"name":["search"]', '"name":{"name":"search"}',
        '"name":"search","arguments":null', '"name":"search","arguments":[]', '"name":"search","arguments":"{}"',
    ],
)  # fmt: skip
def test_call_without_a_name_or_with_other_arguments_is_refused(members: str) -> None:
    assert code(call(members)) == INVALID


@pytest.mark.parametrize("name", ["a", "A-z_0.9", "a" * 128])
def test_call_of_a_name_in_the_alphabet_is_read(name: str) -> None:
    assert read(call(f'"name":"{name}","arguments":{{}}')).tool == name


def test_call_without_an_id_is_refused() -> None:
    assert code({**{name: value for name, value in CALL.items() if name != "id"}}) == INVALID


@pytest.mark.parametrize(
    "method",
    ["Tools/Call", "TOOLS/CALL", "tools//call", "/tools/call", "tools/call/", "tools.call", "toolsCall", "tools_call",
     "tools\\u002fCall", "tools/list/", "Tools/list"],
)  # fmt: skip
def test_method_that_a_lenient_server_could_take_for_a_call_is_refused(method: str) -> None:
    assert code(b'{"jsonrpc":"2.0","id":1,"method":"%b","params":{"name":"search"}}' % method.encode()) == INVALID


@pytest.mark.parametrize("name", ["jsonrpc", "id", "method", "params", "result", "error"])
@pytest.mark.parametrize("change", ["{0}", "{1}", "{0}\\u0000", "{0}\\u0000x", " {0}", "{2}"])
def test_member_that_counts_appears_once_and_exactly_spelled(name: str, change: str) -> None:
    other = change.format(name, name.capitalize(), f"\\u{ord(name[0]):04x}{name[1:]}")
    first = {"result": b'"result":{}', "error": b'"error":{}'}.get(name, b'"method":"ping","params":{}')
    for order in (b'{"jsonrpc":"2.0","id":1,%b,"%b":2}', b'{"jsonrpc":"2.0","id":1,%b , "%b" : {}}'):
        assert code(order % (first, other.encode())) == INVALID


@pytest.mark.parametrize("name", ["name", "arguments", "uri", "_meta", "inputResponses", "requestState"])
@pytest.mark.parametrize("change", ["{0}", "{1}", "{0}\\u0000", "{0}\\u0000x", "{0} "])
def test_parameter_that_counts_appears_once_and_exactly_spelled(name: str, change: str) -> None:
    other = change.format(name, name.upper())
    assert code(call(f'"name":"search","{name}":{{}},"{other}":{{}}')) == INVALID


@pytest.mark.parametrize("depth", [64, 65])
def test_document_is_read_to_a_depth_of_64(depth: int) -> None:
    # The message, its parameters and its arguments are three of them.
    nested = "[" * (depth - 3) + "]" * (depth - 3)
    body = call(f'"name":"search","arguments":{{"a":{nested}}}')
    if depth > 64:
        assert code(body) == INVALID
    else:
        assert read(body).tool == "search"


@pytest.mark.parametrize("length", [4096, 4097])
def test_message_larger_than_the_bound_is_refused(length: int) -> None:
    body = call(f'"name":"search"{" " * (length - len(call(chr(34) + "name" + chr(34) + ":" + chr(34) * 2)) - 6)}')
    assert len(body) == length
    if length <= 4096:
        assert read(body).tool == "search"
        return
    with pytest.raises(Refusal) as caught:
        read(body)
    assert caught.value.reason is Reason.BODY_TOO_LARGE


@pytest.mark.parametrize(
    "given",
    [
        head(media_type=b""), head(media_type=b"text/plain"), head(media_type=b"application/json-rpc"),
        head(media_type=b"application/vnd.x+json"), head(codings=(b"gzip",)), head(codings=(b"identity",)),
        head(clear=False),
    ],
)  # fmt: skip
def test_body_that_is_not_plain_json_by_its_header_is_refused(given: RequestHead) -> None:
    with pytest.raises(Refusal) as caught:
        parse_mcp(given, json.dumps(CALL).encode(), RULES)
    assert caught.value.reason is Reason.REQUEST_MALFORMED
    assert caught.value.rpc_code in (None, INVALID)


@pytest.mark.parametrize("version", ["2025-06-18", "2025-11-25", ""])
def test_client_of_a_version_with_sessions_need_not_repeat_the_method(version: str) -> None:
    headers = {"MCP-Protocol-Version": version} if version else {}
    assert read(CALL, headers).version == version


@pytest.mark.parametrize(
    "versions",
    [b"1900-01-01", b"2025-03-26", b"", b"2025-06-18, 2025-11-25", b"2025-06-18 x", b"v2025-06-18", b"2025-06-18\xe9"],
)
def test_version_that_is_not_listed_is_refused_with_those_that_are(versions: bytes) -> None:
    found = refusal(CALL, b"MCP-Protocol-Version: %b\r\n" % versions)
    assert found.rpc_code == UNSUPPORTED
    assert found.members is not None
    assert found.members["supported"] == ["2025-06-18", "2025-11-25", "2026-07-28"]
    assert found.members["requested"] == (
        versions.decode() if versions in (b"1900-01-01", b"2025-03-26", b"v2025-06-18") else ""
    )


def test_version_appears_at_most_once() -> None:
    found = refusal(CALL, b"Mcp-Protocol-Version: 2025-06-18\r\nMCP-PROTOCOL-VERSION: 2025-06-18\r\n")
    assert found.rpc_code == UNSUPPORTED


def test_requested_version_is_not_repeated_if_it_could_be_a_secret() -> None:
    found = refusal(CALL, {"MCP-Protocol-Version": "a" * 33})
    assert found.members is not None
    assert found.members["requested"] == ""


@pytest.mark.parametrize("name", ["MCP_Protocol_Version", "Mcp.Method", "mcp_name", "MCP-Protocol_Version"])
def test_header_of_mcp_in_another_spelling_is_refused(name: str) -> None:
    assert code(CALL, {name: "2025-06-18"}) == INVALID


def test_stateless_message_that_agrees_with_its_headers_is_read() -> None:
    message = read(STATELESS_CALL, STATELESS)
    assert (message.tool, message.version) == ("search", "2026-07-28")


@pytest.mark.parametrize("missing", [*STATELESS])
def test_stateless_call_needs_each_header_once(missing: str) -> None:
    assert code(STATELESS_CALL, {name: value for name, value in STATELESS.items() if name != missing}) == MISMATCH
    twice = lines(STATELESS) + lines({missing: STATELESS[missing]})
    assert code(STATELESS_CALL, twice) == (UNSUPPORTED if missing == "MCP-Protocol-Version" else MISMATCH)


@pytest.mark.parametrize(
    "change",
    [
        {"MCP-Protocol-Version": "2025-11-25"}, {"Mcp-Method": "tools/list"}, {"Mcp-Method": "Tools/Call"},
        {"Mcp-Method": ""}, {"Mcp-Name": "Search"}, {"Mcp-Name": "other"}, {"Mcp-Name": ""},
        {"Mcp-Name": '"search"'}, {"Mcp-Name": "=?base64?c2VhcmNo?= x"}, {"Mcp-Name": "=?BASE64?c2VhcmNo?="},
        {"Mcp-Name": "=?base64?c2VhcmNo"}, {"Mcp-Name": "=?base64?c2VhcmNp?="}, {"Mcp-Name": "=?base64?c2Vh cmNo?="},
        {"Mcp-Name": "=?base64?c2VhcmNo==?="}, {"Mcp-Name": "=?base64??="}, {"Mcp-Method": "=?base64?dG9vbHMvY2FsbA==?="},
    ],
)  # fmt: skip
def test_stateless_call_agrees_with_its_headers(change: dict[str, str]) -> None:
    assert code(STATELESS_CALL, {**STATELESS, **change}) == MISMATCH


def test_mismatch_is_reported_with_the_id_of_the_request() -> None:
    reading = McpReading(head(lines({**STATELESS, "Mcp-Name": "x"})), json.dumps(STATELESS_CALL).encode(), RULES)
    with pytest.raises(Refusal):
        reading.advance()
    assert reading.rpc_id == b"7"


def test_name_in_base64_is_decoded_before_it_is_compared() -> None:
    assert read(STATELESS_CALL, {**STATELESS, "Mcp-Name": "=?base64?c2VhcmNo?="}).tool == "search"


@pytest.mark.parametrize("uri", ["file:///x", "=?base64?literal?=", "  ü\n", "x" * 3000])
def test_uri_of_a_resource_agrees_with_its_header(uri: str) -> None:
    body = {
        "jsonrpc": "2.0", "id": 1, "method": "resources/read", "params": {"uri": uri, "_meta": STATED},
    }  # fmt: skip
    encoded = f"=?base64?{base64.b64encode(uri.encode()).decode()}?="
    headers = {**STATELESS, "Mcp-Method": "resources/read"}
    assert read(body, {**headers, "Mcp-Name": encoded}).method == "resources/read"
    if uri.isascii() and uri == uri.strip() and not uri.startswith("=?base64?"):
        assert read(body, {**headers, "Mcp-Name": uri}).method == "resources/read"
    elif "\n" not in uri:
        assert code(body, {**headers, "Mcp-Name": uri}) == MISMATCH


@pytest.mark.parametrize("meta", [{}, {"io.modelcontextprotocol/protocolVersion": 1}, None, []])
def test_stateless_request_states_its_version_in_the_message_too(meta: object) -> None:
    body = {**CALL, "params": {"name": "search", "_meta": meta}}
    assert code(body, STATELESS) == MISMATCH


def test_version_in_the_message_alone_is_refused() -> None:
    # A server could take the message for one of the stateless version, whose headers were not compared then.
    assert code(STATELESS_CALL) == MISMATCH


def test_disagreement_on_the_version_precedes_its_support() -> None:
    assert code(STATELESS_CALL, {**STATELESS, "MCP-Protocol-Version": "1900-01-01"}) == MISMATCH
    stated = {"io.modelcontextprotocol/protocolVersion": "1900-01-01"}
    body = {**CALL, "params": {"name": "search", "_meta": stated}}
    assert code(body, {**STATELESS, "MCP-Protocol-Version": "1900-01-01"}) == UNSUPPORTED


@pytest.mark.parametrize("header", ["Mcp-Method", "Mcp-Name"])
def test_header_that_disagrees_is_refused_in_versions_that_do_not_require_it(header: str) -> None:
    assert code(CALL, {header: "other"}) == INVALID
    assert code(CALL, {"MCP-Protocol-Version": "2025-11-25", header: "other"}) == INVALID
    assert read(CALL, {"Mcp-Method": "tools/call", "Mcp-Name": "search"}).tool == "search"


def test_name_that_no_version_defines_for_a_method_is_not_judged() -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tasks/get", "params": {"taskId": "t", "_meta": STATED}}
    assert read(body, {**STATELESS, "Mcp-Method": "tasks/get", "Mcp-Name": "t"}).method == "tasks/get"


def test_notification_needs_no_headers_but_may_not_disagree_with_them() -> None:
    body = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": 1}}
    version = {"MCP-Protocol-Version": "2026-07-28"}
    assert read(body, version).method == "notifications/progress"
    assert code(body, {**version, "Mcp-Method": "tools/call"}) == MISMATCH


@pytest.mark.parametrize("version", ["2025-06-18", "2025-11-25", "2026-07-28", ""])
def test_response_of_a_client_belongs_to_versions_with_sessions(version: str) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "result": {}}
    headers = {"MCP-Protocol-Version": version} if version else {}
    if version == "2026-07-28":
        assert code(body, headers) == INVALID
    else:
        assert read(body, headers).method == ""
