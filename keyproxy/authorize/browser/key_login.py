"""The login with an API key: the form, and `POST /oauth/login`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from aiohttp import web

from keyproxy.auth.api_key import KeyFormat, SecretKey
from keyproxy.authorize.browser import browser_request
from keyproxy.authorize.browser.cookies import Cookies
from keyproxy.authorize.browser.login import Login, Proceed
from keyproxy.authorize.browser.pages.error_texts import ERRORS
from keyproxy.authorize.browser.pages.login_page import LoginForm, login_page
from keyproxy.authorize.browser.pages.page_texts import text
from keyproxy.authorize.browser.tickets import Content, Purpose, Tickets
from keyproxy.authorize.endpoint import OUTCOME, USER, Endpoint, PageError, SignedIn
from keyproxy.config.oauth.oauth_settings import OAuthSettings
from keyproxy.model import Moment
from keyproxy.store.oauth.authorizations import Authorizations

_ACTIVE: Final = "active"

#: What another key of the user may be able to grant.
_OTHER_KEY_NEEDED: Final = ("live_key_needed", "test_key_needed", "scopes_missing")

#: The texts of keys that do not work, by their state.
_PROBLEMS: Final = {"expired": "key_expired", "revoked": "key_revoked", "suspended": "key_suspended"}


class KeyLogin(Login):
    """Signs users in by an API key of theirs. What the login may grant is bounded by the key."""

    def __init__(
        self,
        settings: OAuthSettings,
        authorizations: Authorizations,
        key_format: KeyFormat,
        proceed: Proceed,
        *,
        tickets: Tickets,
        cookies: Cookies,
        now: Callable[[], Moment],
        login_failed: Callable[[web.Request], int],
        observe_seconds: Callable[[float], None],
    ) -> None:
        """`login_failed`: counts a failure, and returns the seconds that the client must wait, 0 for none."""
        self._settings = settings
        self._authorizations = authorizations
        self._format = key_format
        self._proceed = proceed
        self._tickets = tickets
        self._cookies = cookies
        self._now = now
        self._login_failed = login_failed
        self._observe_seconds = observe_seconds

    async def begin(self, request: web.Request, ticket: str, content: Content) -> web.Response:
        return login_page(self._form(ticket, content), content["language"])

    def endpoints(self) -> tuple[Endpoint, ...]:
        return (Endpoint("login", ("/oauth/login",), {"POST": self._sign_in}, shows_pages=True),)

    async def _sign_in(self, request: web.Request) -> web.Response:
        form = await browser_request.form_of(request)
        ticket = form.get("ticket", "")
        content = self._tickets.open(ticket, self._cookies.browser(request), purpose=Purpose.LOGIN)
        language = content["language"]
        request[browser_request.LANGUAGE] = language
        key = form.get("key", "").strip()
        began_mono = self._now().mono_seconds
        user = await self._user(key)
        self._observe_seconds(self._now().mono_seconds - began_mono)
        if isinstance(user, SignedIn):
            request[USER] = user.user_id
            return await self._continued(request, ticket, content, user)
        # A good key is accepted regardless of earlier failures.
        wait_seconds = self._login_failed(request)
        if wait_seconds:
            raise PageError(429, "too_many_requests", values={"seconds": str(wait_seconds)})
        request[OUTCOME] = "login_failed"
        return self._again(ticket, content, text(user, language))

    async def _continued(self, request: web.Request, ticket: str, content: Content, user: SignedIn) -> web.Response:
        """What follows the login; the form again, for another key, if this one cannot grant what is requested."""
        try:
            return await self._proceed(request, content, user)
        except PageError as error:
            if error.message not in _OTHER_KEY_NEEDED:
                raise
            request[OUTCOME] = error.message
            return self._again(ticket, content, ERRORS[error.message][content["language"]])

    def _again(self, ticket: str, content: Content, problem: str) -> web.Response:
        form = self._form(ticket, content)._replace(problem=problem)
        return login_page(form, content["language"], status=403)

    async def _user(self, key: str) -> SignedIn | str:
        """The owner of the key, or the name of the text that reports why it does not work."""
        plaintext = key.encode("utf-8")
        if not self._format.may_exist(plaintext):
            return "key_unknown"
        row = await self._authorizations.key(SecretKey(plaintext).digest())
        if row is None:
            return "key_unknown"
        if row["state"] != _ACTIVE:
            return _PROBLEMS.get(row["state"], "key_account_disabled")
        return SignedIn(
            row["user_id"],
            row["tenant_id"],
            scopes=frozenset(row["scopes"]),
            is_test=row["is_test"],
            via_key=row["key_id"],
        )

    def _form(self, ticket: str, content: Content) -> LoginForm:
        client, redirect_uri = content["client_name"], content.get("redirect_uri", "")
        return LoginForm(ticket, self._settings.issuer, content["resource"], client, redirect_uri)
