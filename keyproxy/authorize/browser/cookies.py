"""The cookies that bind tickets to a browser, and the check that a form was sent by a page of this server.

The name of such a cookie depends on its value, so that two tabs that open at once, when there is none yet, do not replace
that of each other. Later tabs share one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Final

from aiohttp import web

from keyproxy.authorize.browser.tickets import USER_PAGE_SECONDS
from keyproxy.authorize.endpoint import PageError

#: A login takes at most two tickets; a page of the user lives longer. Each request for a login renews the cookie.
_COOKIE_SECONDS: Final = 3_600

_VALUE = re.compile(r"[A-Za-z0-9_-]{43}")
_NAME_DIGITS: Final = 8

#: How many cookies of logins are read; more than a few take a browser that opens as many tabs at once.
_LOGINS_MAX: Final = 20

#: `none`: the user has entered the address. A browser that does not send the header sends no cookie of SameSite=Lax
#: with a form of another site.
_OWN_SITES: Final = ("same-origin", "none")
_SHOWN_CHARACTERS: Final = 20


class Cookies:
    """The cookies of this server. Over https, browsers accept their names from this origin only."""

    def __init__(self, issuer: str, new_value: Callable[[], str]) -> None:
        """`issuer`: http is for loopback. `new_value`: 43 random base64url characters."""
        self._is_secure = issuer.startswith("https://")
        prefix = "__Host-" if self._is_secure else ""
        self._login = f"{prefix}keyproxy-login-"
        self._user_page = f"{prefix}keyproxy-user"
        self._new_value = new_value

    def browser(self, request: web.Request) -> str | None:
        """The values that tickets are bound to, joined; None without a cookie. See `Tickets.open`."""
        values = [value for name, value in _sent(request) if _VALUE.fullmatch(value) and name == self._name_of(value)]
        return ".".join(values[:_LOGINS_MAX]) or None

    def browser_or_new(self, request: web.Request) -> str:
        """The value that a new ticket is bound to."""
        return (self.browser(request) or self._new_value()).partition(".")[0]

    def keep_browser(self, response: web.StreamResponse, value: str) -> None:
        """Set the cookie that a ticket is bound to."""
        self._set(response, self._name_of(value), value, _COOKIE_SECONDS)

    def user_page(self, request: web.Request) -> str | None:
        """The ticket of the user page, None without one."""
        return next((value for name, value in _sent(request) if name == self._user_page), None)

    def keep_user_page(self, response: web.StreamResponse, ticket: str) -> None:
        """Set the ticket of the user page."""
        self._set(response, self._user_page, ticket, USER_PAGE_SECONDS)

    def drop_user_page(self, response: web.StreamResponse) -> None:
        """Delete the ticket of the user page."""
        self._set(response, self._user_page, "", 0)

    def _name_of(self, value: str) -> str:
        return self._login + hashlib.sha256(value.encode("ascii")).hexdigest()[:_NAME_DIGITS]

    def _set(self, response: web.StreamResponse, name: str, value: str, seconds: int) -> None:
        response.set_cookie(
            name, value, max_age=seconds, path="/", secure=self._is_secure, httponly=True, samesite="Lax"
        )


def _sent(request: web.Request) -> Iterator[tuple[str, str]]:
    """The cookies of a request by their name, separated as browsers separate them (RFC 6265 section 4.2.1).

    Not `request.cookies`: for that, a space within the value of a cookie begins another one. A site of a sibling domain
    could set such a value, and with it a cookie whose prefix keeps it from setting that by its name.
    """
    for field in request.headers.getall("Cookie", []):
        for pair in field.split(";"):
            name, _, value = pair.strip(" ").partition("=")
            yield name, value


def check_form_origin(request: web.Request) -> None:
    """Check that a page of this server sent the form. Raises PageError 403."""
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None and site not in _OWN_SITES:
        raise PageError(403, "form_foreign", detail=f"Sec-Fetch-Site is {site[:_SHOWN_CHARACTERS]!r}")
