"""Messages of MCP over the wire, in every version: what is forwarded, and the JSON-RPC error of what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from keyproxy.config.schema import RouteRow
from keyproxy.config.tools.tool_settings import McpSettings, ToolRow
from tests import fakes
from tests.rawhttp import Message
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


async def test_dense_message_does_not_hold_up_other_requests(start: Start) -> None:
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
