"""All endpoints of the authorization server, and the tasks that run beside them."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, TypeAlias

from aiohttp import web

from keyproxy.authorize.browser.browser_flow import BrowserFlow
from keyproxy.authorize.browser.browser_request import language_of_login
from keyproxy.authorize.browser.login import Login
from keyproxy.authorize.browser.pages.error_page import error_page
from keyproxy.authorize.clients.authentication import ClientAuthentication
from keyproxy.authorize.clients.composition import client_parts
from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoint import Endpoint, ErrorPage, PageError
from keyproxy.authorize.metadata import metadata_endpoints
from keyproxy.authorize.metrics import EXPIRED
from keyproxy.authorize.oidc.oidc_login import OidcLogin
from keyproxy.authorize.register import register_endpoint
from keyproxy.authorize.tokens.introspect_endpoint import IntrospectEndpoint
from keyproxy.authorize.tokens.revoke_endpoint import RevokeEndpoint
from keyproxy.authorize.tokens.token_endpoint import TokenEndpoint
from keyproxy.config.oauth.oauth_settings import LOGIN_BY_KEY
from keyproxy.store.directory.admin_tokens import AdminTokens
from keyproxy.store.directory.directory import Actor
from keyproxy.store.oauth.cleanup import OAuthCleanup
from keyproxy.store.oauth.tokens import TokenStore
from keyproxy.wire.tls import TlsError

#: A task that never returns. It is restarted after an unexpected error.
Task: TypeAlias = Callable[[], Awaitable[None]]


class Parts(NamedTuple):
    """What an authorization server consists of. `tasks`: by their name in the log; they run until a reload.

    `cleanup`: one of them.
    """

    endpoints: tuple[Endpoint, ...]
    error_page: ErrorPage
    tasks: Mapping[str, Task]
    cleanup: OAuthCleanup


class PartsFault(Exception):
    """A file that the configuration names cannot be used. The text names its key."""


def parts_of(context: Context) -> Parts:
    """Build the endpoints and tasks of this context. Raises PartsFault."""
    tokens = TokenStore(
        context.database,
        context.settings.oauth,
        context.key_format,
        now=context.store_now,
        entropy=context.entropy,
        issued=context.counts.tokens_issued,
        ended=context.counts.sessions_ended,
    )
    try:
        clients = client_parts(context, tokens.use_assertion)
    except (OSError, ssl.SSLError) as error:
        raise PartsFault(f"oauth.document_ca_file: {getattr(error, 'strerror', None) or error}") from error
    browser = BrowserFlow(context, clients.clients)
    login, tasks = _login(context, browser)
    endpoints = (
        *metadata_endpoints(context),
        register_endpoint(clients.policy),
        *browser.endpoints(login),
        *_token_endpoints(context, tokens, clients.authentication),
    )
    cleanup = _cleanup(context)
    return Parts(endpoints, _error_page(context), {**tasks, "oauth_cleanup": cleanup.run}, cleanup)


def _cleanup(context: Context) -> OAuthCleanup:
    counts = context.counts.sessions_ended

    def expired(count: int) -> None:
        counts[EXPIRED] += count

    return OAuthCleanup(context.database, context.settings.oauth, sessions_expired=expired, now=context.store_now)


def _login(context: Context, browser: BrowserFlow) -> tuple[Login, dict[str, Task]]:
    """The configured login, and what runs beside it. Raises PartsFault."""
    if context.settings.oauth_login.kind == LOGIN_BY_KEY:
        return browser.key_login(), {}
    try:
        by_provider = OidcLogin(context, browser.tickets, browser.cookies, browser.after_login.proceed)
    except TlsError as error:
        raise PartsFault(f"oauth.login.ca_file: {error}") from error
    return by_provider, {"oauth_provider": by_provider.run}


def _token_endpoints(
    context: Context, tokens: TokenStore, authentication: ClientAuthentication
) -> tuple[Endpoint, ...]:
    # This instance only looks admin tokens up; it makes no changes, so its actor is never logged.
    admin_tokens = AdminTokens(context.database, context.key_format, Actor("authorize", "local"))
    introspection = IntrospectEndpoint(
        tokens, authentication, admin_tokens, context.key_format, issuer=context.settings.oauth.issuer
    )
    return (
        TokenEndpoint(tokens, authentication, context.key_format).endpoint,
        RevokeEndpoint(tokens, authentication).endpoint,
        introspection.endpoint,
    )


def _error_page(context: Context) -> ErrorPage:
    fallback = context.settings.oauth.language

    def page(request: web.Request, error: PageError) -> web.Response:
        return error_page(error, language_of_login(request, fallback))

    return page
