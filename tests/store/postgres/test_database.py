"""Database: every failure is one of two exceptions, waits are bounded, and the database recovers without a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest

from keyproxy.auth.api_key import KeyFormat
from keyproxy.model import Identity
from keyproxy.reasons import Reason
from keyproxy.store.directory.directory import Actor, Directory, KeyWish
from keyproxy.store.identities.change_feed import CHANNEL
from keyproxy.store.postgres import migrations, queries
from keyproxy.store.postgres.database import Database, NotificationListener, StoreConflict, StoreUnavailable
from tests.server import Server
from tests.store.conftest import MakePooler, MakeRig, StartServer
from tests.store.harness import (
    Clock,
    Relay,
    Sql,
    StatementRunner,
    add_key,
    add_keys,
    add_tenant,
    add_user,
    until_blocked,
)
from tests.waiting import until


@contextlib.asynccontextmanager
async def opened(dsn: str, *, pool_size_max: int = 2, timeout_seconds: float = 5.0) -> AsyncIterator[StatementRunner]:
    """A database that is open in the context."""
    door = StatementRunner(dsn, pool_size_max=pool_size_max, statement_timeout_seconds=timeout_seconds)
    await door.open()
    try:
        yield door
    finally:
        await door.close()


# -- results


async def test_statement_returns_its_rows(database: Database, sql: Sql) -> None:
    assert await database.fetch("tenants", "", 10) == []
    await add_tenant(sql, "a")
    await add_tenant(sql, "b")
    assert [row["id"] for row in await database.fetch("tenants", "", 10)] == ["a", "b"]


async def test_transaction_commits_as_a_whole_or_not_at_all(database: Database) -> None:
    async with database.transaction() as transaction:
        assert await transaction.fetch_row("tenant", "a") is None
        row = await transaction.fetch_row("create_tenant", "a", "", None)
        assert row is not None
    with contextlib.suppress(ZeroDivisionError):
        async with database.transaction() as transaction:
            await transaction.fetch("create_tenant", "b", "", None)
            raise ZeroDivisionError
    assert [one["id"] for one in await database.fetch("tenants", "", 10)] == ["a"]


@pytest.mark.parametrize(
    ("statement", "arguments", "constraint"),
    [
        ("create_tenant", ("a b", "", None), "tenants_id_check"),
        ("create_tenant", ("a", "x" * 201, None), "tenants_name_check"),
        ("create_tenant", ("a\x00", "", None), ""),
        ("create_tenant", (7, "", None), ""),
        ("create_user", ("u", "nobody", None, None, None, None, "", [], None, None), "users_tenant_id_fkey"),
        ("tenants", ("", -1), ""),
        ("tenants", ("", 1 << 70), ""),
    ],
)
async def test_refused_change_is_a_conflict_and_not_an_outage(
    database: Database, statement: str, arguments: tuple[object, ...], constraint: str
) -> None:
    with pytest.raises(StoreConflict) as caught:
        await database.fetch(statement, *arguments)
    assert caught.value.constraint == constraint
    assert "\n" not in str(caught.value)
    assert not database.is_down
    with pytest.raises(StoreConflict):
        async with database.transaction() as transaction:
            await transaction.fetch(statement, *arguments)
    assert await database.fetch("tenants", "", 10) == []


async def test_statement_is_the_only_one_that_the_server_runs_for_it(dsn: str, sql: Sql) -> None:
    async with opened(dsn, pool_size_max=1) as door:
        await door.fetch("tenants", "", 1)
        await door.fetch("tenant", "a")
        last = await sql.fetchval(
            "SELECT query FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'keyproxy' AND pid <> pg_backend_pid()"
        )
    assert last == queries.load()["tenant"]


async def test_connection_comes_back_from_a_transaction_without_its_locks(dsn: str, sql: Sql) -> None:
    async def locks() -> object:
        return await sql.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")

    async def claim(door: Database) -> None:
        async with door.transaction() as transaction:
            (row,) = await transaction.fetch("claim_request", 7)
            assert row["is_claimed"]
            await asyncio.Event().wait()

    async with opened(dsn, pool_size_max=1) as door:
        for _ in range(2):
            claiming = asyncio.create_task(claim(door))
            async with asyncio.timeout(5):
                while await locks() != 1:
                    await asyncio.sleep(0.01)
            claiming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await claiming
            assert await door.fetch("tenants", "", 1) == []
            assert await locks() == 0


# -- opening and closing


async def test_opening_and_closing_need_no_server(short_directory: str) -> None:
    async with opened(f"postgresql://keyproxy@/x?host={short_directory}&port=5432") as door:
        assert (door.is_up, door.is_down) == (False, False)
        with pytest.raises(StoreUnavailable):
            await door.fetch("tenants", "", 1)
        assert (door.is_up, door.is_down) == (False, True)
        with pytest.raises(StoreUnavailable):
            async with door.transaction():
                pass


async def test_closed_database_raises_store_unavailable(database: Database) -> None:
    await database.close()
    await database.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await database.fetch("tenants", "", 1)
    with pytest.raises(StoreUnavailable, match="closed"):
        async with database.transaction():
            pass
    await database.open()
    assert await database.fetch("tenants", "", 1) == []


async def test_closing_does_not_wait_for_a_stuck_statement(dsn: str, sql: Sql) -> None:
    door = StatementRunner(dsn, statement_timeout_seconds=30.0)
    await door.open()
    other: Sql = await asyncpg.connect(dsn)
    async with other.transaction():
        await other.execute("LOCK TABLE keyproxy.tenants IN ACCESS EXCLUSIVE MODE")
        fetching = asyncio.create_task(door.fetch("tenants", "", 1))
        await until_blocked(sql, "FROM keyproxy.tenants")
        started = time.monotonic()
        await door.close()
        assert time.monotonic() - started < 4
        with pytest.raises(StoreUnavailable):
            await fetching
    await other.close()


@pytest.mark.parametrize("is_server_there", [False, True])
async def test_missing_server_or_database_is_unavailable(postgres: Server, is_server_there: bool) -> None:
    nowhere = "postgresql://keyproxy@/nowhere?host=/tmp/kp-nobody&port=5432"
    async with opened(postgres.dsn("db_that_is_not_there") if is_server_there else nowhere) as door:
        with pytest.raises(StoreUnavailable):
            await door.fetch("tenants", "", 1)
        assert door.is_down


async def test_database_without_our_schema_is_unavailable_until_it_is_migrated(empty_dsn: str) -> None:
    async with opened(empty_dsn) as door:
        with pytest.raises(StoreUnavailable):
            await door.fetch("tenants", "", 1)
        await migrations.migrate(empty_dsn)
        assert await door.fetch("tenants", "", 1) == []
        assert door.is_up


# -- timeouts


async def test_slow_statement_times_out_and_its_connection_stays_usable(dsn: str, sql: Sql) -> None:
    async with opened(dsn, pool_size_max=1, timeout_seconds=0.2) as door:
        other: Sql = await asyncpg.connect(dsn)
        async with other.transaction():
            await other.execute("LOCK TABLE keyproxy.tenants IN ACCESS EXCLUSIVE MODE")
            for _ in range(3):
                started = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    await door.fetch("tenants", "", 1)
                assert 0.15 < time.monotonic() - started < 1.5
                assert door.is_down
            assert await door.fetch("users", "", 1, None) == []
            assert door.is_up
        await other.close()
        assert await door.fetch("tenants", "", 1) == []


async def test_wait_for_a_free_connection_is_bounded(dsn: str, sql: Sql) -> None:
    async with opened(dsn, pool_size_max=1, timeout_seconds=30.0) as door:
        async with door.transaction():
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await door.fetch("tenants", "", 1)
            assert time.monotonic() - started < 4
        assert await door.fetch("tenants", "", 1) == []


async def test_network_that_drops_all_packets_is_detected_in_bounded_time_and_service_recovers(relay: Relay) -> None:
    async with opened(relay.dsn, timeout_seconds=0.3) as door:
        await door.fetch("tenants", "", 1)
        relay.freeze()
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await door.fetch("tenants", "", 1)
        # The statement timeout, plus some time to cancel it over the same dead network.
        assert time.monotonic() - started < 5
        relay.thaw()
        await until_answered(door)


async def until_answered(door: Database, *, seconds: float = 8.0) -> None:
    """Wait until the store responds."""

    async def answers() -> bool:
        try:
            await door.fetch("tenants", "", 1)
        except StoreUnavailable:
            return False
        return True

    await until(answers, "the store responds", seconds=seconds)


# -- lost connections


async def test_connection_lost_during_a_statement_is_an_outage_and_the_next_statement_gets_another(
    relay: Relay, dsn: str, sql: Sql
) -> None:
    async with opened(relay.dsn) as door:
        other: Sql = await asyncpg.connect(dsn)
        async with other.transaction():
            await other.execute("LOCK TABLE keyproxy.tenants IN ACCESS EXCLUSIVE MODE")
            fetching = asyncio.create_task(door.fetch("tenants", "", 1))
            await until_blocked(sql, "FROM keyproxy.tenants")
            relay.cut_connections()
            with pytest.raises(StoreUnavailable):
                await fetching
        await other.close()
        assert await door.fetch("tenants", "", 1) == []


async def test_idle_connections_closed_by_the_server_fail_no_statement(relay: Relay) -> None:
    async with opened(relay.dsn, pool_size_max=3) as door:
        for _ in range(3):
            await asyncio.gather(*(door.fetch("tenants", "", 1) for _ in range(3)))
            relay.cut_connections()
            # Once the event loop has noticed it.
            await asyncio.sleep(0.05)
            assert await door.fetch("tenants", "", 1) == []


async def test_lost_connection_in_a_transaction_is_an_outage(relay: Relay) -> None:
    async def change(door: StatementRunner) -> None:
        async with door.transaction() as transaction:
            await transaction.fetch("create_tenant", "a", "", None)
            relay.cut_connections()
            await transaction.fetch("create_tenant", "b", "", None)

    async with opened(relay.dsn) as door:
        with pytest.raises(StoreUnavailable):
            await change(door)
        assert await door.fetch("tenants", "", 10) == []


async def test_stopped_server_is_an_outage_and_a_restarted_one_is_used_again(start_server: StartServer) -> None:
    server = start_server()
    await migrations.migrate(server.dsn())
    async with opened(server.dsn()) as door:
        assert await door.fetch("users", "", 1, None) == []
        assert (door.is_up, door.is_down, door.down_because) == (True, False, "")
        server.stop()
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                await door.fetch("users", "", 1, None)
            assert (door.is_up, door.is_down) == (False, True)
            assert door.down_because
        server = start_server()
        assert await door.fetch("users", "", 1, None) == []
        assert (door.is_up, door.is_down, door.down_because) == (True, False, "")


async def test_server_shutdown_is_an_outage_at_every_moment(start_server: StartServer) -> None:
    server = start_server()
    await migrations.migrate(server.dsn())
    async with opened(server.dsn(), timeout_seconds=1.0) as door:
        await door.fetch("users", "", 1, None)
        stopping = asyncio.create_task(asyncio.to_thread(server.stop))
        while not stopping.done():
            with contextlib.suppress(StoreUnavailable):
                await door.fetch("users", "", 1, None)
            await asyncio.sleep(0)
        await stopping
        with pytest.raises(StoreUnavailable):
            await door.fetch("users", "", 1, None)


async def test_terminated_backend_is_an_outage_at_every_moment(dsn: str, sql: Sql) -> None:
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> $1"
    ending = asyncio.create_task(_again_and_again(sql, others))
    answered = 0
    async with opened(dsn) as door:

        async def ask() -> None:
            nonlocal answered
            while not ending.done():
                with contextlib.suppress(StoreUnavailable):
                    await door.fetch("tenants", "", 1)
                    answered += 1

        await asyncio.gather(ask(), ask())
        assert answered > 0
        assert await door.fetch("tenants", "", 1) == []


async def _again_and_again(sql: Sql, statement: str) -> None:
    for _ in range(150):
        await sql.execute(statement.replace("$1", "pg_backend_pid()"))
        await asyncio.sleep(0.003)


# -- cancellation


async def test_result_of_a_cancelled_statement_goes_to_no_other_statement(dsn: str, sql: Sql) -> None:
    await add_tenant(sql, "a")
    await add_tenant(sql, "b")
    async with opened(dsn, pool_size_max=1) as door:
        await door.fetch("tenant", "a")
        for turn in range(150):
            fetching = asyncio.create_task(door.fetch("tenant", "a"))
            await asyncio.sleep(turn * 0.00002)
            fetching.cancel()
            (row,) = await door.fetch("tenant", "b")
            assert row["id"] == "b"
            with contextlib.suppress(asyncio.CancelledError):
                await fetching


async def test_cancelled_statement_does_not_mark_the_store_as_down(dsn: str, sql: Sql) -> None:
    async with opened(dsn, pool_size_max=1) as door:
        await door.fetch("tenants", "", 1)
        other: Sql = await asyncpg.connect(dsn)
        async with other.transaction():
            await other.execute("LOCK TABLE keyproxy.tenants IN ACCESS EXCLUSIVE MODE")
            fetching = asyncio.create_task(door.fetch("tenants", "", 1))
            await until_blocked(sql, "FROM keyproxy.tenants")
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
            assert door.is_up
            assert await door.fetch("users", "", 1, None) == []
        await other.close()


# -- notifications


async def test_listener_receives_commits_and_reports_its_loss_once(dsn: str, sql: Sql) -> None:
    listener = NotificationListener(dsn, CHANNEL)
    notified: list[None] = []
    lost: list[None] = []
    await listener.open(lambda: notified.append(None), lambda: lost.append(None))
    await add_user(sql)
    await add_keys(sql, range(3))
    await until(lambda: len(notified) >= 1, "the notification arrives")
    await sql.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
    await until(lambda: len(lost) == 1, "the loss is reported")
    await listener.close()
    assert len(lost) == 1


async def test_listener_that_cannot_connect_raises_store_unavailable(relay: Relay) -> None:
    await relay.cut()
    listener = NotificationListener(relay.dsn, CHANNEL)
    with pytest.raises(StoreUnavailable):
        await listener.open(lambda: None, lambda: None)
    await listener.close()


# -- through a pooler in transaction mode


@pytest.fixture(params=[1, 2], ids=["one server connection", "two server connections"])
async def pooled_dsn(request: pytest.FixtureRequest, make_pooler: MakePooler) -> str:
    """This test's database through a pgbouncer in transaction mode."""
    return (await make_pooler(request.param)).dsn


