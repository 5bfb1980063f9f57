"""Signing keys over a day: published before they sign, replaced in time, and cut to what they have signed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import asyncpg
import pytest

from keyproxy.model import Moment
from keyproxy.process.signing.key_cut import cut_keys
from keyproxy.process.signing.key_ring import SigningKeyRing
from keyproxy.process.signing.key_rotation import KeyRotation
from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.signing_key import SigningKey
from keyproxy.signing.token_check import ACCEPTS_NONE
from keyproxy.store.postgres.database import Database, StoreUnavailable
from keyproxy.store.signing_keys import SigningKeyCache
from tests.waiting import until

HOUR = 3600.0


class Clock:
    """A clock that the test sets, with a wall clock that may jump."""

    def __init__(self) -> None:
        self.wall, self.mono = 1_800_000_000.0, 1_000.0

    def __call__(self) -> Moment:
        return Moment(self.wall, self.mono)

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.mono += seconds


class Store(SigningKeyCache):
    """The store, which may refuse to publish."""

    is_down = False
    attempts = 0

    async def publish(self, key: SigningKey) -> None:
        self.attempts += 1
        if self.is_down:
            raise StoreUnavailable("down")
        await super().publish(key)


class Day:
    """A ring over a database, with the keys of a rotation."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store, self.clock = store, clock
        self.rotation = KeyRotation(lambda: clock.wall)
        self.ring = self.made(self.rotation.keys)

    def made(self, keys: Sequence[SigningKey]) -> SigningKeyRing:
        return SigningKeyRing(keys, self.store, self.clock)

    def signs(self, ring: SigningKeyRing | None = None) -> str | Reason:
        """The number of the key that signs, in the order in which they were made; or why none does."""
        try:
            kid = (ring or self.ring).usable(self.clock()).kid
        except Refusal as refusal:
            return refusal.reason
        return ["first", "second", "third"][[key.kid for key in self.rotation.keys].index(kid)]

    def rotate(self) -> None:
        assert self.rotation.rotate()
        self.ring.adopt(self.rotation.keys)

    async def published(self, number: int) -> None:
        await until(lambda: len(self.store.live()) == number, f"{number} keys are published")


@pytest.fixture
async def day(dsn: str) -> AsyncIterator[Day]:
    clock = Clock()
    database = Database(dsn, pool_size_max=1, statement_timeout_seconds=5.0)
    await database.open()
    found = Day(Store(database, ACCEPTS_NONE, clock), clock)
    try:
        yield found
    finally:
        await found.ring.close()
        await database.close()


async def test_a_key_signs_once_it_is_published_and_not_before(day: Day) -> None:
    day.store.is_down = True
    assert day.signs() is Reason.STORE_UNAVAILABLE
    assert day.ring.age_seconds() == 0.0
    day.ring.start()
    await until(lambda: day.store.attempts >= 3)
    assert day.signs() is Reason.STORE_UNAVAILABLE
    day.store.is_down = False
    await until(lambda: day.signs() == "first")
    day.clock.advance(30.0)
    assert day.ring.age_seconds() == pytest.approx(30.0)


async def test_a_rotation_publishes_a_key_a_minute_before_it_signs(day: Day) -> None:
    day.ring.start()
    await day.published(1)
    day.clock.advance(24 * HOUR - 1)
    assert not day.rotation.rotate()
    day.clock.advance(1)
    day.rotate()
    await day.published(2)
    assert day.signs() == "first"
    day.clock.advance(59.9)
    assert day.signs() == "first"
    day.clock.advance(0.1)
    assert day.signs() == "second"
    assert [key.kid for key in day.store.live()] == [key.kid for key in day.rotation.keys]
    assert day.rotation.keys[0].ends_wall_seconds - day.clock.wall == pytest.approx(HOUR - 60)
    day.clock.advance(24 * HOUR)
    day.rotate()
    assert len(day.rotation.keys) == 2, "the first one has ended"


