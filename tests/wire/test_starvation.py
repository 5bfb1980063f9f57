"""The work that one connection does in one iteration of the event loop, during which all others wait."""

from __future__ import annotations

import asyncio

import pytest

from tests.wire.conftest import Wire, request

#: Of refused requests that a client sends at once.
MANY = 3_000

#: Between two looks at the loop a connection may have had two turns.
REFUSED_PER_LOOK_MAX = 16


async def most_recorded_between_looks(wire: Wire, until: int) -> int:
    """How many requests end between two turns of a task that looks whenever it can, until so many have ended."""
    most = before = 0
    while before < until:
        await asyncio.sleep(0)
        now = len(wire.recorder.seen)
        most, before = max(most, now - before), now
    return most


@pytest.mark.parametrize(
    "refused",
    [
        request("GET", "/", key=None),
        request("GET", "/", key=b"kp_live_" + b"a" * 49),
    ],
    ids=["no-key", "impossible-key"],
)
async def test_requests_that_are_refused_at_once_leave_turns_to_others(wire: Wire, refused: bytes) -> None:
    async with wire.client() as client, asyncio.timeout(60):
        looking = asyncio.create_task(most_recorded_between_looks(wire, MANY))
        sending = asyncio.create_task(client.send(refused * MANY))
        statuses = {(await client.answer()).status for _ in range(MANY)}
        await sending
        assert await looking <= REFUSED_PER_LOOK_MAX
        assert statuses == {401}
        # In the end the connection serves as before.
        await client.send(request())
        assert (await client.answer()).status == 200


async def test_a_client_that_half_closes_after_many_requests_gets_all_responses(wire: Wire) -> None:
    async with wire.client() as client, asyncio.timeout(60):
        await client.send(request("GET", "/", key=None) * 200 + request())
        client.half_close()
        assert [(await client.answer()).status for _ in range(201)] == [401] * 200 + [200]
        assert await client.ends() == b""
