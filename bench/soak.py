"""`make soak`: the memory of keyproxy with hostile, slow, or many peers.

Ten thousand idle connections; slowhttptest's four modes; 1 GiB uploaded in chunks to a slow upstream; 1 GiB downloaded by
a slow client. Before each scenario the kernel's record of the peak (VmHWM) is reset, so every row is for that scenario
only. Meanwhile another client sends a request from time to time, which must succeed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import uvloop

from bench.load import peak_mib, rss_mib
from bench.peers import free_port
from bench.site import Site, machine, site

_CHUNK = bytes(65_536)

#: (name, flag of slowhttptest, path, whether its clients have a key)
_MODES = (
    ("slow headers", "-H", "/files/2", False),
    ("slow body, without a key", "-B", "/files/2", False),
    ("slow body, with a key", "-B", "/files/2", True),
    ("range", "-R", "/files/1000000", True),
    ("slow read", "-X", "/files/1000000", True),
)

#: The value of slowhttptest's Accept header, which also adds the key to the head.
_ACCEPT = "*/*\r\nAuthorization: Api-Key {secret}"


class Upstream:
    """Responds to GET /files/N with N bytes, and reads any body, with a pause after each batch of bytes."""

    def __init__(self, *, pause_bytes: int = 4 << 20, pause_seconds: float = 0.01) -> None:
        self.taken_bytes = 0
        self._pause_bytes = pause_bytes
        self._pause_seconds = pause_seconds

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from the proxy."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1]
                if b"transfer-encoding: chunked" in head.lower():
                    await self._take(reader)
                elif b"content-length:" in head.lower():
                    await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
                number = int(path.rpartition(b"/")[2]) if path.startswith(b"/files/") else 0
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % number)
                for _ in range(number // len(_CHUNK)):
                    writer.write(_CHUNK)
                    await writer.drain()
                writer.write(bytes(number % len(_CHUNK)))
                await writer.drain()
        writer.close()

    async def _take(self, reader: asyncio.StreamReader) -> None:
        since_pause = 0
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
            self.taken_bytes += size
            since_pause += size
            if since_pause > self._pause_bytes:
                since_pause = 0
                await asyncio.sleep(self._pause_seconds)
        await reader.readline()


class Watch:
    """The proxy's memory during one scenario, and the response times of another client meanwhile."""

    def __init__(self, pids: Sequence[int], port: int, secret: str) -> None:
        self._pids = pids
        self._port = port
        self._secret = secret
        self.worst_seconds = 0.0
        self.failed = 0
        self.succeeded = 0

    @contextlib.asynccontextmanager
    async def over(self, name: str) -> AsyncIterator[None]:
        """Watch while the context lasts, then print a row of the table."""
        self.worst_seconds, self.failed, self.succeeded = 0.0, 0, 0
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
        before, started = rss_mib(self._pids), time.monotonic()
        sending = asyncio.create_task(self._send_requests())
        try:
            yield
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        peak = peak_mib(self._pids)
        print(
            f"| {name} | {before:.1f} | {peak:.1f} | {rss_mib(self._pids):.1f} | {time.monotonic() - started:.0f} |"
            f" {self.succeeded} of {self.succeeded + self.failed} | {self.worst_seconds * 1000:.0f} |",
            flush=True,
        )

    async def _send_requests(self) -> None:
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(10):
                    status = await send_request(self._port, f"{_head('GET', '/files/2', self._secret)}\r\n".encode())
                self.succeeded += status == 200
                self.failed += status != 200
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                self.failed += 1
            self.worst_seconds = max(self.worst_seconds, time.monotonic() - began)
            await asyncio.sleep(0.2)


def _head(method: str, path: str, secret: str) -> str:
    return f"{method} {path} HTTP/1.1\r\nHost: h\r\nAuthorization: Api-Key {secret}\r\n"


