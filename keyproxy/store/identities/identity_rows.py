"""Builds the identity of a key from its row: everything that depends on the key alone, parsed and encoded once."""

from __future__ import annotations

import json
import logging
import math
from typing import Final

from keyproxy.http.identity_headers import identity_block
from keyproxy.limits.allowance import Allowance
from keyproxy.limits.ledger_protocol import Pool
from keyproxy.limits.plan import Plan
from keyproxy.model import NEVER, Identity, KeyDigest
from keyproxy.reasons import Reason
from keyproxy.store.identities.lookup_batcher import LookupQuery
from keyproxy.store.postgres.database import Row

#: The lookup of identities by the digests of their keys.
BY_DIGEST: Final = LookupQuery(
    "identities_by_digest",
    "keys",
    parameters=lambda digests: (digests,),
    subject=lambda row: KeyDigest(row["digest"]),
    name=lambda row: f"key {row['key_id']}",
    groups=lambda row: (("user", row["user_id"]), ("tenant", row["tenant_id"])),
)


#: More effective scopes make a header too long for some upstreams; the directory refuses to store them.
EFFECTIVE_SCOPES_MAX: Final = 128

_log = logging.getLogger(__name__)


def identity_of(row: Row, header_prefix: str) -> Identity:
    """The identity of one row of `identities_by_digest`. Raises ValueError and the like for an invalid row."""
    standing = None
    if row["is_revoked"]:
        standing = Reason.KEY_REVOKED
    elif row["is_disabled"]:
        standing = Reason.ACCOUNT_DISABLED
    expires = row["expires_wall_seconds"]
    # There is no countdown to an infinite expiry.
    is_retiring = row["is_retiring"] and math.isfinite(expires)
    scopes = row["scopes"]
    if len(scopes) > EFFECTIVE_SCOPES_MAX:
        _log.error(
            "key %s has %d effective scopes and the maximum is %d: requests with it have none",
            row["key_id"], len(scopes), EFFECTIVE_SCOPES_MAX,
        )  # fmt: skip
        scopes = []
    block = identity_block(
        header_prefix,
        (
            ("User", row["user_id"]),
            ("Tenant", row["tenant_id"]),
            ("Scope", " ".join(scopes)),
            ("Test", "true" if row["is_test"] else "false"),
            ("Key-Id", row["key_id"]),
        ),
    )
    return Identity(
        key_id=row["key_id"],
        user_id=row["user_id"],
        tenant_id=row["tenant_id"],
        scopes=frozenset(scopes),
        is_test=row["is_test"],
        expires_wall_seconds=NEVER if expires is None else expires,
        standing=standing,
        header_block=block,
        allowance=_allowance(row),
        retiring_field=f"{header_prefix}Key-Expires-In: ".encode("ascii") if is_retiring else None,
    )


def _allowance(row: Row) -> Allowance | None:
    """The limits of requests with this key, None if there are none. Limits belong to pools, not to keys."""
    pools = []
    for kind, owner in (("tenant", row["tenant_id"]), ("user", row["user_id"]), ("key", row["key_pool"])):
        limits = row[f"{kind}_limits"]
        if limits is not None:
            # Raises for an invalid plan, which a table constraint rejects: unreadable limits must not mean no limits.
            plan = Plan.from_json(json.loads(limits))
            if plan.has_limits:
                pools.append((Pool(kind, owner, row["is_test"]), plan))
    return Allowance(tuple(pools)) if pools else None
