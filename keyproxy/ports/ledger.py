"""The ports to the ledger: limits, and charges that repeats of a request share."""

from __future__ import annotations

from typing import Protocol

from keyproxy.limits.allowance import Allowance, Hold, Need
from keyproxy.model import Moment, TimeBudget
from keyproxy.mypyc_compat import mypyc_attr


@mypyc_attr(allow_interpreted_subclasses=True)
class Ledger:
    """Enforces limits. Contract: what is reserved and used of a window never exceeds its limit and credits."""

    def take(self, allowance: Allowance, now: Moment, need: Need | None = None, *, may_be_paid: bool = False) -> Hold:
        """Reserve what a request needs from every limit that applies to it, or nothing. Never waits.

        The hold has the most that the request can use, or what is left of it in every window if that is at least what
        it needs. None: the request is not metered; limits of routes and models do not apply. Raises Missing if a round
        trip to the ledger is needed, a Refusal if a limit is exceeded or the ledger is unavailable. `may_be_paid`: a
        Refusal for an exhausted window is provisional, and not counted.
        """
        raise NotImplementedError

    def check(
        self,
        allowance: Allowance,
        now: Moment,
        need: Need,
        paid: int | None = None,
        *,
        asks: bool,
        may_be_paid: bool = False,
    ) -> None:
        """Raise what `take` would raise. Reserves nothing, never waits.

        Before the body is read, `need` is one token (`Need(1, 1, route=...)`): what any such request needs. `paid`: the
        tokens that the request was charged before, see `take_again`. `asks`: raise Missing if a round trip to the ledger
        is needed; else use only its latest responses. `may_be_paid`: see `take`.
        """
        raise NotImplementedError

    def take_slots(self, allowance: Allowance, now: Moment, need: Need) -> Hold | None:
        """Reserve only the concurrency of a request, while its body is read. Never waits.

        `release` it just before `take`, which reserves it again, and when the request ends before that. None: nothing was
        reserved, because there is no such limit or the ledger has to be asked. Raises a Refusal if none is left.
        """
        raise NotImplementedError

    def per_request(self, allowance: Allowance, now: Moment, need: Need) -> tuple[int | None, int | None]:
        """The lowest limits of tokens and of money per request that apply to the need's route and models; None: none."""
        raise NotImplementedError

    def take_again(self, allowance: Allowance, now: Moment, need: Need | None, paid: int) -> Hold:
        """Like `take`, for a retry of a request that was charged `paid` tokens: reserves only what is beyond those."""
        raise NotImplementedError

    def trim(self, hold: Hold, tokens: int, spend: int) -> Hold:
        """Reduce a hold that was just taken to what the request will use at most."""
        raise NotImplementedError

    def extend(self, hold: Hold, tokens: int, spend: int = 0) -> Hold:
        """Add tokens and money to a hold. Raises what `take` raises, and then changes nothing."""
        raise NotImplementedError

    def release(self, hold: Hold) -> Hold:
        """End the concurrency of a hold when its request has ended. Returns the rest of the hold, to be settled later."""
        raise NotImplementedError

    def settle(self, hold: Hold, *, was_sent: bool, tokens: int = 0, spend: int = 0, is_repeat: bool = False) -> None:
        """Settle a hold, exactly once. `was_sent` False: the upstream received nothing, and nothing is charged.

        `tokens`, `spend`: what the request used, also beyond the hold. `is_repeat`: the request was charged before; this
        attempt is charged only these.
        """
        raise NotImplementedError


class Claims(Protocol):
    """Deduplicates charges of requests with an Idempotency-Key. All attempts together are charged as the largest one."""

    def add(self, hold: Hold, fingerprint: bytes, tokens: int, paid: int | None, *, spend: int = 0) -> None:
        """Settle the hold of an attempt that used these tokens and this money, in place of `Ledger.settle`. Never waits.

        `paid`: the value passed to `Ledger.take_again`, None if the hold comes from `take`.
        """
        ...

    async def paid(self, fingerprint: bytes, patience: TimeBudget) -> int | None:
        """The tokens that the request was charged in the last 24 hours; None if it was not charged.

        Raises a Refusal if the lookup fails or exceeds the request's time budget.
        """
        ...
