"""The ledger in PostgreSQL does what the reference does, message for message."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator

import pytest

from keyproxy.limits.leases import Line, Pool, Window
from keyproxy.store.database import Database, StoreUnavailable
from keyproxy.store.ledger_postgres import PostgresLedger
from tests.reference_ledger import ReferenceLedger

LEASE_SECONDS = 1000.0
LIMITS = {"concurrency": 5, "requests_per_day": 50, "tokens_per_month": 500}


@pytest.fixture
async def ledger(dsn: str) -> AsyncIterator[PostgresLedger]:
    database = Database(dsn, pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    yield PostgresLedger(database, lease_seconds=LEASE_SECONDS)
    await database.close()


def window(measure: str = "requests_per_day", owner: str = "u_42") -> Window:
    return Window(Pool("user", owner, False), measure)


def line(lease: int = 1, of: Window | None = None, *, limit: int = 10, want: int = 0, at_least: int = 1,
         granted: int = 0, used: int = 0, returned: int = 0, interval_seconds: float = 0.0) -> Line:  # fmt: skip
    return Line(
        lease,
        of or window(),
        0,
        limit,
        interval_seconds,
        granted,
        used,
        returned,
        want,
        min(at_least, want),
        False,
        False,
    )


class Holders:
    """Processes that hold leases and say at random what holders may say."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.names = [f"{seed}a", f"{seed}b"]
        self.serials: dict[str, int] = {}
        self.leases: dict[tuple[str, str], list[int]] = {}
        self.numbers = 0

    def message(self) -> tuple[str, int, list[Line]]:
        """Who speaks next, and what."""
        name = self.random.choice(self.names)
        self.serials[name] = self.serials.get(name, 0) + 1
        measures = [measure for measure in LIMITS if self.random.random() < 0.6]
        return name, self.serials[name], [self._line(name, measure) for measure in measures]

    def replace(self) -> str:
        """One of them ends, and another one takes its place."""
        name = self.names.pop(self.random.randrange(2))
        self.leases = {key: lease for key, lease in self.leases.items() if key[0] != name}
        self.names.append(name + "'")
        return name

    def hear(self, name: str, lease: int, granted: int, starts: int) -> None:
        """What a lease was granted."""
        for key, known in self.leases.items():
            if key[0] == name and known[0] == lease:
                known[1], known[4] = granted, starts

    def _line(self, name: str, measure: str) -> Line:
        if (name, measure) not in self.leases:
            self.numbers += 1
            self.leases[name, measure] = [self.numbers, 0, 0, 0, 0]
        lease = self.leases[name, measure]
        number, granted, used, returned, starts = lease
        if measure != "concurrency":
            used += self.random.randint(0, granted - used - returned) if granted > used + returned else 0
            used += self.random.random() < 0.1  # more than was granted
        if granted > used + returned:
            returned += self.random.randint(0, granted - used - returned)
        lease[2:4] = used, returned
        is_closing = self.random.random() < 0.1
        if is_closing:
            del self.leases[name, measure]
        want = 0 if is_closing else self.random.choice([0, 1, 5, 30])
        at_least = self.random.randint(1, want) if want else 0
        return Line(number, window(measure), starts, LIMITS[measure], 0.0, granted, used, returned, want, at_least,
                    want > 0 and self.random.random() < 0.1, is_closing)  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
async def test_every_message_is_answered_as_the_reference_answers_it(ledger: PostgresLedger, seed: int) -> None:
    reference, holders = ReferenceLedger(time.time, lease_seconds=LEASE_SECONDS), Holders(seed)
    for _ in range(60):
        if holders.random.random() < 0.05:
            name = holders.replace()
            reference.end(name)
            await ledger.end(name)
        name, serial, lines = holders.message()
        expected = reference.sync(name, serial, lines)
        answered = await ledger.sync(name, serial, lines)
        assert expected is not None
        assert answered is not None
        for one, other in zip(sorted(expected), sorted(answered), strict=True):
            assert one._replace(ends_seconds=0) == other._replace(ends_seconds=0)
            assert one.ends_seconds == pytest.approx(other.ends_seconds, abs=5)
            holders.hear(name, other.lease, other.granted, other.starts)
    for name in holders.names:
        reference.end(name)
        await ledger.end(name)
    states = await ledger.windows([window(measure) for measure in LIMITS])
    for (key, row), state in zip(sorted(reference.rows.items()), states, strict=True):
        assert state is not None
        assert (row.spent, row.held, row.forfeited) == (state.spent, state.held, state.forfeited), key
        assert state.held == 0


