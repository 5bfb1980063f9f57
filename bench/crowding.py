"""`python -m bench.crowding`: the effect of one client that occupies every connection on the others.

One client, with or without a key, occupies as much as it can in several ways in turn; meanwhile a second user sends five
requests per second, each on a new connection. A row has the number and duration of its successful requests. The last rows
are clients that read a large response slowly: how much of it they received.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import math
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import uvloop

from bench.peers import free_port
from bench.site import machine, site

_POOL = 64
_CONNECTIONS = 500

#: More than the number of upstream connections.
_ATTACKERS = 96

_LARGE = 64 << 20

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Attack = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def compute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A compute server whose behaviour depends on the path."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1]
            if path == b"/files/quick":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            elif path == b"/files/large":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % _LARGE)
                for _ in range(_LARGE >> 16):
                    writer.write(bytes(65_536))
                    await writer.drain()
            elif path == b"/files/events":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
                while True:
                    writer.write(b"data: 1\n\n")
                    await writer.drain()
                    await asyncio.sleep(1.0)
            elif path == b"/files/tunnel":
                writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
                await reader.read()
                break
            else:
                while await reader.read(65_536):
                    pass
                break
    writer.close()


def _head(secret: str, method: str, path: str, *lines: str) -> bytes:
    head = [f"{method} /files/{path} HTTP/1.1", "Host: h", f"Authorization: Api-Key {secret}", *lines]
    return "\r\n".join(head).encode("ascii") + b"\r\n\r\n"


def attacks(secret: str) -> dict[str, Attack]:
    """What one client does on one connection, by name."""
    post = _head(secret, "POST", "body", "Content-Length: 1000000000")

    async def trickle(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(post)
        while True:
            writer.write(bytes(266))
            await writer.drain()
            await asyncio.sleep(0.2)

    async def burst(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(post + bytes(262_144))
        while True:
            await writer.drain()
            await asyncio.sleep(5.0)
            writer.write(b"x")

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
        lines = ("Connection: Upgrade", "Upgrade: websocket", key, "Sec-WebSocket-Version: 13")
        writer.write(_head(secret, "GET", "tunnel", *lines))
        await reader.read()

    async def unread(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_head(secret, "GET", "large"))
        while await reader.read(266):
            await asyncio.sleep(0.2)

    async def events(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_head(secret, "GET", "events"))
        while await reader.read(65_536):
            pass

    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n")
        await reader.read()

    return {
        "bodies at 1.3 KiB/s": trickle,
        "256 KiB, then a byte in 5 s": burst,
        "idle WebSockets": tunnel,
        "large responses read at 1.3 KiB/s": unread,
        "responses of an event a second": events,
        "idle connections without a key": silent,
        "half a head without a key": half,
    }


async def held(port: int, attack: Attack, over: asyncio.Event) -> None:
    """One connection of an attacker, reopened whenever it ends."""
    while not over.is_set():
        writer = None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            await attack(reader, writer)
        if writer is not None:
            writer.transport.abort()
        await asyncio.sleep(0.2)


async def send_request(port: int, secret: str) -> int:
    """The status of one request on its own connection; 0 if there is no response."""
    writer = None
    try:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(_head(secret, "GET", "quick"))
            return int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return 0
    finally:
        if writer is not None:
            writer.close()


async def crowd(port: int, name: str, attack: Attack, *, victim: str, seconds: float) -> None:
    """One attack, and a row of the table."""
    over = asyncio.Event()
    number = _CONNECTIONS + 100 if "without a key" in name else _ATTACKERS
    attackers = [asyncio.create_task(held(port, attack, over)) for _ in range(number)]
    # Time for the attack to build up.
    await asyncio.sleep(6.0)
    waits, statuses, sending = [], [], set()

    async def once() -> None:
        began = time.monotonic()
        statuses.append(await send_request(port, victim))
        waits.append(time.monotonic() - began)

    for _ in range(int(seconds * 5)):
        sending.add(asyncio.create_task(once()))
        await asyncio.sleep(0.2)
    await asyncio.gather(*sending)
    over.set()
    for task in attackers:
        task.cancel()
    await asyncio.gather(*attackers, return_exceptions=True)
    waits.sort()
    middle, late = waits[len(waits) // 2], waits[math.ceil(len(waits) * 0.99) - 1]
    print(
        f"| {name} | {statuses.count(200)} of {len(statuses)} | {middle * 1000:.0f} | {late * 1000:.0f} |", flush=True
    )
    await asyncio.sleep(2.0)


async def read_slowly(port: int, secret: str, per_second: int, seconds: float) -> None:
    """Read a large response at a steady pace, after 8 MiB at full speed so that the kernels grow their buffers."""
    sock = socket.socket()
    # Data in the client's receive buffer delays the moment when it notices a reset.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 131_072)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    writer.write(_head(secret, "GET", "large"))
    await reader.readexactly(8 << 20)
    began, taken, fate = time.monotonic(), 0, "is still served"
    try:
        while time.monotonic() - began < seconds:
            piece = await reader.read(per_second // 4)
            taken += len(piece)
            if not piece:
                fate = "was ended"
                break
            await asyncio.sleep(0.25)
    except ConnectionResetError:
        fate = "was reset"
    print(
        f"| a reader at {per_second >> 10} KiB/s | {fate} after {time.monotonic() - began:.0f} s, {taken >> 10} KiB |"
        " | |",
        flush=True,
    )
    writer.transport.abort()


async def show(port: int, secrets: Sequence[str], options: argparse.Namespace) -> None:
    """All attacks in turn."""
    attacker, victim = secrets
    for name, attack in attacks(attacker).items():
        if options.only in name:
            await crowd(port, name, attack, victim=victim, seconds=options.seconds)
    if options.only in "a reader":
        paces = (64 << 10, 16 << 10, 4 << 10)
        await asyncio.gather(*(read_slowly(port, victim, pace, options.reading_seconds) for pace in paces))


def main(arguments: Sequence[str]) -> int:
    """Run all attacks against one proxy and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.crowding", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each attack")
    parser.add_argument("--reading-seconds", type=float, default=120.0, help="for the slow readers")
    parser.add_argument("--only", default="", help="the attacks with this in their names")
    options = parser.parse_args(arguments)
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}\n")
    print("| one client | the other: served | median, ms | p99, ms |")
    print("|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory(prefix="kpc-", dir="/tmp") as directory,
        site(Path(directory), free_port()) as ours,
    ):
        secrets = ours.keys(2)
        port = free_port()
        environment = {
            "KEYPROXY_UPSTREAM__CONNECTIONS_MAX": str(_POOL),
            "KEYPROXY_LISTEN__CONNECTIONS_MAX": str(_CONNECTIONS),
            "KEYPROXY_LISTEN__BODY_BYTES_MAX": "0",
        }

        async def play() -> None:
            server = await asyncio.start_server(compute, "127.0.0.1", ours.upstream, backlog=1024)
            async with server:
                await show(port, secrets, options)

        with ours.serving(port, environment=environment):
            uvloop.run(play())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
