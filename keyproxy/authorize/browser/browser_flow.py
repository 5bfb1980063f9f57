"""The browser flow, assembled: what continues after a login, and all its endpoints."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from keyproxy.authorize.browser.authorize_endpoint import AuthorizeEndpoint
from keyproxy.authorize.browser.connections import UserPage
from keyproxy.authorize.browser.consent import ConsentEndpoint
from keyproxy.authorize.browser.cookies import Cookies
from keyproxy.authorize.browser.judged_clients import ClientJudge, JudgedClients
from keyproxy.authorize.browser.key_login import KeyLogin
from keyproxy.authorize.browser.login import Login
from keyproxy.authorize.browser.tickets import Content, Tickets
from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoint import ADDRESS, Endpoint, SignedIn
from keyproxy.authorize.metrics import REVOKED
from keyproxy.authorize.rate_limits import Rate
from keyproxy.store.oauth.authorizations import Authorizations

_COOKIE_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class AfterLogin:
    """Continues after a login: its ticket is that of an authorization request, or of the user page."""

    consent: ConsentEndpoint
    user_page: UserPage

    async def proceed(self, request: web.Request, content: Content, user: SignedIn) -> web.Response:
        """Return the page for consent, or open that of the user. Raises PageError."""
        continued = self.user_page.open if content["client_name"] is None else self.consent.page
        return await continued(request, content, user)


class BrowserFlow:
    """The parts of the browser flow. A login is added last, since it continues with the others."""

    def __init__(self, context: Context, clients: ClientJudge) -> None:
        self._context = context
        self._settings = context.settings.oauth
        self._clients = JudgedClients(clients, lambda request: self._count(Rate.NEW_DOCUMENTS, request))
        self._authorizations = Authorizations(context.database, context.store_now)
        self.tickets: Final = Tickets(context.ticket_secrets, lambda: context.now().wall_seconds)
        self.cookies: Final = Cookies(self._settings.issuer, self._new_cookie)
        self.after_login: Final = AfterLogin(self._consent(), self._user_page())

    def key_login(self) -> Login:
        """The login with an API key."""
        context = self._context
        return KeyLogin(
            self._settings, self._authorizations, context.key_format, self.after_login.proceed,
            tickets=self.tickets, cookies=self.cookies, now=context.now,
            login_failed=lambda request: self._count(Rate.FAILED_LOGINS, request),
            observe_seconds=context.counts.login_seconds.observe,
        )  # fmt: skip

    def endpoints(self, login: Login) -> tuple[Endpoint, ...]:
        """All endpoints of the flow, with those of the login."""
        authorize = AuthorizeEndpoint(
            self._settings, self._clients, login, tickets=self.tickets, cookies=self.cookies
        )  # fmt: skip
        return (
            authorize.endpoint(),
            self.after_login.consent.endpoint(),
            *self.after_login.user_page.endpoints(login),
            *login.endpoints(),
        )

    def _consent(self) -> ConsentEndpoint:
        return ConsentEndpoint(
            self._settings.issuer, self._clients, self._authorizations, tickets=self.tickets, cookies=self.cookies,
            entropy=self._context.entropy, client_stored=self._client_stored,
        )  # fmt: skip

    def _user_page(self) -> UserPage:
        return UserPage(
            self._settings, self._authorizations, tickets=self.tickets, cookies=self.cookies,
            sessions_ended=self._sessions_ended,
        )  # fmt: skip

    def _new_cookie(self) -> str:
        return base64.urlsafe_b64encode(self._context.entropy(_COOKIE_BYTES)).rstrip(b"=").decode("ascii")

    def _count(self, rate: Rate, request: web.Request) -> int:
        return self._context.rate_limits.count(rate, request[ADDRESS])

    def _client_stored(self, kind: str) -> None:
        self._context.counts.clients[kind] += 1

    def _sessions_ended(self, count: int) -> None:
        self._context.counts.sessions_ended[REVOKED] += count
