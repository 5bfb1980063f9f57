"""A receiver of webhooks on its own port, which records what it gets."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.rawhttp import free_port

KEY = b"the-key-of-the-webhook-of-tests!"
SECRET = "whsec_" + base64.b64encode(KEY).decode()


@dataclass
class Receiver:
    """A webhook receiver: records the requests, and responds as configured."""

    url: str = ""
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    #: Statuses to respond with, then 204.
    statuses: list[int] = field(default_factory=list)
    on_request: Callable[[], Any] | None = None

    async def handle(self, request: web.Request) -> web.Response:
        """Keep one."""
        self.got.append((dict(request.headers), await request.read()))
        if self.on_request is not None:
            await self.on_request()
        status = self.statuses.pop(0) if self.statuses else 204
        return web.Response(status=status, headers={"Location": self.url + "/elsewhere"} if status == 307 else {})

    @property
    def ids(self) -> list[str]:
        """The ids of the received messages."""
        return [headers["Webhook-Id"] for headers, _ in self.got]

    @property
    def received(self) -> list[dict[str, Any]]:
        """The contents of the messages."""
        return [json.loads(body) for _, body in self.got]


@contextlib.asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """A receiver that listens while the context lasts."""
    receiver, app = Receiver(), web.Application()
    app.router.add_post("/{path:.*}", receiver.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port := free_port())
    await site.start()
    receiver.url = f"http://127.0.0.1:{port}/hook"
    try:
        yield receiver
    finally:
        await runner.cleanup()


def right_signature(headers: Mapping[str, str], body: bytes) -> str:
    """The signature that these headers must have."""
    signed = f"{headers['Webhook-Id']}.{headers['Webhook-Timestamp']}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
