"""The previous release keeps working while the schema is migrated under load, and on the migrated schema."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from keyproxy.limits.ledger_protocol import Pool, Window
from keyproxy.store.ledger.charge_dedup_postgres import PostgresClaims
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.postgres import migrations
from keyproxy.store.postgres.array_text import array_text
from keyproxy.store.postgres.database import Database, StoreUnavailable
from keyproxy.store.postgres.failures import translated
from keyproxy.store.usage.usage_queries import UsageFilter, UsageReader
from tests.contracts import LEASE_SECONDS, line, window
from tests.store.agent_rows import AGENT_TOKEN, add_agent_token
from tests.store.harness import Sql, migrated_up_to, until_blocked
from tests.store.ledger.test_charge_dedup import claim

#: The last migration of the previous release.
_PREVIOUS = 14

#: The migrations since, for which messages wait, and the locks that each takes first.
_BLOCKING = {
    one.number: found[0]
    for one in migrations.available()[_PREVIOUS:]
    if (found := re.search(r"(?m)^LOCK TABLE .*keyproxy\.windows.*;$", one.statements))
}

_ATTEMPTS = 20

_NAME = re.compile(r"^-- name: ([a-z_]+)$", re.MULTILINE)


def _statements() -> dict[str, str]:
    text = Path(__file__).with_name("previous_release.sql").read_text(encoding="utf-8")
    _, *parts = _NAME.split(text)
    return {name: body.strip().removesuffix(";") for name, body in zip(parts[::2], parts[1::2], strict=True)}


class PreviousRelease:
    """A process of the previous release, as the database sees it."""

    def __init__(self, sql: Sql, name: str) -> None:
        self.sql, self.name = sql, name
        self.serial = 0
        self._statements = _statements()

    async def fetch(self, name: str, *arguments: object) -> list[Any]:
        """Run one of its statements, again if the store was unavailable, as the process does."""
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(StoreUnavailable), translated("the store"):
                rows: list[Any] = await self.sql.fetch(self._statements[name], *arguments)
                return rows
            await asyncio.sleep(0.05)
        raise AssertionError(f"{name} fails on the migrated schema")

    async def report(
        self, lease: int, *, user: str = "u_42", measure: str = "requests_per_day", bound: int = 10, granted: int = 0,
        used: int = 0, returned: int = 0, want: int = 0, takes_all: bool = False, is_closing: bool = False,
    ) -> list[Any]:  # fmt: skip
        """Send a message of one line to the ledger; the replies without that about the ledger itself."""
        self.serial += 1
        rows = await self.fetch(
            "sync_leases", self.name, self.serial, LEASE_SECONDS, [lease], ["user"], [user], [False], [measure], [0],
            [bound], [0.0], [granted], [used], [returned], [want], [min(1, want)], [takes_all], [is_closing],
        )  # fmt: skip
        return [row for row in rows if row["lease"]]

    async def record(self, batch: int, requests: int, route: str = "r") -> bool:
        """Record usage of one key."""
        (row,) = await self.fetch(
            "record_usage", self.name, batch, [date(2026, 1, 31)], ["acme"], ["u_42"], ["key_1"], [False], [route],
            [requests], [0], [5], [6], [7], None,
        )  # fmt: skip
        return bool(row["is_new"])


@pytest.fixture
async def previous(sql: Sql) -> PreviousRelease:
    """A process of the previous release on the migrated schema."""
    return PreviousRelease(sql, "old")


@pytest.fixture
async def ledger(database: Database) -> PostgresLedger:
    """A process of this release."""
    return PostgresLedger(database, lease_seconds=LEASE_SECONDS)


async def test_processes_of_both_releases_account_in_the_same_windows(
    previous: PreviousRelease, ledger: PostgresLedger
) -> None:
    (row,) = await previous.report(1, want=1)
    assert (row["granted"], row["spent"], row["held"], len(row)) == (1, 0, 1, 8)
    replies = await ledger.sync("new", 1, [line(want=9, at_least=9)])
    assert replies is not None
    assert (replies[0].granted, replies[0].held, replies[0].holders) == (9, 10, 2)
    await ledger.sync("new", 2, [line(granted=9, used=2, returned=7)])
    # All that is left, as takes_all asks for.
    (row,) = await previous.report(1, granted=1, used=1, want=1, takes_all=True)
    assert (row["granted"], row["spent"], row["held"]) == (8, 3, 7)
    (row,) = await previous.report(1, granted=8, used=4, returned=4, is_closing=True)
    assert (row["spent"], row["held"]) == (6, 0)
    (row,) = await previous.fetch("windows_now", ["user"], ["u_42"], [False], ["requests_per_day"])
    assert tuple(row)[:4] == (1, 6, 0, 0)


async def test_previous_release_ends_and_deletes_holders_and_windows(
    previous: PreviousRelease, ledger: PostgresLedger
) -> None:
    budget = Window(Pool("token", AGENT_TOKEN, False), "tokens_total")
    await add_agent_token(previous.sql)
    await ledger.sync(
        "new", 1, [line(want=4), line(2, window("token_rate"), interval_seconds=1.0, want=1), line(3, budget, want=2)]
    )
    await previous.fetch("end_holders", ["new"])
    assert (await previous.fetch("reap_holders", 100))[0]["done"] == 0
    assert (await previous.fetch("forget_holders", 100))[0]["gone"] == 0
    assert (await previous.fetch("forget_windows", 0, 100))[0]["gone"] == 0
    assert (await previous.fetch("tend_usage", 7, 400, 100))[0]["is_more"] is False
    states = [state for state in await ledger.windows([window(), budget]) if state is not None]
    assert [(state.spent, state.forfeited) for state in states] == [(4, 4), (2, 2)]


async def test_claims_of_the_previous_release_are_covered_without_a_bound(
    previous: PreviousRelease, database: Database
) -> None:
    about, store = claim(1).fingerprint, PostgresClaims(database)
    answers = []
    for batch in range(1, 7):
        (row,) = await previous.fetch("claim_charges", "old", batch, [about], [10], [None])
        answers.append(tuple(row))
    assert answers == [([True], [10]), *[([False], [0])] * 5]
    assert [tuple(row) for row in await previous.fetch("charges_of", [about])] == [(about, 10)]
    # This release counts them.
    assert await store.cover([about]) == {}


async def test_usage_of_both_releases_adds_up(previous: PreviousRelease, database: Database) -> None:
    assert [await previous.record(batch, 1) for batch in (1, 2, 2)] == [True, True, False]
    arguments = ([date(2026, 1, 31)], ["acme"], ["u_42"], ["key_1"], [False], ["r"])
    for batch, model in enumerate(("", "gpt-4o"), 1):
        columns: list[Sequence[object]] = [*arguments, [model], *([[3]] * 9)]
        await database.fetch("record_usage", "new", batch, *map(array_text, columns), None)
    nothing = (None,) * 5
    (row,) = await previous.fetch("usage_by", ["user"], *nothing, 10)
    assert (row["requests"], row["tokens_in"], row["tokens_estimated"]) == (8, 16, 20)
    rows = await previous.fetch("usage_after", date(2020, 1, 1), "", "", "", False, "", *nothing, 10)
    assert [row["requests"] for row in rows] == [5, 3]
    sums = await UsageReader(database).sums(UsageFilter(), ["model"], 10)
    assert [(row["model"], row["requests"], row["cost_micros"]) for row in sums] == [("", 5, 3), ("gpt-4o", 3, 3)]


# -- the migration itself


@pytest.fixture
async def earlier_dsn(empty_dsn: str) -> str:
    """A database with the schema of the previous release."""
    await migrated_up_to(empty_dsn, _PREVIOUS)
    return empty_dsn


@pytest.mark.parametrize("number", _BLOCKING)
async def test_message_that_waits_for_a_migration_is_processed(empty_dsn: str, number: int) -> None:
    """It continues with the function that it began with, which calls functions as they were."""
    await migrated_up_to(empty_dsn, number - 1)
    process = PreviousRelease(await asyncpg.connect(empty_dsn), "old")
    for _ in range(2):
        await process.report(1, want=1)
    migrating, watch = await asyncpg.connect(empty_dsn), await asyncpg.connect(empty_dsn)
    transaction = migrating.transaction()
    await transaction.start()
    await migrating.execute(_BLOCKING[number])
    # Not `report`, which sends a message again that fails.
    message = asyncio.create_task(
        process.sql.fetch(
            _statements()["sync_leases"], "old", 9, LEASE_SECONDS, [1], ["user"], ["u_42"], [False],
            ["requests_per_day"], [0], [10], [0.0], [1], [1], [0], [9], [1], [True], [False],
        )
    )  # fmt: skip
    await until_blocked(watch, "sync_leases")
    await migrating.execute(migrations.available()[number - 1].statements)
    await transaction.commit()
    assert [(row["granted"], row["spent"]) for row in await message if row["lease"]] == [(10, 1)]
    for connection in (process.sql, migrating, watch):
        await connection.close()


async def test_migration_under_load_loses_and_doubles_nothing(earlier_dsn: str) -> None:
    processes = [PreviousRelease(await asyncpg.connect(earlier_dsn), f"p{number}") for number in range(4)]
    is_over = asyncio.Event()
    requests = [0] * len(processes)

    async def serve(place: int) -> None:
        one, chance = processes[place], random.Random(place)
        granted, used = dict.fromkeys(range(8), 0), dict.fromkeys(range(8), 0)
        batch = 0
        while not is_over.is_set() or batch < 20:
            lease = chance.randrange(8)
            used[lease] += chance.randint(0, granted[lease] - used[lease])
            (row,) = await one.report(
                lease + 1,
                user=f"u_{lease}",
                bound=10_000_000,
                granted=granted[lease],
                used=used[lease],
                want=used[lease] + 9,
            )
            granted[lease] = row["granted"]
            batch += 1
            await one.record(batch, 1, route=f"r{lease}")
            await one.fetch("claim_charges", one.name, batch, [claim(lease).fingerprint], [batch], [None])
            requests[place] += 1
        for lease, count in used.items():
            await one.report(
                lease + 1, user=f"u_{lease}", granted=granted[lease], used=count, returned=granted[lease] - count
            )
        used_by_process[place] = sum(used.values())

    used_by_process = [0] * len(processes)
    serving = [asyncio.create_task(serve(place)) for place in range(len(processes))]
    await asyncio.sleep(0.3)
    applied = await migrations.migrate(earlier_dsn)
    is_over.set()
    await asyncio.gather(*serving)
    assert applied[0].number == _PREVIOUS + 1
    sql = processes[0].sql
    row = await sql.fetchrow("SELECT sum(spent)::int8, sum(held)::int8, sum(holders)::int8 FROM keyproxy.windows")
    assert row is not None
    assert tuple(row)[:2] == (sum(used_by_process), 0)
    # A message that the previous function had begun before the migration does not count its holder. That only sets the
    # pace of reports.
    leases = await sql.fetchval("SELECT count(*) FROM keyproxy.leases")
    assert leases - len(processes) <= row[2] <= leases
    assert await sql.fetchval("SELECT sum(requests)::int8 FROM keyproxy.usage") == sum(requests)
    charges = await sql.fetch("SELECT fingerprint FROM keyproxy.idempotent_charges")
    assert len(charges) == 8
    for one in processes:
        await one.sql.close()


async def test_windows_and_leases_of_the_previous_release_are_kept(earlier_dsn: str) -> None:
    old = PreviousRelease(await asyncpg.connect(earlier_dsn), "old")
    other = PreviousRelease(await asyncpg.connect(earlier_dsn), "other")
    for one in (old, other):
        await one.report(1, want=2)
        await one.report(2, want=1)
    await migrations.migrate(earlier_dsn)
    assert await old.sql.fetchval("SELECT holders FROM keyproxy.windows") == 2
    database = Database(earlier_dsn, pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    ledger = PostgresLedger(database, lease_seconds=LEASE_SECONDS)
    await ledger.end("other")
    replies = await ledger.sync("new", 1, [line(want=1)])
    assert replies is not None
    assert replies[0].holders == 2
    for serial, (lease, left) in enumerate(((1, 2), (2, 1)), 9):
        await ledger.sync("old", serial, [line(lease, granted=3 - lease, used=3 - lease, is_closing=True)])
        replies = await ledger.sync("new", serial, [line(granted=1)])
        assert replies is not None
        assert replies[0].holders == left
    await database.close()
    for one in (old, other):
        await one.sql.close()
