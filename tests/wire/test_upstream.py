"""The upstream side: connections are reused only after a clean exchange, bounded, and never sent to twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyproxy.model import Ending
from tests.rawhttp import OK, Message, Upstream, answer_with
from tests.wire.conftest import Start, Wire, request


async def test_one_connection_serves_request_after_request(wire: Wire) -> None:
    async with wire.client() as client:
        for _ in range(10):
            await client.send(request("POST", "/", body=b"x"))
            assert (await client.answer()).status == 200
    assert wire.upstream.connections == 1


@pytest.mark.parametrize(
    "raw",
    [
        OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen",
        OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
async def test_a_connection_is_not_reused_after_an_unclean_response(start: Start, raw: bytes) -> None:
    wire = await start(serving=Upstream(answer_with(raw)))
    async with wire.client() as client:
        for _ in range(3):
            await client.send(request("GET", "/"))
            assert (await client.answer()).body == b"{}"
    assert wire.upstream.connections == 3


async def test_a_connection_with_unsolicited_bytes_is_not_reused(start: Start) -> None:
    responded = asyncio.Event()

    async def and_more(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(OK)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen")
        await writer.drain()
        responded.set()
        return True

    wire = await start(serving=Upstream(and_more))
    async with wire.client() as client:
        for _ in range(2):
            await client.send(request("GET", "/"))
            assert (await client.answer()).body == b"{}"
            await responded.wait()
            responded.clear()
    assert wire.upstream.connections == 2


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 99 Low\r\n\r\n",
        b"HTTP/1.1 999 High\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nnonsense\r\n",
        b"<html>not http</html>\r\n\r\n",
    ],
)
async def test_a_malformed_response_is_502(start: Start, raw: bytes) -> None:
    wire = await start(serving=Upstream(answer_with(raw)))
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        answer = (await client.answers())[-1]
        assert (answer.status, json.loads(answer.body)["code"]) == (502, "upstream_invalid")
        await client.send(request("GET", "/"))
        assert (await client.answers())[-1].status == 502


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    ],
)
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
async def test_a_truncated_response_is_visible_to_the_client(start: Start, raw: bytes, version: str) -> None:
    wire = await start(serving=Upstream(answer_with(raw, goes_on=False)))
    async with wire.client() as client:
        await client.send(request("GET", "/").replace(b"HTTP/1.1", version.encode()))
        try:
            answer = await client.answer()
        except ConnectionResetError:
            pass
        else:
            assert not answer.is_whole
    assert wire.recorder.seen[0].ending is Ending.CUT


async def test_an_upstream_that_closes_without_a_response_is_502(start: Start) -> None:
    wire = await start(serving=Upstream(answer_with(b"", goes_on=False)))
    async with wire.client() as client:
        await client.send(request("POST", "/", body=b"x"))
        assert json.loads((await client.answer()).body)["code"] == "upstream_unreachable"
    assert len(wire.upstream.requests) == 1


async def test_an_upstream_that_is_silent_is_504(start: Start) -> None:
    async def silent(_message: Message, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> bool:
        await reader.read()
        return False

    wire = await start(serving=Upstream(silent), upstream={"first_byte_timeout_seconds": 0.2})
    async with wire.client() as client:
        await client.send(request("POST", "/", body=b"x"))
        assert json.loads((await client.answer()).body)["code"] == "upstream_timeout"
    async with asyncio.timeout(2):
        await wire.upstream.gone.wait()


async def test_an_upstream_that_stops_in_the_middle_is_cut(start: Start) -> None:
    async def stops(_message: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await reader.read()
        return False

    wire = await start(serving=Upstream(stops), upstream={"idle_timeout_seconds": 0.2})
    async with wire.client() as client:
        await client.send(request("POST", "/", body=b"x"))
        with contextlib.suppress(ConnectionResetError):
            assert not (await client.answer()).is_whole


class _Stale:
    """Responds to the first request, then closes when the second one arrives: a deliberate keep-alive race."""

    def __init__(self) -> None:
        self.served = 0

    async def __call__(self, _message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        self.served += 1
        if self.served == 2:
            return False
        writer.write(OK)
        return True


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"])
async def test_an_idempotent_request_is_repeated_once_on_a_stale_connection(start: Start, method: str) -> None:
    wire = await start(serving=Upstream(_Stale()))
    async with wire.client() as client:
        for _ in range(2):
            await client.send(request(method, "/"))
            assert (await client.answer(method="HEAD" if method == "HEAD" else "GET")).status == 200
            if method == "HEAD":
                break
    assert wire.upstream.connections <= 2


@pytest.mark.parametrize(("method", "body"), [("POST", b"x"), ("PATCH", b"x"), ("POST", b""), ("PUT", b"x")])
async def test_a_request_that_is_not_idempotent_or_has_a_body_is_never_sent_twice(
    start: Start, method: str, body: bytes
) -> None:
    wire = await start(serving=Upstream(_Stale()))
    async with wire.client() as client:
        await client.send(request(method, "/1", body=body))
        assert (await client.answer()).status == 200
        await client.send(request(method, "/2", body=body))
        assert (await client.answer()).status == 502
    assert [one.start.split(" ")[1] for one in wire.upstream.requests] == ["/1", "/2"]


async def test_connections_stay_within_the_bound_and_waiting_requests_are_served_in_turn(start: Start) -> None:
    async def slow(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(0.02)
        writer.write(OK)
        return True

    wire = await start(serving=Upstream(slow), upstream={"connections_max": 2})

    async def one() -> int:
        async with wire.client() as client:
            await client.send(request("POST", "/", body=b"x"))
            return (await client.answer()).status

    assert await asyncio.gather(*(one() for _ in range(20))) == [200] * 20
    assert wire.upstream.connections == 2
    assert "max=2" in repr(wire.pool)


async def test_waiting_too_long_for_a_connection_is_refused_as_overloaded(start: Start) -> None:
    release = asyncio.Event()

    async def held(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await release.wait()
        writer.write(OK)
        return True

    wire = await start(serving=Upstream(held), upstream={"connections_max": 1, "connect_timeout_seconds": 0.2})
    async with wire.client() as one, wire.client() as two:
        await one.send(request("GET", "/"))
        await two.send(request("GET", "/"))
        assert json.loads((await two.answer()).body)["code"] == "overloaded"
        release.set()
        assert (await one.answer()).status == 200


async def test_a_client_that_leaves_while_it_waits_gives_up_its_place(start: Start) -> None:
    release = asyncio.Event()

    async def held(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await release.wait()
        writer.write(OK)
        return True

    wire = await start(serving=Upstream(held), upstream={"connections_max": 1})
    async with wire.client() as one:
        await one.send(request("GET", "/1"))
        async with wire.client() as two:
            await two.send(request("POST", "/2", "Content-Length: 5") + b"x")
            async with asyncio.timeout(2):
                while "waiting=1" not in repr(wire.pool):
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(2):
            while "waiting=0" not in repr(wire.pool):
                await asyncio.sleep(0.01)
        release.set()
        assert (await one.answer()).status == 200
    assert [seen.start for seen in wire.upstream.heads] == ["GET /1 HTTP/1.1"]


async def test_an_upstream_on_a_unix_socket_is_an_upstream(start: Start, tmp_path: Path) -> None:
    path = str(tmp_path / "u.sock")
    async with Upstream().serving(path) as far:
        wire = await start(upstream={"url": f"unix:{path}"})
        async with wire.client() as client:
            await client.send(request("GET", "/"))
            assert (await client.answer()).status == 200
        assert len(far.requests) == 1


async def test_the_pool_recovers_when_the_upstream_comes_back(start: Start) -> None:
    far = Upstream()
    wire = await start(serving=far)
    await far.stop()
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        assert (await client.answer()).status == 502
        assert not await wire.pool.reach()
        async with far.serving():
            await client.send(request("GET", "/"))
            assert (await client.answer()).status == 200
            assert await wire.pool.reach()


async def test_a_response_before_the_end_of_the_request_is_relayed_and_ends_both(start: Start) -> None:
    far = Upstream(answer_with(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno", goes_on=False), reads_bodies=False)
    wire = await start(serving=far)
    async with wire.client() as client:
        await client.send(request("POST", "/", "Content-Length: 1000000") + b"x")
        answer = await client.answer()
        assert (answer.status, answer.body, answer.one("Connection")) == (413, b"no", "close")
        assert await client.ends() == b""
    assert wire.pool.counts()["idle"] == 0


@contextlib.contextmanager
def _deaf() -> Iterator[int]:
    """A port on which connecting takes forever: the queue of a server that accepts nothing is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, contextlib.ExitStack() as stack:
        address = listening.getsockname()
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(address)
        yield address[1]


