"""A process without free file descriptors serves its existing connections, logs the shortage, and recovers from it."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from pathlib import Path

from tests.acceptance.conftest import Site, until
from tests.rawhttp import OK, answer_with
from tests.wire.conftest import request


async def test_without_file_descriptors_new_connections_wait_and_are_served_later(site: Site) -> None:
    site.upstream.answering = answer_with(OK)
    secret = (await site.key())["secret"].encode()
    async with site.serving() as process, contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(site.client())
        await first.send(request("GET", "/", key=secret))
        assert (await first.answer()).status == 200
        in_use = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (in_use + 20, in_use + 20))
        crowd = [await stack.enter_async_context(site.client()) for _ in range(60)]

        async def is_exhausted() -> bool:
            return b"cannot accept connections" in b"".join(site.printed)

        await until(is_exhausted, seconds=10)
        # The kernel has accepted the last connection, so its client sends a request.
        late = crowd.pop()
        await late.send(request("GET", "/", key=secret))
        # Existing connections get a response or a 503; none is reset and none hangs.
        await first.send(request("GET", "/", key=secret))
        assert (await first.answer()).status in (200, 503)
        assert process.returncode is None
        for client in crowd:
            await client.close()
        assert (await late.answer(seconds=10)).status == 200
        assert await site.metric("keyproxy_failed_connections_total", why="file_descriptors") >= 1
        assert (await site.call(secret.decode()))[0] == 200
    assert b"".join(site.printed).count(b"cannot accept connections") < 10
    assert b"Traceback" not in b"".join(site.printed)


async def test_a_process_with_a_low_file_limit_logs_it_and_serves(site: Site) -> None:
    secret = (await site.key())["secret"]
    async with site.serving(files_max=96) as process, contextlib.AsyncExitStack() as stack:
        assert b"file descriptors allowed" in b"".join(site.printed)
        for _ in range(2):
            crowd = [await stack.enter_async_context(site.client()) for _ in range(150)]
            await asyncio.gather(*(client.close() for client in crowd))

            async def serves() -> bool:
                return (await site.call(secret))[0] == 200

            await until(serves, seconds=10)
        assert process.returncode is None
