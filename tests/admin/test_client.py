"""One suite for the operations of the command line, directly in the database and through the admin API: same results."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from keyproxy.admin.endpoint_table import ADDRESSES
from keyproxy.admin.service import ENDPOINTS
from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.auth.api_key import SecretKey
from keyproxy.cli import remote
from keyproxy.cli.output import AdminApiUnavailable
from keyproxy.cli.remote.admin_client import AdminClient, Denied
from keyproxy.cli.remote.remote_directory import RemoteDirectory
from keyproxy.cli.remote.remote_usage import RemoteUsage
from keyproxy.config.schema import Settings, Usage
from keyproxy.platform import clock
from keyproxy.store.directory.directory import (
    AuditFilter,
    Conflict,
    Credit,
    Entity,
    ImportReport,
    Invalid,
    KeyFilter,
    KeyWish,
    NotFound,
    Revocation,
)
from keyproxy.store.directory.import_keys import read_key
from keyproxy.store.directory.interface import AS_CONFIGURED_THERE, DirectoryOperations
from keyproxy.store.ledger.explain import Question
from keyproxy.store.usage.journal import UsageJournal
from keyproxy.store.usage.usage_queries import UsageFilter
from keyproxy.store.usage.usage_service import UsageOperations, UsageService
from tests import fakes
from tests.admin.conftest import FILE_TOKEN, Api
from tests.store.usage.test_journal import ended, rows


@pytest.fixture(params=["database", "api"])
async def operations(api: Api, request: pytest.FixtureRequest) -> AsyncIterator[DirectoryOperations]:
    """Each implementation of the port."""
    if request.param == "database":
        yield api.directory
        return
    async with AdminClient(api.url, FILE_TOKEN) as client:
        yield RemoteDirectory(client)


def test_every_endpoint_has_one_address_and_one_declaration() -> None:
    assert sorted(endpoint.name for endpoint in ENDPOINTS) == sorted(ADDRESSES)
    assert len({(address.method, address.path) for address in ADDRESSES.values()}) == len(ADDRESSES)


def test_command_line_calls_every_endpoint_but_the_one_about_its_own_token() -> None:
    folder = Path(remote.__file__).parent
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in folder.glob("*.py")]
    constants = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert set(ADDRESSES) - constants == {"show_token"}


def test_importing_the_client_of_the_admin_api_does_not_import_the_models_of_the_server() -> None:
    program = "import sys; import keyproxy.cli.remote.remote_directory; print('pydantic' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


async def _ids(operations: DirectoryOperations) -> list[str]:
    found: list[Entity] = []
    while rows := await operations.keys.list_by_id(found[-1]["id"] if found else "", 2):
        found += rows
    return [key["id"] for key in found]


async def test_the_lifecycle_of_a_key(operations: DirectoryOperations, api: Api) -> None:
    assert (await operations.tenants.create("acme", "Acme Ltd"))["created"] is True
    assert (await operations.tenants.create("acme", "Other"))["name"] == "Acme Ltd"
    user = await operations.users.create("u_1", "acme", KeyWish(scopes=("jobs:write",)))
    assert (await operations.users.create("u_1", "acme", KeyWish()))["key"] is None
    first = user["key"]
    key = await operations.keys.issue("u_1", KeyWish("nightly", ("a", "b"), is_test=True, expires_in=timedelta(days=1)))
    assert set(first) - set(key) == set()
    assert (key["name"], key["scopes"], key["is_test"]) == ("nightly", ["a", "b"], True)
    assert {**await operations.keys.get(key["id"]), "secret": key["secret"]} == key
    assert (await operations.keys.change(key["id"], {"name": "weekly"}))["name"] == "weekly"
    new = await operations.keys.rotate(first["id"], grace=timedelta(hours=1), expires_in=timedelta(days=2))
    assert (new["replaces"], new["scopes"]) == (first["id"], ["jobs:write"])
    assert new["old_expires_at"] is not None
    assert (await operations.keys.revoke(key["id"], "lost"))["revoke_reason"] == "lost"
    result = await operations.leaked_keys.report_key(SecretKey(new["secret"].encode()), "found")
    assert (result["known"], result["user"], result["key"]["state"]) == (True, "u_1", "revoked")
    digest = hashlib.sha256(first["secret"].encode()).digest()
    assert (await operations.leaked_keys.report_digest(digest, "found"))["revoked_now"] is True
    assert (await operations.keys.delete(new["id"])) == {"id": new["id"], "deleted": True}
    assert (await operations.users.change("u_1", {"disabled": True}))["disabled_at"] is not None
    assert (await operations.users.get("u_1"))["keys"] == 2
    assert (await operations.users.delete("u_1"))["deleted"] is True
    assert (await operations.tenants.delete("acme"))["deleted"] is True
    actors = {row["actor"] for row in await api.audit()}
    assert actors == ({"cli:test"} if operations is api.directory else {"token:file"})


async def test_keys_are_found_in_text_and_revoked_and_get_other_scopes(
    operations: DirectoryOperations, api: Api
) -> None:
    key = (await api.user())["key"]
    assert (await operations.keys.change(key["id"], {"scopes": ["a", "b"]}))["scopes"] == ["a", "b"]
    text = f"Authorization: Api-Key {key['secret']}".encode("utf-16")
    assert [one["id"] for one in (await operations.leaked_keys.find(text))["keys"]] == [key["id"]]
    assert [one["id"] for one in (await operations.leaked_keys.find(key["hint"].encode()))["keys"]] == [key["id"]]
    assert (await operations.leaked_keys.find(b"nothing"))["keys"] == []
    found = {"key": key["id"], "user": "u_1", "tenant": "acme", "revoked_now": True}
    assert await operations.leaked_keys.report_text(text, "found") == {"found": [found], "incomplete": 0, "unknown": 0}
    assert (await operations.keys.get(key["id"]))["revoke_reason"] == "found"
    for refused in (operations.leaked_keys.find, lambda text: operations.leaked_keys.report_text(text, "")):
        with pytest.raises(Invalid, match="512 KiB"):
            await refused(b"x" * (1 << 20))


async def test_paged_lists_are_complete(operations: DirectoryOperations, api: Api) -> None:
    made = sorted([(await api.user(f"u_{number}"))["key"]["id"] for number in range(5)])
    assert await _ids(operations) == made
    users = await operations.users.list_by_id("", 500, "acme")
    assert [user["id"] for user in users] == [f"u_{number}" for number in range(5)]
    assert await operations.users.list_by_id("", 500, "nobody") == []
    keys = await operations.keys.list_by_id("", 500, KeyFilter(user="u_3", is_test=False))
    assert [key["user"] for key in keys] == ["u_3"]
    assert [tenant["id"] for tenant in await operations.tenants.list_by_id("", 500)] == ["acme"]
    found: list[str] = []
    cursor: str | None = None
    while True:
        page = await operations.keys.list_by_time("created", cursor, 2)
        found += [key["id"] for key in page.items]
        cursor = page.next
        if cursor is None:
            break
    assert sorted(found) == made


async def test_many_keys_are_issued_and_revoked(operations: DirectoryOperations, api: Api) -> None:
    for number in range(3):
        await api.user(f"u_{number}")
    wishes = [(f"u_{number}", KeyWish("bulk")) for number in range(3)]
    made = await operations.key_batches.issue(wishes)
    assert [(key["user"], key["created"]) for key in made] == [("u_0", True), ("u_1", True), ("u_2", True)]
    assert len({key["secret"] for key in made}) == 3
    assert [key["created"] for key in await operations.key_batches.issue(wishes)] == [False] * 3
    again = await operations.key_batches.issue(wishes, reissue_unseen=True)
    assert [(key["created"], key["reissues"]) for key in again] == [(True, key["id"]) for key in made]
    wanted = Revocation(tenant="acme")
    assert await operations.key_batches.count_to_revoke(wanted) == 6
    revoked = [key async for keys in operations.key_batches.revoke(wanted, "leaves") for key in keys]
    assert len(revoked) == 6
    assert [keys async for keys in operations.key_batches.revoke(wanted, "leaves")] == []


async def test_a_patch_changes_only_the_named_limits_of_a_plan(operations: DirectoryOperations) -> None:
    await operations.plans.set("basic", {"rate": 5.0, "burst": 9})
    changed = await operations.plans.change("basic", {"burst": None, "concurrency": 2})
    assert (changed["created"], changed["limits"]) == (False, {"rate": 5.0, "concurrency": 2})
    assert changed["changed"] == {"burst": {"old": 9, "new": None}, "concurrency": {"old": None, "new": 2}}
    assert (await operations.plans.change("new", {"burst": None}))["created"] is True
    assert (await operations.plans.delete("new"))["deleted"] is True
    with pytest.raises(Invalid, match="burst: means nothing without a rate"):
        await operations.plans.change("other", {"burst": 5})


async def test_limits_of_any_kind_are_changed_and_windows_credited(operations: DirectoryOperations, api: Api) -> None:
    await api.user()
    weekly = {"measure": "tokens", "per": "week", "amount": 7, "model": "gpt-4o"}
    made = await operations.plans.set("p", [weekly])
    assert (made["limits"], made["previous"]) == ([weekly], None)
    changed = await operations.plans.change("p", [{**weekly, "amount": 8}, {"measure": "concurrency", "amount": 2}])
    assert changed["previous"] == [weekly]
    assert changed["changed"] == {
        "tokens_per_week@model:gpt-4o": {"old": 7, "new": 8}, "concurrency": {"old": None, "new": 2},
    }  # fmt: skip
    await operations.users.change("u_1", {"plan": "p"})
    credit = Credit("user", "u_1", "tokens/week@model:gpt-4o", -3, "a mistake")
    credited = await operations.credits.add(credit)
    assert (credited["total"], credited["tenant"], credited["limit"]) == (5, "acme", credit.limit)
    with pytest.raises(Invalid, match="has no limit tokens/day"):
        await operations.credits.add(credit._replace(limit="tokens/day"))
    with pytest.raises(NotFound, match="there is no tenant 'nobody'"):
        await operations.credits.add(credit._replace(owner_kind="tenant", owner_id="nobody"))


async def test_plans_and_the_audit_log(operations: DirectoryOperations) -> None:
    made = await operations.plans.set("basic", {"rate": 5.0, "burst": 9})
    assert (made["created"], made["limits"]) == (True, {"rate": 5.0, "burst": 9})
    assert (await operations.plans.set("basic", {}))["limits"] == {}
    await operations.tenants.create("acme", "", "basic")
    assert (await operations.tenants.change("acme", {"plan": None}))["plan"] is None
    assert [plan["id"] for plan in await operations.plans.list_by_id("", 500)] == ["basic"]
    assert (await operations.plans.delete("basic"))["deleted"] is True
    page = await operations.audit.list_newest(None, 2, AuditFilter(entity="plan"))
    assert [row["action"] for row in page.items] == ["delete", "update"]
    rest = await operations.audit.list_newest(page.next, 2, AuditFilter(entity="plan"))
    assert [row["action"] for row in rest.items] == ["insert"]
    horizon = await operations.audit.horizon()
    exported: list[Entity] = []
    cursor: str | None = "0"
    while (part := await operations.audit.export(cursor, 2, None, horizon=horizon)).items:
        exported += part.items
        cursor = str(part.items[-1]["id"])
    assert [row["entity"] for row in exported] == ["plan", "plan", "tenant", "tenant", "plan"]


async def test_keys_of_other_programs_are_imported_in_parts_and_errors_are_reported(
    operations: DirectoryOperations, api: Api
) -> None:
    await api.user()
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(1200)]
    table = [{"digest": digest, "user": f"n_{place % 3}", "tenant": "acme"} for place, digest in enumerate(digests)]
    table[7] = {"digest": digests[7], "user": "nobody"}
    table[1100] = {"digest": digests[1100], "user": "u_1", "plan": "none"}
    table[9] |= {"name": "nightly", "scopes": "a,b", "test": "true", "expires_at": "2030-01-31T12:00", "revoked": "t"}
    keys = [read_key(f"f:{place}", row, {}) for place, row in enumerate(table, start=1)]
    tried = await operations.key_importer.run(keys[:900], dry_run=True)
    assert (tried.imported, tried.present, tried.users) == (899, 0, 3)
    assert await api.directory.users.list_by_id("", 10, "acme") == [await api.directory.users.get("u_1")]
    for imported, present, users in ((1198, 0, 3), (0, 1198, 0)):
        report = ImportReport()
        for start in (0, 1000):
            part = keys if operations is not api.directory else keys[start : start + 1000]
            report.add(await operations.key_importer.run(part, dry_run=False))
            if part is keys:
                break
        assert (report.imported, report.present, report.users) == (imported, present, users)
        assert report.problems == [("f:8", "there is no user 'nobody'"), ("f:1101", "there is no plan 'none'")]
    (key,) = await api.directory.keys.list_by_id("", 10, KeyFilter(user="n_0", state="revoked"))
    assert (key["name"], key["scopes"], key["is_test"]) == ("nightly", ["a", "b"], True)
    assert key["expires_at"] == "2030-01-31T12:00:00Z"


async def test_a_dry_run_in_parts_returns_a_warning(api: Api) -> None:
    await api.user()
    keys = [read_key("f", {"digest": f"{number:064x}", "user": "u_1"}, {}) for number in range(1001)]
    async with AdminClient(api.url, FILE_TOKEN) as client:
        directory = RemoteDirectory(client)
        await directory.key_importer.run(keys[:1000], dry_run=True)
        assert list(client.warnings) == []
        assert (await directory.key_importer.run(keys, dry_run=True)).imported == 1001
        assert list(client.warnings) == ["a dry run through the admin API checks each batch of 1,000 keys separately"]


@pytest.mark.parametrize("by", ["database", "api"])
async def test_usage_limits_and_decisions_are_the_same_from_both(api: Api, by: str) -> None:
    journal = UsageJournal(api.database, Usage(), clock.now, settle_seconds=0.5)
    who = fakes.identity("u_1", "acme")
    journal.take(rows(*(ended(who, use=TokenUse(10, 1)) for _ in range(3))))
    await journal.flush()
    key = (await api.user())["key"]["id"]
    await api.done("PUT", "/v1/plans/five", {"limits": {"requests_per_day": 5}})
    await api.done("PATCH", "/v1/users/u_1", {"plan": "five"})
    desk = UsageService(api.database, Settings(), clock.now)
    async with contextlib.AsyncExitStack() as stack:
        usage: UsageOperations = desk
        if by == "api":
            usage = RemoteUsage(await stack.enter_async_context(AdminClient(api.url, FILE_TOKEN)))
        assert await usage.sums(UsageFilter(user="u_1"), ["user"], 10) == [
            {
                "user": "u_1",
                "requests": 3,
                "refusals": 0,
                "tokens_in": 30,
                "tokens_out": 3,
                "tokens_estimated": 0,
                "tokens_cached": 0,
                "tokens_cache_write": 0,
                "tokens_reasoning": 0,
                "cost_micros": 0,
            }
        ]
        assert await usage.sums(UsageFilter(until=datetime(2020, 1, 1, tzinfo=UTC)), ["user"], 10) == []
        (row,) = [row async for row in usage.all_sums(UsageFilter(tenant="acme"))]
        assert (row["tenant"], row["mode"], row["requests"]) == ("acme", "live", 3)
        events = [event async for event in usage.events(UsageFilter())]
        assert [event["user"] for event in events] == ["u_1"] * 3
        assert [event async for event in usage.events(UsageFilter(), events[1]["id"])] == events[2:]
        with pytest.raises(Invalid, match="there is no event '0123456789abcdef:1:1'"):
            _ = [event async for event in usage.events(UsageFilter(), "0123456789abcdef:1:1")]
        (limit,) = await usage.windows("u_1", is_test=False)
        assert (limit["policy"], limit["remaining"]) == ("user.requests_per_day", 5)
        assert await usage.windows("u_1", is_test=True) != []
        result = await usage.explained(key, Question("POST", "/v1/ai/jobs", 7))
        assert (result["allowed"], result["user"], result["code"]) == (True, "u_1", None)
        assert set(result) == set(await desk.explained(key, Question("POST", "/v1/ai/jobs", 7)))
        with_body = Question("POST", "/v1/ai/jobs", model="gpt-4o", body=b"{}")
        from_body = await usage.explained(key, with_body)
        assert {**from_body, "limits": []} == {**await desk.explained(key, with_body), "limits": []}
        await api.directory.keys.revoke(key, "")
        assert (await usage.explained(key, Question("POST", "/", None)))["code"] == "api_key_revoked"
        with pytest.raises(NotFound, match="there is no key 'key_x'"):
            await usage.explained("key_x", Question("POST", "/", None))
        with pytest.raises(NotFound, match="there is no user 'nobody'"):
            await usage.windows("nobody", is_test=False)


async def test_refusals_are_the_same_with_and_without_the_api(operations: DirectoryOperations, api: Api) -> None:
    key = (await api.user())["key"]["id"]
    await api.user("u_2", "other")
    await operations.keys.rotate(key, grace=timedelta(0), expires_in=None)
    with pytest.raises(NotFound, match="there is no user 'nobody': create it first"):
        await operations.keys.issue("nobody", KeyWish())
    with pytest.raises(NotFound, match="there is no tenant 'nobody'"):
        await operations.tenants.get("nobody")
    with pytest.raises(Conflict, match="exists and belongs to"):
        await operations.users.create("u_2", "acme", None)
    with pytest.raises(Conflict):
        await operations.keys.rotate(key, grace=timedelta(0), expires_in=None)
    with pytest.raises(Invalid):
        await operations.plans.set("basic", {"burst": 5})
    with pytest.raises(Invalid):
        await operations.tenants.create("no id", "")


async def test_the_server_configures_the_default_lifetime_of_a_key(api: Api) -> None:
    await api.user()
    async with AdminClient(api.url, FILE_TOKEN) as client:
        directory = RemoteDirectory(client)
        key = await directory.keys.issue("u_1", KeyWish(expires_in=AS_CONFIGURED_THERE))
        forever = await directory.keys.issue("u_1", KeyWish(expires_in=None))
    assert key["expires_at"] is not None
    assert forever["expires_at"] is None


async def test_missing_permission_is_denied_and_an_absent_server_is_unavailable(api: Api) -> None:
    async with AdminClient(api.url, await api.token("keys:read")) as client:
        directory = RemoteDirectory(client)
        assert await directory.tenants.list_by_id("", 10) == []
        with pytest.raises(Denied, match=r"required scope is admin:write \(insufficient_scope\)"):
            await directory.tenants.create("acme", "")
    async with AdminClient("http://127.0.0.1:1", "x") as client:
        directory = RemoteDirectory(client)
        with pytest.raises(AdminApiUnavailable, match="the admin API does not respond"):
            await directory.tenants.list_by_id("", 10)
