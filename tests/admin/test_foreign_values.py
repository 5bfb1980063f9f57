"""Rows by other SQL clients: with any value that the columns accept, every reader works and every key can be revoked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest

from keyproxy.config.schema import Cache, Settings
from keyproxy.model import Identity, KeyDigest, Missing
from keyproxy.platform import clock
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.directory.directory import KeyFilter, Revocation
from keyproxy.store.directory.reminders import ReminderQueue
from keyproxy.store.identities.cache import FeedState, IdentityCache
from keyproxy.store.identities.last_used import LastUsed
from keyproxy.store.ledger.explain import Question
from keyproxy.store.postgres.database import Database
from keyproxy.store.usage.usage_queries import DIMENSIONS, UsageFilter
from keyproxy.store.usage.usage_service import UsageService
from tests.admin.conftest import Api

TIMES = {
    "infinity": "infinity",
    "-infinity": "-infinity",
    # JavaScript's largest date, and PostgreSQL's largest and smallest.
    "275760-09-13 00:00:00+00": "+275760-09-13T00:00:00Z",
    "294276-12-31 23:59:59.999999+00": "+294276-12-31T23:59:59Z",
    "4714-11-24 00:00:00+00 BC": "-004713-11-24T00:00:00Z",
    "0044-03-15 12:00:00+00 BC": "-000043-03-15T12:00:00Z",
    "0001-12-31 00:00:00+00 BC": "+000000-12-31T00:00:00Z",
    "0001-01-01 00:00:00+00": "0001-01-01T00:00:00Z",
    "9999-12-31 23:59:59.999999+00": "9999-12-31T23:59:59Z",
    "10000-01-01 00:00:00+00": "+010000-01-01T00:00:00Z",
}
#: Milliseconds mistaken for seconds.
MILLISECONDS = "to_timestamp(1800000000000)"

KEY_TIMES = ("created_at", "expires_at", "revoked_at", "last_used_at")

TEXTS = {
    "empty": "",
    "a line break": "a\r\nX-Keyproxy-User: root",
    "an escape sequence": "\x1b[2J\x07\x7f",
    "not ASCII": "Ünïcödé \u202e\u2028 \U0001f600",
    "quotes": "'\"\\%s{}",
    "long": "x" * 200,
    "formula": "=cmd()",
}


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """Any SQL client, with a tenant, a user and two keys."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "INSERT INTO keyproxy.tenants (id) VALUES ('acme');"
        "INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_1', 'acme');"
        "INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('key_odd', 'u_1', sha256('odd')),"
        " ('key_plain', 'u_1', sha256('plain'));"
    )
    yield connection
    await connection.close()


@pytest.mark.parametrize("column", KEY_TIMES)
@pytest.mark.parametrize("written", [*TIMES, MILLISECONDS])
async def test_a_key_with_any_time_is_listed_looked_up_and_revoked(
    api: Api, sql: asyncpg.Connection, column: str, written: str
) -> None:
    value = written if written == MILLISECONDS else f"'{written}'"
    await sql.execute(f"UPDATE keyproxy.api_keys SET {column} = {value} WHERE id = 'key_odd'")
    key = (await api.done("GET", "/v1/keys/key_odd"))[column]
    assert key == TIMES.get(written, "+059009-09-24T08:00:00Z")
    await _every_reader_goes_on(api)
    await _keys_work(api, expected=None if column in ("expires_at", "revoked_at") else Identity)
    assert (await api.done("POST", "/v1/keys/key_odd/revoke", {}))["state"] == "revoked"


@pytest.mark.parametrize(("table", "column"), [
    ("tenants", "created_at"), ("tenants", "disabled_at"), ("users", "created_at"), ("users", "disabled_at"),
    ("plans", "created_at"), ("admin_tokens", "created_at"), ("admin_tokens", "expires_at"),
    ("admin_tokens", "revoked_at"), ("admin_tokens", "last_used_at"), ("audit_log", "at"), ("reminders", "expires_at"),
    ("reminders", "created_at"), ("reminders", "next_at"), ("reminders", "sent_at"), ("reminders", "given_up_at"),
])  # fmt: skip
async def test_any_time_in_any_table_leaves_every_reader_going(
    api: Api, sql: asyncpg.Connection, table: str, column: str
) -> None:
    await sql.execute("INSERT INTO keyproxy.plans (id) VALUES ('p')")
    await api.token("keys:read")
    await sql.execute("UPDATE keyproxy.api_keys SET expires_at = '275760-09-13' WHERE id = 'key_odd'")
    await sql.execute(
        "INSERT INTO keyproxy.reminders (id, key_id, expires_at, before_days)"
        f" VALUES ('rem_{'0' * 32}', 'key_odd', '275760-09-13', 3)"
    )
    await sql.execute("SET session_replication_role = replica")  # the audit log refuses changes otherwise
    for written in TIMES:
        await sql.execute(f"UPDATE keyproxy.{table} SET {column} = $1::text::timestamptz", written)
        await _every_reader_goes_on(api)
    await sql.execute(f"UPDATE keyproxy.{table} SET {column} = {MILLISECONDS}")
    await _every_reader_goes_on(api)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
