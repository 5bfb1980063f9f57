"""The SDKs of TypeScript, with the proxy between them and a server: that for sessions, and that for all versions."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.wire.conftest import KEY, Start
from tests.wire.test_mcp_sdks import Calls, address, proxied, sdk_server

SCRIPT = Path(__file__).parent / "typescript" / "client.mjs"

#: The packages, with their versions.
PACKAGES = {"@modelcontextprotocol/sdk": "1.32.2", "@modelcontextprotocol/client": "2.4.0"}

_INSTALL_SECONDS = 240


@pytest.fixture(scope="module")
def packages() -> Path:
    """A directory with the packages, which is kept for later runs."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keyproxy-tests"
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    directory = cache / ("npm-" + "-".join(PACKAGES.values()))
    if directory.is_dir():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=cache))
    (fresh / "package.json").write_text('{"private": true}\n', encoding="utf-8")
    command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", *wanted]
    try:
        subprocess.run(command, cwd=fresh, check=True, timeout=_INSTALL_SECONDS, capture_output=True)
    except (subprocess.SubprocessError, OSError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        pytest.skip(f"the packages of npm cannot be installed: {error}")
    try:
        fresh.rename(directory)
    except OSError:
        # Another test process was faster.
        shutil.rmtree(fresh, ignore_errors=True)
    return directory


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
