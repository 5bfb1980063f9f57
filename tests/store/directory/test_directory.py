"""Changes are idempotent, atomic and attributed to an actor; secrets appear only in the return value."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from keyproxy.auth.api_key import KeyFormat, SecretKey
from keyproxy.model import Identity
from keyproxy.reasons import Reason
from keyproxy.store.directory.directory import Actor, Directory, DirectoryError, Invalid, KeyFilter, KeyWish
from keyproxy.store.postgres.database import Database, StoreConflict, StoreUnavailable
from tests.store.harness import Relay, Rig, Sql, audit_rows, until_blocked

FORMAT = KeyFormat()


@pytest.fixture
async def directory(database: Database) -> Directory:
    """The directory, and one tenant."""
    directory = Directory(database, FORMAT, Actor("ann", "desk"))
    await directory.tenants.create("acme", "Acme Inc.")
    return directory


async def count(sql: Sql, table: str) -> int:
    """How many rows a table has."""
    number: int = await sql.fetchval(f"SELECT count(*) FROM keyproxy.{table}")
    return number


# -- provisioning is idempotent


async def test_creating_a_tenant_again_returns_it_unchanged(directory: Directory, sql: Sql) -> None:
    again = await directory.tenants.create("acme", "Another name")
    assert (again["created"], again["name"], again["users"]) == (False, "Acme Inc.", 0)
    fresh = await directory.tenants.create("other", "")
    assert (fresh["created"], fresh["id"], fresh["disabled_at"]) == (True, "other", None)
    assert await count(sql, "tenants") == 2


async def test_new_user_gets_a_first_key_and_creating_it_again_adds_none(directory: Directory, sql: Sql) -> None:
    made = await directory.users.create("u_42", "acme", KeyWish(scopes=("jobs:write",)))
    assert (made["created"], made["id"], made["tenant"]) == (True, "u_42", "acme")
    assert made["key"]["secret"].startswith("kp_live_")
    assert (made["key"]["scopes"], made["key"]["is_test"]) == (["jobs:write"], False)
    again = await directory.users.create("u_42", "acme", KeyWish())
    assert (again["created"], again["key"], again["keys"]) == (False, None, 1)
    assert await count(sql, "api_keys") == 1


async def test_user_can_be_created_without_a_key(directory: Directory, sql: Sql) -> None:
    made = await directory.users.create("u_42", "acme", None)
    assert (made["created"], made["key"]) == (True, None)
    assert await count(sql, "api_keys") == 0


async def test_of_fifty_concurrent_creations_of_a_user_one_gets_a_key(directory: Directory, sql: Sql) -> None:
    result = await asyncio.gather(*(directory.users.create("u_42", "acme", KeyWish()) for _ in range(50)))
    assert sum(one["created"] for one in result) == 1
    assert sum(one["key"] is not None for one in result) == 1
    assert {one["id"] for one in result} == {"u_42"}
    assert (await count(sql, "users"), await count(sql, "api_keys")) == (1, 1)
    (secret,) = (one["key"]["secret"] for one in result if one["key"] is not None)
    assert await sql.fetchval("SELECT digest FROM keyproxy.api_keys") == hashlib.sha256(secret.encode()).digest()


async def test_concurrent_creations_of_a_tenant_all_return_it(directory: Directory, sql: Sql) -> None:
    result = await asyncio.gather(*(directory.tenants.create("new", str(number)) for number in range(30)))
    assert sum(one["created"] for one in result) == 1
    assert len({one["name"] for one in result}) == 1


async def test_concurrent_creations_of_a_user_under_two_tenants_conflict_for_one_tenant(
    directory: Directory, sql: Sql
) -> None:
    await directory.tenants.create("other", "")
    result = await asyncio.gather(
        *(directory.users.create("u_42", ("acme", "other")[number % 2], KeyWish()) for number in range(20)),
        return_exceptions=True,
    )
    assert sum(isinstance(one, DirectoryError) for one in result) == 10
    assert await count(sql, "api_keys") == 1


# -- what is refused


async def test_user_of_another_tenant_is_refused_and_named(directory: Directory, sql: Sql) -> None:
    await directory.tenants.create("other", "")
    await directory.users.create("u_42", "acme", KeyWish())
    for tenant in ("other", "nobody"):
        with pytest.raises(DirectoryError, match="user 'u_42' exists and belongs to tenant 'acme'"):
            await directory.users.create("u_42", tenant, KeyWish())
    assert await count(sql, "api_keys") == 1


async def test_user_needs_an_existing_tenant(directory: Directory, sql: Sql) -> None:
    with pytest.raises(DirectoryError, match="no tenant 'nobody'"):
        await directory.users.create("u_42", "nobody", KeyWish())
    assert (await count(sql, "users"), await count(sql, "api_keys")) == (0, 0)


async def test_unknown_entities_are_not_found(directory: Directory) -> None:
    for call in (
        directory.tenants.get("x"), directory.users.get("x"), directory.keys.get("x"), directory.tenants.delete("x"),
        directory.users.delete("x"), directory.keys.delete("x"), directory.keys.revoke("x", ""),
        directory.keys.issue("x", KeyWish()),
    ):  # fmt: skip
        with pytest.raises(DirectoryError, match=r"there is no (tenant|user|key) 'x'"):
            await call


@pytest.mark.parametrize(
    ("user", "wish"),
    [
        ("u 42", KeyWish()),
        ("", KeyWish()),
        ("u_42\n", KeyWish()),
        ("u\x0042", KeyWish()),
        ("u\ud80042", KeyWish()),
        ("u_42", KeyWish(scopes=("*",))),
        ("u_42", KeyWish(scopes=("a b",))),
        ("u_42", KeyWish(name="x" * 201)),
        ("u_42", KeyWish(scopes=tuple(f"s{number}" for number in range(65)))),
    ],
)
async def test_user_and_first_key_are_created_together_or_not_at_all(
    directory: Directory, sql: Sql, user: str, wish: KeyWish
) -> None:
    before = await audit_rows(sql)
    with pytest.raises((Invalid, StoreConflict)):
        await directory.users.create(user, "acme", wish)
    assert (await count(sql, "users"), await count(sql, "api_keys")) == (0, 0)
    assert await audit_rows(sql) == before


# -- keys


async def test_issued_keys_have_the_requested_properties(directory: Directory) -> None:
    await directory.users.create("u_42", "acme", None)
    wish = KeyWish(name="nightly", scopes=("a", "b"), is_test=True, expires_in=timedelta(days=90))
    key = await directory.keys.issue("u_42", wish)
    secret = key.pop("secret")
    assert secret.startswith("kp_test_")
    assert FORMAT.may_exist(secret.encode())
    assert key["hint"].startswith(secret[:12])
    assert key["hint"].endswith(secret[-4:])
    assert (key["user"], key["tenant"], key["name"], key["scopes"], key["is_test"]) == (
        "u_42",
        "acme",
        "nightly",
        ["a", "b"],
        True,
    )
    expires = datetime.fromisoformat(key["expires_at"])
    assert timedelta(days=89, hours=23) < expires - datetime.now(UTC) <= timedelta(days=90)
    assert await directory.keys.get(key["id"]) == key
    assert (await directory.keys.issue("u_42", KeyWish()))["expires_at"] is None


async def test_issued_key_works_and_revoked_key_does_not(rig: Rig) -> None:
    directory = Directory(rig.door, FORMAT, Actor("ann", "desk"))
    await directory.tenants.create("acme", "")
    made = await directory.users.create("u_42", "acme", KeyWish(scopes=("jobs:write",)))
    await rig.feed.poll()
    secret = SecretKey(made["key"]["secret"].encode())
    who = await rig.resolve(secret)
    assert isinstance(who, Identity)
    assert (who.user_id, who.tenant_id, who.key_id, who.standing) == ("u_42", "acme", made["key"]["id"], None)
    await directory.keys.revoke(made["key"]["id"], "lost")
    await rig.feed.poll()
    who = await rig.resolve(secret)
    assert isinstance(who, Identity)
    assert who.standing is Reason.KEY_REVOKED


async def test_key_is_revoked_once_and_permanently(directory: Directory) -> None:
    key = (await directory.users.create("u_42", "acme", KeyWish()))["key"]
    first = await directory.keys.revoke(key["id"], "lost")
    assert (first["revoked_at"] is not None, first["revoke_reason"]) == (True, "lost")
    again = await directory.keys.revoke(key["id"], "another reason")
    assert (again["revoked_at"], again["revoke_reason"]) == (first["revoked_at"], "lost")


async def test_key_can_be_revoked_without_a_reason_and_gets_none_later(directory: Directory) -> None:
    key = (await directory.users.create("u_42", "acme", KeyWish()))["key"]
    assert (await directory.keys.revoke(key["id"], ""))["revoke_reason"] is None
    assert (await directory.keys.revoke(key["id"], "later"))["revoke_reason"] is None


async def test_deleting_cascades_to_users_and_keys(directory: Directory, sql: Sql) -> None:
    key = (await directory.users.create("u_1", "acme", KeyWish()))["key"]
    await directory.users.create("u_2", "acme", KeyWish())
    assert await directory.keys.delete(key["id"]) == {"id": key["id"], "deleted": True}
    assert await directory.users.delete("u_2") == {"id": "u_2", "deleted": True}
    assert (await count(sql, "users"), await count(sql, "api_keys")) == (1, 0)
    assert await directory.tenants.delete("acme") == {"id": "acme", "deleted": True}
    assert await count(sql, "users") == 0


@pytest.fixture
def time_zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process runs in the time zone that the test names."""
    with monkeypatch.context() as environment:
        environment.setenv("TZ", request.param)
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("time_zone")
@pytest.mark.parametrize("time_zone", ["UTC", "America/New_York", "Asia/Tokyo"], indirect=True)
@pytest.mark.parametrize("expires", ["infinity", "-infinity"])
async def test_key_with_an_infinite_expiry_from_another_client_can_be_shown(
    directory: Directory, sql: Sql, expires: str
) -> None:
    key = (await directory.users.create("u_42", "acme", KeyWish()))["key"]
    await sql.execute(f"UPDATE keyproxy.api_keys SET expires_at = '{expires}'")
    assert (await directory.keys.get(key["id"]))["id"] == key["id"]
    assert len(await directory.keys.list_by_id("", 10, KeyFilter())) == 1


