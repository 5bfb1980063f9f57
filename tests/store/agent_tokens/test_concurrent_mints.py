"""Mints at the same time as each other, and as changes and deletions of what a token depends on."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator

import asyncpg
import pytest

from keyproxy.auth.minting import MintedToken
from keyproxy.reasons import Refusal
from keyproxy.store.postgres.database import Database, JoinedTransaction
from tests.store.harness import Sql, add_key, add_keys, add_user, until_blocked
from tests.store.token_minting import Minting, key_parent, request, rules, token_parent, tokens_of

_SCOPES = ("jobs:write", "agents:mint")


@pytest.fixture
async def wide(dsn: str, sql: Sql) -> AsyncIterator[Database]:
    """The store with many connections; `key_1` and `key_2` of `u_42` may mint, and act for `u_2`."""
    for user in ("u_42", "u_2"):
        await add_user(sql, user)
    await add_keys(sql, [1, 2])
    await sql.execute("UPDATE keyproxy.api_keys SET scopes = $1, acts_for = 'tenant'", list(_SCOPES))
    wide = Database(dsn, pool_size_max=12, statement_timeout_seconds=20.0)
    await wide.open()
    yield wide
    await wide.close()


async def outcome_of(minting: asyncio.Task[MintedToken]) -> str:
    """How a mint ended."""
    try:
        await minting
    except Refusal as refusal:
        return refusal.reason.code
    return "minted"


async def test_key_has_exactly_the_maximum_of_live_tokens_after_concurrent_mints(wide: Database, sql: Sql) -> None:
    mint = Minting(wide)
    mint.rules = rules(tokens_max=17)
    mints = [asyncio.create_task(mint(wish=request(agent=f"a{number % 5}"))) for number in range(60)]
    counts = collections.Counter([await outcome_of(one) for one in mints])
    assert counts == {"minted": 17, "quota_exhausted": 43}
    assert await tokens_of(sql) == 17


async def test_children_of_many_tokens_and_the_key_itself_share_one_exact_maximum(wide: Database, sql: Sql) -> None:
    mint = Minting(wide)
    parents = [await mint(wish=request(agent=f"p{number}", scopes=_SCOPES)) for number in range(6)]
    mint.rules = rules(tokens_max=20)
    sources = [key_parent(), key_parent(user="u_2"), *(token_parent(parent) for parent in parents)]
    mints = [asyncio.create_task(mint(sources[number % 8])) for number in range(56)]
    counts = collections.Counter([await outcome_of(one) for one in mints])
    assert counts == {"minted": 14, "quota_exhausted": 42}
    assert await tokens_of(sql) == 20


async def test_user_has_exactly_1000_agents_after_concurrent_first_uses_through_many_keys(
    wide: Database, sql: Sql
) -> None:
    await sql.execute(
        "INSERT INTO keyproxy.agents (user_id, id) SELECT 'u_2', 'a' || n FROM generate_series(1, 993) AS n"
    )
    mint = Minting(wide)
    wishes = [(key_parent(f"key_{number % 2 + 1}", "u_2"), request(agent=f"new_{number // 2}")) for number in range(40)]
    mints = [asyncio.create_task(mint(*wish)) for wish in wishes]
    counts = collections.Counter([await outcome_of(one) for one in mints])
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.agents WHERE user_id = 'u_2'") == 1000
    assert set(counts) == {"minted", "delegation_refused"}
    assert counts["minted"] >= 7


async def test_agent_is_created_once_by_concurrent_first_uses(wide: Database, sql: Sql) -> None:
    mint = Minting(wide)
    await asyncio.gather(*(mint(key_parent(f"key_{number % 2 + 1}")) for number in range(20)))
    rows = await sql.fetch("SELECT count(*) AS n FROM keyproxy.audit_log WHERE entity = 'agent'")
    assert rows[0]["n"] == 1
    assert await tokens_of(sql) == 20


#: A change by another client that has not committed while a token is minted; whether it ends the parent.
_OPEN_CHANGES = {
    "UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'": True,
    "UPDATE keyproxy.api_keys SET acts_for = 'none' WHERE id = 'key_1'": True,
    "UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_2'": True,
    "UPDATE keyproxy.agents SET disabled_at = now() WHERE id = 'crawler'": True,
    "UPDATE keyproxy.agents SET disabled_at = now() WHERE id = 'child'": True,
    "UPDATE keyproxy.agent_tokens SET revoked_at = now()": True,
    "DELETE FROM keyproxy.agent_tokens": True,
    "DELETE FROM keyproxy.agents WHERE id = 'crawler'": True,
    "DELETE FROM keyproxy.api_keys WHERE id = 'key_1'": True,
    "DELETE FROM keyproxy.users WHERE id = 'u_2'": True,
    "DELETE FROM keyproxy.tenants": True,
    "UPDATE keyproxy.api_keys SET name = 'x' WHERE id = 'key_1'": False,
}


@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("statement", _OPEN_CHANGES)
async def test_mint_waits_for_a_change_of_its_chain_and_then_follows_it(
    wide: Database, dsn: str, sql: Sql, statement: str, ending: str
) -> None:
    mint = Minting(wide)
    parent = await mint(key_parent(user="u_2"), request(scopes=_SCOPES))
    await mint(key_parent("key_2", user="u_2"), request(agent="child"))
    other: Sql = await asyncpg.connect(dsn)
    try:
        await other.execute("BEGIN")
        await other.execute(statement)
        minting = asyncio.create_task(mint(token_parent(parent), request(agent="child")))
        await until_blocked(sql, "mint_agent_token")
        await other.execute(ending)
        ends = _OPEN_CHANGES[statement] and ending == "COMMIT"
        assert await outcome_of(minting) == ("delegation_refused" if ends else "minted")
    finally:
        await other.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'",
        "UPDATE keyproxy.agents SET disabled_at = now() WHERE id = 'crawler'",
        "UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE id = $1",
    ],
)
async def test_change_that_waited_for_a_mint_is_noted_for_the_new_token_too(
    wide: Database, dsn: str, sql: Sql, statement: str
) -> None:
    parent = await Minting(wide)(wish=request(scopes=_SCOPES))
    other: Sql = await asyncpg.connect(dsn)
    try:
        async with wide.transaction() as transaction:
            child = await Minting(JoinedTransaction(transaction))(token_parent(parent), request(agent="child"))
            changing = asyncio.create_task(other.execute(statement.replace("$1", f"'{parent.id}'")))
            await until_blocked(sql, statement.split(" SET")[0])
            await transaction.fetch("forget_changes", await sql.fetchval("SELECT pg_current_snapshot()::text"), 100)
        await changing
        xid = await sql.fetchval("SELECT max(xid::text::bigint) FROM keyproxy.changes")
        noted = await sql.fetch(
            "SELECT subject FROM keyproxy.changes WHERE kind = 'key' AND xid::text::bigint = $1", xid
        )
        assert child.token.digest().hex() in {row["subject"] for row in noted}
    finally:
        await other.close()


async def test_deletions_of_owners_and_mints_do_not_deadlock(wide: Database, dsn: str, sql: Sql) -> None:
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = await sql.fetchval(deadlocks)
    mint = Minting(wide)
    mint.rules = rules(tokens_max=10_000)
    is_over, counts = False, collections.Counter[str]()

    async def minting(key: str, agent: str) -> None:
        while not is_over:
            wish = request(agent=agent, scopes=_SCOPES)
            counts[await outcome_of(asyncio.create_task(mint(key_parent(key, "u_2"), wish)))] += 1

    async def from_tokens(agent: str) -> None:
        while not is_over:
            try:
                parent = await mint(key_parent(user="u_2"), request(agent="parent", scopes=_SCOPES))
                await mint(token_parent(parent), request(agent=agent))
            except Refusal as refusal:
                counts[refusal.reason.code] += 1

    tasks = [asyncio.create_task(minting(f"key_{n % 2 + 1}", f"a{n}")) for n in range(4)]
    tasks += [asyncio.create_task(from_tokens(f"b{n}")) for n in range(3)]
    other: Sql = await asyncpg.connect(dsn)
    try:
        for number in range(60):
            match number % 5:
                case 0:
                    await other.execute("DELETE FROM keyproxy.users WHERE id = 'u_2'")
                    await other.execute("INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_2', 'acme')")
                case 1:
                    await other.execute("DELETE FROM keyproxy.agents WHERE id = 'parent'")
                case 2:
                    await other.execute("UPDATE keyproxy.agents SET plan_id = NULL, roles = NULL WHERE id = 'parent'")
                case 3:
                    await other.execute("DELETE FROM keyproxy.api_keys WHERE id = 'key_2'")
                    await add_key(other, 2)
                    await other.execute("UPDATE keyproxy.api_keys SET scopes = $1, acts_for = 'tenant'", list(_SCOPES))
                case _:
                    await other.execute("DELETE FROM keyproxy.tenants")
                    for user in ("u_42", "u_2"):
                        await add_user(other, user)
                    await add_keys(other, [1, 2])
                    await other.execute("UPDATE keyproxy.api_keys SET scopes = $1, acts_for = 'tenant'", list(_SCOPES))
            await asyncio.sleep(0.02)
    finally:
        is_over = True
        await asyncio.gather(*tasks)
        await other.close()
    assert counts["minted"] > 20
    # A mint that waits in a circle gives way before the server detects it: STORE_UNAVAILABLE.
    assert set(counts) <= {"minted", "delegation_refused"}
    orphans = await sql.fetchval(
        "SELECT count(*) FROM keyproxy.agent_tokens AS t LEFT JOIN keyproxy.api_keys AS k ON k.id = t.root_key_id"
        " LEFT JOIN keyproxy.agents AS a ON a.user_id = t.user_id AND a.id = t.agent_id"
        " WHERE k.id IS NULL OR a.id IS NULL"
    )
    assert orphans == 0
    await sql.execute("SELECT pg_stat_clear_snapshot()")
    await asyncio.sleep(1.2)  # statistics are reported about once a second
    assert await sql.fetchval(deadlocks) == before
