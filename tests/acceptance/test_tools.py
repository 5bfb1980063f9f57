"""The four kinds of tools of an agent, by MCP through a running proxy: what each needs, and who decides on its calls."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import trustme

from tests.acceptance.conftest import Configure, Site, until

TOOLS = """
[[tools]]
name = "search"
scopes = ["data:read"]
[[tools]]
name = "crm.update"
mcp = "update_contact"
scopes = ["data:write"]
credentials = ["oauth", "agent"]
approval = "consent"
[[tools]]
name = "call_partner"
scopes = ["external:invoke"]
credentials = ["oauth", "agent"]
client_certificate = true
approval = "human"
[[tools]]
name = "run_shell"
scopes = ["exec:sandbox"]
credentials = ["agent"]
approval = "admin"
"""
SCOPES = ("data:read", "data:write", "external:invoke", "exec:sandbox")


class Caller:
    """Calls tools with one credential over connections of one kind."""

    def __init__(self, site: Site, session: aiohttp.ClientSession, secret: str) -> None:
        self._url = f"https://127.0.0.1:{site.proxy_port}/mcp"
        self._session = session
        self._headers = {"Authorization": f"Bearer {secret}"}

    async def call(self, tool: str, **arguments: Any) -> tuple[int, dict[str, Any], str]:
        """Status, problem and challenge of one call."""
        params = {"name": tool, "arguments": arguments}
        message = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": params}
        async with self._session.post(self._url, json=message, headers=self._headers) as answer:
            content = json.loads(await answer.read())
            problem = content.get("error", {}).get("data", {})
            return answer.status, problem, answer.headers.get("WWW-Authenticate", "")

    async def missing(self, tool: str) -> str:
        """What a call that is not allowed lacks."""
        status, problem, challenge = await self.call(tool)
        assert (status, problem["code"]) == (403, "tool_not_allowed")
        assert bool(challenge) is (problem["missing"] == "scope")
        return str(problem["missing"])

    async def asks(self, tool: str, **arguments: Any) -> str:
        """The id of the pending approval of a call."""
        status, problem, _ = await self.call(tool, **arguments)
        assert (status, problem["code"], problem["approval_state"]) == (403, "approval_required", "pending")
        return str(problem["approval_id"])


def tls_files(folder: Path) -> dict[str, str]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    worker = authority.issue_cert("worker", common_name="worker")
    worker.private_key_and_cert_chain_pem.write_to_path(str(folder / "worker.pem"))
    return {"tls_certificate_file": str(folder / "server.pem"), "tls_client_ca_file": str(folder / "ca.pem")}


async def test_each_kind_of_tool_needs_what_its_row_states_and_is_decided_by_its_approver(
    configure: Configure, dsn: str, tmp_path: Path
) -> None:
    site = configure(dsn, listen=tls_files(tmp_path), routes=[{"match": "* /mcp", "protocol": "mcp"}])
    site.config.write_text(site.config.read_text(encoding="utf-8") + TOOLS, encoding="utf-8")
    key = await site.key(scopes=SCOPES)
    narrow = await site.key(scopes=["data:read"])
    plain, with_certificate = (ssl.create_default_context(cafile=str(tmp_path / "ca.pem")) for _ in range(2))
    with_certificate.load_cert_chain(str(tmp_path / "worker.pem"))
    async with (
        site.serving(),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=plain)) as without,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=with_certificate)) as certified,
    ):
        token = await agent_token(site, key["id"], *SCOPES)
        weak = Caller(site, certified, await agent_token(site, narrow["id"], "data:read"))
        by_key, agent = Caller(site, without, key["secret"]), Caller(site, without, token)
        agent_certified, key_certified = Caller(site, certified, token), Caller(site, certified, key["secret"])

        async def is_known() -> bool:
            return (await agent.call("search"))[0] == 200

        await until(is_known, "the agent token is accepted")
        # Public data: every time, with any credential.
        assert [(await one.call("search"))[0] for one in (by_key, agent, weak, by_key)] == [200] * 4
        # What is not met.
        for tool in ("update_contact", "call_partner", "run_shell"):
            assert await key_certified.missing(tool) == "credential"
        assert await agent.missing("call_partner") == "client_certificate"
        for tool, scope in (("update_contact", SCOPES[1]), ("call_partner", SCOPES[2]), ("run_shell", SCOPES[3])):
            assert await weak.missing(tool) == "scope"
            assert f'scope="{scope}"' in (await weak.call(tool))[2]
        assert await agent.missing("delete_everything") == "tool"
        assert await agent.missing("crm.update") == "tool"
        await the_consent_tool(site, agent)
        await the_human_tool(site, agent_certified)
        await the_admin_tool(site, agent)


async def agent_token(site: Site, key: str, *scopes: str) -> str:
    wanted = [option for scope in scopes for option in ("--scope", scope)]
    return str((await site.run_json("agent", "token", "--key", key, "--agent", "bot", *wanted))["token"])


async def the_consent_tool(site: Site, agent: Caller) -> None:
    approval = await agent.asks("update_contact", name="Ann")
    assert await agent.asks("update_contact", name="Ann") == approval
    await site.run_json("approval", "approve", approval)
    assert (await agent.call("update_contact", name="Bob"))[0] == 403
    assert (await agent.call("update_contact", name="Ann"))[0] == 200
    assert site.upstream.requests[-1].one("X-Keyproxy-Approval") == approval
    assert await agent.asks("update_contact", name="Ann") != approval
    await site.run_json("consent", "grant", "--user", "u_42", "--tool", "crm.update", "--expires-in", "1d")

    async def is_granted() -> bool:
        return (await agent.call("update_contact", name="Eve"))[0] == 200

    await until(is_granted, "the consent counts")
    assert [(await agent.call("update_contact", name=name))[0] for name in ("Ann", "Ann", "Zoe")] == [200] * 3
    assert site.upstream.requests[-1].one("X-Keyproxy-Approval") is None


async def the_human_tool(site: Site, agent: Caller) -> None:
    await site.run_json("consent", "grant", "--user", "u_42", "--tool", "call_partner", "--expires-in", "1d")
    approval = await agent.asks("call_partner", amount=100)
    await site.run_json("approval", "approve", approval)
    assert (await agent.call("call_partner", amount=101))[0] == 403
    assert (await agent.call("call_partner", amount=100))[0] == 200
    sent = site.upstream.requests[-1]
    assert (sent.one("X-Keyproxy-Tool"), sent.one("X-Keyproxy-Approval")) == ("call_partner", approval)
    assert await agent.asks("call_partner", amount=100) != approval


async def the_admin_tool(site: Site, agent: Caller) -> None:
    approval = await agent.asks("run_shell", command="ls")
    await site.run_json("approval", "deny", approval)
    status, problem, _ = await agent.call("run_shell", command="ls")
    assert (status, problem["code"]) == (403, "approval_denied")
    other = await agent.asks("run_shell", command="pwd")
    await site.run_json("approval", "approve", other)
    assert (await agent.call("run_shell", command="pwd"))[0] == 200
    audit = await site.run_json("audit", "list", "--entity", "approval")
    rows = audit["items"] if isinstance(audit, dict) else audit
    assert sum(json.dumps(row).count(other) > 0 for row in rows) >= 3
