"""The life of keys: rotation, retirement, revocation, leak reports, lists, and bulk operations."""

from __future__ import annotations

import asyncio
import hashlib
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from keyproxy.auth.api_key import KeyFormat, SecretKey
from keyproxy.model import Identity
from keyproxy.store.directory.directory import (
    Actor,
    Conflict,
    Directory,
    DirectoryError,
    Invalid,
    KeyFilter,
    KeyWish,
    NotFound,
    Revocation,
)
from keyproxy.store.postgres.database import Database
from tests.store.harness import Rig, Sql, audit_rows, until_blocked

FORMAT = KeyFormat()
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.fixture
async def directory(database: Database) -> Directory:
    """The directory, with a tenant and a user without keys."""
    directory = Directory(database, FORMAT, Actor("ann", "desk"))
    await directory.tenants.create("acme", "")
    await directory.users.create("u_42", "acme", None)
    return directory


async def _aged(sql: Sql, key_id: str, **ages: timedelta | None) -> None:
    """Move a key's times into the past."""
    for column, age in ages.items():
        await sql.execute(f"UPDATE keyproxy.api_keys SET {column} = now() - $2::interval WHERE id = $1", key_id, age)


def _seconds_until(text: str) -> float:
    return (datetime.fromisoformat(text) - datetime.now(UTC)).total_seconds()


# -- rotation


async def test_rotated_key_is_replaced_by_an_equal_one_and_works_until_the_grace_ends(
    directory: Directory, sql: Sql
) -> None:
    await directory.plans.set("basic", {})
    wish = KeyWish("nightly", ("a", "b"), is_test=True, expires_in=90 * DAY, plan="basic")
    old = await directory.keys.issue("u_42", wish)
    new = await directory.keys.rotate(old["id"], grace=DAY, expires_in=30 * DAY)
    assert new["replaces"] == old["id"]
    assert new["id"] != old["id"]
    assert new["secret"] != old["secret"]
    assert new["secret"].startswith("kp_test_")
    for name in ("user", "tenant", "name", "scopes", "is_test", "plan"):
        assert new[name] == old[name]
    assert abs(_seconds_until(new["expires_at"]) - 30 * 86_400) < 60
    assert abs(_seconds_until(new["old_expires_at"]) - 86_400) < 60
    was = await directory.keys.get(old["id"])
    assert (was["expires_at"], was["state"], was["replaced_by"]) == (new["old_expires_at"], "retiring", new["id"])
    assert new["state"] == "active"
    assert await sql.fetchval("SELECT lineage FROM keyproxy.api_keys WHERE id = $1", new["id"]) == old["id"]


@pytest.mark.parametrize(
    ("life", "grace", "left_seconds"),
    [(HOUR, DAY, 3600), (None, DAY, 86_400), (DAY, HOUR, 3600), (DAY, timedelta(), 0)],
)
async def test_rotation_never_extends_the_lifetime_of_the_old_key(
    directory: Directory, life: timedelta | None, grace: timedelta, left_seconds: float
) -> None:
    old = await directory.keys.issue("u_42", KeyWish(expires_in=life))
    new = await directory.keys.rotate(old["id"], grace=grace, expires_in=90 * DAY)
    assert abs(_seconds_until(new["old_expires_at"]) - left_seconds) < 60
    # A key that never expires is replaced by one that never expires.
    assert (new["expires_at"] is None) is (life is None)
    assert ((await directory.keys.get(old["id"]))["state"] == "expired") is (left_seconds == 0)


async def test_key_that_does_not_work_cannot_be_rotated(directory: Directory, sql: Sql) -> None:
    revoked, expired = [await directory.keys.issue("u_42", KeyWish()) for _ in range(2)]
    await directory.keys.revoke(revoked["id"], "")
    await _aged(sql, expired["id"], expires_at=timedelta())
    before = await audit_rows(sql)
    for key, sentence in ((revoked, "was revoked: issue a new one"), (expired, "has expired: issue a new one")):
        with pytest.raises(Conflict, match=sentence):
            await directory.keys.rotate(key["id"], grace=DAY, expires_in=None)
    with pytest.raises(NotFound):
        await directory.keys.rotate("key_x", grace=DAY, expires_in=None)
    with pytest.raises(Invalid):
        await directory.keys.rotate(revoked["id"], grace=-DAY, expires_in=None)
    assert await audit_rows(sql) == before


