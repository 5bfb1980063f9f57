"""Login at an OpenID provider: the redirect there, and the callback.

Nothing is stored for a login. Its state is the ticket, which is bound to the browser, and encrypted, since it passes
through the provider; nonce and code verifier are derived from the ticket by the server alone.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlencode

from aiohttp import web

from keyproxy.authorize import form, responses
from keyproxy.authorize.browser import browser_request
from keyproxy.authorize.browser.cookies import Cookies
from keyproxy.authorize.browser.login import Login, Proceed
from keyproxy.authorize.browser.tickets import Content, Purpose, Tickets
from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoint import ADDRESS, USER, Endpoint, PageError, SignedIn
from keyproxy.authorize.oidc.provider import IdentityProvider, LoginFault, error_code
from keyproxy.authorize.oidc.provider_metadata import ProviderUnavailable
from keyproxy.authorize.oidc.subject import ClaimsFault, Subject
from keyproxy.authorize.rate_limits import Rate
from keyproxy.oauth.discovery.server_metadata import origin
from keyproxy.signing.state_sealing import StateSealer
from keyproxy.store.oauth.subjects import LinkedUser, Subjects

CALLBACK_PATH: Final = "/oauth/callback"

#: Names of the values that are derived from a ticket.
_NONCE: Final = "oidc nonce"
_VERIFIER: Final = "oidc code verifier"

#: With a code, it fits the line of a request to the callback.
_STATE_CHARACTERS_MAX: Final = 12_000

_RETRY_AFTER: Final = {"seconds": "30"}


class OidcLogin(Login):
    """Signs users in at an OpenID provider: see the module."""

    def __init__(self, context: Context, tickets: Tickets, cookies: Cookies, proceed: Proceed) -> None:
        """Raises TlsError."""
        self._login = context.settings.oauth_login
        self._redirect_uri = origin(context.settings.oauth.issuer) + CALLBACK_PATH
        self._provider = IdentityProvider(self._login, context.login_secret, self._redirect_uri, now=context.now)
        self._subjects = Subjects(context.database)
        self._tickets = tickets
        self._states = StateSealer(context.ticket_secrets, context.entropy)
        self._cookies = cookies
        self._proceed = proceed
        self._context = context

    async def run(self) -> None:
        """Refresh what is known of the provider, until cancelled."""
        await self._provider.run()

    async def begin(self, request: web.Request, ticket: str, content: Content) -> web.Response:
        try:
            metadata = await self._provider.metadata()
        except ProviderUnavailable as error:
            raise _unavailable(error) from error
        state = self._states.seal(ticket)
        if len(state) > _STATE_CHARACTERS_MAX:
            raise PageError(400, "request_malformed", detail="the request is too long to pass through the provider")
        parameters = {
            "response_type": "code",
            "client_id": self._login.client_id,
            "redirect_uri": self._redirect_uri,
            "scope": " ".join(self._login.scopes),
            "state": state,
            "nonce": self._tickets.derived(ticket, _NONCE),
            "code_challenge": _s256(self._tickets.derived(ticket, _VERIFIER)),
            "code_challenge_method": "S256",
            "ui_locales": content["language"],
        }
        if content["prompt"]:
            parameters["prompt"] = metadata.account_prompt
        # The endpoint may have a query of its own, RFC 6749 section 3.1.
        joint = "&" if "?" in metadata.authorization_endpoint else "?"
        location = f"{metadata.authorization_endpoint}{joint}{urlencode(parameters)}"
        return web.Response(
            status=302, headers={"Location": location, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        )

    def endpoints(self) -> tuple[Endpoint, ...]:
        return (Endpoint("callback", (CALLBACK_PATH,), {"GET": self._callback}, shows_pages=True),)

    async def _callback(self, request: web.Request) -> web.StreamResponse:
        parameters = form.query_of(request)
        ticket = self._states.open(parameters.get("state", ""))
        if ticket is None:
            raise PageError(400, "ticket_invalid", detail="the state is altered, or its secret has been replaced")
        content = self._tickets.open(ticket, self._cookies.browser(request), purpose=Purpose.LOGIN)
        request[browser_request.LANGUAGE] = content["language"]
        if "error" in parameters:
            raise PageError(403, "login_refused", detail=f"the provider: {error_code(parameters['error'])}")
        if not parameters.get("code"):
            raise PageError(400, "login_failed", detail="the response of the provider has no code")
        subject = await self._subject(request, ticket, parameters)
        user = await self._user(subject)
        if user.is_disabled:
            raise PageError(403, "account_disabled", detail=f"user {user.user_id} or its tenant is disabled")
        request[USER] = user.user_id
        signed_in = SignedIn(user.user_id, user.tenant_id, via_issuer=subject.issuer, via_subject=subject.subject)
        return await self._proceed(request, content, signed_in)

    async def _subject(self, request: web.Request, ticket: str, parameters: Mapping[str, str]) -> Subject:
        """Return the subject. Raises PageError: 503 without a response of the provider, else 403; OAuthError 429."""
        began_mono = self._context.now().mono_seconds
        try:
            claims = await self._provider.claims(
                parameters["code"],
                parameters.get("iss"),
                verifier=self._tickets.derived(ticket, _VERIFIER),
                nonce=self._tickets.derived(ticket, _NONCE),
            )
            return Subject.of(claims, self._login)
        except ProviderUnavailable as error:
            raise _unavailable(error) from error
        except (LoginFault, ClaimsFault) as fault:
            wait_seconds = self._context.rate_limits.count(Rate.FAILED_LOGINS, request[ADDRESS])
            if wait_seconds:
                raise responses.too_many_requests(wait_seconds) from fault
            raise PageError(403, "login_failed", detail=str(fault)) from fault
        finally:
            self._context.counts.login_seconds.observe(self._context.now().mono_seconds - began_mono)

    async def _user(self, subject: Subject) -> LinkedUser:
        """The user of a subject, created if the configuration allows it. Raises PageError 403, StoreUnavailable."""
        user = await self._subjects.find(subject.issuer, subject.subject)
        if user is None and not subject.may_be_created:
            values = {"issuer": subject.issuer, "subject": subject.subject}
            raise PageError(403, "subject_unlinked", values=values)
        if user is None and subject.tenant_id is not None:
            user = await self._subjects.create(
                subject.issuer, subject.subject, user_id=subject.created_user_id, tenant_id=subject.tenant_id
            )
        # A user that was created here loses access with its organisation; one that an operator has linked does not.
        is_created = user is not None and subject.may_be_created and user.user_id == subject.created_user_id
        if user is None or (is_created and user.tenant_id != subject.tenant_id):
            raise PageError(403, "tenant_unknown", detail="the tenant of the login is not mapped, or does not exist")
        return user


def _unavailable(error: ProviderUnavailable) -> PageError:
    return PageError(503, "login_unavailable", values=_RETRY_AFTER, detail=str(error))


def _s256(verifier: str) -> str:
    digest = hashlib.sha256(verifier.encode("ascii")).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")
