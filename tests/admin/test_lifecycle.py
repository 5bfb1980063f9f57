"""Each operation of the lifecycle through the API: its response, its effect, and its audit rows."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from keyproxy.config.schema import RouteRow
from keyproxy.store.postgres import roles
from keyproxy.store.postgres.database import Database
from tests.admin.conftest import Api, serving
from tests.server import as_role, may_log_in


def _seconds_until(text: str) -> float:
    return (datetime.fromisoformat(text) - datetime.now(UTC)).total_seconds()


async def test_a_user_is_created_with_its_first_key_once(api: Api) -> None:
    tenant = await api.call("POST", "/v1/tenants", {"id": "acme", "name": "Acme Ltd"})
    assert (tenant.status, tenant.headers["Location"]) == (201, "/v1/tenants/acme")
    first = await api.call("POST", "/v1/users", {"id": "u_1", "tenant": "acme", "key": {"scopes": ["jobs:write"]}})
    again = await api.call("POST", "/v1/users", {"id": "u_1", "tenant": "acme"})
    assert (first.status, again.status) == (201, 200)
    assert first.json["key"]["secret"].startswith("kp_live_")
    assert first.json["key"]["scopes"] == ["jobs:write"]
    assert again.json["key"] is None
    assert again.json["created"] is False
    assert (await api.done("GET", "/v1/users/u_1"))["keys"] == 1


async def test_no_first_key_is_issued_with_key_null(api: Api) -> None:
    await api.done("POST", "/v1/tenants", {"id": "acme"})
    assert (await api.done("POST", "/v1/users", {"id": "u_1", "tenant": "acme", "key": None}))["key"] is None
    assert (await api.done("GET", "/v1/keys"))["items"] == []


@pytest.mark.parametrize(
    ("wanted", "days"), [({}, 90), ({"expires_in_seconds": 86_400}, 1), ({"expires_in_seconds": None}, None)]
)
async def test_a_key_has_the_requested_or_the_configured_lifetime(
    api: Api, wanted: dict[str, int | None], days: int | None
) -> None:
    await api.user()
    key = await api.done("POST", "/v1/keys", {"user": "u_1", "is_test": True, "name": "nightly", **wanted})
    assert key["secret"].startswith("kp_test_")
    assert (key["name"], key["is_test"]) == ("nightly", True)
    if days is None:
        assert key["expires_at"] is None
    else:
        assert _seconds_until(key["expires_at"]) == pytest.approx(days * 86_400, abs=60)


async def test_a_secret_is_shown_only_once(api: Api) -> None:
    await api.user()
    secret = (await api.done("POST", "/v1/keys", {"user": "u_1"}))["secret"]
    rotated = (await api.done("GET", "/v1/keys"))["items"]
    result = [await api.call("GET", path) for path in ("/v1/keys", "/v1/audit", "/v1/audit/export", "/v1/users")]
    result += [await api.call("GET", f"/v1/keys/{key['id']}") for key in rotated]
    assert all(reply.status == 200 for reply in result)
    assert secret.encode() not in b"".join(reply.body for reply in result)
    tables = await api.database.fetch("keys", "", 10, *[None] * 7)
    assert secret not in str(tables)
    assert secret not in str(api.log)


async def test_a_scope_that_no_route_requires_causes_a_warning(database: Database) -> None:
    async with serving(database, routes=(RouteRow("* /v1/jobs", ["jobs:write"]),)) as api:
        await api.user()
        key = await api.done("POST", "/v1/keys", {"user": "u_1", "scopes": ["jobs:write", "job:write"]})
        assert key["warnings"] == ["no route requires the scope 'job:write'"]


async def test_a_key_that_every_route_refuses_causes_a_warning_wherever_scopes_are_set(database: Database) -> None:
    row = {"user": "u_1", "digest": "00" * 32}
    async with serving(database, routes=(RouteRow("* /v1/jobs", ["jobs:write"]),)) as api:
        user = await api.done("POST", "/v1/tenants", {"id": "acme"})
        user = await api.done("POST", "/v1/users", {"id": "u_1", "tenant": "acme"})
        key_id = user["key"]["id"]
        answers = [
            user,
            await api.done("POST", "/v1/keys", {"user": "u_1"}),
            await api.done("POST", "/v1/keys/issue", {"keys": [{"user": "u_1", "name": "n"}]}),
            await api.done("POST", "/v1/keys/import", {"keys": [row]}),
            await api.done("PATCH", f"/v1/keys/{key_id}", {"scopes": []}),
        ]
        for answer in answers:
            (warning,) = answer["warnings"]
            assert "has no scopes and every route requires one" in warning
        good = await api.done("PATCH", f"/v1/keys/{key_id}", {"scopes": ["jobs:write", "jobs:write"]})
        assert (good["warnings"], good["scopes"]) == ([], ["jobs:write"])
        assert (await api.done("PATCH", f"/v1/keys/{key_id}", {"name": "n"}))["scopes"] == ["jobs:write"]
    async with serving(database, routes=(RouteRow("* /v1/jobs", ["jobs:write"]), RouteRow("GET /"))) as api:
        assert (await api.done("POST", "/v1/keys", {"user": "u_1"}))["warnings"] == []


async def test_a_rotated_key_is_replaced_and_retires(api: Api) -> None:
    old = (await api.user(scopes=["jobs:write"]))["key"]
    new = await api.call("POST", f"/v1/keys/{old['id']}/rotate", {"grace_seconds": 3600})
    assert new.status == 201
    assert new.json["secret"] != old["secret"]
    assert (new.json["replaces"], new.json["scopes"]) == (old["id"], ["jobs:write"])
    assert _seconds_until(new.json["old_expires_at"]) == pytest.approx(3600, abs=60)
    assert (await api.done("GET", f"/v1/keys/{old['id']}"))["state"] == "retiring"
    assert (await api.call("POST", f"/v1/keys/{old['id']}/rotate")).code == "conflict"


async def test_a_revoked_key_stays_revoked_with_its_reason(api: Api) -> None:
    key = (await api.user())["key"]
    first = await api.done("POST", f"/v1/keys/{key['id']}/revoke", {"reason": "left the company"})
    again = await api.done("POST", f"/v1/keys/{key['id']}/revoke")
    assert (first["state"], first["revoke_reason"]) == ("revoked", "left the company")
    assert (again["revoked_at"], again["revoke_reason"]) == (first["revoked_at"], "left the company")


async def test_users_and_tenants_are_disabled_and_enabled_again(api: Api) -> None:
    key = (await api.user())["key"]
    for path in ("/v1/users/u_1", "/v1/tenants/acme"):
        assert (await api.done("PATCH", path, {"disabled": True}))["disabled_at"] is not None
        assert (await api.done("GET", f"/v1/keys/{key['id']}"))["state"] == "disabled"
        assert (await api.done("PATCH", path, {"disabled": False}))["disabled_at"] is None
        assert (await api.done("GET", f"/v1/keys/{key['id']}"))["state"] == "active"


async def test_a_plan_is_assigned_removed_and_not_deleted_while_in_use(api: Api) -> None:
    key = (await api.user())["key"]
    made = await api.call("PUT", "/v1/plans/basic", {"limits": {"rate": 50, "requests_per_day": 1000}})
    assert (made.status, made.json["created"]) == (201, True)
    paths = ("/v1/tenants/acme", "/v1/users/u_1", f"/v1/keys/{key['id']}")
    for path in paths:
        assert (await api.done("PATCH", path, {"plan": "basic"}))["plan"] == "basic"
    plan = await api.done("GET", "/v1/plans/basic")
    assert [plan["tenants"], plan["users"], plan["keys"]] == [1, 1, 1]
    assert (await api.call("DELETE", "/v1/plans/basic")).code == "conflict"
    for path in paths:
        assert (await api.done("PATCH", path, {"plan": None}))["plan"] is None
    assert await api.done("DELETE", "/v1/plans/basic") == {"id": "basic", "deleted": True}
    assert (await api.call("PATCH", "/v1/users/u_1", {"plan": "basic"})).code == "not_found"


async def test_a_leaked_key_is_revoked_by_itself_or_by_its_digest(api: Api) -> None:
    secret = (await api.user())["key"]["secret"]
    other = (await api.user("u_2"))["key"]["secret"]
    result = await api.done("POST", "/v1/leaked-keys", {"key": secret, "reason": "in a public repository"})
    assert (result["known"], result["revoked_now"]) == (True, True)
    assert (result["key"]["user"], result["key"]["revoke_reason"]) == ("u_1", "in a public repository")
    assert (await api.done("POST", "/v1/leaked-keys", {"key": secret}))["revoked_now"] is False
    digest = hashlib.sha256(other.encode()).hexdigest()
    assert (await api.done("POST", "/v1/leaked-keys", {"digest": digest}))["key"]["user"] == "u_2"
    nobody = await api.done("POST", "/v1/leaked-keys", {"digest": "00" * 32})
    assert nobody == {"known": False, "revoked_now": False, "tenant": None, "user": None, "key": None}


async def test_many_keys_are_revoked_in_parts_until_none_remain(api: Api) -> None:
    await api.user()
    for _ in range(4):
        await api.done("POST", "/v1/keys", {"user": "u_1"})
    await api.user("u_2")
    wanted = {"user": "u_1", "limit": 3, "reason": "customer leaves"}
    dry = await api.done("POST", "/v1/keys/revoke", wanted | {"dry_run": True})
    assert dry == {"revoked": [], "remaining": 5}
    remaining: list[int] = []
    while not remaining or remaining[-1]:
        remaining.append((await api.done("POST", "/v1/keys/revoke", wanted))["remaining"])
    assert remaining == [2, 0]
    states = {(key["user"], key["state"]) for key in (await api.done("GET", "/v1/keys"))["items"]}
    assert states == {("u_1", "revoked"), ("u_2", "active")}


async def test_deleted_objects_are_gone_and_remain_in_the_audit_log(api: Api) -> None:
    key = (await api.user())["key"]
    await api.user("u_2")
    assert (await api.done("DELETE", f"/v1/keys/{key['id']}"))["deleted"] is True
    await api.done("DELETE", "/v1/users/u_1")
    await api.done("DELETE", "/v1/tenants/acme")
    for path in (f"/v1/keys/{key['id']}", "/v1/users/u_1", "/v1/users/u_2", "/v1/tenants/acme"):
        assert (await api.call("GET", path)).code == "not_found"
    assert [row["action"] for row in await api.audit(entity="key", entity_id=key["id"])] == ["delete", "insert"]


async def test_every_change_is_audited_with_the_token_and_the_peer(api: Api) -> None:
    secret = await api.token("admin:write")
    token_id = (await api.done("GET", "/v1/token", token=secret))["id"]
    await api.done("POST", "/v1/tenants", {"id": "acme"}, token=secret)
    user = await api.done("POST", "/v1/users", {"id": "u_1", "tenant": "acme"}, token=secret)
    await api.done("PATCH", "/v1/tenants/acme", {"name": "Acme"}, token=secret)
    await api.done("PUT", "/v1/plans/basic", {"limits": {}}, token=secret)
    await api.done("POST", f"/v1/keys/{user['key']['id']}/rotate", token=secret)
    await api.done("POST", "/v1/leaked-keys", {"key": user["key"]["secret"]}, token=secret)
    rows = await api.audit(actor=f"token:{token_id}")
    assert {row["origin"] for row in rows} == {"127.0.0.1"}
    assert {row["db_role"] for row in rows} == {"keyproxy"}
    assert [(row["entity"], row["action"]) for row in reversed(rows)] == [
        ("tenant", "insert"), ("user", "insert"), ("key", "insert"), ("tenant", "update"), ("plan", "insert"),
        ("key", "insert"), ("key", "update"), ("key", "update"),
    ]  # fmt: skip
    renamed = next(row for row in rows if (row["entity"], row["action"]) == ("tenant", "update"))
    assert (renamed["before"]["name"], renamed["after"]["name"], renamed["changed"]) == ("", "Acme", ["name"])


async def test_the_audit_log_is_exported_completely_and_resumes(api: Api) -> None:
    for number in range(30):
        await api.directory.tenants.create(f"t_{number}", "")
    first = (await api.call("GET", "/v1/audit/export?entity=tenant")).body.splitlines()
    assert len(first) == 30
    last = (await api.done("GET", "/v1/audit?limit=1"))["items"][0]["id"]
    await api.directory.tenants.create("later", "")
    second = await api.call("GET", f"/v1/audit/export?after={last}")
    assert second.headers["Content-Type"] == "application/x-ndjson"
    assert second.json["entity_id"] == "later"


async def test_keys_are_listed_by_age_use_and_expiry(api: Api) -> None:
    await api.user()
    soon = await api.done("POST", "/v1/keys", {"user": "u_1", "expires_in_seconds": 3600})
    found = await api.done("GET", f"/v1/keys?expires_within_seconds={int(timedelta(days=1).total_seconds())}")
    assert [key["id"] for key in found["items"]] == [soon["id"]]
    by_expiry = await api.done("GET", "/v1/keys?sort=expires&limit=1")
    assert by_expiry["items"][0]["id"] == soon["id"]
    rest = await api.done("GET", f"/v1/keys?sort=expires&limit=1&cursor={by_expiry['next']}")
    assert rest["items"][0]["id"] != soon["id"]
    assert (await api.done("GET", "/v1/keys?unused_seconds=60&older_than_seconds=60"))["items"] == []


async def test_the_admin_role_suffices_for_the_complete_lifecycle(dsn: str) -> None:
    prefix = f"kp_{secrets.token_hex(4)}"
    await roles.create(dsn, prefix)
    owner = await asyncpg.connect(dsn)
    await owner.execute(may_log_in(dsn, f"{prefix}_admin"))
    await owner.close()
    database = Database(as_role(dsn, f"{prefix}_admin"), pool_size_max=2, statement_timeout_seconds=5.0)
    await database.open()
    try:
        async with serving(database) as api:
            key = (await api.user())["key"]
            token = await api.token("admin:write")
            body = {"user": "u_1"}
            again = {"headers": {"Idempotency-Key": "k"}, "token": token}
            made = [await api.done("POST", "/v1/keys", body, **again) for _ in range(2)]
            assert made[0]["id"] == made[1]["id"]
            await api.done("PUT", "/v1/plans/basic", {"limits": {"rate": 5}}, token=token)
            await api.done("PATCH", "/v1/users/u_1", {"plan": "basic"}, token=token)
            await api.done("POST", f"/v1/keys/{key['id']}/rotate", token=token)
            await api.done("POST", "/v1/leaked-keys", {"key": key["secret"]}, token=token)
            await api.done("POST", "/v1/keys/revoke", {"tenant": "acme"}, token=token)
            for path in ("/v1/tenants", "/v1/users", "/v1/keys?sort=used", "/v1/plans", "/v1/audit"):
                assert (await api.done("GET", path, token=token))["items"]
            assert (await api.call("GET", "/v1/audit/export", token=token)).status == 200
            for path in (f"/v1/keys/{key['id']}", "/v1/users/u_1", "/v1/plans/basic", "/v1/tenants/acme"):
                await api.done("DELETE", path, token=token)
    finally:
        await database.close()
        connection = await asyncpg.connect(dsn)
        for role in roles.names(prefix):
            await connection.execute(f'DROP OWNED BY "{role}"')
            await connection.execute(f'DROP ROLE "{role}"')
        await connection.close()
