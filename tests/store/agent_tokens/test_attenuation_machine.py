"""Along a chain of tokens scopes, expiry and budgets only shrink, whatever hypothesis mints, changes and revokes.

A model in sets and numbers decides what a mint may do; the store decides alike, and its rows are those of the model.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import asyncpg
import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from keyproxy.auth.minting import MintedToken, MintParent
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.postgres.database import Database
from tests.store.harness import Sql
from tests.store.token_minting import MINT, Minting, request, rules

_EXAMPLES = itertools.count()
_SCOPES = ("a", "b", "c", MINT)
_SETS = st.sets(st.sampled_from(_SCOPES)).map(frozenset)
_CEILINGS = st.one_of(st.none(), _SETS)
_BUDGETS = st.one_of(st.none(), st.none(), st.integers(0, 5))
_AGENTS = st.sampled_from(["x", "y", "z"])
_ROLES: dict[str, frozenset[str]] = {"none": frozenset(), "ab": frozenset("ab"), "cm": frozenset({"c", MINT})}
_DEPTH_MAX = 3

#: Lifetimes, and how time passes, so that no two ends are nearly the same.
_LIFETIMES = st.sampled_from([None, None, 890, 500, 100])
_PASSING_SECONDS = 170

#: The difference of two ends for which the duration of the test itself decides.
_TOLERANCE_SECONDS = 30.0


class _Wish(NamedTuple):
    """What a request asks for. `role`: instead of the scopes; empty: none."""

    agent: str
    scopes: frozenset[str]
    role: str
    budgets: tuple[int | None, int | None]
    lifetime: int | None


#: Most of them may mint in turn.
_WISHES = st.builds(
    _Wish, _AGENTS, st.one_of(st.just(frozenset(_SCOPES)), _SETS.map(lambda scopes: scopes | {MINT}), _SETS),
    st.sampled_from(["", "", "", "", "", "", *_ROLES]), st.tuples(_BUDGETS, _BUDGETS), _LIFETIMES,
)  # fmt: skip


class _Store(NamedTuple):
    """The store, with the loop that it runs on."""

    run: Callable[[Any], Any]
    mint: Minting
    sql: Sql


@dataclass
class _Token:
    """A token of the model. `seconds_left`: None once it is deleted."""

    minted: MintedToken
    agent: tuple[str, str]
    scopes: frozenset[str]
    budgets: tuple[int | None, int | None]
    parent: _Token | None
    is_acting: bool
    seconds_left: float
    is_revoked: bool = False
    is_deleted: bool = False

    @property
    def chain(self) -> list[_Token]:
        """This token and its ancestors."""
        return [self, *(self.parent.chain if self.parent else [])]


@dataclass
class _Agent:
    ceiling: frozenset[str] | None = None
    is_disabled: bool = False


@dataclass
class _Model:
    """The rows of one user's key, as far as they bound a mint."""

    key_scopes: frozenset[str] = frozenset(_SCOPES)
    acts: bool = True
    is_revoked: bool = False
    ceilings: dict[str, frozenset[str] | None] = field(default_factory=dict)
    disabled: set[str] = field(default_factory=set)
    agents: dict[tuple[str, str], _Agent] = field(default_factory=dict)


#: At most one change between two chains of mints: after many changes nothing could be minted.
_may_change = precondition(lambda machine: machine.may_change)


