"""Templates in memory: any SQL client's change is effective within a second, an outage does not lose them."""

from __future__ import annotations

import asyncio
import json
import time

import asyncpg
import pytest

from keyproxy.config.schema import Cache
from keyproxy.platform import clock
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.postgres.database import StoreUnavailable
from tests.store.conftest import MakeRig
from tests.store.harness import Rig, Sql, add_key, add_template, add_tenant, add_user, change_rows
from tests.waiting import until

ONE, TWO, THREE = (bytes([number]) * 32 for number in (1, 2, 3))

#: A change takes effect within a second. Tests wait longer on a busy machine and measure separately.
SECONDS = 1.0


def found(rig: Rig, digest: bytes, tenant: str = "acme") -> str | Reason | None:
    try:
        return rig.templates.category(digest, tenant, clock.now())
    except Refusal as refusal:
        return refusal.reason


async def effective(rig: Rig, digest: bytes, category: str | None) -> float:
    """Wait until a digest has a category; return the time that it took."""
    began = time.monotonic()
    await until(lambda: found(rig, digest) == category, f"{digest[:1]!r} is {category}")
    return time.monotonic() - began


@pytest.mark.parametrize("listener", ["real", None])
async def test_template_change_by_any_sql_client_is_effective_within_a_second(
    make_rig: MakeRig, sql: Sql, listener: str | None
) -> None:
    rig = await make_rig(listener=listener, now=clock.now)
    for tenant in ("acme", "other"):
        await add_tenant(sql, tenant)
    await add_template(sql, ONE, "code")
    rig.templates.start()
    rig.feed.start()
    await effective(rig, ONE, "code")
    if listener is not None:
        await until(lambda: rig.feed.is_listening, "the feed listens")
    statements = [
        (f"INSERT INTO keyproxy.prompt_templates VALUES ('\\x{TWO.hex()}', 'chat')", TWO, "chat"),
        (f"UPDATE keyproxy.prompt_templates SET category = 'x' WHERE digest = '\\x{ONE.hex()}'", ONE, "x"),
        (f"UPDATE keyproxy.prompt_templates SET tenant_id = 'other' WHERE digest = '\\x{TWO.hex()}'", TWO, None),
        (
            f"UPDATE keyproxy.prompt_templates SET digest = '\\x{THREE.hex()}' WHERE digest = '\\x{ONE.hex()}'",
            ONE,
            None,
        ),
        ("SELECT", THREE, "x"),
        ("UPDATE keyproxy.prompt_templates SET tenant_id = 'acme'", TWO, "chat"),
        ("DELETE FROM keyproxy.tenants WHERE id = 'acme'", TWO, None),
        (f"INSERT INTO keyproxy.prompt_templates VALUES ('\\x{ONE.hex()}', 'code')", ONE, "code"),
        ("TRUNCATE keyproxy.prompt_templates", ONE, None),
    ]
    for statement, digest, category in statements:
        await sql.execute(statement)
        assert await effective(rig, digest, category) < SECONDS, statement


async def test_renamed_tenant_keeps_its_templates(rig: Rig, sql: Sql) -> None:
    await add_tenant(sql)
    await add_template(sql, ONE, "code", "acme")
    await sql.execute("UPDATE keyproxy.tenants SET id = 'acme2' WHERE id = 'acme'")
    await rig.feed.poll()
    await rig.templates.read()
    now = rig.clock()
    assert rig.templates.category(ONE, "acme2", now) == "code"
    assert rig.templates.category(ONE, "acme", now) is None


async def test_template_change_does_not_disturb_cached_identities(rig: Rig, sql: Sql) -> None:
    await add_user(sql)
    secret = await add_key(sql, 1)
    await rig.feed.poll()
    await rig.resolve(secret)
    for statement in (
        f"INSERT INTO keyproxy.prompt_templates VALUES ('\\x{ONE.hex()}', 'code')",
        "DELETE FROM keyproxy.prompt_templates",
        "TRUNCATE keyproxy.prompt_templates",
    ):
        await sql.execute(statement)
        await rig.feed.poll()
        assert rig.is_served(secret), statement


