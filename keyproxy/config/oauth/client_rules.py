"""The policy for OAuth clients that the configuration describes."""

from __future__ import annotations

import ipaddress
import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import Any

from keyproxy.config.oauth.oauth_settings import LISTED, OFF, OPEN, KnownClientRow
from keyproxy.oauth.client_policy import ClientPolicy
from keyproxy.oauth.known_clients import KnownClient, KnownClients
from keyproxy.oauth.public_addresses import IpNetwork


def known_clients(rows: Sequence[KnownClientRow]) -> KnownClients:
    """The configured known clients; without any, those of the package."""
    if rows:
        return KnownClients(KnownClient(row.name, tuple(row.redirect_uris), tuple(row.client_ids)) for row in rows)
    text = resources.files("keyproxy.config.oauth").joinpath("known_clients.toml").read_text(encoding="utf-8")
    return KnownClients(
        KnownClient(row["name"], tuple(row["redirect_uris"]), tuple(row.get("client_ids", ())))
        for row in tomllib.loads(text)["known_clients"]
    )


def client_policy(settings: Any) -> ClientPolicy:
    """The policy of the `Settings`."""
    oauth = settings.oauth
    return ClientPolicy(
        known_clients(settings.oauth_known_clients),
        registers=oauth.registration in (OPEN, LISTED),
        registers_any=oauth.registration == OPEN,
        redirect_hosts=_hosts(oauth.redirect_hosts),
        accepts_documents=oauth.documents != OFF,
        document_hosts=_hosts(oauth.document_hosts),
    )


def document_networks(texts: Sequence[str]) -> tuple[IpNetwork, ...]:
    """The networks that documents may come from. Raises ValueError."""
    return tuple(ipaddress.ip_network(text) for text in texts)


def _hosts(texts: Sequence[str]) -> frozenset[str]:
    return frozenset(text.lower() for text in texts)
