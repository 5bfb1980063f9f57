"""Consents: a user agrees that an agent, or any of them, calls a tool for a time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from keyproxy.store.directory.agents.agents import agent_id
from keyproxy.store.directory.approvals.pages import next_cursor, position
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import ENTITIES, Entity, EntityPage, random_digits
from keyproxy.store.directory.errors import Invalid
from keyproxy.store.postgres.database import Transaction

LIFE_MAX: Final = timedelta(days=366)

#: The states of a consent, for lists.
CONSENT_STATES: Final = ("live", "revoked", "expired")

_ID_DIGITS: Final = 22
_TOOL: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, slots=True)
class ConsentFilter:
    """Which consents to list. All given conditions apply. `state`: one of CONSENT_STATES."""

    state: str | None = None
    user: str | None = None
    tenant: str | None = None
    tool: str | None = None


@dataclass(frozen=True, slots=True)
class ConsentStore:
    """The operations on consents."""

    _context: DirectoryContext

    async def grant(self, user_id: str, tool: str, *, expires_in: timedelta, agent: str | None = None) -> Entity:
        """Let an agent of a user, or any agent for None, call a tool, and return the consent.

        It takes the place of a live one for the same user, tool and agent, so that revoking it is enough. Raises
        NotFound, Invalid, or Conflict if the user has 64 live consents.
        """
        async with self._context.transaction() as transaction:
            await self._context.lock(transaction, "user", user_id)
            return await grant_in(self._context, transaction, user_id, tool, agent=agent, expires_in=expires_in)

    async def get(self, consent_id: str) -> Entity:
        """Return one consent."""
        return await self._context.get("consent", consent_id)

    async def revoke(self, consent_id: str) -> Entity:
        """Revoke a consent permanently. A revoked consent stays unchanged."""
        async with self._context.transaction() as transaction:
            await self._context.lock(transaction, "consent", consent_id)
            await transaction.fetch("revoke_consent", consent_id)
            return ENTITIES["consent"]((await transaction.fetch("consent", consent_id))[0])

    async def list_page(self, cursor: str | None, limit: int, wanted: ConsentFilter | None = None) -> EntityPage:
        """List consents, the newest first. `cursor`: the previous page's `next`, None for the first page."""
        wanted = wanted or ConsentFilter()
        if wanted.state not in (None, *CONSENT_STATES):
            raise Invalid(f"unknown state {wanted.state!r}; states are {', '.join(CONSENT_STATES)}")
        may_be, tenant = self._context.tenant_filter(wanted.tenant)
        if not may_be:
            return EntityPage([], None)
        rows = await self._context.fetch(
            "consents_newest", *position(cursor), limit, wanted.state, wanted.user, tenant, wanted.tool
        )
        return EntityPage([ENTITIES["consent"](row) for row in rows], next_cursor(rows, limit))


async def grant_in(
    context: DirectoryContext, transaction: Transaction, user_id: str, tool: str, *, agent: str | None,
    expires_in: timedelta,
) -> Entity:  # fmt: skip
    """Grant a consent in this transaction, which has the user's row locked: see `ConsentStore.grant`."""
    if not _TOOL.fullmatch(tool):
        raise Invalid(f"invalid tool {tool!r}: a name has 1 to 128 letters, digits and . _ -")
    if not timedelta(0) < expires_in <= LIFE_MAX:
        raise Invalid("the lifetime of a consent must be positive and at most 366 days")
    consent_id = "cns_" + random_digits(_ID_DIGITS)
    await transaction.fetch("end_consents", user_id, tool, None if agent is None else agent_id(agent))
    seconds = expires_in.total_seconds()
    await transaction.fetch("grant_consent", consent_id, user_id, tool, agent, context.actor.name, seconds)
    return ENTITIES["consent"]((await transaction.fetch("consent", consent_id))[0])
