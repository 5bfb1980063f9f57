"""All endpoints of the authorization server, and the tasks that run beside them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias
from urllib.parse import urlsplit

from aiohttp import web

from keyproxy.authorize.browser.browser_flow import BrowserFlow
from keyproxy.authorize.browser.browser_request import language_of_login
from keyproxy.authorize.browser.login import Login
from keyproxy.authorize.browser.pages.error_page import error_page
from keyproxy.authorize.clients.composition import client_parts
from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoint import Endpoint, ErrorPage, PageError
from keyproxy.authorize.metadata import metadata_endpoints
from keyproxy.authorize.oidc.oidc_login import CALLBACK_PATH, OidcLogin, read_client_secret
from keyproxy.authorize.oidc.provider import Provider
from keyproxy.authorize.register import register_endpoint
from keyproxy.authorize.tokens.introspect_endpoint import IntrospectEndpoint
from keyproxy.authorize.tokens.revoke_endpoint import RevokeEndpoint
from keyproxy.authorize.tokens.token_endpoint import TokenEndpoint
from keyproxy.config.oauth.oauth_settings import LOGIN_BY_KEY, OFF
from keyproxy.store.directory.admin_tokens import AdminTokens
from keyproxy.store.directory.directory import Actor
from keyproxy.store.oauth.subjects import Subjects
from keyproxy.store.oauth.tokens import TokenStore

#: A task that never returns. It is restarted after an unexpected error.
Task: TypeAlias = Callable[[], Awaitable[None]]
Closing: TypeAlias = Callable[[], Awaitable[None]]


class Parts(NamedTuple):
    """What an authorization server consists of. `tasks`: by their name in the log; they run until a reload.

    `closing`: closes connections, when the last request has ended.
    """

    endpoints: tuple[Endpoint, ...]
    error_page: ErrorPage
    tasks: Mapping[str, Task]
    closing: Sequence[Closing]


def parts_of(context: Context) -> Parts:
    """Build the endpoints and tasks of this context. Raises what building the parts raises."""
    counts, oauth = context.counts, context.settings.oauth
    tokens = TokenStore(
        context.database, oauth, context.key_format, entropy=context.entropy,
        issued=counts.tokens_issued, ended=counts.sessions_ended,
    )  # fmt: skip
    policy, clients, authentication = client_parts(context, tokens.use_assertion)
    admin_tokens = AdminTokens(context.database, context.key_format, Actor("authorize", "authorize"))
    flow = BrowserFlow(context, clients)
    login, tasks, closing = _login(context, flow)
    endpoints = (
        *metadata_endpoints(context),
        *([] if oauth.registration == OFF else [register_endpoint(policy)]),
        *flow.endpoints(login),
        TokenEndpoint(tokens, authentication, context.key_format).endpoint,
        RevokeEndpoint(tokens, authentication).endpoint,
        IntrospectEndpoint(tokens, authentication, admin_tokens, context.key_format, issuer=oauth.issuer).endpoint,
    )
    return Parts(endpoints, _error_page(context), tasks=tasks, closing=closing)


def _login(context: Context, flow: BrowserFlow) -> tuple[Login, Mapping[str, Task], Sequence[Closing]]:
    settings, oauth = context.settings.oauth_login, context.settings.oauth
    if settings.kind == LOGIN_BY_KEY:
        return flow.key_login(), {}, ()
    issuer = urlsplit(oauth.issuer)
    redirect_uri = f"{issuer.scheme}://{issuer.netloc}{CALLBACK_PATH}"
    provider = Provider(settings, read_client_secret(settings.client_secret_file), redirect_uri, now=context.now)
    login = OidcLogin(
        settings, provider, Subjects(context.database), flow.after_login.proceed,
        tickets=flow.tickets, cookies=flow.cookies, redirect_uri=redirect_uri,
        now=context.now, observe_seconds=context.counts.login_seconds.observe,
    )  # fmt: skip
    return login, {"oidc": provider.run}, (provider.close,)


def _error_page(context: Context) -> ErrorPage:
    fallback = context.settings.oauth.language

    def page(request: web.Request, error: PageError) -> web.Response:
        return error_page(error, language_of_login(request, fallback))

    return page
