"""A step of the demo: an agent that calls in a loop without a maximum is capped at what is left, and then refused."""

from __future__ import annotations

from typing import Final, NamedTuple

import aiohttp
import orjson

from keyproxy.demo.compute import CHAT, Compute

#: Tokens a day: two calls with the usual cap, and the rest.
BUDGET: Final = 10_000
_CALLS_MAX: Final = 10
_REFUSED: Final = 429
_SLACK: Final = 50

BODY: Final = orjson.dumps({"model": "small", "messages": [{"role": "user", "content": "Go on"}]})


class AgentCall(NamedTuple):
    """One call of the agent: the cap that it got, and the code of the refusal, empty without one."""

    cap: int
    code: str
    may_retry: bool


async def run(
    session: aiohttp.ClientSession, url: str, key: str, compute: Compute
) -> tuple[list[AgentCall], list[str]]:
    """Call until the proxy refuses. Returns the calls, and the errors."""
    headers = {"Authorization": f"Api-Key {key}", "Content-Type": "application/json"}
    before, calls = compute.tokens, list[AgentCall]()
    while len(calls) < _CALLS_MAX and not (calls and calls[-1].code):
        async with session.post(url + CHAT, data=BODY, headers=headers) as response:
            content = await response.json(content_type=None)
            cap = int(response.headers.get("X-Keyproxy-Output-Cap", "0"))
            code = (
                "" if response.status == 200 else f"{response.status} {content.get('code')} ({content.get('reason')})"
            )
            calls.append(AgentCall(cap, code, response.headers.get("x-should-retry") != "false"))
    wrong = []
    used = compute.tokens - before
    # The reservation of the last call may be a few tokens above what its prompt has.
    if not BUDGET - _SLACK <= used <= BUDGET:
        wrong.append(f"the compute server has processed {used} tokens of {BUDGET}")
    if calls[-1].code != f"{_REFUSED} token_budget_exhausted (spent)" or calls[-1].may_retry:
        wrong.append(f"the response to the last call was {calls[-1].code or 200}")
    return calls, wrong
