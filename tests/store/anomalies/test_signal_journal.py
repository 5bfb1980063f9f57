"""Signals are reported once, suspend only what they are about, and never more keys than the configuration allows."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from keyproxy.config.tools.anomaly_settings import SIGNALS, AnomalySettings
from keyproxy.ports.signals import BURST, FAILURES, MANY, NEW_MODEL, NEW_NETWORK, PROBING, VELOCITY, Habit, Signal
from keyproxy.store.anomalies.signal_journal import SignalJournal
from keyproxy.store.postgres.database import Database
from tests.store.harness import Sql, add_key, add_keys, add_user

NETWORK = b"198.51.100.0/24"
SUSPENDING = [NEW_MODEL, NEW_NETWORK, VELOCITY, BURST]


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    """The store of one proxy."""
    database = Database(dsn, pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def journal(database: Database, sql: Sql) -> SignalJournal:
    """The journal of one proxy that watches all, without background tasks. There are the keys key_1 and key_2."""
    await add_user(sql)
    await add_keys(sql, [1, 2])
    return journal_of(database)


def journal_of(database: Database, **terms: Any) -> SignalJournal:
    """A journal that watches and suspends for all signals."""
    journal = SignalJournal(database)
    journal.terms = replace(AnomalySettings(watch=list(SIGNALS), suspend=SUSPENDING), **terms)
    return journal


def habit(value: bytes = NETWORK, kind: str = NEW_NETWORK, key: str = "key_1") -> Habit:
    """A habit that the process does not know yet."""
    return Habit(key, kind, value, "198.51.100.7", set())


def signal(kind: str = NEW_NETWORK, value: str = "v", *, key: str | None = "key_1", **fields: Any) -> Signal:
    """A signal that may suspend."""
    fields = {"may_suspend": True, **fields}
    return Signal(kind, key, "" if key else NETWORK.decode(), value, "198.51.100.7", {"requests": 7}, **fields)


async def learned(journal: SignalJournal, *habits: Habit) -> None:
    """Store habits, and report what is new."""
    for one in habits:
        journal.learn(one)
    await journal.flush()


async def reported(journal: SignalJournal, *signals: Signal) -> None:
    """Report signals."""
    for one in signals:
        journal.report(one)
    await journal.flush()


async def suspended(sql: Sql) -> list[str]:
    """The suspended keys."""
    rows = await sql.fetch("SELECT id FROM keyproxy.api_keys WHERE suspended_at IS NOT NULL ORDER BY id")
    return [row["id"] for row in rows]


async def events(sql: Sql, kind: str = "key.anomaly") -> list[dict[str, Any]]:
    """The payloads of events."""
    query = "SELECT payload::text AS payload FROM keyproxy.events WHERE kind = $1 ORDER BY created_at"
    rows = await sql.fetch(query, kind)
    return [json.loads(row["payload"]) for row in rows]


async def age(sql: Sql, span: str = "25 hours") -> None:
    """Make all habits older."""
    await sql.execute(f"UPDATE keyproxy.key_habits SET first_seen_at = first_seen_at - interval '{span}'")


# -- habits


async def test_habits_of_the_first_day_are_learned_silently(journal: SignalJournal, sql: Sql) -> None:
    await learned(journal, habit(), habit(b"203.0.113.0/24"))
    await age(sql, "23 hours 59 minutes")
    await learned(journal, habit(b"192.0.2.0/24"))
    assert await events(sql) == []
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.key_habits") == 3


async def test_new_habit_after_the_first_day_is_reported_and_suspends_the_key(journal: SignalJournal, sql: Sql) -> None:
    await learned(journal, habit())
    await age(sql)
    await learned(journal, habit(b"192.0.2.0/24"))
    (event,) = await events(sql)
    assert {name: event[name] for name in ("key", "user", "tenant", "signal", "value", "client", "suspended")} == {
        "key": "key_1", "user": "u_42", "tenant": "acme", "signal": NEW_NETWORK, "value": "192.0.2.0/24",
        "client": "198.51.100.7", "suspended": True,
    }  # fmt: skip
    assert await suspended(sql) == ["key_1"]
    assert journal.reported[NEW_NETWORK] == 1


async def test_first_day_counts_for_each_kind_of_habit(journal: SignalJournal, sql: Sql) -> None:
    await learned(journal, habit())
    await age(sql)
    await learned(journal, habit(b"gpt-4o", NEW_MODEL))
    assert await events(sql) == []


async def test_a_habit_is_new_in_one_of_many_proxies(database: Database, journal: SignalJournal, sql: Sql) -> None:
    await learned(journal, habit())
    await age(sql)
    proxies = [journal_of(database) for _ in range(4)]
    await asyncio.gather(*(learned(proxy, habit(b"192.0.2.0/24")) for proxy in proxies))
    assert len(await events(sql)) == 1
    assert sum(proxy.reported[NEW_NETWORK] for proxy in proxies) == 1


async def test_known_habits_are_remembered_by_the_process(journal: SignalJournal) -> None:
    one = habit()
    await learned(journal, one)
    assert one.known == {NETWORK}


async def test_habit_of_a_key_that_does_not_exist_is_not_stored(journal: SignalJournal, sql: Sql) -> None:
    await learned(journal, habit(key="key_9"))
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.key_habits") == 0


async def test_networks_beyond_the_maximum_are_reported_once_as_many(journal: SignalJournal, sql: Sql) -> None:
    journal.terms = replace(journal.terms, networks_max=2, suspend=[])
    await learned(journal, habit(b"192.0.1.0/24"), habit(b"192.0.2.0/24"))
    await age(sql)
    beyond = [habit(b"192.0.3.0/24"), habit(b"192.0.4.0/24")]
    for one in beyond:
        await learned(journal, one)
    assert [event["value"] for event in await events(sql)] == ["many"]
    assert [one.known for one in beyond] == [{MANY}, {MANY}]
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.key_habits") == 3


async def test_models_are_not_bounded_by_the_maximum_of_networks(journal: SignalJournal, sql: Sql) -> None:
    journal.terms = replace(journal.terms, networks_max=1)
    await learned(journal, habit(), *(habit(b"m%d" % number, NEW_MODEL) for number in range(3)))
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.key_habits WHERE kind = 'new_model'") == 3


# -- reports


@pytest.mark.parametrize("kind", SIGNALS)
async def test_signal_is_reported_once_for_each_key_value_and_hour(
    database: Database, journal: SignalJournal, sql: Sql, kind: str
) -> None:
    journal.terms = replace(journal.terms, suspend=[])
    other = journal_of(database, suspend=[])
    await reported(journal, signal(kind), signal(kind), signal(kind, key="key_2"), signal(kind, "w"))
    await reported(other, signal(kind))
    assert sorted((event["key"], event["value"]) for event in await events(sql)) == [
        ("key_1", "v"), ("key_1", "w"), ("key_2", "v"),
    ]  # fmt: skip
    assert (journal.reported[kind], other.reported[kind]) == (3, 0)
    await sql.execute("UPDATE keyproxy.anomalies SET hour = hour - interval '1 hour'")
    await reported(other, signal(kind))
    assert other.reported[kind] == 1


async def test_signal_has_a_row_of_the_audit_log(journal: SignalJournal, sql: Sql) -> None:
    await reported(journal, signal(PROBING, ""))
    row = await sql.fetchrow("SELECT * FROM keyproxy.audit_log WHERE action = 'anomaly'")
    assert row is not None
    assert (row["actor"], row["entity"], row["entity_id"], row["tenant_id"]) == (
        "signal:probing", "key", "key_1", "acme",
    )  # fmt: skip


async def test_signal_about_a_network_names_no_key(journal: SignalJournal, sql: Sql) -> None:
    await reported(journal, signal(FAILURES, "", key=None))
    (event,) = await events(sql)
    assert (event["key"], event["user"], event["network"]) == (None, None, NETWORK.decode())
    assert await suspended(sql) == []


async def test_suspension_is_an_event_of_its_own(journal: SignalJournal, sql: Sql) -> None:
    await reported(journal, signal(NEW_MODEL, "gpt-4o"))
    (event,) = await events(sql, "key.suspended")
    assert (event["key"], event["by"], event["reason"]) == ("key_1", "signal:new_model", "signal new_model: gpt-4o")
    row = await sql.fetchrow("SELECT * FROM keyproxy.audit_log WHERE entity = 'key' AND action = 'update'")
    assert row is not None
    assert (row["actor"], row["entity_id"]) == ("signal:new_model", "key_1")


async def test_suspension_by_any_sql_client_is_an_event(journal: SignalJournal, sql: Sql) -> None:
    await sql.execute("UPDATE keyproxy.api_keys SET suspended_at = now() WHERE id = 'key_1'")
    assert [event["key"] for event in await events(sql, "key.suspended")] == ["key_1"]
    await sql.execute("UPDATE keyproxy.api_keys SET suspend_reason = 'x' WHERE id = 'key_1'")
    assert len(await events(sql, "key.suspended")) == 1
    assert journal.dropped == 0


# -- suspensions


@pytest.mark.parametrize("kind", [PROBING, FAILURES])
async def test_signals_of_refused_requests_suspend_no_key(journal: SignalJournal, sql: Sql, kind: str) -> None:
    await reported(journal, signal(kind))
    assert await suspended(sql) == []
    with contextlib.suppress(Exception):
        await sql.execute("SELECT keyproxy.suspend_key('key_1', $1, '', 10)", kind)
    assert await suspended(sql) == []


async def test_signal_suspends_only_if_configured(journal: SignalJournal, sql: Sql) -> None:
    journal.terms = replace(journal.terms, suspend=[NEW_MODEL])
    await reported(journal, signal(NEW_NETWORK), signal(NEW_MODEL, key="key_2"))
    assert await suspended(sql) == ["key_2"]


async def test_signal_about_shared_traffic_suspends_no_key(journal: SignalJournal, sql: Sql) -> None:
    await reported(journal, signal(VELOCITY, may_suspend=False))
    assert await suspended(sql) == []


@pytest.mark.parametrize(("used", "suspends"), [(None, True), (-3_600, True), (60, False)])
async def test_key_is_not_suspended_for_a_limit_that_its_predecessor_used_too(
    journal: SignalJournal, sql: Sql, used: int | None, *, suspends: bool
) -> None:
    start = 1_800_000_000.0
    await sql.execute("UPDATE keyproxy.api_keys SET replaces = 'key_1', lineage = 'key_1' WHERE id = 'key_2'")
    if used is not None:
        await sql.execute(
            "UPDATE keyproxy.api_keys SET last_used_at = to_timestamp($1) WHERE id = 'key_1'", start + used
        )
    await reported(journal, signal(VELOCITY, key="key_2", shared_since=start))
    assert await suspended(sql) == (["key_2"] if suspends else [])


async def test_no_more_keys_are_suspended_in_an_hour_than_allowed_over_all_proxies(
    database: Database, journal: SignalJournal, sql: Sql
) -> None:
    await add_keys(sql, range(3, 23))
    proxies = [journal_of(database, suspensions_per_hour_max=5) for _ in range(4)]
    await asyncio.gather(
        *(reported(proxy, *(signal(key=f"key_{number}") for number in range(3 + place, 23, 4)))
          for place, proxy in enumerate(proxies))
    )  # fmt: skip
    assert len(await suspended(sql)) == 5
    assert sum(proxy.withheld for proxy in proxies) == 15
    assert len(await events(sql)) == 20
    assert journal.withheld == 0


async def test_deleting_a_suspended_key_makes_no_room_for_another_suspension(journal: SignalJournal, sql: Sql) -> None:
    journal.terms = replace(journal.terms, suspensions_per_hour_max=1)
    await reported(journal, signal())
    await sql.execute("DELETE FROM keyproxy.api_keys WHERE id = 'key_1'")
    await reported(journal, signal(key="key_2"))
    assert await suspended(sql) == []


async def test_suspensions_of_more_than_an_hour_ago_do_not_count(journal: SignalJournal, sql: Sql) -> None:
    journal.terms = replace(journal.terms, suspensions_per_hour_max=1)
    await reported(journal, signal())
    await sql.execute("UPDATE keyproxy.key_suspensions SET suspended_at = suspended_at - interval '61 minutes'")
    await reported(journal, signal(key="key_2"))
    assert await suspended(sql) == ["key_1", "key_2"]


async def test_maximum_of_zero_suspends_no_key(journal: SignalJournal, sql: Sql) -> None:
    journal.terms = replace(journal.terms, suspensions_per_hour_max=0)
    await reported(journal, signal())
    assert (await suspended(sql), journal.withheld) == ([], 1)


async def test_resumed_key_is_not_suspended_by_the_same_signal_for_an_hour(journal: SignalJournal, sql: Sql) -> None:
    await reported(journal, signal(NEW_NETWORK, "a"))
    await sql.execute("UPDATE keyproxy.api_keys SET suspended_at = NULL, suspend_reason = NULL")
    await reported(journal, signal(NEW_NETWORK, "b"))
    assert (await suspended(sql), journal.withheld) == ([], 1)
    await reported(journal, signal(NEW_MODEL, "b"))
    assert await suspended(sql) == ["key_1"]
    await sql.execute("UPDATE keyproxy.api_keys SET suspended_at = NULL, suspend_reason = NULL")
    await sql.execute("UPDATE keyproxy.key_suspensions SET resumed_at = resumed_at - interval '61 minutes'")
    await reported(journal, signal(NEW_NETWORK, "c"))
    assert await suspended(sql) == ["key_1"]


async def test_signal_suspends_only_a_key_that_exists_and_works(journal: SignalJournal, sql: Sql) -> None:
    await sql.execute("UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'")
    await sql.execute("UPDATE keyproxy.api_keys SET expires_at = now() WHERE id = 'key_2'")
    await reported(journal, signal(), signal(key="key_2"), signal(key="key_9"))
    assert await suspended(sql) == []
    assert [event["key"] for event in await events(sql)] == ["key_1", "key_2"]


@pytest.mark.parametrize(("requests", "is_reported"), [(59, True), (60, False)])
async def test_burst_within_the_recorded_usage_is_not_reported(
    journal: SignalJournal, sql: Sql, requests: int, *, is_reported: bool
) -> None:
    await sql.execute(
        "INSERT INTO keyproxy.usage (day, tenant_id, user_id, key_id, is_test, route, model, requests, refusals,"
        " tokens_in, tokens_out, tokens_estimated) VALUES (current_date, 'acme', 'u_42', 'key_1', false, 'r', '',"
        " $1, 0, 0, 0, 0)",
        requests,
    )
    await reported(journal, signal(BURST, "", baseline=60))
    assert bool(await events(sql)) is is_reported


# -- bounds and failures


async def test_signals_beyond_the_queue_are_dropped_and_counted(journal: SignalJournal) -> None:
    for number in range(1_200):
        journal.learn(habit(b"m%d" % number, NEW_MODEL))
    assert journal.dropped == 200
    journal.report(signal())
    assert journal.dropped == 201


async def test_signals_are_dropped_while_the_store_is_down(database: Database, journal: SignalJournal) -> None:
    await database.close()
    one = habit()
    await learned(journal, one)
    await reported(journal, signal())
    assert (journal.dropped, one.known) == (2, set[bytes]())


async def test_records_of_two_days_ago_are_deleted(journal: SignalJournal, sql: Sql) -> None:
    await reported(journal, signal(), signal(key="key_2"))
    await sql.execute("UPDATE keyproxy.api_keys SET suspended_at = NULL, suspend_reason = NULL WHERE id = 'key_2'")
    assert await journal.tend() is False
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.anomalies") == 2
    for table, column in (
        ("anomalies", "hour"),
        ("key_suspensions", "suspended_at"),
        ("key_suspensions", "resumed_at"),
    ):
        await sql.execute(f"UPDATE keyproxy.{table} SET {column} = {column} - $1::interval", timedelta(hours=50))
    assert await journal.tend() is False
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.anomalies") == 0
    # The one that is suspended still: when it is resumed, its signal must be known.
    assert await sql.fetchval("SELECT string_agg(key_id, ' ') FROM keyproxy.key_suspensions") == "key_1"


async def test_deleting_a_key_deletes_its_habits(journal: SignalJournal, sql: Sql) -> None:
    await add_key(sql, 3)
    await learned(journal, habit(key="key_3"))
    await sql.execute("DELETE FROM keyproxy.api_keys WHERE id = 'key_3'")
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.key_habits") == 0
