"""Requests at a fixed rate, regardless of response times: the latency of independent callers.

wrk sends the next request after the previous response, so a stalled proxy gets fewer requests and its p99 looks better
than it is ("coordinated omission"). Here each request has a scheduled time, and its latency counts from then, even if all
connections were busy and it was sent later.
"""

from __future__ import annotations

import asyncio
import collections
import gc
import itertools
import time
from collections.abc import Sequence
from typing import cast

import uvloop

_TICK_SECONDS = 0.0005
_CONNECTIONS = 64


def latencies(port: int, requests: Sequence[bytes], *, per_second: float, seconds: float) -> list[float]:
    """Send these again and again. Seconds from each request's scheduled time to the last byte of its response, sorted.

    Raises RuntimeError if a response is not a 200, a connection is lost, or responses stop.
    """
    gc.disable()
    try:
        return sorted(uvloop.run(_Paced(port, requests, per_second).run(seconds)))
    finally:
        gc.enable()


class _Paced:
    """One run."""

    def __init__(self, port: int, requests: Sequence[bytes], per_second: float) -> None:
        self.following = itertools.cycle(requests).__next__
        self.free: list[_Connection] = []
        self.due: collections.deque[float] = collections.deque()
        self.taken: list[float] = []
        self.complaint = ""
        self._port = port
        self._gap = 1.0 / per_second

    async def run(self, seconds: float) -> list[float]:
        loop = asyncio.get_running_loop()
        transports = []
        for _ in range(_CONNECTIONS):
            transport, connection = await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self._port)
            transports.append(transport)
            self.free.append(connection)
        began = time.monotonic()
        number, wanted = 0, int(seconds / self._gap)
        while len(self.taken) < wanted and not self.complaint:
            now = time.monotonic()
            if now > began + seconds + 10:
                raise RuntimeError(f"{len(self.taken)} of {wanted} requests were served")
            while number < wanted and began + number * self._gap <= now:
                self.due.append(began + number * self._gap)
                number += 1
            while self.due and self.free:
                self.free.pop().send(self.due.popleft())
            await asyncio.sleep(_TICK_SECONDS)
        for transport in transports:
            transport.abort()
        if self.complaint:
            raise RuntimeError(self.complaint)
        return self.taken


class _Connection(asyncio.Protocol):
    """A connection with one request at a time."""

    def __init__(self, paced: _Paced) -> None:
        self._paced = paced
        self._due = 0.0
        self._have = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, due: float) -> None:
        self._due = due
        self._transport.write(self._paced.following())

    def data_received(self, data: bytes) -> None:
        paced = self._paced
        self._have += data
        head, end, body = self._have.partition(b"\r\n\r\n")
        if not end:
            return
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
        if not head.startswith(b"HTTP/1.1 200") or not length:
            paced.complaint = f"unexpected response: {head[:200]!r}"
        elif len(body) >= int(length):
            self._have = b""
            paced.taken.append(time.monotonic() - self._due)
            if paced.due:
                self.send(paced.due.popleft())
            else:
                paced.free.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._paced.complaint = f"a connection was lost: {exc}"