async def test_concurrent_statements_through_a_pooler_all_succeed_from_the_start(pooled_dsn: str, sql: Sql) -> None:
    for number in range(20):
        await add_tenant(sql, f"t_{number}")
    async with opened(pooled_dsn, pool_size_max=8) as door:
        for _ in range(3):
            outcomes = await asyncio.gather(
                *(door.fetch("tenant", f"t_{number}") for number in range(20)),
                *(door.fetch("tenants", "", number) for number in range(20)),
                return_exceptions=True,
            )
            assert [one for one in outcomes if isinstance(one, BaseException)] == []
            rows = [one for one in outcomes if not isinstance(one, BaseException)]
            assert [one[0]["id"] for one in rows[:20]] == [f"t_{number}" for number in range(20)]
            assert [len(one) for one in rows[20:]] == list(range(20))


async def test_several_databases_share_a_pooler(pooled_dsn: str, sql: Sql) -> None:
    await add_tenant(sql, "a")
    async with opened(pooled_dsn) as one, opened(pooled_dsn) as two, opened(pooled_dsn) as three:
        for _ in range(5):
            for door in (one, two, three):
                assert (await door.fetch("tenant", "a"))[0]["id"] == "a"
                assert await door.fetch("users", "", 5, None) == []
            outcomes = await asyncio.gather(
                *(door.fetch("tenant", "a") for door in (one, two, three) for _ in range(5))
            )
            assert {rows[0]["id"] for rows in outcomes} == {"a"}


