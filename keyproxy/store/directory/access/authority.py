"""Checks of changes to what keys may do: roles that exist, a bound on effective scopes, scopes above a ceiling."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from keyproxy.store.directory.errors import Invalid, NotFound
from keyproxy.store.identities.identity_rows import EFFECTIVE_SCOPES_MAX
from keyproxy.store.postgres.database import Transaction


async def hold_roles(transaction: Transaction, roles: Iterable[str]) -> None:
    """Lock roles until the transaction ends, so that none is deleted meanwhile. Raises NotFound if one is unknown."""
    wanted = sorted(set(roles))
    if not wanted:
        return
    found = {row["id"] for row in await transaction.fetch("hold_roles", wanted)}
    missing = [role for role in wanted if role not in found]
    if missing:
        raise NotFound(f"there is no role {missing[0]!r}: create it first")


async def check_scopes(
    transaction: Transaction,
    *,
    keys: Sequence[str] | None = None,
    user: str | None = None,
    tenant: str | None = None,
    role: str | None = None,
) -> None:
    """Bound the number of effective scopes of these keys, or of all keys of a user, tenant or role. Raises Invalid."""
    row = await transaction.fetch_row("key_with_too_many_scopes", keys, user, tenant, role, EFFECTIVE_SCOPES_MAX)
    if row is not None:
        raise Invalid(
            f"key {row['id']!r} would have {row['scopes']} effective scopes, and the maximum is {EFFECTIVE_SCOPES_MAX}"
        )


async def key_warnings(transaction: Transaction, keys: Sequence[str]) -> list[str]:
    """Warnings about new or changed keys: scopes without effect, and acting without a limit."""
    return [*await ceiling_warnings(transaction, keys), *await acting_warnings(transaction, keys)]


async def acting_warnings(transaction: Transaction, keys: Sequence[str]) -> list[str]:
    """Warnings about those of these keys that act for users while no plan bounds the sum over all of these users."""
    return [
        f"a key that acts for users of tenant {row['id']!r} has no plan, and neither has the tenant: nothing bounds its"
        " use over all users together; see `key set-plan` and `tenant set-plan`"
        for row in await transaction.fetch("acting_without_plan", keys)
    ]


async def ceiling_warnings(transaction: Transaction, keys: Sequence[str]) -> list[str]:
    """Warnings of scopes that these keys have without effect, because they are above a ceiling."""
    rows = await transaction.fetch("scopes_above_ceilings", keys)
    return [
        f"above the ceiling of {kind} {owner!r} and without effect: {' '.join(row['scope'] for row in group)}"
        for (kind, owner), group in itertools.groupby(rows, key=lambda row: (row["kind"], row["owner"]))
    ]
