"""Each side of keyproxy works with a role of its own that can do nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from datetime import timedelta

import asyncpg
import pytest

from keyproxy.auth.api_key import KeyFormat, SecretKey
from keyproxy.config.schema import Cache, Usage
from keyproxy.config.tools.anomaly_settings import AnomalySettings
from keyproxy.model import Identity, Missing
from keyproxy.ports.signals import Habit, Signal
from keyproxy.store.anomalies.signal_journal import SignalJournal
from keyproxy.store.directory.directory import Actor, Directory, KeyWish, Revocation
from keyproxy.store.directory.import_keys import read_key
from keyproxy.store.identities.cache import FeedState, IdentityCache
from keyproxy.store.identities.change_feed import ChangeFeed
from keyproxy.store.identities.last_used import LastUsed
from keyproxy.store.ledger.charge_dedup import Answer, Cover
from keyproxy.store.ledger.charge_dedup_postgres import PostgresClaims
from keyproxy.store.ledger.postgres_backend import PostgresLedger
from keyproxy.store.postgres import roles
from keyproxy.store.postgres.database import Database, StoreUnavailable
from keyproxy.store.postgres.migrations import MigrationError
from keyproxy.store.usage.journal import UsageJournal
from keyproxy.store.usage.usage_queries import UsageFilter, UsageReader
from tests import fakes
from tests.contracts import LEASE_SECONDS, line, window
from tests.server import as_role, may_log_in
from tests.store.approvals.approval_rows import add_owner
from tests.store.harness import Clock, Sql, add_key, add_user
from tests.store.ledger.test_charge_dedup import claim
from tests.store.ledger.test_window_credits import credit
from tests.store.usage.test_journal import ended, rows

FOREIGN = "Ab3dE6gH.abcdefghijklmnopqrstuvwxyz012345"


@pytest.fixture
async def prefix(dsn: str, sql: Sql) -> AsyncIterator[str]:
    """A unique prefix, since roles belong to the server and not the database. Drops the roles in the end."""
    prefix = f"kp_{secrets.token_hex(4)}"
    await roles.create(dsn, prefix)
    for role in roles.names(prefix):
        await sql.execute(may_log_in(dsn, role))
    yield prefix
    for role in roles.names(prefix):
        await sql.execute(f'DROP OWNED BY "{role}"')
        await sql.execute(f'DROP ROLE "{role}"')


@pytest.fixture
async def as_proxy(dsn: str, prefix: str) -> AsyncIterator[Database]:
    """The store with the proxies' role."""
    database = Database(as_role(dsn, f"{prefix}_proxy"), pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def as_admin(dsn: str, prefix: str) -> AsyncIterator[Database]:
    """The store with the admin side's role."""
    database = Database(as_role(dsn, f"{prefix}_admin"), pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    yield database
    await database.close()


async def test_roles_have_jit_disabled(dsn: str, prefix: str) -> None:
    for role in roles.names(prefix):
        client: Sql = await asyncpg.connect(as_role(dsn, role))
        assert await client.fetchval("SELECT current_setting('jit')") == "off"
        await client.close()


async def test_every_table_is_in_the_list_of_privileges(sql: Sql) -> None:
    rows = await sql.fetch(
        "SELECT c.relname FROM pg_class AS c WHERE c.relnamespace = 'keyproxy'::regnamespace"
        " AND c.relkind IN ('r', 'p', 'v', 'm') AND NOT c.relispartition"
    )
    assert {row["relname"] for row in rows} - set(roles.RIGHTS) == set()


async def test_proxies_resolve_keys_read_changes_and_record_use(as_proxy: Database, sql: Sql) -> None:
    await add_user(sql)
    secret = await add_key(sql)
    clock, state = Clock(), FeedState()
    last_used = LastUsed(as_proxy)
    cache = IdentityCache(
        as_proxy, Cache(), feed=state, last_used=last_used, header_prefix="X-Keyproxy-", look_ups_max=1, now=clock
    )
    feed = ChangeFeed(as_proxy, None, cache, state, clock)
    await feed.poll()
    who = await _present(cache, secret, clock)
    assert who.user_id == "u_42"
    await last_used.flush()
    assert await sql.fetchval("SELECT last_used_at IS NOT NULL FROM keyproxy.api_keys") is True
    await as_proxy.fetch("forget_changes", await sql.fetchval("SELECT pg_current_snapshot()::text"), 100)
    await cache.close()
    await feed.close()


async def test_proxies_adopt_only_the_imported_key_that_is_presented(
    as_admin: Database, as_proxy: Database, sql: Sql
) -> None:
    await add_user(sql)
    hashed = "sha512$$" + hashlib.sha512(FOREIGN.encode()).hexdigest()
    row = read_key("1", {"prefix": "Ab3dE6gH", "hashed_key": hashed, "user": "u_42"}, {})
    assert (
        await Directory(as_admin, KeyFormat(), Actor("ann", "")).key_importer.run([row], dry_run=False)
    ).imported == 1
    async with as_proxy.transaction() as transaction:
        guess = "sha512$$" + hashlib.sha512(b"a guess").hexdigest()
        assert await transaction.fetch("adopt_foreign", "Ab3dE6gH", guess, bytes(32)) == []
    clock, state = Clock(), FeedState()
    cache = IdentityCache(
        as_proxy, Cache(), feed=state, last_used=LastUsed(as_proxy), header_prefix="X-", look_ups_max=1, now=clock
    )
    assert (await _present(cache, SecretKey(FOREIGN.encode()), clock)).user_id == "u_42"
    await cache.close()


async def _present(cache: IdentityCache, secret: SecretKey, clock: Clock) -> Identity:
    for _ in range(3):
        try:
            return cache.known(secret.digest(), clock())
        except Missing as missing:
            await cache.fetching(secret, missing).fetch_missing()
    raise AssertionError("no response")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE keyproxy.api_keys SET revoked_at = NULL",
        "UPDATE keyproxy.api_keys SET digest = sha256('x')",
        "UPDATE keyproxy.api_keys SET scopes = '{a}', last_used_at = now()",
        "INSERT INTO keyproxy.api_keys (id, user_id, digest) VALUES ('key_x', 'u_42', sha256('x'))",
        "DELETE FROM keyproxy.api_keys",
        "TRUNCATE keyproxy.api_keys CASCADE",
        "INSERT INTO keyproxy.users (id, tenant_id) VALUES ('u_x', 'acme')",
        "UPDATE keyproxy.users SET disabled_at = NULL",
        "UPDATE keyproxy.tenants SET plan_id = NULL",
        "INSERT INTO keyproxy.plans (id) VALUES ('p')",
        "SELECT * FROM keyproxy.audit_log",
        "INSERT INTO keyproxy.audit_log (actor, action, entity, entity_id) VALUES ('a', 'insert', 'key', 'x')",
        "DELETE FROM keyproxy.audit_log",
        "SELECT * FROM keyproxy.foreign_hashes",
        "INSERT INTO keyproxy.changes (kind, subject) VALUES ('all', '')",
        "UPDATE keyproxy.migrations SET checksum = ''",
        "ALTER TABLE keyproxy.api_keys DISABLE TRIGGER ALL",
        "SET session_replication_role = replica",
        "UPDATE keyproxy.windows SET credited = 1",
        "INSERT INTO keyproxy.windows (pool_kind, measure, starts, credited) VALUES ('user', 'rate', 0, 1)",
        "INSERT INTO keyproxy.window_credits (id, window_id, amount, reason, actor) VALUES ('crd_', 1, 1, 'x', 'x')",
        "SELECT keyproxy.credit_window('user', 'u_42', false, 'tokens_per_day', '', 1, 1, 'x')",
        "UPDATE keyproxy.api_keys SET acts_for = 'tenant'",
        "INSERT INTO keyproxy.agents (user_id, id) VALUES ('u_42', 'a')",
        "UPDATE keyproxy.agents SET disabled_at = NULL",
        "DELETE FROM keyproxy.agents",
        "INSERT INTO keyproxy.agent_tokens (id) VALUES ('agt_0000000000000000000001')",
        "UPDATE keyproxy.agent_tokens SET revoked_at = NULL",
        "DELETE FROM keyproxy.agent_tokens",
        "UPDATE keyproxy.signing_keys SET jwk = '{}'",
        "DELETE FROM keyproxy.signing_keys",
        "INSERT INTO keyproxy.approvals (id) VALUES ('apr_0000000000000000000001')",
        "UPDATE keyproxy.approvals SET state = 'approved'",
        "DELETE FROM keyproxy.approvals",
        "SELECT * FROM keyproxy.released_claims",
        "INSERT INTO keyproxy.consents (id) VALUES ('cns_0000000000000000000001')",
        "UPDATE keyproxy.consents SET revoked_at = NULL",
        "DELETE FROM keyproxy.consents",
        "UPDATE keyproxy.events SET sent_at = now()",
        "DELETE FROM keyproxy.events",
        "DELETE FROM keyproxy.limit_alerts",
        "UPDATE keyproxy.limit_alerts SET delivered_at = now()",
        "CREATE TABLE keyproxy.mine (x int)",
        "CREATE OR REPLACE FUNCTION keyproxy.actor() RETURNS text LANGUAGE sql AS 'SELECT ''nobody''::text'",
    ],
)
async def test_proxies_can_change_neither_keys_nor_audit_rows_nor_the_schema(
    dsn: str, prefix: str, sql: Sql, statement: str
) -> None:
    await add_user(sql)
    await add_key(sql)
    client: Sql = await asyncpg.connect(as_role(dsn, f"{prefix}_proxy"))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await client.execute(statement)
    await client.close()


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO keyproxy.audit_log (actor, action, entity, entity_id) VALUES ('a', 'insert', 'key', 'x')",
        "UPDATE keyproxy.audit_log SET actor = 'nobody'",
        "DELETE FROM keyproxy.audit_log",
        "TRUNCATE keyproxy.audit_log",
        "ALTER TABLE keyproxy.audit_log DISABLE TRIGGER ALL",
        "TRUNCATE keyproxy.api_keys CASCADE",
        "DELETE FROM keyproxy.changes",
        "UPDATE keyproxy.windows SET spent = 0",
        "DROP SCHEMA keyproxy CASCADE",
        "SET session_replication_role = replica",
    ],
)
async def test_admin_side_can_change_neither_audit_rows_nor_the_ledger_nor_the_schema(
    dsn: str, prefix: str, statement: str
) -> None:
    client: Sql = await asyncpg.connect(as_role(dsn, f"{prefix}_admin"))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await client.execute(statement)
    await client.close()


