"""Imported keys of another program: verified by their original hash, and accepted only if it matches."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from keyproxy.auth.api_key import KeyFormat, SecretKey
from keyproxy.model import Identity, Missing
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.directory.directory import Actor, Directory, ImportedKey, ImportReport, Invalid, KeyFilter
from keyproxy.store.directory.import_keys import read_key
from keyproxy.store.identities import drf_api_keys
from tests import fakes
from tests.store.harness import Rig, Sql, audit_rows

PREFIX = "Ab3dE6gH"
KEY = f"{PREFIX}.{'x9' * 16}"


def sha512(key: str) -> str:
    """The hash of the library since its third version."""
    return "sha512$$" + hashlib.sha512(key.encode()).hexdigest()


def pbkdf2(key: str, rounds: int = 1000, salt: str = "s4lt") -> str:
    """The hash of Django, and with it of older versions of the library."""
    made = hashlib.pbkdf2_hmac("sha256", key.encode(), salt.encode(), rounds)
    return f"pbkdf2_sha256${rounds}${salt}${base64.b64encode(made).decode()}"


@pytest.fixture
async def directory(rig: Rig) -> Directory:
    """The directory, with a tenant and a user."""
    directory = Directory(rig.door, KeyFormat(), Actor("ann", "desk"))
    await directory.tenants.create("acme", "")
    await directory.users.create("u_42", "acme", None)
    return directory


async def imported(directory: Directory, *rows: dict[str, Any], dry_run: bool = False) -> ImportReport:
    """Import rows of a table; the user is u_42 unless a row contains one."""
    keys = [read_key(f"row {number}", row, {"user": "u_42"}) for number, row in enumerate(rows, start=1)]
    return await directory.key_importer.run(keys, dry_run=dry_run)


async def present(rig: Rig, key: str) -> Identity | Reason:
    """The identity or refusal of a request with this key, fetched as the gateway does it."""
    secret = SecretKey(key.encode())
    for _ in range(4):
        try:
            return rig.cache.known(secret.digest(), rig.clock())
        except Refusal as refusal:
            return refusal.reason
        except Missing as missing:
            try:
                await rig.cache.fetching(secret, missing).fetch_missing()
            except Refusal as refusal:
                return refusal.reason
    raise AssertionError("no response")


async def _strangers_are_forgotten(rig: Rig) -> None:
    rig.clock.advance(6.0)
    await rig.feed.poll()


# -- verification and adoption


@pytest.mark.parametrize("stored", [sha512(KEY), pbkdf2(KEY), pbkdf2(KEY, 3, "a.b/c+d")])
async def test_imported_key_works_and_gets_its_digest_at_its_first_use(
    rig: Rig, directory: Directory, sql: Sql, stored: str
) -> None:
    row = {"prefix": PREFIX, "hashed_key": stored, "name": "old worker", "scopes": "jobs:write a"}
    assert (await imported(directory, row)).imported == 1
    who = await present(rig, KEY)
    assert isinstance(who, Identity)
    assert (who.user_id, who.tenant_id, who.scopes) == ("u_42", "acme", frozenset({"jobs:write", "a"}))
    digest = await sql.fetchval("SELECT digest FROM keyproxy.api_keys")
    assert digest == hashlib.sha256(KEY.encode()).digest()
    assert await sql.fetchval("SELECT hashed FROM keyproxy.foreign_hashes") is None
    before = dict(rig.door.queries)
    assert isinstance(await present(rig, KEY), Identity)
    assert dict(rig.door.queries) == before


@pytest.mark.parametrize("stored", [sha512(KEY), pbkdf2(KEY)])
@pytest.mark.parametrize(
    "wrong",
    [
        f"{PREFIX}.{'x9' * 15}x8",
        f"{PREFIX}.{'x9' * 16}x",
        KEY.swapcase(),
        f"{PREFIX}.short",
        PREFIX,
        f".{KEY}",
        f"{PREFIX}.{sha512(KEY)}",
        sha512(KEY),
        f"{PREFIX}..{'x9' * 16}",
    ],
)
async def test_anything_but_the_whole_key_is_refused(
    rig: Rig, directory: Directory, sql: Sql, stored: str, wrong: str
) -> None:
    await imported(directory, {"prefix": PREFIX, "hashed_key": stored})
    digest = await sql.fetchval("SELECT digest FROM keyproxy.api_keys")
    assert await present(rig, wrong) is Reason.KEY_INVALID
    assert await sql.fetchval("SELECT digest FROM keyproxy.api_keys") == digest
    # An earlier failed attempt does not block the real key.
    await _strangers_are_forgotten(rig)
    assert isinstance(await present(rig, KEY), Identity)


async def test_stored_values_of_an_unused_key_are_not_accepted_as_keys(
    rig: Rig, directory: Directory, sql: Sql
) -> None:
    await imported(directory, {"prefix": PREFIX, "hashed_key": sha512(KEY)})
    row = await sql.fetchrow("SELECT id, digest FROM keyproxy.api_keys")
    assert row is not None
    for shown in (
        row["digest"].hex(),
        row["id"],
        sha512(KEY),
        f"{PREFIX}.{sha512(KEY)}",
        f"{PREFIX}.{row['digest'].hex()}",
    ):
        assert await present(rig, shown) is Reason.KEY_INVALID


@pytest.mark.parametrize(
    ("column", "value", "standing"),
    [
        ("revoked", True, Reason.KEY_REVOKED),
        ("expiry_date", datetime(2020, 1, 1, tzinfo=UTC), None),
    ],
)
async def test_revoked_or_expired_key_stays_so_after_the_import(
    rig: Rig, directory: Directory, column: str, value: object, standing: Reason | None
) -> None:
    await imported(directory, {"prefix": PREFIX, "hashed_key": sha512(KEY), column: value})
    who = await present(rig, KEY)
    assert isinstance(who, Identity)
    assert who.standing is standing
    assert standing is not None or who.expires_wall_seconds < rig.clock().wall_seconds


async def test_imported_key_can_be_revoked_before_its_first_use(rig: Rig, directory: Directory) -> None:
    await imported(directory, {"prefix": PREFIX, "hashed_key": sha512(KEY)})
    (key,) = await directory.keys.list_by_id("", 9)
    await directory.keys.revoke(key["id"], "")
    who = await present(rig, KEY)
    assert isinstance(who, Identity)
    assert who.standing is Reason.KEY_REVOKED


async def test_concurrent_first_requests_share_one_verification(rig: Rig, directory: Directory) -> None:
    await imported(directory, {"prefix": PREFIX, "hashed_key": pbkdf2(KEY, 20_000)})
    outcomes = await asyncio.gather(*(present(rig, KEY) for _ in range(50)))
    assert all(isinstance(one, Identity) for one in outcomes)


async def test_too_many_waiting_imported_keys_are_refused_as_overload(
    rig: Rig, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drf_api_keys, "_WAITING_MAX", 3)
    await imported(directory, {"prefix": PREFIX, "hashed_key": pbkdf2(KEY, 20_000)})
    outcomes = await asyncio.gather(*(present(rig, f"{PREFIX}.{number:032}") for number in range(8)))
    assert set(outcomes) == {Reason.KEY_INVALID, Reason.OVERLOADED}
    assert outcomes.count(Reason.KEY_INVALID) == 3


async def test_imported_key_is_not_called_invalid_while_the_store_is_down(rig: Rig, directory: Directory) -> None:
    await imported(directory, {"prefix": PREFIX, "hashed_key": sha512(KEY)})
    await rig.goes_down()
    assert await present(rig, KEY) is Reason.STORE_UNAVAILABLE
    await rig.comes_back()
    assert isinstance(await present(rig, KEY), Identity)


async def test_keys_of_other_forms_need_no_additional_query(rig: Rig) -> None:
    for key in ("kp_live_" + "x" * 49, "abcdefgh12345678", "a" * 40 + ".bbbbbbbbbbbb"):
        await present(rig, key)
    assert rig.door.look_ups == 3
    assert "foreign_recipe" not in rig.door.queries


async def test_leaked_imported_key_is_found_before_its_first_use(directory: Directory) -> None:
    await imported(directory, {"prefix": PREFIX, "hashed_key": sha512(KEY)})
    other = f"{PREFIX}.{'y' * 32}"
    assert (await directory.leaked_keys.report_key(SecretKey(other.encode()), ""))["known"] is False
    report = await directory.leaked_keys.report_key(SecretKey(KEY.encode()), "on a page")
    assert (report["known"], report["user"], report["key"]["state"]) == (True, "u_42", "revoked")


# -- imports


async def test_keys_with_digests_are_imported_and_work(rig: Rig, directory: Directory) -> None:
    digest = hashlib.sha256(b"some-old-key").hexdigest()
    row = {
        "digest": digest.upper(), "id": "old_7", "name": "n", "hint": "some…key", "scopes": ["a", "b"], "is_test": "t",
        "created": "2024-01-02 03:04:05+00", "expires_at": "2999-01-01",
    }  # fmt: skip
    assert (await imported(directory, row)).imported == 1
    who = await present(rig, "some-old-key")
    assert isinstance(who, Identity)
    assert (who.key_id, who.is_test) == ("old_7", True)
    key = await directory.keys.get("old_7")
    assert (key["created_at"], key["expires_at"], key["hint"]) == (
        "2024-01-02T03:04:05Z",
        "2999-01-01T00:00:00Z",
        "some…key",
    )


@pytest.mark.parametrize("is_used_between", [False, True])
async def test_repeated_import_skips_existing_keys(rig: Rig, directory: Directory, is_used_between: bool) -> None:
    rows: Sequence[dict[str, Any]] = [
        {"prefix": PREFIX, "hashed_key": sha512(KEY)}, {"digest": "ab" * 32}, {"digest": "AB" * 32},
    ]  # fmt: skip
    first = await imported(directory, *rows)
    assert (first.imported, first.present, first.problems) == (2, 1, [])
    if is_used_between:
        assert isinstance(await present(rig, KEY), Identity)
    again = await imported(directory, *rows)
    assert (again.imported, again.present) == (0, 3)
    assert isinstance(await present(rig, KEY), Identity)
    assert len(await directory.keys.list_by_id("", 9)) == 2


async def test_import_problems_do_not_disclose_a_key_in_the_wrong_column(directory: Directory) -> None:
    secret = fakes.key(1).reveal().decode()
    rows = ({"digest": "ab" * 32, "user": secret}, {"digest": "cd" * 32, "user": "u_42", "plan": secret})
    problems = (await imported(directory, *rows)).problems
    assert len(problems) == 2
    assert secret[:24] not in str(problems)


async def test_dry_run_reports_the_result_and_changes_nothing(directory: Directory, sql: Sql) -> None:
    before = await audit_rows(sql)
    rows = (
        {"prefix": PREFIX, "hashed_key": sha512(KEY), "user": "u_new", "tenant": "acme"}, {"digest": "ab" * 32},
        {"digest": "cd" * 32, "user": "nobody"},
    )  # fmt: skip
    dry = await imported(directory, *rows, dry_run=True)
    assert (dry.imported, dry.users, dry.problems) == (2, 1, [("row 3", "there is no user 'nobody'")])
    assert await audit_rows(sql) == before
    assert await directory.keys.list_by_id("", 9) == []
    assert await imported(directory, *rows) == dry
    assert (await directory.users.get("u_new"))["keys"] == 1


async def test_invalid_rows_are_reported_and_do_not_block_the_others(directory: Directory) -> None:
    await directory.tenants.create("other", "")
    await directory.users.create("u_7", "other", None)
    await imported(directory, {"digest": "ab" * 32, "id": "mine"})
    report = await imported(
        directory,
        {"digest": "cd" * 32, "user": "nobody"},
        {"digest": "cd" * 32, "user": "u_new", "tenant": "nowhere"},
        {"digest": "cd" * 32, "user": "u_7", "tenant": "acme"},
        {"digest": "cd" * 32, "plan": "gold"},
        {"digest": "ab" * 32, "user": "u_7"},
        {"digest": "ef" * 32, "id": "mine"},
        {"digest": "01" * 32},
    )
    assert report.imported == 1
    assert report.problems == [
        ("row 1", "there is no user 'nobody'"), ("row 2", "there is no user 'u_new' and no tenant 'nowhere'"),
        ("row 3", "user 'u_7' belongs to a tenant other than 'acme'"), ("row 4", "there is no plan 'gold'"),
        ("row 5", "the key exists and belongs to user 'u_42'"), ("row 6", "another key has the id 'mine'"),
    ]  # fmt: skip


async def test_tenant_bound_directory_imports_only_for_its_own_users(rig: Rig, directory: Directory) -> None:
    await directory.tenants.create("other", "")
    await directory.users.create("u_7", "other", None)
    bound = Directory(rig.door, KeyFormat(), Actor("ann", "desk"), tenant_id="acme")
    keys = [ImportedKey("1", "u_7", digest="ab" * 32), ImportedKey("2", "u_new", "other", digest="cd" * 32),
            ImportedKey("3", "u_8", "acme", digest="ef" * 32)]  # fmt: skip
    report = await bound.key_importer.run(keys, dry_run=False)
    assert (report.imported, report.users, [place for place, _ in report.problems]) == (1, 1, ["1", "2"])
    assert await directory.keys.list_by_id("", 9, KeyFilter(tenant="other")) == []


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({}, "neither a digest nor a prefix"),
        ({"digest": "ab"}, "64 hexadecimal"),
        ({"prefix": PREFIX}, "neither"),
        ({"prefix": "a.b", "hashed_key": sha512(KEY)}, "the prefix"),
        ({"prefix": PREFIX, "hashed_key": "md5$$" + "0" * 32}, "neither sha512"),
        ({"prefix": PREFIX, "hashed_key": sha512(KEY)[:-1]}, "neither sha512"),
        ({"prefix": PREFIX, "hashed_key": pbkdf2(KEY).replace("$1000$", "$9999999$")}, "neither sha512"),
        ({"prefix": PREFIX, "hashed_key": pbkdf2(KEY).replace("$1000$", "$0$")}, "neither sha512"),
        ({"digest": "ab" * 32, "user": "two words"}, "invalid user id"),
        ({"digest": "ab" * 32, "id": "two words"}, "invalid key id"),
        ({"digest": "ab" * 32, "scopes": "jobs:*"}, "scopes must be"),
        ({"digest": "ab" * 32, "name": "x" * 201}, "the name"),
        ({"digest": "ab" * 32, "expires_at": "soon"}, "invalid ISO 8601 time"),
        ({"digest": "ab" * 32, "revoked": "perhaps"}, "invalid ISO 8601 time"),
    ],
)
def test_invalid_row_is_rejected(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Invalid, match=sentence):
        read_key("row 1", row, {"user": "u_42"})


def test_unknown_or_too_slow_hash_parameters_are_not_used() -> None:
    assert drf_api_keys.hashed(SecretKey(b"k"), "pbkdf2_sha256$99999999$s$") is None
    assert drf_api_keys.hashed(SecretKey(b"k"), "argon2$argon2id$v=19$") is None
