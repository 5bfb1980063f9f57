"""Authentication and authorization: tokens, scopes, the restriction to one tenant, and throttled failures."""

from __future__ import annotations

import asyncio
import hashlib
import json
from datetime import timedelta
from typing import NamedTuple

import pytest

from keyproxy.admin.endpoints import Endpoint
from keyproxy.admin.scopes import Scope, allows
from keyproxy.admin.service import ENDPOINTS
from keyproxy.auth.api_key import KeyFormat
from keyproxy.auth.throttle import Throttle
from tests.admin.conftest import FILE_TOKEN, Api, add_oauth_session

UNKNOWN = KeyFormat().make_admin_token(bytes(32)).reveal().decode()


def _path(endpoint: Endpoint, thing: str) -> str:
    path = endpoint.path.replace("{kind}", "collection").replace("{agent}", "crawler")
    return path.replace("{client}", "worker").replace("{id}", thing)


def _name(endpoint: Endpoint) -> str:
    return endpoint.name


#: A valid body for each endpoint, about the user, tenant and plan with these ids.
def _body(endpoint: Endpoint, tenant: str, user: str) -> object:
    bodies: dict[str, object] = {
        "create_tenant": {"id": tenant},
        "register_prompt": {"category": "code"},
        "change_tenant": {"name": "changed"},
        "create_user": {"id": user, "tenant": tenant},
        "change_user": {"disabled": True},
        "issue_key": {"user": user},
        "issue_keys": {"keys": [{"user": user}]},
        "import_keys": {"keys": [{"user": user, "digest": "00" * 32}]},
        "revoke_keys": {"user": user},
        "change_key": {"name": "changed"},
        "rotate_key": {},
        "rotate_provider_key": {"secret": "sk-1"},
        "add_provider_key": {"provider": "openai", "secret": "sk-1", "tenant": tenant},
        "revoke_key": {},
        "report_leaked_key": {"digest": "00" * 32},
        "report_leaked_text": {"text": "nothing"},
        "find_keys": {"text": user},
        "change_plan": {"limits": {"concurrency": 1}},
        "set_plan": {"limits": {"concurrency": 1}},
        "credit_window": {"user": user, "limit": "tokens/day", "amount": 1, "reason": "r"},
        "explain_request": {"path": "/", "body": "{}"},
        "explain_agent_token_request": {"path": "/", "body": "{}"},
        "set_role": {"scopes": ["jobs:read"]},
        "add_owned": {"tenant": tenant},
        "mint_agent_token": {"agent": "crawler", "scopes": ["a"]},
        "change_agent": {"disabled": True},
        "create_oauth_client": {"client_id": "worker", "auth_method": "client_secret", "user": user},
        "change_oauth_client": {"disabled": True},
        "change_grant": {"plan": None},
        "revoke_grants": {"user": user},
        "revoke_sessions": {"user": user},
        "link_oauth_subject": {"issuer": "https://idp.example", "subject": "alice", "user": user},
    }
    return bodies.get(endpoint.name)


@pytest.mark.parametrize(
    ("shown", "code"),
    [
        (None, "token_missing"),
        ("Basic YTpi", "token_missing"),
        ("Bearer", "token_invalid"),
        ("Bearer nonsense", "token_invalid"),
        (f"Bearer {FILE_TOKEN}x", "token_invalid"),
        (f"Bearer {UNKNOWN}", "token_invalid"),
        ("Bearer \xe9\xe9", "token_invalid"),
    ],
)
async def test_every_request_needs_a_working_token(api: Api, shown: str | None, code: str) -> None:
    reply = await api.call("GET", "/v1/tenants", token=None, headers={} if shown is None else {"Authorization": shown})
    assert (reply.status, reply.code) == (401, code)
    assert reply.headers["WWW-Authenticate"].startswith("Bearer ")


async def test_every_endpoint_checks_the_token_first(api: Api) -> None:
    for endpoint in ENDPOINTS:
        api.now[0] += 60
        reply = await api.call(endpoint.method, _path(endpoint, "x"), data=b"{broken", token=None)
        assert reply.code == "token_missing", endpoint.name


async def test_a_token_works_until_it_expires_or_is_revoked_or_its_tenant_is_disabled(api: Api) -> None:
    await api.directory.tenants.create("acme", "")
    expired = await api.token("admin:read", expires_in=timedelta(microseconds=1))
    bound = await api.token("admin:read", tenant="acme")
    revoked = await api.token("admin:read")
    assert (await api.call("GET", "/v1/token", token=expired)).code == "token_expired"
    found = await api.done("GET", "/v1/token", token=revoked)
    await api.tokens.revoke(found["id"])
    assert (await api.call("GET", "/v1/token", token=revoked)).code == "token_revoked"
    assert (await api.call("GET", "/v1/token", token=bound)).status == 200
    await api.done("PATCH", "/v1/tenants/acme", {"disabled": True})
    assert (await api.call("GET", "/v1/token", token=bound)).code == "account_disabled"


