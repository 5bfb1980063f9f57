"""The parts that judge and authenticate clients, built from the configuration."""

from __future__ import annotations

import ssl
from typing import NamedTuple

from aiohttp import web

from keyproxy.authorize.clients.authentication import ClientAuthentication, UseOnce
from keyproxy.authorize.clients.client_directory import Clients
from keyproxy.authorize.clients.document_fetcher import DocumentFetcher, Resolve
from keyproxy.authorize.clients.documents import Documents
from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoint import ADDRESS
from keyproxy.authorize.rate_limits import Rate
from keyproxy.authorize.responses import too_many_requests
from keyproxy.config.oauth.client_rules import client_policy, document_networks
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.oauth.client_policy import ClientPolicy
from keyproxy.store.oauth.clients import ClientRows


class ClientParts(NamedTuple):
    """What the endpoints need to know their clients."""

    policy: ClientPolicy
    clients: Clients
    authentication: ClientAuthentication


def client_parts(context: Context, use_once: UseOnce, *, resolve: Resolve | None = None) -> ClientParts:
    """Build the parts. `use_once`: records assertions. `resolve`: in place of the resolver of this machine.

    Raises OSError and ssl.SSLError if `oauth.document_ca_file` cannot be read.
    """
    oauth, policy = context.settings.oauth, client_policy(context.settings)
    fetcher = DocumentFetcher(document_networks(oauth.document_networks), _trusted(oauth), resolve=resolve)
    fetches = context.counts.document_fetches

    def count(outcome: str) -> None:
        fetches[outcome] += 1

    documents = Documents(policy, fetcher, now=context.now, count=count)
    clients = Clients(policy, ClientRows(context.database), documents)

    def limit(request: web.Request) -> None:
        seconds = context.rate_limits.count(Rate.NEW_DOCUMENTS, request.get(ADDRESS, ""))
        if seconds:
            raise too_many_requests(seconds)

    authentication = ClientAuthentication(
        clients, documents, issuer=oauth.issuer, use_once=use_once, now=context.now, before_fetch=limit
    )
    return ClientParts(policy, clients, authentication)


def _trusted(oauth: OAuthSettings) -> ssl.SSLContext:
    """The public CAs, and those of the operator."""
    context = ssl.create_default_context()
    if oauth.document_ca_file:
        context.load_verify_locations(oauth.document_ca_file)
    return context
