"""HTTP as bytes, for both ends of the wire: a client and an upstream that send exactly the given bytes.

The reader here is a plain one of its own, so that a mistake in the product's cannot hide itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

_LINE_MAX = 1 << 20


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass
class Message:
    """A request or a response as it came over the wire."""

    start: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    is_whole: bool = True

    @property
    def status(self) -> int:
        """Of a response."""
        return int(self.start.split(" ")[1])

    def all(self, name: str) -> list[str]:
        """Every value of a header, in order."""
        return [value for one, value in self.headers if one.lower() == name.lower()]

    def one(self, name: str) -> str | None:
        """The value of a header that is there once or not at all."""
        values = self.all(name)
        assert len(values) <= 1, f"{name} is there {len(values)} times"
        return values[0] if values else None


async def read_head(reader: asyncio.StreamReader) -> Message | None:
    """The next message's head; None at the end of the connection."""
    raw = b""
    while not raw.endswith(b"\r\n\r\n"):
        line = await reader.readline()
        if not line:
            assert not raw.strip(), f"the connection ended within a head: {raw!r}"
            return None
        raw += line
    start, *lines = raw[:-4].decode("latin-1").split("\r\n")
    headers = [(line.partition(":")[0], line.partition(":")[2].strip(" \t")) for line in lines]
    return Message(start, headers)


async def read_body(reader: asyncio.StreamReader, message: Message, *, has_none: bool, until_close: bool) -> None:
    """Read a message's body into it. `is_whole` is False if the connection ended before the body did."""
    if has_none:
        return
    coding, length = message.one("Transfer-Encoding"), message.one("Content-Length")
    try:
        if coding == "chunked":
            while size := int((await reader.readline()).split(b";")[0] or b"x", 16):
                message.body += await reader.readexactly(size)
                assert await reader.readexactly(2) == b"\r\n"
            while (await reader.readline()).strip():
                pass
        elif length is not None:
            message.body = await reader.readexactly(int(length))
        elif until_close:
            message.body = await reader.read()
    except asyncio.IncompleteReadError as error:
        message.body += error.partial
        message.is_whole = False
    except (ValueError, ConnectionResetError):
        message.is_whole = False


class Client:
    """One client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def answers(self, *, method: str = "POST", seconds: float = 5.0) -> list[Message]:
        """All responses to one request: interim ones, and last the final one."""
        found = [await self.answer(method=method, seconds=seconds)]
        while found[-1].status < 200:
            found.append(await self.answer(method=method, seconds=seconds))
        return found

    async def answer(self, *, method: str = "POST", seconds: float = 5.0) -> Message:
        """The next response, interim or final. Fails at the end of the connection."""
        async with asyncio.timeout(seconds):
            message = await read_head(self.reader)
            assert message is not None, "the connection ended without a response"
            if message.status < 200:
                return message
            has_none = method == "HEAD" or message.status in (204, 304)
            await read_body(self.reader, message, has_none=has_none, until_close=True)
            return message

    async def ends(self, *, seconds: float = 5.0) -> bytes:
        """The remaining bytes until the other side closes."""
        async with asyncio.timeout(seconds):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""

    def half_close(self) -> None:
        """Close the sending side, but keep reading."""
        self.writer.write_eof()

    async def close(self) -> None:
        """Close both ways."""
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def connect(address: tuple[str, int] | str, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Client]:
    """A connection to (host, port), with TLS if there is a context, or to a unix socket's path."""
    if isinstance(address, str):
        reader, writer = await asyncio.open_unix_connection(address, limit=_LINE_MAX)
    else:
        reader, writer = await asyncio.open_connection(*address, limit=_LINE_MAX, ssl=tls)
    client = Client(reader, writer)
    try:
        yield client
    finally:
        await client.close()


#: Responds to one request on its connection. True: keep the connection.
ResponseWriter = Callable[[Message, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool]]


def answer_with(raw: bytes, *, goes_on: bool = True) -> ResponseWriter:
    """Respond to every request with these bytes."""

    async def answer(_request: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(raw)
        return goes_on

    return answer


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


@dataclass
class Upstream:
    """A compute server that works on bytes. `requests`: all complete requests; `heads`: all heads."""

    answering: ResponseWriter = field(default_factory=lambda: answer_with(OK))
    requests: list[Message] = field(default_factory=list)
    heads: list[Message] = field(default_factory=list)
    connections: int = 0
    open_connections: int = 0
    reads_bodies: bool = True
    port: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def serving(self, path: str | None = None) -> AsyncIterator[Upstream]:
        """Listen on a free port, or on a unix socket."""
        if path is not None:
            self._server = await asyncio.start_unix_server(self._connection, path, limit=_LINE_MAX)
        else:
            self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, limit=_LINE_MAX)
            self.port = self._server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            await self.stop()

    async def start_again(self) -> None:
        """Listen on the same port again."""
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, limit=_LINE_MAX)

    async def stop(self) -> None:
        """Stop listening, and close every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open_connections += 1
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open_connections -= 1
            self.gone.set()
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (request := await read_head(reader)) is not None:
            self.heads.append(request)
            if self.reads_bodies:
                await read_body(reader, request, has_none=False, until_close=False)
                if not request.is_whole:
                    return
                self.requests.append(request)
            if not await self.answering(request, reader, writer):
                return
            await writer.drain()
