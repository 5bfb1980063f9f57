"""A proxy that calls the function itself cannot mint more than the parent may grant."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from keyproxy.store.postgres import roles
from keyproxy.store.postgres.database import Database
from tests.server import as_role, may_log_in
from tests.store.harness import Sql, add_key, add_user
from tests.store.token_minting import Minting, request, token_id, token_parent, tokens_of

_MINT = (
    "SELECT outcome FROM keyproxy.mint_agent_token("
    + ", ".join(
        f"{name} => ${place}::{kind}"
        for place, (name, kind) in enumerate(
            {
                "new_id": "text", "new_digest": "bytea", "key_id": "text", "token_id": "text", "for_user": "text",
                "new_agent": "text", "role": "text", "new_scopes": "text[]", "new_audience": "text",
                "new_token_budget": "bigint", "new_request_budget": "bigint", "expires_wall_seconds": "float8",
                "depth_max": "int", "tokens_max": "int", "is_operator": "boolean", "operator": "text",
            }.items(), 1,
        )
    )
    + ")"
)  # fmt: skip


@pytest.fixture
async def prefix(dsn: str, sql: Sql) -> AsyncIterator[str]:
    """A unique prefix of roles; `key_1` of `u_42` may mint jobs:write, within the ceiling of its tenant."""
    prefix = f"kp_{secrets.token_hex(4)}"
    await roles.create(dsn, prefix)
    for role in roles.names(prefix):
        await sql.execute(may_log_in(dsn, role))
    await add_user(sql)
    await add_user(sql, "u_9", "other")
    await add_key(sql)
    await sql.execute("UPDATE keyproxy.api_keys SET scopes = '{jobs:write,agents:mint,above:ceiling}'")
    await sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('most', '{jobs:write,agents:mint,other}')")
    await sql.execute("UPDATE keyproxy.tenants SET roles = '{most}'")
    yield prefix
    for role in roles.names(prefix):
        await sql.execute(f'DROP OWNED BY "{role}"')
        await sql.execute(f'DROP ROLE "{role}"')


@pytest.fixture
async def proxy(dsn: str, prefix: str) -> AsyncIterator[Sql]:
    """A connection of a proxy."""
    client: Sql = await asyncpg.connect(as_role(dsn, f"{prefix}_proxy"))
    yield client
    await client.close()


async def call(client: Sql, **changes: Any) -> str:
    """Call the function with valid arguments and these changes. Return the outcome. `expires_in`: seconds from now."""
    values: dict[str, Any] = {
        "new_id": token_id(1), "new_digest": secrets.token_bytes(32), "key_id": "key_1", "token_id": None,
        "for_user": None, "new_agent": "crawler", "role": None, "new_scopes": ["jobs:write"], "new_audience": "keyproxy",
        "new_token_budget": None, "new_request_budget": None, "expires_wall_seconds": time.time() + 300, "depth_max": 1,
        "tokens_max": 1000, "is_operator": False, "operator": "",
    }  # fmt: skip
    if "expires_in" in changes:
        changes["expires_wall_seconds"] = time.time() + changes.pop("expires_in")
    values.update(changes)
    outcome: str = await client.fetchval(_MINT, *values.values())
    return outcome


async def test_proxies_and_the_admin_side_mint(dsn: str, prefix: str) -> None:
    proxy, admin, *_ = roles.names(prefix)
    for role in (proxy, admin):
        database = Database(as_role(dsn, role), pool_size_max=1, statement_timeout_seconds=5.0)
        await database.open()
        assert (await Minting(database)(wish=request(agent=role.replace("_", "-")))).scopes == ("jobs:write",)
        assert (await database.fetch("tend_agent_tokens", 10))[0]["is_more"] is False
        await database.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"new_scopes": ["other"]}, {"new_scopes": ["above:ceiling"]}, {"new_scopes": ["jobs:write", "x"]},
        {"new_scopes": []}, {"new_scopes": None}, {"new_scopes": [None]},
        {"for_user": "u_42"}, {"for_user": "u_9"}, {"key_id": "key_2"}, {"key_id": None},
        {"token_id": token_id(9)}, {"role": "unknown"}, {"role": "unknown", "new_scopes": ["other"]},
        {"new_token_budget": -1}, {"new_token_budget": 10**15 + 1}, {"new_request_budget": -1},
        {"expires_in": 2000}, {"expires_in": -1},
        {"expires_wall_seconds": None}, {"depth_max": -1}, {"depth_max": None}, {"is_operator": None, "key_id": "key_2"},
        {"new_agent": None}, {"tokens_max": 0}, {"tokens_max": None},
    ],
)  # fmt: skip
async def test_call_beyond_the_authority_of_a_key_inserts_no_row(proxy: Sql, sql: Sql, changes: dict[str, Any]) -> None:
    try:
        assert await call(proxy, **changes) == ("full" if "tokens_max" in changes else "refused")
    except asyncpg.IntegrityConstraintViolationError:
        assert changes == {"new_agent": None}
    assert await tokens_of(sql) == 0
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.agents") == 0
    assert await call(proxy) == "minted"


@pytest.mark.parametrize(
    "changes",
    [
        {"new_scopes": ["agents:mint"]}, {"new_token_budget": 11}, {"new_request_budget": 21},
        {"expires_in": 800}, {"key_id": "key_2"}, {"for_user": "u_9"}, {"depth_max": 0},
    ],
)  # fmt: skip
async def test_call_beyond_the_authority_of_a_token_inserts_no_row(
    proxy: Sql, sql: Sql, database: Database, changes: dict[str, Any]
) -> None:
    wish = request(agent="a", scopes=("jobs:write", "agents:mint"), token_budget=10, request_budget=20, ttl_seconds=500)
    parent = token_parent(await Minting(database)(wish=wish))
    if "new_scopes" in changes:
        await sql.execute("UPDATE keyproxy.agents SET roles = '{jobs}'")
        await sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('jobs', '{jobs:write}')")
    assert await call(proxy, **{"token_id": parent.token_id, **changes}) == "refused"
    assert await tokens_of(sql) == 1


async def test_only_roles_that_may_insert_tokens_mint_as_operators(dsn: str, prefix: str, proxy: Sql, sql: Sql) -> None:
    await sql.execute("UPDATE keyproxy.api_keys SET scopes = '{jobs:write}'")
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="as an operator"):
        await call(proxy, is_operator=True)
    assert await call(proxy) == "refused"
    admin: Sql = await asyncpg.connect(as_role(dsn, f"{prefix}_admin"))
    assert await call(admin, is_operator=True) == "minted"
    await admin.close()


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_snapshot_of_an_earlier_moment_mints_nothing(proxy: Sql, sql: Sql, level: str) -> None:
    await proxy.execute(f"BEGIN ISOLATION LEVEL {level}")
    await proxy.fetchval("SELECT count(*) FROM keyproxy.users")
    await sql.execute("UPDATE keyproxy.users SET disabled_at = now()")
    with pytest.raises(asyncpg.PostgresError, match="read committed"):
        await call(proxy)
    await proxy.execute("ROLLBACK")
    assert await tokens_of(sql) == 0


async def test_objects_of_the_client_do_not_replace_those_of_the_function(proxy: Sql, sql: Sql) -> None:
    await sql.execute("UPDATE keyproxy.api_keys SET revoked_at = now()")
    await proxy.execute("CREATE TEMP TABLE api_keys (id text)")
    await proxy.execute("SET search_path = pg_temp, keyproxy, pg_catalog")
    assert await call(proxy) == "refused"


async def test_proxy_cannot_choose_the_actor_of_its_mint(proxy: Sql, sql: Sql) -> None:
    await proxy.execute("SET keyproxy.actor = 'cli:root'")
    assert await call(proxy, operator="cli:root") == "minted"
    assert await call(proxy, operator="cli:root", is_operator=None, new_id=token_id(2)) == "minted"
    rows = await sql.fetch("SELECT actor, db_role FROM keyproxy.audit_log WHERE entity LIKE 'agent%'")
    assert {row["actor"] for row in rows} == {"key:key_1"}
    assert all(row["db_role"].endswith("_proxy") for row in rows)


async def test_public_mints_and_deletes_nothing(sql: Sql) -> None:
    for function in ("mint_agent_token", "tend_agent_tokens"):
        acl = await sql.fetchval(
            "SELECT proacl::text FROM pg_proc WHERE proname = $1 AND pronamespace = 'keyproxy'::regnamespace", function
        )
        assert acl is not None
        assert "=X" not in acl.replace("keyproxy=X", "")


async def test_budgets_of_a_token_that_a_key_mints_are_0_to_10_to_the_15(proxy: Sql) -> None:
    assert await call(proxy, new_token_budget=10**15, new_request_budget=0) == "minted"
