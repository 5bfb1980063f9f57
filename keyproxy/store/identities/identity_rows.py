"""Builds the identity of a key or an OAuth access token from its row: what depends on it alone, computed once."""

from __future__ import annotations

import functools
import json
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from keyproxy.http.identity_headers import identity_block
from keyproxy.limits.allowance import Allowance
from keyproxy.limits.ledger_protocol import Pool
from keyproxy.limits.plan import Plan
from keyproxy.model import NEVER, Identity, KeyDigest, OAuthSession
from keyproxy.reasons import Reason
from keyproxy.store.identities.lookup_batcher import LookupQuery
from keyproxy.store.postgres.database import Row


class AccessTokenDigest(NamedTuple):
    """The digest of an OAuth access token, as opposed to that of a key."""

    digest: KeyDigest


def _groups_of(row: Row) -> Sequence[tuple[str, str]]:
    return (("user", row["user_id"]), ("tenant", row["tenant_id"]))


#: The lookup of identities by the digests of their keys.
BY_DIGEST: Final = LookupQuery(
    "identities_by_digest",
    "keys",
    parameters=lambda digests: (digests,),
    subject=lambda row: KeyDigest(row["digest"]),
    name=lambda row: f"key {row['key_id']}",
    groups=_groups_of,
)

#: The lookup of identities by the digests of OAuth access tokens.
BY_ACCESS_TOKEN: Final[LookupQuery[AccessTokenDigest]] = LookupQuery(
    "access_token_identities",
    "access tokens",
    parameters=lambda tokens: ([token.digest for token in tokens],),
    subject=lambda row: AccessTokenDigest(KeyDigest(row["digest"])),
    name=lambda row: f"session {row['key_id']}",
    groups=_groups_of,
    # The feed reports a change of a token by its digest, as one of a key.
    groups_of_subject=lambda token: (("key", token.digest),),
)


#: More effective scopes make a header too long for some upstreams; the directory refuses to store them.
EFFECTIVE_SCOPES_MAX: Final = 128

#: How many plans and sets of scopes are kept, so that the identities of a large tenant share one.
_SHARED_MAX: Final = 1_000

_log = logging.getLogger(__name__)


class TokenResources(NamedTuple):
    """The resources (RFC 8707) that OAuth access tokens must be for, by mode. Empty: tokens of this mode are refused."""

    live: str = ""
    test: str = ""

    def include(self, resource: str, *, is_test: bool) -> bool:
        """Whether a token for this resource may be used in this mode."""
        return resource == (self.test if is_test else self.live)


#: No OAuth access token is accepted.
NO_RESOURCES: Final = TokenResources()


def identity_of(row: Row, header_prefix: str, resources: TokenResources = NO_RESOURCES) -> Identity:
    """The identity of one row of either lookup. Raises ValueError and the like for an invalid row.

    A token for another resource is no credential here, whatever else its row contains.
    """
    user, expires = row["user_id"], row["expires_wall_seconds"]
    key_id, lineage = row["key_id"], row["key_pool"]
    scopes = bounded_scopes(row["scopes"], f"key {row['key_id']}")
    oauth = _oauth_of(row)
    is_for_us = oauth is None or resources.include(row["resource"], is_test=row["is_test"])
    return Identity(
        key_id=key_id,
        user_id=user,
        # A tenant may have 100,000 keys, and most keys replace no other: equal texts are one object.
        tenant_id=sys.intern(row["tenant_id"]),
        scopes=scope_set(tuple(scopes)),
        is_test=row["is_test"],
        expires_wall_seconds=NEVER if expires is None else expires,
        standing=standing_of(row) if is_for_us else Reason.KEY_INVALID,
        header_block=header_block(header_prefix, row, user, scopes),
        allowance=allowance_of(pools_of(row, user)),
        retiring_field=retiring_field_of(row, header_prefix),
        can_act=row["can_act"],
        lineage=key_id if lineage == key_id else lineage,
        oauth=oauth,
    )


def _oauth_of(row: Row) -> OAuthSession | None:
    if row["oauth_client"] is None:
        return None
    # A client has many sessions, and each session several tokens.
    return OAuthSession(row["key_pool"], sys.intern(row["oauth_client"]), row["bound_to"])


def standing_of(row: Row) -> Reason | None:
    """The reason for refusing every request with the credential of this row, None if there is none."""
    if row["is_revoked"]:
        return Reason.KEY_REVOKED
    if row["is_disabled"]:
        return Reason.ACCOUNT_DISABLED
    return Reason.KEY_SUSPENDED if row["is_suspended"] else None


def bounded_scopes(scopes: Sequence[str], name: str) -> Sequence[str]:
    """The effective scopes, none if there are too many. `name`: what has them, for the log."""
    if len(scopes) <= EFFECTIVE_SCOPES_MAX:
        return scopes
    _log.error(
        "%s has %d effective scopes and the maximum is %d: requests with it have none",
        name, len(scopes), EFFECTIVE_SCOPES_MAX,
    )  # fmt: skip
    return ()


@functools.lru_cache(maxsize=_SHARED_MAX)
def scope_set(scopes: tuple[str, ...]) -> frozenset[str]:
    """The scopes as a set, which many identities share."""
    return frozenset(scopes)


def header_block(
    header_prefix: str, row: Row, user_id: str, scopes: Iterable[str], *, more: Iterable[tuple[str, str]] = ()
) -> bytes:
    """The identity headers of requests that concern this user. `more`: further ones, after those of every identity."""
    return identity_block(
        header_prefix,
        (
            ("User", user_id),
            ("Tenant", row["tenant_id"]),
            ("Scope", " ".join(scopes)),
            ("Test", "true" if row["is_test"] else "false"),
            ("Key-Id", row["key_id"]),
            *more,
        ),
    )


def retiring_field_of(row: Row, header_prefix: str) -> bytes | None:
    """The start of the header line with the remaining lifetime of a key that has been replaced; None for any other."""
    # There is no countdown to an infinite expiry.
    if not row["is_retiring"] or not math.isfinite(row["expires_wall_seconds"]):
        return None
    return f"{header_prefix}Key-Expires-In: ".encode("ascii")


def pools_of(row: Row, user_id: str) -> list[tuple[Pool, Plan]]:
    """The pools of the tenant, of the user that requests concern, and of the key. Limits belong to pools, not to keys."""
    found = []
    for kind, owner in (("tenant", row["tenant_id"]), ("user", user_id), ("key", row["key_pool"])):
        limits = row[f"{kind}_limits"]
        if limits is not None:
            found.append((Pool(kind, owner, row["is_test"]), plan_of(limits)))
    return found


@functools.lru_cache(maxsize=_SHARED_MAX)
def plan_of(limits: str) -> Plan:
    """The plan of a row, which many identities share.

    Raises for an invalid plan, which a table constraint rejects: unreadable limits must not mean no limits.
    """
    return Plan.from_json(json.loads(limits))


def allowance_of(pools: Iterable[tuple[Pool, Plan]]) -> Allowance | None:
    """The limits of requests that draw on these pools, None if there are none."""
    limited = tuple([(pool, plan) for pool, plan in pools if plan.has_limits])
    return Allowance(limited) if limited else None
