"""Steps of the demo: tools of an MCP server, some of which need a consent, a person, or an operator."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp

from keyproxy.ai.tools.tool import ADMIN, AGENT_CREDENTIAL, CONSENT, HUMAN, OAUTH_CREDENTIAL
from keyproxy.config.tools.tool_settings import ToolRow
from keyproxy.demo.compute import MCP_PATH
from keyproxy.demo.delegation import TOKENS_PATH

AGENT: Final = "assistant"
SCOPES: Final = ("data:read", "data:write", "external:invoke", "exec:sandbox")

TOOLS: Final = (
    ToolRow("search", scopes=["data:read"]),
    ToolRow(
        "crm.update",
        mcp="update_contact",
        scopes=["data:write"],
        credentials=[OAUTH_CREDENTIAL, AGENT_CREDENTIAL],
        approval=CONSENT,
    ),
    ToolRow(
        "call_partner",
        scopes=["external:invoke"],
        credentials=[OAUTH_CREDENTIAL, AGENT_CREDENTIAL],
        approval=HUMAN,
    ),
    ToolRow("run_shell", scopes=["exec:sandbox"], credentials=[AGENT_CREDENTIAL], approval=ADMIN),
)

#: Of the calls that the demo makes.
ARGUMENTS: Final[Mapping[str, Mapping[str, object]]] = {
    "search": {"query": "invoices"},
    "update_contact": {"id": 7, "city": "Berlin"},
    "call_partner": {"amount": 100},
    "run_shell": {"command": "make report"},
}

_CREATED: Final = 201
_CONSENT_SECONDS_MAX: Final = 1.0
_PAUSE_SECONDS: Final = 0.02


class ToolResponse(NamedTuple):
    """A response to a call. `received`: what the MCP server received, or nothing; `problem`: of a refusal."""

    status: int
    received: Mapping[str, Any]
    problem: Mapping[str, Any]

    @property
    def approval_id(self) -> str:
        """The approval that a refused call waits for."""
        return str(self.problem.get("approval_id", ""))

    @property
    def was_executed(self) -> bool:
        """Whether the MCP server has executed the call."""
        return bool(self.received)

    def __str__(self) -> str:
        if self.was_executed:
            return f"{self.status} the MCP server executed {self.received['tool']}" + (
                f", approved by {self.received['approval']}" if self.received["approval"] else ""
            )
        missing = self.problem.get("missing")
        why = f", missing: {missing}" if missing else ""
        return f"{self.status} {self.problem.get('code')}{why}" + (
            f", {self.approval_id} is {self.problem.get('approval_state')}" if self.approval_id else ""
        )


async def call(session: aiohttp.ClientSession, url: str, credential: str, name: str) -> ToolResponse:
    """Call a tool by MCP."""
    request = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": name, "arguments": ARGUMENTS[name]},
    }
    headers = {"Authorization": f"Bearer {credential}", "Accept": "application/json, text/event-stream"}
    async with session.post(url + MCP_PATH, json=request, headers=headers) as response:
        content = await response.json(content_type=None)
        received = content.get("result", {}).get("structuredContent", {})
        return ToolResponse(response.status, received, content.get("error", {}).get("data", {}))


async def until_consented(session: aiohttp.ClientSession, url: str, credential: str, name: str) -> ToolResponse:
    """Repeat a call until it is executed: a consent takes effect within a second."""
    deadline = asyncio.get_running_loop().time() + _CONSENT_SECONDS_MAX
    while True:
        response = await call(session, url, credential, name)
        if response.was_executed or asyncio.get_running_loop().time() > deadline:
            return response
        await asyncio.sleep(_PAUSE_SECONDS)


async def mint(session: aiohttp.ClientSession, url: str, key: str) -> str:
    """Mint a token for the agent; empty if it is refused."""
    request = {"agent": AGENT, "scopes": SCOPES}
    async with session.post(url + TOKENS_PATH, json=request, headers={"Authorization": f"Api-Key {key}"}) as response:
        content = await response.json(content_type=None)
        return str(content["token"]) if response.status == _CREATED else ""


async def run(config_path: Path, *arguments: str) -> tuple[str, str]:
    """Run a command of keyproxy as an operator does. Returns what it prints, and its error if it fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "keyproxy", *arguments, "--config", str(config_path),
        env={name: value for name, value in os.environ.items() if not name.startswith("KEYPROXY_")},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return out.decode(), err.decode().strip() if process.returncode else ""