async def test_a_token_is_stored_as_its_digest_and_its_changes_are_audited(api: Api) -> None:
    secret = await api.token("keys:read")
    (token,) = await api.tokens.tokens("", 10)
    assert token["last_used_at"] is None
    await api.done("GET", "/v1/keys", token=secret)
    assert (await api.tokens.tokens("", 10))[0]["last_used_at"] is not None
    await api.tokens.revoke(token["id"])
    rows = await api.audit(entity="token")
    assert [(row["action"], row["actor"]) for row in rows] == [("update", "cli:test"), ("insert", "cli:test")]
    assert rows[0]["changed"] == ["revoked_at"]
    kept = await api.database.fetch("admin_tokens", "", 10, None)
    assert secret[9:] not in str([kept, rows])


async def test_a_token_is_no_key_and_a_key_is_no_token(api: Api) -> None:
    token = await api.token("admin:read")
    key = (await api.user())["key"]["secret"]
    assert not KeyFormat().may_exist(token.encode())
    assert (await api.call("GET", "/v1/token", token=key)).code == "token_invalid"


async def test_every_endpoint_is_refused_to_a_token_without_its_scope(api: Api) -> None:
    for endpoint in ENDPOINTS:
        if endpoint.scope is None:
            continue
        others = [scope for scope in Scope if not allows([scope], endpoint.scope)]
        token = await api.token(*others)
        reply = await api.call(endpoint.method, _path(endpoint, "x"), _body(endpoint, "acme", "u_1"), token=token)
        assert (reply.status, reply.code) == (403, "insufficient_scope"), endpoint.name
        assert endpoint.scope in reply.headers["WWW-Authenticate"]


@pytest.mark.parametrize(
    ("held", "needed", "allowed"),
    [
        ("keys:write", Scope.KEYS_WRITE, True),
        ("keys:write", Scope.KEYS_READ, False),
        ("admin:read", Scope.AUDIT_READ, True),
        ("admin:read", Scope.KEYS_WRITE, False),
        ("admin:read", Scope.LEAKS_WRITE, False),
        ("admin:write", Scope.AUDIT_READ, True),
        ("admin:write", Scope.PLANS_WRITE, True),
        ("users:write", Scope.ADMIN_WRITE, False),
    ],
)
def test_a_scope_allows_itself_and_admin_allows_the_rest(held: str, needed: Scope, allowed: bool) -> None:
    assert allows([held], needed) is allowed


class _Two(NamedTuple):
    """Another tenant's user, key and agent token, and the values that must not appear anywhere."""

    key_id: str
    secret: str
    token_id: str
    grant_id: str
    session_id: str

    @property
    def marks(self) -> list[str]:
        return ["other", "o_1", self.key_id, self.token_id, self.grant_id, self.session_id]


async def _two_tenants(api: Api) -> _Two:
    await api.user("u_1", "acme")
    other = await api.user("o_1", "other", scopes=("a",))
    minted = await api.directory.agent_tokens.mint(other["key"]["id"], {"agent": "crawler", "scopes": ["a"]})
    await api.done("PUT", "/v1/plans/basic", {"limits": {}})
    await api.done("PATCH", "/v1/tenants/other", {"plan": "basic"})
    grant, session = await add_oauth_session(api, "o_1")
    return _Two(other["key"]["id"], other["key"]["secret"], minted["id"], grant, session)


