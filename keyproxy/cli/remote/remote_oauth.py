"""The operations on OAuth clients, grants, sessions and subjects, through a running `keyproxy admin`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keyproxy.cli.remote.admin_client import AdminClient, ListById
from keyproxy.store.directory.directory import Entity, EntityPage, OAuthClientWish


class RemoteOAuthClients:
    """OAuthClientOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self._list = ListById(client, "list_oauth_clients")

    async def create(self, wish: OAuthClientWish) -> Entity:
        return await self._client.call(
            "create_oauth_client",
            client_id=wish.client_id,
            auth_method=wish.auth_method.value,
            name=wish.name,
            user=wish.user,
            scopes=list(wish.scopes),
            is_test=wish.is_test,
            redirect_uris=list(wish.redirect_uris),
            jwks=wish.jwks,
            tls_subject=wish.tls_subject,
        )

    async def get(self, client: str) -> Entity:
        return await self._client.call("show_oauth_client", client)

    async def list_by_id(self, after: str, limit: int, *, kind: str | None = None) -> list[Entity]:
        return await self._list.page(after, limit, kind=kind)

    async def change(self, client: str, changes: Mapping[str, Any]) -> Entity:
        return await self._client.call("change_oauth_client", client, **changes)

    async def delete(self, client: str) -> Entity:
        return await self._client.call("delete_oauth_client", client)


class RemoteOAuthGrants:
    """OAuthGrantOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self._list = ListById(client, "list_grants")
        self._lists: dict[str, ListById] = {}

    async def get(self, grant_id: str) -> Entity:
        return await self._client.call("show_grant", grant_id)

    async def list_by_id(self, after: str, limit: int, *, user_id: str | None = None) -> list[Entity]:
        if user_id is None:
            return await self._list.page(after, limit)
        listed = self._lists.setdefault(user_id, ListById(self._client, "list_grants_of_user", user_id))
        return await listed.page(after, limit)

    async def change(self, grant_id: str, changes: Mapping[str, Any]) -> Entity:
        return await self._client.call("change_grant", grant_id, **changes)

    async def delete(self, grant_id: str) -> Entity:
        return await self._client.call("delete_grant", grant_id)

    async def delete_of_user(self, user_id: str) -> Entity:
        return await self._client.call("revoke_grants", user=user_id)


class RemoteOAuthSessions:
    """OAuthSessionOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self._list = ListById(client, "list_sessions")

    async def get(self, session_id: str) -> Entity:
        return await self._client.call("show_session", session_id)

    async def list_by_id(self, after: str, limit: int, *, user_id: str | None = None) -> list[Entity]:
        return await self._list.page(after, limit, user=user_id)

    async def delete(self, session_id: str) -> Entity:
        return await self._client.call("delete_session", session_id)

    async def delete_many(self, *, user_id: str | None = None) -> Entity:
        return await self._client.call("revoke_sessions", user=user_id)


class RemoteOAuthSubjects:
    """OAuthSubjectOperations over the admin API."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    async def link(self, subject: str, user_id: str, *, issuer: str | None = None) -> Entity:
        return await self._client.call("link_oauth_subject", subject=subject, user=user_id, issuer=issuer)

    async def unlink(self, subject: str, *, issuer: str | None = None) -> Entity:
        return await self._client.call("unlink_oauth_subject", subject=subject, issuer=issuer)

    async def list_page(self, cursor: str | None, limit: int, *, user_id: str | None = None) -> EntityPage:
        return await self._client.page("list_oauth_subjects", cursor=cursor, limit=limit, user=user_id)
