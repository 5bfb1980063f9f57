"""The operations on tenants, users, keys, plans, roles, owned ids and the audit log, over the API of `keyproxy admin`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from keyproxy.cli.remote.admin_client import AdminClient, ListById
from keyproxy.cli.remote.remote_agents import RemoteAgents, RemoteAgentTokens
from keyproxy.cli.remote.remote_approvals import RemoteApprovals, RemoteConsents
from keyproxy.cli.remote.remote_keys import (
    RemoteKeyBatches,
    RemoteKeyImporter,
    RemoteKeys,
    RemoteLeakedKeys,
    key_fields,
)
from keyproxy.cli.remote.remote_oauth import (
    RemoteOAuthClients,
    RemoteOAuthGrants,
    RemoteOAuthSessions,
    RemoteOAuthSubjects,
)
from keyproxy.cli.remote.remote_provider_keys import RemoteProviderKeys
from keyproxy.store.directory.directory import AuditFilter, Credit, Entity, EntityPage, KeyWish


class RemoteTenants:
    """TenantOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self._list = ListById(client, "list_tenants")

    async def create(self, tenant_id: str, name: str, plan: str | None = None) -> Entity:
        return await self._client.call("create_tenant", id=tenant_id, name=name, plan=plan)

    async def get(self, tenant_id: str) -> Entity:
        return await self._client.call("show_tenant", tenant_id)

    async def list_by_id(self, after: str, limit: int) -> list[Entity]:
        return await self._list.page(after, limit)

    async def change(self, tenant_id: str, changes: Mapping[str, Any]) -> Entity:
        return await self._client.call("change_tenant", tenant_id, **changes)

    async def delete(self, tenant_id: str) -> Entity:
        return await self._client.call("delete_tenant", tenant_id)


class RemoteUsers:
    """UserOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self._list = ListById(client, "list_users")

    async def create(
        self, user_id: str, tenant_id: str, first_key: KeyWish | None, *, plan: str | None = None
    ) -> Entity:
        key = None if first_key is None else key_fields(first_key)
        return await self._client.call("create_user", id=user_id, tenant=tenant_id, plan=plan, key=key)

    async def get(self, user_id: str) -> Entity:
        return await self._client.call("show_user", user_id)

    async def list_by_id(self, after: str, limit: int, tenant_id: str | None) -> list[Entity]:
        return await self._list.page(after, limit, tenant=tenant_id)

    async def change(self, user_id: str, changes: Mapping[str, Any]) -> Entity:
        return await self._client.call("change_user", user_id, **changes)

    async def delete(self, user_id: str) -> Entity:
        return await self._client.call("delete_user", user_id)


class RemotePlans:
    """PlanOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self._list = ListById(client, "list_plans")

    async def set(self, name: str, limits: object) -> Entity:
        return await self._client.call("set_plan", name, limits=limits)

    async def change(self, name: str, changes: object) -> Entity:
        return await self._client.call("change_plan", name, limits=changes)

    async def get(self, name: str) -> Entity:
        return await self._client.call("show_plan", name)

    async def list_by_id(self, after: str, limit: int) -> list[Entity]:
        return await self._list.page(after, limit)

    async def delete(self, name: str) -> Entity:
        return await self._client.call("delete_plan", name)