async def send_request(port: int, raw: bytes) -> int:
    """The status of one request on its own connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        return int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])
    finally:
        writer.close()


async def idle(port: int, secret: str, *, number: int, watch: Watch) -> None:
    """Connections that made one request and are idle."""
    raw = f"{_head('GET', '/files/2', secret)}\r\n".encode()
    places = asyncio.Semaphore(64)
    writers: list[asyncio.StreamWriter] = []

    async def one() -> None:
        async with places:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            writer.write(raw)
            await reader.readuntil(b"\r\n\r\n")

    async with watch.over(f"{number:,} idle connections, each used once"):
        await asyncio.gather(*(one() for _ in range(number)))
        await asyncio.sleep(2)
    for writer in writers:
        writer.close()
    await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


async def slow(port: int, secret: str, mode: tuple[str, str, str, bool], *, seconds: int, watch: Watch) -> None:
    """One mode of slowhttptest, with 1,000 connections."""
    name, flag, path, has_key = mode
    command = [
        "slowhttptest",
        flag,
        "-c",
        "1000",
        "-r",
        "500",
        "-i",
        "2",
        "-l",
        str(seconds),
        "-p",
        "5",
        "-v",
        "0",
        "-u",
        f"http://127.0.0.1:{port}{path}",
        "-m",
        _ACCEPT.format(secret=secret) if has_key else "*/*",
    ]
    async with watch.over(f"slowhttptest, {name}, 1,000 connections"):
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        await process.wait()


async def upload(port: int, secret: str, *, bytes_: int, watch: Watch) -> None:
    """A body in chunks, as fast as it is read."""
    async with watch.over(f"{bytes_ >> 20:,} MiB uploaded in chunks"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{_head('POST', '/files/2', secret)}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(bytes_ // len(_CHUNK)):
            writer.write(b"%x\r\n%b\r\n" % (len(_CHUNK), _CHUNK))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
    if not head.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"the upload got {head!r}")


async def download(port: int, secret: str, *, bytes_: int, pause_seconds: float, watch: Watch) -> None:
    """A body read in pieces, with a pause after each 4 MiB."""
    async with watch.over(f"{bytes_ >> 20:,} MiB downloaded by a slow reader"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{_head('GET', f'/files/{bytes_}', secret)}\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        left, since_pause = bytes_, 0
        while left:
            piece = await reader.read(min(65_536, left))
            if not piece:
                raise SystemExit(f"the download ended {left} bytes early")
            left -= len(piece)
            since_pause += len(piece)
            if since_pause >= 4 << 20:
                since_pause = 0
                await asyncio.sleep(pause_seconds)
        writer.close()


async def show(ours: Site, upstream: Upstream, options: argparse.Namespace) -> None:
    """Every scenario in turn, with the same proxy."""
    secret = (await asyncio.to_thread(ours.keys, 1))[0]
    server = await asyncio.start_server(upstream.connection, "127.0.0.1", ours.upstream)
    port = free_port()
    async with server:
        stack = contextlib.ExitStack()
        # Room for the other client.
        bound = str(options.connections + 100)
        environment = {"KEYPROXY_LISTEN__BODY_BYTES_MAX": "0", "KEYPROXY_LISTEN__CONNECTIONS_MAX": bound}
        pids = await asyncio.to_thread(lambda: stack.enter_context(ours.serving(port, environment=environment)))
        try:
            watch = Watch(pids, port, secret)
            shows: list[Callable[[], Awaitable[None]]] = [
                lambda: upload(port, secret, bytes_=options.mib << 20, watch=watch),
                lambda: download(port, secret, bytes_=options.mib << 20, pause_seconds=0.05, watch=watch),
            ]
            for one in shows:
                await one()
            if shutil.which("slowhttptest"):
                for mode in _MODES:
                    await slow(port, secret, mode, seconds=options.seconds, watch=watch)
            else:
                print("slowhttptest is skipped: it is not installed")
            # Last: Python does not return memory to the system, and this scenario needs the most.
            await idle(port, secret, number=options.connections, watch=watch)
        finally:
            await asyncio.to_thread(stack.close)


def main(arguments: Sequence[str]) -> int:
    """Run all scenarios and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000, help="that lie idle")
    parser.add_argument("--mib", type=int, default=1024, help="to upload and to download")
    parser.add_argument("--seconds", type=int, default=30, help="for each mode of slowhttptest")
    options = parser.parse_args(arguments)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}\n")
    print("| scenario | MiB before | peak MiB | MiB after | seconds | others served | longest wait, ms |")
    print("|---|---|---|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory(prefix="kps-", dir="/tmp") as directory,
        site(Path(directory), free_port()) as ours,
    ):
        uvloop.run(show(ours, Upstream(), options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
