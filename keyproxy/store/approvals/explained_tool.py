"""Judge the tool that a hypothetical request would call, as a proxy would."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

import orjson

from keyproxy.ai.requests.request_facts import malformed
from keyproxy.ai.tools.mcp_message import CALL
from keyproxy.ai.tools.tool import CONSENT, MCP, NO_APPROVAL, Tool
from keyproxy.ai.tools.tool_rules import ToolTable, judge
from keyproxy.model import Identity, Moment, Route
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.directory.errors import Invalid
from keyproxy.store.ledger.explained_access import OwnerReader

_APPROVALS: Final = {
    CONSENT: "A consent of the user suffices too.",
    "human": "Each call needs one of its own.",
    "admin": "Each call needs one of its own, from an operator with approvals:admin.",
}


class CalledTool(NamedTuple):
    """The tool that a request calls. `tool`: None if it has no row."""

    tool: Tool | None


class ExplainedTool:
    """The judgement of one call. `shown`: the members of the explanation.

    `called`: None if the request calls no tool. `has_certificate`: as `judge` takes it.
    """

    def __init__(self, called: CalledTool | None, *, has_certificate: bool) -> None:
        self._tool: Final[Tool | None] = None if called is None else called.tool
        self._calls: Final = called is not None
        self._has_certificate: Final = has_certificate
        self._missing: str | None = None

    def judge(self, identity: Identity, route: Route) -> None:
        """Raise a Refusal unless the credential may call the tool."""
        if not self._calls:
            return
        try:
            judge(self._tool, identity, route, has_certificate=self._has_certificate)
        except Refusal as refusal:
            self._missing = None if refusal.members is None else str(refusal.members["missing"])
            raise

    async def require_approval(self, database: OwnerReader, identity: Identity, now: Moment) -> None:
        """Raise a Refusal if the call needs an approval of its own. Raises StoreUnavailable."""
        tool = self._tool
        if tool is None or tool.approval == NO_APPROVAL:
            return
        if tool.approval == CONSENT and await _has_consent(database, identity, tool.name, now):
            return
        raise Refusal(Reason.APPROVAL_REQUIRED, caller_text=_APPROVALS[tool.approval])

    def shown(self) -> dict[str, Any]:
        """`tool`: the label; `approval`: of the tool; `missing`: what the credential lacks. None where none applies."""
        tool = self._tool
        return {
            "tool": None if tool is None else tool.name,
            "approval": None if tool is None else tool.approval,
            "missing": self._missing,
        }


def stated_tool(table: ToolTable, name: str) -> CalledTool | None:
    """The tool with this name, by its name in `tools/call` or its label; None without a name."""
    return CalledTool(table.by_mcp.get(name) or table.by_name.get(name)) if name else None


def called_tool(table: ToolTable, route: Route, stated: str, body: bytes | None) -> CalledTool | None:
    """The tool that a request on this route calls, as stated or by its body; None: it calls none.

    Raises Invalid if the route does not call the stated one, a Refusal for a body that is not a message.
    """
    if route.protocol == MCP:
        name = None if stated or body is None else _named_by(body)
        return stated_tool(table, stated) if name is None else CalledTool(table.by_mcp.get(name))
    tool = table.by_name.get(route.tool)
    if stated and (tool is None or stated not in (tool.name, tool.mcp)):
        raise Invalid(
            f"tool: the route calls {f'the tool {route.tool!r}' if route.tool else 'no tool'}, not {stated!r}"
        )
    return CalledTool(tool) if route.tool else None


def _named_by(body: bytes) -> str | None:
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError:
        message = None
    if not isinstance(message, dict):
        raise malformed("The body must be one JSON object. A batch is not accepted.")
    if message.get("method") != CALL:
        return None
    params = message.get("params")
    name = params.get("name") if isinstance(params, dict) else None
    if not isinstance(name, str):
        raise malformed("'params.name' must be the name of a tool.", "params.name")
    return name


async def _has_consent(database: OwnerReader, identity: Identity, tool: str, now: Moment) -> bool:
    token = identity.agent_token
    agents = (None, None if token is None else token.agents[0])
    rows = await database.fetch("consents_of_users", [identity.user_id])
    return any(
        name == tool and agent in agents and expires > now.wall_seconds
        for row in rows
        for name, agent, expires in json.loads(row["consents"])
    )
