"""The endpoints of the authorization server as values, and what a request notes for the log and the metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from aiohttp import web

from keyproxy.authorize.rate_limits import Rate

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: Set by the listener. `ADDRESS`: of the client, behind trusted proxies; empty for a unix socket.
REQUEST_ID: Final = web.RequestKey("request_id", str)
ADDRESS: Final = web.RequestKey("address", str)
#: The DER bytes of the client's verified certificate; absent without one.
PEER_CERTIFICATE: Final = web.RequestKey("peer_certificate", bytes)

#: Noted by handlers. The row id of the client, `cli_…`.
CLIENT: Final = web.RequestKey("client", str)
USER: Final = web.RequestKey("user", str)
GRANT_TYPE: Final = web.RequestKey("grant_type", str)
#: The id of an admin token.
TOKEN: Final = web.RequestKey("token", str)
#: The label of `keyproxy_oauth_requests_total`, if it is not the error code or `ok`.
OUTCOME: Final = web.RequestKey("outcome", str)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint. `name`: its label in the metrics and the log. `paths`: its path, and aliases.

    `shows_pages`: its errors are pages for a person, else JSON. `is_cross_origin`: scripts of any origin may call it.
    `is_on_mtls`: the listener for clients with certificates serves it too. `limit`: bounds its requests per address.
    `failures`: bounds those of its requests that end with an OAuthError of the status 400 or 401.
    """

    name: str
    paths: tuple[str, ...]
    handlers: Mapping[str, Handler]  # by method
    shows_pages: bool = False
    is_cross_origin: bool = False
    is_on_mtls: bool = False
    limit: Rate | None = None
    failures: Rate | None = None


class PageError(Exception):
    """A request of a browser that ends with a page. `message`: the name of its text, which has translations.

    `values`: for the text; `seconds` is Retry-After too. `detail`: for the operator's log.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        values: Mapping[str, str] | None = None,
        detail: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.values = values or {}
        self.detail = detail


#: Makes the page of an error.
ErrorPage: TypeAlias = Callable[[web.Request, PageError], web.Response]


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A user who has signed in, by an API key or at the identity provider.

    `scopes`: what the login may grant, None: no bound of its own. `is_test`: the mode that it may grant, None: both.
    `via_key`: the id of the key; `via_issuer`, `via_subject`: the subject at the identity provider; None: not by this.
    """

    user_id: str
    tenant_id: str
    scopes: frozenset[str] | None = None
    is_test: bool | None = None
    via_key: str | None = None
    via_issuer: str | None = None
    via_subject: str | None = field(default=None, repr=False)
