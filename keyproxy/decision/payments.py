"""Take from limits, settle with them, and spare a retry what an earlier attempt of the same request was charged.

A request with an Idempotency-Key may have been charged before. A refusal for an exhausted window is then provisional,
until the earlier charge has been looked up.
"""

from __future__ import annotations

from typing import Final

from keyproxy.http.idempotency_key import Fingerprint
from keyproxy.limits.allowance import Allowance, Hold, Need
from keyproxy.model import Missing, Moment, TimeBudget
from keyproxy.ports.exchange import Exchange
from keyproxy.ports.ledger import Claims, Ledger
from keyproxy.reasons import Refusal


class Payments:
    """What the requests of one gateway take from the ledger."""

    __slots__ = ("_claims", "_ledger")

    def __init__(self, ledger: Ledger, claims: Claims) -> None:
        self._ledger: Final = ledger
        self._claims: Final = claims

    def check(self, exchange: Exchange, allowance: Allowance, need: Need, *, now: Moment, asks: bool) -> None:
        """Like the ledger's `check`, but a retry of a charged request is not refused for what it was charged already."""
        fingerprint = exchange.fingerprint
        if fingerprint is None:
            self._ledger.check(allowance, now, need, asks=asks)
            return
        try:
            self._ledger.check(
                allowance, now, need, fingerprint.paid, asks=asks, may_be_paid=not fingerprint.is_looked_up
            )
        except Refusal as refusal:
            raise self._unless_paid(exchange, fingerprint, refusal) from None

    def take(self, exchange: Exchange, allowance: Allowance, need: Need | None, now: Moment) -> Hold:
        """Like the ledger's `take`, but a retry of a charged request is not refused for what it was charged already."""
        fingerprint = exchange.fingerprint
        if fingerprint is None:
            return self._ledger.take(allowance, now, need)
        if fingerprint.paid is not None:
            return self._ledger.take_again(allowance, now, need, fingerprint.paid)
        try:
            return self._ledger.take(allowance, now, need, may_be_paid=not fingerprint.is_looked_up)
        except Refusal as refusal:
            raise self._unless_paid(exchange, fingerprint, refusal) from None

    def take_slots(self, exchange: Exchange, allowance: Allowance, need: Need, now: Moment) -> None:
        """Reserve only the concurrency of a request, while its body arrives and is read."""
        exchange.slots = self._ledger.take_slots(allowance, now, need)

    def release_slots(self, exchange: Exchange) -> None:
        """Release what `take_slots` has reserved."""
        if exchange.slots is not None:
            self._ledger.release(exchange.slots)
            exchange.slots = None

    def settle(self, exchange: Exchange, hold: Hold, *, tokens: int, spend: int) -> None:
        """Charge the hold of an exchange that has ended if any of the request was sent, else release it."""
        fingerprint, was_sent = exchange.fingerprint, exchange.sent_mono > 0.0
        if fingerprint is not None and was_sent and exchange.is_complete:
            self._claims.add(hold, fingerprint.digest(), tokens, fingerprint.paid, spend=spend)
        else:
            self._ledger.settle(hold, was_sent=was_sent, tokens=tokens, spend=spend)

    def _unless_paid(self, exchange: Exchange, fingerprint: Fingerprint, refusal: Refusal) -> Exception:
        """The refusal, or a Missing for the earlier charge if the request may have been charged before."""
        if not fingerprint.may_be_paid(refusal.reason):
            return refusal
        return Missing("payment", lambda patience: self._look_up(exchange, fingerprint, refusal, patience))

    async def _look_up(
        self, exchange: Exchange, fingerprint: Fingerprint, spent: Refusal, patience: TimeBudget
    ) -> None:
        """Look up an earlier charge once the whole request has arrived. A body too large to buffer is refused."""
        await exchange.whole_body(spent)
        if not exchange.is_over:
            fingerprint.paid = await self._claims.paid(fingerprint.digest(), patience)
            fingerprint.is_looked_up = True
