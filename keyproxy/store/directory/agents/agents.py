"""Agents: named programs that work for a user with tokens of their own. The first mint of a token creates its agent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from keyproxy.auth.names import is_agent
from keyproxy.store.directory.access import authority
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import CHANGEABLE, ENTITIES, Entity, etag
from keyproxy.store.directory.errors import Invalid, NotFound, Outdated
from keyproxy.store.postgres.database import Row, Transaction

AGENT_ID_RULE: Final = (
    "an agent's id starts with a letter or digit, contains only those and . _ -, and has at most 64 characters"
)


def agent_id(text: str) -> str:
    """A valid id of an agent. Raises Invalid."""
    if not is_agent(text):
        raise Invalid(f"invalid agent {text!r}: {AGENT_ID_RULE}")
    return text


@dataclass(frozen=True, slots=True)
class AgentStore:
    """The operations on agents."""

    _context: DirectoryContext

    async def get(self, user_id: str, agent: str) -> Entity:
        """Return one agent, with the number of its live tokens."""
        row = await self._context.fetch_row("agent", user_id, agent_id(agent))
        return self._visible(user_id, agent, row)

    async def list_by_id(self, user_id: str, after: str, limit: int) -> list[Entity]:
        """List the agents of a user, ordered by id. Raises NotFound for an unknown user."""
        await self._context.get("user", user_id)
        return await self._context.list_entities("agent", "agents", user_id, after, limit)

    async def change(
        self, user_id: str, agent: str, changes: Mapping[str, Any], *, if_match: str | None = None
    ) -> Entity:
        """Change `roles`, `plan` (None removes it) or `disabled`, and return the changed agent.

        `roles`: the ceiling of the agent's tokens, None for none. A disabled agent gets no tokens, and the live ones and
        those minted from them are refused.
        """
        unknown = set(changes) - CHANGEABLE["agent"]
        if unknown:
            allowed = ", ".join(sorted(CHANGEABLE["agent"]))
            raise Invalid(f"{min(unknown)} of an agent cannot be changed; {allowed} can")
        async with self._context.transaction(changes.get("plan")) as transaction:
            held = await self._lock(transaction, user_id, agent_id(agent))
            if if_match is not None and if_match != etag(held):
                raise Outdated(f"agent {agent!r} has changed since it was read")
            await authority.hold_roles(transaction, changes.get("roles") or ())
            await transaction.fetch("change_agent", user_id, agent, json.dumps(dict(changes)))
            row = await transaction.fetch_row("agent", user_id, agent)
        return self._visible(user_id, agent, row)

    async def revoke_tokens(self, user_id: str, agent: str, reason: str) -> Entity:
        """Revoke all live tokens of an agent, and thereby those minted from them. `revoked`: their number.

        The agent itself can still get tokens: see `change` for disabling it.
        """
        async with self._context.transaction() as transaction:
            await self._lock(transaction, user_id, agent_id(agent))
            revoked = await transaction.fetch("revoke_tokens_of_agent", user_id, agent, reason)
        return {"agent": agent, "user": user_id, "revoked": len(revoked)}

    async def _lock(self, transaction: Transaction, user_id: str, agent: str) -> Entity:
        is_held = await transaction.fetch("hold_agent", user_id, agent)
        row = await transaction.fetch_row("agent", user_id, agent) if is_held else None
        return self._visible(user_id, agent, row)

    def _visible(self, user_id: str, agent: str, row: Row | None) -> Entity:
        if row is None or not self._context.includes_tenant(row["tenant_id"]):
            raise NotFound(f"user {user_id!r} has no agent {agent!r}")
        return ENTITIES["agent"](row)