async def test_admin_side_can_use_the_whole_directory_and_is_in_the_audit_log(as_admin: Database) -> None:
    directory = Directory(as_admin, KeyFormat(), Actor("ann", "desk"))
    await directory.plans.set("basic", {"requests_per_day": 1})
    await directory.tenants.create("acme", "", "basic")
    key = (await directory.users.create("u_42", "acme", KeyWish()))["key"]
    new = await directory.keys.rotate(key["id"], grace=timedelta(hours=1), expires_in=None)
    await directory.key_batches.issue([("u_42", KeyWish("many"))])
    await directory.leaked_keys.report_digest(hashlib.sha256(new["secret"].encode()).digest(), "found")
    assert [len(ids) async for ids in directory.key_batches.revoke(Revocation(user="u_42"), "all")] == [2]
    await directory.tenants.change("acme", {"plan": None, "disabled": True})
    await directory.tenants.delete("acme")
    await directory.plans.delete("basic")
    rows = (await directory.audit.export(None, 99, horizon=await directory.audit.horizon())).items
    assert {row["actor"] for row in rows} == {"ann"}
    assert len(rows) >= 10


async def test_proxies_claim_and_give_back_approvals_that_only_the_admin_side_decides(
    as_proxy: Database, as_admin: Database, sql: Sql
) -> None:
    await add_owner(sql)
    arguments = ("acme", "u_42", "key_1", None, "human", "pay", "{}", None)
    ids = (f"apr_{number:022d}" for number in range(9))

    async def claims(value: bytes) -> str:
        (row,) = await as_proxy.fetch("claim_approval", next(ids), bytes(32), *arguments, value, 900.0, 20)
        return str(row["outcome"])

    assert await claims(b"a" * 16) == "pending"
    decisions = Directory(as_admin, KeyFormat(), Actor("ann", "desk")).approvals
    await decisions.approve(f"apr_{0:022d}")
    assert await claims(b"b" * 16) == "used"
    assert (await as_proxy.fetch("release_approval", b"b" * 16, bytes(32)))[0]["outcome"] == "released"
    assert (await decisions.deny(f"apr_{0:022d}"))["state"] == "denied"
    with pytest.raises(StoreUnavailable, match="permission denied"):
        await as_admin.fetch("claim_approval", next(ids), bytes(32), *arguments, bytes(16), 900.0, 20)
    with pytest.raises(StoreUnavailable, match="permission denied"):
        await as_admin.fetch("release_approval", b"b" * 16, None)
    for database in (as_proxy, as_admin):
        assert (await database.fetch("tend_approvals", 10))[0]["is_more"] is False
    assert len(await as_proxy.fetch("consents_of_users", ["u_42"])) == 1
    assert len(await as_admin.fetch("claim_events", 9, timedelta(seconds=60), "approval.")) == 3


