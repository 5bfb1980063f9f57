"""How a user signs in before consent: the interface of the two kinds of login."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from aiohttp import web

from keyproxy.authorize.browser.tickets import Content
from keyproxy.authorize.endpoint import Endpoint, SignedIn

#: Continues after a login with the content of its ticket: it returns the page for consent, or the page of the user.
Proceed: TypeAlias = Callable[[web.Request, Content, SignedIn], Awaitable[web.Response]]


class Login(ABC):
    """Signs users in. A login that succeeds continues with a `Proceed`."""

    @abstractmethod
    async def begin(self, request: web.Request, ticket: str, content: Content) -> web.Response:
        """Begin the login of this ticket, of the purpose LOGIN: a form, or a redirect to the identity provider.

        The caller sets the cookie that the ticket is bound to on the response. `content`: that of the ticket;
        `language` is that of the pages, `prompt` is `login` if the user wants to use another account, else empty.
        """

    @abstractmethod
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The endpoints that finish a login."""
