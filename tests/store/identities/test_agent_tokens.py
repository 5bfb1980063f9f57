"""Agent tokens: the identity of a token, the end of its life, and which tokens are looked up at all."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from keyproxy.auth import authorization
from keyproxy.auth.api_key import SecretKey
from keyproxy.auth.minting import MintedToken, MintRequest
from keyproxy.config.schema import Cache
from keyproxy.model import Identity, Missing, Moment, Route
from keyproxy.platform import clock
from keyproxy.reasons import Reason, Refusal
from keyproxy.signing.claims import AGENT_TOKEN_TYPE, ASSERTION_TYPE
from keyproxy.signing.signing_key import SigningKey
from keyproxy.signing.token_check import AcceptedTokens
from keyproxy.store.postgres.database import Database
from keyproxy.store.signing_keys import SigningKeyCache
from tests import fakes
from tests.store.conftest import MakeRig
from tests.store.harness import Rig, add_key, add_user
from tests.store.token_minting import (
    SIGNING_KEY,
    Minting,
    key_parent,
    request,
    rules,
    token_parent,
)

ROUTE = Route("*", frozenset())
JOBS = Route("jobs", frozenset({"jobs:write"}))


class Agents:
    """A rig with signing keys, and a minter: `key_1` of `u_worker` may mint, and act for `u_42`."""

    def __init__(self, rig: Rig, signing_keys: SigningKeyCache) -> None:
        self.rig = rig
        self.signing_keys = signing_keys
        self.mint = Minting(rig.door)
        self.mint.rules = rules(depth_max=3)

    async def chain(self, acting_for: str | None, length: int, **wish: Any) -> list[MintedToken]:
        """Tokens that are cut from each other, the first from the key; their agents are `a0`, `a1`, …"""
        made: list[MintedToken] = []
        for number in range(length):
            parent = token_parent(made[-1]) if made else key_parent(user=acting_for)
            made.append(await self.mint(parent, _wish(number, **wish)))
        await self.rig.feed.poll()
        return made

    async def outcome(self, token: MintedToken | SecretKey, route: Route = JOBS) -> Reason | None:
        """The reason for which a request is refused, None if it is admitted."""
        found = await self.rig.resolve(token.token if isinstance(token, MintedToken) else token)
        return admitted(found, self.rig.now(), route)

    @property
    def queries(self) -> int:
        """How many queries for identities have been sent."""
        names = ("identities_by_digest", "acting_identities", "agent_token_identities")
        return sum(self.rig.door.queries[name] for name in names)


def _wish(number: int, **wish: Any) -> MintRequest:
    return request(**{"agent": f"a{number}", "scopes": ("jobs:write", "agents:mint"), **wish})


def admitted(found: Identity | Reason, now: Moment, route: Route = ROUTE) -> Reason | None:
    """The reason of a refusal, None if the request is admitted."""
    if isinstance(found, Reason):
        return found
    try:
        authorization.admit(found, route, now)
    except Refusal as refusal:
        return refusal.reason
    return None


@pytest.fixture
async def agents(make_rig: MakeRig, database: Database) -> Agents:
    """The parts over a real clock, because the lifetime of a token is that of the database's clock."""
    signing_keys = SigningKeyCache(database, AcceptedTokens("keyproxy", "keyproxy"), clock.now)
    rig = await make_rig(now=clock.now, verifier=signing_keys)
    await signing_keys.publish(SIGNING_KEY)
    for user in ("u_worker", "u_42"):
        await add_user(rig.sql, user)
    await add_user(rig.sql, "u_other", "globex")
    await add_key(rig.sql, 1, "u_worker")
    await rig.sql.execute(
        "UPDATE keyproxy.api_keys SET acts_for = 'tenant', scopes = '{jobs:write,data:read,agents:mint}'"
    )
    await rig.feed.poll()
    return Agents(rig, signing_keys)


# -- the identity