async def _all_of(api: Api, tenant: str) -> str:
    """All data of a tenant."""
    things = [await api.done("GET", path) for path in (f"/v1/tenants/{tenant}", f"/v1/users?tenant={tenant}")]
    things += [await api.done("GET", f"/v1/users/{user['id']}/agents") for user in things[1]["items"]]
    things += [await api.done("GET", f"/v1/users/{user['id']}/grants") for user in things[1]["items"]]
    keys = (await api.done("GET", f"/v1/keys?tenant={tenant}"))["items"]
    return json.dumps([things, [{**key, "last_used_at": None} for key in keys]], sort_keys=True)


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=_name)
async def test_a_bound_token_sees_and_touches_its_tenant_alone_at_every_endpoint(api: Api, endpoint: Endpoint) -> None:
    other = await _two_tenants(api)
    bound = await api.token("admin:write", tenant="acme")
    before = await _all_of(api, "other")
    kind = endpoint.path.split("/")[2]
    things = {"tenants": "other", "users": "o_1", "keys": other.key_id, "plans": "basic", "prompts": "0f" * 32}
    things["agent-tokens"] = other.token_id
    things["provider-keys"] = "pvk_1"
    things |= {"grants": other.grant_id, "sessions": other.session_id}
    await api.database.fetch("add_provider_key", "pvk_1", "openai", "other", False, b"x" * 40, "k1", "", None)
    thing = things.get(kind, "thing")
    body = _body(endpoint, "other", "o_1")
    paths = [_path(endpoint, thing)]
    if endpoint.name == "explain_key":
        paths = [f"{paths[0]}?path=/"]
    if endpoint.name == "report_leaked_key":
        body = {"key": other.secret}
    if endpoint.name in ("report_leaked_text", "find_keys"):
        body = {"text": f"Authorization: Api-Key {other.secret}"}
    if endpoint.name == "unlink_oauth_subject":
        await api.database.fetch("add_subject", "https://idp.example", "alice", "o_1")
        paths = [f"{paths[0]}?issuer=https://idp.example&subject=alice"]
    if endpoint.method == "GET" and "{id}" not in endpoint.path:
        fields = endpoint.query.model_fields
        named = {"tenant": "other", "user": "o_1", "entity_id": "o_1"}
        paths += [f"{paths[0]}?{name}={value}" for name, value in named.items() if name in fields]
    for path in paths:
        reply = await api.call(endpoint.method, path, body, token=bound)
        assert reply.status < 500
        result = reply.body.decode()
        # A refusal may repeat the name from the request.
        marks = other.marks if reply.status < 300 else ["acme", other.secret]
        assert not [mark for mark in marks if f'"{mark}"' in result], result
        if endpoint.is_global:
            assert reply.code == "tenant_bound"
        elif "{id}" in endpoint.path and kind != "plans":
            assert reply.code == "not_found"
    assert await _all_of(api, "other") == before


async def test_a_tenant_token_imports_digests_for_its_users_and_learns_nothing_of_others(api: Api) -> None:
    other = await _two_tenants(api)
    bound = await api.token("keys:write", "users:write", tenant="acme")
    digest = hashlib.sha256(other.secret.encode()).hexdigest()
    foreign = {"prefix": "Ab3dE6gH", "hashed_key": "sha512$$" + "0" * 128}
    rows = [
        {"user": "u_1", "digest": "01" * 32},
        {"user": "u_2", "tenant": "acme", "digest": "02" * 32},
        {"user": "u_3", "tenant": "other", "digest": "03" * 32},
        {"user": "o_1", "digest": "04" * 32},
        {"user": "u_1", "digest": digest},
        {"user": "u_1", **foreign},
    ]
    before = await _all_of(api, "other")
    result = await api.done("POST", "/v1/keys/import", {"keys": rows}, token=bound)
    assert {name: result[name] for name in ("imported", "present", "users")} == {
        "imported": 2,
        "present": 0,
        "users": 1,
    }
    assert result["problems"] == [
        {"index": 2, "problem": "there is no user 'u_3' and no tenant 'other'"},
        {"index": 3, "problem": "there is no user 'o_1'"},
        {"index": 4, "problem": "the key exists and belongs to another user"},
        {"index": 5, "problem": "an actor bound to a tenant can import keys by digest only"},
    ]
    assert await _all_of(api, "other") == before


async def test_an_import_creates_users_only_with_the_scope_for_it(api: Api) -> None:
    await api.user("u_1", "acme")
    token = await api.token("keys:write")
    row = {"user": "u_2", "digest": "01" * 32}
    refused = await api.call("POST", "/v1/keys/import", {"keys": [{**row, "tenant": "acme"}]}, token=token)
    assert (refused.status, refused.code) == (403, "insufficient_scope")
    assert "users:write" in refused.headers["WWW-Authenticate"]
    result = await api.done("POST", "/v1/keys/import", {"keys": [row, {**row, "user": "u_1"}]}, token=token)
    assert (result["imported"], result["problems"]) == (1, [{"index": 0, "problem": "there is no user 'u_2'"}])


async def test_a_bound_token_takes_no_cursor_into_another_tenant(api: Api) -> None:
    await _two_tenants(api)
    await api.user("o_2", "other")
    await api.user("u_2", "acme")
    bound = await api.token("admin:read", tenant="acme")
    for path in ("/v1/users", "/v1/keys", "/v1/keys?sort=created", "/v1/audit"):
        sign = "&" if "?" in path else "?"
        everybodys = (await api.done("GET", f"{path}{sign}limit=1"))["next"]
        result = await api.done("GET", f"{path}{sign}cursor={everybodys}", token=bound)
        assert {item["tenant"] for item in result["items"]} <= {"acme"}


