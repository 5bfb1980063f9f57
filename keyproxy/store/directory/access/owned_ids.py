"""Owned ids: which of the upstream's objects belong to which tenant."""

from __future__ import annotations

from dataclasses import dataclass

from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import ENTITIES, Entity, EntityPage
from keyproxy.store.directory.errors import Conflict, NotFound
from keyproxy.store.postgres.database import Row, StoreConflict


@dataclass(frozen=True, slots=True)
class OwnedIdStore:
    """The operations on owned ids. A directory that is bound to a tenant refuses them."""

    _context: DirectoryContext

    async def add(self, kind: str, object_id: str, tenant_id: str) -> Entity:
        """Assign an id to a tenant. `created`: it had no owner. Raises Conflict if another tenant owns it."""
        self._context.require_unbound("change owned ids")
        try:
            async with self._context.transaction() as transaction:
                created = await transaction.fetch_row("add_owned", kind, object_id, tenant_id) is not None
                row = await transaction.fetch_row("hold_owned", kind, object_id)
        except StoreConflict as error:
            if error.constraint != "owned_tenant_id_fkey":
                raise
            raise NotFound(f"there is no tenant {tenant_id!r}: create it first") from error
        found = _required(row, kind, object_id)
        if found["tenant"] != tenant_id:
            raise Conflict(f"{kind} {object_id!r} belongs to tenant {found['tenant']!r}")
        return {**found, "created": created}

    async def get(self, kind: str, object_id: str) -> Entity:
        """Return one id with its owner."""
        self._context.require_unbound("read owned ids")
        return _required(await self._context.fetch_row("owned", kind, object_id), kind, object_id)

    async def remove(self, kind: str, object_id: str, tenant_id: str | None = None) -> Entity:
        """Remove an id from its tenant. Raises Conflict if `tenant_id` is given and another tenant owns it."""
        self._context.require_unbound("change owned ids")
        async with self._context.transaction() as transaction:
            found = _required(await transaction.fetch_row("hold_owned", kind, object_id), kind, object_id)
            if tenant_id not in (None, found["tenant"]):
                raise Conflict(f"{kind} {object_id!r} belongs to tenant {found['tenant']!r}")
            await transaction.fetch("remove_owned", kind, object_id)
        return {"kind": kind, "id": object_id, "deleted": True}

    async def list_page(
        self, cursor: str | None, limit: int, *, kind: str | None = None, tenant_id: str | None = None
    ) -> EntityPage:
        """List owned ids, ordered by kind and id; only of one kind or tenant, if given.

        `cursor`: the previous page's `next`, None for the first page.
        """
        self._context.require_unbound("read owned ids")
        after_kind, _, after_id = (cursor or "").partition("/")
        rows = await self._context.fetch("owned_ids", after_kind, after_id, limit, kind, tenant_id)
        following = f"{rows[-1]['kind']}/{rows[-1]['id']}" if len(rows) == limit > 0 else None
        return EntityPage([ENTITIES["owned"](row) for row in rows], following)


def _required(row: Row | None, kind: str, object_id: str) -> Entity:
    if row is None:
        raise NotFound(f"there is no owned {kind} {object_id!r}")
    return ENTITIES["owned"](row)