async def test_of_concurrent_rotations_of_a_key_one_succeeds(directory: Directory, sql: Sql) -> None:
    old = await directory.keys.issue("u_42", KeyWish())
    result = await asyncio.gather(
        *(directory.keys.rotate(old["id"], grace=DAY, expires_in=None) for _ in range(12)), return_exceptions=True
    )
    (new,) = (one for one in result if isinstance(one, dict))
    refused = [str(one) for one in result if isinstance(one, Conflict)]
    assert refused == [f"key {old['id']!r} was rotated already: {new['id']!r} replaces it"] * 11
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.api_keys") == 2


async def test_a_key_whose_successor_was_lost_and_revoked_can_be_rotated_again(directory: Directory, sql: Sql) -> None:
    old = await directory.keys.issue("u_42", KeyWish())
    lost = await directory.keys.rotate(old["id"], grace=DAY, expires_in=None)
    await directory.keys.revoke(lost["id"], "its secret was lost")
    new = await directory.keys.rotate(old["id"], grace=DAY, expires_in=None)
    assert (new["replaces"], (await directory.keys.get(old["id"]))["replaced_by"]) == (old["id"], new["id"])
    assert abs(_seconds_until(new["old_expires_at"]) - 86_400) < 60
    again = await directory.keys.rotate(new["id"], grace=DAY, expires_in=None)
    lineages = await sql.fetch("SELECT DISTINCT coalesce(lineage, id) AS lineage FROM keyproxy.api_keys")
    assert [row["lineage"] for row in lineages] == [old["id"]]
    assert again["replaces"] == new["id"]


async def test_rotation_is_atomic(dsn: str, directory: Directory, sql: Sql) -> None:
    old = await directory.keys.issue("u_42", KeyWish())
    before = await directory.keys.get(old["id"]), await audit_rows(sql)
    other: Sql = await asyncpg.connect(dsn)
    async with other.transaction():
        await other.execute("SELECT 1 FROM keyproxy.api_keys FOR UPDATE")
        rotating = asyncio.create_task(directory.keys.rotate(old["id"], grace=DAY, expires_in=None))
        await until_blocked(sql, "api_keys")
        rotating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rotating
    await other.close()
    assert (await directory.keys.get(old["id"]), await audit_rows(sql)) == before
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.api_keys") == 1


async def test_rotating_keys_and_deleting_their_user_concurrently_does_not_deadlock(
    directory: Directory, sql: Sql
) -> None:
    for number in range(5):
        await directory.users.create(f"u_{number}", "acme", None)
        keys = [await directory.keys.issue(f"u_{number}", KeyWish()) for _ in range(4)]
        rotating = [directory.keys.rotate(key["id"], grace=DAY, expires_in=None) for key in keys]
        result = await asyncio.gather(*rotating, directory.users.delete(f"u_{number}"), return_exceptions=True)
        # A deadlock would be raised as StoreUnavailable.
        assert [one for one in result if isinstance(one, Exception) and not isinstance(one, NotFound)] == []
        assert result[-1] == {"id": f"u_{number}", "deleted": True}
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.api_keys") == 0


# -- lifetimes


@pytest.mark.parametrize("life", [timedelta(), -DAY, timedelta(days=40_000)])
async def test_invalid_lifetime_is_refused(directory: Directory, life: timedelta) -> None:
    for call in (
        directory.keys.issue("u_42", KeyWish(expires_in=life)),
        directory.users.create("u_1", "acme", KeyWish(expires_in=life)),
        directory.key_batches.issue([("u_42", KeyWish(expires_in=life))]),
    ):
        with pytest.raises(Invalid, match="the lifetime of a key"):
            await call


# -- a leak


