"""Charge requests with an Idempotency-Key once: the store records the charges, and is consulted when requests end.

Such a request is admitted like any other. When it ends, its concurrency slots are released at once, and a *claim* is
queued for the store in place of the charge. Claims are sent in batches, one batch at a time, every `settle_seconds`. The
first claim of a fingerprint is charged; a later one releases its units and is charged only the tokens that it used beyond
all earlier attempts. One charge covers a limited number of repeats in 24 hours: further ones are charged like first
attempts, and cover nothing themselves. A batch has a number and is resent unchanged until the store responds, and the
store keeps its last response: a batch that is sent twice counts once.

    add    a request has ended; what it holds is settled when the store has responded
    paid   before a refusal: was this request charged before? The answer uses up one of the repeats that are covered, so
           that no two replicas admit the same one; a repeat that is then refused or lost has used it up too

The invariant under any failure: an attempt is charged, or another attempt at the same request was. Until a claim is
settled, its units stay reserved in a lease like any other, so a process that dies is charged in full. A claim that the
store cannot decide is charged in full too.

Rejected: waiting for the store before a request is admitted. It would make each of these requests as slow as the
database, and would not distinguish two concurrent attempts any better.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from keyproxy.config import schema
from keyproxy.limits.allowance import Hold, share_of
from keyproxy.model import Moment, TimeBudget
from keyproxy.ports.ledger import Ledger
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.background import BackgroundTask
from keyproxy.store.housekeeping import Chore
from keyproxy.store.ledger.deadline import within
from keyproxy.store.outage import Outage
from keyproxy.store.postgres.database import StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

_BATCH_MAX: Final = 1_000

#: Claims that wait while the store is unavailable. If full, the next claim is charged in full without a lookup.
_WAITING_MAX: Final = 10_000

#: Fingerprints in one lookup. If full, further requests are refused as OVERLOADED.
_ASKED_MAX: Final = 1_000

_RETRY_SECONDS: Final = 0.2
_TEND_SECONDS: Final = 1_800.0
_TEND_RETRY_SECONDS: Final = 10.0
_TEND_PORTION: Final = 2_000


class Claim(NamedTuple):
    """One finished attempt at a request. `used` tokens; `paid`: what the lookup returned if it was admitted as a repeat.

    `hold` is what is left to settle. `since_mono`: when the attempt ended. `spend`: what it cost; a part of its tokens
    costs that part of it.
    """

    fingerprint: bytes
    used: int
    paid: int | None
    hold: Hold
    since_mono: float
    spend: int = 0


class Answer(NamedTuple):
    """What a claim is charged: one request if it `is_first`, and tokens."""

    is_first: bool
    charged: int


class Cover(NamedTuple):
    """A charge that covers repeats: the tokens it was charged, and how many of the requests in question it covers."""

    tokens: int
    repeats: int


class ClaimStore(Protocol):
    """The record of charges. All methods raise StoreUnavailable (or StoreConflict)."""

    async def claim(self, process: str, number: int, claims: Sequence[Claim]) -> Sequence[Answer] | None:
        """Process a batch once. The answers are in its order; None if a later batch was processed already."""
        ...

    async def cover(self, fingerprints: Sequence[bytes]) -> Mapping[bytes, Cover]:
        """Cover repeats, one fingerprint for each, by charges of the last 24 hours. These repeats are used up."""
        ...

    async def forget(self, portion: int) -> bool:
        """Delete up to `portion` expired charges. Return whether there may be more."""
        ...


_NO_COVER: Final = Cover(0, 0)


class Claims:
    """Queue claims and send them to the store. Implements the port Claims."""

    def __init__(
        self, store: ClaimStore, ledger: Ledger, config: schema.LedgerSettings, now: Callable[[], Moment]
    ) -> None:
        #: `repeats` that were charged no request, and claims that were charged `unasked`.
        self.counts = dict.fromkeys(("repeats", "unasked"), 0)
        self.down_because = ""
        #: Logs outages of the store.
        self.outage = Outage("the store")
        self._store = store
        self._ledger = ledger
        self._settle_seconds = config.settle_seconds
        # After that, a ledger in the same store has charged the expired leases already.
        self._patience_seconds = config.lease_seconds
        self._now = now
        self._process = secrets.token_hex(8)
        self._number = 0
        self._begun: list[Claim] = []
        self._waiting: deque[Claim] = deque()
        self._answered: deque[tuple[Claim, Answer]] = deque()
        self._asked: dict[bytes, list[asyncio.Future[int | None]]] = {}
        self._asking: dict[bytes, list[asyncio.Future[int | None]]] = {}
        self._wake = asyncio.Event()
        self._is_closed = False
        self.lasting = BackgroundTask("claims")
        self.forgetting = Chore("claims", "delete charges older than a day", portion=_TEND_PORTION)

    def start(self) -> None:
        """Start the background tasks."""
        self.lasting.start(self._converse, self._note_failure)
        self.lasting.start(self._tend_forever, pause_seconds=_TEND_SECONDS)

    async def close(self) -> None:
        """Settle everything. Claims that the store does not decide now are charged in full."""
        self._is_closed = True
        await self.lasting.end()
        for fingerprint, waiting in self._asking.items():
            self._asked.setdefault(fingerprint, []).extend(waiting)
        try:
            await self.tell()
        except (StoreUnavailable, StoreConflict) as error:
            self._note_failure(error)
        self._give_up(self._begun)
        self._give_up(self._waiting)
        self._begun = []
        self._waiting.clear()

    @property
    def pending(self) -> int:
        """How many claims wait for the store."""
        return len(self._begun) + len(self._waiting)

    # -- the path of a request

    def add(self, hold: Hold, fingerprint: bytes, tokens: int, paid: int | None, *, spend: int = 0) -> None:
        claim = Claim(fingerprint, tokens, paid, self._ledger.release(hold), self._now().mono_seconds, spend)
        if self._is_closed or self.pending >= _WAITING_MAX:
            self._give_up([claim])
        else:
            self._waiting.append(claim)

    async def paid(self, fingerprint: bytes, patience: TimeBudget) -> int | None:
        if self._is_closed:
            raise Refusal(Reason.LEDGER_UNAVAILABLE, "shutting down: the lookup of earlier charges is closed")
        if len(self._asked) >= _ASKED_MAX:
            raise Refusal(Reason.OVERLOADED, f"{len(self._asked)} requests are waiting for a lookup of earlier charges")
        answer: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._asked.setdefault(fingerprint, []).append(answer)
        self._wake.set()
        async with within(patience, self._now):
            return await answer

    # -- exchange with the store

    async def tell(self) -> None:
        """Send all claims, then run the pending lookups: so that these see the requests that have ended here.

        Raises StoreUnavailable; the batch is then sent again.
        """
        # Claims added meanwhile are sent the next time; otherwise a steady stream of them would starve the lookups.
        self._asking, self._asked = self._asked, {}
        self._settle_answered()
        untold = len(self._waiting)
        while self._begun or untold:
            if not self._begun:
                self._number += 1
                self._begun = [self._waiting.popleft() for _ in range(min(_BATCH_MAX, untold))]
                untold -= len(self._begun)
            try:
                answers = await self._store.claim(self._process, self._number, self._begun)
            except StoreConflict as error:
                # A retry would be rejected every time, and block all later claims.
                _log.error(
                    "the store rejected a batch of %d claims, charging them in full: %s", len(self._begun), error
                )
                answers = None
            begun, self._begun = self._begun, []
            if answers is None:
                self._give_up(begun)
                continue
            self._answered.extend(zip(begun, answers, strict=True))
            self._settle_answered()
        if self._asking:
            await self._look_up()
            self._asking = {}

    async def _look_up(self) -> None:
        wanted = [
            fingerprint for fingerprint, waiting in self._asking.items() for answer in waiting if not answer.done()
        ]
        found = await self._store.cover(wanted)
        for fingerprint, waiting in self._asking.items():
            tokens, left = found.get(fingerprint, _NO_COVER)
            for answer in waiting:
                if not answer.done():
                    answer.set_result(tokens if left > 0 else None)
                    left -= 1

    def _settle_answered(self) -> None:
        # One at a time: a failure to settle one does not affect the others.
        while self._answered:
            claim, (is_first, charged) = self._answered.popleft()
            self.counts["repeats"] += not is_first
            self._settle(claim, charged, is_repeat=not is_first)

    async def _converse(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settle_seconds):
                    await self._wake.wait()
            # Requests that arrive in this iteration of the event loop join this batch.
            await asyncio.sleep(0)
            self._wake.clear()
            if not (self._begun or self._waiting or self._asked or self._answered):
                continue
            try:
                await self.tell()
            except (StoreUnavailable, StoreConflict) as error:
                self._note_failure(error)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self.down_because = ""

    def _note_failure(self, error: Exception) -> None:
        self.outage.met(f"claims cannot be settled, retrying: {error or type(error).__name__}")
        self.down_because = str(error) or type(error).__name__
        for waiting in (*self._asking.values(), *self._asked.values()):
            for answer in waiting:
                if not answer.done():
                    answer.set_exception(Refusal(Reason.LEDGER_UNAVAILABLE, self.down_because))
        self._asking, self._asked = {}, {}
        too_old = self._now().mono_seconds - self._patience_seconds
        if self._begun and self._begun[0].since_mono <= too_old:
            # It is unknown whether the batch was processed: at worst a repeat is charged in full too.
            self._give_up(self._begun)
            self._begun = []
        while self._waiting and self._waiting[0].since_mono <= too_old:
            self._give_up([self._waiting.popleft()])

    def _give_up(self, claims: Iterable[Claim]) -> None:
        """Charge attempts in full."""
        for claim in claims:
            self.counts["unasked"] += 1
            is_repeat = claim.paid is not None
            tokens = max(0, claim.used - (claim.paid or 0))
            self._settle(claim, tokens, is_repeat=is_repeat)

    def _settle(self, claim: Claim, tokens: int, *, is_repeat: bool) -> None:
        spend = share_of(claim.spend, tokens, claim.used) if is_repeat else claim.spend
        self._ledger.settle(claim.hold, was_sent=True, tokens=tokens, spend=spend, is_repeat=is_repeat)

    async def _tend_forever(self) -> None:
        while True:
            is_done = await self.forgetting.finish(self._store.forget)
            await asyncio.sleep(_TEND_SECONDS if is_done else _TEND_RETRY_SECONDS)
