"""A guard for plain views of Django: `@needs("jobs:write")`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from asgiref.sync import iscoroutinefunction

from keyproxy_client.django.incoming.request_identity import resolve, resolve_async, response_of
from keyproxy_client.incoming.judge import Outcome
from keyproxy_client.incoming.problems import IDENTITY_MISSING, Problem, insufficient_scope, missing_scopes
from keyproxy_client.names import is_scope


def refusal(outcome: Outcome, scopes: tuple[str, ...]) -> Problem | None:
    """Why a request with this outcome is refused where an identity with these scopes is required; None if it is not."""
    if outcome.identity is None:
        return outcome.problem or IDENTITY_MISSING
    missing = missing_scopes(outcome.identity, scopes)
    return insufficient_scope(missing) if missing else None


def valid_scopes(scopes: tuple[str, ...]) -> tuple[str, ...]:
    """These scopes. Raises ValueError for a scope that no key can have."""
    for scope in scopes:
        if not isinstance(scope, str) or not is_scope(scope):
            raise ValueError(f"{scope!r} is not a valid scope")
    return scopes


def needs(*scopes: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Refuse requests without a verified identity, or whose identity lacks one of these scopes.

    For views that are functions or coroutines; for those that are classes, by `method_decorator(needs(...), "dispatch")`.
    """
    required = valid_scopes(scopes)

    def decorate(view: Callable[..., Any]) -> Callable[..., Any]:
        if iscoroutinefunction(view):

            @functools.wraps(view)
            async def guarded_async(request: Any, *arguments: Any, **named: Any) -> Any:
                problem = refusal(await resolve_async(request), required)
                return await view(request, *arguments, **named) if problem is None else response_of(problem)

            return guarded_async

        @functools.wraps(view)
        def guarded(request: Any, *arguments: Any, **named: Any) -> Any:
            problem = refusal(resolve(request), required)
            return view(request, *arguments, **named) if problem is None else response_of(problem)

        return guarded

    return decorate
