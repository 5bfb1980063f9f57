"""Credits raise or lower the limit of one window, are recorded, and reach running proxies."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest

from keyproxy.config import schema
from keyproxy.limits.allowance import Allowance, Hold
from keyproxy.limits.ledger_protocol import Pool, Window
from keyproxy.limits.plan import Plan
from keyproxy.model import Missing
from keyproxy.platform import clock
from keyproxy.reasons import Refusal
from keyproxy.store.ledger.ledger import Ledger
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.postgres.database import Database, Row, StoreConflict
from tests.contracts import LEASE_SECONDS, line, window
from tests.store.conftest import MakeRig
from tests.store.harness import Door, Sql, add_key, add_user

SELECTED = Window(Pool("user", "u_42", False), "tokens_per_day", "model:gpt-4o")


@pytest.fixture
async def ledger(dsn: str) -> AsyncIterator[PostgresLedger]:
    """The backend over an empty database."""
    database = Database(dsn, pool_size_max=4, statement_timeout_seconds=5.0)
    await database.open()
    yield PostgresLedger(database, lease_seconds=LEASE_SECONDS)
    await database.close()


async def credit(database: Database, of: Window, limit: int, amount: int, reason: str = "asked for it") -> Row:
    """Credit a window."""
    (row,) = await database.fetch("credit_window", *of.pool, of.measure, of.selector, limit, amount, reason)
    return row


async def test_credit_is_granted_beyond_the_limit_and_stated_in_every_reply(
    ledger: PostgresLedger, database: Database
) -> None:
    await ledger.sync("a", 1, [line(want=10)])
    replies = await ledger.sync("a", 2, [line(granted=10, used=10, want=1)])
    assert replies is not None
    assert (replies[0].granted, replies[0].credited) == (10, 0)
    row = await credit(database, window(), 10, 3)
    assert (row["credited"], row["spent"], row["held"]) == (3, 10, 0)
    replies = await ledger.sync("a", 3, [line(granted=10, used=10, want=9)])
    assert replies is not None
    assert (replies[0].granted, replies[0].credited, replies[0].spent, replies[0].held) == (13, 3, 10, 3)
    (state,) = await ledger.windows([window()])
    assert state is not None
    assert state.credited == 3


async def test_credit_is_of_one_window_of_one_selector_and_mode(ledger: PostgresLedger, database: Database) -> None:
    await credit(database, SELECTED, 0, 5)
    others = [SELECTED._replace(selector=""), SELECTED._replace(pool=Pool("user", "u_42", True)), window()]
    replies = await ledger.sync(
        "a", 1, [line(number, of, limit=0, want=5) for number, of in enumerate((SELECTED, *others), 1)]
    )
    assert replies is not None
    assert [reply.granted for reply in sorted(replies)] == [5, 0, 0, 0]


async def test_windows_with_selectors_are_accounted_apart(ledger: PostgresLedger) -> None:
    plain, other = SELECTED._replace(selector=""), SELECTED._replace(selector="model:o3")
    await ledger.sync("a", 1, [line(1, SELECTED, want=4), line(2, plain, want=3), line(3, other, want=2)])
    states = await ledger.windows([SELECTED, plain, other])
    assert [state.held for state in states if state is not None] == [4, 3, 2]


@pytest.mark.parametrize(("limit", "amounts", "is_good"), [
    (10, [-10], True), (10, [-11], False), (10, [5, -15], True), (10, [5, -16], False), (0, [-1], False), (0, [0], False),
    (10**15 - 1, [10**15], False),
])  # fmt: skip
async def test_limit_and_credit_together_never_get_below_zero(
    database: Database, sql: Sql, limit: int, amounts: list[int], is_good: bool
) -> None:
    *first, last = amounts
    for amount in first:
        await credit(database, window(), limit, amount)
    if is_good:
        assert (await credit(database, window(), limit, last))["credited"] == sum(amounts)
    else:
        with pytest.raises(StoreConflict):
            await credit(database, window(), limit, last)
        assert await sql.fetchval("SELECT count(*) FROM keyproxy.window_credits") == len(first)


@pytest.mark.parametrize("measure", ["rate", "token_rate", "concurrency", "tokens_per_request", "nonsense"])
async def test_only_calendar_windows_are_credited(database: Database, measure: str) -> None:
    with pytest.raises(StoreConflict) as caught:
        await credit(database, window(measure), 1, 1)
    assert caught.value.constraint == "window_credits_calendar"


@pytest.mark.parametrize("reason", ["", "x" * 501])
async def test_credit_needs_a_reason_of_at_most_500_characters(database: Database, reason: str) -> None:
    with pytest.raises(StoreConflict):
        await credit(database, window(), 1, 1, reason)


async def test_credit_is_recorded_with_its_actor_tenant_and_reason(database: Database, sql: Sql) -> None:
    await add_user(sql)
    await add_key(sql, 1)
    async with database.transaction() as transaction:
        await transaction.fetch("say_who_acts", "ann", "desk")
        await transaction.fetch("credit_window", *SELECTED.pool, SELECTED.measure, SELECTED.selector, 10, 5, "more")
    await credit(database, Window(Pool("key", "key_1", False), "requests_per_week"), 10, -4)
    await credit(database, Window(Pool("tenant", "acme", True), "spend_per_month"), 10, 1)
    rows = await sql.fetch("SELECT * FROM keyproxy.audit_log WHERE action = 'window.credit' ORDER BY id")
    assert [(row["entity"], row["entity_id"], row["tenant_id"]) for row in rows] == [
        ("window", "user u_42", "acme"), ("window", "key key_1", "acme"), ("window", "tenant acme", "acme"),
    ]  # fmt: skip
    assert (rows[0]["actor"], rows[0]["origin"], json.loads(rows[0]["before"])) == ("ann", "desk", {"credited": 0})
    after = json.loads(rows[0]["after"])
    stored = await sql.fetchrow("SELECT * FROM keyproxy.window_credits ORDER BY created_at LIMIT 1")
    assert stored is not None
    assert (stored["amount"], stored["reason"], stored["actor"]) == (5, "more", "ann")
    assert after.pop("id") == stored["id"]
    assert after.pop("starts") % 86_400 == 0
    assert after == {
        "credited": 5, "amount": 5, "limit": 10, "reason": "more", "measure": "tokens_per_day",
        "selector": "model:gpt-4o", "is_test": False,
    }  # fmt: skip
    assert stored["id"].startswith("crd_")


async def test_concurrent_credits_and_messages_all_count(ledger: PostgresLedger, database: Database, sql: Sql) -> None:
    async def spend(name: str) -> int:
        got = 0
        for serial in range(1, 21):
            replies = await ledger.sync(name, serial, [line(granted=got, used=got, limit=0, want=1)])
            assert replies is not None
            got = replies[0].granted
        return got

    crediting = asyncio.gather(*(credit(database, window(), 0, 1) for _ in range(10)))
    first, second = await asyncio.gather(spend("a"), spend("b"))
    await crediting
    row = await sql.fetchrow("SELECT credited, spent, held, holders FROM keyproxy.windows")
    assert row is not None
    assert row["credited"] == 10
    assert row["spent"] + row["held"] == first + second <= 10


async def test_credit_is_a_change_of_a_window_in_the_feed(database: Database, sql: Sql) -> None:
    await credit(database, SELECTED, 10, 5)
    (row,) = await sql.fetch("SELECT kind, subject FROM keyproxy.changes")
    assert row["kind"] == "window"
    assert json.loads(row["subject"]) == ["user", "u_42", False, "tokens_per_day", "model:gpt-4o"]


async def test_proxy_whose_window_is_spent_admits_within_a_second_of_a_credit(dsn: str, make_rig: MakeRig) -> None:
    door = Door(dsn, pool_size_max=4)
    await door.open()
    config = schema.LedgerSettings()
    ledger = Ledger(PostgresLedger(door, lease_seconds=config.lease_seconds), config, clock.now)
    ledger.start()
    rig = await make_rig()
    rig.feed.window_changed = ledger.conversation.lease_sync.forget_refusals
    await rig.feed.poll()
    allowance = Allowance(((Pool("user", "u_42", False), Plan(requests_per_day=2)),))

    async def take() -> Hold:
        for _ in range(9):
            try:
                return ledger.take(allowance, clock.now())
            except Missing as missing:
                await missing.fetch_missing()
        raise AssertionError("not decided")

    for _ in range(2):
        ledger.settle(await take(), was_sent=True)
    for _ in range(2):
        with pytest.raises(Refusal):
            await take()
    started = time.monotonic()
    await credit(door, window(), 2, 1)
    await rig.feed.poll()
    ledger.settle(await take(), was_sent=True)
    assert time.monotonic() - started < 0.9
    with pytest.raises(Refusal):
        await take()
    await ledger.close()
    await door.close()


async def test_public_cannot_credit(sql: Sql) -> None:
    await sql.execute("CREATE ROLE kp_public_credit")
    try:
        await sql.execute("GRANT USAGE ON SCHEMA keyproxy TO kp_public_credit; SET ROLE kp_public_credit")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await sql.execute("SELECT keyproxy.credit_window('user', 'u_42', false, 'tokens_per_day', '', 1, 1, 'x')")
    finally:
        await sql.execute("RESET ROLE; DROP OWNED BY kp_public_credit; DROP ROLE kp_public_credit")