# -- lists


async def test_lists_are_paged_in_the_order_of_ids(directory: Directory) -> None:
    for number in range(5):
        await directory.tenants.create(f"t_{number}", "")
        await directory.users.create(f"u_{number}", f"t_{number % 2}", KeyWish())
    assert [one["id"] for one in await directory.tenants.list_by_id("", 3)] == ["acme", "t_0", "t_1"]
    assert [one["id"] for one in await directory.tenants.list_by_id("t_1", 3)] == ["t_2", "t_3", "t_4"]
    assert await directory.tenants.list_by_id("t_4", 3) == []
    assert [one["id"] for one in await directory.users.list_by_id("", 10, None)] == [
        f"u_{number}" for number in range(5)
    ]
    assert [one["id"] for one in await directory.users.list_by_id("u_0", 10, "t_0")] == ["u_2", "u_4"]
    everything = await directory.keys.list_by_id("", 10, KeyFilter())
    assert [one["id"] for one in everything] == sorted(one["id"] for one in everything)
    assert len(everything) == 5
    assert {one["user"] for one in await directory.keys.list_by_id("", 10, KeyFilter(tenant="t_1"))} == {"u_1", "u_3"}
    assert [one["user"] for one in await directory.keys.list_by_id("", 10, KeyFilter(user="u_4"))] == ["u_4"]
    assert await directory.keys.list_by_id("", 10, KeyFilter(user="u_4", tenant="t_1")) == []


