"""The language of a page: the first of `ui_locales`, then of Accept-Language, that the pages have (RFC 4647 lookup)."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from keyproxy.config.oauth.oauth_settings import LANGUAGES

#: More are ignored.
_RANGES_MAX: Final = 20


def language_of(request: web.Request, fallback: str) -> str:
    """The language of the pages that respond to a request. `fallback`: `oauth.language`."""
    preferred = request.query.get("ui_locales", "").split()[:_RANGES_MAX]
    return _first(preferred) or _first(_accepted(request.headers.get("Accept-Language", ""))) or fallback


def _first(ranges: list[str]) -> str | None:
    for one in ranges:
        language = one.partition("-")[0].lower()
        if language in LANGUAGES:
            return language
    return None


def _accepted(header: str) -> list[str]:
    """The language ranges of Accept-Language, the preferred ones first; those with the weight 0 are not accepted."""
    weighted = []
    for part in header.split(",")[:_RANGES_MAX]:
        name, *parameters = part.strip().split(";")
        weight = _weight(parameters)
        if name and weight > 0:
            weighted.append((weight, name.strip()))
    # Stable: ranges of equal weight keep their order.
    return [name for _, name in sorted(weighted, key=lambda one: -one[0])]


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.strip().partition("=")
        if name.strip().lower() == "q":
            try:
                weight = float(value)
            except ValueError:
                return 0.0
            return weight if 0.0 <= weight <= 1.0 else 0.0
    return 1.0