async def test_detecting_a_pooler_never_marks_the_store_as_down(pooled_dsn: str, sql: Sql) -> None:
    states: list[str] = []

    class Watched(StatementRunner):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "is_down" and value:
                states.append(self.down_because or "down")
            super().__setattr__(name, value)

    await add_tenant(sql, "a")
    doors = [Watched(pooled_dsn) for _ in range(3)]
    for door in doors:
        await door.open()
    for _ in range(3):
        await asyncio.gather(*(door.fetch("tenant", "a") for door in doors for _ in range(6)), return_exceptions=True)
    for door in doors:
        await door.close()
    assert states == []


async def test_transactions_work_through_a_pooler(pooled_dsn: str, sql: Sql) -> None:
    async with opened(pooled_dsn, pool_size_max=4) as door:
        directory = Directory(door, KeyFormat(), Actor("ann", "desk"))
        await directory.tenants.create("acme", "")
        outcomes = await asyncio.gather(
            *(directory.users.create(f"u_{number % 10}", "acme", KeyWish()) for number in range(40)),
            return_exceptions=True,
        )
        assert [one for one in outcomes if isinstance(one, BaseException)] == []
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.api_keys") == 10
    assert await sql.fetchval("SELECT count(DISTINCT actor) FROM keyproxy.audit_log") == 1


