"""What a supervisor and a worker say to each other about the configuration, on a socket that only the two have.

All workers change or none does, so a change has two steps. The supervisor *offers* a configuration; the worker makes
ready all that it needs, beside what it has, and says so, or why it cannot. When all are ready they are told to *apply*
it, in which nothing fails any more; else to *withdraw* it. The first order on a socket is to *begin*, with what was
applied last: whatever the file holds by then, a worker that is started later is like the others.

A message is a line of JSON. The supervisor waits for one answer before it gives the next order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Final, NamedTuple

BEGIN: Final = "begin"
OFFER: Final = "offer"
APPLY: Final = "apply"
WITHDRAW: Final = "withdraw"

#: Of a message. Far more than a configuration has.
_BYTES_MAX: Final = 16 * 1024 * 1024


class Order(NamedTuple):
    """What a worker is to do; `text`: the configuration that it is about."""

    kind: str
    text: str = ""


class SupervisorEnd:
    """The supervisor's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def begin(self, text: str) -> None:
        """Give the first order, which is answered by serving, or by ending."""
        _send(self._writer, Order(BEGIN, text)._asdict())

    async def ask(self, order: Order) -> str:
        """Why the worker does not follow; empty if it does. Raises ConnectionError if it has ended."""
        _send(self._writer, order._asdict())
        answer = await self._reader.readline()
        if not answer:
            raise ConnectionError("the worker has ended")
        return str(json.loads(answer)["refused"])

    async def close(self) -> None:
        """Ask nothing any more."""
        await _close(self._writer)


class WorkerEnd:
    """The worker's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def orders(self) -> AsyncIterator[Order]:
        """The orders as they come, until the supervisor is gone. Each has to be answered."""
        while line := await self._reader.readline():
            yield Order(**json.loads(line))

    def answer(self, refused: str = "") -> None:
        """Say that the order was followed, or why not."""
        _send(self._writer, {"refused": refused})

    async def close(self) -> None:
        """Follow no order any more."""
        await _close(self._writer)


async def supervisor_end(sock: socket.socket) -> SupervisorEnd:
    """The supervisor's end of a connected socket, which it takes over."""
    return SupervisorEnd(*await asyncio.open_unix_connection(sock=sock, limit=_BYTES_MAX))


async def worker_end(sock: socket.socket) -> WorkerEnd:
    """The worker's end of a connected socket, which it takes over."""
    return WorkerEnd(*await asyncio.open_unix_connection(sock=sock, limit=_BYTES_MAX))


def begun_with(sock: socket.socket) -> str:
    """The configuration to begin with; waits for it. Raises ConnectionError if the supervisor is gone."""
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = sock.recv(65_536)
        if not chunk:
            raise ConnectionError("the supervisor is gone")
        line += chunk
    return Order(**json.loads(line)).text


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):  # as which it ended, if the other end was gone before
        await writer.wait_closed()


def _send(writer: asyncio.StreamWriter, message: dict[str, str]) -> None:
    # Who is gone is noticed by reading. Writing to him is an error of the program's, to uvloop.
    if not writer.is_closing():
        writer.write(json.dumps(message).encode("ascii") + b"\n")