async def test_leaked_key_is_revoked_by_its_digest_and_its_owner_is_returned(directory: Directory) -> None:
    key = await directory.keys.issue("u_42", KeyWish())
    digest = hashlib.sha256(key["secret"].encode()).digest()
    result = await directory.leaked_keys.report_digest(digest, "on a public page")
    assert (result["known"], result["revoked_now"]) == (True, True)
    assert (result["key"]["id"], result["key"]["user"], result["key"]["tenant"]) == (key["id"], "u_42", "acme")
    assert (result["key"]["state"], result["key"]["revoke_reason"]) == ("revoked", "on a public page")
    again = await directory.leaked_keys.report_digest(digest, "again")
    assert (again["known"], again["revoked_now"], again["key"]["revoke_reason"]) == (True, False, "on a public page")
    nobodys = {"known": False, "revoked_now": False, "user": None, "tenant": None, "key": None}
    assert await directory.leaked_keys.report_digest(bytes(32), "") == nobodys
    with pytest.raises(Invalid, match="32 bytes"):
        await directory.leaked_keys.report_digest(b"short", "")


# -- lists


@pytest.fixture
async def five(directory: Directory, sql: Sql) -> dict[str, dict[str, Any]]:
    """Keys by name: one of each state but disabled, and one for tests."""
    await directory.users.create("u_7", "acme", None)
    keys = {
        "active": await directory.keys.issue("u_42", KeyWish("active")),
        "revoked": await directory.keys.issue("u_42", KeyWish("revoked")),
        "expired": await directory.keys.issue("u_42", KeyWish("expired", expires_in=DAY)),
        "old": await directory.keys.issue("u_42", KeyWish("old", expires_in=90 * DAY)),
        "test": await directory.keys.issue("u_7", KeyWish("test", is_test=True, expires_in=5 * DAY)),
    }
    await directory.keys.revoke(keys["revoked"]["id"], "")
    await _aged(sql, keys["expired"]["id"], expires_at=HOUR)
    await _aged(sql, keys["old"]["id"], created_at=60 * DAY, last_used_at=40 * DAY)
    await _aged(sql, keys["active"]["id"], created_at=50 * DAY, last_used_at=DAY)
    await _aged(sql, keys["test"]["id"], created_at=2 * DAY)
    return keys


@pytest.mark.usefixtures("five")
@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (KeyFilter(), {"active", "revoked", "expired", "old", "test"}),
        (KeyFilter(state="active"), {"active", "old", "test"}),
        (KeyFilter(state="revoked"), {"revoked"}),
        (KeyFilter(state="expired"), {"expired"}),
        (KeyFilter(state="retiring"), set()),
        (KeyFilter(is_test=True), {"test"}),
        (KeyFilter(user="u_7"), {"test"}),
        (KeyFilter(tenant="nobody"), set()),
        (KeyFilter(older_than=55 * DAY), {"old"}),
        (KeyFilter(unused_for=30 * DAY), {"old"}),
        (KeyFilter(unused_for=36 * HOUR), {"old", "test"}),
        (KeyFilter(expires_within=7 * DAY), {"expired", "test"}),
        (KeyFilter(expires_within=7 * DAY, state="active"), {"test"}),
    ],
)
async def test_keys_are_filtered_by_their_properties(directory: Directory, wanted: KeyFilter, names: set[str]) -> None:
    assert {key["name"] for key in await directory.keys.list_by_id("", 9, wanted)} == names
    for order in ("created", "used", "expires"):
        assert {key["name"] for key in (await directory.keys.list_by_time(order, None, 9, wanted)).items} == names


@pytest.mark.usefixtures("five")
@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("created", ["old", "active", "test", "revoked", "expired"]),
        ("used", [{"revoked", "expired", "test"}, "old", "active"]),
        ("expires", ["expired", "test", "old", {"active", "revoked"}]),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 9])
async def test_keys_are_listed_by_age_last_use_and_expiry_in_pages(
    directory: Directory, order: str, names: list[str | set[str]], size: int
) -> None:
    found: list[str] = []
    cursor: str | None = None
    while True:
        page = await directory.keys.list_by_time(order, cursor, size)
        found += [key["name"] for key in page.items]
        cursor = page.next
        if cursor is None:
            break
    for wanted in names:
        group = {wanted} if isinstance(wanted, str) else wanted
        assert set(found[: len(group)]) == group
        del found[: len(group)]
    assert found == []


async def test_unknown_order_or_state_is_refused(directory: Directory) -> None:
    with pytest.raises(Invalid, match="unknown order of keys"):
        await directory.keys.list_by_time("size", None, 1)
    with pytest.raises(Invalid, match="unknown key state"):
        KeyFilter(state="lost")


