"""Steps of the demo: one key that acts for two users, an agent token with a small budget, and the end of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple

import aiohttp

from keyproxy.demo import budget
from keyproxy.demo.compute import COMPLETIONS, Compute

TOKENS_PATH: Final = "/v1/agent-tokens"
AGENT: Final = "crawler"
ACT_FOR: Final = "X-Keyproxy-Act-For"

_CALLS: Final = 3

#: Exactly enough for the calls of the agent.
BUDGET: Final = _CALLS * budget.TOKENS_EACH

#: A token ends everywhere within this time after the commit of what ends it.
ENDED_SECONDS_MAX: Final = 1.0

_PAUSE_SECONDS: Final = 0.01
_CREATED: Final = 201
_OK: Final = 200
_UNAUTHORIZED: Final = 401


class AgentCalls(NamedTuple):
    """The calls of an agent until the first refusal. `may_retry`: whether that response allows a client to retry."""

    accepted: int
    refusal: str
    may_retry: bool

    def __str__(self) -> str:
        return f"{self.accepted} x 200, {self.refusal}" + ("" if self.may_retry else ", x-should-retry: false")


def act_for(key: str, user_id: str) -> dict[str, str]:
    """The headers of a request for a user."""
    return {"Authorization": f"Api-Key {key}", ACT_FOR: user_id}


async def mint(session: aiohttp.ClientSession, url: str, key: str, user_id: str) -> tuple[dict[str, Any], list[str]]:
    """Mint a token with a small budget for an agent of a user. Returns the response, and the errors."""
    request = {"agent": AGENT, "scopes": ["jobs:write"], "token_budget": BUDGET}
    async with session.post(url + TOKENS_PATH, json=request, headers=act_for(key, user_id)) as response:
        content: dict[str, Any] = await response.json(content_type=None)
        wrong = [] if response.status == _CREATED else [f"the token was refused: {content.get('code')}"]
        return content, wrong


async def spend(session: aiohttp.ClientSession, url: str, token: str, compute: Compute) -> tuple[AgentCalls, list[str]]:
    """Call with an agent token until its budget is spent. Returns the calls, and the errors."""
    before, accepted = compute.tokens, 0
    while True:
        status, content, may_retry = await _complete(session, url, token)
        if status != _OK or accepted > _CALLS:
            break
        accepted += 1
    refusal = f"{status} {content.get('code')} ({content.get('reason')}, {content.get('policy')})"
    calls = AgentCalls(accepted, refusal, may_retry)
    wrong = [] if accepted == _CALLS else [f"{accepted} calls were accepted instead of {_CALLS}"]
    if compute.tokens - before != BUDGET:
        wrong.append(f"the compute server has processed {compute.tokens - before} tokens of {BUDGET}")
    if content.get("code") != "token_budget_exhausted" or may_retry:
        wrong.append(f"the response to the last call was {refusal}")
    return calls, wrong


async def until_ended(
    session: aiohttp.ClientSession, url: str, token: str, revoke: Callable[[], Awaitable[object]]
) -> tuple[str, float]:
    """Revoke the key, and repeat a call with its token until it is a 401. Returns the code, and its delay in seconds."""
    started = time.monotonic()
    await revoke()
    while True:
        status, content, _ = await _complete(session, url, token)
        delay = time.monotonic() - started
        if status == _UNAUTHORIZED or delay > ENDED_SECONDS_MAX:
            return f"{status} {content.get('code')}", delay
        await asyncio.sleep(_PAUSE_SECONDS)


async def _complete(session: aiohttp.ClientSession, url: str, token: str) -> tuple[int, Mapping[str, Any], bool]:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    async with session.post(url + COMPLETIONS, data=budget.BODY, headers=headers) as response:
        content = await response.json(content_type=None)
        return response.status, content, response.headers.get("x-should-retry") != "false"