# -- the actor


async def test_actor_is_in_the_audit_log_of_every_change(directory: Directory, sql: Sql) -> None:
    key = (await directory.users.create("u_42", "acme", KeyWish()))["key"]
    await directory.keys.issue("u_42", KeyWish())
    await directory.keys.revoke(key["id"], "lost")
    await directory.tenants.delete("acme")
    rows = await sql.fetch("SELECT DISTINCT actor, origin FROM keyproxy.audit_log")
    assert [tuple(row) for row in rows] == [("ann", "desk")]
    # Set for one transaction, not for the next one on the connection.
    await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ('other')")
    assert await sql.fetchval("SELECT actor FROM keyproxy.audit_log ORDER BY id DESC LIMIT 1") == "sql:keyproxy"


async def test_actor_does_not_persist_on_the_connection(dsn: str) -> None:
    database = Database(dsn, pool_size_max=1, statement_timeout_seconds=5.0)
    await database.open()
    ann, ben = (Directory(database, FORMAT, Actor(name, name)) for name in ("ann", "ben"))
    await ann.tenants.create("t_1", "")
    async with database.transaction() as transaction:
        await transaction.fetch("create_tenant", "t_2", "", None)
    await ben.tenants.create("t_3", "")
    async with database.transaction() as transaction:
        rows = await transaction.fetch("tenants", "", 10)
    assert [row["id"] for row in rows] == ["t_1", "t_2", "t_3"]
    await database.close()
    connection = await asyncpg.connect(dsn)
    actors = await connection.fetch("SELECT actor FROM keyproxy.audit_log ORDER BY id")
    await connection.close()
    assert [row["actor"] for row in actors] == ["ann", "sql:keyproxy", "ben"]


