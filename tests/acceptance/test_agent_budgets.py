"""Budgets of agent tokens over two running proxies: spent to the last unit, never exceeded, and then refused for good."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from tests.acceptance.conftest import Configure, Site, until
from tests.acceptance.fleet import beside
from tests.store.redis_server import RedisServer, program

CHAT = b'{"model": "m", "max_tokens": 40, "messages": [{"role": "user", "content": "Hello"}]}'
ROUTES = [
    {"match": "POST /v1/agent-tokens", "scopes": ["agents:mint"], "serves": "agent-tokens"},
    {"match": "POST /v1/chat/completions", "tokens": "openai"},
    {"match": "POST /v1/ai/jobs"},
]


class Answer(NamedTuple):
    """A response: its body is empty if the upstream gave it."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """The settings of a ledger of either kind."""
    settings: dict[str, object] = {"settle_seconds": 0.1, "lease_seconds": 2.0}
    if request.param == "postgres":
        yield settings
        return
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as directory:
        server = RedisServer(program(request.param), Path(directory))
        server.start()
        try:
            yield settings | {"backend": server.url}
        finally:
            server.stop()


@pytest.fixture
async def sites(configure: Configure, dsn: str, ledger: dict[str, object]) -> AsyncIterator[list[Site]]:
    """Two running proxies of one installation."""
    site = configure(dsn, routes=ROUTES, ledger=ledger)
    pair = [site, beside(site, dsn)]
    async with contextlib.AsyncExitStack() as stack:
        for one in pair:
            await stack.enter_async_context(one.serving())
        yield pair


async def call(site: Site, secret: str, path: str = "/v1/ai/jobs", body: bytes = b"{}") -> Answer:
    """One request with a token or key."""
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    url = f"http://127.0.0.1:{site.proxy_port}{path}"
    async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as response:
        content = await response.json(content_type=None) if response.status != 200 else {}
        return Answer(response.status, dict(response.headers), content)


async def minted(site: Site, key: str, **wish: object) -> dict[str, Any]:
    """A token that is minted by the command."""
    options = [part for name, value in wish.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    found: dict[str, Any] = await site.run_json("agent", "token", "--key", key, "--agent", "crawler", *options)
    return found


async def windows(site: Site) -> dict[str, dict[str, Any]]:
    """The windows of u_42, by policy."""
    found = await site.run_json("usage", "windows", "--user", "u_42")
    return {one["policy"]: one for one in found}


@pytest.mark.parametrize("ledger", ["postgres", "valkey"], indirect=True)
async def test_request_budget_of_5_admits_5_requests_over_two_proxies_and_one_of_0_none(sites: list[Site]) -> None:
    key = await sites[0].key(scopes=["jobs:write"])
    token = await minted(sites[0], key["id"], scope="jobs:write", request_budget=5)
    statuses = Counter[int]()
    for _ in range(4):
        for site in sites:
            statuses[(await call(site, token["token"])).status] += 1
            # Units that a proxy holds idle return within 1.6 s.
            await asyncio.sleep(0.4)
    assert statuses == {200: 5, 429: 3}
    assert len(sites[0].upstream.heads) == 5
    for site in sites:
        refused = await call(site, token["token"])
        assert refused.body == refused.body | {
            "code": "quota_exhausted", "policy": "token.requests_total", "limit": 5, "remaining": 0,
            "reset_seconds": None, "retryable": False, "reason": "spent",
        }  # fmt: skip
        assert "Retry-After" not in refused.headers
        assert refused.headers["x-should-retry"] == "false"
        assert refused.headers["RateLimit"] == '"token.requests_total";r=0'
        assert refused.headers["RateLimit-Policy"] == '"token.requests_total";q=5'
        refusals = await site.metric("keyproxy_limit_refusals_total", policy="token.requests_total", reason="spent")
        assert refusals >= 1
    shown = (await windows(sites[0]))["token.requests_total"]
    assert (shown["owner"], shown["spent"], shown["remaining"], shown["reset_seconds"]) == (token["id"], 5, 0, None)
    for budgets, path, body in (
        ({"request_budget": 0}, "/v1/ai/jobs", b"{}"),
        ({"token_budget": 0}, "/v1/chat/completions", CHAT),
    ):
        token = await minted(sites[0], key["id"], scope="jobs:write", **budgets)
        refused = await call(sites[1], token["token"], path, body)
        assert (refused.status, refused.body["retryable"], "Retry-After" in refused.headers) == (429, False, False)
    # The key itself has no budget.
    assert (await call(sites[0], key["secret"])).status == 200
    assert len(sites[0].upstream.heads) == 6


@pytest.mark.parametrize("ledger", ["valkey"], indirect=True)
async def test_children_of_a_token_share_its_budget_of_tokens_over_two_proxies(sites: list[Site]) -> None:
    key = await sites[0].key(scopes=["jobs:write", "agents:mint"])
    await sites[0].run_json("role", "set", "minter", "--scope", "jobs:write", "--scope", "agents:mint")
    parent = await minted(sites[0], key["id"], role="minter", token_budget=400)
    children = []
    for name in ("reader", "writer"):
        wish = b'{"agent": "%b", "scopes": ["jobs:write"], "token_budget": 400}' % name.encode()
        answer = await call(sites[0], parent["token"], "/v1/agent-tokens", wish)
        assert answer.status == 201, answer
        children.append(answer.body)
    admitted, last = Counter[str](), {"retryable": True}
    while last["retryable"]:
        for site, child in zip(sites, children, strict=True):
            answer = await call(site, child["token"], "/v1/chat/completions", CHAT)
            admitted[child["agent"]] += answer.status == 200
            last = answer.body or last
    assert last == last | {"code": "token_budget_exhausted", "policy": "token.tokens_total", "reason": "spent"}
    assert min(admitted.values()) >= 1

    async def none_held() -> bool:
        return not any(one["held"] for one in await sites[0].run_json("usage", "windows", "--user", "u_42"))

    await until(none_held)
    spent = {one["owner"]: one["spent"] for one in await sites[0].run_json("usage", "windows", "--user", "u_42")}
    assert 350 < spent[parent["id"]] <= 400
    assert sum(spent[child["id"]] for child in children) == spent[parent["id"]]


@pytest.mark.parametrize("ledger", ["postgres"], indirect=True)
async def test_no_budget_is_exceeded_when_a_proxy_dies(
    configure: Configure, dsn: str, ledger: dict[str, object]
) -> None:
    site = configure(dsn, routes=ROUTES, ledger=ledger)
    key = await site.key(scopes=["jobs:write"])
    token = await minted(site, key["id"], scope="jobs:write", request_budget=300)
    async with site.serving() as process:
        assert [(await call(site, token["token"])).status for _ in range(6)] == [200] * 6
        process.kill()
        await process.wait()
    async with site.serving():

        async def is_spent() -> bool:
            return (await call(site, token["token"])).body.get("reason") == "spent"

        await until(is_spent)

        async def is_settled() -> bool:
            return bool((await windows(site))["token.requests_total"]["spent"] == 300)

        await until(is_settled, "the proxies have settled what they spent")
        shown = (await windows(site))["token.requests_total"]
    forwarded = len(site.upstream.heads)
    # What the dead proxy held is charged, whether it used that or not.
    assert 6 < forwarded <= shown["spent"] == 300
    assert shown["spent"] - shown["forfeited"] <= forwarded
