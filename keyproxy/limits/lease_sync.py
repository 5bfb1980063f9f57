"""Synchronise this process's leases with the ledger: build the lines to send, apply the replies.

A lease is opened with its first request to the ledger, reported whenever it changed, and closed once all of it was used
or returned. Sans-IO, one message at a time: the next lines are built after the last ones were answered or lost.
`ReviewQueue` knows which leases to look at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

from keyproxy.limits.calendar_windows import span
from keyproxy.limits.lease import IDLE_SECONDS, Lease
from keyproxy.limits.ledger.lease_line import line_of
from keyproxy.limits.ledger.report_pace import ReportPace
from keyproxy.limits.ledger_protocol import CONCURRENCY, REPORTS_PER_SECOND, LeaseGrant, LeaseReport, Pool, Window
from keyproxy.limits.pool_leases import PoolLeases
from keyproxy.limits.review_queue import ReviewQueue

#: How long the ledger's "none left" is trusted; for a rate the reply includes the wait.
_EMPTY_SECONDS: Final = 1.0
_VAIN_SECONDS: Final = 0.5

#: So many pauses before the end of a window with many holders, a report also requests units of the next one. It is sent
#: within 1.4 pauses of the one before.
_PREFETCH_PAUSES: Final = 1.5

#: A reply that has not arrived after this time is lost.
_LOST_SECONDS: Final = 2.0

#: How long a closed lease is remembered: a ledger that fails over may have lost the close.
_REMEMBERED_SECONDS: Final = 30.0


class LeaseShortage(NamedTuple):
    """A lease with less than a request needs. `most` 0: the request waits for the state of its window."""

    lease: Lease
    least: int
    most: int


class Short(Exception):
    """The request needs more than the leases have free: a ledger request is necessary for these."""

    def __init__(self, needs: Sequence[LeaseShortage]) -> None:
        super().__init__(", ".join(need.lease.window.policy for need in needs))
        self.needs = needs


class LeaseSync:
    """The state that this process synchronises with the ledger."""

    def __init__(
        self, wake: Callable[[], None], *, wake_soon: Callable[[], None] | None = None, pace: ReportPace | None = None
    ) -> None:
        """`wake` is called when a ledger request is due, at most once until it is made.

        `wake_soon`: the same for a request that may wait for others to join its message.
        """
        self.pace: Final = pace or ReportPace()
        #: When the leases end, unless the ledger replies again. After that the ledger may have charged them.
        self.valid_until_mono = 0.0
        self.reviews = ReviewQueue(wake, wake_soon)
        self._pools: WeakValueDictionary[Pool, PoolLeases] = WeakValueDictionary()
        #: The leases that have a grant from the ledger, or a pending request, by their numbers. Each keeps its pool's
        #: leases: one lease of a window is enough.
        self._active: dict[int, Lease] = {}
        #: The leases in the message in flight.
        self._open: dict[int, Lease] = {}
        self._closing: dict[int, LeaseReport] = {}
        self._closed: dict[int, tuple[float, LeaseReport]] = {}
        self._numbers = 0

    def leases_of(self, pool: Pool) -> PoolLeases:
        """The leases of a pool; none if it was not used recently."""
        found = self._pools.get(pool)
        if found is None:
            found = self._pools[pool] = PoolLeases(pool)
        return found

    def request(self, short: Short) -> None:
        """Schedule a ledger request for what a request was short of."""
        for lease, least, most in short.needs:
            if lease.is_current:
                lease.add_need(least, most)
                self.reviews.make_urgent(lease)

    def may_request(self, short: Short, now_mono: float) -> bool:
        """Whether the ledger may grant any of what a request is short of, as far as it is known here."""
        return any(now_mono >= need.lease.ask_after_mono for need in short.needs)

    def recall(self, numbers: Sequence[int], now_mono: float) -> None:
        """Return the idle units of these leases with the next message: another holder is short of them."""
        for number in numbers:
            lease = self._active.get(number)
            if lease is not None:
                lease.note_wanted(now_mono)
                self.reviews.make_urgent(lease)

    def mark_exhausted(self, short: Short, now_mono: float) -> None:
        """Refuse for a moment instead of queueing: other holders did not return the units in time."""
        for lease, least, most in short.needs:
            if most and lease.free < least:
                lease.empty_need = least
                lease.empty_until_mono = max(lease.empty_until_mono, lease.ask_after_mono, now_mono + _VAIN_SECONDS)

    @property
    def has_leases(self) -> bool:
        """Whether any lease would lapse."""
        return bool(self._active or self._closing)

    @property
    def has_news(self) -> bool:
        """Whether the ledger has not confirmed everything. Checks every lease: for metrics."""
        return bool(self._closing) or any(lease.has_news for lease in self._active.values())

    @property
    def outstanding(self) -> int:
        """The number of outstanding leases."""
        return len(self._active)

    def gather(self, now_mono: float, *, is_last: bool = False) -> None:
        """Settle: the next lines report all changes. `is_last`: return everything."""
        self.pace.note_leases(len(self._active))
        self.reviews.gather(now_mono)
        if is_last:
            for lease in self._active.values():
                self._touch(lease, now_mono)
                self._tidy(lease, now_mono)
                lease.touched_mono = -math.inf
                lease.due_mono = 0.0
                self.reviews.make_due(lease)

    def lines(self, now_mono: float, at_most: int, *, must_claim: bool = False) -> list[LeaseReport]:
        """Build the next lines, `at_most` this many: leases that are short first, then settlements. Fewer: none is left.

        Build the next lines only after these were answered or lost. `must_claim`: if any lease was granted units, the
        first line is about such a lease. A ledger that has ended this holder, and deleted it since, would take a
        message without such a line for one from a new holder.
        """
        reviews = self.reviews
        reviews.rearm()
        self._forget_closed(now_mono)
        lines: list[LeaseReport] = []
        if must_claim:
            self._claim(now_mono, lines)
        lines += islice(self._closing.values(), at_most - len(lines))
        # Waiting requests come first, but settlements get lines too, however many requests wait.
        first = at_most - min(reviews.due_count, at_most // 4)
        while len(lines) < first and (lease := reviews.next_urgent()) is not None:
            self._review(lease, now_mono, lines)
        while len(lines) < at_most and (lease := reviews.next_due()) is not None:
            if lease.number in self._active:
                self._review(lease, now_mono, lines)
        return lines

    def _claim(self, now_mono: float, lines: list[LeaseReport]) -> None:
        for lease in self._active.values():
            if lease.granted > 0 and not lease.is_rate:
                self.reviews.not_urgent(lease)
                self._open[lease.number] = lease
                lines.append(line_of(lease, now_mono))
                return

    def needs_sync(self, short: Short) -> bool:
        """Whether a request is short of a lease for which no line was built yet."""
        return any(self.reviews.is_urgent(need.lease) for need in short.needs)

    def _review(self, lease: Lease, now_mono: float, lines: list[LeaseReport]) -> None:
        """Build a line for a lease if it has changes to report, and schedule its next review."""
        if lease.number and lease.number in self._open:
            return  # this message has a line for it already; the reply triggers its next review
        if now_mono < lease.ask_after_mono:
            # The ledger had nothing a moment ago: the request waits, and is refused if no units are returned here.
            lease.need = lease.at_least = 0
            lease.is_asked = False
        self._touch(lease, now_mono)
        if lease.number and lease.rests(now_mono):
            self._rest(lease)
            return
        self._tidy(lease, now_mono)
        line = self._line(lease, now_mono)
        if line is not None:
            lines.append(line)
            if now_mono >= lease.ends_mono - _PREFETCH_PAUSES * lease.pause_seconds:
                self._prefetch(lease, now_mono)
        if lease.number and lease.report_seconds and lease.rests(now_mono):
            self._rest(lease)
        elif lease.number:
            self.reviews.review_when_idle(lease, now_mono)

    def _rest(self, lease: Lease) -> None:
        """Review a lease when its next report is due."""
        if lease.pause_seconds:
            # Taking units must not ask for this review again.
            lease.low = 0
            self.reviews.review_at(lease, lease.due_mono)
        else:
            self.reviews.rest(lease, lease.due_mono)

    def _line(self, lease: Lease, now_mono: float) -> LeaseReport | None:
        if lease.number:
            is_low = lease.is_current and lease.free < lease.low
            # Report first, close later: the ledger ignores the close of a lease that it does not know or has forgotten.
            is_asked = lease.is_asked and lease.is_current
            is_needed = is_asked or (lease.is_current and (is_low or lease.is_busy(now_mono)))
            if lease.is_done and not lease.owes and not lease.has_news and not is_needed:
                return self._close(lease, now_mono)
            if not (is_asked or is_low or lease.has_news):
                return None
        elif (lease.is_asked and lease.is_current) or lease.rate.has_any:
            self.open_lease(lease)
        else:
            return None
        lease.report_seconds = self.pace.pause_seconds(lease.window)
        line = line_of(lease, now_mono)
        self._open[line.lease] = lease
        return line

    def _prefetch(self, lease: Lease, now_mono: float) -> None:
        """Request units of the next window, with this message, if its many holders would otherwise do so all at once."""
        successor = lease.successor
        if not lease.starts or not lease.is_current or successor is not None or not lease.is_busy(now_mono):
            return
        successor = lease.successor = Lease(lease.window, lease.rule, now_mono)
        next_starts = span(lease.measure, lease.starts)[1]
        successor.starts, next_ends = span(lease.measure, next_starts)
        # The reply states the exact time. If that is lost, the units are returned when they are idle.
        successor.begins_mono, successor.period_seconds = lease.ends_mono + _LOST_SECONDS, next_ends - next_starts
        successor.pace, successor.piece, successor.pause_seconds = lease.pace, lease.piece, lease.pause_seconds
        successor.is_asked = True
        self.open_lease(successor)
        self.reviews.make_due(successor)

    def open_lease(self, lease: Lease) -> None:
        """Number a lease that has not been requested yet, and report it from now on."""
        self._numbers += 1
        lease.number = self._numbers
        lease.kept = self._pools.get(lease.pool)
        self._active[lease.number] = lease

    def _close(self, lease: Lease, now_mono: float) -> LeaseReport | None:
        """Close a lease that was used or returned completely: the ledger may forget it. The next one begins at zero."""
        line = None
        if not lease.is_rate:
            line = self._closing[lease.number] = line_of(lease, now_mono, is_closing=True)
        self._active.pop(lease.number, None)
        lease.kept = None
        lease.reset()
        return line

    def _touch(self, lease: Lease, now_mono: float) -> None:
        """Note whether units were taken since the last review."""
        taken = lease.taken
        if taken != lease.touched_taken:
            lease.touched_taken, lease.touched_mono = taken, now_mono

    def _tidy(self, lease: Lease, now_mono: float) -> None:
        """Return units that no request here needs."""
        self.expire(lease, now_mono)
        is_wanted = now_mono < lease.is_wanted_until
        if is_wanted or not lease.is_busy(now_mono):
            lease.low = 0
            # Wanted units are returned although they are needed here too: they may suffice for another holder's
            # request.
            if is_wanted or not lease.need:
                # One of many that are busy keeps what it uses at once: it would request that again.
                is_in_use = is_wanted and lease.pause_seconds > 0.0 and now_mono - lease.touched_mono < IDLE_SECONDS
                lease.give_back(math.floor(lease.pace) if is_in_use else 0)

    def apply(
        self,
        lines: Sequence[LeaseReport],
        replies: Sequence[LeaseGrant],
        sent_mono: float,
        *,
        valid_seconds: float,
        received_mono: float | None = None,
    ) -> float:
        """Apply the ledger's replies. `valid_seconds`: how long the leases are valid, from the time of the request.

        Returns 0, or for how many seconds the ledger grants nothing because it has lost history. During that time no
        request should be refused for its limits.
        """
        self.valid_until_mono = sent_mono + valid_seconds
        received = sent_mono if received_mono is None else received_mono
        settles_seconds = max((reply.wait_seconds for reply in replies if not reply.lease), default=0.0)
        sent = {line.lease: line for line in lines}
        for reply in replies:
            if not reply.lease:
                continue
            line = sent.pop(reply.lease)
            lease = self._open.pop(reply.lease, None)
            if line.is_closing:
                self._closing.pop(line.lease, None)
                self._closed[line.lease] = (received, line)
            elif lease is not None:
                before = lease.granted
                lease.apply(line, reply, sent_mono=sent_mono, received_mono=received)
                pause_seconds = reply.holders / REPORTS_PER_SECOND
                lease.pace_reports(pause_seconds if pause_seconds > self.pace.settle_seconds else 0.0, sent_mono)
                if not (lease.is_resting and lease.rests(received)):
                    self.reviews.note_change(lease)
                if lease.granted == before and not settles_seconds:
                    self._note_refusal(lease, line, reply, received)
        self.resend(list(sent.values()))
        return settles_seconds

    def resend_all(self) -> None:
        """Report every lease again, closed ones too: the ledger has lost its latest history."""
        for lease in self._active.values():
            lease.confirmed = -1
            lease.due_mono = 0.0
            self.reviews.note_change(lease)
        for number, (_, line) in self._closed.items():
            self._closing[number] = line
        self._closed.clear()

    def _forget_closed(self, now_mono: float) -> None:
        while self._closed:
            number, (received_mono, _) = next(iter(self._closed.items()))
            if now_mono - received_mono < _REMEMBERED_SECONDS:
                break
            del self._closed[number]

    def _note_refusal(self, lease: Lease, line: LeaseReport, reply: LeaseGrant, received_mono: float) -> None:
        """Remember that the ledger cannot grant units, unless requests in flight or idle leases may return them."""
        if not line.want:
            return
        need = line.at_least + max(0, lease.free)
        if lease.measure == CONCURRENCY:
            if reply.held > reply.granted - line.used - line.returned:
                return
        elif not lease.is_rate and lease.spent + need <= lease.quota:
            return
        lease.empty_need = need
        empty_until_mono = max(received_mono + _EMPTY_SECONDS, lease.ask_after_mono)
        lease.empty_until_mono = lease.retry_mono if lease.is_rate else empty_until_mono

    def resend(self, lines: Sequence[LeaseReport] | None = None) -> None:
        """Send lines (None: all lines) again whose outcome is unknown. This is safe: their values are cumulative."""
        for number in list(self._open) if lines is None else [line.lease for line in lines]:
            lease = self._open.pop(number, None)
            if lease is not None:
                lease.due_mono = 0.0
                self.reviews.note_change(lease)

    def end_holder(self) -> None:
        """End this holder: the ledger has charged its leases in full, which includes the units in use.

        Units taken beyond the leases, if the policy allows that while the ledger is unavailable, are reported by the
        next holder.
        """
        owed = [rest for lease in self._active.values() if (rest := lease.owed()) is not None]
        for lease in self._active.values():
            lease.is_current = False
            lease.free = 0
            lease.kept = None
        self._active.clear()
        self.reviews.clear_urgent()
        self._open.clear()
        self._closing.clear()
        self._closed.clear()
        self.valid_until_mono = 0.0
        for rest in owed:
            self.open_lease(rest)
            self.reviews.note_change(rest)

    def forget_refusals(self, window: Window) -> None:
        """Ask the ledger again at once: the limit of this window has changed."""
        of_pool = self._pools.get(window.pool)
        lease = None if of_pool is None else of_pool.leases.get((window.measure, window.selector))
        if lease is not None:
            lease.empty_until_mono = lease.dry_until_mono = lease.ask_after_mono = 0.0
            lease.replied_mono = -math.inf

    def expire(self, lease: Lease, now_mono: float) -> None:
        """Drop the free units of a lease that has ended by now."""
        if now_mono < lease.ends_mono:
            return
        if lease.is_rate:
            lease.lapse(now_mono)
        else:
            self.retire(lease)

    def retire(self, lease: Lease) -> None:
        """End a lease and return its free units. Units in use are still settled in it."""
        lease.is_current = False
        lease.give_back()
        self.reviews.note_change(lease)