@pytest.mark.parametrize("acting_for", [None, "u_42", "u_worker"])
async def test_identity_of_a_token_names_user_root_key_agent_and_the_actor_if_it_was_minted_while_acting(
    agents: Agents, acting_for: str | None
) -> None:
    (token,) = await agents.chain(acting_for, 1, token_budget=100, request_budget=7, scopes=("data:read", "jobs:write"))
    who = await agents.rig.resolve(token.token)
    assert isinstance(who, Identity)
    user, actor = acting_for or "u_worker", "u_worker" if acting_for else None
    assert (who.key_id, who.user_id, who.tenant_id, who.actor_user_id) == ("key_1", user, "acme", actor)
    assert (who.can_act, who.is_test, who.standing) == (False, False, None)
    assert who.expires_wall_seconds == pytest.approx(token.expires_wall_seconds, abs=0.001)
    behind = who.agent_token
    assert behind is not None
    assert (behind.token_id, behind.agents, behind.depth) == (token.id, ("a0",), 0)
    assert (behind.token_budget, behind.request_budget) == (100, 7)
    lines = [
        f"X-Keyproxy-User: {user}", "X-Keyproxy-Tenant: acme", f"X-Keyproxy-Scope: {' '.join(token.scopes)}",
        "X-Keyproxy-Test: false", "X-Keyproxy-Key-Id: key_1",
        *(["X-Keyproxy-Actor: u_worker"] if actor else []),
        "X-Keyproxy-Agent: a0", f"X-Keyproxy-Token-Id: {token.id}",
    ]  # fmt: skip
    assert who.header_block.decode() == "".join(f"{line}\r\n" for line in lines)


async def test_pools_of_a_token_are_those_of_tenant_user_key_agents_with_a_plan_and_the_budgets_of_the_chain(
    agents: Agents,
) -> None:
    sql = agents.rig.sql
    tokens = await agents.chain("u_42", 3, token_budget=50)
    await sql.execute(
        "INSERT INTO keyproxy.plans (id, limits) SELECT n, jsonb_build_object('requests_per_day', length(n))"
        " FROM unnest('{t,us,key,agent,own}'::text[]) AS n"
    )
    await sql.execute("UPDATE keyproxy.tenants SET plan_id = 't'")
    await sql.execute("UPDATE keyproxy.users SET plan_id = 'us' WHERE id = 'u_42'")
    await sql.execute("UPDATE keyproxy.users SET plan_id = 'own' WHERE id = 'u_worker'")
    await sql.execute("UPDATE keyproxy.api_keys SET plan_id = 'key'")
    await sql.execute("UPDATE keyproxy.agents SET plan_id = 'agent' WHERE id IN ('a0', 'a2')")
    await sql.execute("UPDATE keyproxy.agent_tokens SET token_budget = NULL WHERE id = $1", tokens[1].id)
    await agents.rig.feed.poll()
    who = await agents.rig.resolve(tokens[2].token)
    assert isinstance(who, Identity)
    assert who.allowance is not None
    assert [(pool.kind, pool.owner, pool.is_test) for pool, _ in who.allowance.pools] == [
        ("tenant", "acme", False), ("user", "u_42", False), ("key", "key_1", False),
        ("agent", "u_42/a0", False), ("agent", "u_42/a2", False),
        ("token", tokens[0].id, False), ("token", tokens[2].id, False),
    ]  # fmt: skip
    assert who.agent_token is not None
    assert who.agent_token.agents == ("a2", "a1", "a0")


async def test_agent_that_minted_a_token_for_itself_has_one_pool(agents: Agents) -> None:
    first = await agents.mint(key_parent(), _wish(0))
    second = await agents.mint(token_parent(first), _wish(0))
    await agents.rig.sql.execute("INSERT INTO keyproxy.plans (id, limits) VALUES ('p', '{\"requests_per_day\": 1}')")
    await agents.rig.sql.execute("UPDATE keyproxy.agents SET plan_id = 'p'")
    await agents.rig.feed.poll()
    who = await agents.rig.resolve(second.token)
    assert isinstance(who, Identity)
    assert who.allowance is not None
    assert [pool.kind for pool, _ in who.allowance.pools] == ["agent"]


@pytest.mark.parametrize("budget", [0, 1])
async def test_budget_of_zero_is_a_limit(agents: Agents, budget: int) -> None:
    (token,) = await agents.chain(None, 1, request_budget=budget)
    who = await agents.rig.resolve(token.token)
    assert isinstance(who, Identity)
    assert who.allowance is not None
    ((pool, plan),) = who.allowance.pools
    assert (pool.kind, [limit.quota for limit in plan.limits]) == ("token", [budget])


