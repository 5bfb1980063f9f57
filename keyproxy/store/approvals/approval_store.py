"""Approvals in the store: implements the port Approvals.

A claim is one statement: it uses the approval of the call, or reports why it cannot be used, or requests one. This
process chooses a random value for each claim; with it alone the approval can be given back. If the reply to a claim is
lost, whether the server stopped, the connection broke, the statement took too long or the request ended, nothing is
sent upstream, and the claim is given back.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import secrets
from collections.abc import Callable
from typing import Final, NamedTuple

from keyproxy.ai.tools.tool_call import ToolClaim
from keyproxy.auth.base62 import base62
from keyproxy.config.tools.tool_settings import ApprovalSettings
from keyproxy.model import Identity, Moment, TimeBudget
from keyproxy.ports.tools import ApprovalRequest, Approvals
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.approvals.consent_cache import ConsentCache
from keyproxy.store.approvals.release_queue import ReleaseQueue
from keyproxy.store.postgres.database import Database, Row, StoreConflict, StoreUnavailable
from keyproxy.store.postgres.times import time_text

_log = logging.getLogger(__name__)

#: How many requests may claim at once, including those that wait for a connection.
_CLAIMING_MAX: Final = 1_000

_CLAIM_BYTES: Final = 16
_ID_DIGITS: Final = 22

#: Outcomes of a claim that no approval caused.
_UNAVAILABLE: Final = {
    "gone": "the user does not exist in the tenant any more",
    "busy": "the approval, its user or its tenant is locked",
}


class _ClaimAttempt(NamedTuple):
    """`approval_id`: of the row that is requested if there is none. `claim`: the value that authorises giving back."""

    approval_id: str
    claim: bytes


class ApprovalStore(Approvals):
    """Claims approvals and gives them back: see the module. `rules` may change."""

    def __init__(
        self,
        database: Database,
        main: Database,
        consents: ConsentCache,
        now: Callable[[], Moment],
        *,
        rules: ApprovalSettings | None = None,
    ) -> None:
        """`main`: the part of the store that is in continuous use, and notices an outage and its end."""
        self.rules: ApprovalSettings = rules or ApprovalSettings()
        self.consents = consents
        self.releases = ReleaseQueue(database, now)
        #: How many claims had each outcome, by the kind of approval. `pending`: those that requested one, and not
        #: their repetitions.
        self.outcomes: collections.Counter[tuple[str, ...]] = collections.Counter()
        #: Called with the seconds from the request for an approval to its decision, when it is used.
        self.observe_wait: Callable[[float], None] = lambda _seconds: None
        self._database = database
        self._main = main
        self._now = now
        self._claiming = 0

    def has_consent(self, identity: Identity, tool: str, now: Moment, *, is_first_lookup: bool = True) -> bool:
        return self.consents.has_consent(identity, tool, now, is_first_lookup=is_first_lookup)

    async def claim(self, request: ApprovalRequest, patience: TimeBudget) -> ToolClaim:
        if self._main.is_down:
            raise self._unavailable(request, self._main.down_because)
        if self._claiming >= _CLAIMING_MAX:
            raise Refusal(Reason.OVERLOADED, f"{_CLAIMING_MAX} approvals are being claimed")
        attempt = _ClaimAttempt(_new_id(), secrets.token_bytes(_CLAIM_BYTES))
        self._claiming += 1
        try:
            row = await self._replied(request, attempt, patience)
        finally:
            self._claiming -= 1
        if row["outcome"] in _UNAVAILABLE:
            raise self._unavailable(request, _UNAVAILABLE[row["outcome"]])
        if row["outcome"] != "pending" or row["approval_id"] == attempt.approval_id:
            self.outcomes[request.kind, row["outcome"]] += 1
        if row["outcome"] != "used":
            raise _refusal(row)
        if row["waited_seconds"] is not None:
            self.observe_wait(row["waited_seconds"])
        return ToolClaim(row["approval_id"], attempt.claim)

    def give_back(self, claim: ToolClaim) -> None:
        self.releases.add(claim.value, f"approval {claim.approval_id}", within_seconds=self.rules.use_seconds)

    def continue_from(self, before: ApprovalStore) -> None:
        """Take over the counts of the store before this one, and what its requests in flight give back after its end."""
        self.outcomes, self.observe_wait = before.outcomes, before.observe_wait
        self.consents.counts = before.consents.counts
        self.releases.continue_from(before.releases)

    def start(self) -> None:
        """Start giving back."""
        self.releases.start()

    async def close(self) -> None:
        """Give back what is waiting, in a bounded time."""
        await self.releases.close()
        await self.consents.close()

    async def _replied(self, request: ApprovalRequest, attempt: _ClaimAttempt, patience: TimeBudget) -> Row:
        """The reply to a claim. Without one, the claim is given back. Raises a Refusal."""
        began = self._now().mono_seconds
        row: Row | None = None
        try:
            async with asyncio.timeout(patience.seconds_left):
                (row,) = await self._database.fetch("claim_approval", *self._arguments(request, attempt))
            return row
        except TimeoutError as error:
            raise self._unavailable(request, "timeout: the store did not respond in time") from error
        except StoreUnavailable as error:
            raise self._unavailable(request, str(error)) from error
        except StoreConflict as error:
            _log.error("the store refused the request for an approval of tool %s: %s", request.tool, error)
            raise self._unavailable(request, str(error)) from error
        finally:
            patience.seconds_left = max(0.0, patience.seconds_left - (self._now().mono_seconds - began))
            # Also if the request was cancelled.
            if row is None:
                self.releases.add(
                    attempt.claim,
                    f"a claim of tool {request.tool}",
                    within_seconds=self.rules.use_seconds,
                    digest=request.digest,
                )

    def _arguments(self, request: ApprovalRequest, attempt: _ClaimAttempt) -> tuple[object, ...]:
        identity, rules = request.identity, self.rules
        agent = None if identity.agent_token is None else identity.agent_token.agents[0]
        return (
            attempt.approval_id, request.digest, identity.tenant_id, identity.user_id, identity.key_id, agent,
            request.kind, request.tool, request.summary.decode("utf-8"), request.client, attempt.claim,
            float(rules.pending_seconds), rules.pending_max,
        )  # fmt: skip

    def _unavailable(self, request: ApprovalRequest, why: str) -> Refusal:
        self.outcomes[request.kind, "unavailable"] += 1
        return Refusal(Reason.APPROVALS_UNAVAILABLE, f"approval of tool {request.tool}: {why}")


def _new_id() -> str:
    """A new, random id of an approval."""
    return "apr_" + base62(int.from_bytes(secrets.token_bytes(16)), _ID_DIGITS).decode("ascii")


def _refusal(row: Row) -> Refusal:
    state: str = row["outcome"]
    if state == "limit":
        detail = "the user has as many pending approvals as it may have"
        return Refusal(Reason.APPROVAL_REQUIRED, detail, members={"approval_state": state})
    members = {
        "approval_id": row["approval_id"],
        "approval_state": state,
        "approval_expires_at": time_text(row["expires_at"]),
    }
    reason = Reason.APPROVAL_DENIED if state == "denied" else Reason.APPROVAL_REQUIRED
    return Refusal(reason, f"approval {row['approval_id']} is {state}", members=members)
