"""All endpoints of the authorization server, and the tasks that run beside them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from aiohttp import web

from keyproxy.authorize.browser.pages.error_page import error_page
from keyproxy.authorize.browser.pages.languages import language_of
from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoint import Endpoint, ErrorPage, PageError
from keyproxy.authorize.metadata import metadata_endpoints

#: A task that never returns. It is restarted after an unexpected error.
Task: TypeAlias = Callable[[], Awaitable[None]]


class Parts(NamedTuple):
    """What an authorization server consists of. `tasks`: by their name in the log; they run until a reload.

    `closing`: closes connections, when the last request has ended.
    """

    endpoints: tuple[Endpoint, ...]
    error_page: ErrorPage
    tasks: Mapping[str, Task]
    closing: Sequence[Callable[[], Awaitable[None]]]


def parts_of(context: Context) -> Parts:
    """Build the endpoints and tasks of this context."""
    return Parts((*metadata_endpoints(context),), _error_page(context), tasks={}, closing=())


def _error_page(context: Context) -> ErrorPage:
    fallback = context.settings.oauth.language

    def page(request: web.Request, error: PageError) -> web.Response:
        return error_page(error, language_of(request, fallback))

    return page
