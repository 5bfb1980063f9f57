"""Approvals of calls: a person sees exactly what a call would send, and approves or denies it.

    pending -> approved | denied      a decision
    approved -> denied                the approval is withdrawn before its use

Proxies make the other changes of state: they request approvals, use them and give them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from keyproxy.ai.tools.tool import ADMIN, CONSENT
from keyproxy.config.tools.tool_settings import ApprovalSettings
from keyproxy.store.directory.approvals.consents import grant_in
from keyproxy.store.directory.approvals.pages import next_cursor, position
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import ENTITIES, Entity, EntityPage
from keyproxy.store.directory.errors import Conflict, Invalid, NotPermitted
from keyproxy.store.postgres.database import Transaction

PENDING: Final = "pending"
APPROVED: Final = "approved"
DENIED: Final = "denied"
USED: Final = "used"
EXPIRED: Final = "expired"

APPROVAL_STATES: Final = (PENDING, APPROVED, DENIED, USED, EXPIRED)

#: The states from which each decision leads to its own.
_FROM: Final = {APPROVED: (PENDING,), DENIED: (PENDING, APPROVED)}


@dataclass(frozen=True, slots=True)
class ApprovalFilter:
    """Which approvals to list. All given conditions apply. `state`: one of APPROVAL_STATES."""

    state: str | None = None
    user: str | None = None
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class ApprovalDecisions:
    """The operations on approvals. `rules`: for how long a decision is valid."""

    _context: DirectoryContext
    rules: ApprovalSettings

    async def get(self, approval_id: str) -> Entity:
        """Return one approval, with its `kind` and the `summary` of the call."""
        return await self._context.get("approval", approval_id)

    async def list_page(self, cursor: str | None, limit: int, wanted: ApprovalFilter | None = None) -> EntityPage:
        """List approvals, the newest first. `cursor`: the previous page's `next`, None for the first page."""
        wanted = wanted or ApprovalFilter()
        if wanted.state not in (None, *APPROVAL_STATES):
            raise Invalid(f"unknown state {wanted.state!r}; states are {', '.join(APPROVAL_STATES)}")
        may_be, tenant = self._context.tenant_filter(wanted.tenant)
        if not may_be:
            return EntityPage([], None)
        rows = await self._context.fetch(
            "approvals_newest", *position(cursor), limit, wanted.state, wanted.user, tenant
        )
        return EntityPage([ENTITIES["approval"](row) for row in rows], next_cursor(rows, limit))

    async def approve(self, approval_id: str, *, reason: str = "", consent_for: timedelta | None = None) -> Entity:
        """Let the call be made once within `use_seconds`, and return the approval. Again: nothing changes.

        `consent_for`: also grant a consent of the user to the tool for this agent, or any if the call was made by none;
        only for approvals of kind `consent`. It is returned as `consent`.
        """
        async with self._context.transaction() as transaction:
            approval = await self._hold(transaction, approval_id)
            if consent_for is not None and approval["kind"] != CONSENT:
                raise Invalid(
                    f"a tool of kind {approval['kind']} needs an approval of each call: no consent is possible"
                )
            if approval["state"] == APPROVED:
                return approval
            approval = await self._decide(transaction, approval, APPROVED, reason, seconds=self.rules.use_seconds)
            if consent_for is None:
                return approval
            consent = await grant_in(
                self._context, transaction, approval["user"], approval["tool"], agent=approval["agent"],
                expires_in=consent_for,
            )  # fmt: skip
            return {**approval, "consent": consent}

    async def deny(self, approval_id: str, *, reason: str = "") -> Entity:
        """Refuse the call for `pending_seconds`, also if it was approved and not used yet. Again: nothing changes."""
        async with self._context.transaction() as transaction:
            approval = await self._hold(transaction, approval_id)
            if approval["state"] == DENIED:
                return approval
            return await self._decide(transaction, approval, DENIED, reason, seconds=self.rules.pending_seconds)

    async def _hold(self, transaction: Transaction, approval_id: str) -> Entity:
        """Lock an approval that the actor may decide, and read it."""
        approval = await self._context.lock(transaction, "approval", approval_id)
        if approval["kind"] == ADMIN and self._context.tenant_id is not None:
            raise NotPermitted("an actor that is bound to a tenant cannot decide approvals of kind admin")
        return approval

    async def _decide(
        self, transaction: Transaction, approval: Entity, state: str, reason: str, *, seconds: int
    ) -> Entity:
        decided_by, states = self._context.actor.name, list(_FROM[state])
        done = await transaction.fetch(
            "decide_approval", approval["id"], state, decided_by, reason, float(seconds), states
        )
        now = ENTITIES["approval"]((await transaction.fetch("approval", approval["id"]))[0])
        if not done:
            raise Conflict(f"approval {approval['id']} is {now['state']} and cannot be {state}")
        return now
