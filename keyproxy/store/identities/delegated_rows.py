"""Builds the identities of keys that act for a user, and of agent tokens, from their rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from keyproxy.limits.budgets import budget_plan
from keyproxy.limits.ledger_protocol import AGENT_POOL, TOKEN_POOL, Pool
from keyproxy.limits.plan import Plan
from keyproxy.model import NEVER, AgentToken, Identity, KeyDigest
from keyproxy.reasons import Reason
from keyproxy.store.identities.identity_rows import (
    allowance_of,
    bounded_scopes,
    header_block,
    pools_of,
    retiring_field_of,
    scope_set,
    standing_of,
)
from keyproxy.store.identities.lookup_batcher import Group, LookupQuery
from keyproxy.store.postgres.database import Row


class ActingPair(NamedTuple):
    """A key and the user that it acts for."""

    digest: KeyDigest
    user_id: str


class TokenDigest(NamedTuple):
    """The digest of an agent token, as opposed to that of a key."""

    digest: KeyDigest


def _groups_of_pair(row: Row) -> list[Group]:
    return [("user", row["owner_id"]), ("tenant", row["tenant_id"])]


def _groups_of_token(row: Row) -> list[Group]:
    return [("user", row["user_id"]), ("user", row["owner_id"]), ("tenant", row["tenant_id"])]


#: The lookup of identities by the digest of a key and the user that it acts for.
BY_PAIR: Final[LookupQuery[ActingPair]] = LookupQuery(
    "acting_identities",
    "users that one key acts for",
    parameters=lambda pairs: ([pair.digest for pair in pairs], [pair.user_id for pair in pairs]),
    subject=lambda row: ActingPair(KeyDigest(row["digest"]), row["acting_for"]),
    name=lambda row: f"key {row['key_id']}",
    groups=_groups_of_pair,
    groups_of_subject=lambda pair: (("key", pair.digest), ("user", pair.user_id)),
    share=lambda pair: pair.digest,
)

#: The lookup of identities by the digests of agent tokens.
BY_TOKEN: Final[LookupQuery[TokenDigest]] = LookupQuery(
    "agent_token_identities",
    "agent tokens",
    parameters=lambda tokens: ([token.digest for token in tokens],),
    subject=lambda row: TokenDigest(KeyDigest(row["digest"])),
    name=lambda row: f"agent token {row['token_id']}",
    groups=_groups_of_token,
    groups_of_subject=lambda token: (("key", token.digest),),
)


def acting_identity(row: Row, header_prefix: str) -> Identity:
    """The identity of one row of `acting_identities`. Raises ValueError and the like for an invalid row.

    If the key may not act for the user, the identity is that of the key, and stands for no user of its own.
    """
    expires = row["expires_wall_seconds"]
    if not row["may_act"]:
        return Identity(
            key_id=row["key_id"],
            user_id=row["owner_id"],
            tenant_id=row["tenant_id"],
            scopes=frozenset(),
            is_test=row["is_test"],
            expires_wall_seconds=NEVER if expires is None else expires,
            standing=standing_of(row) or Reason.DELEGATION_REFUSED,
            header_block=b"",
            can_act=row["can_act"],
        )
    # All pairs of a key share these, of which there may be 100,000.
    key_id, tenant_id, actor = (sys.intern(row[name]) for name in ("key_id", "tenant_id", "owner_id"))
    user = row["acting_for"]
    scopes = bounded_scopes(row["scopes"], f"key {row['key_id']}")
    return Identity(
        key_id=key_id,
        user_id=user,
        tenant_id=tenant_id,
        scopes=scope_set(tuple(scopes)),
        is_test=row["is_test"],
        expires_wall_seconds=NEVER if expires is None else expires,
        standing=standing_of(row),
        header_block=header_block(header_prefix, row, user, scopes, more=(("Actor", actor),)),
        allowance=allowance_of(pools_of(row, user)),
        retiring_field=retiring_field_of(row, header_prefix),
        actor_user_id=actor,
        can_act=True,
        lineage=row["key_pool"],
    )


def ends_all_pairs(row: Row) -> bool:
    """Whether a row of `acting_identities` shows that its key may act for no user at all now."""
    return not row["can_act"] or standing_of(row) is not None


def token_identity(row: Row, header_prefix: str) -> Identity:
    """The identity of one row of `agent_token_identities`. Raises ValueError and the like for an invalid row."""
    chain: list[Mapping[str, Any]] = json.loads(row["chain"])
    own = chain[0]
    actor: str | None = row["actor_user_id"]
    scopes = bounded_scopes(_token_scopes(row, chain), f"agent token {row['token_id']}")
    more = [("Agent", own["agent"]), ("Token-Id", row["token_id"])]
    if actor is not None:
        more.insert(0, ("Actor", actor))
    return Identity(
        key_id=row["key_id"],
        user_id=row["user_id"],
        tenant_id=row["tenant_id"],
        scopes=scope_set(tuple(scopes)),
        is_test=row["is_test"],
        expires_wall_seconds=row["expires_wall_seconds"],
        standing=standing_of(row) or (None if row["is_intact"] else Reason.KEY_INVALID),
        header_block=header_block(header_prefix, row, row["user_id"], scopes, more=more),
        allowance=allowance_of([*pools_of(row, row["user_id"]), *_token_pools(row, chain)]),
        actor_user_id=actor,
        agent_token=AgentToken(
            token_id=row["token_id"],
            agents=tuple([step["agent"] for step in chain]),
            depth=row["depth"],
            token_budget=own["token_budget"],
            request_budget=own["request_budget"],
        ),
        lineage=row["key_pool"],
    )


def _token_scopes(row: Row, chain: list[Mapping[str, Any]]) -> list[str]:
    """What a token may do: its scopes within those of its root key and ancestors, and the ceilings of its agents."""
    bounds = [bounded_scopes(row["key_scopes"], f"key {row['key_id']}")]
    for step in chain:
        bounds.append(step["scopes"])
        if step["ceiling"] is not None:
            bounds.append(step["ceiling"])
    return [scope for scope in chain[0]["scopes"] if all(scope in bound for bound in bounds)]


def _token_pools(row: Row, chain: list[Mapping[str, Any]]) -> list[tuple[Pool, Plan]]:
    """The pools of the agents with a plan and of the tokens with a budget, those of the ancestors first."""
    found: dict[Pool, Plan] = {}
    for step in reversed(chain):
        # An agent that has minted a token for itself is in the chain twice; its pool must be charged once.
        if step["limits"] is not None:
            pool = Pool(AGENT_POOL, f"{row['user_id']}/{step['agent']}", row["is_test"])
            found[pool] = Plan.from_json(step["limits"])
    for step in reversed(chain):
        pool = Pool(TOKEN_POOL, step["token"], row["is_test"])
        found[pool] = budget_plan(step["token_budget"], step["request_budget"])
    return list(found.items())
