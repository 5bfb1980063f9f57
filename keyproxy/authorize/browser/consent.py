"""The decision of a user about a client: the page, and `POST /oauth/consent`.

Between the page and the decision anything may have changed, so the decision judges client, user, tenant and login again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Final

from aiohttp import web

from keyproxy.auth.base62 import base62
from keyproxy.authorize.browser import browser_request, signed_in_users
from keyproxy.authorize.browser.authorization_request import AuthorizationRequest, response_location
from keyproxy.authorize.browser.cookies import Cookies
from keyproxy.authorize.browser.judged_clients import JudgedClients
from keyproxy.authorize.browser.pages.consent_page import ConsentForm, consent_page
from keyproxy.authorize.browser.tickets import Content, Purpose, Tickets
from keyproxy.authorize.endpoint import CLIENT, OUTCOME, USER, Endpoint, PageError, SignedIn
from keyproxy.authorize.rate_limits import Rate
from keyproxy.oauth import pkce
from keyproxy.oauth.client import Client
from keyproxy.store.oauth.authorizations import Authorizations, ConsentRefused, NewCode

_CODE_BYTES: Final = 32
_CODE_DIGITS: Final = 43

_ALLOW: Final = "allow"
_DENY: Final = "deny"

#: The statuses of refused consents.
_STATUSES: Final = {"client_unknown": 400}


class ConsentEndpoint:
    """Shows the page for a decision, and carries the decision out."""

    def __init__(
        self,
        issuer: str,
        clients: JudgedClients,
        authorizations: Authorizations,
        *,
        tickets: Tickets,
        cookies: Cookies,
        entropy: Callable[[int], bytes],
        client_stored: Callable[[str], None],
    ) -> None:
        """`entropy`: returns this number of random bytes. `client_stored`: called with the kind of a new client."""
        self._issuer = issuer
        self._clients = clients
        self._authorizations = authorizations
        self._tickets = tickets
        self._cookies = cookies
        self._entropy = entropy
        self._client_stored = client_stored

    def endpoint(self) -> Endpoint:
        """The endpoint as a value."""
        handlers = {"POST": self._decide}
        return Endpoint("consent", ("/oauth/consent",), handlers, shows_pages=True, limit=Rate.CONSENT)

    async def page(self, request: web.Request, content: Content, user: SignedIn) -> web.Response:
        """The page for the decision of a user who has signed in. Raises PageError if the login cannot grant this."""
        wanted = AuthorizationRequest.of(content)
        client = await self._judged(request, wanted, user)
        if user.is_test is not None and user.is_test is not wanted.is_test:
            raise PageError(403, "test_key_needed" if wanted.is_test else "live_key_needed")
        scopes = wanted.scopes
        if user.scopes is not None:
            scopes = tuple(scope for scope in scopes if scope in user.scopes)
            if wanted.scopes and not scopes:
                raise PageError(403, "scopes_missing")
        cookie = self._cookies.browser(request)
        if cookie is None:
            raise PageError(403, "cookie_missing")
        offered = {**content, "scopes": list(scopes), "user": signed_in_users.content_of(user)}
        ticket = self._tickets.seal(offered, cookie, purpose=Purpose.CONSENT)
        return consent_page(ConsentForm(ticket, client, user.user_id, scopes, wanted), content["language"])

    async def _decide(self, request: web.Request) -> web.Response:
        form = await browser_request.form_of(request)
        content = self._tickets.open(form.get("ticket", ""), self._cookies.browser(request), purpose=Purpose.CONSENT)
        request[browser_request.LANGUAGE] = content["language"]
        wanted, user = AuthorizationRequest.of(content), signed_in_users.signed_in_of(content["user"])
        client = await self._judged(request, wanted, user)
        decision = form.get("decision")
        if decision == _DENY:
            request[OUTCOME] = "access_denied"
            denied = {"error": "access_denied", "error_description": "the user has denied the request"}
            return self._response(wanted, denied)
        if decision != _ALLOW:
            raise PageError(400, "form_invalid", detail="decision is neither allow nor deny")
        return self._response(wanted, {"code": await self._code(client, user, wanted)})

    async def _judged(self, request: web.Request, wanted: AuthorizationRequest, user: SignedIn) -> Client:
        request[USER] = user.user_id
        client = await self._clients.judge(request, wanted.client_id, wanted.redirect_uri)
        request[CLIENT] = client.row_id
        return client

    async def _code(self, client: Client, user: SignedIn, wanted: AuthorizationRequest) -> str:
        code = base62(int.from_bytes(self._entropy(_CODE_BYTES), "big"), _CODE_DIGITS).decode("ascii")
        challenge = pkce.challenge_of(wanted.challenge)
        if challenge is None:
            raise PageError(400, "ticket_invalid", detail="the ticket has no challenge")
        new = NewCode(
            hashlib.sha256(code.encode("ascii")).digest(),
            wanted.redirect_uri,
            challenge,
            resource=wanted.resource,
            is_test=wanted.is_test,
            scopes=wanted.scopes,
        )
        try:
            consented = await self._authorizations.consent(client, signed_in_users.consenting(user), new)
        except ConsentRefused as refused:
            raise PageError(_STATUSES.get(refused.why, 403), refused.why) from refused
        if consented.is_new_client:
            self._client_stored(client.kind.value)
        return code

    def _response(self, wanted: AuthorizationRequest, values: Mapping[str, str]) -> web.Response:
        location = response_location(wanted.redirect_uri, wanted.state, self._issuer, values)
        # 303: the browser follows with GET, so the form does not reach the client.
        return web.Response(
            status=303,
            headers={"Location": location, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"},
        )
