"""Steps of the demo: a model that needs a scope, a role that grants it, and a collection of another tenant."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple

import aiohttp

from keyproxy.ai.models import Model
from keyproxy.demo.compute import CHAT

MODEL: Final = "big"
SCOPE: Final = "model:premium"
ROLE: Final = "premium"

#: After one row has scopes, metered routes accept only models with a row.
MODELS: Final = (Model(MODEL, scopes=frozenset({SCOPE})), Model("small"))

COLLECTIONS: Final = "/v1/collections"
BINDS: Final = [{"value": "path:collection", "starts": "{tenant}/"}]

#: A change of roles takes effect everywhere within this time after its commit.
CHANGED_SECONDS_MAX: Final = 1.0

_PAUSE_SECONDS: Final = 0.01
_OK: Final = 200


class DemoResponse(NamedTuple):
    """A response. `model`: the one that the compute server received."""

    status: int
    code: str
    detail: str
    model: str

    def __str__(self) -> str:
        return f"{self.status} {self.code}: {self.detail}"


async def chat(session: aiohttp.ClientSession, url: str, key: str) -> DemoResponse:
    """Request a completion of the model that needs a scope."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 10}
    return await _post(session, url + CHAT, key, body)


async def collection(session: aiohttp.ClientSession, url: str, key: str, name: str) -> DemoResponse:
    """Write to a collection."""
    return await _post(session, f"{url}{COLLECTIONS}/{name}", key, {})


async def after_change(
    change: Callable[[], Awaitable[object]], request: Callable[[], Awaitable[DemoResponse]]
) -> tuple[DemoResponse, float]:
    """Make a change, and repeat a request until it is accepted. Returns the last response, and its delay in seconds."""
    started = time.monotonic()
    await change()
    while True:
        response, delay = await request(), time.monotonic() - started
        if response.status == _OK or delay > CHANGED_SECONDS_MAX:
            return response, delay
        await asyncio.sleep(_PAUSE_SECONDS)


async def _post(session: aiohttp.ClientSession, url: str, key: str, body: Mapping[str, Any]) -> DemoResponse:
    async with session.post(url, json=body, headers={"Authorization": f"Api-Key {key}"}) as response:
        content = await response.json(content_type=None)
        return DemoResponse(
            response.status, content.get("code", ""), content.get("detail", ""), content.get("model") or ""
        )