# -- interrupted changes


async def test_cancelled_change_leaves_nothing_and_does_not_affect_other_requests(dsn: str, sql: Sql) -> None:
    database = Database(dsn, pool_size_max=1, statement_timeout_seconds=5.0)
    await database.open()
    directory = Directory(database, FORMAT, Actor("ann", "desk"))
    await directory.tenants.create("acme", "")
    other: Sql = await asyncpg.connect(dsn)
    async with other.transaction():
        await other.execute("SELECT 1 FROM keyproxy.tenants FOR UPDATE")
        making = asyncio.create_task(directory.users.create("u_1", "acme", KeyWish()))
        await until_blocked(sql, "INSERT INTO keyproxy.users")
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
    await other.close()
    made = await directory.users.create("u_2", "acme", KeyWish())
    assert (made["id"], made["key"]["user"]) == ("u_2", "u_2")
    assert [one["id"] for one in await directory.users.list_by_id("", 10, None)] == ["u_2"]
    assert await count(sql, "api_keys") == 1
    await database.close()


async def test_change_whose_connection_is_lost_leaves_nothing(dsn: str, relay: Relay, sql: Sql) -> None:
    database = Database(relay.dsn, pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    directory = Directory(database, FORMAT, Actor("ann", "desk"))
    await directory.tenants.create("acme", "")
    other: Sql = await asyncpg.connect(dsn)
    async with other.transaction():
        await other.execute("SELECT 1 FROM keyproxy.tenants FOR UPDATE")
        making = asyncio.create_task(directory.users.create("u_1", "acme", KeyWish()))
        await until_blocked(sql, "INSERT INTO keyproxy.users")
        relay.cut_connections()
        with pytest.raises(StoreUnavailable):
            await making
        await sql.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE query LIKE '%INSERT INTO keyproxy.users%'"
            " AND datname = current_database() AND pid <> pg_backend_pid()"
        )
    await other.close()
    assert await count(sql, "users") == 0
    assert (await directory.users.create("u_1", "acme", KeyWish()))["created"] is True
    await database.close()


# -- secrets


async def _everything(sql: Sql) -> str:
    """Every column of every row of every table of the schema, as text."""
    tables = await sql.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'keyproxy'")
    assert len(tables) >= 7
    rows: list[Any] = []
    for table in tables:
        rows += await sql.fetch(f'SELECT to_jsonb(t)::text AS row FROM keyproxy."{table["tablename"]}" AS t')
    return "\n".join(row["row"] for row in rows)


async def test_a_secret_is_in_no_column_of_any_table(directory: Directory, sql: Sql) -> None:
    made = await directory.users.create("u_42", "acme", KeyWish(name="n", scopes=("a",)))
    issued = await directory.keys.issue("u_42", KeyWish(is_test=True))
    secrets = [made["key"]["secret"], issued["secret"]]
    await directory.keys.revoke(issued["id"], "lost")
    await directory.keys.delete(made["key"]["id"])
    text = await _everything(sql)
    # The search works: it finds the hint and the digest.
    assert issued["hint"] in text
    assert hashlib.sha256(secrets[1].encode()).hexdigest() in text
    for secret in secrets:
        for part in (secret, secret[8:], secret[12:-4], secret[8:40], secret.encode().hex()):
            assert part not in text


async def test_secret_is_returned_once(directory: Directory) -> None:
    made = await directory.users.create("u_42", "acme", KeyWish())
    secret = made["key"]["secret"]
    shown = [
        await directory.users.get("u_42"), await directory.keys.get(made["key"]["id"]),
        await directory.users.list_by_id("", 9, None),
        await directory.keys.list_by_id("", 9, KeyFilter()), await directory.keys.revoke(made["key"]["id"], "x"),
        await directory.users.create("u_42", "acme", KeyWish()),
    ]  # fmt: skip
    text = json.dumps(shown)
    assert secret not in text
    assert secret[12:-4] not in text
    assert "digest" not in text
    assert '"secret"' not in text


async def test_error_contains_no_secret(directory: Directory) -> None:
    await directory.users.create("u_42", "acme", None)
    with pytest.raises(Invalid, match="a scope is one word") as caught:
        await directory.keys.issue("u_42", KeyWish(scopes=("*",)))
    # PostgreSQL reports the failing row, with the digest; only the hint of the key may be visible.
    assert "kp_live_" not in str(caught.value)
    assert "\\x" not in str(caught.value)
