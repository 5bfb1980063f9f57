"""Rows of agents and of agent tokens, for tests of what reads them."""

from __future__ import annotations

import hashlib
from typing import Final

from tests.store.harness import Sql, add_key, add_user

AGENT_TOKEN: Final = "agt_" + "1" * 22


async def add_agent_token(
    sql: Sql, token: str = AGENT_TOKEN, *, agent: str = "crawler", token_budget: int | None = None,
    request_budget: int | None = None, ends: str = "interval '15 minutes'",
) -> None:  # fmt: skip
    """Insert a token of an agent of u_42, and the user with the key key_1 and the agent if they are missing."""
    if not await sql.fetchval("SELECT count(*) FROM keyproxy.users"):
        await add_user(sql)
        await add_key(sql)
    await sql.execute("INSERT INTO keyproxy.agents (user_id, id) VALUES ('u_42', $1) ON CONFLICT DO NOTHING", agent)
    await sql.execute(
        "INSERT INTO keyproxy.agent_tokens (id, digest, user_id, agent_id, root_key_id, scopes, audience, token_budget,"
        f" request_budget, expires_at) VALUES ($1, $2, 'u_42', $3, 'key_1', '{{}}', 'keyproxy', $4, $5, now() + {ends})",
        token, hashlib.sha256(token.encode()).digest(), agent, token_budget, request_budget,
    )  # fmt: skip
