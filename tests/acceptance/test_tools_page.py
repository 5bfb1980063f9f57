"""Every case of docs/tools.md does what the page shows, and its agent waits for the approval of a real proxy."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import ROOT, Configure, until
from tests.acceptance.shown_cases import cases, play

CASES = dict(cases("tools.md"))
PAGE = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("heading", CASES)
async def test_case_of_the_tools_page_does_what_the_page_shows(
    configure: Configure, dsn: str, tmp_path: Path, heading: str
) -> None:
    await play(CASES[heading], configure(dsn), tmp_path / "shell")


def test_tools_page_has_a_case_for_each_kind_of_approval_a_provider_and_a_suspension() -> None:
    assert len(CASES) == 4
    shown = "".join(case.configuration for case in CASES.values())
    for word in ('approval = "consent"', 'approval = "human"', 'approval = "admin"', "[[providers]]", "[anomalies]"):
        assert word in shown, word


async def test_documented_agent_waits_until_its_call_is_approved(configure: Configure, dsn: str) -> None:
    tools = [{"name": "call_partner", "approval": "human"}]
    site = configure(dsn, routes=[{"match": "* /mcp", "protocol": "mcp"}])
    site.config.write_text(site.config.read_text() + _table("tools", tools))
    key = await site.key("u_bob")
    (example,) = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE)
    names: dict[str, Any] = {}
    exec(example, names)
    async with site.serving() as process:
        await site.until_ready(process)
        url = f"http://127.0.0.1:{site.proxy_port}/mcp"
        calling = asyncio.create_task(
            asyncio.to_thread(names["call_tool"], url, key["secret"], "call_partner", {"amount": 100})
        )

        async def pending() -> list[dict[str, Any]]:
            listed: list[dict[str, Any]] = await site.run_json("approval", "list", "--state", "pending")
            return listed

        async def waits() -> bool:
            return bool(await pending())

        await until(waits)
        assert not site.upstream.requests
        (waiting,) = await pending()
        await site.run_json("approval", "approve", waiting["id"])
        response = await calling
    assert response.status_code == 200
    (request,) = site.upstream.requests
    assert request.all("X-Keyproxy-Approval") == [waiting["id"]]


def _table(name: str, rows: Sequence[Mapping[str, str]]) -> str:
    lines = [f"[[{name}]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in row.items()) for row in rows]
    return "\n" + "\n".join(lines)
