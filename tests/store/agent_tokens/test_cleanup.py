"""Tokens, their windows and signing keys are deleted a day after they ended; nothing else is."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from keyproxy.store.agent_tokens.cleanup import AgentTokenCleanup
from keyproxy.store.postgres.database import Database
from tests.store.harness import Sql, add_key, add_user, audit_rows, change_rows
from tests.store.token_minting import add_agent, add_token, token_id, tokens_of

#: The ages of tokens that expired a little more, and a little less, than a day ago: their lifetime is ten minutes.
_EXPIRED = "24 hours 11 minutes"
_RECENT = "24 hours 9 minutes"


@pytest.fixture
async def owned(sql: Sql) -> Sql:
    """`key_1` of `u_42`, and room for the windows of tokens."""
    await add_user(sql)
    await add_key(sql)
    await add_agent(sql)
    return sql


@pytest.fixture
def cleanup(database: Database) -> AgentTokenCleanup:
    return AgentTokenCleanup(database)


async def add_window(sql: Sql, number: int, *, held: int = 0) -> int:
    """Insert a window of a token."""
    window: int = await sql.fetchval(
        "INSERT INTO keyproxy.windows (pool_kind, pool_id, is_test, measure, starts, spent, held)"
        " VALUES ('token', $1, false, 'tokens_total', 0, 5, $2) RETURNING id", token_id(number), held,
    )  # fmt: skip
    return window


async def ids(sql: Sql, query: str) -> set[str]:
    """One column."""
    return {row[0] for row in await sql.fetch(query)}


async def test_token_and_its_windows_are_deleted_a_day_after_its_expiry(owned: Sql, cleanup: AgentTokenCleanup) -> None:
    await add_token(owned, 1, age=_EXPIRED)
    await add_token(owned, 2, parent=1, age=_EXPIRED)
    await add_token(owned, 3, age=_RECENT)
    await add_token(owned, 4)
    for number in range(1, 5):
        await add_window(owned, number)
    assert await cleanup.tend() is False
    expected = {token_id(3), token_id(4)}
    assert await ids(owned, "SELECT id FROM keyproxy.agent_tokens") == expected
    assert await ids(owned, "SELECT pool_id FROM keyproxy.windows") == expected
    assert await owned.fetchval("SELECT count(*) FROM keyproxy.agents") == 1


async def test_signing_key_is_deleted_a_day_after_its_end(owned: Sql, cleanup: AgentTokenCleanup) -> None:
    for name, age in (("a", "24 hours 1 minute"), ("b", "23 hours 59 minutes"), ("c", "-1 hour")):
        await owned.execute(
            "INSERT INTO keyproxy.signing_keys (kid, jwk, ends_at)"
            " VALUES (repeat($1, 43), '{}', now() - $2::text::interval)", name, age,
        )  # fmt: skip
    await cleanup.tend()
    assert await ids(owned, "SELECT left(kid, 1) FROM keyproxy.signing_keys") == {"b", "c"}


async def test_cleanup_works_in_portions(owned: Sql, cleanup: AgentTokenCleanup) -> None:
    for number in range(1, 6):
        await add_token(owned, number, age=_EXPIRED)
    assert [await cleanup.tend(2), await tokens_of(owned)] == [True, 3]
    assert [await cleanup.tend(2), await tokens_of(owned)] == [True, 1]
    assert [await cleanup.tend(2), await tokens_of(owned)] == [False, 0]


async def test_cleanup_is_neither_in_the_feed_nor_in_the_audit_log(owned: Sql, cleanup: AgentTokenCleanup) -> None:
    await add_token(owned, 1, age=_EXPIRED)
    before = await change_rows(owned), await audit_rows(owned)
    await cleanup.tend()
    assert await tokens_of(owned) == 0
    assert (await change_rows(owned), await audit_rows(owned)) == before
    await add_token(owned, 2)
    await owned.execute("DELETE FROM keyproxy.agent_tokens")
    assert await owned.fetchval("SELECT action FROM keyproxy.audit_log ORDER BY id DESC LIMIT 1") == "delete"


async def test_window_with_leases_stays_until_they_end(
    owned: Sql, cleanup: AgentTokenCleanup, database: Database
) -> None:
    await add_token(owned, 1, age=_EXPIRED)
    window = await add_window(owned, 1, held=3)
    await cleanup.tend()
    assert await owned.fetchval("SELECT count(*) FROM keyproxy.windows") == 1
    await database.fetch("forget_windows", 0, 100)
    assert await owned.fetchval("SELECT count(*) FROM keyproxy.windows") == 1
    await owned.execute("UPDATE keyproxy.windows SET held = 0 WHERE id = $1", window)
    await database.fetch("forget_windows", 0, 100)
    assert await owned.fetchval("SELECT count(*) FROM keyproxy.windows") == 0


async def test_windows_of_tokens_that_were_deleted_with_their_owner_are_deleted_and_those_of_others_stay(
    owned: Sql, database: Database
) -> None:
    await add_user(owned, "u_2")
    await add_key(owned, 2, "u_2")
    await add_token(owned, 1)
    await add_token(owned, 2, user="u_2", key="key_2")
    await add_token(owned, 3, age=_RECENT)
    for number in (1, 2, 3):
        await add_window(owned, number)
    await owned.execute("DELETE FROM keyproxy.users WHERE id = 'u_2'")
    await database.fetch("forget_windows", 0, 100)
    assert await ids(owned, "SELECT pool_id FROM keyproxy.windows") == {token_id(1), token_id(3)}


async def test_locked_tokens_are_skipped_and_concurrent_cleanups_do_not_wait_for_each_other(
    dsn: str, owned: Sql, cleanup: AgentTokenCleanup
) -> None:
    await add_token(owned, 1, age=_EXPIRED)
    await add_token(owned, 2, age=_EXPIRED)
    other: Sql = await asyncpg.connect(dsn)
    try:
        async with other.transaction():
            await other.execute("SELECT FROM keyproxy.agent_tokens WHERE id = $1 FOR UPDATE", token_id(1))
            async with asyncio.timeout(5):
                await asyncio.gather(*(cleanup.tend() for _ in range(3)))
            assert await ids(owned, "SELECT id FROM keyproxy.agent_tokens") == {token_id(1)}
    finally:
        await other.close()
    await cleanup.tend()
    assert await tokens_of(owned) == 0