async def test_token_of_a_test_key_draws_on_test_pools(agents: Agents) -> None:
    await agents.rig.sql.execute("UPDATE keyproxy.api_keys SET is_test = true")
    (token,) = await agents.chain("u_42", 1, request_budget=5)
    who = await agents.rig.resolve(token.token)
    assert isinstance(who, Identity)
    assert who.allowance is not None
    assert (who.is_test, [pool.is_test for pool, _ in who.allowance.pools]) == (True, [True])
    assert b"X-Keyproxy-Test: true\r\n" in who.header_block


#: Statements that lower what a token of `u_42` may do, minted by `a1` below a token of `a0`, from a key that acts.
_NARROWING = [
    "UPDATE keyproxy.api_keys SET scopes = '{data:read}'",
    "UPDATE keyproxy.api_keys SET scopes = '{data:read}', roles = '{reader}'",
    "UPDATE keyproxy.users SET roles = '{reader}' WHERE id = 'u_worker'",
    "UPDATE keyproxy.users SET roles = '{reader}' WHERE id = 'u_42'",
    "UPDATE keyproxy.users SET roles = '{}' WHERE id = 'u_42'",
    "UPDATE keyproxy.tenants SET roles = '{reader}' WHERE id = 'acme'",
    "UPDATE keyproxy.agents SET roles = '{reader}' WHERE id = 'a0'",
    "UPDATE keyproxy.agents SET roles = '{reader}' WHERE id = 'a1'",
    "UPDATE keyproxy.agents SET roles = '{unknown}' WHERE id = 'a1'",
    "UPDATE keyproxy.agent_tokens SET scopes = '{data:read}' WHERE agent_id = 'a0'",
    "UPDATE keyproxy.agent_tokens SET scopes = '{data:read}' WHERE agent_id = 'a1'",
]


@pytest.mark.parametrize("statement", _NARROWING)
async def test_lowered_scopes_shrink_live_tokens_with_the_next_poll(agents: Agents, statement: str) -> None:
    await agents.rig.sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ('reader', '{data:read}')")
    await agents.rig.feed.poll()
    _, token = await agents.chain("u_42", 2)
    assert await agents.outcome(token) is None
    await agents.rig.sql.execute(statement)
    await agents.rig.feed.poll()
    assert agents.rig.hot(token.token) is None
    assert await agents.outcome(token) is Reason.SCOPE_INSUFFICIENT


async def test_raised_scopes_of_the_key_do_not_widen_a_token(agents: Agents) -> None:
    (token,) = await agents.chain(None, 1, scopes=("data:read",))
    assert await agents.outcome(token) is Reason.SCOPE_INSUFFICIENT
    await agents.rig.sql.execute("UPDATE keyproxy.api_keys SET scopes = '{jobs:write,data:read,agents:mint,more:of}'")
    await agents.rig.feed.poll()
    assert await agents.outcome(token) is Reason.SCOPE_INSUFFICIENT


# -- the end of life