@pytest.mark.parametrize("number", [1, 3])
async def test_an_upstream_to_which_connecting_times_out_is_unreachable_and_not_overloaded(
    start: Start, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    with _deaf() as port:
        url = f"http://127.0.0.1:{port}"
        wire = await start(upstream={"url": url, "connections_max": 2, "connect_timeout_seconds": 0.3})
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(wire.client()) for _ in range(number)]
            for _ in range(2):
                for client in clients:
                    await client.send(request("POST", "/", body=b"x"))
                answers = [await client.answer() for client in clients]
                result = {(answer.status, json.loads(answer.body)["code"]) for answer in answers}
                assert result == {(502, "upstream_unreachable")}
    assert "timed out" in wire.pool.unreachable_because
    # One line for the outage, which names the upstream.
    logged = [record.getMessage() for record in caplog.records if "upstream unreachable" in record.getMessage()]
    assert logged == [f"upstream unreachable: 127.0.0.1:{port}: timed out"]


async def test_an_upstream_that_does_not_accept_is_unreachable_also_when_the_event_loop_is_late(start: Start) -> None:
    with _deaf() as port:
        wire = await start(upstream={"url": f"http://127.0.0.1:{port}", "connect_timeout_seconds": 0.3})
        async with wire.client() as client:
            await client.send(request("POST", "/", body=b"x"))
            async with asyncio.timeout(5):
                while not wire.pool.counts()["connecting"]:
                    await asyncio.sleep(0.001)
            time.sleep(0.5)  # both the time for connecting and that for waiting pass in one turn
            answer = await client.answer()
            assert (answer.status, json.loads(answer.body)["code"]) == (502, "upstream_unreachable")


