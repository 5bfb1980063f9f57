"""Judges the client id that a request presents: registered, listed, document or value, the first match wins.

There is no other source of clients. The policy of the configuration applies each time, so that a change of it acts on
clients that have been in use before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from keyproxy.authorize.clients.documents import Documents
from keyproxy.oauth import redirect_uris
from keyproxy.oauth.client import Client, ClientKind, row_id
from keyproxy.oauth.client_ids import DOCUMENT_PREFIX, decode_value_id, is_presentable
from keyproxy.oauth.client_policy import ClientPolicy
from keyproxy.oauth.client_refusals import ClientDisabled, RedirectRefused, UnknownClient
from keyproxy.oauth.known_clients import KnownClient
from keyproxy.store.oauth.clients import ClientRows, StoredClient


def _unlimited() -> None:
    """Fetch without a bound."""


class Clients:
    """Judges clients: see the module."""

    def __init__(self, policy: ClientPolicy, rows: ClientRows, documents: Documents) -> None:
        self._policy = policy
        self._rows = rows
        self._documents = documents

    async def judge(
        self, client_id: str, redirect_uri: str | None, *, before_fetch: Callable[[], None] = _unlimited
    ) -> Client:
        """The client of an authorization request, whose redirect URI is one of its own.

        `before_fetch`: called before a document is fetched that is not in memory; it may raise. Raises UnknownClient,
        ClientDisabled, DocumentRefused, TooManyDocuments, RedirectRefused, and StoreUnavailable.
        """
        known, rows = await self._look_up(client_id, redirect_uri)
        client = self._without_document(client_id, known, rows)
        if client is None:
            client = await self._documents.client(client_id, before_fetch=before_fetch)
        self._check_redirect(client, redirect_uri)
        return client

    async def presented(
        self, client_id: str, redirect_uri: str | None = None, *, credential: bytes | None = None
    ) -> Client:
        """The client of a request to the token endpoint, which may omit the redirect URI. It is not authenticated yet.

        `credential`: the digest of the code or token that the request presents. What was issued to this id decides which
        client it is, so that a listed client may present any id here too. A document is not fetched: a client without
        credentials may present any URL. Raises UnknownClient, ClientDisabled and StoreUnavailable.
        """
        if not is_presentable(client_id):
            raise UnknownClient("the client id has other characters than ASCII, or too many")
        if credential is not None:
            stored = await self._rows.of_credential(client_id, credential)
            if stored is not None:
                return self._issued_to(client_id, stored)
        known, rows = await self._look_up(client_id, redirect_uri)
        client = self._without_document(client_id, known, rows)
        if client is not None:
            return client
        cached, own = self._documents.cached(client_id), rows.get(row_id(client_id))
        if cached is not None:
            return cached
        # Without a row there is nothing that was issued to it.
        return own.client if own is not None else Client(client_id, client_id, ClientKind.DOCUMENT, "", ())

    async def _look_up(
        self, client_id: str, redirect_uri: str | None
    ) -> tuple[KnownClient | None, Mapping[str, StoredClient]]:
        """The known client that the request matches, and the rows of all clients that it may come from."""
        if not is_presentable(client_id):
            raise UnknownClient("the client id has other characters than ASCII, or too many")
        known = self._policy.known.by_redirect_uri(redirect_uri) if redirect_uri is not None else None
        known = known or self._policy.known.by_client_id(client_id)
        wanted = [row_id(client_id)]
        if known is not None:
            wanted.append(known.presented_as(client_id).row_id)
        rows = await self._rows.by_id(wanted)
        for row, stored in rows.items():
            if stored.is_disabled:
                raise ClientDisabled(row)
        return known, rows

    def _without_document(
        self, client_id: str, known: KnownClient | None, rows: Mapping[str, StoredClient]
    ) -> Client | None:
        """The client, None if a document describes it. Raises UnknownClient."""
        own = rows.get(row_id(client_id))
        if own is not None and own.client.kind is ClientKind.REGISTERED:
            return own.client
        if known is not None:
            return known.presented_as(client_id)
        if client_id.startswith(DOCUMENT_PREFIX):
            self._documents.url(client_id)
            return None
        return self._value(client_id)

    def _value(self, client_id: str) -> Client:
        client = decode_value_id(client_id, self._policy.known.schemes)
        if client is None:
            raise UnknownClient("the client id is of no kind")
        fault = self._policy.registration_fault(client.redirect_uris)
        if not self._policy.registers or fault is not None:
            raise UnknownClient(fault or "registration is not offered")
        return client

    def _issued_to(self, client_id: str, stored: StoredClient) -> Client:
        """The client that presented this id when something was issued to it, if it may still use it."""
        client = stored.client
        if stored.is_disabled:
            raise ClientDisabled(client.row_id)
        if client.kind is ClientKind.LISTED:
            known = self._policy.known.by_row(client.client_id)
            if known is None:
                raise UnknownClient("the client is not listed any more")
            return known.presented_as(client_id)
        if client.kind is ClientKind.VALUE:
            return self._value(client_id)
        if client.kind is ClientKind.DOCUMENT:
            self._documents.url(client_id)
            client = self._documents.cached(client_id) or client
        return dataclasses.replace(client, presented_as=client_id)

    def _check_redirect(self, client: Client, redirect_uri: str | None) -> None:
        if redirect_uri is None:
            raise RedirectRefused("redirect_uri is missing")
        schemes = {redirect_uris.scheme(uri) for uri in client.redirect_uris} - {"https", "http"}
        fault = redirect_uris.fault(redirect_uri, schemes)
        if fault is None and client.kind is ClientKind.DOCUMENT:
            fault = self._policy.redirect_fault(redirect_uri)
        if fault is not None:
            raise RedirectRefused(f"redirect_uri {fault}")
        if not redirect_uris.matches_any(client.redirect_uris, redirect_uri):
            raise RedirectRefused("redirect_uri is not one of the client's")
