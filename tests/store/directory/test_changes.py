"""Plans, disabling, versions, directories bound to one tenant, and reading the audit log."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from keyproxy.auth.api_key import KeyFormat
from keyproxy.limits.limit_text import parse_limit
from keyproxy.limits.plans.plan_changes import change_to, removal_of
from keyproxy.store.directory.directory import (
    Actor,
    AuditFilter,
    Conflict,
    Directory,
    DirectoryError,
    Invalid,
    KeyFilter,
    KeyWish,
    NotFound,
    Outdated,
    Revocation,
    etag,
)
from keyproxy.store.postgres.database import Database
from tests.store.harness import Rig, Sql, audit_rows, change_rows

FORMAT = KeyFormat()
ANN = Actor("ann", "desk")


@pytest.fixture
async def directory(database: Database) -> Directory:
    """The directory, with a tenant, a user without keys, and a plan."""
    directory = Directory(database, FORMAT, ANN)
    await directory.tenants.create("acme", "Acme Inc.")
    await directory.users.create("u_42", "acme", None)
    await directory.plans.set("basic", {"requests_per_day": 5})
    return directory


# -- plans


async def test_setting_a_plan_replaces_all_its_limits(directory: Directory) -> None:
    made = await directory.plans.set("big", {"rate": 50, "burst": 100})
    assert (made["id"], made["limits"], made["created"]) == ("big", {"rate": 50.0, "burst": 100}, True)
    again = await directory.plans.set("big", {"tokens_per_day": 7})
    assert (again["limits"], again["created"]) == ({"tokens_per_day": 7}, False)
    assert [plan["id"] for plan in await directory.plans.list_by_id("", 9)] == ["basic", "big"]
    assert await directory.plans.list_by_id("big", 9) == []
    assert await directory.plans.delete("big") == {"id": "big", "deleted": True}
    with pytest.raises(NotFound, match="there is no plan 'big'"):
        await directory.plans.get("big")


@pytest.mark.parametrize("text", ["spend/month=5", "tokens/day@model:m=9", "token-rate=100/min", "requests/hour=3"])
async def test_a_plan_is_stored_as_an_array_only_as_long_as_it_has_a_limit_that_the_object_cannot_express(
    directory: Directory, sql: Sql, text: str
) -> None:
    arrays = "SELECT id FROM keyproxy.plans WHERE jsonb_typeof(limits) = 'array'"  # as in docs/operations.md
    assert await sql.fetch(arrays) == []
    name, limit = parse_limit(text)
    assert limit is not None
    await directory.plans.change("basic", [change_to(limit)])
    assert [row["id"] for row in await sql.fetch(arrays)] == ["basic"]
    await directory.plans.change("basic", [removal_of(name)])
    assert await sql.fetch(arrays) == []
    assert (await directory.plans.get("basic"))["limits"] == {"requests_per_day": 5}


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [({"rat": 1}, "there is no such limit"), ({"burst": 1}, "nothing without a rate"), ("rate", "an object")],
)
async def test_invalid_limits_are_refused(directory: Directory, limits: object, sentence: str) -> None:
    with pytest.raises(Invalid, match=sentence):
        await directory.plans.set("basic", limits)
    assert (await directory.plans.get("basic"))["limits"] == {"requests_per_day": 5}


async def test_assigned_plan_cannot_be_deleted_and_the_error_counts_its_owners(directory: Directory) -> None:
    await directory.tenants.change("acme", {"plan": "basic", "test_plan": "basic"})
    await directory.users.change("u_42", {"test_plan": "basic"})
    key = await directory.keys.issue("u_42", KeyWish(plan="basic"))
    with pytest.raises(Conflict, match="plan 'basic' is assigned to 1 tenant and 1 user and 1 key"):
        await directory.plans.delete("basic")
    await directory.tenants.change("acme", {"plan": None, "test_plan": None})
    await directory.users.change("u_42", {"test_plan": None})
    await directory.keys.change(key["id"], {"plan": None})
    await directory.plans.delete("basic")


async def test_plan_is_assigned_and_removed_and_other_fields_stay(directory: Directory) -> None:
    await directory.tenants.change("acme", {"plan": "basic"})
    tenant = await directory.tenants.change("acme", {"name": "Other"})
    assert (tenant["plan"], tenant["test_plan"], tenant["name"]) == ("basic", None, "Other")
    user = await directory.users.change("u_42", {"test_plan": "basic"})
    assert (user["plan"], user["test_plan"]) == (None, "basic")
    key = await directory.keys.issue("u_42", KeyWish())
    assert (await directory.keys.change(key["id"], {"plan": "basic", "name": "n"}))["plan"] == "basic"
    assert (await directory.keys.change(key["id"], {"plan": None}))["name"] == "n"


async def test_unknown_plan_cannot_be_assigned(directory: Directory) -> None:
    key = await directory.keys.issue("u_42", KeyWish())
    for call in (
        directory.tenants.change("acme", {"plan": "gold"}), directory.users.change("u_42", {"test_plan": "gold"}),
        directory.keys.change(key["id"], {"plan": "gold"}), directory.keys.issue("u_42", KeyWish(plan="gold")),
        directory.tenants.create("other", "", "gold"), directory.users.create("u_1", "acme", None, plan="gold"),
        directory.users.create("u_2", "acme", KeyWish(plan="gold")),
        directory.key_batches.issue([("u_42", KeyWish("n", plan="gold"))]),
    ):  # fmt: skip
        with pytest.raises(NotFound, match="there is no plan 'gold'"):
            await call
    assert len(await directory.users.list_by_id("", 9, None)) == 1


async def test_entity_that_is_created_with_a_plan_has_it(directory: Directory) -> None:
    assert (await directory.tenants.create("other", "", "basic"))["plan"] == "basic"
    user = await directory.users.create("u_1", "acme", KeyWish(), plan="basic")
    assert (user["plan"], user["key"]["plan"]) == ("basic", None)
    assert (await directory.keys.issue("u_1", KeyWish(plan="basic")))["plan"] == "basic"


# -- disabled and enabled


@pytest.mark.parametrize("kind", ["tenant", "user"])
async def test_disabled_at_is_the_first_time_until_enabled_again(rig: Rig, kind: str) -> None:
    directory = Directory(rig.door, FORMAT, ANN)
    await directory.tenants.create("acme", "")
    key = (await directory.users.create("u_42", "acme", KeyWish()))["key"]
    change, name = (directory.tenants.change, "acme") if kind == "tenant" else (directory.users.change, "u_42")
    first = await change(name, {"disabled": True})
    assert first["disabled_at"] is not None
    assert (await directory.keys.get(key["id"]))["state"] == "disabled"
    before = await audit_rows(rig.sql), await change_rows(rig.sql)
    assert await change(name, {"disabled": True}) == first
    assert (await audit_rows(rig.sql), await change_rows(rig.sql)) == before
    assert (await change(name, {"disabled": False}))["disabled_at"] is None
    assert (await directory.keys.get(key["id"]))["state"] == "active"


@pytest.mark.parametrize("changes", [{"id": "x"}, {"name": "x", "created_at": "2020-01-01"}])
async def test_error_names_the_field_that_cannot_be_changed(directory: Directory, changes: dict[str, object]) -> None:
    with pytest.raises(Invalid, match="of a tenant cannot be changed; disabled, name, plan, roles, test_plan can"):
        await directory.tenants.change("acme", changes)


# -- versions


async def test_change_based_on_an_older_version_is_refused_and_changes_nothing(directory: Directory, sql: Sql) -> None:
    tenant, user = await directory.tenants.get("acme"), await directory.users.get("u_42")
    key, plan = await directory.keys.issue("u_42", KeyWish()), await directory.plans.get("basic")
    versions = {kind: etag(thing) for kind, thing in (("tenant", tenant), ("user", user), ("key", key), ("plan", plan))}
    await directory.tenants.change("acme", {"name": "x"}, if_match=versions["tenant"])
    await directory.users.change("u_42", {"plan": "basic"}, if_match=versions["user"])
    await directory.keys.change(key["id"], {"name": "x"}, if_match=versions["key"])
    await directory.plans.set("basic", {}, if_match=versions["plan"])
    before = await audit_rows(sql)
    for call in (
        directory.tenants.change("acme", {"name": "y"}, if_match=versions["tenant"]),
        directory.tenants.delete("acme", if_match=versions["tenant"]),
        directory.users.change("u_42", {"plan": None}, if_match=versions["user"]),
        directory.users.delete("u_42", if_match=versions["user"]),
        directory.keys.change(key["id"], {"name": "y"}, if_match=versions["key"]),
        directory.keys.revoke(key["id"], "", if_match=versions["key"]),
        directory.keys.delete(key["id"], if_match=versions["key"]),
        directory.keys.rotate(key["id"], grace=timedelta(), expires_in=None, if_match=versions["key"]),
        directory.plans.set("basic", {"burst": 1, "rate": 1}, if_match=versions["plan"]),
        directory.plans.delete("basic", if_match=versions["plan"]),
    ):  # fmt: skip
        with pytest.raises(Outdated, match="has changed since it was read"):
            await call
    assert await audit_rows(sql) == before


async def test_of_two_concurrent_changes_of_one_version_one_succeeds(directory: Directory) -> None:
    version = etag(await directory.tenants.get("acme"))
    result = await asyncio.gather(
        *(directory.tenants.change("acme", {"name": f"n_{number}"}, if_match=version) for number in range(8)),
        return_exceptions=True,
    )
    assert sum(isinstance(one, Outdated) for one in result) == 7


async def test_use_does_not_change_the_version_of_a_key(directory: Directory, sql: Sql) -> None:
    key = await directory.keys.issue("u_42", KeyWish())
    await sql.execute("UPDATE keyproxy.api_keys SET last_used_at = now()")
    assert etag(await directory.keys.get(key["id"])) == etag(key)


# -- directories bound to one tenant


@pytest.fixture
async def bound(database: Database, directory: Directory) -> Directory:
    """A directory bound to tenant acme, in a store with another tenant."""
    await directory.tenants.create("other", "")
    await directory.users.create("u_other", "other", KeyWish())
    return Directory(database, FORMAT, ANN, tenant_id="acme")


async def test_bound_directory_sees_and_changes_only_its_tenant(
    directory: Directory, bound: Directory, sql: Sql
) -> None:
    (theirs,) = await directory.keys.list_by_id("", 9, KeyFilter(tenant="other"))
    digest = await sql.fetchval("SELECT digest FROM keyproxy.api_keys WHERE id = $1", theirs["id"])
    before = await audit_rows(sql)
    wish, key = KeyWish(), theirs["id"]
    for call in (
        bound.tenants.get("other"),
        bound.tenants.change("other", {"name": "x"}), bound.users.create("u_9", "other", wish),
        bound.users.get("u_other"), bound.users.change("u_other", {"disabled": True}), bound.users.delete("u_other"),
        bound.keys.issue("u_other", wish), bound.key_batches.issue([("u_other", wish)]), bound.keys.get(key),
        bound.keys.change(key, {"name": "x"}), bound.keys.revoke(key, ""), bound.keys.delete(key),
        bound.keys.rotate(key, grace=timedelta(), expires_in=None),
        bound.key_batches.count_to_revoke(Revocation(user="u_other")),
        bound.key_batches.count_to_revoke(Revocation(tenant="other")),
    ):  # fmt: skip
        with pytest.raises(NotFound, match="there is no"):
            await call
    for refused in (
        bound.tenants.create("third", ""), bound.tenants.delete("acme"), bound.tenants.delete("other"),
        bound.plans.set("p", {}), bound.plans.delete("basic"), bound.users.create("u_other", "acme", wish),
    ):  # fmt: skip
        with pytest.raises(Conflict):
            await refused
    assert (await bound.leaked_keys.report_digest(digest, ""))["known"] is False
    assert await audit_rows(sql) == before
    assert [one["id"] for one in await bound.tenants.list_by_id("", 9)] == ["acme"]
    assert [one["id"] for one in await bound.users.list_by_id("", 9, None)] == ["u_42"]
    assert await bound.users.list_by_id("", 9, "other") == []
    assert await bound.keys.list_by_id("", 9) == []
    assert await bound.keys.list_by_id("", 9, KeyFilter(tenant="other")) == []
    assert (await bound.keys.list_by_time("created", None, 9, KeyFilter(user="u_other"))).items == []
    assert {row["tenant"] for row in (await bound.audit.list_newest(None, 99)).items} == {"acme"}
    assert (await bound.audit.list_newest(None, 99, AuditFilter(tenant="other"))).items == []


async def test_bound_directory_revokes_no_key_of_other_tenants_in_bulk(directory: Directory, bound: Directory) -> None:
    mine = await bound.keys.issue("u_42", KeyWish())
    wanted = Revocation(unused_for=timedelta())
    assert await bound.key_batches.count_to_revoke(wanted) == 1
    assert [ids async for ids in bound.key_batches.revoke(wanted, "all")] == [[mine["id"]]]
    assert (await directory.keys.list_by_id("", 9, KeyFilter(tenant="other")))[0]["state"] == "active"


async def test_bound_directory_can_do_everything_within_its_tenant(bound: Directory) -> None:
    made = await bound.users.create("u_1", "acme", KeyWish())
    key = await bound.keys.rotate(made["key"]["id"], grace=timedelta(hours=1), expires_in=None)
    assert (await bound.keys.revoke(key["id"], "x"))["state"] == "revoked"
    assert (await bound.users.change("u_1", {"disabled": True, "plan": "basic"}))["plan"] == "basic"
    assert (await bound.tenants.change("acme", {"name": "x"}))["name"] == "x"
    await bound.users.delete("u_1")


# -- the audit log


async def test_the_audit_log_is_read_newest_first_in_pages_and_filtered(
    directory: Directory, database: Database
) -> None:
    await Directory(database, FORMAT, Actor("ben", "phone")).tenants.change("acme", {"name": "x"})
    page = await directory.audit.list_newest(None, 3)
    assert [(row["actor"], row["origin"], row["action"], row["entity"]) for row in page.items] == [
        ("ben", "phone", "update", "tenant"),
        ("ann", "desk", "insert", "plan"),
        ("ann", "desk", "insert", "user"),
    ]
    assert {row["db_role"] for row in page.items} == {"keyproxy"}
    assert page.items[0]["changed"] == ["name"]
    assert (page.items[0]["before"]["name"], page.items[0]["after"]["name"]) == ("Acme Inc.", "x")
    rest = await directory.audit.list_newest(page.next, 3)
    assert [(row["entity"], row["action"]) for row in rest.items] == [("tenant", "insert")]
    assert rest.next is None
    hour = timedelta(hours=1)
    for wanted, count in (
        (AuditFilter(actor="ben"), 1), (AuditFilter(entity="tenant"), 2), (AuditFilter(entity_id="u_42"), 1),
        (AuditFilter(action="insert"), 3), (AuditFilter(tenant="acme"), 3), (AuditFilter(tenant="nobody"), 0),
        (AuditFilter(since=datetime.now(UTC) - hour), 4), (AuditFilter(until=datetime.now(UTC) - hour), 0),
        (AuditFilter(db_role="keyproxy"), 4), (AuditFilter(db_role="app"), 0),
    ):  # fmt: skip
        assert len((await directory.audit.list_newest(None, 99, wanted)).items) == count


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "9" * 30, ""])
async def test_invalid_cursor_is_refused(directory: Directory, cursor: str) -> None:
    for call in (directory.audit.list_newest(cursor, 1), directory.keys.list_by_time("used", cursor, 1)):
        with pytest.raises(DirectoryError, match="invalid cursor"):
            await call


async def test_export_of_the_audit_log_waits_for_open_transactions_and_misses_nothing(
    directory: Directory, dsn: str, sql: Sql
) -> None:
    late: Sql = await asyncpg.connect(dsn)
    transaction = late.transaction()
    await transaction.start()
    # It has its serial number already, but is not visible yet.
    await late.execute("INSERT INTO keyproxy.tenants (id) VALUES ('late')")
    await sql.execute("INSERT INTO keyproxy.tenants (id) VALUES ('early')")
    with pytest.raises(Conflict, match="still open"):
        await directory.audit.horizon(seconds=0.0)
    horizon = asyncio.create_task(directory.audit.horizon())
    await transaction.commit()
    rows, cursor = [], None
    while (page := await directory.audit.export(cursor, 2, horizon=await horizon)).items:
        rows += page.items
        cursor = str(page.items[-1]["id"])
    assert [row["entity_id"] for row in rows] == ["acme", "u_42", "basic", "late", "early"]
    await directory.tenants.change("late", {"name": "x"})
    page = await directory.audit.export(cursor, 9, horizon=await directory.audit.horizon())
    assert [row["entity_id"] for row in page.items] == ["late"]
    await late.close()