#: Causes for the end of a token of `u_42` by `a2`, below those of `a1` and `a0`, from a key of `u_worker` that acts.
ENDS = [
    ("UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE agent_id = 'a2'", Reason.KEY_REVOKED),
    ("UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE agent_id = 'a1'", Reason.KEY_REVOKED),
    ("UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE agent_id = 'a0'", Reason.KEY_REVOKED),
    ("UPDATE keyproxy.api_keys SET revoked_at = now()", Reason.KEY_REVOKED),
    ("UPDATE keyproxy.agent_tokens SET expires_at = now() WHERE agent_id = 'a2'", Reason.KEY_EXPIRED),
    ("UPDATE keyproxy.agent_tokens SET expires_at = now() WHERE agent_id = 'a1'", Reason.KEY_EXPIRED),
    ("UPDATE keyproxy.agent_tokens SET expires_at = now() WHERE agent_id = 'a0'", Reason.KEY_EXPIRED),
    ("UPDATE keyproxy.api_keys SET expires_at = now()", Reason.KEY_EXPIRED),
    ("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_42'", Reason.ACCOUNT_DISABLED),
    ("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_worker'", Reason.ACCOUNT_DISABLED),
    ("UPDATE keyproxy.tenants SET disabled_at = now() WHERE id = 'acme'", Reason.ACCOUNT_DISABLED),
    ("UPDATE keyproxy.agents SET disabled_at = now() WHERE id = 'a0'", Reason.ACCOUNT_DISABLED),
    ("UPDATE keyproxy.agents SET disabled_at = now() WHERE id = 'a1'", Reason.ACCOUNT_DISABLED),
    ("UPDATE keyproxy.agents SET disabled_at = now() WHERE id = 'a2'", Reason.ACCOUNT_DISABLED),
    ("DELETE FROM keyproxy.api_keys", Reason.KEY_INVALID),
    ("DELETE FROM keyproxy.users WHERE id = 'u_42'", Reason.KEY_INVALID),
    ("DELETE FROM keyproxy.users WHERE id = 'u_worker'", Reason.KEY_INVALID),
    ("DELETE FROM keyproxy.tenants WHERE id = 'acme'", Reason.KEY_INVALID),
    ("DELETE FROM keyproxy.agents WHERE id = 'a0'", Reason.KEY_INVALID),
    ("DELETE FROM keyproxy.agents WHERE id = 'a2'", Reason.KEY_INVALID),
    ("DELETE FROM keyproxy.agent_tokens WHERE agent_id = 'a0'", Reason.KEY_INVALID),
    ("DELETE FROM keyproxy.agent_tokens WHERE agent_id = 'a2'", Reason.KEY_INVALID),
    ("TRUNCATE keyproxy.agent_tokens", Reason.KEY_INVALID),
    ("UPDATE keyproxy.api_keys SET acts_for = 'none'", Reason.KEY_INVALID),
    ("UPDATE keyproxy.users SET tenant_id = 'globex' WHERE id = 'u_42'", Reason.KEY_INVALID),
    ("UPDATE keyproxy.users SET tenant_id = 'globex' WHERE id = 'u_worker'", Reason.KEY_INVALID),
    ("UPDATE keyproxy.api_keys SET user_id = 'u_42'", Reason.KEY_INVALID),
]


@pytest.mark.parametrize(("statement", "expected"), ENDS)
async def test_token_ends_with_what_it_was_cut_from(agents: Agents, statement: str, expected: Reason) -> None:
    *_, token = await agents.chain("u_42", 3)
    assert await agents.outcome(token) is None
    await agents.rig.sql.execute(statement)
    await agents.rig.feed.poll()
    assert agents.rig.hot(token.token) is None
    assert await agents.outcome(token) is expected


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE keyproxy.api_keys SET acts_for = 'none'", None),
        ("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_42'", None),
        ("UPDATE keyproxy.agents SET disabled_at = now() WHERE id = 'other'", None),
        ("UPDATE keyproxy.users SET disabled_at = now() WHERE id = 'u_worker'", Reason.ACCOUNT_DISABLED),
        ("UPDATE keyproxy.api_keys SET user_id = 'u_42'", Reason.KEY_INVALID),
    ],
)
async def test_token_that_was_not_minted_while_acting_depends_on_the_owner_of_its_key_alone(
    agents: Agents, statement: str, expected: Reason | None
) -> None:
    *_, token = await agents.chain(None, 2)
    assert await agents.outcome(token) is None
    await agents.rig.sql.execute(statement)
    await agents.rig.feed.poll()
    assert await agents.outcome(token) is expected


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE keyproxy.agent_tokens SET user_id = 'u_worker', agent_id = 'a1' WHERE id = $1",
        "UPDATE keyproxy.agent_tokens SET root_key_id = 'key_2' WHERE id = $1",
        "UPDATE keyproxy.agent_tokens SET actor_user_id = NULL WHERE id = $1",
        "UPDATE keyproxy.agent_tokens SET depth = 3 WHERE id = $1",
    ],
)
async def test_token_whose_chain_does_not_belong_together_is_invalid(agents: Agents, statement: str) -> None:
    await add_key(agents.rig.sql, 2, "u_worker")
    await agents.chain(None, 2)
    _, token = await agents.chain("u_42", 2)
    assert await agents.outcome(token) is None
    await agents.rig.sql.execute(statement, token.id)
    await agents.rig.feed.poll()
    assert await agents.outcome(token) is Reason.KEY_INVALID


