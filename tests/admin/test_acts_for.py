"""Keys that act for users of their tenant: the directory and the admin API give the same results."""

from __future__ import annotations

from datetime import timedelta

import pytest

from keyproxy.store.directory.directory import Entity, Invalid, KeyWish
from keyproxy.store.directory.import_keys import read_key, read_wish
from tests.admin.conftest import Api
from tests.admin.test_roles import Operations, operations

__all__ = ["operations"]

NO_PLAN = (
    "a key that acts for users of tenant 'acme' has no plan, and neither has the tenant: nothing bounds its use over all"
    " users together; see `key set-plan` and `tenant set-plan`"
)


def _about_acting(warnings: list[str]) -> list[str]:
    return [warning for warning in warnings if "acts for" in warning]


async def test_a_key_acts_for_no_user_unless_it_is_issued_so_or_changed(operations: Operations) -> None:
    keys = operations.directory.keys
    plain = await keys.issue("u_1", KeyWish())
    acting = await keys.issue("u_1", KeyWish(acts_for="tenant"))
    assert (plain["acts_for"], acting["acts_for"]) == ("none", "tenant")
    assert (await keys.get(acting["id"]))["acts_for"] == "tenant"
    listed = {key["id"]: key["acts_for"] for key in await keys.list_by_id("", 10)}
    assert listed == {plain["id"]: "none", acting["id"]: "tenant"}
    by_time = (await keys.list_by_time("created", None, 10)).items
    assert {key["id"]: key["acts_for"] for key in by_time} == listed
    assert (await keys.change(plain["id"], {"acts_for": "tenant"}))["acts_for"] == "tenant"
    assert (await keys.change(plain["id"], {"name": "n"}))["acts_for"] == "tenant"
    assert (await keys.change(plain["id"], {"acts_for": "none"}))["acts_for"] == "none"


async def test_the_new_key_of_a_rotation_acts_as_the_old_one(operations: Operations) -> None:
    directory = operations.directory
    await directory.roles.set("reader", ["a"])
    key = await directory.keys.issue("u_1", KeyWish(acts_for="tenant", roles=("reader",)))
    new = await directory.keys.rotate(key["id"], grace=timedelta(hours=1), expires_in=timedelta(days=1))
    assert (new["acts_for"], new["roles"]) == ("tenant", ["reader"])


async def test_many_keys_are_issued_and_imported_with_acts_for(operations: Operations) -> None:
    directory = operations.directory
    wishes = [read_wish({"user": "u_1", "name": name, "acts_for": value}, {}) for name, value in
              (("plain", None), ("acting", "tenant"))]  # fmt: skip
    issued = await directory.key_batches.issue(wishes)
    assert [key["acts_for"] for key in issued] == ["none", "tenant"]
    rows = [
        {"user": "u_1", "digest": "01" * 32, "id": "key_1"},
        {"user": "u_1", "digest": "02" * 32, "id": "key_2", "acts_for": "tenant"},
    ]
    report = await directory.key_importer.run([read_key("1", row, {}) for row in rows], dry_run=False)
    assert (report.imported, report.problems) == (2, [])
    assert [(await directory.keys.get(f"key_{number}"))["acts_for"] for number in (1, 2)] == ["none", "tenant"]


async def test_an_unused_key_is_issued_again_only_if_it_acts_as_wished(operations: Operations) -> None:
    batches = operations.directory.key_batches
    (first,) = await batches.issue([("u_1", KeyWish("n", acts_for="tenant"))])
    (kept,) = await batches.issue([("u_1", KeyWish("n"))], reissue_unseen=True)
    assert kept["created"] is False
    (again,) = await batches.issue([("u_1", KeyWish("n", acts_for="tenant"))], reissue_unseen=True)
    assert (again["created"], again["reissues"]) == (True, first["id"])


@pytest.mark.parametrize("value", ["all", "TENANT", "u_2"])
def test_a_row_with_another_value_of_acts_for_is_refused(value: str) -> None:
    with pytest.raises(Invalid, match="acts_for is none or tenant"):
        read_wish({"user": "u_1", "acts_for": value}, {})
    with pytest.raises(Invalid, match="acts_for is none or tenant"):
        read_key("1", {"user": "u_1", "digest": "01" * 32, "acts_for": value}, {})


async def test_another_value_of_acts_for_is_refused(operations: Operations) -> None:
    key = await operations.directory.keys.issue("u_1", KeyWish())
    with pytest.raises(Invalid):
        await operations.directory.keys.change(key["id"], {"acts_for": "all"})
    with pytest.raises(Invalid):
        await operations.directory.keys.issue("u_1", KeyWish(acts_for="all"))


@pytest.mark.parametrize(
    ("of_key", "of_tenant", "is_test", "warns"),
    [
        (None, {}, False, True),
        (None, {}, True, True),
        ("basic", {}, False, False),
        (None, {"plan": "basic"}, False, False),
        (None, {"plan": "basic"}, True, False),
        (None, {"test_plan": "basic"}, False, True),
        (None, {"test_plan": "basic"}, True, False),
    ],
)
async def test_a_key_that_acts_without_any_plan_over_all_users_is_warned_of(
    operations: Operations, of_key: str | None, of_tenant: Entity, is_test: bool, warns: bool
) -> None:
    directory = operations.directory
    await directory.plans.set("basic", {"concurrency": 1})
    await directory.tenants.change("acme", of_tenant)
    expected = [NO_PLAN] if warns else []
    operations.warnings()
    key = await directory.keys.issue("u_1", KeyWish(acts_for="tenant", plan=of_key, is_test=is_test))
    assert _about_acting(operations.warnings(key)) == expected
    plain = await directory.keys.issue("u_1", KeyWish(plan=of_key, is_test=is_test))
    assert _about_acting(operations.warnings(plain)) == []
    assert (
        _about_acting(operations.warnings(await directory.keys.change(plain["id"], {"acts_for": "tenant"}))) == expected
    )
    if of_key is not None:
        assert _about_acting(operations.warnings(await directory.keys.change(key["id"], {"plan": None}))) == [NO_PLAN]


async def test_a_change_of_acts_for_is_audited(api: Api) -> None:
    await api.user()
    key = (await api.done("POST", "/v1/keys", {"user": "u_1", "acts_for": "tenant"}))["id"]
    await api.done("PATCH", f"/v1/keys/{key}", {"acts_for": "none"})
    changed, issued = await api.audit(entity="key", entity_id=key)
    assert issued["after"]["acts_for"] == "tenant"
    assert (changed["changed"], changed["before"]["acts_for"], changed["after"]["acts_for"]) == (
        ["acts_for"], "tenant", "none",
    )  # fmt: skip


async def test_a_change_of_acts_for_has_another_etag(api: Api) -> None:
    key = (await api.user())["key"]["id"]
    etag = (await api.call("GET", f"/v1/keys/{key}")).headers["ETag"]
    await api.done("PATCH", f"/v1/keys/{key}", {"acts_for": "tenant"}, headers={"If-Match": etag})
    stale = await api.call("PATCH", f"/v1/keys/{key}", {"acts_for": "none"}, headers={"If-Match": etag})
    assert stale.code == "outdated"