async def test_a_bound_token_can_use_its_scopes_within_its_tenant(api: Api) -> None:
    await _two_tenants(api)
    bound = await api.token("admin:write", tenant="acme")
    user = await api.done("POST", "/v1/users", {"id": "u_9", "tenant": "acme"}, token=bound)
    await api.done("POST", f"/v1/keys/{user['key']['id']}/rotate", token=bound)
    assert [one["id"] for one in (await api.done("GET", "/v1/tenants", token=bound))["items"]] == ["acme"]
    assert {one["id"] for one in (await api.done("GET", "/v1/users", token=bound))["items"]} == {"u_1", "u_9"}
    rows = (await api.done("GET", "/v1/audit", token=bound))["items"]
    assert {row["tenant"] for row in rows} == {"acme"}
    exported = (await api.call("GET", "/v1/audit/export", token=bound)).body
    assert b"other" not in exported
    assert exported.count(b"\n") == len(rows)
    plan = await api.done("GET", "/v1/plans/basic", token=bound)
    assert (plan["tenants"], plan["users"], plan["keys"]) == (None, None, None)
    revoked = await api.done("POST", "/v1/keys/revoke", {"older_than_seconds": 1, "dry_run": True}, token=bound)
    assert revoked["remaining"] <= 3


async def test_another_tenants_user_cannot_be_taken_over_by_creating_it_again(api: Api) -> None:
    await _two_tenants(api)
    bound = await api.token("users:write", tenant="acme")
    reply = await api.call("POST", "/v1/users", {"id": "o_1", "tenant": "acme"}, token=bound)
    assert reply.code == "conflict"
    assert b'"other"' not in reply.body
    assert b"'other'" not in reply.body


async def test_failures_are_throttled_and_a_valid_token_never_is(api: Api) -> None:
    codes = [(await api.call("GET", "/v1/token", token="wrong")).code for _ in range(12)]
    assert codes == ["token_invalid"] * 10 + ["too_many_failures"] * 2
    last = await api.call("GET", "/v1/token", token="wrong")
    assert (last.status, last.headers["Retry-After"]) == (429, "6")
    good = await api.token("admin:read")
    for _ in range(20):
        assert (await api.call("GET", "/v1/token", token=good)).status == 200
    api.now[0] += 6.1
    assert (await api.call("GET", "/v1/token", token="wrong")).code == "token_invalid"
    assert (await api.call("GET", "/v1/token", token="wrong")).code == "too_many_failures"


def test_peers_fail_apart_and_an_ipv6_network_as_one() -> None:
    throttle = Throttle(burst=1, seconds_each=10)
    assert [throttle.count(peer, 0.0) for peer in ("192.0.2.1", "192.0.2.2", "::ffff:192.0.2.1")] == [0, 0, 10]
    assert [throttle.count(peer, 0.0) for peer in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")] == [0, 10, 0]
    assert throttle.count("unix", 0.0) == 0


@pytest.mark.parametrize(("after_seconds", "wait_seconds"), [(0.0, 10), (9.5, 1), (10.0, 0), (1000.0, 0)])
def test_a_throttled_peer_may_fail_again_after_waiting(after_seconds: float, wait_seconds: int) -> None:
    throttle = Throttle(burst=1, seconds_each=10)
    assert throttle.count("192.0.2.1", 50.0) == 0
    assert throttle.count("192.0.2.1", 50.0 + after_seconds) == wait_seconds


def test_the_table_of_failures_is_bounded() -> None:
    throttle = Throttle(burst=1, seconds_each=10, peers_max=3)
    for number in range(10):
        assert throttle.count(f"192.0.2.{number}", 0.0) == 0
    assert len(throttle) == 3
    assert throttle.count("192.0.2.9", 0.0) == 10


async def test_a_revoked_token_is_refused_with_the_next_request_also_while_others_are_under_way(api: Api) -> None:
    secret = await api.token("admin:read")
    token_id = (await api.done("GET", "/v1/token", token=secret))["id"]
    under_way = [asyncio.create_task(api.call("GET", "/v1/tenants", token=secret)) for _ in range(8)]
    await api.tokens.revoke(token_id)
    assert (await api.call("GET", "/v1/tenants", token=secret)).code == "token_revoked"
    assert {(await one).code for one in under_way} <= {"", "token_revoked"}