async def test_the_previous_key_signs_until_a_quarter_of_an_hour_before_its_end_if_the_next_is_unpublished(
    day: Day,
) -> None:
    day.ring.start()
    await day.published(1)
    day.store.is_down = True
    day.clock.advance(24 * HOUR)
    day.rotate()
    await until(lambda: day.store.attempts >= 3)
    day.clock.advance(45 * 60 - 0.1)
    assert day.signs() == "first"
    day.clock.advance(0.1)
    assert day.signs() is Reason.STORE_UNAVAILABLE
    day.store.is_down = False
    await until(lambda: day.signs() == "second")


async def test_a_worker_that_starts_during_a_rotation_signs_with_the_previous_key_first(day: Day) -> None:
    day.clock.advance(24 * HOUR)
    day.rotate()
    keys = [SigningKey.from_private(text) for text in day.rotation.private_texts()]
    ring = day.made(keys)
    ring.start()
    await until(lambda: day.signs(ring) == "first")
    await day.published(2)
    await asyncio.sleep(0.05)
    day.clock.advance(60.0)
    await until(lambda: day.signs(ring) == "second")
    ring.adopt([SigningKey.from_private(text) for text in day.rotation.private_texts()])
    assert day.signs(ring) == "second"
    await ring.close()


@pytest.mark.parametrize("waits", [False, True])
async def test_a_first_key_waits_two_seconds_for_verifiers_if_other_keys_are_live(day: Day, waits: bool) -> None:
    await day.store.publish(SigningKey.make(day.clock.wall))
    day.ring.waits_for_verifiers = waits
    day.ring.start()
    await day.published(2)
    await until(lambda: day.store.is_read or not waits)
    if waits:
        await asyncio.sleep(0.05)
        assert day.signs() is Reason.STORE_UNAVAILABLE
        day.clock.advance(1.9)
        assert day.signs() is Reason.STORE_UNAVAILABLE
        day.clock.advance(0.1)
    await until(lambda: day.signs() == "first")


async def test_a_first_key_does_not_wait_without_other_keys(day: Day) -> None:
    day.ring.waits_for_verifiers = True
    day.ring.start()
    await until(lambda: day.signs() == "first")


async def test_a_key_that_was_removed_from_the_store_is_published_again(day: Day, dsn: str) -> None:
    day.ring.start()
    await day.published(1)
    connection = await asyncpg.connect(dsn)
    await connection.execute("DELETE FROM keyproxy.signing_keys")
    await connection.close()
    await day.store.read()
    assert not day.store.live()
    day.ring.adopt(day.rotation.keys)
    await day.published(1)
    assert day.signs() == "first"


async def test_the_wall_clock_may_jump_by_days(day: Day) -> None:
    day.ring.start()
    await day.published(1)
    day.clock.wall += 10 * 24 * HOUR
    assert day.signs() is Reason.STORE_UNAVAILABLE
    day.rotate()
    # The second one, which is now the only one that has not ended.
    await until(lambda: day.signs() == "first")
    day.clock.wall -= 10 * 24 * HOUR
    assert day.signs() == "first"
    assert not day.rotation.rotate()


async def test_keys_end_with_what_any_process_signed_last(day: Day) -> None:
    await day.store.publish(day.rotation.keys[0])
    (key,) = day.rotation.keys
    wall = day.clock.wall
    assert day.rotation.ends() == {key.kid: wall}
    key.sign("at+jwt", {"exp": int(wall) + 60})
    assert day.rotation.ends() == {key.kid: int(wall) + 60}
    day.rotation.was_signed({key.kid: wall + 300})
    day.rotation.was_signed({key.kid: wall + 200})
    assert day.rotation.ends() == {key.kid: wall + 300}
    await cut_keys(day.store, day.rotation.ends())
    assert [one.ends_wall_seconds for one in day.store.live()] == [wall + 300]
    day.rotation.was_signed(None)
    assert day.rotation.ends() == {key.kid: wall + 905}


async def test_a_stop_does_not_wait_for_a_store_that_is_down(day: Day) -> None:
    class Down(Store):
        async def cut(self, kid: str, ends_wall_seconds: float) -> None:
            raise StoreUnavailable("down")

    await cut_keys(Down(day.store._database, ACCEPTS_NONE, day.clock), day.rotation.ends())
