"""The middleware: `request.keyproxy` is the verified identity of a request, or None.

Put it first: a middleware before it sees headers that are not verified. It refuses malformed headers of a trusted peer,
and requests whose assertion it cannot verify now; it serves anonymous requests, which guards refuse.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import FileResponse, HttpRequest
from django.http.response import HttpResponseBase

from keyproxy_client.acting import request_identity
from keyproxy_client.django.incoming import request_user
from keyproxy_client.django.incoming.request_identity import judge, resolve, resolve_async, response_of
from keyproxy_client.incoming.judge import Outcome

_GetResponse = Callable[[HttpRequest], HttpResponseBase] | Callable[[HttpRequest], Awaitable[HttpResponseBase]]


class KeyproxyMiddleware:
    """`MIDDLEWARE = ["keyproxy_client.django.middleware.KeyproxyMiddleware", ...]`, for WSGI and ASGI."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: _GetResponse) -> None:
        """Raises ImproperlyConfigured without a trust rule."""
        judge()
        self.get_response: Any = get_response
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        """Serve a request with its identity."""
        if self._is_async:
            return self._serve_async(request)
        outcome = resolve(request)
        if outcome.is_rejected and outcome.problem is not None:
            return response_of(outcome.problem)
        context = _context(request, outcome)
        with context:
            response = self.get_response(request)
        return _streaming(response, context)

    async def _serve_async(self, request: HttpRequest) -> HttpResponseBase:
        outcome = await resolve_async(request)
        if outcome.is_rejected and outcome.problem is not None:
            return response_of(outcome.problem)
        context = _context(request, outcome)
        with context:
            response = await self.get_response(request)
        return _streaming(response, context)

    def __repr__(self) -> str:
        return f"KeyproxyMiddleware({self.get_response!r})"


def _context(request: HttpRequest, outcome: Outcome) -> request_identity:
    if outcome.identity is not None:
        return request_identity(outcome.identity)
    return request_identity(
        None,
        lookup=partial(request_user.look_up, request),
        lookup_async=partial(request_user.look_up_async, request),
    )


def _streaming(response: Any, context: request_identity) -> HttpResponseBase:
    """The content of a streaming response is made after the middleware returned: give each step the context again.

    A file is read by the server, often without Python.
    """
    if getattr(response, "streaming", False) and not isinstance(response, FileResponse):
        content = response.streaming_content
        response.streaming_content = _steps_async(content, context) if response.is_async else _steps(content, context)
    return response  # type: ignore[no-any-return]


def _steps(content: Iterator[bytes], context: request_identity) -> Iterator[bytes]:
    while True:
        with context:
            try:
                chunk = next(content)
            except StopIteration:
                return
        yield chunk


async def _steps_async(content: AsyncIterator[bytes], context: request_identity) -> AsyncIterator[bytes]:
    while True:
        with context:
            try:
                chunk = await anext(content)
            except StopAsyncIteration:
                return
        yield chunk
