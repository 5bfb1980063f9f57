"""The claims of what is signed here. RFC 8693 section 4.1 defines `act`: the current actor is outermost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from keyproxy.model import NEVER, Identity

#: The `typ` of agent tokens, RFC 9068, and of identity assertions. No verifier may take one for the other.
AGENT_TOKEN_TYPE: Final = "at+jwt"  # noqa: S105 - a media type
ASSERTION_TYPE: Final = "keyproxy-assertion+jwt"


def actor_claim(agents: Sequence[str], actor_user_id: str | None, key_id: str) -> dict[str, object] | None:
    """The claim `act` of a chain of agents, the outermost first, and of a user that acts with this key, innermost.

    None for a plain key: its user is the only actor.
    """
    claim: dict[str, object] | None = None
    if actor_user_id is not None:
        claim = {"sub": actor_user_id, "type": "user", "key_id": key_id}
    for agent in reversed(agents):
        inner = {} if claim is None else {"act": claim}
        claim = {"sub": agent, "type": "agent", **inner}
    return claim


def assertion_claims(
    identity: Identity, *, issuer: str, audience: str, issued_wall: int, ttl_seconds: int
) -> dict[str, object]:
    """The claims of an identity's assertion. It never outlives the credential."""
    ends = issued_wall + ttl_seconds
    if identity.expires_wall_seconds != NEVER:
        ends = min(ends, int(identity.expires_wall_seconds))
    agents = () if identity.agent_token is None else identity.agent_token.agents
    claims: dict[str, object] = {
        "iss": issuer,
        "aud": audience,
        "sub": identity.user_id,
        "tenant": identity.tenant_id,
        "scope": " ".join(sorted(identity.scopes)),
        "key_id": identity.key_id,
        "test": identity.is_test,
    }
    actor = actor_claim(agents, identity.actor_user_id, identity.key_id)
    if actor is not None:
        claims["act"] = actor
    return {**claims, "iat": issued_wall, "exp": ends}
