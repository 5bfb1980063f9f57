"""The contradictions between keys of the authorization server that are valid individually, and what is merely unwise.

Only what both `serve` and `authorize` need is checked here: a proxy opens none of the files of the authorization server.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from keyproxy.auth.names import is_id
from keyproxy.config.oauth.oauth_settings import CREATE, LOGIN_BY_OIDC
from keyproxy.config.oauth.url_checks import https_fault, identifier_fault
from keyproxy.oauth import redirect_uris
from keyproxy.oauth.client_ids import is_presentable
from keyproxy.oauth.names import clean_name, is_too_long

_UNAUTHORIZED: Final = 401
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")

#: Paths of Microsoft Entra whose discovery document names another issuer, one for each tenant.
_ENTRA_HOSTS: Final = ("login.microsoftonline.com", "login.microsoftonline.us", "login.partner.microsoftonline.cn")
_ENTRA_SHARED: Final = ("common", "organizations", "consumers")


def contradictions(settings: Any) -> list[str]:
    """Return a sentence for each fault of the `Settings`."""
    if not settings.oauth.is_configured:
        return []
    found = [*_identifiers(settings), *_listeners(settings.oauth), *_clients(settings.oauth)]
    found += _login(settings.oauth_login)
    for number, row in enumerate(settings.oauth_known_clients, start=1):
        found += [f"oauth.known_clients[{number}].{fault}" for fault in _known_client(row)]
    names = [row.name for row in settings.oauth_known_clients]
    found += [f"oauth.known_clients: {name!r} is configured twice" for name in names if names.count(name) > 1]
    return list(dict.fromkeys(found))


def warnings(settings: Any) -> list[str]:
    """Return a sentence for each thing in the `Settings` that is probably a mistake."""
    oauth = settings.oauth
    if not oauth.is_configured:
        if oauth.issuer or oauth.test_resource or oauth.secret_file:
            return ["oauth.resource: is not set, so that the other keys of [oauth] have no effect"]
        return []
    offered = frozenset(oauth.scopes)
    needed: dict[str, str] = {}
    for row in settings.routes:
        needed |= {scope: row.match for scope in row.scopes if scope not in offered | needed.keys()}
    found = [
        f"oauth.scopes: has no {scope}, which the route {match!r} requires: no OAuth token can use that route"
        for scope, match in needed.items()
    ]
    if oauth.mtls_address and not settings.listen.tls_client_ca_file:
        found.append(
            "oauth.mtls_address: its tokens are bound to the client's certificate, which proxies do not ask for without"
            " listen.tls_client_ca_file: they refuse these tokens"
        )
    return found


def _identifiers(settings: Any) -> Iterator[str]:
    oauth = settings.oauth
    if settings.errors.invalid_key_status != _UNAUTHORIZED:
        yield (
            f"errors.invalid_key_status: must be {_UNAUTHORIZED} with oauth.resource:"
            " clients begin to authorize when they get this status"
        )
    if not oauth.issuer:
        yield "oauth.issuer: is required with oauth.resource"
    for key, value in (
        ("oauth.issuer", oauth.issuer),
        ("oauth.resource", oauth.resource),
        ("oauth.test_resource", oauth.test_resource),
    ):
        fault = identifier_fault(value) if value else None
        if fault is not None:
            yield f"{key}: {fault}"
    if oauth.test_resource == oauth.resource:
        yield "oauth.test_resource: must not be oauth.resource: the resource is what separates test tokens from live ones"


def _listeners(oauth: Any) -> Iterator[str]:
    if oauth.tls_key_file and not oauth.tls_certificate_file:
        yield "oauth.tls_key_file: is set without oauth.tls_certificate_file"
    if oauth.mtls_address and not oauth.mtls_client_ca_file:
        yield "oauth.mtls_address: is set without oauth.mtls_client_ca_file, which verifies certificates of clients"
    if oauth.mtls_address and not oauth.tls_certificate_file:
        yield "oauth.mtls_address: is set without oauth.tls_certificate_file: mutual TLS needs TLS"


def _clients(oauth: Any) -> Iterator[str]:
    for key, hosts in (
        ("oauth.redirect_hosts", oauth.redirect_hosts),
        ("oauth.document_hosts", oauth.document_hosts),
    ):
        for host in hosts:
            if _HOST.fullmatch(host) is None:
                yield f"{key}: {host!r} is not a host name, such as 'acme.example'"
    for network in oauth.document_networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            yield f"oauth.document_networks: {error}"


def _login(login: Any) -> Iterator[str]:
    if login.kind == LOGIN_BY_OIDC:
        for key, value in (("issuer", login.issuer), ("client_id", login.client_id)):
            if not value:
                yield f"oauth.login.{key}: is required with kind = {LOGIN_BY_OIDC!r}"
        fault = _provider_fault(login.issuer) if login.issuer else None
        if fault is not None:
            yield f"oauth.login.issuer: {fault}"
        if "openid" not in login.scopes:
            yield "oauth.login.scopes: must contain 'openid', without which there is no id_token"
        if not login.subject_claims:
            yield "oauth.login.subject_claims: must name a claim"
    if login.provision == CREATE and not login.tenants:
        yield f"oauth.login.tenants: is required with provision = {CREATE!r}: a user without a tenant is not created"
    if login.tenants and not login.tenant_claim:
        yield "oauth.login.tenant_claim: is required with oauth.login.tenants: its value selects the tenant"
    for tenant in login.tenants.values():
        if not is_id(tenant):
            yield f"oauth.login.tenants: {tenant!r} is not a valid tenant id"


def _provider_fault(issuer: str) -> str | None:
    fault = https_fault(issuer)
    if fault is not None:
        return fault
    parts = urlsplit(issuer)
    tenant = parts.path.strip("/").partition("/")[0].lower()
    if parts.hostname in _ENTRA_HOSTS and tenant in _ENTRA_SHARED:
        return f"must name your tenant in place of {tenant!r}, since id_tokens have the issuer of their user's tenant"
    return None


def _known_client(row: Any) -> Iterator[str]:
    if not row.name or row.name != clean_name(row.name) or is_too_long(row.name):
        yield "name: must have 1 to 200 characters, without control characters and surrounding spaces"
    if not row.redirect_uris:
        yield "redirect_uris: must have an entry"
    for uri in row.redirect_uris:
        # A segment in place of `{}`; in any other place this leaves a character that no URI has.
        plain = re.sub(r"(?<=[^/:]/)\{\}(?=[/?]|$)", "segment", uri)
        fault = redirect_uris.fault(plain, (redirect_uris.scheme(plain),))
        if fault is not None:
            yield f"redirect_uris: {uri!r} {fault}"
    for client_id in row.client_ids:
        if not is_presentable(client_id):
            yield f"client_ids: {client_id!r} is not a valid client id"
