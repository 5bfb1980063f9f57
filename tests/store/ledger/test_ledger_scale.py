"""A window that many holders share: paced messages, and units that a shortage recalls from few of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from keyproxy.config.schema import LedgerSettings
from keyproxy.limits.allowance import Allowance
from keyproxy.limits.ledger_protocol import FEW_HOLDERS, Pool, Window
from keyproxy.limits.plan import Plan
from keyproxy.model import Missing, Moment, TimeBudget
from keyproxy.store.identities.change_feed import ChangeFeed
from keyproxy.store.ledger.ledger import Ledger
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.postgres.database import Database
from tests.contracts import LEASE_SECONDS, assert_same_reply, line
from tests.reference_ledger import ReferenceLedger, timed
from tests.store.conftest import MakeRig
from tests.store.harness import Sql

TENANT = Pool("tenant", "acme", False)
WINDOW = Window(TENANT, "requests_per_day")


@pytest.fixture
async def ledger(dsn: str) -> AsyncIterator[PostgresLedger]:
    """The backend over an empty database."""
    database = Database(dsn, pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    yield PostgresLedger(database, lease_seconds=60.0)
    await database.close()


async def test_window_with_many_holders_is_accounted_as_the_reference_does(ledger: PostgresLedger) -> None:
    chance = random.Random(3)
    reference = ReferenceLedger(time.time, lease_seconds=60.0)
    names = [f"h{number:03}" for number in range(FEW_HOLDERS + 20)]
    granted, used, serials = dict.fromkeys(names, 0), dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for name in [*names, *(chance.choice(names) for _ in range(120))]:
        used[name] = chance.randint(used[name], granted[name])
        serials[name] += 1
        want = chance.choice([0, 1, 8, 30])
        told = timed(line(1, WINDOW, limit=600, want=want, granted=granted[name], used=used[name]))
        replies = await ledger.sync(name, serials[name], told)
        assert replies is not None
        expected = reference.follow(name, serials[name], told, replies)
        assert expected is not None
        one, other = min(expected), min(replies)
        # The schedule of messages may end on a whole number of holders: rounding decides.
        assert one.holders == pytest.approx(other.holders, abs=1)
        assert_same_reply(one._replace(holders=other.holders), other)
        granted[name] = one.granted
    account = next(row for (of, _), row in reference.windows.items() if of == WINDOW)
    assert len(account.leases) > FEW_HOLDERS
    assert account.spent + account.held == 600


async def test_shortage_recalls_from_the_fewest_holders_that_suffice_and_then_from_the_others(
    ledger: PostgresLedger, sql: Sql
) -> None:
    reference = ReferenceLedger(time.time, lease_seconds=60.0)

    async def speak(name: str, serial: int, used: int = 0, granted: int = 0, *, needs: int = 0) -> None:
        told = timed(line(1, WINDOW, limit=10, want=needs, at_least=needs, used=used, granted=granted))
        replies = await ledger.sync(name, serial, told)
        assert replies is not None
        reference.follow(name, serial, told, replies)

    for name, units in {"a": 2, "b": 5, "c": 3}.items():
        await speak(name, 1, needs=units)

    async def recalled() -> list[str]:
        names = [row[0] for row in await sql.fetch("SELECT holder FROM keyproxy.leases WHERE is_recalled ORDER BY 1")]
        assert names == [name for name in sorted(reference.holders) if reference.recalled(name)]
        return names

    await speak("d", 1, needs=4)
    assert await recalled() == ["b"]
    # What it holds is in use: the others are asked, but not in the same moment.
    await speak("d", 2, needs=4)
    assert await recalled() == ["b"]
    await asyncio.sleep(0.55)
    await speak("d", 3, needs=4)
    assert await recalled() == ["a", "b", "c"]
    await speak("b", 2, used=1, granted=5)
    assert await recalled() == ["a", "c"]
    # No recall can satisfy a request for more than is not spent.
    await speak("a", 2, used=2, granted=2)
    await speak("c", 2, used=3, granted=3)
    await asyncio.sleep(0.55)
    await speak("d", 4, needs=5)
    assert await recalled() == []


async def test_recall_is_delivered_with_the_change_feed_until_the_lease_is_reported(
    make_rig: MakeRig, ledger: PostgresLedger
) -> None:
    class Holder:
        holder = "a"

        def __init__(self) -> None:
            self.recalls: list[list[int]] = []

        def recall(self, leases: Sequence[int]) -> None:
            self.recalls.append(list(leases))

    rig, holder = await make_rig(), Holder()
    feed = ChangeFeed(rig.door, None, rig.cache, rig.state, rig.clock, lease_holder=holder)
    await feed.poll()
    await ledger.sync("a", 1, [line(7, WINDOW, want=10, at_least=10)])
    await feed.poll()
    assert holder.recalls == []
    await ledger.sync("b", 1, [line(1, WINDOW, want=1)])
    await feed.poll()
    await feed.poll()
    assert holder.recalls == [[7], [7]]
    await ledger.sync("a", 2, [line(7, WINDOW, granted=10, returned=4)])
    await feed.poll()
    assert holder.recalls == [[7], [7]]


async def test_idle_units_of_another_process_are_found_within_the_patience_of_a_request(
    make_rig: MakeRig, dsn: str
) -> None:
    """Its next report would be due much later: it settles every minute."""
    rig, database = await make_rig(), Database(dsn, pool_size_max=4, statement_timeout_seconds=5.0)
    await database.open()
    processes = [
        Ledger(PostgresLedger(database, lease_seconds=LEASE_SECONDS), LedgerSettings(settle_seconds=60.0), _now)
        for _ in range(2)
    ]
    feed = ChangeFeed(rig.door, None, rig.cache, rig.state, _now, lease_holder=processes[0].conversation)
    for process in processes:
        process.start()
    feed.start()
    try:
        # The first request fetches some more units than it needs: all there are.
        for process in processes:
            await _request(process, Plan(requests_per_day=5))
    finally:
        await feed.close()
        for process in processes:
            await process.close()
        await database.close()


def _now() -> Moment:
    return Moment(time.time(), time.monotonic())


async def _request(process: Ledger, plan: Plan) -> None:
    allowance, patience = Allowance(((TENANT, plan),)), TimeBudget()
    while True:
        try:
            hold = process.take(allowance, _now())
        except Missing as missing:
            await missing.fetch_missing(patience)
        else:
            process.settle(hold, was_sent=True)
            return