@pytest.mark.parametrize(("statement", "expected"), ENDS)
async def test_lookup_of_a_token_that_a_change_overtakes_is_repeated(
    agents: Agents, statement: str, expected: Reason
) -> None:
    *_, token = await agents.chain("u_42", 3)
    hold = agents.rig.door.hold("agent_token_identities")
    task = asyncio.create_task(agents.rig.resolve(token.token))
    await hold.arrived.wait()
    await agents.rig.sql.execute(statement)
    await agents.rig.feed.poll()
    hold.release()
    assert admitted(await task, agents.rig.now()) is expected
    assert agents.rig.door.queries["agent_token_identities"] == 2


async def test_outage_serves_verified_tokens_and_no_others(agents: Agents) -> None:
    first, second = await agents.chain(None, 1) + await agents.chain("u_42", 1)
    assert await agents.outcome(first) is None
    await agents.rig.goes_down()
    assert await agents.outcome(first) is None
    assert await agents.outcome(second) is Reason.STORE_UNAVAILABLE
    await agents.rig.comes_back()
    assert await agents.outcome(second) is None


@pytest.mark.parametrize("user", ["u_42", "u_worker", "u_nobody", ""])
async def test_token_may_act_for_no_user(agents: Agents, user: str) -> None:
    (token,) = await agents.chain("u_42", 1)
    for _ in range(2):
        found = await agents.rig.resolve(token.token, user)
        assert admitted(found, agents.rig.now()) is Reason.DELEGATION_REFUSED
    assert (agents.rig.door.acting_look_ups, agents.rig.door.queries["agent_token_identities"]) == (0, 1)
    await agents.rig.sql.execute("UPDATE keyproxy.agent_tokens SET revoked_at = now()")
    await agents.rig.feed.poll()
    assert admitted(await agents.rig.resolve(token.token, user), agents.rig.now()) is Reason.KEY_REVOKED


async def test_review_of_a_token_whose_entry_was_evicted_looks_it_up_as_a_token(
    make_rig: MakeRig, agents: Agents
) -> None:
    rig = await make_rig(now=clock.now, verifier=agents.signing_keys, cache=Cache(entries_max=1))
    await rig.feed.poll()
    (token,) = await agents.chain("u_42", 1)
    who = await rig.resolve(token.token)
    assert isinstance(who, Identity)
    await rig.resolve(fakes.key(1))
    with pytest.raises(Missing) as missing:
        rig.cache.reviewed(token.token.digest(), who, rig.now())
    await missing.value.fetch_missing()
    again = rig.cache.reviewed(token.token.digest(), who, rig.now())
    assert again.agent_token is not None
    assert again.standing is None


# -- what is looked up at all


def _part(content: object) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(content, separators=(",", ":")).encode()).rstrip(b"=")


def _with_header(token: SecretKey, **members: object) -> SecretKey:
    _, claims, signature = token.reveal().split(b".")
    return SecretKey(
        _part({"typ": "at+jwt", "alg": "ES256", "kid": SIGNING_KEY.kid, **members}) + b"." + claims + b"." + signature
    )


def _claims(token: MintedToken, **changes: object) -> dict[str, object]:
    payload = token.token.reveal().split(b".")[1]
    return {**json.loads(base64.urlsafe_b64decode(payload + b"=" * (-len(payload) % 4))), **changes}


Forge = Callable[[MintedToken], SecretKey]

