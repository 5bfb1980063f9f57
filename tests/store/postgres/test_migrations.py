"""Migrations are applied once, each as a whole, and never by a program older than the schema."""

from __future__ import annotations

import asyncio
import secrets
from urllib.parse import urlsplit

import asyncpg
import pytest

from keyproxy.store.postgres import migrations
from keyproxy.store.postgres.database import StoreUnavailable
from keyproxy.store.postgres.migrations import MigrationError
from tests.server import as_role, may_log_in
from tests.store.harness import Relay, Sql, migrated_up_to, until_row

ALL = [one.number for one in migrations.available()]


async def tables(dsn: str) -> set[str]:
    """The tables in the schema keyproxy."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'keyproxy'")
        return {row["tablename"] for row in rows}
    finally:
        await connection.close()


async def run(dsn: str, *statements: str) -> None:
    """Run statements as any SQL client."""
    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def test_migrations_are_numbered_from_one_without_gaps() -> None:
    assert list(range(1, len(ALL) + 1)) == ALL


def test_migrations_contain_whole_functions() -> None:
    """Changes of fragments leave no file in which a function can be read. Two were applied before this was a rule."""
    assert [one.number for one in migrations.available() if "pg_get_functiondef" in one.statements] == [10, 17]


async def test_fresh_database_gets_every_migration_in_order(empty_dsn: str) -> None:
    assert [one.number for one in await migrations.migrate(empty_dsn)] == ALL
    assert await migrations.state(empty_dsn) == (ALL, [])
    assert {"tenants", "users", "api_keys", "plans", "audit_log"} <= await tables(empty_dsn)


async def test_owner_of_the_schema_needs_no_more_than_its_database(empty_dsn: str) -> None:
    """As on managed servers, where the application's administrator is no superuser."""
    owner, database = f"kp_{secrets.token_hex(4)}", urlsplit(empty_dsn).path[1:]
    await run(
        empty_dsn, f"CREATE ROLE {owner}", may_log_in(empty_dsn, owner), f'ALTER DATABASE "{database}" OWNER TO {owner}'
    )
    try:
        assert [one.number for one in await migrations.migrate(as_role(empty_dsn, owner))] == ALL
    finally:
        await run(
            empty_dsn, f"REASSIGN OWNED BY {owner} TO CURRENT_USER", f"DROP OWNED BY {owner}", f"DROP ROLE {owner}"
        )


async def test_second_run_applies_nothing_and_keeps_the_rows(own_dsn: str) -> None:
    await run(own_dsn, "INSERT INTO keyproxy.tenants (id) VALUES ('acme')")
    assert await migrations.migrate(own_dsn) == []
    await run(own_dsn, "UPDATE keyproxy.tenants SET name = 'x' WHERE id = 'acme'")
    assert await migrations.state(own_dsn) == (ALL, [])


async def test_concurrent_runs_apply_each_migration_once(empty_dsn: str) -> None:
    done = await asyncio.gather(*(migrations.migrate(empty_dsn) for _ in range(8)))
    assert sorted(one.number for run in done for one in run) == ALL
    assert await migrations.state(empty_dsn) == (ALL, [])


async def test_migration_changed_after_it_was_applied_is_an_error(own_dsn: str) -> None:
    await run(own_dsn, "UPDATE keyproxy.migrations SET checksum = repeat('0', 64) WHERE number = 1")
    for ask in (migrations.migrate, migrations.state):
        with pytest.raises(MigrationError, match="0001_identities was changed"):
            await ask(own_dsn)


@pytest.mark.parametrize("number", [ALL[-1] + 1, 9999])
async def test_database_newer_than_this_program_is_left_unchanged(own_dsn: str, number: int) -> None:
    await run(own_dsn, f"INSERT INTO keyproxy.migrations (number, name, checksum) VALUES ({number}, 'later', 'x')")
    for ask in (migrations.migrate, migrations.state):
        with pytest.raises(MigrationError, match=f"{number}.*newer"):
            await ask(own_dsn)


async def test_reading_the_state_changes_nothing(empty_dsn: str) -> None:
    state = await migrations.state(empty_dsn)
    assert state.applied == []
    assert [one.number for one in state.pending] == ALL
    connection = await asyncpg.connect(empty_dsn)
    assert await connection.fetchval("SELECT to_regnamespace('keyproxy')") is None
    await connection.close()


