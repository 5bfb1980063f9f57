"""All endpoints of the authorization server, and the tasks that run beside them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeAlias

from keyproxy.authorize.context import Context
from keyproxy.authorize.endpoint import Endpoint, ErrorPage
from keyproxy.authorize.error_page import error_page
from keyproxy.authorize.metadata import metadata_endpoints

#: A task that never returns. It is restarted after an unexpected error.
Task: TypeAlias = Callable[[], Awaitable[None]]


class Parts(NamedTuple):
    """What an authorization server consists of. `tasks`: by their name in the log; they run until a reload."""

    endpoints: tuple[Endpoint, ...]
    tasks: dict[str, Task]
    error_page: ErrorPage


def parts_of(context: Context) -> Parts:
    """Build the endpoints and tasks of this context."""
    return Parts(
        endpoints=(*metadata_endpoints(context),),
        tasks={},
        error_page=error_page,
    )
