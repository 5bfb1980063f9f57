"""Agents and agent tokens: the directory and the admin API give the same results; the API's own refusals."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from keyproxy.auth.api_key import SecretKey
from keyproxy.store.directory.directory import (
    Conflict,
    DelegationRefused,
    Entity,
    Invalid,
    KeyWish,
    NotFound,
    TooManyTokens,
)
from tests.admin.conftest import Api
from tests.admin.test_roles import Operations, operations
from tests.store.harness import Sql

__all__ = ["operations"]

WISH = {"agent": "crawler", "scopes": ["data:read"]}


@pytest.fixture
async def key(operations: Operations, api: Api) -> str:
    """A key of u_1 that acts for users of acme, of which u_2 is another one."""
    await api.directory.users.create("u_2", "acme", None)
    wish = KeyWish(scopes=("data:read", "data:write"), acts_for="tenant")
    made = await operations.directory.keys.issue("u_1", wish)
    operations.warnings(made)
    return str(made["id"])


def _claims(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


def _seconds_until(text: str) -> float:
    return (datetime.fromisoformat(text) - datetime.now(UTC)).total_seconds()


# -- minting


async def test_an_operator_mints_from_a_key_without_the_scope_to_mint(operations: Operations, key: str) -> None:
    wish = {**WISH, "token_budget": 10_000, "request_budget": 0, "ttl_seconds": 600, "audience": "keyproxy"}
    minted = await operations.directory.agent_tokens.mint(key, wish)
    token = minted.pop("token")
    assert 590 < _seconds_until(minted.pop("expires_at")) <= 600
    token_id = minted.pop("id")
    assert token_id.startswith("agt_")
    assert minted == {
        "agent": "crawler", "user": "u_1", "tenant": "acme", "scopes": ["data:read"], "token_budget": 10_000,
        "request_budget": 0, "audience": "keyproxy", "is_test": False, "depth": 0,
    }  # fmt: skip
    claims = _claims(token)
    assert (claims["jti"], claims["client_id"], claims["sub"]) == (token_id, key, "u_1")
    shown = await operations.directory.agent_tokens.get(token_id)
    assert (shown["key"], shown["actor"], shown["parent"], shown["revoked_at"]) == (key, None, None, None)
    assert "token" not in shown


async def test_the_signing_key_is_published_before_the_token_is_returned(
    operations: Operations, key: str, sql: Sql
) -> None:
    token = (await operations.directory.agent_tokens.mint(key, WISH))["token"]
    header = json.loads(base64.urlsafe_b64decode(token.split(".")[0] + "=="))
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.signing_keys WHERE kid = $1", header["kid"]) == 1


async def test_a_role_grants_those_of_its_scopes_that_the_key_has(operations: Operations, key: str) -> None:
    await operations.directory.roles.set("reader", ["data:read", "other:read"])
    minted = await operations.directory.agent_tokens.mint(key, {"agent": "crawler", "role": "reader"})
    assert minted["scopes"] == ["data:read"]


async def test_a_token_minted_while_acting_is_of_the_user_and_names_the_actor(operations: Operations, key: str) -> None:
    minted = await operations.directory.agent_tokens.mint(key, WISH, act_for="u_2")
    assert minted["user"] == "u_2"
    assert (await operations.directory.agent_tokens.get(minted["id"]))["actor"] == "u_1"
    assert _claims(minted["token"])["act"] == {
        "sub": "crawler", "type": "agent", "act": {"sub": "u_1", "type": "user", "key_id": key},
    }  # fmt: skip
    assert [agent["id"] for agent in await operations.directory.agents.list_by_id("u_2", "", 10)] == ["crawler"]
    assert await operations.directory.agents.list_by_id("u_1", "", 10) == []


@pytest.mark.parametrize(
    "wish",
    [
        {"scopes": ["data:read"]},
        {"agent": ".crawler", "scopes": ["data:read"]},
        {"agent": "a" * 65, "scopes": ["data:read"]},
        {"agent": "crawler"},
        {**WISH, "role": "reader"},
        {**WISH, "scopes": ["data *"]},
        {**WISH, "ttl_seconds": 0},
        {**WISH, "ttl_seconds": 901},
        {**WISH, "token_budget": -1},
        {**WISH, "token_budget": 10**15 + 1},
        {**WISH, "request_budget": -1},
        {**WISH, "audience": "another"},
    ],
)
async def test_a_malformed_mint_is_refused_without_a_row(
    operations: Operations, key: str, sql: Sql, wish: dict[str, Any]
) -> None:
    with pytest.raises(Invalid):
        await operations.directory.agent_tokens.mint(key, wish)
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.agents") == 0


@pytest.mark.parametrize(
    ("wish", "act_for"),
    [
        ({**WISH, "scopes": ["data:read", "data:delete"]}, None),
        ({"agent": "crawler", "role": "unknown"}, None),
        (WISH, "u_9"),
        (WISH, "g_1"),
    ],
)
async def test_a_mint_beyond_the_authority_of_the_key_is_refused_without_a_row(
    operations: Operations, key: str, sql: Sql, wish: dict[str, Any], act_for: str | None
) -> None:
    with pytest.raises(DelegationRefused):
        await operations.directory.agent_tokens.mint(key, wish, act_for=act_for)
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.agent_tokens") == 0
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.agents") == 0


async def test_a_key_that_acts_for_no_user_mints_for_its_owner_alone(operations: Operations, key: str) -> None:
    await operations.directory.keys.change(key, {"acts_for": "none"})
    with pytest.raises(DelegationRefused):
        await operations.directory.agent_tokens.mint(key, WISH, act_for="u_2")
    assert (await operations.directory.agent_tokens.mint(key, WISH))["user"] == "u_1"


async def test_nothing_is_minted_from_a_key_that_does_not_work(operations: Operations, key: str) -> None:
    with pytest.raises(NotFound):
        await operations.directory.agent_tokens.mint("key_x", WISH)
    await operations.directory.keys.revoke(key, "")
    with pytest.raises(DelegationRefused, match="the key is revoked"):
        await operations.directory.agent_tokens.mint(key, WISH)


async def test_no_more_tokens_than_allowed_are_minted_from_a_key(operations: Operations, key: str, sql: Sql) -> None:
    await sql.execute(
        """INSERT INTO keyproxy.agents (user_id, id) VALUES ('u_1', 'crawler');
        INSERT INTO keyproxy.agent_tokens (id, digest, user_id, agent_id, root_key_id, scopes, audience, expires_at)
        SELECT 'agt_' || lpad(n::text, 22, '0'), sha256(n::text::bytea), 'u_1', 'crawler', k.id, '{}', 'a',
               now() + interval '10 minutes'
        FROM generate_series(1, 1000) AS n, keyproxy.api_keys AS k WHERE k.acts_for = 'tenant'"""
    )
    with pytest.raises(TooManyTokens):
        await operations.directory.agent_tokens.mint(key, WISH)


# -- agents


async def test_agents_are_listed_changed_and_shown(operations: Operations, key: str) -> None:
    directory = operations.directory
    for agent in ("crawler", "writer", "Archiver.2"):
        await directory.agent_tokens.mint(key, {**WISH, "agent": agent})
    await directory.agent_tokens.mint(key, WISH)
    listed = await directory.agents.list_by_id("u_1", "", 10)
    assert [(agent["id"], agent["user"], agent["tenant"], agent["tokens"]) for agent in listed] == [
        ("Archiver.2", "u_1", "acme", 1), ("crawler", "u_1", "acme", 2), ("writer", "u_1", "acme", 1),
    ]  # fmt: skip
    first = await directory.agents.list_by_id("u_1", "", 2)
    assert [agent["id"] for agent in await directory.agents.list_by_id("u_1", first[-1]["id"], 2)] == ["writer"]
    shown = await directory.agents.get("u_1", "crawler")
    assert {name: shown[name] for name in ("roles", "plan", "disabled_at")} == {
        "roles": None, "plan": None, "disabled_at": None,
    }  # fmt: skip
    await directory.roles.set("reader", ["data:read"])
    await directory.plans.set("basic", {"concurrency": 1})
    changed = await directory.agents.change("u_1", "crawler", {"roles": ["reader"], "plan": "basic"})
    assert (changed["roles"], changed["plan"]) == (["reader"], "basic")
    assert (await directory.agents.change("u_1", "crawler", {"roles": []}))["roles"] == []
    changed = await directory.agents.change("u_1", "crawler", {"roles": None, "plan": None})
    assert (changed["roles"], changed["plan"]) == (None, None)


async def test_an_unknown_user_agent_role_or_plan_is_refused(operations: Operations, key: str) -> None:
    agents = operations.directory.agents
    await operations.directory.agent_tokens.mint(key, WISH)
    with pytest.raises(NotFound):
        await agents.list_by_id("u_9", "", 10)
    for user, agent in (("u_9", "crawler"), ("u_2", "crawler"), ("u_1", "unknown")):
        with pytest.raises(NotFound):
            await agents.get(user, agent)
        with pytest.raises(NotFound):
            await agents.change(user, agent, {"disabled": True})
        with pytest.raises(NotFound):
            await agents.revoke_tokens(user, agent, "")
    for changes in ({"roles": ["missing"]}, {"plan": "missing"}):
        with pytest.raises(NotFound):
            await agents.change("u_1", "crawler", changes)
    with pytest.raises(Invalid):
        await agents.change("u_1", "crawler", {"name": "x"})


async def test_a_disabled_agent_gets_no_tokens_until_it_is_enabled(operations: Operations, key: str) -> None:
    directory = operations.directory
    await directory.agent_tokens.mint(key, WISH)
    disabled = await directory.agents.change("u_1", "crawler", {"disabled": True})
    assert disabled["disabled_at"] is not None
    with pytest.raises(DelegationRefused, match="the agent is disabled"):
        await directory.agent_tokens.mint(key, WISH)
    again = await directory.agents.change("u_1", "crawler", {"disabled": True})
    assert again["disabled_at"] == disabled["disabled_at"]
    with pytest.raises(DelegationRefused):
        await directory.agent_tokens.mint(key, WISH)
    await directory.agent_tokens.mint(key, {**WISH, "agent": "another"})
    assert (await directory.agents.change("u_1", "crawler", {"disabled": False}))["disabled_at"] is None
    await directory.agent_tokens.mint(key, WISH)


async def test_a_plan_or_role_that_an_agent_has_cannot_be_deleted(operations: Operations, key: str) -> None:
    directory = operations.directory
    await directory.roles.set("reader", ["data:read"])
    await directory.plans.set("basic", {"concurrency": 1})
    await directory.agent_tokens.mint(key, WISH)
    await directory.agents.change("u_1", "crawler", {"roles": ["reader"], "plan": "basic"})
    assert (await directory.plans.get("basic"))["agents"] == (await directory.roles.get("reader"))["agents"] == 1
    for kind, name in ((directory.plans, "basic"), (directory.roles, "reader")):
        with pytest.raises(Conflict, match="assigned to 1 agent:"):
            await kind.delete(name)


# -- revocation


async def test_a_revoked_token_keeps_its_time_and_reason(operations: Operations, key: str) -> None:
    tokens = operations.directory.agent_tokens
    minted = await tokens.mint(key, WISH)
    revoked = await tokens.revoke(minted["id"], "seen in a log")
    assert revoked["revoke_reason"] == "seen in a log"
    assert revoked["revoked_at"] is not None
    assert await tokens.revoke(minted["id"], "another") == revoked
    with pytest.raises(NotFound):
        await tokens.revoke("agt_" + "0" * 22, "")


async def test_all_live_tokens_of_an_agent_are_revoked_and_no_others(operations: Operations, key: str) -> None:
    directory = operations.directory
    mine = [(await directory.agent_tokens.mint(key, WISH))["id"] for _ in range(3)]
    kept = [
        (await directory.agent_tokens.mint(key, {**WISH, "agent": "writer"}))["id"],
        (await directory.agent_tokens.mint(key, WISH, act_for="u_2"))["id"],
    ]
    await directory.agent_tokens.revoke(mine[0], "first")
    assert await directory.agents.revoke_tokens("u_1", "crawler", "all") == {
        "agent": "crawler", "user": "u_1", "revoked": 2,
    }  # fmt: skip
    shown = [await directory.agent_tokens.get(token) for token in (*mine, *kept)]
    assert [token["revoke_reason"] for token in shown] == ["first", "all", "all", None, None]
    assert (await directory.agents.revoke_tokens("u_1", "crawler", ""))["revoked"] == 0
    assert (await directory.agents.get("u_1", "crawler"))["tokens"] == 0
    await directory.agent_tokens.mint(key, WISH)


# -- the admin API alone


async def _key(api: Api) -> str:
    return str((await api.user(scopes=("data:read",)))["key"]["id"])


async def test_a_repeated_mint_omits_the_token_and_mints_no_second_one(api: Api, sql: Sql) -> None:
    path, once = f"/v1/keys/{await _key(api)}/agent-tokens", {"Idempotency-Key": "7d5c"}
    first = await api.call("POST", path, WISH, headers=once)
    again = await api.call("POST", path, WISH, headers=once)
    assert (first.status, again.status) == (201, 201)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert first.headers["Location"] == f"/v1/agent-tokens/{first.json['id']}"
    assert again.json == {name: value for name, value in first.json.items() if name != "token"}
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.agent_tokens") == 1
    stored = await sql.fetchval("SELECT string_agg(answer::text, ' ') FROM keyproxy.answered_requests")
    assert first.json["token"] not in stored
    other = await api.call("POST", path, {**WISH, "agent": "writer"}, headers=once)
    assert other.code == "idempotency_key_reused"


async def test_a_repeated_explanation_is_complete(api: Api) -> None:
    token = (await api.directory.agent_tokens.mint(await _key(api), WISH))["id"]
    path, body, once = f"/v1/agent-tokens/{token}/explain", {"path": "/", "body": ""}, {"Idempotency-Key": "7d5c"}
    first = await api.done("POST", path, body, headers=once)
    assert first["chain"][0]["token"] == token
    assert await api.done("POST", path, body, headers=once) == first


async def test_a_refused_mint_is_not_stored_and_evaluated_again(api: Api) -> None:
    path, once = f"/v1/keys/{await _key(api)}/agent-tokens", {"Idempotency-Key": "7d5c"}
    wish = {"agent": "crawler", "role": "reader"}
    refused = await api.call("POST", path, wish, headers=once)
    assert (refused.status, refused.code) == (403, "delegation_refused")
    await api.directory.roles.set("reader", ["data:read"])
    assert (await api.call("POST", path, wish, headers=once)).status == 201


@pytest.mark.parametrize(
    ("method", "path", "body", "scope"),
    [
        ("POST", "/v1/keys/KEY/agent-tokens", WISH, "keys:write"),
        ("GET", "/v1/keys/KEY/explain?act_for=u_1", None, "usage:read"),
        ("GET", "/v1/agent-tokens/TOKEN/explain", None, "usage:read"),
        ("POST", "/v1/agent-tokens/TOKEN/explain", {"path": "/", "body": ""}, "usage:read"),
        ("GET", "/v1/agent-tokens/TOKEN", None, "keys:read"),
        ("GET", "/v1/users/u_1/agents", None, "keys:read"),
        ("GET", "/v1/users/u_1/agents/crawler", None, "keys:read"),
        ("PATCH", "/v1/users/u_1/agents/crawler", {"disabled": True}, "keys:write"),
        ("POST", "/v1/users/u_1/agents/crawler/revoke", {}, "keys:write"),
        ("POST", "/v1/agent-tokens/TOKEN/revoke", {}, "keys:write"),
        ("PATCH", "/v1/keys/KEY", {"acts_for": "tenant"}, "keys:write"),
    ],
)
async def test_each_operation_needs_exactly_its_scope(
    api: Api, method: str, path: str, body: object, scope: str
) -> None:
    key = await _key(api)
    token = (await api.directory.agent_tokens.mint(key, WISH))["id"]
    path = path.replace("KEY", key).replace("TOKEN", token)
    others = {"keys:read", "keys:write", "users:write", "plans:write", "access:write", "usage:read", "leaks:write"}
    assert (await api.call(method, path, body, token=None)).code == "token_missing"
    wrong = await api.call(method, path, body, token=await api.token(*sorted(others - {scope})))
    assert (wrong.status, wrong.code) == (403, "insufficient_scope")
    assert f'scope="{scope}"' in wrong.headers["WWW-Authenticate"]
    assert (await api.call(method, path, body, token=await api.token(scope))).status < 300


async def test_a_token_bound_to_a_tenant_mints_for_users_of_its_tenant_alone(api: Api) -> None:
    key = await _key(api)
    await api.user("u_2")
    await api.user("g_1", "globex")
    await api.directory.keys.change(key, {"acts_for": "tenant"})
    bound, path = await api.token("keys:write", tenant="acme"), f"/v1/keys/{key}/agent-tokens"
    assert (await api.call("POST", path, {**WISH, "act_for": "u_2"}, token=bound)).status == 201
    refused = [await api.call("POST", path, {**WISH, "act_for": user}, token=bound) for user in ("g_1", "u_9")]
    assert [one.code for one in refused] == ["delegation_refused"] * 2
    assert refused[0].json["detail"] == refused[1].json["detail"]


async def test_an_agent_is_changed_only_if_it_has_the_expected_version(api: Api) -> None:
    key, path = await _key(api), "/v1/users/u_1/agents/crawler"
    await api.directory.agent_tokens.mint(key, WISH)
    etag = (await api.call("GET", path)).headers["ETag"]
    # A new token is no change of its agent.
    await api.directory.agent_tokens.mint(key, WISH)
    changed = await api.call("PATCH", path, {"disabled": True}, headers={"If-Match": etag})
    assert changed.status == 200
    assert (await api.call("PATCH", path, {"disabled": False}, headers={"If-Match": etag})).code == "outdated"
    await api.done("PATCH", path, {"disabled": False}, headers={"If-Match": changed.headers["ETag"]})


async def test_changes_of_agents_and_tokens_are_audited_with_their_author(api: Api) -> None:
    key = await _key(api)
    secret = await api.token("keys:write")
    author = f"token:{(await api.done('GET', '/v1/token', token=secret))['id']}"
    minted = await api.done("POST", f"/v1/keys/{key}/agent-tokens", WISH, token=secret)
    await api.done("PATCH", "/v1/users/u_1/agents/crawler", {"disabled": True}, token=secret)
    await api.done("POST", f"/v1/agent-tokens/{minted['id']}/revoke", {"reason": "r"}, token=secret)
    agents, tokens = await api.audit(entity="agent"), await api.audit(entity="agent_token")
    assert [(row["action"], row["entity_id"], row["changed"]) for row in agents] == [
        ("update", "u_1/crawler", ["disabled_at"]), ("insert", "u_1/crawler", []),
    ]  # fmt: skip
    assert [(row["action"], row["entity_id"], row["changed"]) for row in tokens] == [
        ("update", minted["id"], ["revoke_reason", "revoked_at"]), ("insert", minted["id"], []),
    ]  # fmt: skip
    assert {(row["actor"], row["tenant"], row["origin"]) for row in agents + tokens} == {(author, "acme", "127.0.0.1")}
    assert minted["token"] not in json.dumps(agents + tokens)
    assert "digest" not in tokens[1]["after"]


async def test_minted_tokens_are_counted_from_zero(api: Api) -> None:
    key, series = await _key(api), 'keyproxy_agent_tokens_minted_total{via="admin"}'
    token = await api.token("metrics:read")
    assert f"{series} 0.0\n" in (await api.call("GET", "/metrics", token=token)).body.decode()
    assert (await api.call("POST", f"/v1/keys/{key}/agent-tokens", {**WISH, "scopes": ["x"]})).status == 403
    await api.done("POST", f"/v1/keys/{key}/agent-tokens", WISH)
    assert f"{series} 1.0\n" in (await api.call("GET", "/metrics", token=token)).body.decode()


# -- explanations


def _subject(explained: Entity) -> tuple[Any, ...]:
    return tuple([explained[name] for name in ("key", "user", "actor", "agent", "effective_scopes", "allowed", "code")])


async def test_an_explanation_of_acting_names_user_actor_scopes_and_code(api: Api) -> None:
    key = await _key(api)
    await api.user("u_2")
    await api.user("g_1", "globex")
    path, scopes = f"/v1/keys/{key}/explain", ["data:read"]
    refused = (False, "delegation_refused")
    none = await api.done("GET", f"{path}?act_for=u_2")
    assert _subject(none) == (key, "u_2", "u_1", None, [], *refused)
    assert none["status"] == 403
    assert "set-acts-for" in none["detail"]
    await api.done("PATCH", f"/v1/keys/{key}", {"acts_for": "tenant"})
    assert _subject(await api.done("GET", f"{path}?act_for=u_2")) == (key, "u_2", "u_1", None, scopes, True, None)
    assert _subject(await api.done("GET", f"{path}?act_for=u_1")) == (key, "u_1", "u_1", None, scopes, True, None)
    assert _subject(await api.done("GET", path)) == (key, "u_1", None, None, scopes, True, None)
    for user in ("u_9", "g_1", ""):
        unusable = await api.done("GET", f"{path}?act_for={user}")
        assert _subject(unusable) == (key, user, "u_1", None, [], *refused)
    await api.directory.roles.set("writer", ["data:write"])
    for account, ceiling in (("u_2", "user_ceiling"), ("u_1", "actor_ceiling")):
        await api.directory.users.change(account, {"roles": ["writer"]})
        shrunk = await api.done("GET", f"{path}?act_for=u_2")
        assert (shrunk["effective_scopes"], shrunk[ceiling]) == ([], ["data:write"])
        await api.directory.users.change(account, {"roles": None})
    await api.directory.users.change("u_2", {"disabled": True})
    assert (await api.done("GET", f"{path}?act_for=u_2"))["code"] == "delegation_refused"
    await api.directory.users.change("u_1", {"disabled": True})
    assert (await api.done("GET", f"{path}?act_for=u_2"))["code"] == "account_disabled"
    assert (await api.call("GET", "/v1/keys/key_x/explain?act_for=u_2")).code == "not_found"


async def test_an_explanation_of_acting_has_the_limits_of_tenant_user_and_key(api: Api) -> None:
    key = await _key(api)
    await api.user("u_2")
    await api.directory.plans.set("few", {"requests_per_day": 5})
    await api.directory.plans.set("none", {"requests_per_day": 0})
    await api.directory.keys.change(key, {"acts_for": "tenant", "plan": "few"})
    await api.directory.users.change("u_1", {"plan": "none"})
    acting = await api.done("GET", f"/v1/keys/{key}/explain?act_for=u_2")
    assert [(limit["owner"], limit["policy"]) for limit in acting["limits"]] == [(key, "key.requests_per_day")]
    assert acting["allowed"]
    await api.directory.users.change("u_2", {"plan": "none"})
    spent = await api.done("GET", f"/v1/keys/{key}/explain?act_for=u_2")
    assert (spent["code"], spent["policy"]) == ("quota_exhausted", "user.requests_per_day")


async def test_an_explanation_of_a_token_names_user_actor_scopes_chain_and_code(api: Api) -> None:
    key = await _key(api)
    await api.user("u_2")
    await api.directory.keys.change(key, {"acts_for": "tenant", "scopes": ["data:read", "data:write"]})
    wish = {"agent": "crawler", "scopes": ["data:read", "data:write"], "token_budget": 100, "request_budget": 3}
    token = (await api.directory.agent_tokens.mint(key, wish, act_for="u_2"))["id"]
    path = f"/v1/agent-tokens/{token}/explain"
    both = ["data:read", "data:write"]
    shown = await api.done("GET", path)
    assert _subject(shown) == (key, "u_2", "u_1", "crawler", both, True, None)
    assert shown["agent_token"] == token
    assert shown["chain"] == [
        {"agent": "crawler", "token": token, "scopes": both, "ceiling": None, "token_budget": 100, "request_budget": 3},
    ]  # fmt: skip
    assert {(limit["owner"], limit["policy"], limit["limit"]) for limit in shown["limits"]} == {
        (token, "token.tokens_total", 100), (token, "token.requests_total", 3),
    }  # fmt: skip
    await api.directory.roles.set("reader", ["data:read"])
    await api.directory.agents.change("u_2", "crawler", {"roles": ["reader"]})
    assert (await api.done("GET", path))["effective_scopes"] == ["data:read"]
    for change, undo, code in (
        (api.directory.agents.change("u_2", "crawler", {"disabled": True}),
         api.directory.agents.change("u_2", "crawler", {"disabled": False}), "account_disabled"),
        (api.directory.keys.change(key, {"acts_for": "none"}),
         api.directory.keys.change(key, {"acts_for": "tenant"}), "api_key_invalid"),
        (api.directory.users.change("u_1", {"disabled": True}),
         api.directory.users.change("u_1", {"disabled": False}), "account_disabled"),
    ):  # fmt: skip
        await change
        assert (await api.done("GET", path))["code"] == code
        await undo
    await api.done("POST", f"/v1/agent-tokens/{token}/revoke")
    assert (await api.done("GET", path))["code"] == "api_key_revoked"
    assert (await api.call("GET", f"/v1/agent-tokens/agt_{'0' * 22}/explain")).code == "not_found"


# -- leaked tokens


async def test_a_leaked_token_is_revoked_and_its_key_is_not(operations: Operations, key: str) -> None:
    directory = operations.directory
    tokens = [await directory.agent_tokens.mint(key, WISH) for _ in range(3)]
    text = f"Authorization: Bearer {tokens[0]['token']}\n curl -H 'X-Api-Key: {tokens[1]['token']}'\n"
    report = await directory.leaked_keys.report_text(text.encode(), "in a log")
    leaks = {leak.pop("agent_token"): leak for leak in report["found"]}
    assert leaks == {
        token["id"]: {"key": key, "user": "u_1", "tenant": "acme", "revoked_now": True} for token in tokens[:2]
    }
    assert (report["incomplete"], report["unknown"]) == (0, 0)
    shown = [await directory.agent_tokens.get(token["id"]) for token in tokens]
    assert [token["revoke_reason"] for token in shown] == ["in a log", "in a log", None]
    assert (await directory.keys.get(key))["state"] == "active"
    again = await directory.leaked_keys.report_text(text.encode(), "again")
    assert [leak["revoked_now"] for leak in again["found"]] == [False, False]


async def test_a_leaked_token_is_revoked_by_itself_or_its_digest(operations: Operations, key: str) -> None:
    directory = operations.directory
    for by_digest in (False, True):
        minted = await directory.agent_tokens.mint(key, WISH)
        token = SecretKey(minted["token"].encode())
        if by_digest:
            found = await directory.leaked_keys.report_digest(token.digest(), "leaked")
        else:
            found = await directory.leaked_keys.report_key(token, "leaked")
        assert (found["known"], found["revoked_now"], found["key"], found["user"]) == (True, True, None, "u_1")
        assert (found["agent_token"]["id"], found["agent_token"]["key"]) == (minted["id"], key)
        assert found["agent_token"]["revoked_at"] is not None


async def test_an_unknown_or_truncated_token_is_reported_and_changes_nothing(operations: Operations, key: str) -> None:
    directory = operations.directory
    minted = await directory.agent_tokens.mint(key, WISH)
    start, _, signature = minted["token"].rpartition(".")
    other = f"{start}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}"
    unknown = await directory.leaked_keys.report_text(other.encode(), "")
    assert unknown == {"found": [], "incomplete": 0, "unknown": 1}
    truncated = await directory.leaked_keys.report_text(minted["token"][:-9].encode(), "")
    assert truncated == {"found": [], "incomplete": 1, "unknown": 0}
    assert (await directory.agent_tokens.get(minted["id"]))["revoked_at"] is None


async def test_the_key_of_a_token_is_found_by_the_token(operations: Operations, key: str) -> None:
    minted = await operations.directory.agent_tokens.mint(key, WISH)
    found = await operations.directory.leaked_keys.find(minted["token"].encode())
    assert [one["id"] for one in found["keys"]] == [key]


async def test_a_bound_token_neither_finds_nor_revokes_agent_tokens_of_other_tenants(api: Api) -> None:
    minted = await api.directory.agent_tokens.mint(await _key(api), WISH)
    await api.directory.tenants.create("globex", "")
    bound = await api.token("leaks:write", "keys:read", tenant="globex")
    for path, body in (
        ("/v1/leaked-texts", {"text": minted["token"]}),
        ("/v1/leaked-keys", {"key": minted["token"]}),
        ("/v1/keys/whose", {"text": minted["token"]}),
    ):
        reply = await api.call("POST", path, body, token=bound)
        assert reply.status == 200
        assert minted["id"] not in reply.body.decode()
    assert (await api.directory.agent_tokens.get(minted["id"]))["revoked_at"] is None