# -- bulk operations


async def test_bulk_revocation_revokes_exactly_the_selected_keys(directory: Directory, sql: Sql) -> None:
    await directory.tenants.create("other", "")
    await directory.users.create("u_other", "other", None)
    keys = {}
    for name, user in (("a", "u_42"), ("b", "u_42"), ("old", "u_42"), ("theirs", "u_other")):
        keys[name] = (await directory.keys.issue(user, KeyWish(name)))["id"]
    await _aged(sql, keys["old"], created_at=40 * DAY)
    await directory.keys.revoke(keys["b"], "before")
    for wanted, names in (
        (Revocation(tenant="acme", older_than=30 * DAY), {"old"}),
        (Revocation(user="u_42"), {"a"}),
        (Revocation(tenant="other"), {"theirs"}),
        (Revocation(unused_for=timedelta()), set()),
    ):
        assert await directory.key_batches.count_to_revoke(wanted) == len(names)
        revoked = [
            key for batch in [ids async for ids in directory.key_batches.revoke(wanted, "bulk")] for key in batch
        ]
        assert set(revoked) == {keys[name] for name in names}
    reasons = {key["name"]: key["revoke_reason"] for key in await directory.keys.list_by_id("", 9)}
    assert reasons == {"a": "bulk", "b": "before", "old": "bulk", "theirs": "bulk"}


async def test_bulk_revocation_without_a_selection_is_refused(directory: Directory) -> None:
    with pytest.raises(Invalid, match="select the keys to revoke"):
        Revocation()
    for wanted in (Revocation(user="nobody"), Revocation(tenant="nobody")):
        with pytest.raises(NotFound):
            await anext(directory.key_batches.revoke(wanted, ""))


