"""Roles, ceilings and owned ids: the directory and the admin API give the same results; the API's own refusals."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from keyproxy.auth.api_key import KeyFormat
from keyproxy.cli.remote.admin_client import AdminClient
from keyproxy.cli.remote.remote_directory import RemoteDirectory
from keyproxy.store.directory.directory import Actor, Conflict, Directory, Entity, Invalid, KeyWish, NotFound
from keyproxy.store.directory.import_keys import read_key
from keyproxy.store.directory.interface import DirectoryOperations
from tests.admin.conftest import FILE_TOKEN, Api
from tests.store.harness import Sql


class Operations:
    """An implementation of the port, with the warnings of its latest call."""

    def __init__(self, directory: DirectoryOperations, client: AdminClient | None) -> None:
        self.directory = directory
        self._client = client

    def warnings(self, *results: Entity) -> list[str]:
        """Warnings about these results."""
        if self._client is None:
            return [warning for result in results for warning in result.pop("warnings", [])]
        found, self._client.warnings = list(self._client.warnings), {}
        return found


@pytest.fixture(params=["database", "api"])
async def operations(api: Api, request: pytest.FixtureRequest) -> AsyncIterator[Operations]:
    """Each implementation of the port, with the tenants acme and globex, and users u_1 and g_1 of them."""
    for tenant, user in (("acme", "u_1"), ("globex", "g_1")):
        await api.directory.tenants.create(tenant, "")
        await api.directory.users.create(user, tenant, None)
    if request.param == "database":
        yield Operations(api.directory, None)
        return
    async with AdminClient(api.url, FILE_TOKEN) as client:
        yield Operations(RemoteDirectory(client), client)


# -- roles


async def test_a_role_is_created_replaced_listed_and_deleted(operations: Operations) -> None:
    roles = operations.directory.roles
    made = await roles.set("reader", ["b", "a", "b"])
    assert (made["id"], made["scopes"], made["created"], made["keys"]) == ("reader", ["b", "a"], True, 0)
    again = await roles.set("reader", ["c"])
    assert (again["scopes"], again["created"]) == (["c"], False)
    await roles.set("empty", [])
    assert [(role["id"], role["scopes"]) for role in await roles.list_by_id("", 10)] == [
        ("empty", []),
        ("reader", ["c"]),
    ]
    assert [role["id"] for role in await roles.list_by_id("", 1)] == ["empty"]
    assert await roles.get("reader") == {name: value for name, value in again.items() if name != "created"}
    assert await roles.delete("reader") == {"id": "reader", "deleted": True}
    with pytest.raises(NotFound):
        await roles.get("reader")
    with pytest.raises(NotFound):
        await roles.delete("reader")


@pytest.mark.parametrize("name", ["Reader", "1st", "a.b", "a" * 65])
async def test_a_role_of_another_form_is_refused(operations: Operations, name: str) -> None:
    with pytest.raises(Invalid):
        await operations.directory.roles.set(name, ["a"])


@pytest.mark.parametrize("scopes", [["a b"], ["*"], [f"s{number}" for number in range(65)]])
async def test_a_role_with_invalid_or_too_many_scopes_is_refused(operations: Operations, scopes: list[str]) -> None:
    with pytest.raises(Invalid):
        await operations.directory.roles.set("reader", scopes)


async def test_keys_users_and_tenants_have_roles(operations: Operations) -> None:
    directory = operations.directory
    await directory.roles.set("reader", ["a"])
    await directory.roles.set("writer", ["b"])
    key = await directory.keys.issue("u_1", KeyWish(scopes=("own",), roles=("reader",)))
    assert (key["scopes"], key["roles"]) == (["own"], ["reader"])
    assert (await directory.keys.get(key["id"]))["roles"] == ["reader"]
    assert [one["roles"] for one in await directory.keys.list_by_id("", 10)] == [["reader"]]
    assert (await directory.keys.list_by_time("created", None, 10)).items[0]["roles"] == ["reader"]
    assert (await directory.keys.change(key["id"], {"roles": ["writer", "reader"]}))["roles"] == ["writer", "reader"]
    assert (await directory.keys.change(key["id"], {"name": "n"}))["roles"] == ["writer", "reader"]
    assert (await directory.keys.change(key["id"], {"roles": []}))["roles"] == []
    for accounts, name in ((directory.users, "u_1"), (directory.tenants, "acme")):
        assert (await accounts.get(name))["roles"] is None
        assert (await accounts.change(name, {"roles": ["reader"]}))["roles"] == ["reader"]
        assert (await accounts.change(name, {"disabled": False}))["roles"] == ["reader"]
        assert (await accounts.change(name, {"roles": []}))["roles"] == []
        assert (await accounts.change(name, {"roles": None}))["roles"] is None
    assert (await directory.users.list_by_id("", 10, "acme"))[0]["roles"] is None


async def test_a_new_key_of_a_rotation_has_the_same_roles(operations: Operations) -> None:
    directory = operations.directory
    await directory.roles.set("reader", ["a"])
    key = await directory.keys.issue("u_1", KeyWish(roles=("reader",)))
    new = await directory.keys.rotate(key["id"], grace=timedelta(hours=1), expires_in=timedelta(days=1))
    assert (new["replaces"], new["roles"]) == (key["id"], ["reader"])


async def test_an_unknown_role_is_refused_everywhere(operations: Operations) -> None:
    directory = operations.directory
    key = await directory.keys.issue("u_1", KeyWish())
    with pytest.raises(NotFound, match="no role 'missing'"):
        await directory.keys.issue("u_1", KeyWish(roles=("missing",)))
    with pytest.raises(NotFound, match="no role 'missing'"):
        await directory.key_batches.issue([("u_1", KeyWish("n", roles=("missing",)))])
    for change, name in (
        (directory.keys.change, key["id"]),
        (directory.users.change, "u_1"),
        (directory.tenants.change, "acme"),
    ):
        with pytest.raises(NotFound, match="no role 'missing'"):
            await change(name, {"roles": ["missing"]})
    report = await directory.key_importer.run(
        [read_key("1", {"user": "u_1", "digest": "00" * 32, "roles": "missing"}, {})], dry_run=False
    )
    assert (report.imported, report.problems) == (0, [("1", "there is no role 'missing'")])
    assert len(await directory.keys.list_by_id("", 10)) == 1


async def test_more_than_16_roles_are_refused(operations: Operations) -> None:
    directory = operations.directory
    names = [f"r{number}" for number in range(17)]
    for name in names:
        await directory.roles.set(name, [name])
    key = await directory.keys.issue("u_1", KeyWish(roles=tuple(names[:16])))
    for change, name in (
        (directory.keys.change, key["id"]),
        (directory.users.change, "u_1"),
        (directory.tenants.change, "acme"),
    ):
        with pytest.raises(Invalid):
            await change(name, {"roles": names})


@pytest.mark.parametrize("kind", ["key", "user", "tenant"])
async def test_a_role_in_use_cannot_be_deleted(operations: Operations, kind: str) -> None:
    directory = operations.directory
    await directory.roles.set("reader", ["a"])
    key = await directory.keys.issue("u_1", KeyWish())
    change, name = {
        "key": (directory.keys.change, key["id"]),
        "user": (directory.users.change, "u_1"),
        "tenant": (directory.tenants.change, "acme"),
    }[kind]
    await change(name, {"roles": ["reader"]})
    assert (await directory.roles.get("reader"))[f"{kind}s"] == 1
    with pytest.raises(Conflict, match=f"assigned to 1 {kind}"):
        await directory.roles.delete("reader")
    await change(name, {"roles": []})
    assert (await directory.roles.delete("reader"))["deleted"] is True


async def test_many_keys_are_issued_and_imported_with_roles(operations: Operations) -> None:
    directory = operations.directory
    await directory.roles.set("reader", ["a"])
    wishes = [("u_1", KeyWish("n", roles=("reader",))), ("g_1", KeyWish("n"))]
    issued = await directory.key_batches.issue(wishes)
    assert [one["roles"] for one in issued] == [["reader"], []]
    again = await directory.key_batches.issue(wishes, reissue_unseen=True)
    assert [one["reissues"] for one in again] == [one["id"] for one in issued]
    other = [("u_1", KeyWish("n"))]
    assert [one["created"] for one in await directory.key_batches.issue(other, reissue_unseen=True)] == [False]
    row = {"user": "u_1", "digest": "01" * 32, "id": "imported", "roles": "reader"}
    assert (await directory.key_importer.run([read_key("1", row, {})], dry_run=False)).imported == 1
    assert (await directory.keys.get("imported"))["roles"] == ["reader"]


# -- ceilings


async def test_scopes_above_a_ceiling_are_stored_with_a_warning(operations: Operations) -> None:
    directory = operations.directory
    await directory.roles.set("reader", ["a", "b"])
    await directory.roles.set("wide", ["a", "z"])
    await directory.tenants.change("acme", {"roles": ["reader"]})
    inside = await directory.keys.issue("u_1", KeyWish(scopes=("a",)))
    assert operations.warnings(inside) == []
    above = "above the ceiling of tenant 'acme' and without effect: z"
    key = await directory.keys.issue("u_1", KeyWish(scopes=("b",), roles=("wide",)))
    assert operations.warnings(key) == [above]
    assert (key["scopes"], key["roles"]) == (["b"], ["wide"])
    changed = await directory.keys.change(inside["id"], {"scopes": ["z"]})
    assert operations.warnings(changed) == [above]
    await directory.users.change("u_1", {"roles": []})
    operations.warnings()
    changed = await directory.keys.change(inside["id"], {"roles": ["reader"], "scopes": []})
    assert operations.warnings(changed) == ["above the ceiling of user 'u_1' and without effect: a b"]
    await directory.users.change("u_1", {"roles": None})
    issued = await directory.key_batches.issue([("u_1", KeyWish("n", ("z",))), ("u_1", KeyWish("m", ("z",)))])
    assert operations.warnings(*issued) == [above]
    row = {"user": "u_1", "digest": "01" * 32, "scopes": "z"}
    report = await directory.key_importer.run([read_key("1", row, {})], dry_run=False)
    assert [*report.warnings, *operations.warnings()] == [above]
    made = await directory.users.create("u_2", "acme", KeyWish(scopes=("z",)))
    assert operations.warnings(made) == [above]
    assert operations.warnings(await directory.keys.change(key["id"], {"name": "n"})) == []


async def test_more_than_128_effective_scopes_are_refused_on_every_way(operations: Operations) -> None:
    directory = operations.directory
    scopes = {f"r{group}": [f"s{group}:{number}" for number in range(64)] for group in range(3)}
    for name, wanted in scopes.items():
        await directory.roles.set(name, wanted)
    key = await directory.keys.issue("u_1", KeyWish(roles=("r0", "r1")))
    too_many = ("r0", "r1", "r2")
    with pytest.raises(Invalid, match="192 effective scopes"):
        await directory.keys.issue("u_1", KeyWish(roles=too_many))
    with pytest.raises(Invalid, match="129 effective scopes"):
        await directory.keys.change(key["id"], {"scopes": ["one:more"]})
    with pytest.raises(Invalid, match="192 effective scopes"):
        await directory.keys.change(key["id"], {"roles": list(too_many)})
    with pytest.raises(Invalid, match="192 effective scopes"):
        await directory.key_batches.issue([("u_1", KeyWish("n", roles=too_many))])
    await directory.roles.set("small", ["x"])
    await directory.keys.change(key["id"], {"roles": ["r0", "small"]})
    crowded = await directory.keys.issue("u_1", KeyWish(scopes=tuple(scopes["r2"]), roles=("r0",)))
    with pytest.raises(Invalid, match=f"{crowded['id']}.*129 effective scopes"):
        await directory.keys.change(crowded["id"], {"roles": ["r0", "small"]})
    # Below a ceiling they are allowed, until it is raised, by its roles or by the scopes of one.
    await directory.roles.set("other", ["y"])
    await directory.users.change("u_1", {"roles": ["r0", "small", "other"]})
    await directory.keys.change(crowded["id"], {"roles": ["r0", "small"]})
    for wider in (None, ["r0", "r2", "small"]):
        with pytest.raises(Invalid, match="129 effective scopes"):
            await directory.users.change("u_1", {"roles": wider})
    with pytest.raises(Invalid, match="129 effective scopes"):
        await directory.roles.set("other", scopes["r2"])
    await directory.users.change("u_1", {"roles": []})
    assert (await directory.keys.get(crowded["id"]))["roles"] == ["r0", "small"]


async def test_the_ceiling_of_a_tenant_is_bounded_in_the_same_way(operations: Operations) -> None:
    directory = operations.directory
    for group in range(3):
        await directory.roles.set(f"r{group}", [f"s{group}:{number}" for number in range(64)])
    await directory.tenants.change("acme", {"roles": ["r0"]})
    await directory.keys.issue("u_1", KeyWish(roles=("r0", "r1", "r2")))
    with pytest.raises(Invalid, match="192 effective scopes"):
        await directory.tenants.change("acme", {"roles": None})
    assert (await directory.tenants.change("acme", {"roles": ["r0", "r1"]}))["roles"] == ["r0", "r1"]


# -- owned ids


async def test_owned_ids_are_added_shown_listed_and_removed(operations: Operations) -> None:
    owned = operations.directory.owned
    made = await owned.add("collection", "acme/docs:v1+2=x,y~z!$@|", "acme")
    assert (made["kind"], made["id"], made["tenant"], made["created"]) == (
        "collection", "acme/docs:v1+2=x,y~z!$@|", "acme", True,
    )  # fmt: skip
    assert (await owned.add("collection", "acme/docs:v1+2=x,y~z!$@|", "acme"))["created"] is False
    await owned.add("model", "ft:1", "globex")
    await owned.add("collection", "b", "globex")
    shown = await owned.get("model", "ft:1")
    assert (shown["tenant"], shown["id"]) == ("globex", "ft:1")
    found: list[Entity] = []
    cursor: str | None = None
    while True:
        page = await owned.list_page(cursor, 2)
        found += page.items
        cursor = page.next
        if cursor is None:
            break
    assert [(one["kind"], one["id"]) for one in found] == [
        ("collection", "acme/docs:v1+2=x,y~z!$@|"), ("collection", "b"), ("model", "ft:1"),
    ]  # fmt: skip
    assert [one["id"] for one in (await owned.list_page(None, 10, kind="model")).items] == ["ft:1"]
    assert [one["id"] for one in (await owned.list_page(None, 10, tenant_id="globex")).items] == ["b", "ft:1"]
    assert await owned.remove("model", "ft:1", "globex") == {"kind": "model", "id": "ft:1", "deleted": True}
    with pytest.raises(NotFound):
        await owned.get("model", "ft:1")
    with pytest.raises(NotFound):
        await owned.remove("model", "ft:1", "globex")


async def test_an_id_of_another_tenant_is_a_conflict(operations: Operations) -> None:
    owned = operations.directory.owned
    await owned.add("collection", "docs", "acme")
    with pytest.raises(Conflict, match="belongs to tenant 'acme'"):
        await owned.add("collection", "docs", "globex")
    with pytest.raises(Conflict, match="belongs to tenant 'acme'"):
        await owned.remove("collection", "docs", "globex")
    assert (await owned.get("collection", "docs"))["tenant"] == "acme"


async def test_an_id_of_an_unknown_tenant_is_refused(operations: Operations) -> None:
    with pytest.raises(NotFound, match="no tenant 'nobody'"):
        await operations.directory.owned.add("collection", "docs", "nobody")


@pytest.mark.parametrize("bad", ["a//b", "/a", "a/", ".", "a/../b", "a/./b"])
async def test_an_id_with_empty_or_dot_segments_is_refused(operations: Operations, bad: str) -> None:
    with pytest.raises((Invalid, NotFound)):
        await operations.directory.owned.add("collection", bad, "acme")
    assert (await operations.directory.owned.list_page(None, 10)).items == []


async def test_owned_ids_are_deleted_with_their_tenant(operations: Operations) -> None:
    await operations.directory.owned.add("collection", "docs", "acme")
    await operations.directory.tenants.delete("acme")
    assert (await operations.directory.owned.list_page(None, 10)).items == []


# -- the admin API


async def test_a_bound_token_cannot_change_what_bounds_it(api: Api) -> None:
    await api.user()
    await api.done("PUT", "/v1/roles/reader", {"scopes": ["a"]})
    await api.done("PATCH", "/v1/tenants/acme", {"roles": ["reader"]})
    bound = await api.token("admin:write", tenant="acme")
    for roles in (["reader"], [], None):
        refused = await api.call("PATCH", "/v1/tenants/acme", {"roles": roles}, token=bound)
        assert (refused.status, refused.code) == (403, "tenant_bound")
    for method, path, content in (
        ("PUT", "/v1/roles/reader", {"scopes": ["a", "b"]}),
        ("DELETE", "/v1/roles/reader", None),
        ("GET", "/v1/roles", None),
        ("PUT", "/v1/owned/collection/docs", {"tenant": "acme"}),
        ("DELETE", "/v1/owned/collection/docs", None),
        ("GET", "/v1/owned", None),
    ):
        refused = await api.call(method, path, content, token=bound)
        assert (refused.status, refused.code) == (403, "tenant_bound"), (method, path)
    assert (await api.done("PATCH", "/v1/tenants/acme", {"name": "Acme"}, token=bound))["name"] == "Acme"
    # Its own users and keys it can change: that never exceeds the tenant's ceiling.
    assert (await api.done("PATCH", "/v1/users/u_1", {"roles": ["reader"]}, token=bound))["roles"] == ["reader"]
    assert (await api.done("GET", "/v1/tenants/acme"))["roles"] == ["reader"]


async def test_a_bound_directory_cannot_change_what_bounds_it_either(api: Api) -> None:
    await api.directory.tenants.create("acme", "")
    bound = Directory(api.database, KeyFormat(), Actor("x", "y"), tenant_id="acme")
    with pytest.raises(Conflict):
        await bound.tenants.change("acme", {"roles": None})
    with pytest.raises(Conflict):
        await bound.roles.set("reader", ["a"])
    with pytest.raises(Conflict):
        await bound.owned.add("collection", "docs", "acme")


async def test_a_role_is_changed_only_if_it_has_the_expected_version(api: Api) -> None:
    first = await api.call("PUT", "/v1/roles/reader", {"scopes": ["a"]})
    assert (first.status, first.headers["Location"]) == (201, "/v1/roles/reader")
    tag = first.headers["ETag"]
    second = await api.call("PUT", "/v1/roles/reader", {"scopes": ["b"]}, headers={"If-Match": tag})
    assert second.status == 200
    for method, content in (("PUT", {"scopes": ["c"]}), ("DELETE", None)):
        outdated = await api.call(method, "/v1/roles/reader", content, headers={"If-Match": tag})
        assert outdated.code == "outdated"
    missing = await api.call("PUT", "/v1/roles/other", {"scopes": []}, headers={"If-Match": "*"})
    assert missing.status == 412
    assert (await api.done("GET", "/v1/roles/reader"))["scopes"] == ["b"]


async def test_access_write_changes_roles_and_owned_ids_and_nothing_else(api: Api) -> None:
    await api.user()
    token = await api.token("access:write")
    await api.done("PUT", "/v1/roles/reader", {"scopes": ["a"]}, token=token)
    await api.done("PUT", "/v1/owned/collection/acme%2Fdocs", {"tenant": "acme"}, token=token)
    assert (await api.done("GET", "/v1/owned/collection/acme%2Fdocs"))["id"] == "acme/docs"
    await api.done("DELETE", "/v1/owned/collection/acme%2Fdocs?tenant=acme", token=token)
    await api.done("DELETE", "/v1/roles/reader", token=token)
    for method, path, content in (
        ("GET", "/v1/roles", None),
        ("PATCH", "/v1/users/u_1", {"roles": []}),
        ("PATCH", "/v1/tenants/acme", {"roles": []}),
    ):
        assert (await api.call(method, path, content, token=token)).code == "insufficient_scope", path


async def test_null_is_a_ceiling_of_users_and_tenants_only(api: Api) -> None:
    key = (await api.user())["key"]["id"]
    assert (await api.call("PATCH", f"/v1/keys/{key}", {"roles": None})).code == "invalid"
    assert (await api.done("PATCH", "/v1/users/u_1", {"roles": None}))["roles"] is None


async def test_explain_shows_what_a_key_has_and_what_it_may_do(api: Api) -> None:
    key = (await api.user(scopes=["own", "a"]))["key"]["id"]
    for name, scopes in (("reader", ["a", "b"]), ("wide", ["a", "b", "own"])):
        await api.done("PUT", f"/v1/roles/{name}", {"scopes": scopes})
    await api.done("PATCH", f"/v1/keys/{key}", {"roles": ["reader"]})
    await api.done("PATCH", "/v1/tenants/acme", {"roles": ["reader"]})
    shown = await api.done("GET", f"/v1/keys/{key}/explain?path=/")
    assert {name: shown[name] for name in ("key_scopes", "roles", "user_ceiling", "tenant_ceiling")} == {
        "key_scopes": ["own", "a"], "roles": ["reader"], "user_ceiling": None, "tenant_ceiling": ["a", "b"],
    }  # fmt: skip
    assert shown["effective_scopes"] == ["a", "b"]
    await api.done("PATCH", "/v1/users/u_1", {"roles": []})
    shown = await api.done("GET", f"/v1/keys/{key}/explain?path=/")
    assert (shown["user_ceiling"], shown["effective_scopes"]) == ([], [])


# -- the audit log


async def test_every_change_is_an_audit_row(api: Api, sql: Sql) -> None:
    key = (await api.user())["key"]["id"]
    await api.done("PUT", "/v1/roles/reader", {"scopes": ["a"]})
    await api.done("PUT", "/v1/roles/reader", {"scopes": ["b"]})
    await api.done("PUT", "/v1/roles/reader", {"scopes": ["b"]})
    for path, roles in (
        (f"/v1/keys/{key}", ["reader"]),
        ("/v1/users/u_1", ["reader"]),
        ("/v1/tenants/acme", ["reader"]),
        (f"/v1/keys/{key}", []),
        ("/v1/users/u_1", None),
        ("/v1/tenants/acme", []),
    ):
        await api.done("PATCH", path, {"roles": roles})
    await api.done("PUT", "/v1/owned/collection/acme%2Fdocs", {"tenant": "acme"})
    await api.done("DELETE", "/v1/owned/collection/acme%2Fdocs")
    await api.done("DELETE", "/v1/roles/reader")
    await sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('by_sql', '{}')")
    await sql.execute("INSERT INTO keyproxy.owned (kind, id, tenant_id) VALUES ('model', 'm', 'acme')")
    await sql.execute("TRUNCATE keyproxy.roles; TRUNCATE keyproxy.owned")
    rows = (await api.audit(limit="50"))[::-1]
    shown = [(row["action"], row["entity"], row["entity_id"], row["tenant"], *row["changed"]) for row in rows][3:]
    assert shown == [
        ("insert", "role", "reader", None),
        ("update", "role", "reader", None, "scopes"),
        ("update", "key", key, "acme", "roles"),
        ("update", "user", "u_1", "acme", "roles"),
        ("update", "tenant", "acme", "acme", "roles"),
        ("update", "key", key, "acme", "roles"),
        ("update", "user", "u_1", "acme", "roles"),
        ("update", "tenant", "acme", "acme", "roles"),
        ("insert", "owned", "collection/acme/docs", "acme"),
        ("delete", "owned", "collection/acme/docs", "acme"),
        ("delete", "role", "reader", None),
        ("insert", "role", "by_sql", None),
        ("insert", "owned", "model/m", "acme"),
        ("truncate", "role", "*", None),
        ("truncate", "owned", "*", None),
    ]
    assert rows[4]["after"]["scopes"] == ["b"]
    found = await api.audit(entity="owned", entity_id="collection/acme/docs")
    assert [row["action"] for row in found] == ["delete", "insert"]