async def test_any_text_that_a_column_accepts_is_read_and_reaches_no_header(
    api: Api, sql: asyncpg.Connection, text: str
) -> None:
    await sql.execute(
        "UPDATE keyproxy.api_keys SET name = $1, hint = left($1, 40), revoked_at = now(), revoke_reason = $1"
        " WHERE id = 'key_odd'",
        text,
    )
    await sql.execute("UPDATE keyproxy.tenants SET name = $1", text)
    await sql.execute(
        "INSERT INTO keyproxy.audit_log (actor, origin, action, entity, entity_id, before, after)"
        " VALUES ($1, $1, $1, $1, $1, to_jsonb($1::text), '[1, null]')",
        text,
    )
    assert (await api.done("GET", "/v1/keys/key_odd"))["name"] == text
    await _every_reader_goes_on(api)
    await _keys_work(api, expected=None)


@pytest.mark.parametrize("text", ["", "a b", "a\r\nb", "ü", "x" * 129, "-a", "a\tb", "a\x7f"])
async def test_ids_and_scopes_that_could_not_stand_in_a_header_are_refused_by_the_tables(
    sql: asyncpg.Connection, text: str
) -> None:
    for statement in (
        "INSERT INTO keyproxy.tenants (id) VALUES ($1)",
        "INSERT INTO keyproxy.users (id, tenant_id) VALUES ($1, 'acme')",
        "INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ($1, 'u_1', sha256('x'))",
        "INSERT INTO keyproxy.plans (id) VALUES ($1)",
        "UPDATE keyproxy.api_keys SET lineage = $1",
        "UPDATE keyproxy.api_keys SET scopes = ARRAY[$1]",
    ):
        with pytest.raises(asyncpg.CheckViolationError):
            await sql.execute(statement, text)


@pytest.mark.parametrize("scopes", ["'{NULL}'", "'{{a,b},{c,d}}'", "'{a,NULL}'", "'[5:6]={a,b}'", "'{}'", "'{a,a}'"])
async def test_any_array_of_scopes_that_the_column_accepts_is_read(
    api: Api, sql: asyncpg.Connection, scopes: str
) -> None:
    with contextlib.suppress(asyncpg.CheckViolationError, asyncpg.FeatureNotSupportedError):
        await sql.execute(f"UPDATE keyproxy.api_keys SET scopes = {scopes} WHERE id = 'key_odd'")
    await _every_reader_goes_on(api)
    await _keys_work(api, expected=Identity)


@pytest.mark.parametrize(
    "limits",
    [
        '{"requests_per_day": 1e400}', '{"rate": -1}', '{"x": 1}', '{"burst": 5}', '{"requests_per_day": 0.5}',
        '{"requests_per_day": "5"}', '{"requests_per_day": [[]]}', '{"rate": {"a": 1}}',
        '{"requests_per_day": 99999999999999999999999}', '{"rate": ' + "9" * 400 + "}",
    ],
)  # fmt: skip
async def test_a_plan_that_cannot_be_read_refuses_its_keys_alone_and_the_log_names_them(
    api: Api, sql: asyncpg.Connection, limits: str, caplog: pytest.LogCaptureFixture
) -> None:
    # A plan from before its table had the check.
    with pytest.raises(asyncpg.CheckViolationError):
        await sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('odd', $1::text::jsonb)", limits)
    check = await sql.fetchval(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'plans_limits_known'"
    )
    await sql.execute("ALTER TABLE keyproxy.plans DROP CONSTRAINT plans_limits_known")
    try:
        await sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('odd', $1::text::jsonb)", limits)
        await sql.execute("UPDATE keyproxy.api_keys SET plan_id = 'odd' WHERE id = 'key_odd'")
    finally:
        not_valid = "" if "NOT VALID" in check else " NOT VALID"
        await sql.execute(f"ALTER TABLE keyproxy.plans ADD CONSTRAINT plans_limits_known {check}{not_valid}")
    await _every_reader_goes_on(api)
    await _keys_work(api, expected=Reason.INTERNAL_ERROR)
    assert any("key_odd" in record.getMessage() for record in caplog.records)
    refused = await api.call("GET", "/v1/keys/key_odd/explain?method=GET&path=/")
    assert refused.status in (400, 422)
    assert (await api.done("POST", "/v1/keys/key_odd/revoke", {}))["state"] == "revoked"


@pytest.mark.parametrize(
    "day", ["infinity", "-infinity", "275760-09-13", "5874897-12-31", "0044-03-15 BC", "2026-01-01"]
)
@pytest.mark.parametrize("count", [0, -1, 2**63 - 1, -(2**63)])
async def test_any_sum_of_usage_is_read(api: Api, sql: asyncpg.Connection, day: str, count: int) -> None:
    for route in ("", "a\nb", "GET /" + "x" * 5_000):
        await sql.execute(
            "INSERT INTO keyproxy.usage VALUES ($1::text::date, $2, $2, $2, true, $2, $3, $3, $3, $3, $3)",
            day,
            route,
            count,
        )
    await _every_reader_goes_on(api)
    usage = UsageService(api.database, Settings(), clock.now)
    (total,) = await usage.sums(UsageFilter(), (), 10)
    assert total["requests"] == 3 * count
    assert len([row async for row in usage.all_sums(UsageFilter())]) == 3


