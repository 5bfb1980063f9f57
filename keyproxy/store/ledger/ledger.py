"""The ledger as requests use it: take units from leases in memory, and wait for missing ones within the time budget.

Two parts do the work: the lease table holds the leases, and the ledger client has them granted and settled. This module
decides how long a request waits for units that other proxies hold, which refusals are counted, and when no hold is open
any more.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

from keyproxy.config import schema
from keyproxy.limits.allowance import Allowance, Hold, Need
from keyproxy.limits.lease_sync import Short
from keyproxy.limits.ledger.report_pace import LINES_PER_SECOND
from keyproxy.limits.ledger_protocol import REFUSALS
from keyproxy.model import Missing, Moment, TimeBudget
from keyproxy.ports import ledger as ledger_port
from keyproxy.reasons import SPENT, Reason, Refusal
from keyproxy.store.ledger.backend import LedgerBackend
from keyproxy.store.ledger.deadline import within
from keyproxy.store.ledger.ledger_client import LedgerClient

#: How long a request waits for units that are idle in other proxies' leases; they are returned within a second.
_OTHERS_SECONDS: Final = 1.6
_FIRST_PAUSE_SECONDS: Final = 0.03
_PAUSE_SECONDS_MAX: Final = 0.3


class Counts:
    """Requests that took units, and waits for the ledger. Attributes, because every request increments one."""

    __slots__ = ("taken", "waited")

    def __init__(self) -> None:
        self.taken = self.waited = 0

    def by_name(self) -> dict[str, int]:
        """The current values."""
        return {"taken": self.taken, "waited": self.waited}


class Ledger(ledger_port.Ledger):
    """Take, check, extend and settle holds. Implements the port Ledger."""

    def __init__(
        self,
        backend: LedgerBackend,
        ledger: schema.LedgerSettings,
        now: Callable[[], Moment],
        *,
        lines_per_second: float = LINES_PER_SECOND,
    ) -> None:
        self.conversation = LedgerClient(backend, ledger, now, lines_per_second=lines_per_second)
        self._table = self.conversation.lease_table
        self._sync = self.conversation.lease_sync
        self.counts = Counts()
        #: Requests that a limit refused, by its policy and the reason, see `LimitReason`.
        self.refusals: dict[tuple[str, ...], float] = dict.fromkeys(REFUSALS, 0)
        self._now = now
        self._open_holds = 0
        #: Set when the last hold is settled; None if nothing waits for that.
        self._settled: asyncio.Event | None = None

    def start(self) -> None:
        """Start the ledger client."""
        self.conversation.start()

    async def close(self) -> None:
        """Settle everything, return all leases, and stop the ledger client."""
        await self.conversation.close()

    async def all_settled(self) -> None:
        """Wait until all holds are settled."""
        while self._open_holds:
            self._settled = self._settled or asyncio.Event()
            await self._settled.wait()

    # -- the path of a request

    def take(self, allowance: Allowance, now: Moment, need: Need | None = None, *, may_be_paid: bool = False) -> Hold:
        try:
            hold = self._table.take(allowance, now.mono_seconds, need)
        except Short as short:
            raise self._missing(short, lambda: self._table.check(allowance, self._mono(), need)) from None
        except Refusal as refusal:
            if not (may_be_paid and refusal.reason in SPENT):
                self._count(refusal)
            raise
        self.counts.taken += 1
        self._open_holds += 1
        return hold

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
        if not asks and not self._table.has_refused(allowance, now.mono_seconds, need):
            return
        try:
            self._table.check(allowance, now.mono_seconds, need, paid)
        except Short as short:
            if asks:
                raise self._missing(short, lambda: self._table.check(allowance, self._mono(), need, paid)) from None
        except Refusal as refusal:
            if not (may_be_paid and refusal.reason in SPENT):
                self._count(refusal)
            raise

    def take_slots(self, allowance: Allowance, now: Moment, need: Need) -> Hold | None:
        try:
            return self._table.take_slots(allowance, now.mono_seconds, need)
        except Refusal as refusal:
            self._count(refusal)
            raise

    def per_request(self, allowance: Allowance, now: Moment, need: Need) -> tuple[int | None, int | None]:
        return self._table.per_request(allowance, now.mono_seconds, need)

    def trim(self, hold: Hold, tokens: int, spend: int) -> Hold:
        return self._table.trim(hold, tokens, spend)

    def take_again(self, allowance: Allowance, now: Moment, need: Need | None, paid: int) -> Hold:
        try:
            hold = self._table.take_again(allowance, now.mono_seconds, need, paid)
        except Short as short:
            raise self._missing(short, lambda: self._table.check(allowance, self._mono(), need, paid)) from None
        except Refusal as refusal:
            self._count(refusal)
            raise
        self.counts.taken += 1
        self._open_holds += 1
        return hold

    def extend(self, hold: Hold, tokens: int, spend: int = 0) -> Hold:
        now = self._mono()
        try:
            return self._table.extend(hold, tokens, now, spend)
        except Short as short:
            need = short
            raise Missing(
                "lease",
                lambda patience: self._bring(
                    need, lambda: self._table.check_extension(hold, tokens, self._mono(), spend), patience
                ),
            ) from None

    def release(self, hold: Hold) -> Hold:
        return self._table.release(hold)

    def settle(self, hold: Hold, *, was_sent: bool, tokens: int = 0, spend: int = 0, is_repeat: bool = False) -> None:
        self._open_holds -= 1
        if not self._open_holds and self._settled is not None:
            self._settled.set()
            self._settled = None
        self._table.settle(hold, was_sent=was_sent, tokens=tokens, spend=spend, is_repeat=is_repeat)

    # -- what is missing

    def _missing(self, short: Short, check: Callable[[], object]) -> Missing:
        if self.conversation.down_because:
            # Each such request has it requested again, but does not wait for the response.
            self._sync.request(short)
            raise Refusal(Reason.LEDGER_UNAVAILABLE, self.conversation.down_because)
        return Missing("lease", lambda patience: self._bring(short, check, patience))

    def _count(self, refusal: Refusal) -> None:
        if refusal.limit is not None:
            # Without the selector: models and routes would make a series each.
            labels = refusal.limit.policy.name.partition("@")[0], refusal.limit_reason.value
            self.refusals[labels] = self.refusals.get(labels, 0) + 1

    async def _bring(self, short: Short, check: Callable[[], object], patience: TimeBudget) -> None:
        """Query the ledger until the request can be decided. Raises a Refusal if it does not respond in time."""
        self.counts.waited += 1
        async with within(patience, self._now):
            await self._ask(short, check, self._mono() + patience.seconds_left)

    async def _ask(self, short: Short, check: Callable[[], object], ends_mono: float) -> None:
        """Query until the request can be decided, or the wait for other proxies is over. Ends before `ends_mono`."""
        give_up, pause = math.inf, _FIRST_PAUSE_SECONDS
        while True:
            if self._sync.may_request(short, self._mono()):
                await self.conversation.ask(short)
            # Starts with the first response: a slow ledger is not a refusal.
            give_up = min(give_up, self._mono() + _OTHERS_SECONDS)
            try:
                check()
            except Short as still:
                short = still
            except Refusal:
                return
            else:
                return
            now = self._mono()
            if now >= give_up or now + pause >= ends_mono:
                self._sync.mark_exhausted(short, now)
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSE_SECONDS_MAX)

    def _mono(self) -> float:
        return self._now().mono_seconds