class RemoteRoles:
    """RoleOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self._list = ListById(client, "list_roles")

    async def set(self, name: str, scopes: Sequence[str]) -> Entity:
        return await self._client.call("set_role", name, scopes=list(scopes))

    async def get(self, name: str) -> Entity:
        return await self._client.call("show_role", name)

    async def list_by_id(self, after: str, limit: int) -> list[Entity]:
        return await self._list.page(after, limit)

    async def delete(self, name: str) -> Entity:
        return await self._client.call("delete_role", name)


class RemoteOwnedIds:
    """OwnedIdOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    async def add(self, kind: str, object_id: str, tenant_id: str) -> Entity:
        return await self._client.call("add_owned", kind, object_id, tenant=tenant_id)

    async def get(self, kind: str, object_id: str) -> Entity:
        return await self._client.call("show_owned", kind, object_id)

    async def remove(self, kind: str, object_id: str, tenant_id: str | None = None) -> Entity:
        return await self._client.call("remove_owned", kind, object_id, tenant=tenant_id)

    async def list_page(
        self, cursor: str | None, limit: int, *, kind: str | None = None, tenant_id: str | None = None
    ) -> EntityPage:
        return await self._client.page("list_owned", cursor=cursor, limit=limit, kind=kind, tenant=tenant_id)


class RemotePromptTemplates:
    """PromptTemplateOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    async def register(
        self, digest: str, category: str, *, name: str | None = None, tenant_id: str | None = None
    ) -> Entity:
        return await self._client.call("register_prompt", digest, category=category, name=name, tenant=tenant_id)

    async def get(self, digest: str) -> Entity:
        return await self._client.call("show_prompt", digest)

    async def remove(self, digest: str) -> Entity:
        return await self._client.call("remove_prompt", digest)

    async def list_page(self, cursor: str | None, limit: int) -> EntityPage:
        return await self._client.page("list_prompts", cursor=cursor, limit=limit)


class RemoteCredits:
    """CreditOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    async def add(self, credit: Credit) -> Entity:
        return await self._client.call(
            "credit_window",
            **{credit.owner_kind: credit.owner_id},
            limit=credit.limit,
            amount=credit.amount,
            reason=credit.reason,
            is_test=credit.is_test,
        )


class RemoteAudit:
    """AuditOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self._export: AsyncIterator[Entity] | None = None

    async def list_newest(self, cursor: str | None, limit: int, wanted: AuditFilter | None = None) -> EntityPage:
        return await self._client.page("list_audit", cursor=cursor, limit=limit, **_filters(wanted))

    async def horizon(self) -> int:
        """The server determines the horizon when an export starts; a later export starts a new one."""
        self._export = None
        return 0

    async def export(
        self, cursor: str | None, limit: int, wanted: AuditFilter | None = None, *, horizon: int
    ) -> EntityPage:
        """Return the next part of the export that the first call after `horizon` started."""
        del horizon
        if self._export is None:
            self._export = self._client.lines("export_audit", **_filters(wanted), after=cursor or "0")
        rows: list[Entity] = []
        while len(rows) < limit and (row := await anext(self._export, None)) is not None:
            rows.append(row)
        return EntityPage(rows, str(rows[-1]["id"]) if len(rows) == limit > 0 else None)


class RemoteDirectory:
    """DirectoryOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self.tenants = RemoteTenants(client)
        self.users = RemoteUsers(client)
        self.keys = RemoteKeys(client)
        self.key_batches = RemoteKeyBatches(client)
        self.key_importer = RemoteKeyImporter(client)
        self.leaked_keys = RemoteLeakedKeys(client)
        self.agents = RemoteAgents(client)
        self.agent_tokens = RemoteAgentTokens(client)
        self.approvals = RemoteApprovals(client)
        self.consents = RemoteConsents(client)
        self.plans = RemotePlans(client)
        self.roles = RemoteRoles(client)
        self.owned = RemoteOwnedIds(client)
        self.prompts = RemotePromptTemplates(client)
        self.provider_keys = RemoteProviderKeys(client)
        self.credits = RemoteCredits(client)
        self.oauth_clients = RemoteOAuthClients(client)
        self.oauth_grants = RemoteOAuthGrants(client)
        self.oauth_sessions = RemoteOAuthSessions(client)
        self.oauth_subjects = RemoteOAuthSubjects(client)
        self.audit = RemoteAudit(client)


def _filters(wanted: AuditFilter | None) -> dict[str, Any]:
    return asdict(wanted or AuditFilter())
