"""The assertion of a request is signed before it takes a connection, and is fresh when it is sent."""

from __future__ import annotations

import asyncio

import pytest

from keyproxy.model import Identity
from keyproxy.ports.gate import Assertions
from keyproxy.reasons import Reason, Refusal
from tests.rawhttp import OK, Message, Upstream
from tests.waiting import until
from tests.wire.conftest import Start, Wire, request


class Signer(Assertions):
    """Signs with a serial number. `fails`: there is no key. `life_seconds`: until an assertion is renewed."""

    def __init__(self, number: int = 1) -> None:
        self.number = number
        self.signed = 0
        self.fails = False
        self.life_seconds = 60.0

    def sign(self, identity: Identity, now_mono: float) -> None:
        if self.fails:
            raise Refusal(Reason.STORE_UNAVAILABLE, "no signing key is published")
        self.signed += 1
        cached = identity.assertion
        cached.line = b"X-Keyproxy-Assertion: %d.%d\r\n" % (self.number, self.signed)
        cached.renew_mono_seconds = now_mono + self.life_seconds
        cached.signed_by = self.number


def signing(wire: Wire, number: int = 1) -> Signer:
    signer = Signer(number)
    wire.server.assertions = signer
    return signer


def assertions(wire: Wire) -> list[str | None]:
    return [one.one("X-Keyproxy-Assertion") for one in wire.upstream.requests]


async def test_an_identity_is_signed_once_until_it_is_due_or_the_signer_changes(wire: Wire) -> None:
    signing(wire)
    async with wire.client() as client:

        async def send() -> None:
            await client.send(request("POST", "/", body=b"x"))
            assert (await client.answer()).status == 200

        for _ in range(3):
            await send()
        signing(wire, 2).life_seconds = 0.05
        await send()
        await asyncio.sleep(0.1)
        await send()
        wire.server.assertions = None
        await send()
    assert assertions(wire) == ["1.1", "1.1", "1.1", "2.1", "2.2", None]


async def test_a_request_that_cannot_be_signed_is_refused_without_a_connection(wire: Wire) -> None:
    signer = signing(wire)
    signer.fails = True
    async with wire.client() as client:
        for _ in range(5):
            await client.send(request("POST", "/", body=b"x"))
            assert (await client.answer()).status == 503
    assert wire.upstream.connections == 0
    assert [one.reason for one in wire.recorder.seen] == [Reason.STORE_UNAVAILABLE] * 5


async def test_a_request_that_waited_for_a_connection_has_an_assertion_of_the_time_it_is_sent(start: Start) -> None:
    may_respond = asyncio.Event()

    async def slow(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await may_respond.wait()
        writer.write(OK)
        await writer.drain()
        return True

    wire = await start(serving=Upstream(slow), upstream={"connections_max": 1})
    signer = signing(wire)
    signer.life_seconds = 0.05
    async with wire.client() as first, wire.client() as second:
        await first.send(request("POST", "/", body=b"x"))
        await until(lambda: len(wire.upstream.requests) == 1)
        await second.send(request("POST", "/", body=b"x"))
        await asyncio.sleep(0.1)
        may_respond.set()
        assert [(await client.answer()).status for client in (first, second)] == [200, 200]
    assert assertions(wire) == ["1.1", "1.2"]


@pytest.mark.parametrize("waiting", [1, 8])
async def test_requests_that_cannot_be_signed_when_their_turn_comes_free_their_connections(
    start: Start, waiting: int
) -> None:
    may_respond = asyncio.Event()

    async def slow(_message: Message, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await may_respond.wait()
        writer.write(OK)
        await writer.drain()
        return True

    wire = await start(serving=Upstream(slow), upstream={"connections_max": 1, "connect_timeout_seconds": 20.0})
    signer = signing(wire)
    signer.life_seconds = 0.0
    async with wire.client() as first:
        await first.send(request("POST", "/", body=b"x"))
        await until(lambda: len(wire.upstream.requests) == 1)

        async def refused() -> int:
            async with wire.client() as client:
                await client.send(request("POST", "/", body=b"x"))
                return (await client.answer()).status

        tasks = [asyncio.create_task(refused()) for _ in range(waiting)]
        await until(lambda: wire.server.open_requests() == waiting + 1)
        signer.fails = True
        may_respond.set()
        assert (await first.answer()).status == 200
        assert set(await asyncio.wait_for(asyncio.gather(*tasks), 20)) == {503}
        signer.fails = False
        await first.send(request("POST", "/", body=b"x"))
        assert (await first.answer()).status == 200
    await until(lambda: wire.pool.counts()["busy"] == 0)
    assert wire.server.open_requests() == 0
