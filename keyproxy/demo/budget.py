"""A step of the demo: two proxies spend a shared budget to its last token and no further."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

import aiohttp
import orjson

from keyproxy.demo.compute import COMPLETIONS, PROMPT_TOKENS, Compute

_MAX_TOKENS: Final = 40
_CALLS: Final = 50
_WORKERS: Final = 3
_PAUSE_SECONDS: Final = 0.02

BODY: Final = orjson.dumps({"model": "small", "prompt": "Once upon a time", "max_tokens": _MAX_TOKENS})
#: The usage of each call: its prompt, and its maximum.
TOKENS_EACH: Final = PROMPT_TOKENS + _MAX_TOKENS
#: Exactly enough for fifty calls.
BUDGET: Final = _CALLS * TOKENS_EACH


async def spend(
    session: aiohttp.ClientSession, urls: Sequence[str], key: str, compute: Compute
) -> tuple[Mapping[str, int], list[str]]:
    """Call all proxies concurrently until each refuses. Returns the responses by proxy, and the errors."""
    responses: dict[str, int] = {}

    async def worker(number: int, url: str) -> None:
        headers = {"Authorization": f"Api-Key {key}", "Content-Type": "application/json"}
        for _ in range(2 * _CALLS):
            async with session.post(url + COMPLETIONS, data=BODY, headers=headers) as response:
                code = "200" if response.status == 200 else (await response.json(content_type=None)).get("code", "?")
            outcome = f"{code} from proxy {number}"
            responses[outcome] = responses.get(outcome, 0) + 1
            if code != "200":
                return
            await asyncio.sleep(_PAUSE_SECONDS)

    await asyncio.gather(*(worker(number, url) for number, url in enumerate(urls, 1) for _ in range(_WORKERS)))
    wrong = []
    if compute.tokens != BUDGET:
        wrong.append(f"{compute.tokens} tokens were spent of {BUDGET}")
    if not all(f"200 from proxy {number}" in responses for number, _ in enumerate(urls, 1)):
        wrong.append("one proxy accepted no call")
    refusals = {outcome.partition(" ")[0] for outcome in responses} - {"200"}
    if refusals != {"token_budget_exhausted"}:
        wrong.append(f"refused as {', '.join(sorted(refusals)) or 'nothing'}")
    return responses, wrong
