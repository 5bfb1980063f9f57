"""The operations on provider keys, through a running `keyproxy admin`."""

from __future__ import annotations

from datetime import timedelta

from keyproxy.cli.remote.admin_client import AdminClient, ListById
from keyproxy.store.directory.directory import Entity


class RemoteProviderKeys:
    """ProviderKeyOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self._list = ListById(client, "list_provider_keys")

    async def add(
        self, provider: str, secret: str, *, tenant_id: str | None = None, is_test: bool = False, check: bool = False
    ) -> Entity:
        return await self._client.call(
            "add_provider_key", provider=provider, secret=secret, tenant=tenant_id, is_test=is_test, check=check
        )

    async def get(self, key_id: str) -> Entity:
        return await self._client.call("show_provider_key", key_id)

    async def list_by_id(
        self, after: str, limit: int, *, provider: str | None = None, tenant_id: str | None = None
    ) -> list[Entity]:
        return await self._list.page(after, limit, provider=provider, tenant=tenant_id)

    async def rotate(self, key_id: str, secret: str, *, grace: timedelta, check: bool = False) -> Entity:
        seconds = int(grace.total_seconds())
        return await self._client.call("rotate_provider_key", key_id, secret=secret, grace_seconds=seconds, check=check)

    async def revoke(self, key_id: str) -> Entity:
        return await self._client.call("revoke_provider_key", key_id)

    async def delete(self, key_id: str) -> Entity:
        return await self._client.call("delete_provider_key", key_id)

    async def reseal(self) -> Entity:
        return await self._client.call("reseal_provider_keys")