async def test_a_message_that_comes_after_a_later_one_changes_nothing(ledger: PostgresLedger) -> None:
    await ledger.sync("a", 2, [line(want=4)])
    with pytest.raises(StoreUnavailable):
        await ledger.sync("a", 2, [line(want=4)])
    with pytest.raises(StoreUnavailable):
        await ledger.sync("a", 1, [line(want=4)])
    (state,) = await ledger.windows([window()])
    assert state is not None
    assert (state.spent, state.held) == (0, 4)


async def test_a_message_that_is_repeated_counts_once(ledger: PostgresLedger) -> None:
    replies = await ledger.sync("a", 1, [line(want=4)])
    assert replies is not None
    assert replies[0].granted == 4
    for serial in (2, 3):
        await ledger.sync("a", serial, [line(granted=4, used=3, returned=1)])
    (state,) = await ledger.windows([window()])
    assert state is not None
    assert (state.spent, state.held) == (3, 0)


async def test_a_holder_that_has_ended_is_told_so_and_what_it_held_is_charged(ledger: PostgresLedger) -> None:
    await ledger.sync("a", 1, [line(want=4), line(2, window("concurrency"), want=2)])
    await ledger.end("a")
    assert await ledger.sync("a", 2, [line(granted=4, used=1)]) is None
    requests, slots = await ledger.windows([window(), window("concurrency")])
    assert requests is not None
    assert slots is not None
    assert (requests.spent, requests.held, requests.forfeited) == (4, 0, 4)
    assert (slots.spent, slots.held, slots.forfeited) == (0, 0, 0)


async def test_only_holders_whose_time_is_over_are_ended(ledger: PostgresLedger, dsn: str) -> None:
    database = Database(dsn, pool_size_max=1, statement_timeout_seconds=5.0)
    await database.open()
    short = PostgresLedger(database, lease_seconds=0.0)
    await short.sync("dead", 1, [line(want=4)])
    await ledger.sync("alive", 1, [line(want=4)])
    await ledger.reap()
    (state,) = await ledger.windows([window()])
    assert state is not None
    assert (state.spent, state.held, state.forfeited) == (4, 4, 4)
    await database.close()


async def test_a_rate_gives_its_burst_and_then_says_how_long_the_next_takes(ledger: PostgresLedger) -> None:
    rate = window("rate")
    replies = await ledger.sync("a", 1, [line(1, rate, limit=5, want=9, interval_seconds=0.5)])
    assert replies is not None
    assert (replies[0].granted, replies[0].wait_seconds) == (5, 0.0)
    replies = await ledger.sync("a", 2, [line(1, rate, limit=5, want=1, interval_seconds=0.5)])
    assert replies is not None
    assert replies[0].granted == 0
    assert 0.0 < replies[0].wait_seconds <= 0.5
    replies = await ledger.sync("a", 3, [line(1, rate, limit=5, want=9, returned=3, interval_seconds=0.5)])
    assert replies is not None
    assert replies[0].granted == 3


async def test_what_one_holder_lacks_is_wanted_of_the_others(ledger: PostgresLedger) -> None:
    await ledger.sync("a", 1, [line(want=10)])
    replies = await ledger.sync("b", 1, [line(want=1)])
    assert replies is not None
    assert (replies[0].granted, replies[0].held) == (0, 10)
    replies = await ledger.sync("a", 2, [line(granted=10)])
    assert replies is not None
    assert replies[0].is_wanted
