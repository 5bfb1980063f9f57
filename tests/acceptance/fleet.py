"""Several processes of one configuration, and load on all of them during faults."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections import Counter
from dataclasses import replace

import aiohttp

from tests.acceptance.conftest import Site
from tests.rawhttp import free_port
from tests.running_process import RunningProcess
from tests.store.harness import Relay


class Fleet:
    """Proxies over one ledger and one upstream, and load on all of them."""

    def __init__(self, sites: list[Site], relays: list[Relay], secret: str) -> None:
        self.sites, self.relays = sites, relays
        self.secret = secret
        self.answers: Counter[int] = Counter()
        self.processes: list[RunningProcess | None] = [None] * len(sites)
        self._stacks = [contextlib.AsyncExitStack() for _ in sites]

    async def start(self, number: int) -> None:
        """Start a process and wait until it serves."""
        try:
            self.processes[number] = await self._stacks[number].enter_async_context(self.sites[number].serving())
        except TimeoutError:
            print(number, b"".join(self.sites[number].printed)[-3000:].decode())
            raise

    async def stop(self, number: int) -> None:
        """SIGTERM, and wait until it has drained."""
        await self._stacks[number].aclose()

    async def kill(self, number: int) -> None:
        """SIGKILL, as the kernel sends it when memory runs out."""
        process = self.processes[number]
        assert process is not None
        process.kill()
        await self._stacks[number].aclose()

    async def stop_for(self, number: int, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        process = self.processes[number]
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        process.send_signal(signal.SIGCONT)

    async def lose_packets(self, number: int, seconds: float) -> None:
        """Packets between a process and the database are lost."""
        self.relays[number].freeze()
        await asyncio.sleep(seconds)
        self.relays[number].thaw()

    async def cut(self, number: int, seconds: float) -> None:
        """The database cannot be reached."""
        await self.relays[number].cut()
        await asyncio.sleep(seconds)
        await self.relays[number].mend()

    async def load(self, until_mono: float) -> None:
        """One client that sends requests to any running proxy."""
        now = asyncio.get_running_loop().time
        timeout = aiohttp.ClientTimeout(total=8.0)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while now() < until_mono:
                site = random.choice(self.sites)
                url = f"http://127.0.0.1:{site.proxy_port}/v1/ai/jobs"
                try:
                    async with session.post(url, data=b"{}", headers={"X-Api-Key": self.secret}) as answer:
                        self.answers[answer.status] += 1
                except (aiohttp.ClientError, TimeoutError):
                    self.answers[0] += 1
                    await asyncio.sleep(0.05)

    async def close(self) -> None:
        """SIGTERM to all: they release their leases."""
        for stack in self._stacks:
            await stack.aclose()


def beside(site: Site, dsn: str) -> Site:
    """Another process of the same configuration, on its own ports and connection."""
    proxy_port, ops_port = free_port(), free_port()
    environment = site.environment | {
        "KEYPROXY_LISTEN__ADDRESS": f"127.0.0.1:{proxy_port}",
        "KEYPROXY_OPS__ADDRESS": f"127.0.0.1:{ops_port}",
        "KEYPROXY_STORE__DSN": dsn,
    }
    return replace(site, proxy_port=proxy_port, ops_port=ops_port, environment=environment, printed=[])
