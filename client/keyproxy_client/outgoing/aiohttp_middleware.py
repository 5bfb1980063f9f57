"""Authenticated requests of aiohttp's client sessions.

aiohttp calls middlewares for each hop of a redirect, without a mark that it is one. The middleware therefore remembers,
for each task, the target of the last redirect that it saw: a request to it, on another origin, is sent without a
credential, and so is one that such a hop redirects back. Any other request to another origin raises WrongOrigin.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse
from yarl import URL

from keyproxy_client.acting import Acting
from keyproxy_client.outgoing.authorizer import AUTHORIZATION, Authorizer, Credential
from keyproxy_client.outgoing.repetition import Repetitions, is_refusal


class _Redirect:
    """The target of a redirect that aiohttp may follow in the same task."""

    __slots__ = ("_targets", "leads_from_elsewhere")

    def __init__(self, response: ClientResponse, location: str, *, leads_from_elsewhere: bool) -> None:
        # aiohttp quotes the target again or not, as the session is configured.
        self._targets = [_without_user(response.url, URL(location, encoded=encoded)) for encoded in (False, True)]
        self.leads_from_elsewhere = leads_from_elsewhere

    def leads_to(self, url: URL) -> bool:
        """Whether a request to this URL follows the redirect."""
        return url in self._targets


class Middleware:
    """A client middleware that authenticates the requests of a session to one origin."""

    def __init__(self, authorizer: Authorizer) -> None:
        self._authorizer = authorizer
        self._redirects: weakref.WeakKeyDictionary[asyncio.Task[Any], _Redirect] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"keyproxy_middleware({str(self._authorizer.origin)!r})"

    async def __call__(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        """Send a request, and its repetitions."""
        task = asyncio.current_task()
        redirect = None if task is None else self._redirects.pop(task, None)
        is_hop = redirect is not None and redirect.leads_to(request.url)
        url = request.url
        is_elsewhere = not self._authorizer.origin.is_of(url.scheme, url.raw_host or "", url.port)
        if is_elsewhere and not is_hop:
            self._authorizer.origin.check(url.scheme, url.raw_host or "", url.port)
        is_bare = is_elsewhere or (is_hop and redirect is not None and redirect.leads_from_elsewhere)
        if is_bare:
            _remove(self._authorizer, request)
            response = await handler(request)
        else:
            response = await _send(self._authorizer, request, handler)
        location = response.headers.get("Location") if 300 <= response.status < 400 else None
        if location is not None and task is not None:
            redirect = _redirect(response, location, leads_from_elsewhere=is_bare)
            if redirect is not None:
                self._redirects[task] = redirect
        return response


async def _send(authorizer: Authorizer, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
    user = await authorizer.acting_async()
    credential = await authorizer.credential_async(user)
    repetitions = authorizer.repetitions()
    while True:
        _remove(authorizer, request)
        _add(authorizer, request, credential)
        try:
            response = await handler(request)
        finally:
            # aiohttp's exceptions and responses show the headers of their request.
            _remove(authorizer, request)
        renewed = None
        if _is_replayable(request):
            renewed = await _next_credential(authorizer, repetitions, response, (credential, user))
        if renewed is None:
            return response
        credential = renewed
        response.release()
        # A body that is still being sent must not be read twice at the same time.
        await request.close()


async def _next_credential(
    authorizer: Authorizer, repetitions: Repetitions, response: ClientResponse, sent: tuple[Credential, Acting | None]
) -> Credential | None:
    """The credential of the repetition, after the wait that it needs; None if there is to be no repetition."""
    credential, user = sent
    status, headers = response.status, response.headers

    def header_of(name: str) -> str | None:
        # Unlike httpx and requests, aiohttp's `get` returns the first field only: one of two challenges.
        return ", ".join(headers.getall(name, ())) or None

    if repetitions.may_renew(status, header_of):
        return await authorizer.renewed_async(credential, user)
    wait = repetitions.wait_seconds(status, header_of)
    if wait is None or not is_refusal(await response.read()):
        return None
    await asyncio.sleep(wait)
    return credential


def _add(authorizer: Authorizer, request: ClientRequest, credential: Credential) -> None:
    request.headers[AUTHORIZATION] = credential.authorization
    if credential.act_for is not None:
        request.headers[authorizer.act_for_header] = credential.act_for


def _remove(authorizer: Authorizer, request: ClientRequest) -> None:
    for name in {name for name in request.headers if authorizer.is_replaced(name)}:
        request.headers.popall(name, None)


def _is_replayable(request: ClientRequest) -> bool:
    """Whether the body can be sent again. A payload of an aiohttp that does not know counts as one that cannot."""
    body = request.body
    return body == b"" or not getattr(body, "consumed", True)


def _redirect(response: ClientResponse, location: str, *, leads_from_elsewhere: bool) -> _Redirect | None:
    try:
        return _Redirect(response, location, leads_from_elsewhere=leads_from_elsewhere)
    except ValueError:  # not a URL; aiohttp refuses to follow it
        return None


def _without_user(base: URL, location: URL) -> URL:
    """The URL that aiohttp requests: a user in it becomes an Authorization header of that request."""
    joined = base.join(location).with_fragment(None)
    return joined.with_user(None) if joined.raw_user is not None or joined.raw_password is not None else joined
