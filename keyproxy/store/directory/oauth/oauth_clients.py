"""OAuth clients, as operators handle them: register one, disable or enable any, delete it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from keyproxy.auth.api_key import ENTROPY_BYTES
from keyproxy.config.oauth.client_rules import known_clients
from keyproxy.config.schema import Settings
from keyproxy.oauth.client import NAME_CHARACTERS_MAX, AuthMethod, Client, ClientKind, row_id
from keyproxy.oauth.client_ids import DOCUMENT_PREFIX, decode_value_id
from keyproxy.oauth.known_clients import KnownClients
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import Entity, reveal
from keyproxy.store.directory.errors import Conflict, Invalid, NotFound
from keyproxy.store.directory.oauth.client_wish import ROW_PREFIX, OAuthClientWish
from keyproxy.store.directory.oauth.grants import new_grant_id
from keyproxy.store.postgres.database import Transaction

CLIENT_KINDS: Final = tuple(kind.value for kind in ClientKind)


@dataclass(frozen=True, slots=True)
class OAuthClientStore:
    """The operations on OAuth clients. They belong to no tenant, so a directory that is bound to one refuses them.

    `client`: in all methods the id of the client's row, or the id that the client presents.
    """

    _context: DirectoryContext
    _settings: Settings

    async def create(self, wish: OAuthClientWish) -> Entity:
        """Register a client, and return it, with its `secret` if it authenticates with one.

        Raises Invalid, NotFound for an unknown user, or Conflict if the client id is taken or no resource is configured.
        """
        self._context.require_unbound("register a client")
        wish.check(self._known().schemes)
        resource = None if wish.user is None else self._resource(is_test=wish.is_test)
        secret = None
        if wish.auth_method is AuthMethod.CLIENT_SECRET:
            secret = self._context.key_format.make_client_secret(secrets.token_bytes(ENTROPY_BYTES))
        client = wish.client(None if secret is None else secret.digest())
        async with self._context.transaction() as transaction:
            if wish.user is not None:
                await self._context.lock(transaction, "user", wish.user)
            if not await _add(transaction, client):
                raise Conflict(f"there is a client {wish.client_id!r} already: delete it first, or use another id")
            if wish.user is not None:
                values = (new_grant_id(), wish.user, client.row_id, resource, list(dict.fromkeys(wish.scopes)))
                await transaction.fetch("add_service_grant", *values, wish.is_test)
        made = await self.get(client.row_id)
        return {**made, "secret": None if secret is None else reveal(secret)}

    async def get(self, client: str) -> Entity:
        """Return one client, without its secret, which is not stored."""
        self._context.require_unbound("read clients")
        with _presented(client):
            return await self._context.get("client", await self._row_id(client))

    async def list_by_id(self, after: str, limit: int, *, kind: str | None = None) -> list[Entity]:
        """List the clients that have a row, ordered by its id. `kind`: only one of CLIENT_KINDS."""
        self._context.require_unbound("read clients")
        if kind not in (None, *CLIENT_KINDS):
            raise Invalid(f"unknown kind {kind!r}; kinds are {', '.join(CLIENT_KINDS)}")
        return await self._context.list_entities("client", "clients", after, limit, kind)

    async def change(self, client: str, changes: Mapping[str, Any], *, if_match: str | None = None) -> Entity:
        """Change `disabled`, and return the client. A disabled client gets no tokens, and its tokens are refused.

        A client that has no row yet gets one when it is disabled.
        """
        self._context.require_unbound("change clients")
        row = await self._row_id(client)
        if changes.get("disabled") and if_match is None:
            described = _described(client, self._known())
            if described is not None and described.row_id == row:
                async with self._context.transaction() as transaction:
                    await _add(transaction, described)
        with _presented(client):
            return await self._context.change("client", row, changes, if_match)

    async def delete(self, client: str, *, if_match: str | None = None) -> Entity:
        """Delete a client with its grants and sessions.

        One that is not registered gets a new row when a user consents again: to refuse it, disable it instead.
        """
        self._context.require_unbound("delete clients")
        with _presented(client):
            return await self._context.delete("client", await self._row_id(client), if_match)

    async def _row_id(self, client: str) -> str:
        """The id of the row of a client. As in authorization requests, a registered client precedes a known one."""
        if client.startswith(ROW_PREFIX):
            return client
        known = self._known().by_client_id(client)
        if known is None:
            return row_id(client)
        row = await self._context.fetch_row("client", row_id(client))
        is_registered = row is not None and row["kind"] == ClientKind.REGISTERED.value
        return row_id(client) if is_registered else known.presented_as(client).row_id

    def _known(self) -> KnownClients:
        return known_clients(self._settings.oauth_known_clients)

    def _resource(self, *, is_test: bool) -> str:
        oauth, name = self._settings.oauth, "test_resource" if is_test else "resource"
        resource = oauth.test_resource if is_test else oauth.resource
        if not resource:
            raise Conflict(f"oauth.{name} is not configured, so there are no tokens for it")
        return resource


@contextlib.contextmanager
def _presented(client: str) -> Iterator[None]:
    """Report an unknown client by the id that the caller has used, not by that of its row."""
    try:
        yield
    except NotFound as error:
        raise NotFound(f"there is no client {client!r}") from error


async def _add(transaction: Transaction, client: Client) -> bool:
    """Insert the row of a client. False: there is one."""
    row = await transaction.fetch_row(
        "add_client", client.row_id, client.client_id, client.kind.value, client.name,
        list(client.redirect_uris), client.auth_method.value, client.secret_digest, client.jwks, client.tls_subject,
    )  # fmt: skip
    return row is not None


def _described(client: str, known: KnownClients) -> Client | None:
    """The client as its id or the configuration describes it, without a look-up. None: neither does."""
    listed = known.by_client_id(client) or known.by_row(client)
    if listed is not None:
        return listed.presented_as(client)
    if client.startswith(DOCUMENT_PREFIX):
        # The document is read when the client is used, and replaces these values.
        return Client(client, client, ClientKind.DOCUMENT, client[:NAME_CHARACTERS_MAX], ())
    return decode_value_id(client, known.schemes)
