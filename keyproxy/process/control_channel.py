"""The reload protocol between supervisor and worker, on a private socket pair.

A reload changes all workers or none, so it has two phases. The supervisor *offers* a configuration; the worker prepares
everything that it needs, beside what is running, and replies with success or the reason for its refusal. If all workers
are ready, the supervisor sends *apply*, which cannot fail; else *withdraw*. The first order on a socket is *begin*, with
the configuration that was applied last, so that a worker that is started later runs the same one as the others, even if
the file has changed since. *begin* and *keys* carry the keys to sign with, their private halves included: the pair is
their only way to a worker.

A message is a line of JSON. The supervisor waits for the reply before it sends the next order. A worker's last message,
after it has drained, states until when what it has signed is valid.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

BEGIN: Final = "begin"
OFFER: Final = "offer"
APPLY: Final = "apply"
WITHDRAW: Final = "withdraw"
KEYS: Final = "keys"

#: The maximum size of a message: far more than any configuration.
_BYTES_MAX: Final = 16 * 1024 * 1024


class Order(NamedTuple):
    """An order to a worker.

    `text`: the configuration that it applies to. `keys`: the texts of private keys, which `repr` omits.
    """

    kind: str
    text: str = ""
    keys: Sequence[str] = ()

    def __repr__(self) -> str:
        return f"Order(kind={self.kind!r}, <{len(self.text)} characters>, <{len(self.keys)} keys>)"


class SupervisorEnd:
    """The supervisor's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._signed_until: dict[str, float] | None = None
        self._reading = asyncio.Lock()

    def begin(self, order: Order) -> None:
        """Send the first order. It has no reply: the worker either serves or exits."""
        _send(self._writer, order._asdict())

    async def send(self, order: Order) -> str:
        """Send an order. Returns the reason for a refusal, else "". Raises ConnectionError if the worker has exited."""
        _send(self._writer, order._asdict())
        async with self._reading:
            reply = await self._read()
        if reply is None:
            raise ConnectionError("the worker has exited")
        return str(reply["refused"])

    async def signed_until(self) -> Mapping[str, float] | None:
        """After the worker has exited: until when what it has signed is valid, by `kid`. None: it has crashed."""
        async with self._reading:
            with contextlib.suppress(OSError):
                while await self._read() is not None:
                    pass
        return self._signed_until

    async def _read(self) -> dict[str, Any] | None:
        """The next reply; None if no more follow."""
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            return None
        message: dict[str, Any] = json.loads(line)
        if "signed_until" in message:
            self._signed_until = message["signed_until"]
            return None
        return message

    async def close(self) -> None:
        """Close the socket: no more orders follow."""
        await _close(self._writer)


class WorkerEnd:
    """The worker's end."""

    def __init__(self, sock: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._sock = sock
        self._reader = reader
        self._writer = writer

    async def orders(self) -> AsyncIterator[Order]:
        """Yield orders as they arrive, until the supervisor exits. Each requires a reply."""
        while line := await self._reader.readline():
            yield Order(**json.loads(line))

    def reply(self, refused: str = "") -> None:
        """Send the reply to an order: empty for success, else the reason for the refusal."""
        _send(self._writer, {"refused": refused})

    def stop(self) -> None:
        """Accept no more orders: refuse one that is under way, and let the supervisor fail to send others."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
        self.reply("the worker is stopping")

    async def close(self, signed_until: Mapping[str, float]) -> None:
        """Send the last message and close the socket."""
        _send(self._writer, {"signed_until": signed_until})
        await _close(self._writer)


async def supervisor_end(sock: socket.socket) -> SupervisorEnd:
    """The supervisor's end of a connected socket, which it takes over."""
    return SupervisorEnd(*await asyncio.open_unix_connection(sock=sock, limit=_BYTES_MAX))


async def worker_end(sock: socket.socket) -> WorkerEnd:
    """The worker's end of a connected socket, which it takes over."""
    return WorkerEnd(sock, *await asyncio.open_unix_connection(sock=sock, limit=_BYTES_MAX))


def begun_with(sock: socket.socket) -> Order:
    """Wait for the first order and return it. Raises ConnectionError if the supervisor has exited."""
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = sock.recv(65_536)
        if not chunk:
            raise ConnectionError("the supervisor has exited")
        line += chunk
    return Order(**json.loads(line))


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):  # raised if the other end was closed before
        await writer.wait_closed()


def _send(writer: asyncio.StreamWriter, message: Mapping[str, object]) -> None:
    # A closed peer is detected by reading. uvloop treats a write to a closing transport as a bug and logs it.
    if not writer.is_closing():
        writer.write(json.dumps(message).encode("ascii") + b"\n")
