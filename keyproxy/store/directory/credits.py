"""Credits: a change to the limit of one window, with a reason, on top of the plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, NamedTuple

from keyproxy.limits.limit_text import parse_limit
from keyproxy.limits.plan import PERIODS, InvalidPlanError, Limit, Plan
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import Entity
from keyproxy.store.directory.errors import Invalid, NotFound
from keyproxy.store.postgres.database import Row, Transaction
from keyproxy.store.postgres.times import time_text

#: Whose limits can be credited.
OWNER_KINDS: Final = ("tenant", "user", "key")


class Credit(NamedTuple):
    """A credit to make. `limit`: the name of a limit of the owner's plan: `tokens/day@model:gpt-4o`.

    `amount` is added to the limit of its current window; it may be negative. Money is in micro-units. `is_test`: of the
    window for test traffic; a key has one mode only.
    """

    owner_kind: str
    owner_id: str
    limit: str
    amount: int
    reason: str
    is_test: bool = False


@dataclass(frozen=True, slots=True)
class CreditStore:
    """Credit windows. A directory that is bound to a tenant cannot."""

    _context: DirectoryContext

    async def add(self, credit: Credit) -> Entity:
        """Change the limit of the current window, and return the window. Raises NotFound, Invalid."""
        self._context.require_unbound("credit a window")
        name = _limit_name(credit.limit)
        if not credit.amount:
            raise Invalid("the amount of a credit must not be 0")
        async with self._context.transaction() as transaction:
            pool = await self._pool(transaction, credit)
            limit = _limit_of(pool, name, credit)
            window = (credit.owner_kind, pool["pool_id"], pool["is_test"], limit.window_measure, limit.selector)
            (row,) = await transaction.fetch("credit_window", *window, limit.quota, credit.amount, credit.reason)
        return {
            "id": row["id"],
            "pool_kind": credit.owner_kind,
            "pool_id": pool["pool_id"],
            "tenant": pool["tenant_id"],
            "mode": "test" if pool["is_test"] else "live",
            "limit": limit.name,
            "amount": credit.amount,
            "reason": credit.reason,
            "credited": row["credited"],
            "total": limit.quota + row["credited"],
            "spent": row["spent"],
            "held": row["held"],
            "window_starts": time_text(row["window_starts"]),
            "window_ends": time_text(row["window_ends"]),
        }

    async def _pool(self, transaction: Transaction, credit: Credit) -> Row:
        kind, owner = credit.owner_kind, credit.owner_id
        row = await transaction.fetch_row(f"limits_of_{kind}_pool", owner, credit.is_test)
        if row is None:
            raise NotFound(f"there is no {kind} {owner!r}")
        if credit.is_test and not row["is_test"]:
            raise Invalid(f"key {owner!r} is a live key: it has no windows for test traffic")
        return row


def _limit_name(text: str) -> str:
    """The canonical name of the limit. Raises Invalid."""
    try:
        name, _ = parse_limit(f"{text}=none")
    except InvalidPlanError as error:
        raise Invalid(f"limit: {error}") from error
    if name.partition("@")[0].partition("/")[2] not in PERIODS:
        raise Invalid(f"{name} has no window to credit: use requests, tokens or spend per {', '.join(PERIODS)}")
    return name


def _limit_of(pool: Row, name: str, credit: Credit) -> Limit:
    owner = f"{credit.owner_kind} {credit.owner_id!r}"
    try:
        plan = Plan.from_json(json.loads(pool["limits"] or "{}"))
    except InvalidPlanError as error:
        raise Invalid(f"the plan of {owner} is invalid: {error}") from error
    mode = "test" if pool["is_test"] else "live"
    limits = {limit.name: limit for limit in plan.limits if limit.mode in ("", mode)}
    if name not in limits:
        names = ", ".join(limit for limit in limits if limits[limit].per in PERIODS)
        raise Invalid(f"{owner} has no limit {name} for {mode} traffic" + (f"; its limits: {names}" if names else ""))
    return limits[name]
