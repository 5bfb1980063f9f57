"""Proxies over the embedded PostgreSQL: it runs as long as any of them does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from pathlib import Path

from keyproxy.store.embedded import embedded_postgres
from keyproxy.store.postgres import migrations
from tests.acceptance.conftest import Configure, until


def _server(home: str) -> int:
    """The pid of the server."""
    return int(Path(home, "pgdata", "postmaster.pid").read_text(encoding="utf-8").split()[0])


def _keeper(home: str) -> int:
    return int(Path(f"/proc/{_server(home)}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


async def test_proxies_keep_the_embedded_server_over_commands_restarts_and_its_loss(configure: Configure) -> None:
    with tempfile.TemporaryDirectory(prefix="kp-", dir="/tmp") as home:
        # A short command, which starts the server.
        command = await asyncio.to_thread(embedded_postgres.start, Path(home), {"fsync": "off"})
        site = configure("embedded", store={"embedded_dir": home})
        site.dsn = command.dsn()
        await migrations.migrate(command.dsn())
        server = _server(home)
        unseen = [(await site.key(f"u_{number}"))["secret"] for number in range(3)]
        async with contextlib.AsyncExitStack() as stack:
            old = await stack.enter_async_context(site.serving())
            command.stop()
            assert await site.call(unseen.pop()) == (200, "")
            site.environment["KEYPROXY_LISTEN__WORKERS"] = "2"
            await stack.enter_async_context(site.serving())
            await site.until_logged("ops on 127.0.0.1:", times=2)
            old.send_signal(signal.SIGTERM)
            assert await old.wait() == 0
            assert await site.call(unseen.pop()) == (200, "")
            assert _server(home) == server
            os.kill(_keeper(home), signal.SIGKILL)
            await site.until_logged("the embedded PostgreSQL had exited and was restarted")
            secret = unseen.pop()

            async def is_let_in() -> bool:
                return (await site.call(secret))[0] == 200

            await until(is_let_in)
            assert _server(home) != server
        assert not Path(home, "pgdata", "postmaster.pid").exists()
