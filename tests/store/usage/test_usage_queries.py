"""Reading usage: sums by any dimension, events once and in order, exports that resume after an interruption."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.config.schema import Usage
from keyproxy.reasons import Reason
from keyproxy.store.postgres.database import Database
from keyproxy.store.usage import usage_queries
from keyproxy.store.usage.journal import UsageJournal
from keyproxy.store.usage.usage_queries import DIMENSIONS, NoSuchEventError, UsageFilter, UsageReader
from tests import fakes
from tests.store.harness import Clock, Sql
from tests.store.usage.test_journal import DELEGATED, ended, rows

NOBODY = UsageFilter()


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.wall_seconds, clock.mono_seconds = datetime(2020, 3, 1, 12, tzinfo=UTC).timestamp(), 5_000.0
    return clock


@pytest.fixture
def reader(database: Database) -> UsageReader:
    return UsageReader(database)


@pytest.fixture
async def three_days(database: Database, clock: Clock) -> UsageJournal:
    """One request of each of two users on each of three days from 2020-03-01, and a test request on the last."""
    journal = UsageJournal(database, Usage(), clock, settle_seconds=0.5)
    people = [fakes.identity("ann"), fakes.identity("bob", "other")]
    for _ in range(3):
        journal.take(rows(*(ended(who, use=TokenUse(10, 1)) for who in people)))
        await journal.flush()
        clock.wall_seconds += 86_400
    clock.wall_seconds -= 86_400
    journal.take(rows(ended(fakes.identity("ann", is_test=True), was_sent=False, reason=Reason.RATE_LIMITED)))
    await journal.flush()
    return journal


async def listed(found: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row async for row in found]


@pytest.mark.usefixtures("three_days")
async def test_sums_are_grouped_by_the_requested_dimensions(reader: UsageReader) -> None:
    of_models = dict.fromkeys(("tokens_cached", "tokens_cache_write", "tokens_reasoning", "cost_micros"), 0)
    assert await reader.sums(NOBODY, ["user"], 10) == [
        {
            "user": "ann", "requests": 3, "refusals": 1, "tokens_in": 30, "tokens_out": 3, "tokens_estimated": 0,
            **of_models,
        },
        {
            "user": "bob", "requests": 3, "refusals": 0, "tokens_in": 30, "tokens_out": 3, "tokens_estimated": 0,
            **of_models,
        },
    ]  # fmt: skip
    assert [row["mode"] for row in await reader.sums(NOBODY, ["mode"], 10)] == ["live", "test"]
    assert len(await reader.sums(NOBODY, DIMENSIONS, 100)) == 7
    assert len(await reader.sums(NOBODY, DIMENSIONS, 5)) == 5


async def test_sums_and_exports_distinguish_models(
    database: Database, clock: Clock, reader: UsageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_queries, "_ROWS", 2)
    journal = UsageJournal(database, Usage(), clock, settle_seconds=0.5)
    for number in range(7):
        one = ended(fakes.identity(), use=TokenUse(10, 1))
        one.model, one.cost_micros = f"m{number % 4}", 100 * number
        journal.take(rows(one))
    await journal.flush()
    sums = await reader.sums(NOBODY, ["model"], 10)
    assert [(row["model"], row["requests"], row["cost_micros"]) for row in sums] == [
        ("m0", 2, 400), ("m1", 2, 600), ("m2", 2, 800), ("m3", 1, 300)
    ]  # fmt: skip
    assert [row["model"] for row in await listed(reader.all_sums(NOBODY))] == ["m0", "m1", "m2", "m3"]
    events = await listed(reader.events(NOBODY))
    assert [(event["model"], event["cost_micros"]) for event in events[:2]] == [("m0", 0), ("m1", 100)]


@pytest.mark.usefixtures("three_days")
@pytest.mark.parametrize(
    ("wanted", "requests"),
    [
        (UsageFilter(tenant="acme"), 3),
        (UsageFilter(user="bob"), 3),
        (UsageFilter(key="key_of_ann", tenant="other"), 0),
        (UsageFilter(since=datetime(2020, 3, 2, tzinfo=UTC)), 4),
        (UsageFilter(since=datetime(2020, 3, 2, 23, tzinfo=UTC)), 4),
        (UsageFilter(until=datetime(2020, 3, 2, tzinfo=UTC)), 2),
        (UsageFilter(until=datetime(2020, 3, 2, 0, 0, 1, tzinfo=UTC)), 4),
    ],
)
async def test_sums_cover_the_requested_owner_and_time(reader: UsageReader, wanted: UsageFilter, requests: int) -> None:
    assert sum(row["requests"] for row in await reader.sums(wanted, ["day"], 10)) == requests
    assert sum([row["requests"] async for row in reader.all_sums(wanted)]) == requests


async def test_each_sum_is_returned_once_over_any_number_of_pages(reader: UsageReader, sql: Sql) -> None:
    await sql.execute(
        "INSERT INTO keyproxy.usage SELECT '2026-01-01'::date + n % 3, 't' || n % 7, 'u' || n % 100, 'k' || n,"
        " n % 2 = 0, 'r', 1, 0, 0, 0, 0 FROM generate_series(1, 2500) AS n"
    )
    found = await listed(reader.all_sums(NOBODY))
    assert len({row["key"] for row in found}) == len(found) == 2500
    assert [row["day"] for row in found] == sorted(row["day"] for row in found)


async def test_every_event_is_returned_once_and_in_order(reader: UsageReader, three_days: UsageJournal) -> None:
    found = await listed(reader.events(NOBODY))
    assert [event["user"] for event in found] == ["ann", "bob"] * 3 + ["ann"]
    assert len({event["id"] for event in found}) == 7
    assert found[0] == found[0] | {
        "tenant": "acme", "key": "key_of_ann", "mode": "live", "method": "POST", "status": 200, "code": "ok",
        "time": "2020-03-01T12:00:00.000Z", "tokens_in": 10, "tokens_out": 1, "estimated": False,
    }  # fmt: skip
    assert [event["user"] for event in await listed(reader.events(UsageFilter(user="bob")))] == ["bob"] * 3
    late = UsageFilter(since=datetime(2020, 3, 2, 12, tzinfo=UTC), until=datetime(2020, 3, 3, 12, tzinfo=UTC))
    assert await listed(reader.events(late)) == found[2:4]


async def test_exported_events_have_the_actor_the_agent_and_its_token(
    reader: UsageReader, database: Database, clock: Clock
) -> None:
    journal = UsageJournal(database, Usage(), clock, settle_seconds=0.5)
    for identity in DELEGATED.values():
        journal.take(rows(ended(identity), ended(identity, use=TokenUse(10, 1))))
    await journal.flush()
    found = await listed(reader.events(NOBODY))
    names = ("actor_user_id", "agent_id", "agent_token_id")
    assert [tuple(event[name] for name in names) for event in found] == [who for who in DELEGATED for _ in range(2)]
    assert [event["tokens_cached"] for event in found] == [None, 0] * len(DELEGATED)


async def test_export_resumes_after_any_event_and_misses_none(reader: UsageReader, three_days: UsageJournal) -> None:
    found = await listed(reader.events(NOBODY))
    for place, event in enumerate(found):
        assert await listed(reader.events(NOBODY, event["id"])) == found[place + 1 :]
    three_days.take(rows(ended(fakes.identity("later"))))
    await three_days.flush()
    (more,) = await listed(reader.events(NOBODY, found[-1]["id"]))
    assert more["user"] == "later"


@pytest.mark.usefixtures("three_days")
@pytest.mark.parametrize("event_id", ["", "x", "0123456789abcdef:1:1", "0123456789abcdef:1", "a:b:c"])
async def test_resuming_after_an_unknown_event_is_an_error(reader: UsageReader, event_id: str) -> None:
    with pytest.raises(NoSuchEventError, match="there is no event"):
        await listed(reader.events(NOBODY, event_id))


async def test_export_waits_for_open_transactions_so_that_a_reader_cannot_skip_their_events(
    reader: UsageReader, three_days: UsageJournal, database: Database, dsn: str, clock: Clock
) -> None:
    """A batch gets its serial before it commits: a later one may be visible already."""
    slow = await asyncpg.connect(dsn)
    transaction = slow.transaction()
    await transaction.start()
    await slow.execute(
        "INSERT INTO keyproxy.usage_event_batches (day, process, batch, events)"
        """ SELECT (now() AT TIME ZONE 'UTC')::date, '00000000000000aa', 1,
            '[[1000, "slow", ["t","slow","k","live","r","POST",200,"ok"], 1, 1, 1, null, null, false]]'"""
    )
    three_days.take(rows(ended(fakes.identity("later"))))
    await three_days.flush()
    reading = asyncio.create_task(listed(reader.events(NOBODY)))
    done, _ = await asyncio.wait([reading], timeout=0.2)
    assert not done
    await transaction.commit()
    await slow.close()
    assert [event["user"] for event in await reading][-2:] == ["slow", "later"]
