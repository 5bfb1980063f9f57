"""The ledger writes one alert for each window and percentage that is reached, and each goes to one sender."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from keyproxy.limits.ledger_protocol import Pool, Window
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.outbox.limit_alerts import LimitAlertQueue
from keyproxy.store.postgres.database import Database, StoreUnavailable
from tests.contracts import LEASE_SECONDS, line, window
from tests.store.agent_rows import AGENT_TOKEN, add_agent_token
from tests.store.harness import Sql, StatementRunner, add_user
from tests.store.ledger.test_window_credits import credit


@pytest.fixture
async def door(dsn: str) -> AsyncIterator[StatementRunner]:
    door = StatementRunner(dsn, pool_size_max=6)
    await door.open()
    yield door
    await door.close()


@pytest.fixture
def ledger(door: StatementRunner) -> PostgresLedger:
    """The backend over an empty database."""
    return PostgresLedger(door, lease_seconds=LEASE_SECONDS, alert_percentages=[50, 80, 100])


async def alerts(sql: Sql) -> list[tuple[int, int, int]]:
    """The alerts: percentage, amount and spent."""
    rows = await sql.fetch("SELECT percentage, amount, spent FROM keyproxy.limit_alerts ORDER BY window_id, percentage")
    return [tuple(row) for row in rows]


@pytest.mark.parametrize(
    ("spent", "reached"),
    [
        (0, []),
        (49, []),
        (50, [50]),
        (79, [50]),
        (80, [50, 80]),
        (99, [50, 80]),
        (100, [50, 80, 100]),
        (130, [50, 80, 100]),
    ],
)
async def test_alert_is_written_when_spent_reaches_its_percentage(
    ledger: PostgresLedger, sql: Sql, spent: int, reached: list[int]
) -> None:
    await ledger.sync("a", 1, [line(limit=100, want=100)])
    await ledger.sync("a", 2, [line(limit=100, granted=100, used=spent)])
    assert await alerts(sql) == [(percentage, 100, spent) for percentage in reached]


async def test_each_percentage_is_written_once_as_it_is_reached(ledger: PostgresLedger, sql: Sql) -> None:
    await ledger.sync("a", 1, [line(limit=100, want=100)])
    for serial, used in enumerate((10, 60, 70, 85, 90, 100, 100), 2):
        await ledger.sync("a", serial, [line(limit=100, granted=100, used=used)])
    assert await alerts(sql) == [(50, 100, 60), (80, 100, 85), (100, 100, 100)]


async def test_percentages_are_of_limit_and_credit_together(
    ledger: PostgresLedger, database: Database, sql: Sql
) -> None:
    await credit(database, window(), 100, 100)
    await ledger.sync("a", 1, [line(limit=100, want=150)])
    await ledger.sync("a", 2, [line(limit=100, granted=150, used=99)])
    assert await alerts(sql) == []
    await ledger.sync("a", 3, [line(limit=100, granted=150, used=100)])
    assert await alerts(sql) == [(50, 200, 100)]


@pytest.mark.parametrize(
    ("used", "need", "reached"),
    [(40, 60, []), (40, 61, [100]), (40, 100, [100]), (40, 101, []), (60, 41, [50, 100])],
)
async def test_first_refusal_of_what_is_not_left_writes_the_alert_of_100(
    ledger: PostgresLedger, sql: Sql, used: int, need: int, reached: list[int]
) -> None:
    """Neither for a request that never fits, nor for one that waits for what others hold."""
    await ledger.sync("b", 1, [line(limit=100, want=used, at_least=used)])
    await ledger.sync("b", 2, [line(limit=100, granted=used, used=used)])
    await ledger.sync("c", 1, [line(limit=100, want=1)])
    await ledger.sync("a", 1, [line(limit=100, want=need, at_least=need)])
    assert [percentage for percentage, *_ in await alerts(sql)] == reached


@pytest.mark.parametrize("measure", ["requests_per_minute", "requests_per_day", "requests_per_month"])
async def test_first_refusal_under_a_limit_of_zero_requests_writes_the_alert_of_100(
    ledger: PostgresLedger, sql: Sql, measure: str
) -> None:
    await ledger.sync("a", 1, [line(1, window(measure), limit=0)])
    assert await alerts(sql) == []
    await ledger.sync("a", 2, [line(1, window(measure), limit=0, want=5, at_least=1)])
    await ledger.sync("a", 3, [line(1, window(measure), limit=0, want=5, at_least=1)])
    assert await alerts(sql) == [(100, 0, 0)]


@pytest.mark.parametrize("measure", ["tokens_per_day", "spend_per_day"])
async def test_request_that_never_fits_a_limit_of_zero_writes_no_alert(
    ledger: PostgresLedger, sql: Sql, measure: str
) -> None:
    await ledger.sync("a", 1, [line(1, window(measure), limit=0, want=5, at_least=1)])
    assert await alerts(sql) == []


async def test_windows_without_calendar_and_spent_ones_of_zero_write_no_alert_by_themselves(
    ledger: PostgresLedger, sql: Sql
) -> None:
    await ledger.sync("a", 1, [
        line(1, window("concurrency"), limit=1, want=1), line(2, window("rate"), limit=1, want=1, interval_seconds=60.0),
        line(3, window("tokens_per_day"), limit=0),
    ])  # fmt: skip
    await ledger.sync("b", 1, [
        line(1, window("concurrency"), limit=1, want=1), line(2, window("rate"), limit=1, want=1, interval_seconds=60.0),
    ])  # fmt: skip
    assert await alerts(sql) == []


async def test_alerts_are_written_once_however_many_replicas_report_and_retry(
    ledger: PostgresLedger, door: StatementRunner, sql: Sql
) -> None:
    lost = [True] * 8

    async def replica(name: str) -> None:
        serial = got = 0
        for used in range(1, 13):
            while True:
                serial += 1
                try:
                    replies = await ledger.sync(
                        name, serial, [line(limit=100, granted=got, used=min(used, got), want=2)]
                    )
                except StoreUnavailable:
                    continue
                assert replies is not None
                got = replies[0].granted
                break

    def lose(rows: object) -> object:
        if lost and lost.pop():
            raise StoreUnavailable("the response was lost")
        return rows

    door.edit["sync_leases"] = lose  # type: ignore[assignment]
    await asyncio.gather(*(replica(f"r{number}") for number in range(6)))
    for number in range(6):
        await ledger.end(f"r{number}")
    await ledger.sync("last", 1, [line(limit=100, want=100, at_least=100)])
    found = await alerts(sql)
    assert [percentage for percentage, *_ in found] == sorted({percentage for percentage, *_ in found})
    assert {50, 100} <= {percentage for percentage, *_ in found}
    assert len(await sql.fetch("SELECT DISTINCT message_id FROM keyproxy.limit_alerts")) == len(found)


async def test_message_that_is_rolled_back_leaves_no_alert(ledger: PostgresLedger, sql: Sql) -> None:
    await ledger.sync("a", 1, [line(limit=100, want=100)])
    await sql.execute("ALTER TABLE keyproxy.windows ADD CONSTRAINT never CHECK (spent < 90) NOT VALID")
    try:
        with pytest.raises(Exception, match="never"):
            await ledger.sync("a", 2, [line(limit=100, granted=100, used=95)])
    finally:
        await sql.execute("ALTER TABLE keyproxy.windows DROP CONSTRAINT never")
    assert await alerts(sql) == []
    await ledger.sync("a", 2, [line(limit=100, granted=100, used=95)])
    assert [percentage for percentage, *_ in await alerts(sql)] == [50, 80]


async def test_alert_of_a_window_has_the_same_id_in_a_restored_database(ledger: PostgresLedger, sql: Sql) -> None:
    ids = []
    for name in ("a", "b"):
        await ledger.sync(name, 1, [line(limit=100, want=100)])
        await ledger.sync(name, 2, [line(limit=100, granted=100, used=50)])
        ids.append(await sql.fetchval("SELECT message_id FROM keyproxy.limit_alerts"))
        await sql.execute("DELETE FROM keyproxy.leases; DELETE FROM keyproxy.windows")
    assert ids[0] == ids[1]


# -- the outbox


async def test_alert_goes_to_one_sender_with_all_that_it_is_about(
    ledger: PostgresLedger, database: Database, sql: Sql
) -> None:
    await add_user(sql)
    of = Window(Pool("user", "u_42", True), "spend_per_week", "model:gpt-4o,route:chat")
    await ledger.sync("a", 1, [line(1, of, limit=100, want=100)])
    await ledger.sync("a", 2, [line(1, of, limit=100, granted=100, used=80)])
    lease = timedelta(seconds=60)
    claimed = await asyncio.gather(*(database.fetch("claim_alerts", 1, lease) for _ in range(4)))
    rows = [row for part in claimed for row in part]
    assert sorted(row["percentage"] for row in rows) == [50, 80]
    row = dict(rows[0])
    starts, ends = row["window_starts"], row["window_ends"]
    assert (ends - starts, starts.timestamp() % 86_400) == (timedelta(days=7), 0)
    assert {name: row[name] for name in ("amount", "spent", "pool_kind", "pool_id", "tenant_id", "is_test", "measure",
                                         "selector", "attempts", "last_error")} == {
        "amount": 100, "spent": 80, "pool_kind": "user", "pool_id": "u_42", "tenant_id": "acme", "is_test": True,
        "measure": "spend_per_week", "selector": "model:gpt-4o,route:chat", "attempts": 1, "last_error": None,
    }  # fmt: skip
    assert await database.fetch("claim_alerts", 9, lease) == []
    first, second = (row["message_id"] for row in rows)
    await database.fetch("alert_delivered", first)
    await database.fetch("alert_failed", second, 1, "no", timedelta(0))
    assert (await database.fetch("count_alerts_waiting"))[0]["waiting"] == 1
    (again,) = await database.fetch("claim_alerts", 9, timedelta(0))
    assert (again["message_id"], again["attempts"], again["last_error"]) == (second, 2, "no")
    # The outcome of an earlier attempt is ignored; without a next time, the alert is given up.
    await database.fetch("alert_failed", second, 1, "late", None)
    assert len(await database.fetch("claim_alerts", 9, timedelta(0))) == 1
    await database.fetch("alert_failed", second, 3, "never", None)
    assert await database.fetch("claim_alerts", 9, lease) == []


@pytest.mark.parametrize("pool", [Pool("token", AGENT_TOKEN, True), Pool("agent", "u_42/crawler", True)])
async def test_alert_of_an_agent_or_a_token_names_its_tenant(
    ledger: PostgresLedger, database: Database, sql: Sql, pool: Pool
) -> None:
    await add_agent_token(sql)
    of = Window(pool, "requests_total" if pool.kind == "token" else "requests_per_day")
    await ledger.sync("a", 1, [line(1, of, limit=10, want=10)])
    await ledger.sync("a", 2, [line(1, of, limit=10, granted=10, used=8)])
    messages = await LimitAlertQueue(database).claim(9)
    contents = [json.loads(message.content)["data"] for message in messages]
    assert sorted(content["percentage"] for content in contents) == [50, 80]
    for content in contents:
        assert (content["pool_kind"], content["pool_id"], content["tenant"]) == (pool.kind, pool.owner, "acme")


async def test_alert_of_a_budget_has_no_times(ledger: PostgresLedger, database: Database) -> None:
    of = Window(Pool("token", AGENT_TOKEN, False), "tokens_total")
    await ledger.sync("a", 1, [line(1, of, limit=10, want=10)])
    await ledger.sync("a", 2, [line(1, of, limit=10, granted=10, used=10)])
    for message in await LimitAlertQueue(database).claim(9):
        content = json.loads(message.content)["data"]
        assert content["limit"] == "tokens/total"
        assert content["window_starts"] is content["window_ends"] is None


async def test_first_refusal_under_a_budget_of_0_requests_writes_the_alert_of_100(
    ledger: PostgresLedger, sql: Sql
) -> None:
    of = Window(Pool("token", AGENT_TOKEN, False), "requests_total")
    await ledger.sync("a", 1, [line(1, of, limit=0, want=5, at_least=1)])
    assert await alerts(sql) == [(100, 0, 0)]


async def test_windows_with_waiting_alerts_stay_until_they_are_delivered(
    ledger: PostgresLedger, database: Database, sql: Sql
) -> None:
    minute = window("tokens_per_minute")
    await ledger.sync("a", 1, [line(1, minute, limit=100, want=100), line(2, window("tokens_per_hour"), want=1)])
    await ledger.sync("a", 2, [
        line(1, minute, limit=100, granted=100, used=100), line(2, window("tokens_per_hour"), granted=1, returned=1),
    ])  # fmt: skip
    await ledger.end("a")
    await sql.execute("UPDATE keyproxy.windows SET starts = starts - 90000")
    await database.fetch("tend_usage", 7, 400, 100)
    assert await sql.fetchval("SELECT array_agg(measure) FROM keyproxy.windows") == ["tokens_per_minute"]
    for row in await database.fetch("claim_alerts", 9, timedelta(seconds=60)):
        await database.fetch("alert_delivered", row["message_id"])
    await database.fetch("tend_usage", 7, 400, 100)
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.windows") == 0
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.limit_alerts") == 0
