"""Every case of docs/agents.md does what the page shows, and its code verifies the assertion of a real proxy."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import ROOT, Configure
from tests.acceptance.shown_cases import cases, play
from tests.acceptance.test_delegation_records import post

CASES = dict(cases("agents.md"))
PAGE = (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("heading", CASES)
async def test_case_of_the_agents_page_does_what_the_page_shows(
    configure: Configure, dsn: str, tmp_path: Path, heading: str
) -> None:
    await play(CASES[heading], configure(dsn), tmp_path / "shell")


def test_agents_page_has_a_case_for_acting_and_one_for_tokens() -> None:
    assert list(CASES) == ["A worker that acts for users", "An agent with a budget"]


async def test_documented_code_verifies_the_assertions_that_the_upstream_gets(configure: Configure, dsn: str) -> None:
    routes = [
        {"match": "POST /v1/ai/jobs"},
        {"match": "POST /v1/agent-tokens", "scopes": ["agents:mint"], "serves": "agent-tokens"},
    ]
    site = configure(dsn, routes=routes, access={"assertion": True})
    worker = await site.key("u_worker", scopes=["agents:mint", "jobs:write"])
    await site.key("u_alice")
    await site.run_json("key", "set-acts-for", worker["id"], "tenant")
    (example,) = [code for code in re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE) if "jwks" in code]
    names: dict[str, Any] = {}
    exec(example.replace("127.0.0.1:9090", f"127.0.0.1:{site.ops_port}"), names)
    by_worker = {"sub": "u_worker", "type": "user", "key_id": worker["id"]}

    async def claims_of(credential: str, act_for: str = "") -> dict[str, Any]:
        assert (await post(site, credential, act_for=act_for))[0] == 200
        (assertion,) = site.upstream.requests[-1].all("X-Keyproxy-Assertion")
        claims: dict[str, Any] = await asyncio.to_thread(names["claims_of"], assertion)
        assert claims.pop("exp") - claims.pop("iat") == 60
        return claims

    async with site.serving() as process:
        await site.until_ready(process)
        key = f"Api-Key {worker['secret']}"
        plain = {
            "iss": "keyproxy", "aud": "upstream", "sub": "u_worker", "tenant": "acme", "scope": "agents:mint jobs:write",
            "key_id": worker["id"], "test": False,
        }  # fmt: skip
        assert await claims_of(key) == plain
        assert await claims_of(key, "u_alice") == plain | {"sub": "u_alice", "act": by_worker}
        minting = {"path": "/v1/agent-tokens", "act_for": "u_alice"}
        status, minted = await post(site, key, **minting, agent="crawler", scopes=["jobs:write"])
        assert status == 201
        act = {"sub": "crawler", "type": "agent", "act": by_worker}
        by_agent = plain | {"sub": "u_alice", "scope": "jobs:write", "act": act}
        assert await claims_of(f"Bearer {minted['token']}") == by_agent