async def test_interrupted_bulk_revocation_can_be_resumed(directory: Directory, sql: Sql) -> None:
    await directory.key_batches.issue([("u_42", KeyWish(str(number))) for number in range(25)])
    wanted = Revocation(user="u_42")
    revoking = directory.key_batches.revoke(wanted, "first", batch=10)
    assert len(await anext(revoking)) == 10
    await revoking.aclose()
    assert await directory.key_batches.count_to_revoke(wanted) == 15
    assert [len(ids) async for ids in directory.key_batches.revoke(wanted, "second", batch=10)] == [10, 5]
    counts = await sql.fetch("SELECT revoke_reason AS why, count(*) AS n FROM keyproxy.api_keys GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in counts] == [("first", 10), ("second", 15)]


async def test_keys_issued_in_bulk_have_the_requested_properties_and_work(rig: Rig) -> None:
    directory = Directory(rig.door, FORMAT, Actor("ann", "desk"))
    await directory.tenants.create("acme", "")
    await directory.users.create("u_42", "acme", None)
    await directory.users.create("u_7", "acme", None)
    await directory.plans.set("basic", {})
    result = await directory.key_batches.issue(
        [("u_42", KeyWish("a", ("jobs:write", "b"), expires_in=DAY, plan="basic")), ("u_7", KeyWish("a", is_test=True))]
    )
    for one, (user, is_test) in zip(result, (("u_42", False), ("u_7", True)), strict=True):
        shown = await directory.keys.get(one["id"])
        assert one["created"]
        assert {name: one[name] for name in ("user", "name", "scopes", "is_test", "plan", "hint", "expires_at")} == {
            name: shown[name] for name in ("user", "name", "scopes", "is_test", "plan", "hint", "expires_at")
        }
        assert (one["user"], one["is_test"]) == (user, is_test)
        stored = await rig.sql.fetchval("SELECT digest FROM keyproxy.api_keys WHERE id = $1", one["id"])
        assert stored == hashlib.sha256(one["secret"].encode()).digest()
    await rig.feed.poll()
    who = await rig.resolve(SecretKey(result[0]["secret"].encode()))
    assert isinstance(who, Identity)
    assert (who.user_id, who.scopes) == ("u_42", frozenset({"jobs:write", "b"}))


async def test_repeated_bulk_issuing_issues_only_missing_keys(directory: Directory, sql: Sql) -> None:
    wishes = [("u_42", KeyWish(str(number))) for number in range(4)]
    first = await directory.key_batches.issue(wishes[:2])
    again = await directory.key_batches.issue(wishes + wishes[3:])
    assert [one["created"] for one in again] == [False, False, True, True, False]
    await directory.keys.revoke(first[0]["id"], "")
    await _aged(sql, first[1]["id"], expires_at=HOUR)
    assert [one["created"] for one in await directory.key_batches.issue(wishes)] == [True, True, False, False]
    # In another mode it is a different key.
    assert (await directory.key_batches.issue([("u_42", KeyWish("3", is_test=True))]))[0]["created"] is True


async def test_keys_whose_secrets_were_lost_are_reissued_if_they_were_never_used(
    directory: Directory, sql: Sql
) -> None:
    names = ("lost", "used", "counted", "rotated", "wider", "planned", "beside")
    wishes = [("u_42", KeyWish(name, ("a",))) for name in names]
    first = {key["name"]: key for key in await directory.key_batches.issue(wishes)}
    await sql.execute("UPDATE keyproxy.api_keys SET last_used_at = now() WHERE id = $1", first["used"]["id"])
    await sql.execute(
        "INSERT INTO keyproxy.usage (day, tenant_id, user_id, key_id, is_test, route, requests, refusals, tokens_in,"
        " tokens_out, tokens_estimated) VALUES (current_date, 'acme', 'u_42', $1, false, '', 0, 1, 0, 0, 0)",
        first["counted"]["id"],
    )
    await directory.keys.rotate(first["rotated"]["id"], grace=HOUR, expires_in=DAY)
    await sql.execute("UPDATE keyproxy.api_keys SET scopes = '{a,b}' WHERE id = $1", first["wider"]["id"])
    await directory.plans.set("gold", {})
    await directory.keys.change(first["planned"]["id"], {"plan": "gold"})
    # One of two working keys was used: neither is reissued, because the user has a usable one.
    beside = await directory.keys.issue("u_42", KeyWish("beside", ("a",)))
    await sql.execute("UPDATE keyproxy.api_keys SET last_used_at = now() WHERE id = $1", beside["id"])
    again = {key["name"]: key for key in await directory.key_batches.issue(wishes, reissue_unseen=True)}
    assert {name: key["created"] for name, key in again.items()} == {name: name == "lost" for name in names}
    assert again["lost"]["reissues"] == first["lost"]["id"]
    assert (await directory.keys.get(first["lost"]["id"]))["state"] == "revoked"
    assert (await directory.keys.get(again["lost"]["id"]))["state"] == "active"
    assert (await directory.keys.get(first["beside"]["id"]))["state"] == "active"
    # Without `reissue_unseen`, nothing is reissued.
    assert [key["created"] for key in await directory.key_batches.issue(wishes)] == [False] * len(names)


async def test_concurrent_bulk_issuing_issues_each_key_once(directory: Directory, sql: Sql) -> None:
    wishes = [("u_42", KeyWish(str(number))) for number in range(50)]
    result = await asyncio.gather(*(directory.key_batches.issue(wishes) for _ in range(4)))
    assert sum(one["created"] for part in result for one in part) == 50
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.api_keys") == 50


async def test_batch_with_an_unknown_user_issues_nothing(directory: Directory, sql: Sql) -> None:
    with pytest.raises(NotFound, match="there is no user 'nobody'"):
        await directory.key_batches.issue([("u_42", KeyWish()), ("nobody", KeyWish())])
    with pytest.raises(DirectoryError, match="a scope is one word"):
        await directory.key_batches.issue([("u_42", KeyWish("a")), ("u_42", KeyWish("b", ("*",)))])
    with pytest.raises(Invalid, match="at most"):
        await directory.key_batches.issue([("u_42", KeyWish())] * 1001)
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.api_keys") == 0


async def test_keys_are_issued_in_bulk_at_500_a_second_or_better(directory: Directory) -> None:
    wishes = [("u_42", KeyWish(str(number), ("jobs:write",), expires_in=90 * DAY)) for number in range(2000)]
    started = time.monotonic()
    for start in range(0, len(wishes), 500):
        result = await directory.key_batches.issue(wishes[start : start + 500])
        assert all(one["created"] for one in result)
    assert len(wishes) / (time.monotonic() - started) >= 500
