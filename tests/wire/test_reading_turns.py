"""Users take turns to have their long bodies read."""

from __future__ import annotations

import asyncio

import pytest

from keyproxy.wire.body_buffer import BodyOwner
from keyproxy.wire.reading_turns import ReadingTurns

MANY, FEW, ONE = ("t", "many"), ("t", "few"), ("other", "many")


async def read(turns: ReadingTurns, user: BodyOwner, portions: int, seen: list[BodyOwner]) -> None:
    for _ in range(portions):
        await turns.enter(user)
        try:
            seen.append(user)
            await asyncio.sleep(0)
        finally:
            turns.leave()


async def test_users_take_turns_however_many_bodies_each_has() -> None:
    turns = ReadingTurns()
    seen: list[BodyOwner] = []
    bodies = [read(turns, MANY, 10, seen) for _ in range(50)]
    bodies += [read(turns, FEW, 10, seen) for _ in range(2)] + [read(turns, ONE, 10, seen)]
    await asyncio.gather(*bodies)
    last = max(place for place, user in enumerate(seen) if user == ONE)
    assert last <= 3 * 10
    last = max(place for place, user in enumerate(seen) if user == FEW)
    assert last <= 3 * 20
    assert len(seen) == 530
    assert repr(turns) == "<ReadingTurns of 0 users, 0 waiting>"


async def test_only_one_body_is_read_at_a_time_and_an_abandoned_one_passes_the_turn_on() -> None:
    turns = ReadingTurns()
    await turns.enter(MANY)
    gone, next_one = (asyncio.create_task(turns.enter(user)) for user in (FEW, ONE))
    await asyncio.sleep(0)
    assert not gone.done()
    assert not next_one.done()
    turns.leave()
    gone.cancel()  # it has just been given the turn
    with pytest.raises(asyncio.CancelledError):
        await gone
    await asyncio.wait_for(next_one, 1)
    late = asyncio.create_task(turns.enter(FEW))
    await asyncio.sleep(0)
    late.cancel()  # it still waits
    with pytest.raises(asyncio.CancelledError):
        await late
    turns.leave()
    await asyncio.wait_for(turns.enter(FEW), 1)
