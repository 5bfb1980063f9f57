"""Usage is written exactly once, even if responses are lost; expired usage is deleted."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import orjson
import pytest

from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.auth.api_key import KeyFormat
from keyproxy.config.schema import Usage
from keyproxy.http.forwarding import TrustRule
from keyproxy.http_messages import RequestFields, RequestHead, RequestLine
from keyproxy.model import AgentToken, Identity
from keyproxy.ports.exchange import Exchange
from keyproxy.reasons import Reason
from keyproxy.store.postgres.database import Database, Row, StoreUnavailable
from keyproxy.store.usage.journal import UsageJournal
from keyproxy.store.usage.model_names import ModelNames
from tests import fakes
from tests.store.harness import Clock, Relay, Sql, StatementRunner, until_row

ROUTE = "POST /v1/ai/jobs"
_numbers = itertools.count()


def ended(
    identity: Identity | None, *, was_sent: bool = True, reason: Reason | None = None,
    use: TokenUse | None = None, is_estimated: bool = False,
) -> Exchange:  # fmt: skip
    """A finished exchange, as far as usage is concerned."""
    one = Exchange()
    one.identity = identity
    line = RequestLine(b"POST", b"/v1/ai/jobs", b"/v1/ai/jobs", 1, b"POST /v1/ai/jobs HTTP/1.1\r\n")
    one.head = RequestHead(line, RequestFields(b"compute", b""), b"", (), 10)
    one.request_id = b"%d" % next(_numbers)
    one.started_mono, one.ended_mono = 5_000.0, 5_000.25
    one.sent_mono = 5_000.1 if was_sent else 0.0
    one.reason = reason
    one.status = 200 if reason is None else reason.value.status
    one.token_use, one.is_estimated = use, is_estimated
    one.bytes_in, one.bytes_out = 10, 20
    return one


def rows(*exchanges: Exchange) -> list[tuple[Exchange, str, str, str]]:
    """The rows that the recorder passes on."""
    return [
        (
            one,
            ROUTE,
            "none" if one.identity is None else one.identity.mode,
            "ok" if one.reason is None else one.reason.code,
        )
        for one in exchanges
    ]


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.wall_seconds = datetime.now(UTC).timestamp()
    return clock


@pytest.fixture
def journal(database: Database, clock: Clock) -> UsageJournal:
    """A journal that writes only when the test calls it."""
    return UsageJournal(database, Usage(), clock, settle_seconds=0.5)


async def usage(sql: Sql) -> list[dict[str, Any]]:
    """All rows of the table of sums, ordered."""
    found = await sql.fetch("SELECT * FROM keyproxy.usage ORDER BY day, user_id, is_test, route")
    return [dict(row) for row in found]


async def total(sql: Sql, column: str = "requests") -> int:
    count: int = await sql.fetchval(f"SELECT coalesce(sum({column}), 0)::int8 FROM keyproxy.usage")
    return count


async def test_requests_refusals_and_tokens_are_summed_by_day_key_mode_and_route(
    journal: UsageJournal, sql: Sql, clock: Clock
) -> None:
    who, test = fakes.identity(), fakes.identity(is_test=True)
    journal.take(
        rows(
            ended(who, use=TokenUse(10, 5)),
            ended(who, use=TokenUse(3, 4), is_estimated=True),
            ended(who, was_sent=False, reason=Reason.QUOTA_EXHAUSTED),
            ended(test),
        )
    )
    await journal.flush()
    today = datetime.fromtimestamp(clock.wall_seconds, UTC).date()
    about = {
        "day": today, "tenant_id": "acme", "user_id": "u_42", "key_id": "key_of_u_42", "route": ROUTE, "model": "",
        "tokens_cached": 0, "tokens_cache_write": 0, "tokens_reasoning": 0, "cost_micros": 0,
    }  # fmt: skip
    assert await usage(sql) == [
        {
            **about, "is_test": False, "requests": 2, "refusals": 1, "tokens_in": 13, "tokens_out": 9,
            "tokens_estimated": 7,
        },
        {
            **about, "is_test": True, "requests": 1, "refusals": 0, "tokens_in": 0, "tokens_out": 0,
            "tokens_estimated": 0,
        },
    ]  # fmt: skip


async def test_each_model_has_its_own_sums_with_parts_of_tokens_and_cost(journal: UsageJournal, sql: Sql) -> None:
    who = fakes.identity()
    use = TokenUse(1_000, 200, cached=600, cache_write=50, reasoning=80)
    told = [("gpt-4o", 3_750), ("gpt-4o", 250), ("", 0)]
    for model, cost in told:
        one = ended(who, use=use)
        one.model, one.cost_micros = model, cost
        journal.take(rows(one))
    await journal.flush()
    sums = [
        {name: row[name] for name in ("model", "requests", "tokens_cached", "tokens_cache_write", "tokens_reasoning",
                                      "cost_micros")}
        for row in sorted(await usage(sql), key=lambda row: row["model"])
    ]  # fmt: skip
    assert sums == [
        {
            "model": "", "requests": 1, "tokens_cached": 600, "tokens_cache_write": 50, "tokens_reasoning": 80,
            "cost_micros": 0,
        },
        {
            "model": "gpt-4o", "requests": 2, "tokens_cached": 1_200, "tokens_cache_write": 100, "tokens_reasoning": 160,
            "cost_micros": 4_000,
        },
    ]  # fmt: skip


async def test_event_of_a_model_has_its_tokens_and_cost_and_stays_readable_for_the_previous_release(
    journal: UsageJournal, sql: Sql
) -> None:
    sent, refused = ended(fakes.identity(), use=TokenUse(10, 5, cached=4, cache_write=3, reasoning=2)), ended(
        fakes.identity(), was_sent=False, reason=Reason.QUOTA_EXHAUSTED
    )  # fmt: skip
    sent.model, sent.cost_micros, refused.model, refused.policy = "gpt-4o", 123, "o3", "user.requests_per_day"
    journal.take(rows(sent, refused, ended(fakes.identity())))
    await journal.flush()
    columns = "model, tokens_cached, tokens_cache_write, tokens_reasoning, cost_micros, policy"
    found = [tuple(row) for row in await sql.fetch(f"SELECT {columns} FROM keyproxy.usage_events ORDER BY id")]
    assert found == [
        ("gpt-4o", 4, 3, 2, 123, None),
        ("o3", None, None, None, None, "user.requests_per_day"),
        (None, None, None, None, None, None),
    ]
    events = orjson.loads(await sql.fetchval("SELECT events::text FROM keyproxy.usage_event_batches"))
    assert {len(event) for event in events} == {9}


async def test_user_has_at_most_64_unlisted_models_a_day_and_further_ones_are_other(
    journal: UsageJournal, sql: Sql, clock: Clock
) -> None:
    clock.wall_seconds = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
    journal.model_names = ModelNames(["gpt-4o"])

    async def send(user: str, *models: str) -> set[str]:
        for model in models:
            one = ended(fakes.identity(user))
            one.model = model
            journal.take(rows(one))
        await journal.flush()
        found = await sql.fetch("SELECT model FROM keyproxy.usage WHERE user_id = $1 AND day = $2", user,
                                datetime.fromtimestamp(clock.wall_seconds, UTC).date())  # fmt: skip
        return {row["model"] for row in found}

    made_up = [f"m{number}" for number in range(70)]
    assert await send("ann", *made_up, "gpt-4o", "m3") == {*made_up[:64], "gpt-4o", "other"}
    assert await send("bob", "m69") == {"m69"}
    clock.advance(86_400)
    assert await send("ann", "m69") == {"m69"}


def test_no_secret_is_recorded_as_the_name_of_a_model() -> None:
    names = ModelNames(["gpt-4o"])
    formats, entropy = KeyFormat(), bytes(32)
    for secret in (
        formats.make(entropy, is_test=False),
        *(
            make(entropy)
            for make in (formats.make_access_token, formats.make_refresh_token, formats.make_client_secret)
        ),
    ):
        plaintext = secret.reveal().decode()
        for name in (plaintext, f"models/{plaintext}", plaintext[:40]):
            assert names.kept(name, "ann", 1) == names.kept(name, "ann", 1) == "other"
    assert names.kept("kp_live_small", "ann", 1) == "kp_live_small"


async def test_day_is_that_of_the_ledger_s_clock(database: Database, sql: Sql, clock: Clock) -> None:
    ahead = [3.0]
    journal = UsageJournal(database, Usage(), clock, settle_seconds=0.5, server_ahead_seconds=lambda: ahead[0])
    clock.wall_seconds = datetime(2026, 1, 31, 23, 59, 58, tzinfo=UTC).timestamp()
    journal.take(rows(ended(fakes.identity())))
    ahead[0] = -3.0
    clock.advance(3.0)
    journal.take(rows(ended(fakes.identity()), ended(fakes.identity())))
    await journal.flush()
    assert [(row["day"], row["requests"]) for row in await usage(sql)] == [
        (date(2026, 1, 31), 2),
        (date(2026, 2, 1), 1),
    ]


async def test_batches_of_one_day_add_up_even_if_the_identity_was_reloaded(journal: UsageJournal, sql: Sql) -> None:
    for _ in range(3):
        journal.take(rows(ended(fakes.identity()), ended(fakes.identity())))
        await journal.flush()
    assert [row["requests"] for row in await usage(sql)] == [6]


async def test_day_starts_at_midnight_utc(journal: UsageJournal, sql: Sql, clock: Clock) -> None:
    who = fakes.identity()
    clock.wall_seconds = datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC).timestamp()
    journal.take(rows(ended(who)))
    clock.advance(1.0)
    journal.take(rows(ended(who), ended(who)))
    await journal.flush()
    assert [(row["day"], row["requests"]) for row in await usage(sql)] == [
        (date(2026, 1, 31), 1),
        (date(2026, 2, 1), 2),
    ]


async def test_requests_of_unknown_keys_are_attributed_to_no_key(journal: UsageJournal, sql: Sql) -> None:
    journal.take(rows(ended(None, was_sent=False, reason=Reason.KEY_INVALID)))
    await journal.flush()
    assert await usage(sql) == []
    assert journal.pending_events == 0


@pytest.mark.parametrize("losses", [1, 3])
async def test_batch_whose_response_is_lost_counts_once(dsn: str, sql: Sql, clock: Clock, losses: int) -> None:
    door = StatementRunner(dsn)
    await door.open()
    journal = UsageJournal(door, Usage(), clock, settle_seconds=0.5)

    def lose(_rows: Sequence[Row]) -> Sequence[Row]:
        raise StoreUnavailable("the answer got lost")

    door.edit["record_usage"] = lose
    for _ in range(losses):
        journal.take(rows(ended(fakes.identity())))
        await journal.flush()
    assert journal.down_because
    del door.edit["record_usage"]
    await journal.flush()
    await journal.flush()
    await door.close()
    assert await total(sql) == losses
    assert await sql.fetchval("SELECT count(DISTINCT id) FROM keyproxy.usage_events") == losses
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.usage_events") == losses
    assert not journal.down_because


async def test_usage_during_an_outage_of_the_store_is_written_when_it_is_back(
    relay: Relay, sql: Sql, clock: Clock
) -> None:
    database = Database(relay.dsn, pool_size_max=1, statement_timeout_seconds=5.0)
    await database.open()
    journal = UsageJournal(database, Usage(), clock, settle_seconds=0.5)
    who = fakes.identity()
    await relay.cut()
    for _ in range(5):
        journal.take(rows(ended(who)))
        await journal.flush()
    clock.advance(30.0)
    assert journal.unwritten_seconds() == 30.0
    await relay.mend()
    await journal.close()
    await database.close()
    assert await total(sql) == 5
    assert journal.unwritten_seconds() == 0.0


async def test_closing_writes_everything(journal: UsageJournal, sql: Sql) -> None:
    journal.start()
    journal.take(rows(ended(fakes.identity())))
    await journal.close()
    assert await total(sql) == 1


async def test_usage_is_written_every_settle_seconds(database: Database, sql: Sql, clock: Clock) -> None:
    journal = UsageJournal(database, Usage(), clock, settle_seconds=0.01)
    journal.start()
    journal.take(rows(ended(fakes.identity())))
    await until_row(sql, "SELECT 1 FROM keyproxy.usage WHERE requests = 1")
    await journal.close()


@pytest.mark.parametrize(("people", "requests", "batches"), [(64, 1, 1), (65, 1, 2), (640, 1, 8), (1, 2_000, 4)])
async def test_usage_is_written_in_small_batches_that_count_every_request_and_event_once(
    journal: UsageJournal, sql: Sql, people: int, requests: int, batches: int
) -> None:
    for number in range(people):
        who = fakes.identity(f"u_{number}")
        journal.take(rows(*(ended(who) for _ in range(requests))))
    assert journal.pending_events == people * requests
    await journal.flush()
    assert journal.pending_events == 0
    assert journal.counts == {"batches": batches, "events": people * requests, "failures": 0}
    assert {row["requests"] for row in await usage(sql)} == {requests}
    assert await total(sql) == people * requests
    events = "SELECT count(*), count(DISTINCT request_id), count(DISTINCT id) FROM keyproxy.usage_events"
    assert [tuple(row) for row in await sql.fetch(events)] == [(people * requests,) * 3]


async def test_batch_among_several_whose_response_is_lost_counts_once(dsn: str, sql: Sql, clock: Clock) -> None:
    runner = StatementRunner(dsn)
    await runner.open()
    journal = UsageJournal(runner, Usage(), clock, settle_seconds=0.5)

    def lose(_rows: Sequence[Row]) -> Sequence[Row]:
        if runner.queries["record_usage"] == 3:
            raise StoreUnavailable("the response is lost")
        return _rows

    runner.edit["record_usage"] = lose
    for turn in range(3):
        journal.take(rows(*(ended(fakes.identity(f"u_{turn}_{number}")) for number in range(200))))
        await journal.flush(is_paced=True)
    await runner.close()
    assert journal.counts["failures"] == 1
    assert await total(sql) == 600
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.usage_events") == 600


async def test_processes_that_write_the_same_rows_in_any_order_do_not_deadlock(
    database: Database, sql: Sql, clock: Clock
) -> None:
    people = [fakes.identity(f"u_{number}") for number in range(50)]
    journals = [UsageJournal(database, Usage(), clock, settle_seconds=0.5) for _ in range(4)]
    for turn in range(10):
        for number, journal in enumerate(journals):
            order = people if (turn + number) % 2 else people[::-1]
            journal.take(rows(*(ended(who) for who in order)))
        await asyncio.gather(*(journal.flush() for journal in journals))
    assert await total(sql) == 10 * len(journals) * len(people)
    assert [journal.counts["failures"] for journal in journals] == [0, 0, 0, 0]


async def test_waiting_usage_is_bounded_and_dropped_usage_is_counted(relay: Relay, sql: Sql, clock: Clock) -> None:
    database = Database(relay.dsn, pool_size_max=1, statement_timeout_seconds=5.0)
    await database.open()
    await relay.cut()
    journal = UsageJournal(database, Usage(event_days=0), clock, settle_seconds=0.5)
    first = fakes.identity("first")
    journal.take(rows(ended(first)))
    for start in range(0, 100_200, 200):
        journal.take(rows(*(ended(fakes.identity(f"u_{number}")) for number in range(start, start + 200))))
    assert journal.dropped["requests"] == 201
    await relay.mend()
    await journal.flush()
    await database.close()
    assert await total(sql) == 100_000


async def test_waiting_events_are_bounded_without_affecting_sums(journal: UsageJournal, sql: Sql) -> None:
    who = fakes.identity()
    same = rows(*(ended(who) for _ in range(500)))
    told = 0
    while not journal.dropped["events"]:
        journal.take(same)
        told += len(same)
    assert journal.pending_events + journal.dropped["events"] == told
    await journal.flush()
    assert await total(sql) == told
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.usage_events") == told - journal.dropped["events"]


async def test_event_describes_one_request(journal: UsageJournal, sql: Sql, clock: Clock) -> None:
    clock.mono_seconds = 5_000.0
    began = datetime.fromtimestamp(clock.wall_seconds, UTC)
    one = ended(fakes.identity(), use=TokenUse(7, 0), is_estimated=True)
    other = ended(fakes.identity("u_43", is_test=True), was_sent=False, reason=Reason.RATE_LIMITED)
    other.policy = "user.rate"
    one.peer = TrustRule([]).forwarding("198.51.100.7", is_tls=False)
    other.peer = TrustRule([], recorded="network").forwarding("2001:db8::7", is_tls=False)
    journal.take(rows(one, other))
    await journal.flush()
    found = [dict(row) for row in await sql.fetch("SELECT * FROM keyproxy.usage_events ORDER BY id")]
    batch = found[0]["id"].rpartition(":")[0]
    assert [row.pop("id") for row in found] == [f"{batch}:1", f"{batch}:2"]
    assert abs((found[0].pop("time") - began).total_seconds()) < 0.002
    assert found[0] == {
        "recorded_on": datetime.now(UTC).date(), "request_id": one.request_id.decode(), "tenant_id": "acme",
        "user_id": "u_42", "key_id": "key_of_u_42", "mode": "live", "route": ROUTE, "method": "POST", "status": 200,
        "code": "ok", "tokens_in": 7, "tokens_out": 0, "estimated": True, "request_bytes": 10, "response_bytes": 20,
        "duration_seconds": 0.25, "policy": None, "model": "", "tokens_cached": 0, "tokens_cache_write": 0,
        "tokens_reasoning": 0, "cost_micros": 0, "actor_user_id": None, "agent_id": None, "agent_token_id": None,
        "client": "198.51.100.7",
    }  # fmt: skip
    assert (found[1]["client"], found[1]["policy"], found[1]["model"]) == ("2001:db8::/48", "user.rate", None)
    assert (found[1]["mode"], found[1]["code"], found[1]["tokens_in"]) == ("test", "rate_limited", None)
    assert found[1]["policy"] == "user.rate"


TOKEN = AgentToken("agt_0123456789abcdefghijAB", ("crawler", "planner"), 1)
DELEGATED = {
    (None, None, None): fakes.identity(),
    ("u_worker", None, None): dataclasses.replace(fakes.identity(), actor_user_id="u_worker"),
    (None, "crawler", TOKEN.token_id): dataclasses.replace(fakes.identity(), agent_token=TOKEN),
    ("u_worker", "crawler", TOKEN.token_id): dataclasses.replace(
        fakes.identity(), actor_user_id="u_worker", agent_token=TOKEN
    ),
}


async def test_events_have_the_actor_the_agent_and_its_token_and_daily_sums_are_by_principal_and_key(
    journal: UsageJournal, sql: Sql
) -> None:
    for identity in DELEGATED.values():
        metered = ended(identity, use=TokenUse(10, 5, cached=4))
        limited = ended(identity, was_sent=False, reason=Reason.QUOTA_EXHAUSTED)
        limited.policy = "token.requests_total"
        named = ended(identity)
        named.model = "o3"
        journal.take(rows(metered, limited, named, ended(identity)))
    await journal.flush()
    columns = (
        "actor_user_id, agent_id, agent_token_id, user_id, key_id, policy, model, tokens_in, tokens_cached, cost_micros"
    )
    found = [
        tuple(row) for row in await sql.fetch(f"SELECT {columns} FROM keyproxy.usage_events ORDER BY request_id::int")
    ]
    assert found == [
        (*names, "u_42", "key_of_u_42", *rest)
        for names in DELEGATED
        for rest in (
            (None, "", 10, 4, 0), ("token.requests_total", None, None, None, None), (None, "o3", None, None, None),
            (None, None, None, None, None),
        )
    ]  # fmt: skip
    sums = {row["model"]: row for row in await usage(sql)}
    assert set(sums) == {"", "o3"}
    assert (sums[""]["key_id"], sums[""]["requests"], sums[""]["refusals"], sums[""]["tokens_in"]) == (
        "key_of_u_42", 8, 4, 40,
    )  # fmt: skip
    assert sums["o3"]["requests"] == 4


async def test_identities_that_are_read_again_take_no_further_room_while_the_store_is_unavailable(
    journal: UsageJournal, sql: Sql
) -> None:
    requests = 120_000
    for _ in range(requests // 1_000):
        journal.take(rows(*(ended(fakes.identity(), was_sent=False) for _ in range(1_000))))
    assert journal.dropped["requests"] == 0
    sent = ended(fakes.identity())
    journal.take(rows(sent))
    await journal.flush()
    assert [(row["key_id"], row["requests"]) for row in await usage(sql)] == [("key_of_u_42", 1)]


async def test_refusals_by_different_limits_are_distinguished(journal: UsageJournal, sql: Sql) -> None:
    who = fakes.identity()
    policies = ["user.requests_per_day", "tenant.requests_per_month", "user.requests_per_day", ""]
    for policy in policies:
        one = ended(who, was_sent=False, reason=Reason.QUOTA_EXHAUSTED)
        one.policy = policy
        journal.take(rows(one))
    await journal.flush()
    found = await sql.fetch("SELECT policy FROM keyproxy.usage_events ORDER BY request_id::int")
    assert [row["policy"] for row in found] == [policy or None for policy in policies]


async def test_without_event_days_there_are_sums_and_no_events(database: Database, sql: Sql, clock: Clock) -> None:
    journal = UsageJournal(database, Usage(event_days=0), clock, settle_seconds=0.5)
    journal.take(rows(ended(fakes.identity())))
    await journal.flush()
    assert await total(sql) == 1
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.usage_event_batches") == 0


async def partitions(sql: Sql) -> set[str]:
    """The days that have a partition for events."""
    found = await sql.fetch(
        "SELECT c.relname FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid"
        " WHERE i.inhparent = 'keyproxy.usage_event_batches'::regclass"
    )
    return {row["relname"].rpartition("_")[2] for row in found}


async def make_partition(sql: Sql, day: date) -> None:
    """Create the partition of a past day."""
    await sql.execute(
        f"CREATE TABLE keyproxy.usage_event_batches_{day:%Y%m%d} PARTITION OF keyproxy.usage_event_batches"
        f" FOR VALUES FROM ('{day}') TO ('{day + timedelta(days=1)}')"
    )


async def test_partitions_are_created_ahead_and_dropped_after_the_retention(journal: UsageJournal, sql: Sql) -> None:
    today = datetime.now(UTC).date()
    kept, old = today - timedelta(days=7), today - timedelta(days=8)
    for day in (kept, old):
        await make_partition(sql, day)
    assert not await journal.tend()
    wanted = {today + timedelta(days=ahead) for ahead in (-7, 0, 1, 2)}
    assert await partitions(sql) == {f"{day:%Y%m%d}" for day in wanted}
    await sql.execute(f"DROP TABLE keyproxy.usage_event_batches_{kept:%Y%m%d}")


async def test_partition_that_is_being_read_is_dropped_the_next_time(
    journal: UsageJournal, database: Database, sql: Sql
) -> None:
    old = datetime.now(UTC).date() - timedelta(days=30)
    await make_partition(sql, old)
    async with sql.transaction():
        await sql.execute("SELECT count(*) FROM keyproxy.usage_event_batches")
        await journal.tend()
        journal.take(rows(ended(fakes.identity())))
        await journal.flush()
    assert f"{old:%Y%m%d}" in await partitions(sql)
    await journal.tend()
    assert f"{old:%Y%m%d}" not in await partitions(sql)
    assert await total(sql) == 1


async def test_expired_sums_and_windows_are_deleted_in_portions(journal: UsageJournal, sql: Sql) -> None:
    await sql.execute(
        "INSERT INTO keyproxy.usage SELECT current_date - 450 + d, 't', 'u', 'k', false, 'r', 1, 0, 0, 0, 0"
        " FROM generate_series(0, 100) AS d"
    )
    await sql.execute(
        "INSERT INTO keyproxy.windows (pool_kind, pool_id, is_test, measure, starts, spent, held)"
        " SELECT 'user', 'u', false, 'requests_per_day', extract(epoch FROM now())::int8 - days * 86400, 1, held"
        " FROM (VALUES (10, 0), (61, 0), (63, 0), (64, 5), (400, 0)) AS old (days, held)"
    )
    await sql.execute(
        "INSERT INTO keyproxy.windows (pool_kind, pool_id, is_test, measure, starts)"
        " VALUES ('user', 'u', false, 'concurrency', 0)"
    )
    while await journal.tend():
        pass
    assert await sql.fetchval("SELECT min(current_date - day) FROM keyproxy.usage") <= 400
    assert await sql.fetchval("SELECT max(current_date - day) FROM keyproxy.usage") == 400
    ages = await sql.fetch(
        "SELECT starts, ((extract(epoch FROM now()) - starts) / 86400)::int AS days FROM keyproxy.windows"
    )
    assert sorted(row["days"] for row in ages if row["starts"]) == [10, 61, 64]
    assert any(row["starts"] == 0 for row in ages)
