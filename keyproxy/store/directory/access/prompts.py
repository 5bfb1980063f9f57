"""Prompt templates: the category of a system prompt, registered by the digest of its texts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import ENTITIES, Entity, EntityPage
from keyproxy.store.directory.errors import Conflict, Invalid, NotFound
from keyproxy.store.postgres.database import Row, StoreConflict

_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class PromptTemplateStore:
    """The operations on prompt templates. A directory that is bound to a tenant refuses them."""

    _context: DirectoryContext

    async def register(
        self, digest: str, category: str, *, name: str | None = None, tenant_id: str | None = None
    ) -> Entity:
        """Register a digest (hexadecimal), or change its category and name. `created`: it was not registered.

        `name` None: unchanged. `tenant_id` None: for every tenant. Raises Conflict if another tenant has registered it.
        """
        self._context.require_unbound("register a prompt")
        key = _bytes_of(digest)
        if key is None:
            raise Invalid("a digest has 64 hexadecimal digits")
        try:
            async with self._context.transaction() as transaction:
                created = await transaction.fetch_row("register_template", key, category, name or "", tenant_id)
                held = _required(await transaction.fetch_row("hold_template", key), digest)
                if held["tenant"] != tenant_id:
                    raise Conflict(f"the prompt is registered for {_scope_of(held['tenant'])}")
                if created is None:
                    await transaction.fetch("change_template", key, category, name)
                found = _required(await transaction.fetch_row("template", key), digest)
        except StoreConflict as error:
            if error.constraint == "prompt_templates_tenant_id_fkey":
                raise NotFound(f"there is no tenant {tenant_id!r}: create it first") from error
            if error.constraint == "prompt_templates_bound":
                raise Conflict("there are 10,000 prompt templates, which is the most: remove some") from error
            raise
        return {**found, "created": created is not None}

    async def get(self, digest: str) -> Entity:
        """Return one template."""
        self._context.require_unbound("read prompt templates")
        return _required(await self._context.fetch_row("template", _bytes_of(digest)), digest)

    async def remove(self, digest: str) -> Entity:
        """Remove a template. Its prompt is then unregistered."""
        self._context.require_unbound("remove a prompt")
        async with self._context.transaction() as transaction:
            removed = _required(await transaction.fetch_row("remove_template", _bytes_of(digest)), digest)
        return {"digest": removed["digest"], "deleted": True}

    async def list_page(self, cursor: str | None, limit: int) -> EntityPage:
        """List templates, ordered by digest. `cursor`: the previous page's `next`, None for the first page."""
        self._context.require_unbound("read prompt templates")
        after = b"" if cursor is None else _bytes_of(cursor)
        if after is None:
            raise Invalid("invalid cursor for the prompt templates")
        rows = await self._context.fetch("templates", after, limit)
        items = [ENTITIES["template"](row) for row in rows]
        return EntityPage(items, items[-1]["digest"] if len(items) == limit > 0 else None)


def _bytes_of(digest: str) -> bytes | None:
    return bytes.fromhex(digest) if _DIGEST.fullmatch(digest) else None


def _required(row: Row | None, digest: str) -> Entity:
    if row is None:
        raise NotFound(f"there is no prompt template {digest!r}")
    return ENTITIES["template"](row)


def _scope_of(tenant_id: str | None) -> str:
    return "every tenant" if tenant_id is None else f"tenant {tenant_id!r}"