async def test_a_tls_upstream_that_never_finishes_its_handshake_is_unreachable(start: Start) -> None:
    async def silent(_request: Message, _reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> bool:
        return True

    async with Upstream(silent).serving() as far:
        url = f"https://127.0.0.1:{far.port}"
        wire = await start(
            upstream={"url": url, "connect_timeout_seconds": 0.3}, upstream_tls=ssl.create_default_context()
        )
        async with wire.client() as client:
            await client.send(request("POST", "/", body=b"x"))
            answer = await client.answer()
            assert (answer.status, json.loads(answer.body)["code"]) == (502, "upstream_unreachable")


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\n\nhi",
        b"HTTP/1.1 200 OK\r\nA: b\n",
        b"HTTP/1.1 200 OK\r\nA: b\rC",
        b"HTTP/1.1 103 Early\n\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\n",
        b"<html>not http</html>",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x15\x03\x03\x00\x02\x02\x46",
        b"\r\nHTTP/1.1 200 OK",
        b"HTTP/2",
        b"\x00",
    ],
)
@pytest.mark.parametrize("cut", [None, 1, 7])
async def test_bytes_that_cannot_become_a_response_are_502_immediately(
    start: Start, raw: bytes, cut: int | None
) -> None:
    async def answers(_request: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        for at in range(0, len(raw), cut or len(raw)):
            writer.write(raw[at : at + (cut or len(raw))])
            await asyncio.sleep(0.005)
        await reader.read()  # neither end closes
        return False

    wire = await start(serving=Upstream(answers))
    async with wire.client() as client:
        await client.send(request("GET", "/"))
        answer = (await client.answers(seconds=2))[-1]
        assert (answer.status, json.loads(answer.body)["code"]) == (502, "upstream_invalid")
