"""The operations on approvals and consents, through a running `keyproxy admin`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta

from keyproxy.cli.remote.admin_client import AdminClient, seconds
from keyproxy.store.directory.directory import ApprovalFilter, ConsentFilter, Entity, EntityPage


class RemoteApprovals:
    """ApprovalOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    async def get(self, approval_id: str) -> Entity:
        return await self._client.call("show_approval", approval_id)

    async def list_page(self, cursor: str | None, limit: int, wanted: ApprovalFilter | None = None) -> EntityPage:
        filters = asdict(wanted or ApprovalFilter())
        return await self._client.page("list_approvals", cursor=cursor, limit=limit, **filters)

    async def approve(self, approval_id: str, *, reason: str = "", consent_for: timedelta | None = None) -> Entity:
        consent = {} if consent_for is None else {"consent_for_seconds": seconds(consent_for)}
        return await self._client.call("approve_call", approval_id, reason=reason, **consent)

    async def deny(self, approval_id: str, *, reason: str = "") -> Entity:
        return await self._client.call("deny_call", approval_id, reason=reason)


class RemoteConsents:
    """ConsentOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    async def grant(self, user_id: str, tool: str, *, expires_in: timedelta, agent: str | None = None) -> Entity:
        return await self._client.call(
            "grant_consent", user=user_id, tool=tool, agent=agent, expires_in_seconds=seconds(expires_in)
        )

    async def get(self, consent_id: str) -> Entity:
        return await self._client.call("show_consent", consent_id)

    async def revoke(self, consent_id: str) -> Entity:
        return await self._client.call("revoke_consent", consent_id)

    async def list_page(self, cursor: str | None, limit: int, wanted: ConsentFilter | None = None) -> EntityPage:
        filters = asdict(wanted or ConsentFilter())
        return await self._client.page("list_consents", cursor=cursor, limit=limit, **filters)
