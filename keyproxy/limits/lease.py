"""A lease: the slice of one window that this process may spend without a ledger request.

    window:   limit >= spent + held, always, in the ledger
    lease:    granted = free + in use + used + returned; held for it in the ledger: granted - used - returned

Units of a rate are granted one by one and never returned: unused units lapse, and the rate refills with time.
"""

from __future__ import annotations

import math
from typing import Final

from keyproxy.limits.gcra import NO_UNUSED_UNITS, UnusedUnits
from keyproxy.limits.ledger.report_pace import spread
from keyproxy.limits.ledger_protocol import CONCURRENCY, TOKEN_RATE, LeaseGrant, LeaseReport, Window, policy_of
from keyproxy.limits.plan import Limit

#: How long units of a rate may be used after they were requested. In any t seconds, all proxies together admit at most
#: burst + rate * (t + RATE_SECONDS).
RATE_SECONDS: Final = 1.0

#: How long a lease should last at its current pace. When half of it is used, more is requested.
LASTS_SECONDS: Final = 2.0

#: Units that stay unused for this long are returned. No lease ends sooner, so a ledger that lost less history than this
#: receives every lease again.
IDLE_SECONDS: Final = 1.0

#: Units of a rate granted within this time of earlier ones lapse together with them.
_RATE_STEP_SECONDS: Final = 0.0625

#: Shared by leases without any, which saves 70 bytes each.
_NO_LAPSES: Final[list[tuple[float, int, float]]] = []

#: How long a reply describes what the ledger has left.
FRESH_SECONDS: Final = 1.0