async def test_failed_migration_is_rolled_back_and_can_be_repeated(empty_dsn: str) -> None:
    # Conflicts with a table that the migration creates near its end.
    await run(empty_dsn, "CREATE SCHEMA keyproxy", "CREATE TABLE keyproxy.audit_log (x int)")
    with pytest.raises(MigrationError, match=r"the migration failed and was rolled back: .*audit_log"):
        await migrations.migrate(empty_dsn)
    assert await tables(empty_dsn) == {"audit_log"}
    assert (await migrations.state(empty_dsn)).applied == []
    await run(empty_dsn, "DROP TABLE keyproxy.audit_log")
    assert [one.number for one in await migrations.migrate(empty_dsn)] == ALL


async def test_interrupted_run_is_rolled_back_and_does_not_block_the_next(empty_dsn: str) -> None:
    in_the_way: Sql = await asyncpg.connect(empty_dsn)
    watch: Sql = await asyncpg.connect(empty_dsn)
    transaction = in_the_way.transaction()
    await transaction.start()
    await in_the_way.execute("CREATE SCHEMA keyproxy")
    first, second = (asyncio.create_task(migrations.migrate(empty_dsn)) for _ in range(2))
    waiting = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND {}"
    blocked = "wait_event_type = 'Lock' AND query LIKE '%CREATE SCHEMA%'"
    await until_row(watch, waiting.format(blocked))
    finished, pending = await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(MigrationError):
        finished.pop().result()
    await transaction.rollback()
    assert [one.number for one in await pending.pop()] == ALL
    await in_the_way.close()
    await watch.close()


async def test_role_without_the_privilege_to_create_a_schema_gets_an_error(empty_dsn: str) -> None:
    await run(
        empty_dsn, "DROP ROLE IF EXISTS kp_powerless", "CREATE ROLE kp_powerless", may_log_in(empty_dsn, "kp_powerless")
    )
    try:
        with pytest.raises(MigrationError, match="permission denied"):
            await migrations.migrate(as_role(empty_dsn, "kp_powerless"))
    finally:
        await run(empty_dsn, "DROP ROLE kp_powerless")


async def test_unreachable_store_is_unavailable_and_not_a_migration_error(relay: Relay) -> None:
    await relay.cut()
    for ask in (migrations.migrate, migrations.state):
        with pytest.raises(StoreUnavailable):
            await ask(relay.dsn)


# -- with running proxies


async def test_migration_does_not_deadlock_with_ledger_messages(empty_dsn: str) -> None:
    """A message reads the ledger's history, then writes its holder. 0010 is the last migration before both change."""
    await migrated_up_to(empty_dsn, 10)
    proxy, other = await asyncpg.connect(empty_dsn), await asyncpg.connect(empty_dsn)
    message = proxy.transaction()
    await message.start()
    await proxy.execute("SELECT * FROM keyproxy.ledger_history")
    migrating = asyncio.create_task(migrations.migrate(empty_dsn))
    await until_row(
        other,
        "SELECT 1 FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE NOT granted AND datname = current_database()",
    )
    await proxy.execute(
        "INSERT INTO keyproxy.lease_holders (id, serial, expires_at) VALUES ('a', 1, now() + interval '1 hour')"
    )
    await message.commit()
    assert [one.number for one in await migrating] == ALL[10:]
    await proxy.close()
    await other.close()


async def test_migration_waiting_for_a_lock_does_not_block_proxies(empty_dsn: str) -> None:
    """A dump locks every table until it ends. Statements queued behind a migration that waits for it wait too."""
    await migrated_up_to(empty_dsn, 10)
    dump, proxy = await asyncpg.connect(empty_dsn), await asyncpg.connect(empty_dsn)
    await proxy.execute("SET statement_timeout = '2s'")
    reading = dump.transaction()
    await reading.start()
    await dump.execute("SELECT * FROM keyproxy.lease_holders")
    migrating = asyncio.create_task(migrations.migrate(empty_dsn))
    for serial in range(1, 31):
        await proxy.fetch("SELECT * FROM keyproxy.sync_leases('a', $1, 10, '{}')", serial)
        await asyncio.sleep(0.1)
    assert not migrating.done()
    await reading.rollback()
    assert [one.number for one in await migrating] == ALL[10:]
    await dump.close()
    await proxy.close()
