"""Review the route table: rows that never match, and keys that no row accepts.

Neither is an error, but both are nearly always mistakes, which show only when a request is admitted or refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from keyproxy.ai.reservation import OFF
from keyproxy.config.schema import RouteRow, Settings
from keyproxy.http.path_patterns import parse_pattern


def shadowed(routes: Sequence[RouteRow]) -> list[str]:
    """Return one sentence for each route that an earlier one shadows completely."""
    found = []
    patterns = [parse_pattern(row.match) for row in routes]
    for number, row in enumerate(routes, start=1):
        for earlier_number, earlier in enumerate(routes[: number - 1], start=1):
            if patterns[earlier_number - 1].covers(patterns[number - 1]):
                found.append(
                    f"routes[{number}]: {row.match!r} never matches, because routes[{earlier_number}] {earlier.match!r}"
                    " precedes it and matches the same requests; move the narrower one up"
                )
                break
    return found


def scope_warnings(settings: Settings, scopes: Collection[str], holder: str = "key") -> list[str]:
    """Warnings about scopes: a misspelled one, or a key that every route refuses. `holder`: `client` for a service."""
    routes = settings.routes
    if not routes:
        return []
    required = {scope for row in routes for scope in row.scopes}
    required.update(*[model.scopes for model in settings.models], *[tool.scopes for tool in settings.tools])
    required.update(*[category.scopes for category in settings.categories])
    unknown = [f"no route requires the scope {scope!r}" for scope in scopes if scope not in required]
    if unknown or any(set(row.scopes) <= set(scopes) for row in routes):
        return unknown
    if not scopes:
        return [f"the {holder} has no scopes and every route requires one: all its requests will be refused"]
    return [f"no route accepts a {holder} with only these scopes: all its requests will be refused"]


def cap_warnings(routes: Sequence[RouteRow]) -> list[str]:
    """Return one sentence for each route on which a request without an output maximum is not bounded."""
    return [
        f"routes[{number}]: cap = 'off': a request without an output maximum can exceed every budget"
        for number, row in enumerate(routes, start=1)
        if row.cap == OFF
    ]


def certificate_warnings(settings: Settings) -> list[str]:
    """Return a sentence if clients without a certificate are accepted only because a tool demands one itself."""
    listen = settings.listen
    if not listen.tls_client_ca_file or listen.tls_client_certificate or settings.requires_client_certificates:
        return []
    warning = (
        "listen.tls_client_certificate: clients without a certificate are accepted, because a tool demands one itself;"
        " set 'optional' to confirm this, or 'required'"
    )
    return [warning]