class Lease:
    """One lease as this process keeps it. `free` units can be taken without a ledger request.

    Taking is `free -= 1`, spending is `used += 1`, releasing is `free += 1`: the difference is the number in use.
    Times are monotonic seconds.
    """

    __slots__ = (
        "ahead", "ask_after_mono", "at_least", "begins_mono", "confirmed", "credited", "dry_until_mono", "due_mono",
        "empty_need", "empty_until_mono", "ends_mono", "free", "granted", "interval_seconds", "is_asked", "is_current",
        "is_noted", "is_overdrawn", "is_resting", "is_wanted_until", "kept", "lapses", "limit", "low", "measure", "need",
        "number", "pace", "paced_mono", "pause_seconds", "period_seconds", "piece", "policy", "pool", "rate",
        "replied_mono", "report_seconds", "retry_mono", "returned", "review_mono", "rule", "seen_available", "selector",
        "sent", "spent_apart", "starts", "successor", "taken_before", "touched_mono", "touched_taken", "used",
    )  # fmt: skip

    def __init__(self, window: Window, limit: Limit, now_mono: float) -> None:
        # What every request reads and writes comes first, in two cache lines of the compiled build: with thousands of
        # leases, memory is what taking waits for. No method is called before all is set: the compiled build would check
        # at each access whether it is.
        self.free = self.used = 0
        #: Units are requested below the level `low`. `piece`: the largest amount that one request has recently taken.
        self.low, self.piece = 0, 1
        #: When the free units expire, or the first of them.
        self.ends_mono = math.inf
        #: What the ledger could still grant, as of its last reply.
        self.seen_available = max(0, limit.quota)
        self.limit = limit.quota
        #: Added to the limit of the current window, as of the ledger's last reply.
        self.credited = 0
        self.interval_seconds = limit.interval_seconds
        self.policy = policy_of(window, limit, max(0, limit.quota))
        #: Unique within this holder's life; 0: nothing was requested yet.
        self.number = 0
        #: Whether a review is due because it changed, and for when one is scheduled; `is_resting`: not before that.
        self.is_noted = self.is_resting = False
        #: False: its window is over, or its holder has ended. Units in use are still settled here.
        self.is_current = True
        #: Whether units were taken beyond the grants because the ledger was unavailable.
        self.is_overdrawn = False
        #: Whether a request waits for the state of the window only.
        self.is_asked = False
        #: The amount that the ledger could not grant, remembered for a moment.
        self.empty_need = 0
        self.empty_until_mono = 0.0
        #: Until when the ledger is taken to have nothing more to grant.
        self.dry_until_mono = 0.0
        #: For a token rate: the units to return.
        self.rate = NO_UNUSED_UNITS
        # Not the window itself: measure and selector are shared by many users, and it would take 64 bytes.
        self.measure: Final = window.measure
        self.selector: Final = window.selector
        self.pool: Final = window.pool
        self.rule = limit
        #: When the ledger's last reply arrived.
        self.replied_mono = -math.inf
        self.starts = self.granted = self.returned = 0
        #: The part of `used + returned` that the ledger has confirmed, and the part that the latest line reported.
        self.confirmed = self.sent = 0
        #: For a rate: expiry times, each with the cumulative grant up to which it applies and the ledger's time of it.
        self.lapses: list[tuple[float, int, float]] = _NO_LAPSES
        #: How many units to keep ahead.
        self.ahead = 0
        #: What all waiting requests can use together, and the least that satisfies one of them.
        self.need = self.at_least = 0
        self.retry_mono = self.is_wanted_until = 0.0
        #: What the window has spent besides `used`, as of the ledger's last reply: by other holders and earlier leases.
        self.spent_apart = 0
        #: Units per second, and the time and count at which the measurement began.
        self.pace = 0.0
        self.paced_mono = now_mono
        self.taken_before = 0
        self.touched_mono = now_mono
        self.touched_taken = 0
        #: How long to wait between two reports for which no request waits: the more holders, the longer. When the next
        #: one may be sent, and when the next request for units.
        self.pause_seconds = self.due_mono = self.ask_after_mono = 0.0
        #: The same because this process has many leases; but a lease that runs low does not wait for it.
        self.report_seconds = 0.0
        self.review_mono = math.inf
        #: The lease of the next window, if requested already; of that, how long it lasts, and when it has surely begun.
        self.successor: Lease | None = None
        self.period_seconds = self.begins_mono = 0.0
        #: The leases of its pool, while the ledger may hold units for it: otherwise they would be made anew meanwhile.
        self.kept: object = None

    @property
    def window(self) -> Window:
        """The window from which it was granted."""
        return Window(self.pool, self.measure, self.selector)

    @property
    def is_rate(self) -> bool:
        """Whether the lease holds units of a rate."""
        return self.interval_seconds > 0.0

    @property
    def quota(self) -> int:
        """The limit of the current window with its credits."""
        return self.limit + self.credited

    @property
    def spent(self) -> int:
        """What is spent of the window, including local use since the ledger's last reply."""
        return self.spent_apart + self.used

    @property
    def outstanding(self) -> int:
        """What the ledger holds for the lease."""
        return self.granted - self.used - self.returned

    @property
    def taken(self) -> int:
        """What requests have taken since the lease began."""
        return self.granted - self.returned - self.free

    @property
    def is_done(self) -> bool:
        """Whether none of it is free or in use."""
        return self.free <= 0 and (self.is_rate or self.free == self.outstanding)

    @property
    def owes(self) -> bool:
        """Whether more was used than was ever granted."""
        return not self.is_rate and self.outstanding < 0

    @property
    def idle_seconds(self) -> float:
        """How long units stay unused before they are returned: where reports are rare, they serve two intervals."""
        return max(IDLE_SECONDS, 2.0 * self.pause_seconds, self.report_seconds)

    @property
    def idle_mono(self) -> float:
        """When its units count as unused, unless some are taken before."""
        return max(self.touched_mono, self.begins_mono) + self.idle_seconds

    def is_busy(self, now_mono: float) -> bool:
        """Whether units were taken recently."""
        return now_mono < self.idle_mono

    def rests(self, now_mono: float) -> bool:
        """Whether it was reported recently, and no request waits for more."""
        if now_mono >= self.due_mono or self.is_asked:
            return False
        return self.pause_seconds > 0.0 or self.free >= self.low

    @property
    def has_news(self) -> bool:
        """Whether the lease has changes that the ledger has not confirmed."""
        return self.rate.has_any if self.is_rate else self.confirmed != self.used + self.returned

    def is_fresh(self, now_mono: float) -> bool:
        """Whether the state of the window is recent; a rate has no state that others change."""
        return self.is_rate or now_mono - self.replied_mono < max(FRESH_SECONDS, self.pause_seconds)

    @property
    def remaining(self) -> int:
        """What a caller can still use: the free units here, and what the ledger had left as of its last reply."""
        return max(0, self.seen_available + self.free)

    def replan(self, rule: Limit) -> None:
        """Switch to another limit. It applies immediately, to the free units here too."""
        limit, interval = rule.quota, rule.interval_seconds
        self.rule = rule
        self.seen_available = max(0, self.seen_available + limit - self.limit)
        self.ask_after_mono = 0.0
        self.limit, self.interval_seconds = limit, interval
        self._restate()

    def _restate(self) -> None:
        """Describe the limit to callers, with what is credited to its current window."""
        self.policy = policy_of(self.window, self.rule, max(0, self.quota))

    def owed(self) -> Lease | None:
        """Return what was taken beyond the grant, as a separate lease; None if nothing was.

        The ledger charges a holder that ends for its grants. The rest has to be reported separately, but not what a
        message without a reply has reported: the ledger may have counted it. Only what was taken while the ledger was
        unavailable is reported in any case, since none of those messages arrived.
        """
        if self.is_rate or self.measure == CONCURRENCY:
            return None
        owed = -self.free if self.is_overdrawn else -self.free - max(0, self.sent - self.granted)
        if owed <= 0:
            return None
        rest = Lease(self.window, self.rule, self.paced_mono)
        rest.starts, rest.used, rest.free, rest.is_current = self.starts, owed, -owed, False
        rest.is_overdrawn = self.is_overdrawn
        return rest

    def reset(self) -> None:
        """Reset after everything was used or returned. The next lease of this window begins at zero."""
        self.number = self.starts = 0
        self.spent_apart += self.used
        self.granted = self.used = self.returned = self.confirmed = self.sent = self.free = 0
        self.due_mono = self.ask_after_mono = 0.0
        self.is_overdrawn = False
        self.taken_before = self.touched_taken = self.low = 0
        self.ends_mono = math.inf
        self.lapses.clear()

    def give_back(self, keep: int = 0) -> None:
        """Return the free units to the ledger with the next line, all but these."""
        units = self.free - keep
        if units > 0:
            self.return_units(units, self.granted_at)
            self.returned += units
            self.free = keep
            if not self.pause_seconds:
                self.due_mono = 0.0

    @property
    def granted_at(self) -> float:
        """The ledger's time at which the oldest free units of a rate were granted."""
        return self.lapses[0][2] if self.lapses else 0.0

    def return_units(self, units: int, granted_at: float) -> None:
        """Return unused units of a token rate; negative: units that were used without having been granted."""
        if self.measure == TOKEN_RATE and (granted_at or units < 0):
            if self.rate is NO_UNUSED_UNITS:
                self.rate = UnusedUnits()
            self.rate.add(units, granted_at, self.interval_seconds)

    def lapse(self, now_mono: float) -> None:
        """Drop expired units of a rate. The oldest units are used first."""
        while self.lapses and now_mono >= self.lapses[0][0]:
            _, granted, granted_at = self.lapses.pop(0)
            late = min(self.free, granted - (self.granted - self.free))
            if late > 0:
                self.return_units(late, granted_at)
                self.free -= late
                self.returned += late
        self.ends_mono = self.lapses[0][0] if self.lapses else math.inf

    def is_refused(self, need: int, now_mono: float) -> bool:
        """Whether the ledger recently refused this amount."""
        return now_mono < self.empty_until_mono and need >= self.empty_need

    def is_dry(self, now_mono: float) -> bool:
        """Whether the free units are all that a request can have: the ledger recently had nothing more to grant."""
        return now_mono < self.dry_until_mono

    def add_need(self, least: int, most: int) -> None:
        """Record that a request waits for this amount; 0: for the state of the window."""
        self.is_asked = True
        if most:
            self.at_least = min(least, self.at_least) if self.need else least
            self.need += most

    def apply(self, line: LeaseReport, reply: LeaseGrant, *, sent_mono: float, received_mono: float) -> None:
        """Apply the ledger's reply. `sent_mono`: when the line was sent."""
        got = reply.granted - (0 if self.is_rate else self.granted)
        self.granted += got
        self.free += got
        if got > 0 and line.most:
            # Not idle, however long the reply took: the request may still wait for another lease. If this one were
            # returned in the meantime, the request might never hold both.
            self.touched_mono = received_mono
        self.confirmed = line.used + line.returned
        self.starts = 0 if self.is_rate else reply.starts
        self.spent_apart = reply.spent - line.used
        self.replied_mono = received_mono
        if reply.credited != self.credited:
            self.credited = reply.credited
            self._restate()
        self.seen_available = max(0, self.quota - reply.spent - reply.held)
        if line.want:
            self.dry_until_mono = 0.0 if self.seen_available else received_mono + max(FRESH_SECONDS, reply.wait_seconds)
        if reply.is_wanted:
            self.note_wanted(sent_mono)
        if self.is_rate:
            self._note_lapse(got, sent_mono, reply.granted_at)
            self.retry_mono = received_mono + reply.wait_seconds
        else:
            self.ends_mono = self.retry_mono = sent_mono + reply.ends_seconds
            if self.period_seconds:
                self.begins_mono = received_mono + reply.ends_seconds - self.period_seconds
            self.ask_after_mono = max(received_mono + reply.wait_seconds, 0.0 if got else self.ask_after_mono)
        if not self.is_current or (line.limit, line.interval_seconds) != (self.limit, self.interval_seconds):
            # Granted under a plan that no longer applies.
            self.give_back()

    def pace_reports(self, pause_seconds: float, sent_mono: float) -> None:
        """Report at most every `pause_seconds`. A longer pause applies to the last report, too, if units last."""
        if pause_seconds > self.pause_seconds and self.due_mono and self.free >= self.pace * pause_seconds:
            self.report_after(sent_mono, pause_seconds)
        self.pause_seconds = pause_seconds if self.is_current else max(self.pause_seconds, pause_seconds)

    def report_after(self, sent_mono: float, pause_seconds: float) -> None:
        """Report again after this pause, unless a request waits for units."""
        # Up to two fifths later, which spreads the reports of processes that began at the same time.
        self.due_mono = sent_mono + pause_seconds * (1.0 + 0.4 * spread(sent_mono))

    def follow(self, before: Lease, now_mono: float) -> None:
        """Begin after the lease of the window before. One message reports both; those of all processes are spread."""
        self.due_mono = max(self.due_mono, now_mono + self.pause_seconds * spread(now_mono))
        before.due_mono = self.due_mono

    def note_wanted(self, now_mono: float) -> None:
        """Another holder is short: for a while, return idle units instead of requesting more."""
        self.is_wanted_until = now_mono + LASTS_SECONDS
        self.due_mono = 0.0

    def _note_lapse(self, got: int, sent_mono: float, granted_at: float) -> None:
        if not got:
            return
        ends = sent_mono + RATE_SECONDS
        if self.lapses is _NO_LAPSES:
            self.lapses = []
        if self.lapses and ends - self.lapses[-1][0] < _RATE_STEP_SECONDS:
            ends, _, granted_at = self.lapses.pop()
        self.lapses.append((ends, self.granted, granted_at))
        self.ends_mono = self.lapses[0][0]