async def test_consecutive_processes_can_write_through_a_pooler(pooled_dsn: str, sql: Sql) -> None:
    for number in range(4):
        environment = {**os.environ, "KEYPROXY_STORE__DSN": pooled_dsn}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "keyproxy",
            "tenant",
            "create",
            f"t_{number}",
            "--json",
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert (process.returncode, err.decode()) == (0, "")
        assert json.loads(out)["id"] == f"t_{number}"


async def test_migrations_work_through_a_pooler(pooled_dsn: str) -> None:
    assert await asyncio.gather(*(migrations.migrate(pooled_dsn) for _ in range(4))) == [[]] * 4


@pytest.mark.parametrize("listener", ["real", None])
async def test_lookups_and_the_feed_work_through_a_pooler(
    make_pooler: MakePooler, make_rig: MakeRig, relay: Relay, sql: Sql, listener: str | None
) -> None:
    pooler = await make_pooler(1)
    await add_user(sql)
    keys = await add_keys(sql, range(30))
    # The rig's relay bypasses the pooler; its database and its listener use it.
    first, second = StatementRunner(pooler.dsn), StatementRunner(pooler.dsn)
    rigs = []
    for door in (first, second):
        rig = await make_rig(door=door, listener=NotificationListener(pooler.dsn, CHANNEL) if listener else None)
        rigs.append(rig)
    for rig in rigs:
        rig.clock = Clock()
        rig.feed.start()
    for rig in rigs:
        await until(rig.feed.is_current, "the feed is current")
    for rig in rigs:
        found = await asyncio.gather(*(rig.resolve(secret) for secret in keys))
        assert all(isinstance(one, Identity) for one in found)
        rig.last_used.start()
    await sql.execute("UPDATE keyproxy.api_keys SET revoked_at = now() WHERE id = 'key_1'")
    committed = time.monotonic()
    for rig in rigs:
        await until(lambda rig=rig: not rig.is_served(keys[1]), "the revocation takes effect")  # type: ignore[misc]
    assert time.monotonic() - committed <= 1.0
    for rig in rigs:
        outcomes = await rig.resolve(keys[1])
        assert isinstance(outcomes, Identity)
        assert outcomes.standing is Reason.KEY_REVOKED
        await rig.last_used.close()


async def test_key_added_through_a_pooler_works(pooled_dsn: str, make_rig: MakeRig, sql: Sql) -> None:
    rig = await make_rig(door=StatementRunner(pooled_dsn))
    await add_user(sql)
    secret = await add_key(sql)
    await rig.feed.poll()
    assert isinstance(await rig.resolve(secret), Identity)
