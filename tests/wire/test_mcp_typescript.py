"""The SDKs of TypeScript, with the proxy between them and a server: that for sessions, and that for all versions."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests import npm_packages
from tests.wire.conftest import KEY, Start
from tests.wire.test_mcp_sdks import Calls, address, proxied, sdk_server

SCRIPT = Path(__file__).parent / "typescript" / "client.mjs"

#: The packages, with their versions.
PACKAGES = {"@modelcontextprotocol/sdk": "1.32.2", "@modelcontextprotocol/client": "2.4.0"}


@pytest.fixture(scope="module")
def packages() -> Path:
    """A directory with the packages, which is kept for later runs."""
    return npm_packages.installed(PACKAGES)


async def run(packages: Path, sdk: str, url: str, *tools: str) -> list[dict[str, Any]]:
    """What the client has printed."""
    process = await asyncio.create_subprocess_exec(
        "node", str(SCRIPT), sdk, url, KEY.decode(), *tools,
        cwd=packages, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("sdk", PACKAGES)
async def test_typescript_sdk_calls_tools_and_gets_their_refusals(start: Start, packages: Path, sdk: str) -> None:
    calls = Calls()
    async with proxied(start, sdk_server(calls)) as wire:
        listed, found, unlisted, unpaid = await run(packages, sdk, address(wire), "search", "unlisted", "pay")
        assert "search" in listed["tools"]
        assert found == {"text": "found x"}
        for refused, code in ((unlisted, "tool_not_allowed"), (unpaid, "approval_required")):
            assert code in json.dumps(refused)
        wire.approvals.approve()
        assert (await run(packages, sdk, address(wire), "pay"))[1] == {"text": "paid 100"}
    assert (calls.searched, calls.paid, calls.unlisted) == (["x"], [100], 0)
