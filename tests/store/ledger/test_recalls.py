"""A shortage recalls idle units from as few of many holders as suffice, through the change feed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from keyproxy.config import schema
from keyproxy.limits.allowance import Allowance
from keyproxy.limits.ledger_protocol import Pool
from keyproxy.limits.plan import Plan
from keyproxy.model import Missing
from keyproxy.platform import clock
from keyproxy.store.ledger.ledger import Ledger
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from tests.contracts import LEASE_SECONDS, line
from tests.store.conftest import MakeRig
from tests.store.harness import Door, Sql
from tests.waiting import until

_FEW, _MANY = 30, 140


@pytest.fixture
async def door(dsn: str) -> AsyncIterator[Door]:
    door = Door(dsn, pool_size_max=4)
    await door.open()
    yield door
    await door.close()


@pytest.fixture
def ledger(door: Door) -> PostgresLedger:
    """The backend over an empty database."""
    return PostgresLedger(door, lease_seconds=LEASE_SECONDS)


async def hold(ledger: PostgresLedger, holders: int, units: int, limit: int) -> None:
    """Let each of these holders have so many units of one window."""
    for number in range(holders):
        await ledger.sync(f"h{number:03}", 1, [line(limit=limit, want=units, at_least=units)])


async def recalled(sql: Sql) -> list[list[str]]:
    """The holders of each recall."""
    rows = await sql.fetch("SELECT subject FROM keyproxy.recalls ORDER BY at")
    return [json.loads(row["subject"])[5] for row in rows]


@pytest.mark.parametrize(("need", "count"), [(1, 1), (2, 1), (3, 2), (40, 20), (200, 100), (280, 100)])
async def test_as_few_holders_as_suffice_are_asked_for_their_units_and_at_most_100(
    ledger: PostgresLedger, sql: Sql, need: int, count: int
) -> None:
    await hold(ledger, _MANY, 2, 2 * _MANY)
    replies = await ledger.sync("short", 1, [line(limit=2 * _MANY, want=need, at_least=need)])
    assert replies is not None
    assert replies[0].granted == 0
    (holders,) = await recalled(sql)
    assert holders == [f"h{number:03}" for number in range(count)]


async def test_window_is_recalled_at_most_once_a_second_and_only_from_many_holders(
    ledger: PostgresLedger, sql: Sql
) -> None:
    await hold(ledger, _FEW, 1, _FEW)
    await ledger.sync("short", 1, [line(limit=_FEW, want=1)])
    assert await recalled(sql) == []
    await ledger.sync("short", 2, [line(limit=_FEW, want=1)])
    await ledger.sync("other", 1, [line(limit=_FEW, want=1)])
    assert len(await recalled(sql)) == 1
    await sql.execute("UPDATE keyproxy.windows SET recalled_at = recalled_at - 2")
    await ledger.sync("short", 3, [line(limit=_FEW, want=1)])
    assert len(await recalled(sql)) == 2


async def test_process_returns_its_idle_units_when_they_are_recalled(
    door: Door, ledger: PostgresLedger, sql: Sql, make_rig: MakeRig
) -> None:
    config = schema.LedgerSettings(settle_seconds=30.0, lease_seconds=60.0)
    process = Ledger(PostgresLedger(door, lease_seconds=config.lease_seconds), config, clock.now)
    process.start()
    rig = await make_rig()
    rig.feed.units_recalled = process.conversation.recall
    await rig.feed.poll()
    limit = _FEW + 1
    await hold(ledger, _FEW, 1, limit)
    allowance = Allowance(((Pool("user", "u_42", False), Plan(requests_per_day=limit)),))
    for _ in range(9):
        try:
            process.settle(process.take(allowance, clock.now()), was_sent=False)
            break
        except Missing as missing:
            await missing.fetch_missing()
    messages = process.conversation.counts["round_trips"]
    await ledger.sync("short", 1, [line(limit=limit, want=1)])
    assert len(await recalled(sql)) == 1
    await rig.feed.poll()
    await until(
        lambda: process.conversation.counts["round_trips"] > messages, "the idle units are returned", seconds=1.0
    )
    replies = await ledger.sync("short", 2, [line(limit=limit, want=1)])
    assert replies is not None
    assert replies[0].granted == 1
    await process.close()
