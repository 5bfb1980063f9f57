"""Clients and servers of MCP as they are, with the proxy between them: sessions, streams, refusals, approvals."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import fastmcp
import httpx2
import pytest
import uvicorn
from fastmcp.client.transports import StreamableHttpTransport
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.server.mcpserver import Context, MCPServer
from mcp.shared.exceptions import MCPError
from starlette.types import ASGIApp

from keyproxy.ai.tools.tool import HUMAN
from keyproxy.config.schema import RouteRow
from keyproxy.config.tools.tool_settings import ToolRow
from tests.rawhttp import free_port
from tests.waiting import until
from tests.wire.conftest import KEY, Start, Wire

SECRET = KEY.decode()

TOOLS = [
    ToolRow("search"),
    ToolRow("crm.update", mcp="update_contact", scopes=["data:write"]),
    ToolRow("pay", approval=HUMAN),
]
ROUTES = [RouteRow("* /mcp", protocol="mcp")]

#: By which the Python SDK connects: with a session, by its own choice, and without one.
MODES = ("legacy", "auto", "2026-07-28")

each_mode = pytest.mark.parametrize("mode", MODES)


class Calls:
    """What the tools of a server were called with."""

    def __init__(self) -> None:
        self.searched: list[str] = []
        self.paid: list[int] = []
        self.updated = 0
        self.unlisted = 0


def sdk_server(calls: Calls) -> ASGIApp:
    server = MCPServer("tools")

    @server.tool()
    async def search(query: str, ctx: Context[Any, Any]) -> str:
        await ctx.report_progress(1, 2, "halfway")
        calls.searched.append(query)
        return f"found {query}"

    @server.tool()
    def update_contact(name: str) -> str:
        calls.updated += 1
        return name

    @server.tool()
    def pay(amount: int) -> str:
        calls.paid.append(amount)
        return f"paid {amount}"

    @server.tool()
    def unlisted() -> str:
        calls.unlisted += 1
        return "executed"

    return server.streamable_http_app()


def fast_server(calls: Calls) -> ASGIApp:
    server: fastmcp.FastMCP[None] = fastmcp.FastMCP("tools")

    @server.tool
    def search(query: str) -> str:
        calls.searched.append(query)
        return f"found {query}"

    @server.tool
    def unlisted() -> str:
        calls.unlisted += 1
        return "executed"

    return server.http_app(path="/mcp")


@contextlib.asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[str]:
    """The URL of a server, which runs until the context ends."""
    port = free_port()
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running


@contextlib.asynccontextmanager
async def proxied(start: Start, app: ASGIApp) -> AsyncIterator[Wire]:
    async with serving(app) as url:
        yield await start(rows=ROUTES, tools=TOOLS, upstream={"url": url})


def address(wire: Wire) -> str:
    return f"http://127.0.0.1:{wire.address[1]}/mcp"


@contextlib.asynccontextmanager
async def connected(wire: Wire, mode: str, **more: Any) -> AsyncIterator[Client]:
    """The Python SDK, connected through the proxy."""
    headers = {"Authorization": f"Bearer {SECRET}"}
    async with httpx2.AsyncClient(headers=headers, timeout=20) as http:
        transport = streamable_http_client(address(wire), http_client=http)
        async with Client(transport, mode=mode, **more) as client:
            yield client


@each_mode
async def test_python_sdk_lists_and_calls_tools_through_the_proxy(start: Start, mode: str) -> None:
    calls = Calls()
    async with proxied(start, sdk_server(calls)) as wire, connected(wire, mode) as client:
        listed = await client.list_tools()
        assert "search" in {tool.name for tool in listed.tools}
        noted: list[float] = []

        async def note(progress: float, total: float | None, message: str | None) -> None:
            assert (total, message) == (2, "halfway")
            noted.append(progress)

        result = await client.call_tool("search", {"query": "x"}, progress_callback=note)
        assert result.content[0].text == "found x"  # type: ignore[union-attr]
        assert calls.searched == ["x"]
        assert noted == [1.0]


@each_mode
async def test_refusal_of_a_tool_reaches_the_caller_of_the_python_sdk(start: Start, mode: str) -> None:
    calls = Calls()
    async with proxied(start, sdk_server(calls)) as wire, connected(wire, mode) as client:
        for tool, missing in (("unlisted", "tool"), ("update_contact", "scope")):
            with pytest.raises(MCPError) as caught:
                await client.call_tool(tool, {"name": "x"})
            assert caught.value.error.code == -31403
            assert caught.value.error.message == "Tool not allowed"
            assert caught.value.error.data["code"] == "tool_not_allowed"
            assert caught.value.error.data["missing"] == missing
        # The session is not harmed.
        assert (await client.call_tool("search", {"query": "y"})).content[0].text == "found y"  # type: ignore[union-attr]
    assert (calls.unlisted, calls.updated) == (0, 0)


@each_mode
async def test_approved_call_runs_once_for_the_python_sdk(start: Start, mode: str) -> None:
    calls = Calls()
    async with proxied(start, sdk_server(calls)) as wire, connected(wire, mode) as client:
        for approved in (False, True, False):
            if approved:
                wire.approvals.approve()
                result = await client.call_tool("pay", {"amount": 100})
                assert result.content[0].text == "paid 100"  # type: ignore[union-attr]
                continue
            with pytest.raises(MCPError) as caught:
                await client.call_tool("pay", {"amount": 100})
            assert caught.value.error.data["code"] == "approval_required"
            assert caught.value.error.data["approval_state"] == "pending"
    assert calls.paid == [100]


async def test_fastmcp_calls_tools_through_the_proxy(start: Start) -> None:
    calls = Calls()
    async with proxied(start, fast_server(calls)) as wire:
        transport = StreamableHttpTransport(address(wire), headers={"X-Api-Key": SECRET})
        async with fastmcp.Client(transport) as client:
            assert {tool.name for tool in await client.list_tools()} == {"search", "unlisted"}
            assert (await client.call_tool("search", {"query": "x"})).data == "found x"
            with pytest.raises(MCPError) as caught:
                await client.call_tool("unlisted", {})
            assert json.loads(json.dumps(caught.value.error.data))["missing"] == "tool"
    assert (calls.searched, calls.unlisted) == (["x"], 0)
