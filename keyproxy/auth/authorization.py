"""May this identity use this route now? Expired, revoked, disabled, scope, route: the answer is a Grant or a Refusal.

Pure. The caller has shown a real key by the time it is asked, so it may be told which of these it was; a stranger never
gets here and never learns which routes there are.
"""

from __future__ import annotations

from keyproxy.model import Grant, Identity, Moment, Route
from keyproxy.reasons import Reason, Refusal


def admit(identity: Identity, route: Route | None, now: Moment) -> Grant:
    """A Grant for this identity on this route. Raises the Refusal that says why not."""
    if identity.standing is not None:
        raise Refusal(identity.standing)
    # At the instant itself the key has expired: `expires_at` is the first moment at which it does not work.
    if now.wall_seconds >= identity.expires_wall_seconds:
        raise Refusal(Reason.KEY_EXPIRED)
    if route is None:
        raise Refusal(Reason.ROUTE_NOT_ALLOWED)
    if not route.scopes <= identity.scopes:
        raise _insufficient(sorted(route.scopes - identity.scopes))
    return Grant(identity, route)


def _insufficient(missing: list[str]) -> Refusal:
    """All of them are named: fetching one after the other would take a request for each."""
    named = ", ".join([f"'{scope}'" for scope in missing])
    noun = "scope" if len(missing) == 1 else "scopes"
    return Refusal(Reason.SCOPE_INSUFFICIENT, said=f"It needs the {noun} {named}.", missing_scopes=missing)
