"""The page of a user: the programs that are connected, and their devices. The user can end one or all of them.

A login opens the page for 15 minutes. A cookie holds its ticket; each form repeats it, so that a form of another site,
which cannot read the cookie, has no effect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from aiohttp import web

from keyproxy.authorize.browser import browser_request, signed_in_users
from keyproxy.authorize.browser.cookies import Cookies
from keyproxy.authorize.browser.login import Login
from keyproxy.authorize.browser.pages.connections_page import ConnectionsView, connections_page
from keyproxy.authorize.browser.pages.languages import language_of
from keyproxy.authorize.browser.tickets import USER_PAGE_SECONDS, Content, Purpose, Tickets
from keyproxy.authorize.endpoint import USER, Endpoint, PageError, SignedIn
from keyproxy.authorize.rate_limits import Rate
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.store.oauth.authorizations import Authorizations

PATH: Final = "/oauth/connections"


class UserPage:
    """Shows the connections of a user who has signed in, and ends them."""

    def __init__(
        self,
        settings: OAuthSettings,
        authorizations: Authorizations,
        *,
        tickets: Tickets,
        cookies: Cookies,
        sessions_ended: Callable[[int], None],
    ) -> None:
        """`sessions_ended`: called with the number of sessions that a user has ended."""
        self._settings = settings
        self._authorizations = authorizations
        self._tickets = tickets
        self._cookies = cookies
        self._sessions_ended = sessions_ended

    def endpoints(self, login: Login) -> tuple[Endpoint, ...]:
        """The endpoints as values. `login`: where users sign in."""

        async def show(request: web.Request) -> web.Response:
            return await self._show(request, login)

        return (
            Endpoint("connections", (PATH,), {"GET": show}, shows_pages=True, limit=Rate.AUTHORIZE),
            Endpoint("end_connections", (f"{PATH}/end",), {"POST": self._end}, shows_pages=True, limit=Rate.CONSENT),
        )

    async def open(self, request: web.Request, content: Content, user: SignedIn) -> web.Response:
        """Continue after a login: the page is open from now on. Raises PageError."""
        cookie = self._cookies.browser(request)
        if cookie is None:
            raise PageError(403, "cookie_missing")
        # Without the scopes, which this page does not need: browsers drop a cookie of over 4 KiB.
        sealed = {"language": content["language"], "user": signed_in_users.content_of(replace(user, scopes=None))}
        ticket = self._tickets.seal(sealed, cookie, purpose=Purpose.USER_PAGE, seconds=USER_PAGE_SECONDS)
        response = web.Response(status=303, headers={"Location": PATH, "Cache-Control": "no-store"})
        self._cookies.keep_user_page(response, ticket)
        return response

    async def _show(self, request: web.Request, login: Login) -> web.Response:
        ticket = self._cookies.user_page(request)
        if ticket is None:
            return await self._begin(request, login)
        try:
            content = self._tickets.open(ticket, self._cookies.browser(request), purpose=Purpose.USER_PAGE)
        except PageError:
            return await self._begin(request, login)
        language = content["language"]
        request[browser_request.LANGUAGE] = language
        user = signed_in_users.signed_in_of(content["user"])
        request[USER] = user.user_id
        if not await self._authorizations.is_login_good(signed_in_users.consenting(user)):
            return await self._begin(request, login)
        rows = await self._authorizations.connections(user.user_id, is_test=user.is_test)
        has_ended = request.query.get("ended") == "1"
        return connections_page(ConnectionsView(ticket, user.user_id, rows, has_ended=has_ended), language)

    async def _begin(self, request: web.Request, login: Login) -> web.Response:
        language = language_of(request, self._settings.language)
        cookie = self._cookies.browser_or_new(request)
        content = {"client_name": None, "resource": self._settings.resource, "language": language, "prompt": ""}
        ticket = self._tickets.seal(content, cookie, purpose=Purpose.LOGIN)
        response = await login.begin(request, ticket, content)
        self._cookies.keep_browser(response, cookie)
        self._cookies.drop_user_page(response)
        return response

    async def _end(self, request: web.Request) -> web.Response:
        form = await browser_request.form_of(request)
        ticket = form.get("ticket", "")
        content = self._tickets.open(ticket, self._cookies.browser(request), purpose=Purpose.USER_PAGE)
        request[browser_request.LANGUAGE] = content["language"]
        user = signed_in_users.signed_in_of(content["user"])
        request[USER] = user.user_id
        if not await self._authorizations.is_login_good(signed_in_users.consenting(user)):
            raise PageError(403, "login_ended")
        what, _, row_id = form.get("end", "").partition(":")
        if what == "session" and row_id:
            ended = await self._authorizations.end_session(user.user_id, row_id, is_test=user.is_test)
        elif what == "grant" and row_id:
            ended = await self._authorizations.end_grants(user.user_id, row_id, is_test=user.is_test)
        elif what == "all":
            ended = await self._authorizations.end_grants(user.user_id, None, is_test=user.is_test)
        else:
            raise PageError(400, "form_invalid", detail="end names no connection")
        self._sessions_ended(ended)
        return web.Response(status=303, headers={"Location": f"{PATH}?ended=1", "Cache-Control": "no-store"})
