"""A token grants at most what its parent may grant at the moment of its insertion."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

import pytest

from keyproxy.auth.agent_token_format import TOKEN_BYTES_MAX
from keyproxy.auth.minting import MintParent, MintRequest
from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.signing_key import VerifyingKey
from keyproxy.signing.token_check import AcceptedTokens, SignedToken
from keyproxy.store.postgres.database import Database, JoinedTransaction
from tests.store.harness import Sql, StatementRunner, add_key, add_user
from tests.store.token_minting import (
    SIGNING_KEY,
    Minting,
    claims_of,
    key_parent,
    request,
    rules,
    token_parent,
    tokens_of,
    under_role,
)

_SCOPES = "{jobs:write,data:read,agents:mint}"


@pytest.fixture
async def mint(dsn: str, sql: Sql, database: Database) -> Minting:
    """A minter, and `key_1` of `u_42`, which may mint; the role `reader` has data:read and data:list."""
    await add_user(sql)
    await add_key(sql)
    await sql.execute("UPDATE keyproxy.api_keys SET scopes = $1::text::text[]", _SCOPES)
    await sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('reader', '{data:read,data:list}')")
    return Minting(database)


@pytest.fixture
async def acting(mint: Minting, sql: Sql) -> Minting:
    """`key_1` may act for `u_2` of its tenant; `u_9` is of another tenant."""
    await add_user(sql, "u_2")
    await add_user(sql, "u_9", "other")
    await sql.execute("UPDATE keyproxy.api_keys SET acts_for = 'tenant'")
    return mint


async def refusal_of(minting: Awaitable[object]) -> Refusal:
    """Why a mint is refused."""
    with pytest.raises(Refusal) as refused:
        await minting
    return refused.value


async def is_refused(mint: Minting, sql: Sql, parent: MintParent | None = None, wish: MintRequest | None = None) -> str:
    """Assert that a mint is refused and leaves no row; the detail for the log."""
    agents = await sql.fetchval("SELECT count(*) FROM keyproxy.agents")
    before = await tokens_of(sql)
    refusal = await refusal_of(mint(parent, wish))
    assert refusal.reason is Reason.DELEGATION_REFUSED
    assert await tokens_of(sql) == before
    assert await sql.fetchval("SELECT count(*) FROM keyproxy.agents") == agents
    return refusal.detail


# -- what is minted


async def test_token_is_signed_and_has_the_claims_and_the_row_of_its_grant(mint: Minting, sql: Sql) -> None:
    before = math.floor(time.time())
    token = await mint(wish=request(token_budget=10, request_budget=20, ttl_seconds=60, audience="elsewhere"))
    text = token.token.reveal()
    signed = SignedToken.parse(text)
    verifying = VerifyingKey(SIGNING_KEY.public_jwk(), kid=signed.kid, ends_wall=math.inf)
    signed.check(verifying, AcceptedTokens("keyproxy", "elsewhere"), time.time())
    claims = claims_of(token)
    assert before <= claims["iat"] <= time.time()
    assert re.fullmatch(r"agt_[0-9A-Za-z]{22}", token.id)
    assert list(claims.items()) == [
        ("iss", "keyproxy"), ("aud", "elsewhere"), ("sub", "u_42"), ("act", {"sub": "crawler", "type": "agent"}),
        ("client_id", "key_1"), ("tenant", "acme"), ("scope", "jobs:write"), ("token_budget", 10), ("jti", token.id),
        ("iat", claims["iat"]), ("exp", claims["iat"] + 60),
    ]  # fmt: skip
    row = await sql.fetchrow("SELECT *, extract(epoch FROM expires_at)::int AS ends FROM keyproxy.agent_tokens")
    assert row is not None
    names = (
        "id",
        "digest",
        "user_id",
        "agent_id",
        "root_key_id",
        "actor_user_id",
        "parent_token_id",
        "scopes",
        "audience",
    )
    assert tuple(row[name] for name in names) == (
        token.id, hashlib.sha256(text).digest(), "u_42", "crawler", "key_1", None, None, ["jobs:write"], "elsewhere",
    )  # fmt: skip
    assert (row["token_budget"], row["request_budget"], row["depth"], row["ends"]) == (10, 20, 0, claims["exp"])
    assert (token.user_id, token.tenant_id, token.scopes, token.is_test) == ("u_42", "acme", ("jobs:write",), False)
    assert token.expires_wall_seconds == claims["exp"]


async def test_only_the_digest_of_a_token_is_stored_and_it_is_not_in_the_audit_log(mint: Minting, sql: Sql) -> None:
    text = (await mint()).token.reveal().decode()
    rows = await sql.fetch("SELECT to_jsonb(a)::text AS text FROM keyproxy.audit_log AS a")
    rows += await sql.fetch("SELECT to_jsonb(t)::text AS text FROM keyproxy.agent_tokens AS t")
    stored = "\n".join(row["text"] for row in rows)
    assert text not in stored
    assert text.split(".")[2] not in stored
    log = "\n".join(
        row["text"] for row in await sql.fetch("SELECT to_jsonb(a)::text AS text FROM keyproxy.audit_log AS a")
    )
    assert "digest" not in log
    assert hashlib.sha256(text.encode()).hexdigest() not in log


async def test_mode_is_that_of_the_key(mint: Minting, sql: Sql) -> None:
    await sql.execute("UPDATE keyproxy.api_keys SET is_test = true")
    assert (await mint()).is_test is True


async def test_role_grants_its_scopes_within_those_of_the_parent(mint: Minting) -> None:
    assert (await mint(wish=under_role("reader"))).scopes == ("data:read",)


async def test_requested_scopes_are_granted_whole_or_refused(mint: Minting, sql: Sql) -> None:
    assert (await mint(wish=request(scopes=("data:read", "jobs:write")))).scopes == ("data:read", "jobs:write")
    assert "scope" in await is_refused(mint, sql, wish=request(scopes=("data:read", "data:list")))


@pytest.mark.parametrize("wish", [request(scopes=()), under_role("unknown"), under_role("useless")])
async def test_token_without_scopes_and_an_unknown_role_are_refused(mint: Minting, sql: Sql, wish: MintRequest) -> None:
    await sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('useless', '{other:scope}')")
    await is_refused(mint, sql, wish=wish)


async def test_lifetime_is_the_maximum_cut_to_the_remaining_life_of_the_parent(mint: Minting, sql: Sql) -> None:
    claims = claims_of(await mint())
    assert claims["exp"] - claims["iat"] == 900
    await sql.execute("UPDATE keyproxy.api_keys SET expires_at = clock_timestamp() + interval '100.4 seconds'")
    claims = claims_of(await mint())
    assert claims["exp"] == await sql.fetchval(
        "SELECT floor(extract(epoch FROM expires_at))::int FROM keyproxy.api_keys"
    )
    assert (await is_refused(mint, sql, wish=request(ttl_seconds=102))) == "expiry beyond the parent"
    assert await mint(wish=request(ttl_seconds=90))


async def test_lifetime_of_a_token_ends_with_an_infinite_key_after_15_minutes(mint: Minting, sql: Sql) -> None:
    await sql.execute("UPDATE keyproxy.api_keys SET expires_at = 'infinity'")
    claims = claims_of(await mint())
    assert claims["exp"] - claims["iat"] == 900


async def test_acting_key_mints_for_the_user_and_stays_the_root(acting: Minting, sql: Sql) -> None:
    token = await acting(key_parent(user="u_2"))
    claims = claims_of(token)
    assert (token.user_id, claims["sub"], claims["client_id"]) == ("u_2", "u_2", "key_1")
    actor = {"sub": "u_42", "type": "user", "key_id": "key_1"}
    assert claims["act"] == {"sub": "crawler", "type": "agent", "act": actor}
    row = await sql.fetchrow("SELECT user_id, actor_user_id, root_key_id FROM keyproxy.agent_tokens")
    assert row is not None
    assert tuple(row) == ("u_2", "u_42", "key_1")
    assert [row["user_id"] for row in await sql.fetch("SELECT user_id FROM keyproxy.agents")] == ["u_2"]


async def test_acting_for_the_own_owner_is_recorded_as_acting(acting: Minting, sql: Sql) -> None:
    await acting(key_parent(user="u_42"))
    assert await sql.fetchval("SELECT actor_user_id FROM keyproxy.agent_tokens") == "u_42"


async def test_child_of_a_token_is_one_deeper_and_has_the_whole_chain(acting: Minting, sql: Sql) -> None:
    acting.rules = rules(depth_max=3)
    parent = await acting(key_parent(user="u_2"), request(agent="a", scopes=("jobs:write", "agents:mint")))
    for depth, agent in enumerate("bcd", 1):
        parent = await acting(token_parent(parent), request(agent=agent, scopes=("jobs:write", "agents:mint")))
        assert (parent.depth, parent.user_id) == (depth, "u_2")
    names, act = [], claims_of(parent)["act"]
    while act is not None:
        names.append((act["sub"], act["type"]))
        act = act.get("act")
    assert names == [("d", "agent"), ("c", "agent"), ("b", "agent"), ("a", "agent"), ("u_42", "user")]
    rows = await sql.fetch("SELECT DISTINCT user_id, actor_user_id, root_key_id FROM keyproxy.agent_tokens")
    assert [tuple(row) for row in rows] == [("u_2", "u_42", "key_1")]
    assert (await is_refused(acting, sql, token_parent(parent), request(agent="e"))) == "depth 4"


# -- what is refused

Refused = tuple[str, str]

#: What an SQL client changes, and why a mint of the key is refused then.
CHANGES: list[Refused] = [
    ("UPDATE keyproxy.api_keys SET revoked_at = now()", "revoked"),
    ("UPDATE keyproxy.api_keys SET expires_at = now()", "expired"),
    ("UPDATE keyproxy.api_keys SET scopes = '{jobs:write}'", "agents:mint"),
    ("UPDATE keyproxy.api_keys SET scopes = '{agents:mint}'", "scope"),
    ("UPDATE keyproxy.api_keys SET id = 'key_2'", "does not exist"),
    ("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_42'", "disabled"),
    ("UPDATE keyproxy.tenants SET disabled_at = now() WHERE id = 'acme'", "disabled"),
    ("UPDATE keyproxy.users SET roles = '{reader}' WHERE id = 'u_42'", "agents:mint"),
    ("UPDATE keyproxy.tenants SET roles = '{reader}' WHERE id = 'acme'", "agents:mint"),
    ("UPDATE keyproxy.agents SET disabled_at = now() WHERE id = 'crawler'", "disabled"),
    ("UPDATE keyproxy.agents SET roles = '{}' WHERE id = 'crawler'", "scope"),
    ("UPDATE keyproxy.agents SET roles = '{reader}' WHERE id = 'crawler'", "scope"),
    ("DELETE FROM keyproxy.api_keys", "does not exist"),
    ("DELETE FROM keyproxy.users WHERE id = 'u_42'", "does not exist"),
    ("DELETE FROM keyproxy.tenants", "does not exist"),
]

#: As CHANGES, for a key that acts for `u_2`.
ACTING_CHANGES: list[Refused] = [
    ("UPDATE keyproxy.api_keys SET acts_for = 'none'", "acts for no other user"),
    ("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_2'", "disabled"),
    ("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_42'", "disabled"),
    ("UPDATE keyproxy.users SET tenant_id = 'other' WHERE id = 'u_2'", "another tenant"),
    ("UPDATE keyproxy.users SET roles = '{reader}' WHERE id = 'u_2'", "agents:mint"),
    ("DELETE FROM keyproxy.users WHERE id = 'u_2'", "does not exist"),
    ("DELETE FROM keyproxy.users WHERE id = 'u_42'", "does not exist"),
]

#: As CHANGES, for a token of the agent `crawler` that mints for the agent `child`.
TOKEN_CHANGES: list[Refused] = [
    ("UPDATE keyproxy.agent_tokens SET revoked_at = now()", "revoked"),
    ("UPDATE keyproxy.agent_tokens SET created_at = now() - interval '10 minutes', expires_at = now()", "expired"),
    ("UPDATE keyproxy.agent_tokens SET scopes = '{jobs:write}'", "agents:mint"),
    ("UPDATE keyproxy.agent_tokens SET scopes = '{agents:mint}'", "scope"),
    ("UPDATE keyproxy.agents SET disabled_at = now() WHERE id = 'crawler'", "disabled"),
    ("UPDATE keyproxy.agents SET roles = '{reader}' WHERE id = 'crawler'", "agents:mint"),
    ("DELETE FROM keyproxy.agents WHERE id = 'crawler'", "does not exist"),
    ("DELETE FROM keyproxy.agent_tokens", "does not exist"),
    ("UPDATE keyproxy.api_keys SET user_id = 'u_3'", "another owner"),
    *(change for change in CHANGES if "agents" not in change[0]),
]


async def _before_insertion(door: StatementRunner, sql: Sql, statement: str) -> None:
    """Let an SQL client change something between the reading of the parent and the insertion of the token."""
    parts = iter([statement])

    async def change() -> None:
        for part in parts:
            await sql.execute(part)

    door.before["mint_agent_token"] = change


@pytest.fixture
async def door(dsn: str) -> AsyncIterator[StatementRunner]:
    """The instrumented store."""
    door = StatementRunner(dsn)
    await door.open()
    yield door
    await door.close()


@pytest.mark.parametrize("place", ["before the parent is read", "before the row is inserted"])
@pytest.mark.parametrize(("statement", "why"), CHANGES)
async def test_every_bound_of_a_key_is_checked_against_the_rows_of_that_moment(
    mint: Minting, sql: Sql, door: StatementRunner, statement: str, why: str, place: str
) -> None:
    await mint()
    if place == "before the parent is read":
        await sql.execute(statement)
        assert why in await is_refused(mint, sql)
        return
    await _before_insertion(door, sql, statement)
    await _refused_late(Minting(door), sql)


async def _refused_late(
    mint: Minting, sql: Sql, parent: MintParent | None = None, wish: MintRequest | None = None
) -> None:
    ids = "SELECT array_agg(id) FROM keyproxy.agent_tokens"
    before: Sequence[str] = await sql.fetchval(ids)
    refusal = await refusal_of(mint(parent, wish))
    assert (refusal.reason, refusal.detail) == (Reason.DELEGATION_REFUSED, "a bound changed while the token was minted")
    assert set(await sql.fetchval(ids) or ()) <= set(before)


@pytest.mark.parametrize("place", ["before the parent is read", "before the row is inserted"])
@pytest.mark.parametrize(("statement", "why"), ACTING_CHANGES)
async def test_every_bound_of_an_acting_key_is_checked_against_the_rows_of_that_moment(
    acting: Minting, sql: Sql, door: StatementRunner, statement: str, why: str, place: str
) -> None:
    parent = key_parent(user="u_2")
    await acting(parent)
    if place == "before the parent is read":
        await sql.execute(statement)
        assert why in await is_refused(acting, sql, parent)
        return
    await _before_insertion(door, sql, statement)
    await _refused_late(Minting(door), sql, parent)


@pytest.mark.parametrize("place", ["before the parent is read", "before the row is inserted"])
@pytest.mark.parametrize(("statement", "why"), TOKEN_CHANGES)
async def test_every_bound_of_a_token_is_checked_against_the_rows_of_that_moment(
    mint: Minting, sql: Sql, door: StatementRunner, statement: str, why: str, place: str
) -> None:
    await add_user(sql, "u_3")
    parent = token_parent(await mint(wish=request(scopes=("jobs:write", "agents:mint"))))
    wish = request(agent="child")
    if place == "before the parent is read":
        await sql.execute(statement)
        assert why in await is_refused(mint, sql, parent, wish)
        return
    await _before_insertion(door, sql, statement)
    await _refused_late(Minting(door), sql, parent, wish)


@pytest.mark.parametrize("cause", ["grandparent revoked", "its agent disabled", "acts_for withdrawn"])
async def test_every_ancestor_is_checked(acting: Minting, sql: Sql, cause: str) -> None:
    acting.rules = rules(depth_max=3)
    wish = request(agent="a", scopes=("jobs:write", "agents:mint"))
    first = await acting(key_parent(user="u_2"), wish)
    second = await acting(token_parent(first), request(agent="b", scopes=("jobs:write", "agents:mint")))
    await sql.execute(
        {
            "grandparent revoked": f"UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE id = '{first.id}'",
            "its agent disabled": "UPDATE keyproxy.agents SET disabled_at = now() WHERE id = 'a'",
            "acts_for withdrawn": "UPDATE keyproxy.api_keys SET acts_for = 'none'",
        }[cause]
    )
    await is_refused(acting, sql, token_parent(second), request(agent="c"))


@pytest.mark.parametrize("user", ["u_9", "nobody", ""])
async def test_key_mints_only_for_users_of_its_tenant(acting: Minting, sql: Sql, user: str) -> None:
    await is_refused(acting, sql, key_parent(user=user))


async def test_token_is_minted_only_from_its_own_key_and_for_its_own_user(acting: Minting, sql: Sql) -> None:
    await add_key(sql, 2)
    await sql.execute("UPDATE keyproxy.api_keys SET scopes = $1::text::text[], acts_for = 'tenant'", _SCOPES)
    token = await acting(wish=request(scopes=("jobs:write", "agents:mint")))
    await is_refused(acting, sql, token_parent(token, "key_2"), request(agent="b"))
    for user in ("u_2", "u_9"):
        await is_refused(acting, sql, MintParent("key_1", token.id, user, is_operator=False), request(agent="b"))
    assert await acting(MintParent("key_1", token.id, "u_42", is_operator=False), request(agent="b"))


@pytest.mark.parametrize("budget", ["token_budget", "request_budget"])
async def test_budget_of_a_child_is_at_most_that_of_its_parent(mint: Minting, sql: Sql, budget: str) -> None:
    parent = token_parent(await mint(wish=request(scopes=("jobs:write", "agents:mint"), **{budget: 10})))
    assert f"{budget} beyond" in await is_refused(mint, sql, parent, request(agent="b", **{budget: 11}))
    child = await mint(parent, request(agent="b", **{budget: 10}))
    assert getattr(child, budget) == 10
    # Without one of its own it draws on the pool of its parent.
    assert getattr(await mint(parent, request(agent="b")), budget) is None
    assert getattr(await mint(parent, request(agent="b", **{budget: 0})), budget) == 0


async def test_budget_that_was_lowered_before_the_insertion_is_a_bound(
    mint: Minting, sql: Sql, door: StatementRunner
) -> None:
    parent = token_parent(await mint(wish=request(scopes=("jobs:write", "agents:mint"), token_budget=10)))
    await _before_insertion(door, sql, "UPDATE keyproxy.agent_tokens SET token_budget = 4")
    await _refused_late(Minting(door), sql, parent, request(agent="b", token_budget=5))
    assert await mint(parent, request(agent="b", token_budget=4))


async def test_child_does_not_outlive_its_parent(mint: Minting, sql: Sql) -> None:
    parent = await mint(wish=request(scopes=("jobs:write", "agents:mint"), ttl_seconds=60))
    assert await is_refused(mint, sql, token_parent(parent), request(agent="b", ttl_seconds=100))
    child = await mint(token_parent(parent), request(agent="b"))
    assert child.expires_wall_seconds == parent.expires_wall_seconds


async def test_depth_is_bounded_by_the_configuration_and_by_3(mint: Minting, sql: Sql) -> None:
    mint.rules = rules(depth_max=0)
    scopes = ("jobs:write", "agents:mint")
    parent = await mint(wish=request(scopes=scopes))
    assert await is_refused(mint, sql, token_parent(parent), request(agent="b"))
    mint.rules = rules(depth_max=9)
    for agent in "bcd":
        parent = await mint(token_parent(parent), request(agent=agent, scopes=scopes))
    assert await is_refused(mint, sql, token_parent(parent), request(agent="e"))


async def test_operator_mints_without_the_scope_but_within_every_other_bound(mint: Minting, sql: Sql) -> None:
    await sql.execute("UPDATE keyproxy.api_keys SET scopes = '{jobs:write}'")
    operator = key_parent(is_operator=True)
    assert (await mint(operator)).scopes == ("jobs:write",)
    assert await is_refused(mint, sql, operator, request(scopes=("data:read",)))
    assert await is_refused(mint, sql, key_parent(user="u_42", is_operator=True))
    await sql.execute("UPDATE keyproxy.users SET disabled_at = now()")
    assert await is_refused(mint, sql, operator)


async def test_token_longer_than_4096_bytes_is_refused_and_leaves_no_row(mint: Minting, sql: Sql) -> None:
    scopes = tuple(f"scope{number:02}:{'x' * 50}" for number in range(60))
    await sql.execute("UPDATE keyproxy.api_keys SET scopes = $1", ["agents:mint", *scopes])
    await sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('long', $1)", list(scopes))
    for wish, field in ((request(scopes=scopes), "scopes"), (under_role("long"), "role")):
        refusal = await refusal_of(mint(wish=wish))
        assert (refusal.reason, refusal.field) == (Reason.REQUEST_MALFORMED, field)
    assert await tokens_of(sql) == 0
    token = await mint(wish=request(scopes=scopes[:30]))
    assert len(token.token.reveal()) <= TOKEN_BYTES_MAX


# -- numbers


async def test_key_with_the_maximum_of_live_tokens_mints_again_when_one_expires_or_is_revoked(
    mint: Minting, sql: Sql
) -> None:
    mint.rules = rules(tokens_max=2)
    first, second = await mint(wish=request(ttl_seconds=60)), await mint()
    refusal = await refusal_of(mint())
    assert (refusal.reason, refusal.limit is not None and refusal.limit.policy.name) == (
        Reason.QUOTA_EXHAUSTED, "key.agent_tokens",
    )  # fmt: skip
    assert refusal.limit is not None
    assert refusal.limit.reset_seconds is not None
    assert 50 < refusal.limit.reset_seconds <= 60
    await sql.execute("UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE id = $1", first.id)
    assert await mint()
    assert (await refusal_of(mint())).reason is Reason.QUOTA_EXHAUSTED
    await sql.execute(
        "UPDATE keyproxy.agent_tokens SET created_at = now() - interval '10 minutes', expires_at = now() WHERE id = $1",
        second.id,
    )
    assert await mint()


async def test_children_count_as_live_tokens_of_the_root_key(mint: Minting, sql: Sql) -> None:
    mint.rules = rules(tokens_max=2)
    parent = await mint(wish=request(scopes=("jobs:write", "agents:mint")))
    await mint(token_parent(parent), request(agent="b"))
    for again in (key_parent(), token_parent(parent)):
        assert (await refusal_of(mint(again))).reason is Reason.QUOTA_EXHAUSTED
    assert await tokens_of(sql) == 2


async def test_user_has_at_most_1000_agents(mint: Minting, sql: Sql) -> None:
    await sql.execute(
        "INSERT INTO keyproxy.agents (user_id, id) SELECT 'u_42', 'a' || n FROM generate_series(1, 999) AS n"
    )
    assert await mint(wish=request(agent="one_more"))
    assert "1000 agents" in await is_refused(mint, sql, wish=request(agent="too_many"))
    assert await mint(wish=request(agent="a7"))


# -- the audit log


async def test_actor_of_a_mint_is_its_parent_whatever_the_client_sets(mint: Minting, sql: Sql) -> None:
    parent = await mint(wish=request(scopes=("jobs:write", "agents:mint")))
    child = await mint(token_parent(parent), request(agent="b"))
    rows = await sql.fetch(
        "SELECT actor, entity, entity_id, tenant_id FROM keyproxy.audit_log WHERE entity LIKE 'agent%' ORDER BY id"
    )
    assert {tuple(row) for row in rows} == {
        ("key:key_1", "agent", "u_42/crawler", "acme"),
        ("key:key_1", "agent_token", parent.id, "acme"),
        (f"agent_token:{parent.id}", "agent", "u_42/b", "acme"),
        (f"agent_token:{parent.id}", "agent_token", child.id, "acme"),
    }


async def test_actor_of_an_operators_mint_is_that_of_the_transaction_or_the_given_one(
    mint: Minting, sql: Sql, database: Database
) -> None:
    await mint(key_parent(is_operator=True))
    async with database.transaction() as transaction:
        await transaction.fetch("say_who_acts", "cli:ann", "desk")
        await Minting(JoinedTransaction(transaction))(key_parent(is_operator=True))
    rows = await sql.fetch("SELECT actor, origin FROM keyproxy.audit_log WHERE entity = 'agent_token' ORDER BY id")
    assert [row["actor"] for row in rows] == ["test:actor", "cli:ann"]
    assert rows[1]["origin"] == "desk"


# -- failures


async def test_store_that_is_down_is_no_refusal_of_the_token(dsn: str, mint: Minting) -> None:
    down = Database("postgresql://keyproxy@127.0.0.1:1/none", pool_size_max=1, statement_timeout_seconds=1.0)
    await down.open()
    refusal = await refusal_of(Minting(down)())
    assert refusal.reason is Reason.STORE_UNAVAILABLE
    await down.close()


async def test_missing_signing_key_leaves_no_row(mint: Minting, sql: Sql) -> None:
    def no_key(_moment: object) -> Any:
        raise Refusal(Reason.STORE_UNAVAILABLE, "no key can sign")

    mint.minter._signing_key = no_key
    assert (await refusal_of(mint())).reason is Reason.STORE_UNAVAILABLE
    assert await tokens_of(sql) == 0


@pytest.mark.parametrize("table", ["api_keys", "users", "agents"])
async def test_mint_does_not_wait_long_for_a_locked_owner(mint: Minting, sql: Sql, table: str) -> None:
    await mint()
    async with sql.transaction():
        await sql.execute(f"SELECT FROM keyproxy.{table} FOR UPDATE")
        began = time.monotonic()
        refusal = await refusal_of(mint())
        assert time.monotonic() - began < 4.0
    assert refusal.reason is Reason.STORE_UNAVAILABLE
    assert await tokens_of(sql) == 1
    assert await mint()


async def test_token_of_one_second_works_although_it_is_minted_late_in_a_second(
    mint: Minting, door: StatementRunner
) -> None:
    door.before["minting_authority"] = lambda: _until(0.9)
    door.before["mint_agent_token"] = lambda: _until(0.05)
    token = await Minting(door)(wish=request(ttl_seconds=1))
    assert token.expires_wall_seconds > time.time()
    assert claims_of(token)["exp"] - claims_of(token)["iat"] == 2


async def _until(fraction: float) -> None:
    """Wait for the next moment at this fraction of a second."""
    await asyncio.sleep((fraction - time.time()) % 1)
