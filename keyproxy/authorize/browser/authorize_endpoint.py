"""`GET /oauth/authorize`: judges the request of a client, and begins the login.

Until client and redirect URI are judged, an error is a page: a redirect would lead wherever the link points. Later errors
go to the client, with its state.
"""

from __future__ import annotations

from aiohttp import web

from keyproxy.authorize.browser import authorization_request, browser_request
from keyproxy.authorize.browser.cookies import Cookies
from keyproxy.authorize.browser.judged_clients import JudgedClients
from keyproxy.authorize.browser.login import Login
from keyproxy.authorize.browser.pages.languages import language_of
from keyproxy.authorize.browser.tickets import Purpose, Tickets
from keyproxy.authorize.endpoint import CLIENT, OUTCOME, Endpoint, PageError
from keyproxy.authorize.rate_limits import Rate
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.oauth.oauth_error import OAuthError


class AuthorizeEndpoint:
    """The endpoint: see the module."""

    def __init__(
        self, settings: OAuthSettings, clients: JudgedClients, login: Login, *, tickets: Tickets, cookies: Cookies
    ) -> None:
        self._settings = settings
        self._clients = clients
        self._login = login
        self._tickets = tickets
        self._cookies = cookies

    def endpoint(self) -> Endpoint:
        """The endpoint as a value."""
        paths = ("/oauth/authorize", "/authorize")
        return Endpoint("authorize", paths, {"GET": self._authorize}, shows_pages=True, limit=Rate.AUTHORIZE)

    async def _authorize(self, request: web.Request) -> web.Response:
        language = language_of(request, self._settings.language)
        request[browser_request.LANGUAGE] = language
        parameters = browser_request.query_of(request)
        client_id, redirect_uri = parameters.get("client_id"), parameters.get("redirect_uri")
        if client_id is None:
            raise PageError(400, "client_missing")
        client = await self._clients.judge(request, client_id, redirect_uri)
        request[CLIENT] = client.row_id
        if redirect_uri is None:
            raise PageError(400, "redirect_uri_missing")
        try:
            wanted = authorization_request.judge(parameters, client_id, redirect_uri, self._settings)
        except OAuthError as error:
            request[OUTCOME] = error.code
            values = {"error": error.code, "error_description": error.description}
            location = authorization_request.response_location(
                redirect_uri, parameters.get("state"), self._settings.issuer, values
            )
            return web.Response(status=302, headers={"Location": location, "Referrer-Policy": "no-referrer"})
        cookie = self._cookies.browser_or_new(request)
        content = wanted.content(language, client.name)
        ticket = self._tickets.seal(content, cookie, purpose=Purpose.LOGIN)
        response = await self._login.begin(request, ticket, content)
        self._cookies.keep_browser(response, cookie)
        return response
