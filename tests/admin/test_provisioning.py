"""An application provisions its users over the admin API with a token that has `users:write` and `keys:write` only."""

from __future__ import annotations

import hashlib

import pytest

from tests.admin.conftest import Api, Json

_FOREIGN = "sha512$$" + hashlib.sha512(b"Ab3dE6gH.abcdefghijklmnopqrstuvwxyz012345").hexdigest()


@pytest.fixture
async def token(api: Api) -> str:
    """The application's token. There are two tenants."""
    await api.directory.tenants.create("acme", "")
    await api.directory.tenants.create("globex", "")
    return await api.token("users:write", "keys:write")


async def test_repeated_sign_up_creates_one_user_and_one_key_and_shows_the_secret_once(api: Api, token: str) -> None:
    body: Json = {"id": "u_42", "tenant": "acme", "key": {"name": "first", "expires_in_seconds": 3600}}
    headers = {"Idempotency-Key": "u_42"}
    first, again = [await api.call("POST", "/v1/users", body, headers=headers, token=token) for _ in range(2)]
    assert (first.status, again.status, again.headers["Idempotency-Replayed"]) == (201, 201, "true")
    assert first.json["key"]["secret"].startswith("kp_live_")
    assert again.json == {**first.json, "key": {**first.json["key"], "secret": None}}
    # Without the key, an existing user stays as it is and gets no further key.
    later = await api.call("POST", "/v1/users", body, token=token)
    assert (later.status, later.json["created"], later.json["keys"], later.json["key"]) == (200, False, 1, None)
    other = await api.call("POST", "/v1/users", {**body, "tenant": "globex"}, token=token)
    assert (other.status, other.code) == (409, "conflict")


async def test_user_is_disabled_enabled_and_deleted_by_id(api: Api, token: str) -> None:
    await api.user("u_42")
    for disabled in (True, True, False):
        shown = await api.done("PATCH", "/v1/users/u_42", {"disabled": disabled}, token=token)
        assert (shown["disabled_at"] is not None) is disabled
    assert (await api.call("DELETE", "/v1/users/u_42", token=token)).status == 200
    assert (await api.call("DELETE", "/v1/users/u_42", token=token)).code == "not_found"
    assert (await api.call("PATCH", "/v1/users/u_42", {"disabled": True}, token=token)).code == "not_found"


async def test_key_is_rotated_once_however_often_the_request_is_sent_and_its_revocation_keeps_its_reason(
    api: Api, token: str
) -> None:
    await api.user("u_42")
    wish: Json = {
        "user": "u_42",
        "name": "Größe",
        "is_test": True,
        "scopes": ["jobs:write"],
        "expires_in_seconds": 3600,
    }
    key = await api.done("POST", "/v1/keys", wish, token=token)
    path, headers = f"/v1/keys/{key['id']}/rotate", {"Idempotency-Key": "r"}
    new, again = [await api.done("POST", path, {"grace_seconds": 60}, headers=headers, token=token) for _ in range(2)]
    assert (again["id"], again["secret"]) == (new["id"], None)
    shown = ("name", "scopes", "is_test")
    assert [new[name] for name in shown] == [wish[name] for name in shown]
    assert (new["replaces"], new["old_expires_at"] < key["expires_at"]) == (key["id"], True)
    assert (await api.call("POST", path, {}, token=token)).code == "conflict"
    for reason in ("lost", "again"):
        revoked = await api.done("POST", f"/v1/keys/{new['id']}/revoke", {"reason": reason}, token=token)
        assert (revoked["state"], revoked["revoke_reason"]) == ("revoked", "lost")


async def test_writing_scopes_list_the_users_of_a_tenant_and_the_keys_of_a_user_and_nothing_else(
    api: Api, token: str
) -> None:
    await api.user("u_1", "acme")
    await api.user("u_2", "globex")
    users, keys = await api.token("users:write"), await api.token("keys:write")
    bound = await api.token("users:write", "keys:write", tenant="acme")
    cases: list[tuple[str, str, list[str] | None]] = [
        (token, "/v1/users?tenant=acme", ["u_1"]), (users, "/v1/users?tenant=globex", ["u_2"]),
        (token, "/v1/keys?user=u_1", ["u_1"]), (keys, "/v1/keys?user=u_2&state=active", ["u_2"]),
        (keys, "/v1/users?tenant=acme", None), (users, "/v1/keys?user=u_1", None),
        (token, "/v1/users", None), (token, "/v1/users?tenant=", None), (token, "/v1/keys", None),
        (token, "/v1/keys?tenant=acme", None), (token, "/v1/users/u_1", None), (token, "/v1/tenants", None),
        (bound, "/v1/users?tenant=acme", ["u_1"]), (bound, "/v1/users?tenant=globex", []),
        (bound, "/v1/keys?user=u_2", []),
    ]  # fmt: skip
    for held, path, expected in cases:
        reply = await api.call("GET", path, token=held)
        if expected is None:
            assert (reply.status, reply.code) == (403, "insufficient_scope"), path
        else:
            assert [item.get("user", item["id"]) for item in reply.json["items"]] == expected, path


async def test_foreign_keys_are_imported_with_name_mode_times_and_state_once(api: Api, token: str) -> None:
    rows: list[Json] = [
        {"prefix": "Ab3dE6g1", "name": "old", "is_test": True, "created_at": "2020-01-01T00:00:00Z",
         "expires_at": "2021-01-01T00:00:00Z"},
        {"prefix": "Ab3dE6g2", "name": "gone", "revoked": True, "scopes": ["jobs:write"]},
        {"prefix": "Ab3dE6g3", "expires_at": "2999-01-01T00:00:00Z"},
    ]  # fmt: skip
    rows = [{"user": "u_42", "tenant": "acme", "hashed_key": _FOREIGN, **row} for row in rows]
    weak = {**rows[0], "prefix": "Ab3dE6g4", "hashed_key": "argon2$x"}
    for dry_run, counts in ((True, (3, 0, 1)), (False, (3, 0, 1)), (False, (0, 3, 0))):
        body = {"keys": [*rows, weak], "dry_run": dry_run}
        report = await api.done("POST", "/v1/keys/import", body, token=token)
        assert (report["imported"], report["present"], report["users"]) == counts
        assert [problem["index"] for problem in report["problems"]] == [3]
    keys = {key["hint"][:8]: key for key in (await api.done("GET", "/v1/keys?user=u_42", token=token))["items"]}
    assert {prefix: (key["state"], key["name"], key["is_test"]) for prefix, key in keys.items()} == {
        "Ab3dE6g1": ("expired", "old", True),
        "Ab3dE6g2": ("revoked", "gone", False),
        "Ab3dE6g3": ("active", "", False),
    }
    assert keys["Ab3dE6g1"]["created_at"] == "2020-01-01T00:00:00Z"
    assert keys["Ab3dE6g2"]["scopes"] == ["jobs:write"]
