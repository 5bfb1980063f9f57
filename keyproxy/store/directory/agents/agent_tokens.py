"""Agent tokens, as operators handle them: mint one from a key, show it, revoke it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from keyproxy.auth.minting import MintParent, MintRules, parse_mint_request
from keyproxy.ports.agent_token_mint import AgentTokenMint
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.directory.context import DirectoryContext
from keyproxy.store.directory.entities import Entity
from keyproxy.store.directory.errors import DelegationRefused, Invalid, TooManyTokens
from keyproxy.store.postgres.database import JoinedTransaction, StatementRunner, StoreUnavailable

TOKEN_ID: Final = re.compile(r"agt_[0-9A-Za-z]{22}")


class OperatorMint:
    """What a directory needs to mint tokens on behalf of operators."""

    def __init__(self, rules: MintRules) -> None:
        self.rules: Final = rules

    def minter(self, database: StatementRunner) -> AgentTokenMint:
        """The mint over a database, or over one transaction of it."""
        raise NotImplementedError

    def count(self) -> None:
        """Count a token that was minted."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class AgentTokenStore:
    """The operations on agent tokens. `mint` None: this directory does not mint."""

    _context: DirectoryContext
    _mint: OperatorMint | None

    async def mint(self, key_id: str, wish: Mapping[str, Any], *, act_for: str | None = None) -> Entity:
        """Mint a token from a key, which needs no `agents:mint`, and return it with its `token`.

        `wish`: `agent`, `role` or `scopes`, and optionally `token_budget`, `request_budget`, `ttl_seconds`, `audience`.
        `act_for`: the user that the key acts for. Raises NotFound, Invalid, DelegationRefused or TooManyTokens.
        """
        if self._mint is None:
            raise TypeError("this directory was made without the means to mint")
        await self._context.get("key", key_id)
        try:
            request = parse_mint_request(json.dumps(dict(wish)).encode(), self._mint.rules)
            async with self._context.transaction() as transaction:
                minter = self._mint.minter(JoinedTransaction(transaction))
                parent = MintParent(key_id, None, act_for, is_operator=True)
                minted = await minter.mint(parent, request, actor=self._context.actor.name)
        except Refusal as refusal:
            # A bound actor must not learn why a user is unusable: it may be another tenant's.
            raise _error_of(refusal, names_cause=self._context.tenant_id is None) from refusal
        self._mint.count()
        return minted.to_json()

    async def get(self, token_id: str) -> Entity:
        """Return one token, without its plaintext, which is not stored."""
        return await self._context.get("agent_token", token_id)

    async def revoke(self, token_id: str, reason: str) -> Entity:
        """Revoke a token permanently, and thereby those minted from it. A revoked token stays unchanged."""
        async with self._context.transaction() as transaction:
            await self._context.lock(transaction, "agent_token", token_id)
            await transaction.fetch("revoke_agent_token", token_id, reason)
        return await self.get(token_id)


def _error_of(refusal: Refusal, *, names_cause: bool) -> Exception:
    """The error of the directory for a refused mint."""
    text = (refusal.caller_text or refusal.reason.value.sentence).removesuffix(".")
    text = text[:1].lower() + text[1:]
    if refusal.reason in (Reason.REQUEST_MALFORMED, Reason.BODY_TOO_LARGE):
        return Invalid(text)
    if refusal.reason is Reason.DELEGATION_REFUSED:
        # Of the refusals for one member, only that for a role leaves the cause open.
        has_cause = names_cause and refusal.field in (None, "role") and refusal.detail
        return DelegationRefused(f"{text}: {refusal.detail}" if has_cause else text)
    if refusal.reason is Reason.QUOTA_EXHAUSTED:
        return TooManyTokens(text)
    return StoreUnavailable(refusal.detail or text)