async def test_change_during_an_outage_is_effective_after_it_and_recovery_needs_no_restart(
    make_rig: MakeRig, sql: Sql
) -> None:
    rig = await make_rig(listener="real", now=clock.now, cache=Cache(fresh_seconds=0.2, stale_seconds=3.0))
    await add_template(sql, ONE, "code")
    await add_template(sql, TWO, "chat")
    rig.templates.start()
    rig.feed.start()
    await effective(rig, ONE, "code")
    await rig.relay.cut()
    await sql.execute("UPDATE keyproxy.prompt_templates SET category = 'changed' WHERE category = 'code'")
    await until(lambda: rig.door.is_down, "the outage is noticed")
    assert (found(rig, ONE), found(rig, TWO), found(rig, THREE)) == ("code", "chat", None)
    await until(lambda: found(rig, ONE) is Reason.STORE_UNAVAILABLE, "the templates are too old")
    assert found(rig, THREE) is Reason.STORE_UNAVAILABLE
    await rig.relay.mend()
    await effective(rig, ONE, "changed")
    assert (found(rig, TWO), found(rig, THREE)) == ("chat", None)


async def test_changed_template_that_cannot_be_read_is_unavailable_and_others_are_served(rig: Rig, sql: Sql) -> None:
    for digest in (ONE, TWO):
        await add_template(sql, digest, "code")
    await rig.feed.poll()
    await rig.templates.read()
    await sql.execute("DELETE FROM keyproxy.prompt_templates WHERE digest = $1", ONE)
    await rig.feed.poll()
    await rig.relay.cut()
    with pytest.raises(StoreUnavailable):
        await rig.templates.read()
    with pytest.raises(Refusal) as error:
        rig.templates.category(ONE, "acme", rig.clock())
    assert error.value.reason is Reason.STORE_UNAVAILABLE
    assert rig.templates.category(TWO, "acme", rig.clock()) == "code"
    await rig.relay.mend()
    await rig.templates.read()
    assert rig.templates.category(ONE, "acme", rig.clock()) is None


async def test_emptied_table_that_cannot_be_read_leaves_no_template_served(rig: Rig, sql: Sql) -> None:
    await add_template(sql, ONE, "code")
    await rig.templates.read()
    await sql.execute("TRUNCATE keyproxy.prompt_templates")
    await rig.feed.poll()
    await rig.relay.cut()
    with pytest.raises(Refusal) as error:
        rig.templates.category(ONE, "acme", rig.clock())
    assert error.value.reason is Reason.STORE_UNAVAILABLE
    await rig.relay.mend()
    await rig.templates.read()
    assert rig.templates.category(ONE, "acme", rig.clock()) is None


async def test_many_changes_at_once_are_effective(rig: Rig, sql: Sql) -> None:
    await rig.templates.read()
    await sql.execute(
        "INSERT INTO keyproxy.prompt_templates"
        " SELECT sha256(number::text::bytea), 'code' FROM generate_series(1, 600) AS number"
    )
    await rig.feed.poll()
    await rig.templates.read()
    assert len(rig.templates) == 600


async def test_a_change_while_templates_are_read_is_read_again(rig: Rig, sql: Sql) -> None:
    await add_template(sql, ONE, "code")
    await rig.feed.poll()
    reading = asyncio.create_task(rig.templates.read())
    await asyncio.sleep(0)
    rig.templates.forget_all()
    await reading
    # What was read is from before all changed.
    with pytest.raises(Refusal):
        rig.templates.category(ONE, "acme", rig.clock())
    await rig.templates.read()
    assert rig.templates.category(ONE, "acme", rig.clock()) == "code"


# -- the table


