"""The credential that an explanation is about: a key, one that acts for a user, an agent token, or an OAuth session."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from keyproxy.auth.authorization import refused_delegation
from keyproxy.model import Identity
from keyproxy.store.directory.errors import Invalid, NotFound
from keyproxy.store.identities.delegated_rows import acting_identity, token_identity
from keyproxy.store.identities.identity_rows import NO_RESOURCES, TokenResources, identity_of
from keyproxy.store.identities.lookup_batcher import UNUSABLE
from keyproxy.store.postgres.database import Row, StatementRunner

_MAY_NOT_ACT: Final = "The key acts for its owner only: see `key set-acts-for`."
_SESSION_ID: Final = re.compile("ses_[0-9A-Za-z]{22}")
_SESSION_MAY_NOT_ACT: Final = "An OAuth session acts for the user who has consented only."
_MAY_NOT_ACT_FOR: Final = "The user does not exist, is disabled, or belongs to another tenant than the key."


class ExplainedCredential(NamedTuple):
    """An identity as a proxy builds it, and the members of an explanation that describe it.

    `why_refused`: why the key may not act for the user; empty if it may.
    """

    identity: Identity
    shown: Mapping[str, Any]
    why_refused: str = ""


async def key_credential(
    database: StatementRunner,
    key_id: str,
    act_for: str | None,
    header_prefix: str,
    *,
    resources: TokenResources = NO_RESOURCES,
) -> ExplainedCredential:
    """A key, acting for a user if one is given; or an OAuth session, with the newest of its access tokens.

    `resources`: what OAuth tokens must be for. Raises NotFound, Invalid, StoreUnavailable.
    """
    digests = [row["digest"] for row in await database.fetch("digest_of_key", key_id)]
    is_session = _SESSION_ID.fullmatch(key_id) is not None
    if is_session:
        rows = await database.fetch("access_token_identities", digests)
    elif act_for is None:
        rows = await database.fetch("identities_by_digest", digests)
    else:
        rows = await database.fetch("acting_identities", digests, [act_for] * len(digests))
    authorities = await database.fetch("authority_of_key", key_id)
    if not rows or not authorities:
        what = "no session with an access token" if is_session else "no key"
        raise NotFound(f"there is {what} {key_id!r}")
    (row,), (authority,) = rows, authorities
    if is_session:
        identity = _built(partial(identity_of, resources=resources), row, header_prefix, f"session {key_id!r}")
        shown = _shown(identity, authority)
        if act_for is None:
            return ExplainedCredential(identity, shown)
        return ExplainedCredential(refused_delegation(identity), shown, _SESSION_MAY_NOT_ACT)
    identity = _built(identity_of if act_for is None else acting_identity, row, header_prefix, f"key {key_id!r}")
    if act_for is None:
        return ExplainedCredential(identity, _shown(identity, authority))
    why = "" if row["may_act"] else _MAY_NOT_ACT_FOR if row["can_act"] else _MAY_NOT_ACT
    subject = {"user": act_for, "actor": row["owner_id"], "actor_ceiling": authority["user_ceiling"]}
    ceiling = await _ceiling_of(database, act_for) if row["may_act"] else None
    return ExplainedCredential(identity, {**_shown(identity, authority), **subject, "user_ceiling": ceiling}, why)


async def token_credential(database: StatementRunner, token_id: str, header_prefix: str) -> ExplainedCredential:
    """An agent token. Raises NotFound, Invalid, StoreUnavailable."""
    digests = [row["digest"] for row in await database.fetch("digest_of_agent_token", token_id)]
    rows = await database.fetch("agent_token_identities", digests)
    authorities = await database.fetch("authority_of_key", rows[0]["key_id"]) if rows else []
    if not authorities:
        raise NotFound(f"there is no agent token {token_id!r}")
    (row,), (authority,) = rows, authorities
    identity = _built(token_identity, row, header_prefix, f"agent token {token_id!r}")
    chain: list[Mapping[str, Any]] = json.loads(row["chain"])
    shown = {
        **_shown(identity, authority),
        "agent": chain[0]["agent"],
        "agent_token": token_id,
        "chain": [
            {name: step[name] for name in ("agent", "token", "scopes", "ceiling", "token_budget", "request_budget")}
            for step in chain
        ],
    }
    if identity.actor_user_id is not None:
        shown |= {
            "actor_ceiling": authority["user_ceiling"],
            "user_ceiling": await _ceiling_of(database, row["user_id"]),
        }
    return ExplainedCredential(identity, shown)


def _built(build: Callable[[Row, str], Identity], row: Row, header_prefix: str, name: str) -> Identity:
    try:
        return build(row, header_prefix)
    except UNUSABLE as error:
        raise Invalid(f"{name} is refused because its row is invalid: {error}") from error


def _shown(identity: Identity, authority: Row) -> dict[str, Any]:
    """What all credentials have in common. `authority`: that of the key."""
    return {
        "key": identity.key_id,
        "user": identity.user_id,
        "tenant": identity.tenant_id,
        "mode": identity.mode,
        "actor": identity.actor_user_id,
        "agent": None,
        "agent_token": None,
        "key_scopes": authority["key_scopes"],
        "roles": authority["roles"],
        "user_ceiling": authority["user_ceiling"],
        "actor_ceiling": None,
        "tenant_ceiling": authority["tenant_ceiling"],
        "chain": [],
        "effective_scopes": sorted(identity.scopes),
    }


async def _ceiling_of(database: StatementRunner, user_id: str) -> Any:
    rows = await database.fetch("ceiling_of_user", user_id)
    return rows[0]["ceiling"] if rows else None
