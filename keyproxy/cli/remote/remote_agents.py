"""The operations on agents and agent tokens, through a running `keyproxy admin`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keyproxy.cli.remote.admin_client import AdminClient, ListById
from keyproxy.store.directory.directory import Entity


class RemoteAgents:
    """AgentOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self._lists: dict[str, ListById] = {}

    async def get(self, user_id: str, agent: str) -> Entity:
        return await self._client.call("show_agent", user_id, agent)

    async def list_by_id(self, user_id: str, after: str, limit: int) -> list[Entity]:
        listed = self._lists.setdefault(user_id, ListById(self._client, "list_agents", user_id))
        return await listed.page(after, limit)

    async def change(self, user_id: str, agent: str, changes: Mapping[str, Any]) -> Entity:
        return await self._client.call("change_agent", user_id, agent, **changes)

    async def revoke_tokens(self, user_id: str, agent: str, reason: str) -> Entity:
        return await self._client.call("revoke_agent", user_id, agent, reason=reason)


class RemoteAgentTokens:
    """AgentTokenOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    async def mint(self, key_id: str, wish: Mapping[str, Any], *, act_for: str | None = None) -> Entity:
        acting = {} if act_for is None else {"act_for": act_for}
        return await self._client.call("mint_agent_token", key_id, **wish, **acting)

    async def get(self, token_id: str) -> Entity:
        return await self._client.call("show_agent_token", token_id)

    async def revoke(self, token_id: str, reason: str) -> Entity:
        return await self._client.call("revoke_agent_token", token_id, reason=reason)