FORGERIES: dict[str, tuple[Forge, Reason]] = {
    "none": (lambda token: _with_header(token.token, alg="none"), Reason.KEY_INVALID),
    "HS256": (lambda token: _with_header(token.token, alg="HS256"), Reason.KEY_INVALID),
    "jwk": (lambda token: _with_header(token.token, jwk={"kty": "EC"}), Reason.KEY_INVALID),
    "jku": (lambda token: _with_header(token.token, jku="https://example.com/"), Reason.KEY_INVALID),
    "crit": (lambda token: _with_header(token.token, crit=["exp"]), Reason.KEY_INVALID),
    "another signature": (lambda token: SecretKey(token.token.reveal()[:-4] + b"AAAA"), Reason.KEY_INVALID),
    "another audience": (
        lambda token: SecretKey(SIGNING_KEY.sign(AGENT_TOKEN_TYPE, _claims(token, aud="elsewhere"))),
        Reason.KEY_INVALID,
    ),
    "another issuer": (
        lambda token: SecretKey(SIGNING_KEY.sign(AGENT_TOKEN_TYPE, _claims(token, iss="other"))),
        Reason.KEY_INVALID,
    ),
    "an assertion": (
        lambda token: SecretKey(SIGNING_KEY.sign(ASSERTION_TYPE, _claims(token))), Reason.KEY_INVALID,
    ),
    "expired": (
        lambda token: SecretKey(SIGNING_KEY.sign(AGENT_TOKEN_TYPE, _claims(token, iat=1_000_000, exp=1_000_600))),
        Reason.KEY_EXPIRED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORGERIES)
async def test_forged_or_expired_token_is_refused_without_an_identity_query(agents: Agents, kind: str) -> None:
    (token,) = await agents.chain(None, 1)
    make, expected = FORGERIES[kind]
    forged = make(token)
    before = agents.queries
    for user in (None, "u_42", None):
        assert admitted(await agents.rig.resolve(forged, user), agents.rig.now()) is expected
    assert agents.queries == before
    assert agents.signing_keys.rejected == 1, "once per digest and unknown_seconds"


async def test_token_of_an_unknown_signing_key_is_refused_after_one_reading_of_the_keys(agents: Agents) -> None:
    (token,) = await agents.chain(None, 1)
    agents.signing_keys.start()
    foreign = SecretKey(SigningKey.make(clock.now().wall_seconds).sign(AGENT_TOKEN_TYPE, _claims(token)))
    before = agents.queries
    assert await agents.outcome(foreign) is Reason.KEY_INVALID
    assert agents.queries == before
    await agents.signing_keys.close()


async def test_token_is_verified_again_after_other_tokens_are_accepted(agents: Agents) -> None:
    (token,) = await agents.chain(None, 1)
    assert await agents.outcome(token) is None
    agents.signing_keys.rules = AcceptedTokens("keyproxy", "elsewhere")
    agents.rig.cache.distrust_all()
    assert await agents.outcome(token) is Reason.KEY_INVALID


async def test_genuine_token_without_a_row_is_invalid_and_looked_up_once(agents: Agents) -> None:
    (token,) = await agents.chain(None, 1)
    orphan = SecretKey(SIGNING_KEY.sign(AGENT_TOKEN_TYPE, _claims(token, jti="agt_0000000000000000000000")))
    for _ in range(3):
        assert await agents.outcome(orphan) is Reason.KEY_INVALID
    assert agents.rig.door.queries["agent_token_identities"] == 1


async def test_genuine_token_is_never_looked_up_as_a_key_nor_a_key_as_a_token(agents: Agents) -> None:
    (token,) = await agents.chain(None, 1)
    assert await agents.outcome(token) is None
    assert await agents.outcome(fakes.key(1)) is None
    assert await agents.outcome(fakes.key(2)) is Reason.KEY_INVALID
    assert agents.rig.door.arguments["agent_token_identities"] == [([token.token.digest()],)]
    asked = [digest for (digests,) in agents.rig.door.arguments["identities_by_digest"] for digest in digests]  # type: ignore[attr-defined]
    assert token.token.digest() not in asked


async def test_token_without_signing_keys_is_refused(make_rig: MakeRig, agents: Agents) -> None:
    (token,) = await agents.chain(None, 1)
    rig = await make_rig(now=clock.now)
    await rig.feed.poll()
    assert await rig.resolve(token.token) is Reason.KEY_INVALID


async def test_lookups_of_keys_tokens_and_pairs_wait_in_one_queue_and_each_kind_takes_one_query(agents: Agents) -> None:
    tokens = await agents.chain(None, 3)
    work: list[Awaitable[Identity | Reason]] = [
        *(agents.rig.resolve(token.token) for token in tokens),
        agents.rig.resolve(fakes.key(1)), agents.rig.resolve(fakes.key(2)),
        agents.rig.resolve(fakes.key(1), "u_42"), agents.rig.resolve(fakes.key(1), "u_nobody"),
    ]  # fmt: skip
    before = agents.queries
    await asyncio.gather(*work)
    assert agents.queries - before == 3
