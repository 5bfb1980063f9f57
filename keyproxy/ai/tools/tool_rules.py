"""Which credential may call which tool: the tools by name, how a route names them, and the judgement of one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from keyproxy.ai.tools.mcp_message import McpRules
from keyproxy.ai.tools.tool import AGENT_CREDENTIAL, KEY_CREDENTIAL, OAUTH_CREDENTIAL, Tool
from keyproxy.ai.tools.tool_call import ToolCall
from keyproxy.model import Identity, Route
from keyproxy.reasons import Reason, Refusal

#: The values of `missing` in a refusal, in the order in which they are judged.
MISSING_TOOL: Final = "tool"
MISSING_CREDENTIAL: Final = "credential"
MISSING_CERTIFICATE: Final = "client_certificate"
MISSING_SCOPE: Final = "scope"

#: As the caller's sentence names the kinds of credentials.
_CREDENTIAL_NAMES: Final = {"key": "an API key", "agent": "an agent token", "oauth": "an OAuth token"}


class ToolTable:
    """All configured tools. `by_name`: by their label in records; `by_mcp`: by their name in `tools/call`."""

    __slots__ = ("_shared", "by_mcp", "by_name")

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.by_name: Final[dict[str, Tool]] = {tool.name: tool for tool in tools}
        self.by_mcp: Final[dict[str, Tool]] = {tool.mcp: tool for tool in tools}
        self._shared: Final = {tool: ToolCall(tool) for tool in tools if not tool.has_approval}

    def call(self, tool: Tool) -> ToolCall:
        """The call of a tool by one request."""
        return self._shared.get(tool) or ToolCall(tool)


class ToolRules:
    """How the calls of one route are judged.

    `tool`: that all its requests call. `mcp`: how its messages are read, which name the tools; None: not an MCP route.
    `body_bytes_max`: of a call that is read whole.
    `approval_field`: the start of the header line that names an approval to the upstream. `refuses_tunnels`: WebSocket
    handshakes are refused, because no approval can be bound to frames, which are not read.
    """

    __slots__ = ("approval_field", "body_bytes_max", "mcp", "refuses_tunnels", "table", "tool")

    def __init__(
        self,
        table: ToolTable,
        *,
        tool: Tool | None,
        mcp: McpRules | None,
        body_bytes_max: int,
        approval_field: bytes = b"X-Keyproxy-Approval: ",
    ) -> None:
        self.table: Final = table
        self.tool: Final = tool
        self.mcp: Final = mcp
        self.body_bytes_max: Final = body_bytes_max
        self.approval_field: Final = approval_field
        self.refuses_tunnels: Final[bool] = mcp is not None or (tool is not None and tool.has_approval)


def credential_kind(identity: Identity) -> str:
    """The kind of credential behind an identity, as `credentials` of a tool names it."""
    if identity.oauth is not None:
        return OAUTH_CREDENTIAL
    return KEY_CREDENTIAL if identity.agent_token is None else AGENT_CREDENTIAL


def judge(tool: Tool | None, identity: Identity, route: Route, *, has_certificate: bool) -> None:
    """Refuse a call of a tool unless the credential may make it. `tool`: None if it is not configured.

    Raises a Refusal (TOOL_NOT_ALLOWED) with the first condition that fails as `missing`. The scopes of the route were
    checked before; the challenge names them too, so that one new token suffices.
    """
    missing = missing_for(tool, identity, has_certificate=has_certificate)
    if not missing:
        return
    if tool is None:
        raise _refused(MISSING_TOOL, "the tool is not configured", "No such tool is configured.")
    if missing == MISSING_CREDENTIAL:
        kinds = " or ".join([_CREDENTIAL_NAMES[kind] for kind in sorted(tool.credentials)])
        raise _refused(missing, f"tool {tool.name}", f"It needs {kinds}.")
    if missing == MISSING_CERTIFICATE:
        text = "It needs a client certificate on the connection of the call."
        raise _refused(missing, f"tool {tool.name}", text)
    raise _without_scopes(tool, identity, route)


def missing_for(tool: Tool | None, identity: Identity, *, has_certificate: bool) -> str:
    """The first condition that a call of this tool does not meet; empty if it meets all."""
    if tool is None:
        return MISSING_TOOL
    if tool.credentials and credential_kind(identity) not in tool.credentials:
        return MISSING_CREDENTIAL
    if tool.needs_certificate and not has_certificate:
        return MISSING_CERTIFICATE
    return "" if tool.scopes <= identity.scopes else MISSING_SCOPE


def callable_tools(table: ToolTable, identity: Identity, *, has_certificate: bool) -> frozenset[str]:
    """The names in `tools/call` of all tools that the credential may call, with an approval where they need one."""
    tools = table.by_mcp.items()
    return frozenset([name for name, tool in tools if not missing_for(tool, identity, has_certificate=has_certificate)])


def _refused(missing: str, detail: str, text: str) -> Refusal:
    return Refusal(
        Reason.TOOL_NOT_ALLOWED, f"{detail}; missing: {missing}", caller_text=text, members={"missing": missing}
    )


def _without_scopes(tool: Tool, identity: Identity, route: Route) -> Refusal:
    missing = sorted(tool.scopes - identity.scopes)
    named = ", ".join([f"'{scope}'" for scope in missing])
    return Refusal(
        Reason.TOOL_NOT_ALLOWED,
        f"tool {tool.name}; missing: {MISSING_SCOPE}",
        caller_text=f"Missing {'scope' if len(missing) == 1 else 'scopes'}: {named}.",
        missing_scopes=sorted(route.scopes | tool.scopes),
        members={"missing": MISSING_SCOPE},
    )
