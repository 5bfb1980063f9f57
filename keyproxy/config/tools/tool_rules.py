"""The rules by which calls of tools are judged on each route, from the configuration."""

from __future__ import annotations

from keyproxy.ai.tools.mcp_message import McpRules
from keyproxy.ai.tools.tool import MCP
from keyproxy.ai.tools.tool_rules import ToolRules, ToolTable
from keyproxy.config.schema import Settings
from keyproxy.http.routes import RouteTable
from keyproxy.model import Route


def tool_table(settings: Settings) -> ToolTable:
    """All configured tools."""
    prefix = settings.identity.header_prefix
    return ToolTable([row.tool(prefix) for row in settings.tools])


def tool_rules(settings: Settings, routes: RouteTable) -> dict[Route, ToolRules]:
    """The rules of the routes that call tools."""
    table, bytes_max = tool_table(settings), settings.mcp.body_bytes_max
    mcp = McpRules(tuple(settings.mcp.versions), bytes_max)
    return {
        route: ToolRules(
            table,
            tool=table.by_name[route.tool] if route.tool else None,
            mcp=mcp if route.protocol == MCP else None,
            body_bytes_max=bytes_max,
            approval_field=f"{settings.identity.header_prefix}Approval: ".encode("ascii"),
        )
        for _, route in routes.rows
        if route.tool or route.protocol
    }
