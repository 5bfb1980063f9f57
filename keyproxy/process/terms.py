"""Build what requests are served with from the configuration: the gateway, the upstream pools and the `ServerTerms`."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from keyproxy.ai.access.access_rules import AccessRules
from keyproxy.ai.categories import PatternMatcher
from keyproxy.ai.dialects.table import DIALECTS
from keyproxy.ai.model_source import parse_model_source
from keyproxy.ai.models import ModelTable
from keyproxy.ai.route_rules import RouteRules
from keyproxy.ai.scanning.member_scope import NO_MEMBERS
from keyproxy.auth.api_key import KeyFormat
from keyproxy.config.access_settings import access_rules
from keyproxy.config.schema import RouteRow, Settings
from keyproxy.config.tools.tool_rules import tool_rules
from keyproxy.decision.tool_calls import ToolCalls
from keyproxy.gateway import Gateway
from keyproxy.http.discovery.challenges import Challenges
from keyproxy.http.discovery.published_documents import NO_DOCUMENTS, PublishedDocument, PublishedDocuments
from keyproxy.http.error_responses import ErrorRenderer
from keyproxy.http.forwarding import TrustRule
from keyproxy.http.headers import FieldNames
from keyproxy.http.path_patterns import placeholder_pattern
from keyproxy.http.routes import RouteTable
from keyproxy.model import NO_TOKENS, Moment, Route
from keyproxy.oauth.protected_resource import document, metadata_url, paths, resource_scopes
from keyproxy.platform import clock
from keyproxy.ports.agent_token_mint import AgentTokenMint
from keyproxy.ports.gate import Assertions
from keyproxy.ports.identities import Identities
from keyproxy.ports.ledger import Claims, Ledger
from keyproxy.ports.tenant_records import OwnedIds, PromptTemplates
from keyproxy.ports.tools import Approvals, UpstreamCredentials
from keyproxy.wire.context import ServerTerms
from keyproxy.wire.deadlines import Deadlines
from keyproxy.wire.parsing.head_cache import ResponseReader
from keyproxy.wire.upstream.pool import UpstreamPool, Upstreams


def build_gateway(
    settings: Settings,
    routes: RouteTable,
    *,
    identities: Identities,
    owned_ids: OwnedIds,
    templates: PromptTemplates,
    ledger: Ledger,
    claims: Claims,
    approvals: Approvals,
    mint: AgentTokenMint,
    upstream_credentials: UpstreamCredentials,
    patterns: PatternMatcher | None = None,
    now: Callable[[], Moment] = clock.now,
) -> Gateway:
    """The gateway over these ports. `patterns`: of prompt categories, None without any."""
    access = access_rules(settings, routes, patterns)
    return Gateway(
        key_format=_key_format(settings),
        identities=identities,
        owned_ids=owned_ids,
        templates=templates,
        ledger=ledger,
        claims=claims,
        routes=routes,
        metering=build_metering(settings, routes, access),
        access=access,
        tool_calls=ToolCalls(tool_rules(settings, routes), approvals, _key_format(settings)),
        mint=mint,
        mint_rules=settings.access.mint_rules(),
        upstream_credentials=upstream_credentials,
        now=now,
        usage_wait_seconds=settings.tokens.usage_wait_seconds,
        documents=published_documents(settings),
    )


def published_documents(settings: Settings) -> PublishedDocuments:
    """The metadata of the resources that OAuth access tokens are for; nothing without OAuth."""
    oauth = settings.oauth
    if not oauth.is_configured:
        return NO_DOCUMENTS
    return PublishedDocuments(
        [
            PublishedDocument(urlsplit(resource).netloc, path, document(resource, oauth.issuer, oauth.scopes))
            for resource in (oauth.resource, oauth.test_resource)
            if resource
            for path in paths(resource)
        ]
    )


def build_metering(
    settings: Settings, routes: RouteTable, access: Mapping[Route, AccessRules]
) -> dict[Route, RouteRules]:
    """The rules of the metered routes. `access`: of those that judge their requests."""
    rows = {row.match: row for row in settings.routes}
    models = ModelTable(settings.models)
    found = {}
    for match, route in routes.rows:
        if route.tokens == NO_TOKENS:
            continue
        row = rows.get(match, RouteRow(match))
        source = parse_model_source(row.model)
        judged = access.get(route)
        found[route] = RouteRules(
            route.name,
            DIALECTS[route.tokens],
            tokens=settings.tokens.rules(),
            bounds=settings.tokens.bounds() if judged is None else judged.bounds,
            models=models,
            source=source,
            cap=row.cap,
            cap_field=row.cap_field,
            placeholder=placeholder_pattern(match, source.name) if source.kind == "path" else None,
            judged=NO_MEMBERS if judged is None else judged.members,
            model_field=f"{settings.identity.header_prefix}Model: ".encode("ascii"),
        )
    return found


def build_upstreams(
    settings: Settings, deadlines: Deadlines, loop: asyncio.AbstractEventLoop, tls: ssl.SSLContext | None
) -> Upstreams:
    """The pools of connections to the configured upstreams. `tls`: verifies the certificates of https upstreams."""
    upstream = settings.upstream
    responses = ResponseReader(FieldNames(settings.identity.header_prefix))
    live, *test = (
        UpstreamPool(url, upstream, responses, deadlines, clock=clock.monotonic, loop=loop, tls=tls)
        for url in (upstream.url, upstream.test_url)
        if url
    )
    return Upstreams(live, *test)


def build_terms(
    settings: Settings,
    routes: RouteTable,
    gateway: Gateway,
    upstreams: Upstreams,
    *,
    tls: ssl.SSLContext | None,
    assertions: Assertions | None = None,
) -> ServerTerms:
    """The terms for requests that this gateway decides on.

    `tls`: for clients; None: without TLS. `assertions`: signs the identities of forwarded requests; None: unsigned.
    """
    prefix = settings.identity.header_prefix
    return ServerTerms(
        listen=settings.listen,
        tokens=settings.tokens,
        gate=gateway,
        routes=routes,
        key_format=_key_format(settings),
        upstreams=upstreams,
        names=FieldNames(prefix, forward_overrides=settings.identity.forward_overrides),
        problems=ErrorRenderer(
            invalid_key_status=settings.errors.invalid_key_status,
            spent_status=settings.errors.spent_status,
            challenges=_challenges(settings),
        ),
        trust=TrustRule(settings.listen.trusted_proxies, prefix, recorded=settings.log.client_address),
        tls=tls,
        assertions=assertions,
    )


def _challenges(settings: Settings) -> Challenges:
    oauth = settings.oauth
    if not oauth.is_configured:
        return Challenges()
    return Challenges(metadata_url(oauth.resource), resource_scopes(oauth.scopes))


def _key_format(settings: Settings) -> KeyFormat:
    return KeyFormat(
        settings.keys.prefix,
        accepts_foreign=settings.keys.accept_foreign,
        accepts_access_tokens=settings.oauth.is_configured,
    )
