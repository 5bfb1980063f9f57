"""The cleanup of OAuth deletes what has ended, exactly at its bound, and nothing that is in use."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.oauth.client import row_id
from keyproxy.store.oauth.cleanup import OAuthCleanup
from tests.store.harness import PlainDatabase, Sql, add_user, change_rows
from tests.store.oauth_rows import (
    CLIENT,
    add_access_token,
    add_client,
    add_code,
    add_grant,
    add_refresh_token,
    add_session,
    grant_id,
    session_id,
)

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
_AT = "'2026-11-26 12:00:00Z'::timestamptz"
_LATER = f"{_AT} + interval '1 microsecond'"
_LONG = f"{_AT} + interval '60 days'"

TABLES = (
    "oauth_clients", "oauth_grants", "oauth_sessions", "oauth_codes", "oauth_refresh_tokens", "oauth_access_tokens",
    "oauth_assertions",
)  # fmt: skip


def cleanup(sql: Sql, *, ended: list[int] | None = None) -> OAuthCleanup:
    """A cleanup at noon."""
    return OAuthCleanup(
        PlainDatabase(sql),  # type: ignore[arg-type]
        OAuthSettings(grant_days=90),
        sessions_expired=([] if ended is None else ended).append,
        now=lambda: NOW,
    )


async def ids(sql: Sql, table: str, column: str = "id") -> list[Any]:
    """The primary keys of a table."""
    return [row[0] for row in await sql.fetch(f"SELECT {column} FROM keyproxy.{table} ORDER BY 1")]


async def counts(sql: Sql) -> dict[str, int]:
    """The number of rows of each table."""
    return {table: await sql.fetchval(f"SELECT count(*) FROM keyproxy.{table}") for table in TABLES}


@pytest.fixture
async def lasting(sql: Sql) -> Sql:
    """A session that lasts, of a grant of today."""
    await add_user(sql)
    await add_session(sql, expires=_LONG)
    return sql


async def test_codes_are_deleted_ten_minutes_after_their_expiry(lasting: Sql) -> None:
    await add_code(lasting, 1, expires=f"{_AT} - interval '10 minutes'")
    kept = await add_code(lasting, 2, expires=f"{_LATER} - interval '10 minutes'")
    assert await cleanup(lasting).tend() is False
    assert await ids(lasting, "oauth_codes", "digest") == [kept]


async def test_tokens_and_assertions_are_deleted_at_their_expiry(lasting: Sql) -> None:
    await add_access_token(lasting, 1, expires=_AT)
    await add_refresh_token(lasting, 1, expires=_AT)
    kept = await add_access_token(lasting, 2, expires=_LATER), await add_refresh_token(lasting, 2, expires=_LATER)
    await lasting.execute(f"INSERT INTO keyproxy.oauth_assertions VALUES (sha256('a'), {_AT}), (sha256('b'), {_LATER})")
    await cleanup(lasting).tend()
    assert await ids(lasting, "oauth_access_tokens", "digest") == [kept[0].digest()]
    assert await ids(lasting, "oauth_refresh_tokens", "digest") == [kept[1]]
    assert await ids(lasting, "oauth_assertions", "digest") == [await lasting.fetchval("SELECT sha256('b')")]


async def test_sessions_are_deleted_at_their_expiry_with_their_tokens_and_counted(lasting: Sql) -> None:
    await add_session(lasting, 2, expires=_AT)
    await add_refresh_token(lasting, 1, session=2, expires=_LONG)
    await add_session(lasting, 3, expires=_LATER)
    ended: list[int] = []
    await cleanup(lasting, ended=ended).tend()
    assert (await ids(lasting, "oauth_sessions"), ended) == ([session_id(1), session_id(3)], [1])
    assert await ids(lasting, "oauth_refresh_tokens", "digest") == []
    await cleanup(lasting, ended=ended).tend()
    assert ended == [1]


async def test_the_last_64_refresh_tokens_of_each_session_are_kept(lasting: Sql) -> None:
    await add_session(lasting, 2, expires=_LONG)
    made = {
        session: [
            await add_refresh_token(
                lasting, number, session=session, issued=f"{_AT} - {number} * interval '1 minute'", expires=_LONG
            )
            for number in range(count)
        ]
        for session, count in ((1, 64), (2, 66))
    }
    one = cleanup(lasting)
    assert await one.tend(1) is True
    assert await one.tend(1) is True
    assert await one.tend(1) is False
    assert await ids(lasting, "oauth_refresh_tokens", "digest") == sorted([*made[1], *made[2][:64]])


async def test_grants_without_a_session_are_deleted_after_grant_days_except_those_of_services(lasting: Sql) -> None:
    old = f"{_AT} - interval '90 days'"
    for number, user in enumerate(["u_2", "u_3", "u_4", "u_5", "u_6"], 2):
        await add_user(lasting, user)
        granted = f"{_LATER} - interval '90 days'" if number == 3 else old
        await add_grant(lasting, number, user=user, granted=granted, is_service=number == 4)
    await add_session(lasting, 2, grant=5, expires=_LONG)
    await add_code(lasting, 1, grant=6, expires=_LONG)
    await cleanup(lasting).tend()
    assert await ids(lasting, "oauth_grants") == [grant_id(number) for number in (1, 3, 4, 5, 6)]


async def test_clients_without_a_grant_are_deleted_unless_an_operator_has_entered_or_disabled_them(
    lasting: Sql,
) -> None:
    kinds = ("value", "document", "listed", "registered")
    for kind in kinds:
        await add_client(lasting, f"{kind} 1", kind)
        await add_client(lasting, f"{kind} 2", kind)
    await lasting.execute("UPDATE keyproxy.oauth_clients SET disabled_at = now() WHERE client_id LIKE '% 2'")
    await cleanup(lasting).tend()
    kept = [CLIENT, row_id("registered 1"), *[row_id(f"{kind} 2") for kind in kinds]]
    assert await ids(lasting, "oauth_clients") == sorted(kept)


async def test_each_table_loses_at_most_one_portion_per_call_and_all_of_it_in_the_end(lasting: Sql) -> None:
    for number in range(2, 5):
        await add_user(lasting, f"u_{number}")
        await add_session(lasting, number, expires=_AT)
        await add_access_token(lasting, number, expires=_AT)
        await add_code(lasting, number, expires=f"{_AT} - interval '1 hour'")
        await add_client(lasting, f"https://{number}.example")
    one = cleanup(lasting)
    before = await counts(lasting)
    for round_ in range(1, 4):
        assert await one.tend(1) is True
        now = await counts(lasting)
        assert {table: before[table] - now[table] for table in TABLES if before[table] != now[table]} == {
            "oauth_clients": round_, "oauth_sessions": round_, "oauth_access_tokens": round_, "oauth_codes": round_,
        }  # fmt: skip
    assert await one.tend(1) is False


async def test_unused_grants_and_clients_are_found_however_many_rows_are_in_use(lasting: Sql) -> None:
    for number in range(2, 24):
        await add_user(lasting, f"u_{number}")
        await add_grant(lasting, number, user=f"u_{number}", client_id=f"https://{number}.example", granted=_AT)
        await add_session(lasting, number, grant=number, expires=_LONG)
    await add_grant(lasting, 99, user="u_2", granted=f"{_AT} - interval '91 days'")
    await add_client(lasting, "https://unused.example")
    one = cleanup(lasting)
    for _ in range(3):
        await one.tend(1)
    assert len(await ids(lasting, "oauth_grants")) == len(await ids(lasting, "oauth_clients")) == 23


async def test_cleanup_is_in_the_audit_log_and_not_in_the_change_feed(lasting: Sql) -> None:
    await add_session(lasting, 2, expires="now() - interval '1 second'")
    await add_access_token(lasting, 2, session=2, expires="now() - interval '1 second'")
    await add_client(lasting, "https://unused.example")
    await lasting.execute("DELETE FROM keyproxy.changes")
    await OAuthCleanup(PlainDatabase(lasting), OAuthSettings()).tend()  # type: ignore[arg-type]
    rows = await lasting.fetch(
        "SELECT actor, entity, entity_id, tenant_id FROM keyproxy.audit_log WHERE action = 'delete'"
    )
    assert sorted(map(tuple, rows)) == [
        ("oauth:gc", "oauth_client", row_id("https://unused.example"), None),
        ("oauth:gc", "oauth_session", session_id(2), "acme"),
    ]
    assert await change_rows(lasting) == 0
    assert await lasting.fetchval("SELECT keyproxy.actor()") != "oauth:gc"


async def test_consent_that_runs_at_the_same_time_keeps_its_client_and_its_grant(lasting: Sql, dsn: str) -> None:
    await add_user(lasting, "u_2")
    await add_client(lasting, "https://unused.example")
    await add_grant(lasting, 2, user="u_2", granted=f"{_AT} - interval '91 days'")
    consent: Sql = await asyncpg.connect(dsn)
    transaction = consent.transaction()
    await transaction.start()
    await consent.execute("SELECT FROM keyproxy.oauth_clients WHERE client_id = 'https://unused.example' FOR SHARE")
    await consent.execute("UPDATE keyproxy.oauth_grants SET granted_at = now() WHERE id = $1", grant_id(2))
    assert await asyncio.wait_for(cleanup(lasting).tend(), 2) is False
    await transaction.commit()
    await consent.close()
    assert await ids(lasting, "oauth_grants") == [grant_id(1), grant_id(2)]
    assert len(await ids(lasting, "oauth_clients")) == 2


async def test_one_process_cleans_up_at_a_time(lasting: Sql, dsn: str) -> None:
    await add_session(lasting, 2, expires=_AT)
    other: Sql = await asyncpg.connect(dsn)
    async with other.transaction():
        await other.execute("SELECT pg_advisory_xact_lock(hashtextextended('keyproxy.tend_oauth', 0))")
        assert await cleanup(lasting).tend() is False
        assert len(await ids(lasting, "oauth_sessions")) == 2
    await other.close()
    await cleanup(lasting).tend()
    assert len(await ids(lasting, "oauth_sessions")) == 1
