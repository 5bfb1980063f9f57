"""The scene of the demo in which an agent calls tools, and a person decides on the calls from the command line."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import click

from keyproxy.demo import tools
from keyproxy.demo.compute import MCP_PATH, Compute
from keyproxy.store.directory.directory import AuditFilter, Directory


@dataclass(frozen=True, slots=True)
class ToolScene:
    """The steps. `begin`: print the title and the request of the next one; `judge`: its errors."""

    session: aiohttp.ClientSession
    url: str
    compute: Compute
    config_path: Path
    directory: Directory
    begin: Callable[[str, str], str]
    judge: Callable[[str, list[str]], None]

    async def play(self, key: str) -> None:
        """An agent calls tools: freely, with a consent, and with approvals, each of which allows one call."""
        await self._tool("erin's key calls a tool that reads: no approval is needed", key, "search")
        title = self.begin("The same key may not call a partner: the tool is for agents", f"{MCP_PATH}   call_partner")
        response = await tools.call(self.session, self.url, key, "call_partner")
        click.echo(f"   < {response}")
        self.judge(title, [] if response.problem.get("missing") == "credential" else [str(response)])

        token = await tools.mint(self.session, self.url, key)
        title = self.begin("erin's agent changes a contact, once erin has consented", f"{MCP_PATH}   update_contact")
        wrong = await self._refused(token, "update_contact")
        wrong += await self._operate(
            "consent",
            "grant",
            "--user",
            "u_erin",
            "--tool",
            "crm.update",
            "--agent",
            tools.AGENT,
            "--expires-in",
            "30d",
        )
        response = await tools.until_consented(self.session, self.url, token, "update_contact")
        click.echo(f"   < {response}")
        self.judge(title, wrong if response.was_executed else [*wrong, str(response)])

        for name, title in (
            ("call_partner", "The agent calls a partner: a person approves this call, and no other"),
            ("run_shell", "The agent runs code: an operator approves, and the audit log has every step"),
        ):
            await self._approval(title, token, name)

    async def _tool(self, title: str, credential: str, name: str) -> None:
        self.begin(title, f"{MCP_PATH}   {name}")
        response = await tools.call(self.session, self.url, credential, name)
        click.echo(f"   < {response}")
        self.judge(title, [] if response.was_executed else [str(response)])

    async def _approval(self, title: str, token: str, name: str) -> None:
        """A call that is approved by the command line is executed once, and then needs another approval."""
        self.begin(title, f"{MCP_PATH}   {name}")
        first = await tools.call(self.session, self.url, token, name)
        click.echo(f"   < {first}")
        wrong = await self._operate("approval", "approve", first.approval_id)
        executed = await tools.call(self.session, self.url, token, name)
        again = await tools.call(self.session, self.url, token, name)
        click.echo(f"   < {executed}\n   < {again}")
        if executed.received.get("approval") != first.approval_id or again.approval_id in ("", first.approval_id):
            wrong.append("the approval was not used exactly once")
        if self.compute.executed.count(name) != 1:
            wrong.append(f"the MCP server has executed {self.compute.executed}")
        wanted = AuditFilter(entity="approval", entity_id=first.approval_id)
        recorded = [row["after"]["state"] for row in (await self.directory.audit.list_newest(None, 9, wanted)).items]
        click.echo(f"   < in the audit log: {', '.join(reversed(recorded))}")
        wrong += [] if recorded == ["used", "approved", "pending"] else [f"recorded as {recorded}"]
        self.judge(title, wrong)

    async def _refused(self, token: str, name: str) -> list[str]:
        response = await tools.call(self.session, self.url, token, name)
        click.echo(f"   < {response}")
        return [] if response.problem.get("code") == "approval_required" else [str(response)]

    async def _operate(self, *arguments: str) -> list[str]:
        """Run a command as an operator. Returns the errors."""
        click.echo(f"   $ keyproxy {shlex.join(arguments)}")
        _, error = await tools.run(self.config_path, *arguments)
        return [error] if error else []