@pytest.mark.parametrize("events", ["null", "[]", "{}", "[1]", "[[]]", '[[1e300, "", [], 0, 0, 0, 0, 0, false]]', '"x"',
                                    '["\\ud800"]', '[[0, "\\ud800", [1,2,3,4,5,6,7,8], 0, 0, 0, 0, 0, false]]',
                                    '[["a", null, [1,2,3,4,5,6,7,8], 0, 0, "x", 0, 0, false]]'])  # fmt: skip
async def test_invalid_usage_events_are_skipped(api: Api, sql: asyncpg.Connection, events: str) -> None:
    await sql.execute("SELECT keyproxy.make_event_days()")
    good = '[1800000000000, "r", ["acme", "u_1", "key_1", "live", "GET /", "GET", 200, ""], 1, 1, 1, null, null, false]'
    for batch, content in enumerate((events, f"[{good}]"), start=1):
        await sql.execute(
            "INSERT INTO keyproxy.usage_event_batches (day, process, batch, events)"
            " VALUES ((now() AT TIME ZONE 'UTC')::date, '0123456789abcdef', $1, $2::text::json)",
            batch,
            content,
        )
    await _every_reader_goes_on(api)
    usage = UsageService(api.database, Settings(), clock.now)
    assert [event["request_id"] async for event in usage.events(UsageFilter())] == ["r"]


async def _every_reader_goes_on(api: Api) -> None:
    """Read everything through the directory, the admin API, the exports and the reminders."""
    directory = api.directory
    ids = {key["id"] for key in await directory.keys.list_by_id("", 100)}
    for order in ("created", "used", "expires"):
        listed, cursor = set(), None
        while True:
            page = await directory.keys.list_by_time(order, cursor, 1)
            listed |= {key["id"] for key in page.items}
            if page.next is None:
                break
            cursor = page.next
        # A row before every other time cannot follow the start of a list.
        assert listed == ids, order
    for wanted in (
        KeyFilter(older_than=timedelta(days=1)), KeyFilter(unused_for=timedelta(days=36_525)),
        KeyFilter(expires_within=timedelta(days=36_525)), KeyFilter(state="active"), KeyFilter(state="expired"),
    ):  # fmt: skip
        await directory.keys.list_by_id("", 100, wanted)
    await directory.key_batches.count_to_revoke(Revocation(unused_for=timedelta(days=1)))
    for key in ids:
        await directory.keys.get(key)
        await directory.leaked_keys.report_digest(b"\0" * 32, "")
    for path in (
        "/v1/tenants", "/v1/users", "/v1/keys", "/v1/plans", "/v1/audit", "/v1/token", "/v1/audit/export",
        "/v1/usage/export", "/v1/usage/events", "/v1/users/u_1/limits", "/v1/tenants/acme", "/v1/users/u_1",
        f"/v1/usage?by={quote(','.join(DIMENSIONS))}",
    ):  # fmt: skip
        reply = await api.call("GET", path)
        assert reply.status == 200, (path, reply.body)
    await api.tokens.tokens("", 100)
    assert (await api.call("GET", "/metrics")).status == 200
    reminders = ReminderQueue(api.database)
    await reminders.write((1, 3, 14))
    await reminders.waiting(100)
    await reminders.due((1, 3, 14), 100)
    await reminders.claim(100, timedelta(seconds=0))


async def _keys_work(api: Api, *, expected: Any) -> None:
    """One lookup for both keys: the plain one is served regardless of the other's row."""
    database: Database = api.database
    feed = FeedState()
    cache = IdentityCache(
        database,
        Cache(),
        feed=feed,
        last_used=LastUsed(database),
        header_prefix="X-Keyproxy-",
        look_ups_max=1,
        now=clock.now,
    )
    digests = [KeyDigest(row["digest"]) for row in await _digests(database)]
    found = await asyncio.gather(*(_resolved(cache, digest) for digest in digests))
    await cache.close()
    assert isinstance(found[1], Identity)
    if isinstance(expected, Reason):
        assert found[0] is expected
    else:
        assert isinstance(found[0], expected or Identity)
    usage = UsageService(database, Settings(), clock.now)
    if not isinstance(expected, Reason):
        await usage.explained("key_odd", Question("GET", "/"))


async def _digests(database: Database) -> list[Any]:
    return [(await database.fetch("digest_of_key", key))[0] for key in ("key_odd", "key_plain")]


async def _resolved(cache: IdentityCache, digest: KeyDigest) -> Identity | Reason:
    for _ in range(4):
        try:
            return cache.known(digest, clock.now())
        except Missing as missing:
            try:
                await missing.fetch_missing()
            except Refusal as refusal:
                return refusal.reason
        except Refusal as refusal:
            return refusal.reason
    raise AssertionError("no decision")
