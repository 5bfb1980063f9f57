"""The state of the limits of a user, of its tenant, and of its agents and their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from keyproxy.config import schema
from keyproxy.limits.budgets import budget_plan
from keyproxy.limits.ledger_protocol import TOKEN_POOL, Pool
from keyproxy.limits.plan import Plan
from keyproxy.model import Moment
from keyproxy.store.directory.errors import Invalid, NotFound
from keyproxy.store.identities.lookup_batcher import UNUSABLE
from keyproxy.store.ledger.explain import DryBackend, window_state, windows_of
from keyproxy.store.ledger.select_backend import ledger_backend
from keyproxy.store.postgres.database import Database, Row

#: The most agent tokens of one user whose windows are shown.
_TOKENS_SHOWN_MAX: Final = 1_000


async def windows_of_user(
    database: Database, user_id: str, configured: schema.Settings, *, is_test: bool, now: Callable[[], Moment]
) -> list[dict[str, Any]]:
    """The current state of the limits of a user, its tenant, its agents and their live tokens.

    At most `_TOKENS_SHOWN_MAX` tokens, those that expire last. Raises NotFound, Invalid, StoreUnavailable.
    """
    rows = await database.fetch("limits_of_user", user_id, is_test)
    if not rows:
        raise NotFound(f"there is no user {user_id!r}")
    (row,) = rows
    owners = (("tenant", row["tenant_id"]), ("user", row["user_id"]))
    try:
        pools = [
            (Pool(kind, owner, is_test), Plan.from_json(json.loads(row[f"{kind}_limits"])))
            for kind, owner in owners
            if row[f"{kind}_limits"] is not None
        ]
        agents = await database.fetch("pools_of_agents", user_id, is_test, _TOKENS_SHOWN_MAX)
        pools += [(Pool(one["kind"], one["owner"], is_test), _plan_of_agent(one)) for one in agents]
    except UNUSABLE as error:
        raise Invalid(f"the plan of user {user_id!r}, its tenant or an agent is invalid: {error}") from error
    wanted = windows_of(pools)
    windows = ledger_backend(database, configured.ledger)
    try:
        states = await DryBackend(windows, now).states([window for window, _ in wanted])
    finally:
        await windows.close()
    return [
        {"owner": window.pool.owner, **window_state(window, limit, state)}
        for (window, limit), state in zip(wanted, states, strict=True)
    ]


def _plan_of_agent(row: Row) -> Plan:
    if row["kind"] == TOKEN_POOL:
        return budget_plan(row["token_budget"], row["request_budget"])
    return Plan.from_json(json.loads(row["limits"]))
