"""Serve the requests of routes that the proxy responds to itself: mint agent tokens.

    read the body -> check what needs no store -> take of all limits -> mint -> respond

The first three are part of the decision, which never waits. What is malformed, and what exceeds the authority of the
caller as far as its identity shows, is refused before anything is taken, even while the store is down. A token that
exists is charged as one request, even if its client has left; any other outcome releases what was taken.
"""

from __future__ import annotations

import logging
from typing import Final

from keyproxy.auth import minting
from keyproxy.auth.minting import MintRequest, MintRules
from keyproxy.decision.payments import Payments
from keyproxy.http import own_response
from keyproxy.http_messages import RequestHead
from keyproxy.limits.allowance import Need
from keyproxy.model import Grant, Identity, Missing, Moment, Permit
from keyproxy.ports.agent_token_mint import AgentTokenMint
from keyproxy.ports.exchange import Exchange
from keyproxy.reasons import Reason, Refusal

_log = logging.getLogger(__name__)


class Serving:
    """Mints agent tokens for the requests of one gateway."""

    def __init__(self, mint: AgentTokenMint, rules: MintRules) -> None:
        self._mint: Final = mint
        self._rules: Final = rules

    def decide(self, exchange: Exchange, head: RequestHead, grant: Grant, payments: Payments, *, now: Moment) -> Permit:
        """Decide whether to mint. Raises Missing until the body has arrived, a Refusal if the request is not admitted."""
        exchange.is_minting = True
        payments.release_slots(exchange)
        identity = grant.identity
        minting.check_parent(identity)
        allowance, need = identity.allowance, Need(0, 0, route=grant.route.name)
        request = exchange.mint_request
        if request is None:
            if allowance is not None:
                payments.check(exchange, allowance, need, now=now, asks=not exchange.is_complete)
            try:
                request = exchange.mint_request = self._read(exchange, head)
            except Missing:
                if allowance is not None:
                    payments.take_slots(exchange, allowance, need, now)
                raise
        minting.check_authority(identity, request, self._rules, now)
        if allowance is None:
            return Permit(grant)
        return Permit(grant, payments.take(exchange, allowance, need if allowance.has_selectors else None, now))

    def _read(self, exchange: Exchange, head: RequestHead) -> MintRequest:
        minting.check_head(head)
        if not exchange.is_complete:
            raise Missing(
                "body", lambda _patience: exchange.whole_body(minting.too_large(), bytes_max=minting.BODY_BYTES_MAX)
            )
        return minting.parse_mint_request(exchange.body, self._rules)

    async def respond(self, exchange: Exchange, identity: Identity, request: MintRequest, begun_mono: float) -> None:
        """Mint, and respond with the token or a refusal. Never raises."""
        try:
            token = await self._mint.mint(minting.parent_of(identity), request, actor=minting.actor_of(identity))
            # Only now: a mint that was refused or has failed is not charged.
            exchange.sent_mono = begun_mono
            exchange.respond(own_response.created(token.to_json()))
        except Refusal as refusal:
            exchange.refuse(refusal)
        except Exception:  # noqa: BLE001 - the outermost boundary of this task
            _log.exception("minting failed", extra={"request_id": exchange.request_id.decode("ascii")})
            exchange.refuse(Refusal(Reason.INTERNAL_ERROR))
