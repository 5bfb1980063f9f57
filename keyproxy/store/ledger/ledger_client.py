"""The ledger client: one task exchanges messages with the ledger for this process, one message at a time.

A message reports what was used and returned, and requests what is needed. The client sends one as soon as a request waits
or a lease runs low; everything else is reported every `settle_seconds`. An idle user costs nothing: no lease, no line.
`LeaseSync` builds the lines and applies the replies; this module decides when to send and how to handle a missing
response. The process identifies itself as a *holder*. When the ledger has ended the holder, or may have, the
process continues under a new one.

While the ledger is unavailable, leases can be spent until they lapse, `lease_seconds` after the last response. Then
`unreachable` decides: `refuse` (503, never 429), or `allow`: what is taken then is settled when the ledger is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
from collections.abc import Callable, Sequence
from typing import Final

from keyproxy.config import schema
from keyproxy.limits.lease_sync import LeaseSync, Short
from keyproxy.limits.lease_table import LeaseTable
from keyproxy.limits.ledger.report_pace import LINES_PER_SECOND, ReportPace
from keyproxy.limits.ledger_protocol import LeaseReport
from keyproxy.model import Moment
from keyproxy.reasons import Reason, Refusal
from keyproxy.store.background import BackgroundTask
from keyproxy.store.housekeeping import Chore
from keyproxy.store.ledger.backend import REAP_PORTION, LedgerBackend
from keyproxy.store.ledger.reap_age import ReapAge
from keyproxy.store.outage import Outage
from keyproxy.store.postgres.database import StoreConflict, StoreUnavailable

_log = logging.getLogger(__name__)

#: Lines in one message. More lines are sent in several messages.
_LINES_MAX: Final = 200

#: If this process has many leases, how long one that runs low waits for others to join its message: a message of one
#: line costs as much as 20 more lines.
_JOIN_SECONDS: Final = 0.1

_RETRY_SECONDS: Final = 0.2

#: How often to retry an unavailable ledger even if there is nothing to send; otherwise its recovery would go unnoticed.
_LOOK_SECONDS: Final = 1.0

_CLOSED: Final = "the ledger is closed"

#: A lease expires a little earlier here than in the ledger, because clocks run at slightly different speeds.
_VALID_SHARE: Final = 0.95

#: Every proxy looks for dead holders, this many times per `lease_seconds`.
_REAPS_PER_LEASE: Final = 4.0

#: Holders deleted in one statement.
_FORGET_PORTION: Final = 1_000

#: A waiting request: its future, and what it is short of.
_Waiting = tuple[asyncio.Future[None], Short]


class LedgerClient:
    """Exchange messages with the ledger about the leases of this process."""

    def __init__(
        self,
        backend: LedgerBackend,
        ledger: schema.LedgerSettings,
        now: Callable[[], Moment],
        *,
        lines_per_second: float = LINES_PER_SECOND,
    ) -> None:
        """`lines_per_second`: how many reports are sent as long as the process has many leases, see `ReportPace`."""
        self.counts = dict.fromkeys(("round_trips", "failures"), 0)
        #: Called after every round trip, with its duration in seconds.
        self.observe: Callable[[float], None] = lambda _seconds: None
        self.lease_sync = LeaseSync(
            self._wake_up,
            wake_soon=self._wake_up_soon,
            # Only PostgreSQL recalls the idle units of leases that are reported rarely.
            pace=ReportPace(ledger.settle_seconds, lines_per_second if ledger.backend == "postgres" else 0.0),
        )
        self.lease_table = LeaseTable(self.lease_sync)
        #: Why the ledger is unavailable; empty if it responds.
        self.down_because = ""
        #: Logs outages: the store's if the ledger is in the store, otherwise the ledger's own.
        self.outage = Outage("the ledger")
        self._is_main = True
        self._backend = backend
        self._lease_seconds = ledger.lease_seconds
        self._settle_seconds = ledger.settle_seconds
        self._is_lenient = ledger.unreachable == "allow"
        self._now = now
        #: When the latest message that got a response was sent.
        self._answered = now()
        self._wake = asyncio.Event()
        self._replace_holder()
        self._settles = False
        self.lasting = BackgroundTask("ledger")
        self.reaping = Chore("reap", "end holders that have died", portion=REAP_PORTION)
        self.reap_age = ReapAge(ledger.lease_seconds, now)
        self.forgetting = Chore("holders", "delete holders that ended long ago", portion=_FORGET_PORTION)
        self._waiting: list[_Waiting] = []
        #: Requests that wait for the response to the message in flight.
        self._listening: list[_Waiting] = []
        self._is_closed = False
        self._unsettled_since_mono = now().mono_seconds
        #: Since when a message has been due without a response.
        self._unheard_since_mono = math.inf

    def share(self, outage: Outage) -> None:
        """Report outages as the store's: the ledger is in the store."""
        self.outage, self._is_main = outage, False

    def start(self) -> None:
        """Start the background tasks."""
        self.lasting.start(self._converse, self._broken_off)
        self.lasting.start(self._reap)
        self.lasting.start(self._forget)

    async def close(self) -> None:
        """Settle everything, return all leases, and stop."""
        self._is_closed = True
        await self.lasting.end()
        for answer, _ in (*self._listening, *self._waiting):
            if not answer.done():
                answer.set_exception(Refusal(Reason.LEDGER_UNAVAILABLE, _CLOSED))
        try:
            # Report, close, and once more for what was granted in between.
            for _ in range(3):
                if self._serial and self.lease_sync.has_leases:
                    self.lease_sync.gather(self._mono(), is_last=True)
                    while (lines := self._lines()) and self._serial:
                        await self._speak(lines)
            # A holder without leases whose time has expired rests in the ledger: there is nothing to end.
            if self._serial and (self.lease_sync.has_leases or self._mono() < self.lease_sync.valid_until_mono):
                await self._backend.end(self._holder)
        except (StoreUnavailable, StoreConflict) as error:
            _log.warning("could not return leases; they will be charged when they expire: %s", error)
        await self._backend.close()

    async def ask(self, short: Short) -> None:
        """Request from the ledger what a request is short of, and wait for the response, whatever it is.

        Raises a Refusal (LEDGER_UNAVAILABLE) if there is no response.
        """
        self.lease_sync.request(short)
        if self._is_closed:
            raise Refusal(Reason.LEDGER_UNAVAILABLE, _CLOSED)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((answer, short))
        self._wake_up()
        await answer

    @property
    def holder(self) -> str:
        """The name of this process in the ledger, until the ledger ends it."""
        return self._holder

    def recall(self, leases: Sequence[int]) -> None:
        """Return the idle units of these leases of this holder: another process is short of them."""
        self.lease_sync.recall(leases, self._mono())

    def unsettled_seconds(self) -> float:
        """The age of the oldest spending that the ledger may not have confirmed; 0.0 if everything is confirmed."""
        return max(0.0, self._mono() - self._unsettled_since_mono) if self.lease_sync.has_news else 0.0

    @property
    def has_lapsed(self) -> bool:
        """Whether leases have expired: a message has been without a response for longer than a lease lasts."""
        return self._mono() - self._unheard_since_mono >= self._lease_seconds

    # -- sending messages

    def _wake_up(self) -> None:
        self._wake.set()

    def _wake_up_soon(self) -> None:
        if self.lease_sync.pace.is_slow:
            asyncio.get_running_loop().call_later(_JOIN_SECONDS, self._wake_up)
        else:
            self._wake_up()

    async def _converse(self) -> None:
        settle_at = heartbeat_at = self._mono()
        while True:
            now = self._mono()
            if self.lease_sync.has_leases or self.down_because:
                # Not wait_for: before Python 3.12 it loses a cancellation that coincides with the wake-up.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, min(settle_at, heartbeat_at) - now)):
                        await self._wake.wait()
            else:
                await self._wake.wait()
            # Requests that arrive in this iteration of the event loop join this message.
            await asyncio.sleep(0)
            self._wake.clear()
            now = self._mono()
            if now >= settle_at:
                settle_at = now + self._settle_seconds
                self.lease_sync.gather(now)
            lines = self._lines()
            self._listening, self._waiting = self._waiting, []
            if len(lines) == _LINES_MAX:
                # Requests whose lines are in a later message wait for that one.
                everyone, self._listening = self._listening, []
                for one in everyone:
                    (self._waiting if self.lease_sync.needs_sync(one[1]) else self._listening).append(one)
                self._wake.set()
            if not (lines or self._listening or now >= heartbeat_at):
                continue
            heartbeat_at = now + self._lease_seconds / 3
            self._unheard_since_mono = min(now, self._unheard_since_mono)
            try:
                settles_seconds = await self._speak(lines)
            except (StoreUnavailable, StoreConflict) as error:
                self._failed(error)
                heartbeat_at = min(heartbeat_at, now + _LOOK_SECONDS)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                if settles_seconds:
                    self._failed(StoreUnavailable("the ledger has failed over and waits for lease reports"))
                    heartbeat_at = min(heartbeat_at, now + _LOOK_SECONDS)
                else:
                    self._heard()

    async def _speak(self, lines: Sequence[LeaseReport]) -> float:
        """Send lines and apply the replies. Raises StoreUnavailable; the lines are then sent again.

        Return 0, or for how many seconds the ledger grants nothing because it has lost its latest history.
        """
        now = self._now()
        asked = now.mono_seconds
        self._serial += 1
        settles_seconds, is_heard = 0.0, False
        try:
            replies = await self._backend.sync(self._holder, self._serial, lines)
            heard = self._mono()
            if replies is not None:
                valid_seconds = self._lease_seconds * _VALID_SHARE
                settles_seconds = self.lease_sync.apply(
                    lines, replies, asked, valid_seconds=valid_seconds, received_mono=heard
                )
            is_heard = True
        finally:
            if not is_heard:
                self.counts["failures"] += 1
                self.lease_sync.resend(lines)
        self._unheard_since_mono = math.inf
        self._answered = now
        self.counts["round_trips"] += 1
        self.observe(heard - asked)
        if replies is None:
            if self.lease_sync.has_leases:
                _log.warning(
                    "the ledger has ended the leases of this process: they had expired and are charged in full"
                )
            self.lease_sync.end_holder()
            self._replace_holder()
            return 0.0
        if settles_seconds and not self._settles:
            self.lease_sync.resend_all()
        self._settles = settles_seconds > 0.0
        self._unsettled_since_mono = heard
        return settles_seconds

    def _lines(self) -> list[LeaseReport]:
        """The lines of the next message.

        If this holder may have ended by now, at least one line claims a lease, so that the response shows it. Either
        clock is sufficient evidence: the other one may have stood still while the machine was suspended.
        """
        now, answered = self._now(), self._answered
        may_have_ended = (
            now.mono_seconds - answered.mono_seconds >= self._lease_seconds
            or abs(now.wall_seconds - answered.wall_seconds) >= self._lease_seconds
        )
        return self.lease_sync.lines(now.mono_seconds, _LINES_MAX, must_claim=may_have_ended)

    def _replace_holder(self) -> None:
        self._holder, self._serial = secrets.token_hex(12), 0

    def _heard(self) -> None:
        if self._is_main and self.outage.is_on:
            self.outage.responded()
        self.down_because = ""
        self.lease_table.is_lenient = False
        listening, self._listening = self._listening, []
        for answer, _ in listening:
            if not answer.done():
                answer.set_result(None)

    def _broken_off(self, error: Exception) -> None:
        """Fail all waiting requests after a defect has ended the task; otherwise they would wait for their timeout."""
        self._unheard_since_mono = min(self._mono(), self._unheard_since_mono)
        self._listening += self._waiting
        self._waiting = []
        self._failed(error)
        self.lease_sync.resend()
        # The review queue may have set the event already, and would not set it again.
        self._wake_up()

    def _failed(self, error: Exception) -> None:
        self.outage.met(f"the ledger is unavailable: {error or type(error).__name__}", is_main=self._is_main)
        self.down_because = str(error) or type(error).__name__
        # Remaining leases are spent first; only requests without one wait for this response.
        self.lease_table.is_lenient = self._is_lenient
        listening, self._listening = self._listening, []
        for answer, _ in listening:
            if answer.done():
                continue
            if self._is_lenient:
                answer.set_result(None)
            else:
                answer.set_exception(Refusal(Reason.LEDGER_UNAVAILABLE, self.down_because))

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / _REAPS_PER_LEASE)
            if self._is_main or not self.outage.is_on:
                self.reap_age.warn_if_late()
            if await self.reaping.finish(self._backend.reap):
                self.reap_age.finished()

    async def _forget(self) -> None:
        """Delete old holders. Separate from reaping dead ones, so that neither waits for the other."""
        while True:
            await asyncio.sleep(self._lease_seconds)
            if not self.reaping.failing_because:
                await self.forgetting.finish(self._backend.forget)

    def _mono(self) -> float:
        return self._now().mono_seconds