async def test_there_are_at_most_10_000_templates(sql: Sql) -> None:
    insert = (
        "INSERT INTO keyproxy.prompt_templates"
        " SELECT sha256(number::text::bytea), 'code' FROM generate_series($1::int, $2::int) AS number"
    )
    await sql.execute(insert, 1, 9_999)
    with pytest.raises(asyncpg.CheckViolationError) as error:
        await sql.execute(insert, 10_000, 10_001)
    assert getattr(error.value, "constraint_name", "") == "prompt_templates_bound"
    await sql.execute(insert, 10_000, 10_000)
    with pytest.raises(asyncpg.CheckViolationError):
        await sql.execute(insert, 10_001, 10_001)
    await sql.execute("UPDATE keyproxy.prompt_templates SET category = 'chat' WHERE digest = sha256('1')")
    await sql.execute("DELETE FROM keyproxy.prompt_templates WHERE digest = sha256('1')")
    await sql.execute(insert, 10_001, 10_001)


async def test_two_transactions_cannot_exceed_the_bound_together(dsn: str, sql: Sql) -> None:
    # Without the trigger, which counts all rows at each insert.
    await sql.execute("SET session_replication_role = replica")
    await sql.execute(
        "INSERT INTO keyproxy.prompt_templates"
        " SELECT sha256(number::text::bytea), 'code' FROM generate_series(1, 9999) AS number"
    )
    await sql.execute("RESET session_replication_role")
    other = await asyncpg.connect(dsn)
    try:
        transaction = sql.transaction()
        await transaction.start()
        await add_template(sql, ONE)
        second = asyncio.create_task(
            other.execute("INSERT INTO keyproxy.prompt_templates VALUES ($1, 'code')", TWO)
        )  # fmt: skip
        done, _ = await asyncio.wait([second], timeout=0.2)
        assert not done
        await transaction.commit()
        with pytest.raises(asyncpg.CheckViolationError):
            await second
    finally:
        await other.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("digest", "'\\x00'"), ("category", "'Code'"), ("category", "'1code'"), ("category", "'a b'"),
        ("category", "''"), ("category", "NULL"), ("tenant_id", "'nowhere'"), ("name", "repeat('a', 201)"),
        ("name", "NULL"),
    ],
)  # fmt: skip
async def test_invalid_template_is_refused_by_the_table(sql: Sql, column: str, value: str) -> None:
    await add_template(sql, ONE)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await sql.execute(f"UPDATE keyproxy.prompt_templates SET {column} = {value}")


async def test_every_change_of_a_template_is_in_the_audit_log_with_its_digest_and_tenant(sql: Sql) -> None:
    await add_tenant(sql)
    await add_template(sql, ONE, "code", "acme")
    await sql.execute("UPDATE keyproxy.prompt_templates SET category = 'chat'")
    await sql.execute("UPDATE keyproxy.prompt_templates SET category = 'chat'")
    await sql.execute("DELETE FROM keyproxy.prompt_templates")
    await sql.execute("TRUNCATE keyproxy.prompt_templates")
    rows = await sql.fetch(
        "SELECT action, entity_id, tenant_id, before, after FROM keyproxy.audit_log WHERE entity = 'template' ORDER BY id"
    )
    assert [(row["action"], row["entity_id"], row["tenant_id"]) for row in rows] == [
        ("insert", ONE.hex(), "acme"),
        ("update", ONE.hex(), "acme"),
        ("delete", ONE.hex(), "acme"),
        ("truncate", "*", None),
    ]
    before, after = json.loads(rows[1]["before"]), json.loads(rows[1]["after"])
    assert (before["category"], after["category"], after["digest"]) == ("code", "chat", ONE.hex())


async def test_change_of_a_name_alone_is_not_in_the_feed(sql: Sql) -> None:
    await add_template(sql, ONE)
    before = await change_rows(sql)
    await sql.execute("UPDATE keyproxy.prompt_templates SET name = 'Support bot'")
    assert await change_rows(sql) == before
    await sql.execute("UPDATE keyproxy.prompt_templates SET category = 'chat'")
    assert await change_rows(sql) != before