async def test_proxies_write_events_and_cannot_claim_them(as_proxy: Database, sql: Sql) -> None:
    async with as_proxy.transaction() as transaction:
        statement = "SELECT keyproxy.note_event('key.anomaly', '{}', now() + interval '1 day')"
        await transaction._connection.execute(statement)
    assert await sql.fetchval("SELECT kind FROM keyproxy.events") == "key.anomaly"
    with pytest.raises(StoreUnavailable, match="permission denied"):
        await as_proxy.fetch("claim_events", 9, timedelta(seconds=60), "key.")


async def test_public_claims_gives_back_and_deletes_nothing(sql: Sql) -> None:
    for function in ("claim_approval", "release_approval", "tend_approvals"):
        acl = await sql.fetchval(
            "SELECT proacl::text FROM pg_proc WHERE proname = $1 AND pronamespace = 'keyproxy'::regnamespace", function
        )
        assert acl is not None
        assert not acl.startswith("{=X")
        assert ",=X" not in acl


async def test_existing_roles_get_missing_privileges_and_lose_excess_ones(dsn: str, prefix: str, sql: Sql) -> None:
    proxy, admin, *_ = roles.names(prefix)
    await sql.execute(f'GRANT UPDATE (digest), DELETE ON keyproxy.api_keys TO "{proxy}"')
    await sql.execute(f'REVOKE SELECT ON keyproxy.api_keys FROM "{proxy}", "{admin}"')
    assert await asyncio.gather(*(roles.create(dsn, prefix) for _ in range(4))) == [[]] * 4
    rights = await sql.fetchrow(
        "SELECT has_table_privilege($1, 'keyproxy.api_keys', 'SELECT') AS reads,"
        " has_table_privilege($1, 'keyproxy.api_keys', 'DELETE') AS deletes,"
        " has_column_privilege($1, 'keyproxy.api_keys', 'last_used_at', 'UPDATE') AS notes,"
        " has_column_privilege($1, 'keyproxy.api_keys', 'digest', 'UPDATE') AS forges",
        proxy,
    )
    assert rights is not None
    assert dict(rights) == {"reads": True, "deletes": False, "notes": True, "forges": False}


