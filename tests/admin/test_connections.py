"""The resources that a client of the admin API can occupy, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from keyproxy.admin.connections import AdminConnections, Bounds
from keyproxy.store.directory.directory import KeyWish
from keyproxy.store.postgres.database import Database
from keyproxy.wire.tls import server_context
from tests.admin.conftest import FILE_TOKEN, Api, serving
from tests.waiting import until

LIVE = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"


@contextlib.asynccontextmanager
async def _connected(api: Api) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A raw connection that reads only what it needs."""
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: "))
    return head + await reader.readexactly(length)


@pytest.mark.parametrize("answers", [0, 1, 2])
async def test_a_head_that_comes_byte_by_byte_is_cut_off_in_bounded_time(database: Database, answers: int) -> None:
    async with (
        serving(database, bounds=Bounds(idle_seconds=0.3)) as api,
        _connected(api) as (reader, writer),
        asyncio.timeout(10),
    ):
        for _ in range(answers):
            writer.write(LIVE)
            assert b" 200 " in await _answer(reader)
        started = time.monotonic()
        gone = asyncio.create_task(reader.read())
        while not gone.done():
            writer.write(b"G")
            await asyncio.wait([gone], timeout=0.02)
        with contextlib.suppress(ConnectionResetError):
            assert b" 200 " not in gone.result()
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("answers", [0, 2])
async def test_a_head_without_an_end_is_refused_before_it_fills_the_memory(database: Database, answers: int) -> None:
    field = b"X-%d: " + b"a" * 60_000 + b"\r\n"
    async with serving(database) as api, _connected(api) as (reader, writer), asyncio.timeout(10):
        for _ in range(answers):
            writer.write(LIVE[:-2] + field % 0 + b"\r\n")
            assert b" 200 " in await _answer(reader)
        writer.write(LIVE[:-2] + field % 1 + field % 2)
        await writer.drain()
        writer.write(b"X-3: " + b"a" * 12_000)
        assert (await reader.read()).startswith(b"HTTP/1.1 431 ")


async def test_bytes_after_a_malformed_head_are_not_kept(database: Database) -> None:
    async with serving(database) as api, _connected(api) as (reader, writer), asyncio.timeout(10):
        gc.collect()
        gc.disable()
        try:
            writer.write(LIVE[:-2] + (b"X: " + b"a" * 70_000 + b"\r\n") * 3)
            assert b" 400 " in await _answer(reader)
            assert not [one for one in gc.get_objects() if isinstance(one, LineTooLong)]
        finally:
            gc.enable()


async def test_at_the_bound_the_connection_that_has_been_idle_longest_leaves(database: Database) -> None:
    async with serving(database, bounds=Bounds(connections_max=2)) as api, contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(_connected(api)) for _ in range(2)]
        for reader, writer in reversed(held):
            writer.write(LIVE)
            assert b" 200 " in await _answer(reader)
            await asyncio.sleep(0.1)
        assert await _tried(api) == 200
        async with asyncio.timeout(10):
            assert await held[1][0].read() == b""
        held[0][1].write(LIVE)
        assert b" 200 " in await _answer(held[0][0])


