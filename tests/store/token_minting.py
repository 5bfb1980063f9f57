"""Keys, agents and tokens for tests, by raw SQL and by the minter."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import time
from typing import Any, cast

from keyproxy.auth.minting import MintedToken, MintParent, MintRequest, MintRules
from keyproxy.model import Moment
from keyproxy.platform import clock
from keyproxy.signing.signing_key import SigningKey
from keyproxy.store.agent_tokens.minter import TokenMinter
from keyproxy.store.postgres.database import StatementRunner
from tests.store.harness import Sql

SIGNING_KEY = SigningKey.make(time.time())
RULES = MintRules(("keyproxy", "elsewhere"), ttl_seconds_max=900, depth_max=1, tokens_max=1000, issuer="keyproxy")
MINT = "agents:mint"


def rules(**changes: object) -> MintRules:
    """The rules with changes."""
    return dataclasses.replace(RULES, **cast("dict[str, Any]", changes))


def request(**changes: object) -> MintRequest:
    """A valid request for a token with the scope `jobs:write`, with changes."""
    values: dict[str, Any] = {
        "agent": "crawler", "role": None, "scopes": ("jobs:write",), "token_budget": None, "request_budget": None,
        "ttl_seconds": None, "audience": "keyproxy",
    }  # fmt: skip
    return MintRequest(**{**values, **changes})


def under_role(role: str, **changes: object) -> MintRequest:
    """A request for the scopes of a role."""
    return request(role=role, scopes=None, **changes)


def key_parent(key: str = "key_1", user: str | None = None, *, is_operator: bool = False) -> MintParent:
    """A key as a parent; `user`: the user that it acts for."""
    return MintParent(key, None, user, is_operator)


def token_parent(token: MintedToken, key: str = "key_1") -> MintParent:
    """A token as a parent."""
    return MintParent(key, token.id, None, is_operator=False)


class Minting:
    """A minter whose rules a test may change."""

    def __init__(self, database: StatementRunner) -> None:
        self.rules = RULES
        self.now = lambda: Moment(time.time(), clock.now().mono_seconds)
        self.minter = TokenMinter(
            database, rules=lambda: self.rules, signing_key=lambda _moment: SIGNING_KEY, now=self.now
        )

    async def __call__(self, parent: MintParent | None = None, wish: MintRequest | None = None) -> MintedToken:
        """Mint a token. Raises a Refusal."""
        return await self.minter.mint(parent or key_parent(), wish or request(), actor="test:actor")


def claims_of(token: MintedToken) -> dict[str, Any]:
    """The claims, unverified."""
    payload = token.token.reveal().split(b".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)))
    return claims


async def add_agent(sql: Sql, agent: str = "crawler", user: str = "u_42") -> None:
    """Insert an agent unless it exists."""
    await sql.execute("INSERT INTO keyproxy.agents (user_id, id) VALUES ($1, $2) ON CONFLICT DO NOTHING", user, agent)


def token_id(number: int) -> str:
    """The id of the token that `add_token` inserts."""
    return f"agt_{number:022d}"


def token_digest(number: int) -> bytes:
    """The digest of the token that `add_token` inserts."""
    return hashlib.sha256(f"token {number}".encode()).digest()


async def add_token(
    sql: Sql, number: int, *, parent: int | None = None, agent: str = "crawler", user: str = "u_42", key: str = "key_1",
    lifetime: str = "10 minutes", age: str = "0", actor: str | None = None, depth: int | None = None,
) -> bytes:  # fmt: skip
    """Insert a token by raw SQL, and its agent if it is missing. Return its digest."""
    await add_agent(sql, agent, user)
    await sql.execute(
        "INSERT INTO keyproxy.agent_tokens"
        " (id, digest, user_id, agent_id, root_key_id, actor_user_id, parent_token_id, scopes, audience, depth,"
        "  created_at, expires_at)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, '{jobs:write}', 'keyproxy', $8, now() - $9::text::interval,"
        "         now() - $9::text::interval + $10::text::interval)",
        token_id(number), token_digest(number), user, agent, key, actor, None if parent is None else token_id(parent),
        (0 if parent is None else 1) if depth is None else depth, age, lifetime,
    )  # fmt: skip
    return token_digest(number)


async def tokens_of(sql: Sql) -> int:
    """The number of rows of tokens."""
    count: int = await sql.fetchval("SELECT count(*) FROM keyproxy.agent_tokens")
    return count
