"""Decide whether an identity may use a route now: revoked, expired, disabled, suspended, scope, route.

Pure. The caller has presented a real key at this point, so the refusal may name the reason; a request without one never
gets here and never reveals which routes exist.
"""

from __future__ import annotations

from typing import Final

from keyproxy.model import Grant, Identity, Moment, Route
from keyproxy.reasons import Reason, Refusal

#: What no later event changes. An expired key is refused for its expiry rather than for anything else.
_FINAL: Final = (Reason.KEY_REVOKED, Reason.KEY_INVALID)


def admit(identity: Identity, route: Route | None, now: Moment) -> Grant:
    """Grant this identity the use of this route. Raises a Refusal."""
    standing = identity.standing
    if standing is not None and standing in _FINAL:
        raise Refusal(standing)
    # `expires_at` is the first instant at which the key no longer works.
    if now.wall_seconds >= identity.expires_wall_seconds:
        raise Refusal(Reason.KEY_EXPIRED)
    if standing is not None:
        raise Refusal(standing)
    if route is None:
        raise Refusal(Reason.ROUTE_NOT_ALLOWED)
    if not route.scopes <= identity.scopes:
        raise _insufficient(sorted((route.scopes | route.tool_scopes) - identity.scopes))
    return Grant(identity, route)


def refused_delegation(identity: Identity) -> Identity:
    """The identity of a credential that may not act for the user that its request names.

    It is still refused for its own standing and expiry first.
    """
    return Identity(
        key_id=identity.key_id,
        user_id=identity.user_id,
        tenant_id=identity.tenant_id,
        scopes=frozenset(),
        is_test=identity.is_test,
        expires_wall_seconds=identity.expires_wall_seconds,
        standing=identity.standing or Reason.DELEGATION_REFUSED,
        header_block=b"",
        actor_user_id=None,
        agent_token=identity.agent_token,
        can_act=identity.can_act,
        oauth=identity.oauth,
    )


def _insufficient(missing: list[str]) -> Refusal:
    """The refusal names all missing scopes, so that the caller need not find them one request at a time."""
    named = ", ".join([f"'{scope}'" for scope in missing])
    noun = "scope" if len(missing) == 1 else "scopes"
    return Refusal(Reason.SCOPE_INSUFFICIENT, caller_text=f"Missing {noun}: {named}.", missing_scopes=missing)
