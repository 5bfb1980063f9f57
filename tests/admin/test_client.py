"""One suite for the operations of the command line, directly in the database and through the admin API: same results."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from keyproxy.auth.api_key import SecretKey
from keyproxy.cli.remote.http_transport import Denied
from keyproxy.cli.remote.remote_directory import RemoteDirectory
from keyproxy.cli.remote.remote_usage import RemoteUsage
from keyproxy.config.schema import Settings, Usage
from keyproxy.model import TokenUse
from keyproxy.platform import clock
from keyproxy.store.directory.directory import (
    AuditFilter,
    Conflict,
    Entity,
    ImportReport,
    Invalid,
    KeyFilter,
    KeyWish,
    NotFound,
    Revocation,
)
from keyproxy.store.directory.import_keys import read_key
from keyproxy.store.directory.interface import AS_CONFIGURED_THERE, Operations
from keyproxy.store.ledger.explain import Question
from keyproxy.store.postgres.database import StoreUnavailable
from keyproxy.store.usage.journal import UsageJournal
from keyproxy.store.usage.usage_queries import UsageFilter
from keyproxy.store.usage.usage_service import UsageOperations, UsageService
from tests import fakes
from tests.admin.conftest import FILE_TOKEN, Api
from tests.store.usage.test_journal import ended, rows


@pytest.fixture(params=["database", "api"])
async def operations(api: Api, request: pytest.FixtureRequest) -> AsyncIterator[Operations]:
    """Each implementation of the port."""
    if request.param == "database":
        yield api.directory
        return
    async with RemoteDirectory(api.url, FILE_TOKEN) as client:
        yield client


async def _ids(operations: Operations) -> list[str]:
    found: list[Entity] = []
    while rows := await operations.keys(found[-1]["id"] if found else "", 2):
        found += rows
    return [key["id"] for key in found]


async def test_the_lifecycle_of_a_key(operations: Operations, api: Api) -> None:
    assert (await operations.create_tenant("acme", "Acme Ltd"))["created"] is True
    assert (await operations.create_tenant("acme", "Other"))["name"] == "Acme Ltd"
    user = await operations.create_user("u_1", "acme", KeyWish(scopes=("jobs:write",)))
    assert (await operations.create_user("u_1", "acme", KeyWish()))["key"] is None
    first = user["key"]
    key = await operations.issue_key("u_1", KeyWish("nightly", ("a", "b"), is_test=True, expires_in=timedelta(days=1)))
    assert set(first) - set(key) == set()
    assert (key["name"], key["scopes"], key["is_test"]) == ("nightly", ["a", "b"], True)
    assert {**await operations.key(key["id"]), "secret": key["secret"]} == key
    assert (await operations.change_key(key["id"], {"name": "weekly"}))["name"] == "weekly"
    new = await operations.rotate_key(first["id"], grace=timedelta(hours=1), expires_in=timedelta(days=2))
    assert (new["replaces"], new["scopes"]) == (first["id"], ["jobs:write"])
    assert new["old_expires_at"] is not None
    assert (await operations.revoke_key(key["id"], "lost"))["revoke_reason"] == "lost"
    told = await operations.report_leaked_key(SecretKey(new["secret"].encode()), "found")
    assert (told["known"], told["user"], told["key"]["state"]) == (True, "u_1", "revoked")
    digest = hashlib.sha256(first["secret"].encode()).digest()
    assert (await operations.report_leaked(digest, "found"))["revoked_now"] is True
    assert (await operations.delete_key(new["id"])) == {"id": new["id"], "deleted": True}
    assert (await operations.change_user("u_1", {"disabled": True}))["disabled_at"] is not None
    assert (await operations.user("u_1"))["keys"] == 2
    assert (await operations.delete_user("u_1"))["deleted"] is True
    assert (await operations.delete_tenant("acme"))["deleted"] is True
    actors = {row["actor"] for row in await api.audit()}
    assert actors == ({"cli:test"} if operations is api.directory else {"token:file"})


async def test_keys_are_found_in_text_and_revoked_and_get_other_scopes(operations: Operations, api: Api) -> None:
    key = (await api.user())["key"]
    assert (await operations.change_key(key["id"], {"scopes": ["a", "b"]}))["scopes"] == ["a", "b"]
    text = f"Authorization: Api-Key {key['secret']}".encode("utf-16")
    assert [one["id"] for one in (await operations.whose(text))["keys"]] == [key["id"]]
    assert [one["id"] for one in (await operations.whose(key["hint"].encode()))["keys"]] == [key["id"]]
    assert (await operations.whose(b"nothing"))["keys"] == []
    found = {"key": key["id"], "user": "u_1", "tenant": "acme", "revoked_now": True}
    assert await operations.report_leaked_text(text, "found") == {"found": [found], "incomplete": 0, "unknown": 0}
    assert (await operations.key(key["id"]))["revoke_reason"] == "found"
    for refused in (operations.whose, lambda text: operations.report_leaked_text(text, "")):
        with pytest.raises(Invalid, match="512 KiB"):
            await refused(b"x" * (1 << 20))


async def test_paged_lists_are_complete(operations: Operations, api: Api) -> None:
    made = sorted([(await api.user(f"u_{number}"))["key"]["id"] for number in range(5)])
    assert await _ids(operations) == made
    assert [user["id"] for user in await operations.users("", 500, "acme")] == [f"u_{number}" for number in range(5)]
    assert await operations.users("", 500, "nobody") == []
    assert [key["user"] for key in await operations.keys("", 500, KeyFilter(user="u_3", is_test=False))] == ["u_3"]
    assert [tenant["id"] for tenant in await operations.tenants("", 500)] == ["acme"]
    found: list[str] = []
    cursor: str | None = None
    while True:
        page = await operations.keys_by_time("created", cursor, 2)
        found += [key["id"] for key in page.items]
        cursor = page.next
        if cursor is None:
            break
    assert sorted(found) == made


async def test_many_keys_are_issued_and_revoked(operations: Operations, api: Api) -> None:
    for number in range(3):
        await api.user(f"u_{number}")
    wishes = [(f"u_{number}", KeyWish("bulk")) for number in range(3)]
    made = await operations.issue_keys(wishes)
    assert [(key["user"], key["created"]) for key in made] == [("u_0", True), ("u_1", True), ("u_2", True)]
    assert len({key["secret"] for key in made}) == 3
    assert [key["created"] for key in await operations.issue_keys(wishes)] == [False] * 3
    again = await operations.issue_keys(wishes, reissue_unseen=True)
    assert [(key["created"], key["reissues"]) for key in again] == [(True, key["id"]) for key in made]
    wanted = Revocation(tenant="acme")
    assert await operations.count_to_revoke(wanted) == 6
    revoked = [key async for keys in operations.revoke_keys(wanted, "leaves") for key in keys]
    assert len(revoked) == 6
    assert [keys async for keys in operations.revoke_keys(wanted, "leaves")] == []


async def test_a_plan_is_changed_limit_by_limit(operations: Operations) -> None:
    await operations.set_plan("basic", {"rate": 5.0, "burst": 9})
    changed = await operations.change_plan("basic", {"burst": None, "concurrency": 2})
    assert (changed["created"], changed["limits"]) == (False, {"rate": 5.0, "concurrency": 2})
    assert changed["changed"] == {"burst": {"old": 9, "new": None}, "concurrency": {"old": None, "new": 2}}
    assert (await operations.change_plan("new", {"burst": None}))["created"] is True
    assert (await operations.delete_plan("new"))["deleted"] is True
    with pytest.raises(Invalid, match="burst: means nothing without a rate"):
        await operations.change_plan("other", {"burst": 5})


async def test_plans_and_the_audit_log(operations: Operations) -> None:
    made = await operations.set_plan("basic", {"rate": 5.0, "burst": 9})
    assert (made["created"], made["limits"]) == (True, {"rate": 5.0, "burst": 9})
    assert (await operations.set_plan("basic", {}))["limits"] == {}
    await operations.create_tenant("acme", "", "basic")
    assert (await operations.change_tenant("acme", {"plan": None}))["plan"] is None
    assert [plan["id"] for plan in await operations.plans("", 500)] == ["basic"]
    assert (await operations.delete_plan("basic"))["deleted"] is True
    page = await operations.audit(None, 2, AuditFilter(entity="plan"))
    assert [row["action"] for row in page.items] == ["delete", "update"]
    rest = await operations.audit(page.next, 2, AuditFilter(entity="plan"))
    assert [row["action"] for row in rest.items] == ["insert"]
    horizon = await operations.audit_horizon()
    exported: list[Entity] = []
    cursor: str | None = "0"
    while (part := await operations.audit_export(cursor, 2, None, horizon=horizon)).items:
        exported += part.items
        cursor = str(part.items[-1]["id"])
    assert [row["entity"] for row in exported] == ["plan", "plan", "tenant", "tenant", "plan"]


async def test_keys_of_other_programs_are_imported_in_parts_and_errors_are_reported(
    operations: Operations, api: Api
) -> None:
    await api.user()
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(1200)]
    table = [{"digest": digest, "user": f"n_{place % 3}", "tenant": "acme"} for place, digest in enumerate(digests)]
    table[7] = {"digest": digests[7], "user": "nobody"}
    table[1100] = {"digest": digests[1100], "user": "u_1", "plan": "none"}
    table[9] |= {"name": "nightly", "scopes": "a,b", "test": "true", "expires_at": "2030-01-31T12:00", "revoked": "t"}
    keys = [read_key(f"f:{place}", row, {}) for place, row in enumerate(table, start=1)]
    tried = await operations.import_keys(keys[:900], dry_run=True)
    assert (tried.imported, tried.present, tried.users) == (899, 0, 3)
    assert await api.directory.users("", 10, "acme") == [await api.directory.user("u_1")]
    for imported, present, users in ((1198, 0, 3), (0, 1198, 0)):
        report = ImportReport()
        for start in (0, 1000):
            part = keys if operations is not api.directory else keys[start : start + 1000]
            report.add(await operations.import_keys(part, dry_run=False))
            if part is keys:
                break
        assert (report.imported, report.present, report.users) == (imported, present, users)
        assert report.problems == [("f:8", "there is no user 'nobody'"), ("f:1101", "there is no plan 'none'")]
    (key,) = await api.directory.keys("", 10, KeyFilter(user="n_0", state="revoked"))
    assert (key["name"], key["scopes"], key["is_test"]) == ("nightly", ["a", "b"], True)
    assert key["expires_at"] == "2030-01-31T12:00:00Z"


async def test_a_dry_run_in_parts_returns_a_warning(api: Api) -> None:
    await api.user()
    keys = [read_key("f", {"digest": f"{number:064x}", "user": "u_1"}, {}) for number in range(1001)]
    async with RemoteDirectory(api.url, FILE_TOKEN) as client:
        await client.import_keys(keys[:1000], dry_run=True)
        assert list(client.warnings) == []
        assert (await client.import_keys(keys, dry_run=True)).imported == 1001
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
            usage = await stack.enter_async_context(RemoteUsage(api.url, FILE_TOKEN))
        assert await usage.sums(UsageFilter(user="u_1"), ["user"], 10) == [
            {"user": "u_1", "requests": 3, "refusals": 0, "tokens_in": 30, "tokens_out": 3, "tokens_estimated": 0}
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
        told = await usage.explained(key, Question("POST", "/v1/ai/jobs", 7))
        assert (told["allowed"], told["user"], told["code"]) == (True, "u_1", None)
        assert set(told) == set(await desk.explained(key, Question("POST", "/v1/ai/jobs", 7)))
        await api.directory.revoke_key(key, "")
        assert (await usage.explained(key, Question("POST", "/", None)))["code"] == "api_key_revoked"
        with pytest.raises(NotFound, match="there is no key 'key_x'"):
            await usage.explained("key_x", Question("POST", "/", None))
        with pytest.raises(NotFound, match="there is no user 'nobody'"):
            await usage.windows("nobody", is_test=False)


async def test_what_is_refused_is_refused_alike(operations: Operations, api: Api) -> None:
    key = (await api.user())["key"]["id"]
    await api.user("u_2", "other")
    await operations.rotate_key(key, grace=timedelta(0), expires_in=None)
    with pytest.raises(NotFound, match="there is no user 'nobody': create it first"):
        await operations.issue_key("nobody", KeyWish())
    with pytest.raises(NotFound, match="there is no tenant 'nobody'"):
        await operations.tenant("nobody")
    with pytest.raises(Conflict, match="exists and belongs to"):
        await operations.create_user("u_2", "acme", None)
    with pytest.raises(Conflict):
        await operations.rotate_key(key, grace=timedelta(0), expires_in=None)
    with pytest.raises(Invalid):
        await operations.set_plan("basic", {"burst": 5})
    with pytest.raises(Invalid):
        await operations.create_tenant("no id", "")


async def test_the_server_configures_the_default_lifetime_of_a_key(api: Api) -> None:
    await api.user()
    async with RemoteDirectory(api.url, FILE_TOKEN) as client:
        key = await client.issue_key("u_1", KeyWish(expires_in=AS_CONFIGURED_THERE))
        forever = await client.issue_key("u_1", KeyWish(expires_in=None))
    assert key["expires_at"] is not None
    assert forever["expires_at"] is None


async def test_missing_permission_is_denied_and_an_absent_server_is_unavailable(api: Api) -> None:
    async with RemoteDirectory(api.url, await api.token("keys:read")) as client:
        assert await client.tenants("", 10) == []
        with pytest.raises(Denied, match=r"required scope is admin:write \(insufficient_scope\)"):
            await client.create_tenant("acme", "")
    async with RemoteDirectory("http://127.0.0.1:1", "x") as client:
        with pytest.raises(StoreUnavailable, match="the admin API does not respond"):
            await client.tenants("", 10)