@pytest.mark.parametrize("wrong", ["", "Two Words", 'x"; DROP SCHEMA keyproxy', "9", "a" * 42])
async def test_invalid_prefix_is_rejected(dsn: str, wrong: str) -> None:
    with pytest.raises(MigrationError, match="not a valid prefix for roles"):
        await roles.create(dsn, wrong)


async def test_roles_require_a_migrated_schema(empty_dsn: str) -> None:
    with pytest.raises(MigrationError, match="pending migrations"):
        await roles.create(empty_dsn, "kp_none")


async def test_proxies_claim_and_delete_charges_and_the_admin_side_cannot_read_them(
    as_proxy: Database, as_admin: Database
) -> None:
    claims = PostgresClaims(as_proxy)
    assert await claims.claim("p", 1, [claim(1, 12)]) == [Answer(True, 12)]
    assert await claims.cover([claim(1).fingerprint]) == {claim(1).fingerprint: Cover(12, 1)}
    assert await claims.forget(10) is False
    with pytest.raises(StoreUnavailable, match="permission denied"):
        await PostgresClaims(as_admin).cover([claim(1).fingerprint])
    with pytest.raises(StoreUnavailable, match="permission denied"):
        await PostgresClaims(as_admin).claim("p", 2, [claim(1)])


async def test_proxies_account_and_write_alerts_and_the_admin_side_credits_and_sends_them(
    as_proxy: Database, as_admin: Database
) -> None:
    ledger = PostgresLedger(as_proxy, lease_seconds=LEASE_SECONDS, alert_percentages=(80, 100))
    await ledger.sync("a", 1, [line(want=10)])
    await ledger.sync("a", 2, [line(granted=10, used=9, returned=1)])
    await ledger.end("a")
    await as_proxy.fetch("forget_windows", 0, 100)
    assert (await credit(as_admin, window(), 10, 5))["credited"] == 5
    (alert,) = await as_admin.fetch("claim_alerts", 9, timedelta(seconds=60))
    assert (alert["percentage"], alert["spent"]) == (80, 9)
    await as_admin.fetch("alert_failed", alert["message_id"], 1, "no", timedelta(0))
    await as_admin.fetch("alert_delivered", alert["message_id"])
    assert (await as_admin.fetch("count_alerts_waiting"))[0]["waiting"] == 0
    (state,) = await PostgresLedger(as_admin, lease_seconds=LEASE_SECONDS).windows([window()])
    assert state is not None
    assert (state.spent, state.credited) == (9, 5)
    with pytest.raises(StoreUnavailable, match="permission denied"):
        await as_proxy.fetch("claim_alerts", 9, timedelta(seconds=60))


