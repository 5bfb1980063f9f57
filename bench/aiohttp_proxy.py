"""A minimal reverse proxy with aiohttp: its low-level server in front of its client."""

from __future__ import annotations

import asyncio
import sys

import aiohttp
import uvloop
from aiohttp import web

_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length"})


async def main(port: int, upstream: str) -> None:
    """Forward everything from a port on loopback to an upstream."""
    connector = aiohttp.TCPConnector(limit=256)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
            headers.pop("Authorization", None)
            headers["X-Keyproxy-User"] = "u_42"
            body = await request.read()
            async with session.request(
                request.method, upstream + request.path_qs, headers=headers, data=body
            ) as response:
                kept = {name: value for name, value in response.headers.items() if name.lower() not in _HOP_BY_HOP}
                return web.Response(status=response.status, headers=kept, body=await response.read())

        runner = web.ServerRunner(web.Server(handle))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
