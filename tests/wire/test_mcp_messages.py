"""Messages of MCP over the wire, in every version: what is forwarded, and the JSON-RPC error of what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from keyproxy.config.schema import RouteRow
from keyproxy.config.tools.tool_settings import McpSettings, ToolRow
from tests import fakes
from tests.rawhttp import Message, answer_with
from tests.wire.conftest import Start, Wire, request

JSON = "Content-Type: application/json"
VERSIONS = ("2025-06-18", "2025-11-25", "2026-07-28")
STATED = {"io.modelcontextprotocol/protocolVersion": "2026-07-28"}

each_version = pytest.mark.parametrize("version", VERSIONS)


async def begin(start: Start, *, scopes: list[str] | None = None, **more: Any) -> Wire:
    rows = [RouteRow("* /mcp", protocol="mcp", scopes=scopes or [])]
    return await start(rows=rows, tools=[ToolRow("search"), ToolRow("pay", scopes=["pay:now"])], **more)


def headers(version: str, method: str, name: str | None = None) -> list[str]:
    """What a client of this version sends."""
    lines = [JSON, "Accept: application/json, text/event-stream", f"MCP-Protocol-Version: {version}"]
    if version == "2026-07-28":
        lines += [f"Mcp-Method: {method}"] + ([] if name is None else [f"Mcp-Name: {name}"])
    return lines


def body(version: str, method: str = "tools/call", rpc_id: Any = 7, **params: Any) -> bytes:
    if version == "2026-07-28":
        params["_meta"] = STATED
    return json.dumps({"jsonrpc": "2.0", "id": rpc_id, "method": method, "params": params}).encode()


async def send(wire: Wire, content: bytes, *lines: str, **more: Any) -> Message:
    async with wire.client() as client:
        await client.send(request("POST", "/mcp", *(lines or (JSON,)), body=content, **more))
        return await client.answer(seconds=20)


def error(answer: Message) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(answer.body)
    assert content["jsonrpc"] == "2.0"
    assert answer.one("Content-Type") == "application/json"
    data: dict[str, Any] = content["error"]["data"]
    assert data["status"] == answer.status
    return content


@each_version
async def test_call_of_each_version_is_forwarded_as_it_was_sent(start: Start, version: str) -> None:
    wire = await begin(start)
    content = body(version, name="search", arguments={"q": "é"})
    assert (await send(wire, content, *headers(version, "tools/call", "search"))).status == 200
    (sent,) = wire.upstream.requests
    assert sent.body == content
    assert sent.one("MCP-Protocol-Version") == version
    assert sent.one("X-Keyproxy-Tool") == "search"


@each_version
@pytest.mark.parametrize("rpc_id", [7, "a-1"])
async def test_refused_call_of_each_version_gets_an_error_with_its_id(
    start: Start, version: str, rpc_id: object
) -> None:
    wire = await begin(start)
    content = body(version, rpc_id=rpc_id, name="run_shell")
    answer = await send(wire, content, *headers(version, "tools/call", "run_shell"))
    assert answer.status == 403
    found = error(answer)
    assert found["id"] == rpc_id
    assert found["error"]["code"] == -31403
    assert found["error"]["message"] == "Tool not allowed"
    assert found["error"]["data"]["missing"] == "tool"
    assert wire.upstream.requests == []


async def test_missing_scope_of_a_tool_is_a_bearer_challenge(start: Start) -> None:
    wire = await begin(start)
    answer = await send(wire, body("", name="pay"))
    assert answer.status == 403
    assert answer.one("WWW-Authenticate") == 'Bearer error="insufficient_scope", scope="pay:now"'
    assert error(answer)["error"]["data"]["missing"] == "scope"


async def test_refusal_for_a_scope_of_the_route_has_the_id_of_the_message_it_did_not_read(start: Start) -> None:
    wire = await begin(start, scopes=["mcp:use"])
    answer = await send(wire, body("", name="search"))
    assert answer.status == 403
    assert answer.one("WWW-Authenticate") == 'Bearer error="insufficient_scope", scope="mcp:use"'
    found = error(answer)
    assert (found["id"], found["error"]["code"], found["error"]["data"]["code"]) == (7, -31403, "insufficient_scope")


async def test_message_of_an_unknown_client_is_not_read_for_its_id(start: Start) -> None:
    wire = await begin(start)
    answer = await send(wire, body("", name="search"), key=fakes.key(9).reveal())
    assert answer.status == 401
    assert answer.one("WWW-Authenticate") == 'Api-Key realm="keyproxy"'
    found = error(answer)
    assert "id" not in found
    assert (found["error"]["code"], found["error"]["data"]["code"]) == (-31401, "api_key_invalid")


@pytest.mark.parametrize(
    ("content", "lines", "code", "rpc_id"),
    [
        (b"{", [JSON], -32700, None),
        (b"[%b]" % body("", name="search"), [JSON], -32600, None),
        (body("", name="search"), ["Content-Type: text/plain"], -32600, 7),
        (body("", name="search"), [JSON, "Content-Encoding: identity"], -32600, 7),
        (body("", name="search"), ["Content-Type: application/json; charset=utf-16"], -32600, 7),
        (body("", name="search"), [JSON, "MCP-Protocol-Version: 1900-01-01"], -32022, 7),
        (body("", name="search"), [JSON, "Mcp-Method: tools/list"], -32600, 7),
        (body("2026-07-28", name="search"), headers("2026-07-28", "tools/call", "pay"), -32020, 7),
        (body("2026-07-28", name="search"), headers("2026-07-28", "tools/call"), -32020, 7),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","Method":"tools/call"}', [JSON], -32600, None),
    ],
)
async def test_message_that_servers_could_read_differently_is_refused_and_not_sent(
    start: Start, content: bytes, lines: list[str], code: int, rpc_id: object
) -> None:
    wire = await begin(start)
    answer = await send(wire, content, *lines)
    assert answer.status == 400
    found = error(answer)
    assert (found["error"]["code"], found.get("id")) == (code, rpc_id)
    if code == -32022:
        data = found["error"]["data"]
        assert (data["supported"], data["requested"]) == (list(VERSIONS), "1900-01-01")
    assert wire.upstream.requests == []


@pytest.mark.parametrize("version", ["2025-06-18", "2026-07-28"])
async def test_version_that_is_not_configured_is_refused(start: Start, version: str) -> None:
    wire = await begin(start, mcp=McpSettings(versions=["2025-11-25"]))
    answer = await send(wire, body(version, name="search"), *headers(version, "tools/call", "search"))
    assert answer.status == 400
    assert error(answer)["error"]["data"]["supported"] == ["2025-11-25"]


@pytest.mark.parametrize("excess", [0, 1])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_message_is_read_up_to_its_bound(start: Start, excess: int, is_chunked: bool) -> None:
    wire = await begin(start, mcp=McpSettings(body_bytes_max=300_000))
    content = body("", name="search", arguments={"text": "x"})
    content = content.replace(b'"x"', b'"%b"' % (b"x" * (300_000 - len(content) + 1 + excess)))
    assert len(content) == 300_000 + excess
    async with wire.client() as client:
        if is_chunked:
            head = request("POST", "/mcp", JSON, "Transfer-Encoding: chunked")
            await client.send(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content))
        else:
            await client.send(request("POST", "/mcp", JSON, body=content))
        answer = await client.answer(seconds=20)
    if excess:
        assert answer.status == 413
        assert error(answer)["error"]["code"] == -31413
        assert wire.upstream.requests == []
    else:
        assert answer.status == 200
        assert wire.upstream.requests[0].body == content


async def test_dense_message_does_not_delay_other_requests(start: Start) -> None:
    wire = await begin(start)
    content = body("", name="search", arguments={"a": "@"}).replace(b'"@"', b"[" + b"[]," * 1_000_000 + b"[]]")
    async with wire.client() as first, wire.client() as second:
        await first.send(request("POST", "/mcp", JSON, body=content))
        loop, slowest = asyncio.get_running_loop(), 0.0
        answering = asyncio.create_task(first.answer(seconds=60))
        answered = 0
        while not answering.done():
            before = loop.time()
            await second.send(request("POST", "/mcp", JSON, body=body("", "ping")))
            assert (await second.answer(seconds=20)).status == 200
            slowest = max(slowest, loop.time() - before)
            answered += 1
        assert (await answering).status == 200
    assert answered > 1
    assert slowest < 2.0


@each_version
async def test_stream_of_a_server_is_relayed_as_it_arrives(start: Start, version: str) -> None:
    wire = await begin(start)
    arrived = asyncio.Event()
    event = b'event: message\ndata: {"jsonrpc":"2.0","method":"notifications/progress","params":{}}\n\n'

    async def answer(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"%x\r\n%b\r\n" % (len(event), event))
        await arrived.wait()
        writer.write(b"0\r\n\r\n")
        return True

    wire.upstream.answering = answer
    assert isinstance(wire.address, tuple)
    reader, writer = await asyncio.open_connection(*wire.address[:2])
    lines = headers(version, "tools/call", "search")
    writer.write(request("POST", "/mcp", *lines, body=body(version, name="search")))
    async with asyncio.timeout(20):
        await reader.readuntil(event)
        arrived.set()
        await reader.readuntil(b"0\r\n\r\n")
    writer.close()


LISTED = {
    "tools": [{"name": "search", "n": 1.5}, {"name": "pay"}, {"name": "human"}, {"name": "unlisted"}, {"title": "x"}],
    "nextCursor": "c",
    "cacheScope": "public",
    "ttlMs": 5,
}
FILTERED = {**LISTED, "tools": [{"name": "search", "n": 1.5}, {"name": "human"}], "cacheScope": "private"}


async def listing(start: Start, content: bytes, media_type: str = "application/json", *lines: str) -> Message:
    """The response to `tools/list` if the server sends this content."""
    rows = [RouteRow("* /mcp", protocol="mcp", filter_tools_list=True)]
    tools = [ToolRow("search"), ToolRow("pay", scopes=["pay:now"]), ToolRow("human", approval="human")]
    wire = await start(rows=rows, tools=tools)
    head = "\r\n".join([f"HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {len(content)}", *lines])
    wire.upstream.answering = answer_with(head.encode() + b"\r\n\r\n" + content)
    answer = await send(wire, body("", "tools/list"), JSON, "Accept-Encoding: gzip, br")
    assert wire.upstream.requests[0].all("Accept-Encoding") == ["identity"]
    return answer


def listed(result: object = LISTED, **more: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 7, "result": result, **more}).encode()


async def test_list_loses_the_tools_that_the_credential_may_not_call(start: Start) -> None:
    answer = await listing(start, listed())
    assert answer.status == 200
    assert json.loads(answer.body) == {"jsonrpc": "2.0", "id": 7, "result": FILTERED}


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("start_of_stream", [b"", b"\xef\xbb\xbf", b": hello\n\n", b"id: 1\ndata:\n\n"])
async def test_list_in_a_stream_is_filtered_and_its_other_events_are_not(
    start: Start, end: bytes, start_of_stream: bytes
) -> None:
    progress = b'event: message\ndata: {"jsonrpc":"2.0","method":"notifications/progress"}\n\n'
    stream = start_of_stream + progress + b"id: 2\ndata:" + listed().replace(b'"tools"', b'\ndata: "tools"') + b"\n\n"
    answer = await listing(start, stream.replace(b"\n", end), "text/event-stream")
    assert answer.status == 200
    text = answer.body.replace(end, b"\n")
    before, _, last = text.partition(progress)
    assert before == start_of_stream.removeprefix(b"\xef\xbb\xbf")
    assert last.startswith(b"id: 2\ndata: ")
    assert json.loads(last.partition(b"data: ")[2]) == {"jsonrpc": "2.0", "id": 7, "result": FILTERED}


@pytest.mark.parametrize(
    "content",
    [
        listed({"tools": []}),
        listed({"tools": [{"name": "search"}]}),
        listed({}),
        b'{"jsonrpc":"2.0","id":7,"error":{}}',
    ],
)
async def test_response_without_such_a_tool_is_relayed_unchanged(start: Start, content: bytes) -> None:
    assert (await listing(start, content)).body == content


@pytest.mark.parametrize(
    ("content", "media_type", "lines"),
    [
        (b"{", "application/json", []),
        (listed({"tools": {}}), "application/json", []),
        (listed(), "text/plain", []),
        (listed(), "application/json", ["Content-Encoding: gzip"]),
        (listed({"tools": [{"name": "pay", "d": "x" * 1_048_576}]}), "application/json", []),
        (b"data: {\n\n", "text/event-stream", []),
    ],
)
async def test_list_that_cannot_be_read_is_refused(
    start: Start, content: bytes, media_type: str, lines: list[str]
) -> None:
    answer = await listing(start, content, media_type, *lines)
    assert answer.status == 502
    found = error(answer)
    assert (found["id"], found["error"]["data"]["code"]) == (7, "upstream_invalid")


async def test_list_that_ends_with_the_connection_is_filtered(start: Start) -> None:
    rows = [RouteRow("* /mcp", protocol="mcp", filter_tools_list=True)]
    wire = await start(rows=rows, tools=[ToolRow("search")])
    for content, status in ((listed(), 200), (b"{", 502)):
        wire.upstream.answering = answer_with(
            b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + content, goes_on=False
        )
        answer = await send(wire, body("", "tools/list"))
        assert answer.status == status
        if status == 200:
            assert [tool["name"] for tool in json.loads(answer.body)["result"]["tools"]] == ["search"]


async def test_other_responses_of_the_route_are_not_filtered(start: Start) -> None:
    rows = [RouteRow("* /mcp", protocol="mcp", filter_tools_list=True)]
    wire = await start(rows=rows, tools=[ToolRow("search")])
    content = listed()
    wire.upstream.answering = answer_with(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )
    assert (await send(wire, body("", name="search"))).body == content
