"""Read the audit log: author, origin and values before and after each change. Database triggers write it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import Entity, EntityPage
from keyproxy.store.directory.errors import Conflict, Invalid
from keyproxy.store.postgres.database import Row
from keyproxy.store.postgres.json_values import read_json
from keyproxy.store.postgres.times import time_text

#: The kinds of changed entities, as triggers and functions write them.
ENTITIES: Final = (
    "tenant",
    "user",
    "key",
    "plan",
    "token",
    "window",
    "role",
    "owned",
    "template",
    "agent",
    "agent_token",
    "network",
    "approval",
    "consent",
    "provider_key",
    "oauth_client",
    "oauth_grant",
    "oauth_session",
    "oauth_subject",
)
ACTIONS: Final = ("insert", "update", "delete", "truncate", "window.credit", "anomaly")

_ID_MAX: Final = 2**63 - 1
_POLL_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which rows to read. All given conditions apply.

    `entity`: one of ENTITIES. `action`: one of ACTIONS. `since` and `until`: aware times; the first is inclusive, the
    second exclusive. `db_role`: the role that was logged in to the database.
    """

    entity: str | None = None
    entity_id: str | None = None
    tenant: str | None = None
    actor: str | None = None
    action: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    db_role: str | None = None


@dataclass(frozen=True, slots=True)
class AuditLog:
    """Read the audit log in pages."""

    _context: DirectoryContext

    async def list_newest(self, cursor: str | None, limit: int, wanted: AuditFilter | None = None) -> EntityPage:
        """List audit rows, newest first."""
        return await self._page("audit_newest", cursor, limit, wanted)

    async def export(
        self, cursor: str | None, limit: int, wanted: AuditFilter | None = None, *, horizon: int
    ) -> EntityPage:
        """List audit rows in the order of writing, up to `horizon` (see `horizon`).

        Resuming from the id of the last row with a later horizon misses no row.
        """
        return await self._page("audit", cursor or "0", limit, wanted, horizon)

    async def horizon(self, seconds: float = 10.0) -> int:
        """The id up to which the audit log is complete: rows that are committed later have greater ids.

        Serial numbers are assigned before transactions commit. So this notes the newest one, then waits for all
        transactions that might have an earlier one. Raises Conflict if one of them does not end within `seconds`.
        """
        row = await self._context.fetch_row("audit_horizon")
        if row is None:
            return 0
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            ended = await self._context.fetch_row("have_all_ended", row["not_begun"])
            if ended is not None and ended["have_ended"]:
                newest: int = row["newest"]
                return newest
            if asyncio.get_running_loop().time() > deadline:
                raise Conflict("timeout: a transaction that may have changed something is still open; try again later")
            await asyncio.sleep(_POLL_SECONDS)

    async def _page(
        self, statement: str, cursor: str | None, limit: int, wanted: AuditFilter | None, *more: object
    ) -> EntityPage:
        if cursor is not None and not (cursor.isdecimal() and int(cursor) <= _ID_MAX):
            raise Invalid(f"invalid cursor {cursor!r} for the audit log")
        filters = self._filters(wanted or AuditFilter())
        if filters is None:
            return EntityPage([], None)
        start = _ID_MAX if cursor is None else int(cursor)
        rows = await self._context.fetch(statement, start, limit, *filters, *more)
        following = str(rows[-1]["id"]) if len(rows) == limit > 0 else None
        return EntityPage([_entry(row) for row in rows], following)

    def _filters(self, wanted: AuditFilter) -> tuple[object, ...] | None:
        may_be, tenant = self._context.tenant_filter(wanted.tenant)
        if not may_be:
            return None
        about = (wanted.entity, wanted.entity_id, tenant, wanted.actor, wanted.action)
        return *about, wanted.since, wanted.until, wanted.db_role


def _entry(row: Row) -> Entity:
    before, after = _object(row["before"]), _object(row["after"])
    return {
        "id": row["id"],
        "at": time_text(row["at"], "milliseconds"),
        "actor": row["actor"],
        "origin": row["origin"],
        "db_role": row["db_role"],
        "action": row["action"],
        "entity": row["entity"],
        "entity_id": row["entity_id"],
        "tenant": row["tenant_id"],
        "changed": _changed(before, after),
        "before": before or None,
        "after": after or None,
    }


def _object(text: str | None) -> Any:
    return None if text is None else read_json(text)


def _changed(before: Any, after: Any) -> list[str]:
    """The fields that an update has changed. Our triggers write objects, but the columns accept any JSON."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return []
    return sorted(name for name in after if before.get(name) != after[name])
