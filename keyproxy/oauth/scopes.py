"""The scopes of a request: parsed, and intersected with those that are offered."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from keyproxy.oauth.oauth_error import OAuthError


def parse(text: str | None) -> frozenset[str] | None:
    """The scopes of the parameter `scope`, None if it is absent or empty. RFC 6749 section 3.3."""
    return frozenset(text.split(" ")) - {""} or None if text else None


def granted(requested: frozenset[str] | None, offered: Sequence[str]) -> tuple[str, ...]:
    """The offered scopes that are requested, in the order of the offer; all, if none is requested.

    Raises OAuthError `invalid_scope` if scopes are requested and none of them is offered.
    """
    if requested is None:
        return tuple(offered)
    found = tuple(scope for scope in offered if scope in requested)
    if not found:
        raise OAuthError("invalid_scope", "none of the requested scopes is offered")
    return found


def text(scopes: Collection[str]) -> str:
    """The member `scope` of a response."""
    return " ".join(sorted(scopes))