class Attenuation(RuleBasedStateMachine):
    """One tenant with an owner and another user, their agents, one key and the tokens below it."""

    def __init__(self, store: _Store) -> None:
        super().__init__()
        self.store = store
        self.model = _Model()
        self.tokens: list[_Token] = []
        self.may_change = False
        name = f"{next(_EXAMPLES)}"
        self.tenant, self.owner, self.other, self.key = f"t{name}", f"o{name}", f"u{name}", f"k{name}"

    def _execute(self, statement: str, *arguments: object) -> None:
        self.store.run(self.store.sql.execute(statement, *arguments))

    @initialize()
    def begin(self) -> None:
        """Insert the tenant, the users and the key."""
        self._execute("INSERT INTO keyproxy.tenants (id) VALUES ($1)", self.tenant)
        self._execute("INSERT INTO keyproxy.users (id, tenant_id) SELECT unnest($1::text[]), $2",
                      [self.owner, self.other], self.tenant)  # fmt: skip
        self._execute(
            "INSERT INTO keyproxy.api_keys (id, user_id, digest, scopes, acts_for)"
            " VALUES ($1, $2, sha256($1::text::bytea), $3, 'tenant')", self.key, self.owner, list(_SCOPES),
        )  # fmt: skip

    # -- what the model allows

    def _base(self, user: str, *, is_acting: bool) -> frozenset[str] | None:
        """The scopes of the key for a user; None if it may not be used for that user."""
        model = self.model
        if model.is_revoked or {self.tenant, self.owner, user} & model.disabled or (is_acting and not model.acts):
            return None
        scopes = model.key_scopes
        for ceiling in (self.owner, self.tenant, user if is_acting else self.owner):
            scopes = _within(scopes, model.ceilings.get(ceiling))
        return scopes

    def _authority(self, parent: _Token | None, user: str, *, is_acting: bool) -> frozenset[str] | None:
        scopes = self._base(user, is_acting=is_acting)
        for token in parent.chain if parent else []:
            agent = self.model.agents.get(token.agent)
            if scopes is None or token.is_revoked or token.is_deleted or token.seconds_left <= 0:
                return None
            if agent is None or agent.is_disabled:
                return None
            scopes = _within(scopes & token.scopes, agent.ceiling)
        return scopes

    # -- minting

    @rule(acts=st.booleans(), wish=_WISHES)
    def mint_from_the_key(self, acts: bool, wish: _Wish) -> None:
        """Mint from the key, for its owner or acting for the other user."""
        self._mint(None, wish, acts=acts)

    @rule(acts=st.booleans(), wishes=st.lists(_WISHES, min_size=2, max_size=_DEPTH_MAX + 2))
    def mint_a_chain(self, acts: bool, wishes: list[_Wish]) -> None:
        """Mint from the key, then from each new token."""
        parent: _Token | None = None
        for wish in wishes:
            minted = self._mint(parent, wish, acts=acts)
            parent = minted or parent
        self.may_change = True

    @rule(place=st.integers(0, 10), wish=_WISHES)
    def mint_from_any_token(self, place: int, wish: _Wish) -> None:
        """Mint from a token, live or not."""
        if place < len(self.tokens):
            self._mint(self.tokens[place], wish)

    def _mint(self, parent: _Token | None, wanted: _Wish, *, acts: bool = False) -> _Token | None:
        agent, scopes, role, budgets, lifetime = wanted
        is_acting = parent.is_acting if parent else acts
        user = parent.agent[0] if parent else self.other if acts else self.owner
        wish = request(
            agent=agent, role=role or None, scopes=None if role else tuple(sorted(scopes)), token_budget=budgets[0],
            request_budget=budgets[1], ttl_seconds=lifetime,
        )  # fmt: skip
        held = self._authority(parent, user, is_acting=is_acting)
        expected = self._granted(parent, (user, agent), held, _ROLES[role] if role else scopes, budgets, bool(role))
        left = min((token.seconds_left for token in parent.chain), default=1e9) if parent else 1e9
        if lifetime is not None and lifetime > left + _TOLERANCE_SECONDS:
            expected = None
        is_close = lifetime is not None and abs(lifetime - left) <= _TOLERANCE_SECONDS
        credential = MintParent(
            self.key, parent.minted.id if parent else None, user if acts and not parent else None, is_operator=False
        )
        minted = self.store.run(_outcome(self.store.mint(credential, wish)))
        if minted is None:
            assert expected is None or is_close
            event("refused")
            return None
        assert expected is not None
        event(f"minted at depth {minted.depth}")
        assert frozenset(minted.scopes) == expected
        self.model.agents.setdefault((user, agent), _Agent())
        life = min(left, 900.0 if lifetime is None else lifetime)
        self.tokens.append(_Token(minted, (user, agent), expected, budgets, parent, is_acting, life))
        return self.tokens[-1]

    def _granted(
        self, parent: _Token | None, agent: tuple[str, str], held: frozenset[str] | None, wanted: frozenset[str],
        budgets: tuple[int | None, int | None], is_role: bool,
    ) -> frozenset[str] | None:  # fmt: skip
        known = self.model.agents.get(agent, _Agent())
        if held is None or MINT not in held or known.is_disabled:
            return None
        if parent is not None:
            if len(parent.chain) > _DEPTH_MAX:
                return None
            for token in parent.chain:
                for asked, bound in zip(budgets, token.budgets, strict=True):
                    if asked is not None and bound is not None and asked > bound:
                        return None
        grantable = _within(held, known.ceiling)
        granted = wanted & grantable if is_role else wanted
        return granted if granted and granted <= grantable else None

    # -- changes by SQL clients

    @_may_change
    @rule(scopes=_SETS)
    def change_scopes_of_the_key(self, scopes: frozenset[str]) -> None:
        """Replace the scopes of the key."""
        self.may_change = False
        self.model.key_scopes = scopes
        self._execute("UPDATE keyproxy.api_keys SET scopes = $2 WHERE id = $1", self.key, list(scopes))

    @_may_change
    @rule(whose=st.sampled_from(["tenant", "owner", "other"]), ceiling=_CEILINGS)
    def change_a_ceiling(self, whose: str, ceiling: frozenset[str] | None) -> None:
        """Give a user or the tenant a ceiling, or take it away."""
        self.may_change = False
        name: str = getattr(self, whose)
        self.model.ceilings[name] = ceiling
        table = "tenants" if whose == "tenant" else "users"
        self._execute(f"UPDATE keyproxy.{table} SET roles = $2 WHERE id = $1", name, _roles(ceiling))

    @_may_change
    @rule(agent=_AGENTS, is_owner=st.booleans(), ceiling=_CEILINGS, is_disabled=st.booleans())
    def change_an_agent(self, agent: str, is_owner: bool, ceiling: frozenset[str] | None, is_disabled: bool) -> None:
        """Give an agent a ceiling, disable or enable it."""
        self.may_change = False
        named = (self.owner if is_owner else self.other, agent)
        if named in self.model.agents:
            self.model.agents[named] = _Agent(ceiling, is_disabled)
            self._execute(
                "UPDATE keyproxy.agents SET roles = $3, disabled_at = CASE WHEN $4 THEN now() END"
                " WHERE user_id = $1 AND id = $2", *named, _roles(ceiling), is_disabled,
            )  # fmt: skip

    @_may_change
    @rule(whose=st.sampled_from(["tenant", "owner", "other"]))
    def disable_or_enable(self, whose: str) -> None:
        """Disable or enable a user or the tenant."""
        self.may_change = False
        name: str = getattr(self, whose)
        self.model.disabled ^= {name}
        table = "tenants" if whose == "tenant" else "users"
        self._execute(
            f"UPDATE keyproxy.{table} SET disabled_at = CASE WHEN $2 THEN now() END WHERE id = $1",
            name, name in self.model.disabled,
        )  # fmt: skip

    @_may_change
    @rule(acts=st.booleans(), is_revoked=st.sampled_from([False, False, False, True]))
    def change_the_key(self, acts: bool, is_revoked: bool) -> None:
        """Let the key act for its tenant or not, and revoke it or not."""
        self.may_change = False
        self.model.acts, self.model.is_revoked = acts, is_revoked
        self._execute(
            "UPDATE keyproxy.api_keys SET acts_for = $2, revoked_at = CASE WHEN $3 THEN now() END WHERE id = $1",
            self.key, "tenant" if acts else "none", is_revoked,
        )  # fmt: skip

    @rule(place=st.integers(0, 10), deletes=st.booleans())
    def revoke_or_delete_a_token(self, place: int, deletes: bool) -> None:
        """Revoke a token, or delete it with those below it."""
        if place >= len(self.tokens):
            return
        token = self.tokens[place]
        if deletes:
            for other in self.tokens:
                other.is_deleted |= token in other.chain
            self._execute("DELETE FROM keyproxy.agent_tokens WHERE id = $1", token.minted.id)
        else:
            token.is_revoked = True
            self._execute("UPDATE keyproxy.agent_tokens SET revoked_at = now() WHERE id = $1", token.minted.id)

    @rule()
    def undo_the_changes(self) -> None:
        """Make everything but tokens as it was in the beginning."""
        agents = self.model.agents
        self.model = _Model(agents={named: _Agent() for named in agents})
        users = [self.owner, self.other]
        self._execute("UPDATE keyproxy.tenants SET roles = NULL, disabled_at = NULL WHERE id = $1", self.tenant)
        self._execute("UPDATE keyproxy.users SET roles = NULL, disabled_at = NULL WHERE id = ANY ($1)", users)
        self._execute("UPDATE keyproxy.agents SET roles = NULL, disabled_at = NULL WHERE user_id = ANY ($1)", users)
        self._execute(
            "UPDATE keyproxy.api_keys SET scopes = $2, acts_for = 'tenant', revoked_at = NULL WHERE id = $1",
            self.key, list(_SCOPES),
        )  # fmt: skip

    @rule()
    def time_passes(self) -> None:
        """Let three minutes pass for every token."""
        for token in self.tokens:
            token.seconds_left -= _PASSING_SECONDS
        self._execute(
            "UPDATE keyproxy.agent_tokens SET created_at = created_at - $2::int * interval '1 second',"
            " expires_at = expires_at - $2::int * interval '1 second' WHERE root_key_id = $1",
            self.key, _PASSING_SECONDS,
        )  # fmt: skip

    # -- the guarantee

    @invariant()
    def every_child_is_within_its_parent(self) -> None:
        """The rows are those of the model, and no child exceeds its parent."""
        if not self.tokens:
            return
        exceeding = self.store.run(
            self.store.sql.fetchval(
                "SELECT count(*) FROM keyproxy.agent_tokens AS c"
                " JOIN keyproxy.agent_tokens AS p ON p.id = c.parent_token_id"
                " WHERE c.root_key_id = $1 AND NOT (c.scopes <@ p.scopes AND c.expires_at <= p.expires_at"
                " AND coalesce(c.token_budget <= p.token_budget, true)"
                " AND coalesce(c.request_budget <= p.request_budget, true)"
                " AND c.depth = p.depth + 1 AND c.user_id = p.user_id AND c.root_key_id = p.root_key_id"
                " AND c.actor_user_id IS NOT DISTINCT FROM p.actor_user_id)",
                self.key,
            )
        )
        assert exceeding == 0
        rows = self.store.run(
            self.store.sql.fetch("SELECT id FROM keyproxy.agent_tokens WHERE root_key_id = $1", self.key)
        )
        assert {row["id"] for row in rows} == {token.minted.id for token in self.tokens if not token.is_deleted}


