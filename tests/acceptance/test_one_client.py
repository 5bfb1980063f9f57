"""One client that occupies every resource does not block the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import pytest

from tests.acceptance.conftest import Configure, Site, until
from tests.rawhttp import OK, Message
from tests.wire.conftest import request
from tests.wire.test_long import HANDSHAKE, SWITCH

POOL = 8

#: A request that its client has abandoned is not over for the proxy: it would wait for it at the end of the test.
NO_DRAINING = {"drain_seconds": 0.1}


async def compute(message: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Respond to some requests immediately, and never to others."""
    path = message.start.split(" ")[1]
    if path == "/v1/ai/jobs":
        writer.write(OK)
        return True
    if path == "/tunnel":
        writer.write(SWITCH)
    await reader.read()
    return False


def hold(path: str, secret: str) -> bytes:
    key = secret.encode()
    if path == "/tunnel":
        return request("GET", path, *HANDSHAKE, key=key)
    return request("POST", path, body=b"{}", key=key)


@pytest.mark.parametrize("path", ["/slow", "/tunnel"])
async def test_all_keys_of_a_user_together_leave_connections_to_other_users(
    configure: Configure, dsn: str, path: str
) -> None:
    site = configure(dsn, upstream={"connections_max": POOL}, listen=NO_DRAINING)
    site.upstream.answering = compute
    secrets = [(await site.key())["secret"] for _ in range(3)]
    other = (await site.key("u_other"))["secret"]
    async with site.serving(), contextlib.AsyncExitStack() as stack:
        for number in range(2 * POOL):
            client = await stack.enter_async_context(site.client())
            await client.send(hold(path, secrets[number % 3]))

        async def is_held() -> bool:
            return await site.metric("keyproxy_upstream_connections", state="busy") >= POOL // 2

        await until(is_held)
        assert [await site.call(other) for _ in range(10)] == [(200, "")] * 10
        if path == "/slow":
            status, page = await site.ops("/readyz")
            ready = json.loads(page)
            assert (status, ready["status"], ready["checks"]["upstream"]["status"]) == (200, "degraded", "degraded")
            assert "requests wait" in ready["checks"]["upstream"]["reason"]


async def test_test_requests_have_a_pool_of_their_own_which_is_shared_as_well(configure: Configure, dsn: str) -> None:
    site = configure(dsn, upstream={"connections_max": POOL}, listen=NO_DRAINING)
    site.upstream.answering = compute
    text, test_url = site.config.read_text(encoding="utf-8"), f'test_url = "http://127.0.0.1:{site.upstream.port}"'
    site.config.write_text(text.replace("[upstream]\n", f"[upstream]\n{test_url}\n"), encoding="utf-8")
    test_key = (await site.key(is_test=True))["secret"]
    live_key = (await site.key())["secret"]
    other = (await site.key("u_other", is_test=True))["secret"]
    async with site.serving(), contextlib.AsyncExitStack() as stack:
        for _ in range(POOL):
            client = await stack.enter_async_context(site.client())
            await client.send(hold("/slow", test_key))
        async with asyncio.timeout(10):
            while len(site.upstream.heads) < POOL:
                await asyncio.sleep(0.02)
        assert await site.call(live_key) == (200, "")
        assert await site.call(other) == (200, "")


async def test_connections_without_a_key_do_not_keep_a_client_with_one_out(configure: Configure, dsn: str) -> None:
    site = configure(dsn, listen={"connections_max": 20})
    secret = (await site.key())["secret"]
    async with site.serving(), contextlib.AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(site.client()) for _ in range(60)]
        for client in silent[::2]:
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n")
        await asyncio.sleep(1.2)
        for _ in range(10):
            assert await site.call(secret) == (200, "")
        assert await site.metric("keyproxy_failed_connections_total", why="evicted") >= 10
        # The next request opens a new connection.
        assert await silent[1].ends() == b""


async def test_silent_connections_to_the_ops_listener_keep_no_probe_out(site: Site) -> None:
    async with site.serving(), contextlib.AsyncExitStack() as stack:
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", site.ops_port)))
        assert (await site.ops("/livez"))[0] == 200
        assert (await site.ops("/readyz"))[0] == 200
