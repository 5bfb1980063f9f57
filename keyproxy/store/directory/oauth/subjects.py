"""OAuth subjects: the accounts at the identity provider with which users sign in."""

from __future__ import annotations

import json
from dataclasses import dataclass

from keyproxy.config.schema import Settings
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import ENTITIES, Entity, EntityPage
from keyproxy.store.directory.errors import Conflict, Invalid, NotFound


@dataclass(frozen=True, slots=True)
class OAuthSubjectStore:
    """The operations on subjects. `issuer`: in all methods None for the configured one."""

    _context: DirectoryContext
    _settings: Settings

    async def link(self, subject: str, user_id: str, *, issuer: str | None = None) -> Entity:
        """Let a subject sign in as a user. `created`: it was not linked before.

        Raises NotFound, Invalid, or Conflict if the subject is linked to another user.
        """
        issuer = self._issuer(issuer)
        async with self._context.transaction() as transaction:
            await self._context.lock(transaction, "user", user_id)
            created = await transaction.fetch_row("add_subject", issuer, subject, user_id) is not None
            row = await transaction.fetch_row("subject", issuer, subject)
        if row is None:
            raise Conflict(f"subject {subject!r} was unlinked meanwhile: try again")
        found = ENTITIES["subject"](row)
        if found["user"] != user_id:
            owner = f"user {found['user']!r}" if self._context.includes_tenant(found["tenant"]) else "another user"
            raise Conflict(f"subject {subject!r} is linked to {owner}: unlink it first")
        return {**found, "created": created}

    async def unlink(self, subject: str, *, issuer: str | None = None) -> Entity:
        """Remove the link of a subject. Its sessions end within a second, and it cannot sign in."""
        issuer = self._issuer(issuer)
        async with self._context.transaction() as transaction:
            await transaction.fetch("hold_subject", issuer, subject)
            row = await transaction.fetch_row("subject", issuer, subject)
            if row is None or not self._context.includes_tenant(row["tenant_id"]):
                raise NotFound(f"there is no subject {subject!r} of {issuer}")
            await transaction.fetch("delete_subject", issuer, subject)
        return {"issuer": issuer, "subject": subject, "deleted": True}

    async def list_page(self, cursor: str | None, limit: int, *, user_id: str | None = None) -> EntityPage:
        """List subjects, ordered by issuer and subject; only those of a user, if given.

        `cursor`: the previous page's `next`, None for the first page. Raises NotFound for an unknown user.
        """
        after = _position(cursor)
        if user_id is None:
            rows = await self._context.fetch("subjects", *after, limit, self._context.tenant_id)
        else:
            await self._context.get("user", user_id)
            rows = await self._context.fetch("subjects_of_user", *after, limit, user_id)
        following = json.dumps([rows[-1]["issuer"], rows[-1]["subject"]]) if len(rows) == limit > 0 else None
        return EntityPage([ENTITIES["subject"](row) for row in rows], following)

    def _issuer(self, issuer: str | None) -> str:
        chosen = self._settings.oauth_login.issuer if issuer is None else issuer
        if not chosen:
            raise Invalid("name the issuer: oauth.login.issuer is not configured")
        return chosen


def _position(cursor: str | None) -> tuple[str, str]:
    """The issuer and the subject after which a page begins. Raises Invalid."""
    if cursor is None:
        return "", ""
    try:
        found = json.loads(cursor)
    except (ValueError, RecursionError):
        found = None
    if not (isinstance(found, list) and len(found) == 2 and all(isinstance(one, str) for one in found)):
        raise Invalid(f"invalid cursor {cursor!r}")
    return found[0], found[1]