async def test_a_slow_but_steady_reader_gets_the_complete_response(database: Database) -> None:
    async with serving(database, bounds=Bounds(unread_seconds=0.3)) as api:
        await api.user()
        wishes = [("u_1", KeyWish(str(number).rjust(200, "x"))) for number in range(500)]
        await api.directory.key_batches.issue(wishes)
        ask = f"GET /v1/keys?limit=500 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {FILE_TOKEN}\r\n\r\n".encode()

        def read_slowly() -> int:
            host, port = api.url.removeprefix("http://").split(":")
            taken = 0
            with socket.create_connection((host, int(port)), timeout=20) as sock:
                sock.sendall(ask * 40 + LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                began = time.monotonic()
                while piece := sock.recv(65_536):
                    taken += len(piece)
                    if time.monotonic() - began < 2.0:
                        time.sleep(0.05)
            return taken

        assert await asyncio.to_thread(read_slowly) > 40 * 200 * 500
        assert len(api.log) == 41


async def test_a_client_beyond_the_bound_is_refused_and_the_others_continue(database: Database) -> None:
    async with serving(database, bounds=Bounds(connections_max=2)) as api, contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(_connected(api)) for _ in range(2)]
        create = (
            f"POST /v1/tenants HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {FILE_TOKEN}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        ).encode()
        for _, writer in held:
            writer.write(create)
        await asyncio.sleep(0.2)
        async with asyncio.timeout(10):
            async with _connected(api) as (reader, writer):
                writer.write(LIVE)
                result = await reader.read()
            assert result.startswith(b"HTTP/1.1 503 ")
            assert json.loads(result.partition(b"\r\n\r\n")[2])["code"] == "overloaded"
            assert (b"\r\nDate: " in result, b"\r\nX-Request-Id: " in result) == (True, True)
            async with _connected(api) as (reader, _):
                assert (await reader.read()).startswith(b"HTTP/1.1 503 "), "also one that sends nothing"
            held[0][1].write(b" " * 99)
            assert b" 400 " in await _answer(held[0][0])
            held[1][1].close()

            async def has_room() -> bool:
                return await _tried(api) == 200

            await until(has_room, "a place is free")


async def _tried(api: Api) -> int:
    return (await api.call("GET", "/livez", headers={"Connection": "close"})).status


async def test_bodies_that_do_not_arrive_keep_no_other_client_out(database: Database) -> None:
    bounds = Bounds(connections_max=2, body_seconds=0.05)
    async with serving(database, bounds=bounds) as api, contextlib.AsyncExitStack() as stack, asyncio.timeout(10):
        head = (
            f"POST /v1/tenants HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {FILE_TOKEN}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        ).encode()
        held = [await stack.enter_async_context(_connected(api)) for _ in range(2)]
        for _, writer in held:
            writer.write(head)
            await asyncio.sleep(0.1)
            # What drips is not what arrives.
            writer.write(b"{")
        async with _connected(api) as (reader, writer):
            writer.write(LIVE)
            assert b" 200 " in await _answer(reader)
        with contextlib.suppress(ConnectionError):
            assert await held[0][0].read() == b"", "the one that began first is closed"
        held[1][1].write(b" " * 99)
        assert b" 400 " in await _answer(held[1][0])


async def test_a_client_that_does_not_read_its_response_is_disconnected_in_bounded_time(database: Database) -> None:
    async with serving(database, bounds=Bounds(unread_seconds=0.3)) as api:
        await api.user()
        wishes = [("u_1", KeyWish(str(number).rjust(200, "x"))) for number in range(500)]
        await api.directory.key_batches.issue(wishes)
        ask = f"GET /v1/keys?limit=500 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {FILE_TOKEN}\r\n\r\n".encode()
        async with _connected(api) as (reader, writer), asyncio.timeout(20):
            writer.write(ask * 60)  # 18 MB of responses, partly held in socket buffers
            assert await reader.readexactly(12) == b"HTTP/1.1 200"
            await until(lambda: not api.listener.open_connections, "the connection is closed", seconds=20)
        assert 0 < len(api.log) < 60
        assert (await api.call("GET", "/livez")).status == 200


async def test_a_client_without_tls_gets_a_plain_text_400(tmp_path: Path) -> None:
    async def ok(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text="ok")

    file, authority = tmp_path / "server.pem", trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(file))
    connections = AdminConnections(web.Server(ok), Bounds())
    sock = socket.create_server(("127.0.0.1", 0))
    host, port = sock.getsockname()
    await connections.start(sock, server_context(str(file), ""))
    try:
        for sent, result in ((LIVE, b"HTTP/1.1 400 "), (b"\x16\x03\x01\x00\x05hello", b"\x15\x03")):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(sent)
            async with asyncio.timeout(5):
                got = await reader.read()
            writer.close()
            assert got.startswith(result)
            assert (b"This port speaks TLS" in got) == (sent == LIVE)
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        reader, writer = await asyncio.open_connection(host, port, ssl=trusting)
        writer.write(LIVE)
        assert (await _answer(reader)).startswith(b"HTTP/1.1 200 ")
        writer.close()
    finally:
        connections.stop()
