"""An agent calls the tools of an MCP server: a person approves one call on the command line, and it runs once."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx2
import pytest
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from tests.acceptance.conftest import Configure, Site
from tests.wire.test_mcp_sdks import Calls, sdk_server, serving

TOOLS = """
[[tools]]
name = "search"
[[tools]]
name = "crm.update"
mcp = "update_contact"
approval = "consent"
[[tools]]
name = "pay"
approval = "human"
"""


@contextlib.asynccontextmanager
async def connected(site: Site, secret: str, mode: str) -> AsyncIterator[Client]:
    url = f"http://127.0.0.1:{site.proxy_port}/mcp"
    async with (
        httpx2.AsyncClient(headers={"Authorization": f"Bearer {secret}"}, timeout=30) as http,
        Client(streamable_http_client(url, http_client=http), mode=mode) as client,
    ):
        yield client


async def refused(client: Client, tool: str, **arguments: object) -> dict[str, Any]:
    with pytest.raises(MCPError) as caught:
        await client.call_tool(tool, dict(arguments))
    problem: dict[str, Any] = caught.value.error.data
    return problem


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
async def test_call_that_a_person_approves_runs_once(
    configure: Configure, dsn: str, sql: asyncpg.Connection[asyncpg.Record], mode: str
) -> None:
    calls = Calls()
    async with serving(sdk_server(calls)) as url:
        site = configure(dsn, routes=[{"match": "* /mcp", "protocol": "mcp"}], upstream={"url": url})
        site.config.write_text(site.config.read_text(encoding="utf-8") + TOOLS, encoding="utf-8")
        key = await site.key()
        async with site.serving() as process:
            await site.until_ready(process)
            async with connected(site, key["secret"], mode) as client:
                assert (await client.call_tool("search", {"query": "x"})).content[0].text == "found x"  # type: ignore[union-attr]
                assert (await refused(client, "unlisted"))["missing"] == "tool"

                first = await refused(client, "pay", amount=100)
                assert (first["code"], first["approval_state"]) == ("approval_required", "pending")
                # A repeat finds the same approval; another call needs its own.
                assert (await refused(client, "pay", amount=100))["approval_id"] == first["approval_id"]
                other = await refused(client, "pay", amount=101)
                assert other["approval_id"] != first["approval_id"]

                await site.run_json("approval", "approve", first["approval_id"])
                assert (await refused(client, "pay", amount=101))["approval_id"] == other["approval_id"]
                assert (await client.call_tool("pay", {"amount": 100})).content[0].text == "paid 100"  # type: ignore[union-attr]
                assert (await refused(client, "pay", amount=100))["approval_id"] != first["approval_id"]

                await site.run_json("approval", "deny", other["approval_id"])
                assert (await refused(client, "pay", amount=101))["code"] == "approval_denied"
    assert calls.paid == [100]
    assert await sql.fetchval("SELECT state FROM keyproxy.approvals WHERE id = $1", first["approval_id"]) == "used"


async def test_consent_of_a_user_lets_every_call_of_the_tool_run(configure: Configure, dsn: str) -> None:
    calls = Calls()
    async with serving(sdk_server(calls)) as url:
        site = configure(dsn, routes=[{"match": "* /mcp", "protocol": "mcp"}], upstream={"url": url})
        site.config.write_text(site.config.read_text(encoding="utf-8") + TOOLS, encoding="utf-8")
        key = await site.key()
        async with site.serving() as process:
            await site.until_ready(process)
            async with connected(site, key["secret"], "auto") as client:
                assert (await refused(client, "update_contact", name="a"))["code"] == "approval_required"
                await site.run_json("consent", "grant", "--user", "u_42", "--tool", "crm.update", "--expires-in", "1h")
                for name in ("a", "b"):
                    result = await client.call_tool("update_contact", {"name": name})
                    assert result.content[0].text == name  # type: ignore[union-attr]
    assert calls.updated == 2
