"""Counts of delegation: requests of keys that act for users, what was refused, and what was minted."""

from __future__ import annotations

from typing import Final

from keyproxy.model import LIVE, TEST
from keyproxy.ports.exchange import Exchange
from keyproxy.reasons import Reason

#: Kinds of refusals.
ACTING: Final = "acting"
MINT: Final = "mint"

#: Where agent tokens are minted: on a route of the proxy, or by an operator through the admin API.
ROUTE: Final = "route"
ADMIN: Final = "admin"

_REFUSED: Final = Reason.DELEGATION_REFUSED


class DelegationCounts:
    """Requests in which a key acted for a user, by mode; refusals by kind; agent tokens by where they were minted.

    All series start at 0. A proxy mints on its routes alone.
    """

    def __init__(self) -> None:
        self.requests: Final = dict.fromkeys((LIVE, TEST), 0)
        self.refusals: Final = dict.fromkeys((ACTING, MINT), 0)
        self.minted: Final = dict.fromkeys((ROUTE, ADMIN), 0)

    def add(self, exchange: Exchange) -> None:
        """Count an exchange that was refused as delegation, or whose identity has an actor, or that minted."""
        identity, is_minting = exchange.identity, exchange.is_minting
        if exchange.reason is _REFUSED:
            self.refusals[MINT if is_minting else ACTING] += 1
            if not is_minting:
                return
        if is_minting and exchange.sent_mono:
            self.minted[ROUTE] += 1
        if identity is not None and identity.actor_user_id is not None and identity.agent_token is None:
            self.requests[identity.mode] += 1