async def _outcome(minting: Awaitable[MintedToken]) -> MintedToken | None:
    """The token; None: it was refused."""
    try:
        return await minting
    except Refusal as refusal:
        if refusal.reason is not Reason.DELEGATION_REFUSED:
            raise
        return None


def _within(scopes: frozenset[str], ceiling: frozenset[str] | None) -> frozenset[str]:
    return scopes if ceiling is None else scopes & ceiling


def _roles(ceiling: frozenset[str] | None) -> list[str] | None:
    """A role for each scope."""
    return None if ceiling is None else [f"one-{_SCOPES.index(scope)}" for scope in ceiling]


@pytest.fixture
def store(dsn: str) -> Iterator[_Store]:
    """The store over an empty database with the roles of the test."""
    with asyncio.Runner() as runner:
        database = Database(dsn, pool_size_max=2, statement_timeout_seconds=5.0)
        runner.run(database.open())
        sql: Sql = runner.run(asyncpg.connect(dsn))
        singles = {f"one-{place}": [scope] for place, scope in enumerate(_SCOPES)}
        for name, scopes in {**singles, **{name: list(scopes) for name, scopes in _ROLES.items()}}.items():
            runner.run(sql.execute("INSERT INTO keyproxy.roles (id, scopes) VALUES ($1, $2)", name, scopes))
        mint = Minting(database)
        mint.rules = rules(depth_max=_DEPTH_MAX)
        yield _Store(runner.run, mint, sql)
        runner.run(sql.close())
        runner.run(database.close())


def test_scopes_expiry_and_budgets_only_shrink_along_a_chain(store: _Store) -> None:
    class AttenuationInStore(Attenuation):
        def __init__(self) -> None:
            super().__init__(store)

    run_state_machine_as_test(
        AttenuationInStore,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
