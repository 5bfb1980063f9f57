"""Clients as the browser flow judges them: what refuses one becomes a page, never a redirect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from aiohttp import web

from keyproxy.authorize.browser.authorization_request import has_response_parameters
from keyproxy.authorize.endpoint import PageError
from keyproxy.oauth.client import Client
from keyproxy.oauth.client_refusals import (
    ClientDisabled,
    DocumentRefused,
    RedirectRefused,
    TooManyDocuments,
    UnknownClient,
)


class ClientJudge(Protocol):
    """The directory of clients."""

    async def judge(self, client_id: str, redirect_uri: str | None, *, before_fetch: Callable[[], None]) -> Client:
        """The client with this id and redirect URI. `before_fetch`: called before a document is fetched; may raise.

        Raises ClientRefused, StoreUnavailable.
        """
        ...


class JudgedClients:
    """Judges clients for pages."""

    def __init__(self, directory: ClientJudge, fetches: Callable[[web.Request], int]) -> None:
        """`fetches`: counts a fetch for a request, and returns the seconds that its client must wait, 0 for none."""
        self._directory = directory
        self._fetches = fetches

    async def judge(self, request: web.Request, client_id: str, redirect_uri: str | None) -> Client:
        """The client, whose redirect URI is good.

        Raises PageError: 403 if it is disabled, 429 if too many documents are fetched, else 400; StoreUnavailable.
        """
        if redirect_uri is not None and has_response_parameters(redirect_uri):
            raise PageError(400, "redirect_uri_unknown", detail="the redirect URI has a parameter of responses")

        def count() -> None:
            wait_seconds = self._fetches(request)
            if wait_seconds:
                raise PageError(429, "too_many_requests", values={"seconds": str(wait_seconds)})

        try:
            return await self._directory.judge(client_id, redirect_uri, before_fetch=count)
        except ClientDisabled as refused:
            raise PageError(403, "client_disabled", detail=refused.detail) from refused
        except RedirectRefused as refused:
            message = "redirect_uri_missing" if redirect_uri is None else "redirect_uri_unknown"
            raise PageError(400, message, detail=refused.detail) from refused
        except TooManyDocuments as refused:
            values = {"seconds": str(refused.retry_seconds)}
            raise PageError(429, "too_many_requests", values=values, detail=refused.detail) from refused
        except DocumentRefused as refused:
            raise PageError(400, "document_refused", detail=refused.detail) from refused
        except UnknownClient as refused:
            raise PageError(400, "client_unknown", detail=refused.detail) from refused