async def test_proxies_write_and_delete_usage_and_the_admin_side_reads_it(
    as_proxy: Database, as_admin: Database, sql: Sql
) -> None:
    journal = UsageJournal(as_proxy, Usage(), Clock(), settle_seconds=0.5)
    journal.take(rows(ended(fakes.identity())))
    await journal.flush()
    await sql.execute(
        "CREATE TABLE keyproxy.usage_event_batches_20200101 PARTITION OF keyproxy.usage_event_batches"
        " FOR VALUES FROM ('2020-01-01') TO ('2020-01-02')"
    )
    await journal.tend()
    assert not await sql.fetchval("SELECT to_regclass('keyproxy.usage_event_batches_20200101') IS NOT NULL")
    reader = UsageReader(as_admin)
    assert [row["requests"] for row in await reader.sums(UsageFilter(), ["user"], 10)] == [1]
    assert [event["user"] async for event in reader.events(UsageFilter())] == ["u_42"]
    with pytest.raises(StoreUnavailable, match="permission denied"):
        await as_admin.fetch("record_usage", "x", 1, *(["{}"] * 16), None)


async def test_proxies_learn_habits_and_suspend_keys_by_functions_and_resume_none(
    as_proxy: Database, prefix: str, dsn: str, sql: Sql
) -> None:
    await add_user(sql)
    await add_key(sql)
    journal = SignalJournal(as_proxy)
    journal.terms = AnomalySettings(watch=["new_model"], suspend=["new_model"])
    known: set[bytes] = set()
    journal.learn(Habit("key_1", "new_model", b"gpt-4o", None, known))
    journal.report(Signal("new_model", "key_1", "", "o3", None, {}, may_suspend=True))
    await journal.flush()
    assert await journal.tend() is False
    assert (known, journal.reported["new_model"], journal.dropped) == ({b"gpt-4o"}, 1, 0)
    assert await sql.fetchval("SELECT suspended_at IS NOT NULL FROM keyproxy.api_keys") is True
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.events WHERE kind LIKE 'key.%'") == 2
    client: Sql = await asyncpg.connect(as_role(dsn, f"{prefix}_proxy"))
    for statement in (
        "UPDATE keyproxy.api_keys SET suspended_at = NULL",
        "UPDATE keyproxy.key_habits SET first_seen_at = now()",
        "DELETE FROM keyproxy.key_habits",
        "DELETE FROM keyproxy.key_suspensions",
        "INSERT INTO keyproxy.anomalies VALUES ('burst', 'key_1', '', now())",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await client.execute(statement)
    await client.close()
