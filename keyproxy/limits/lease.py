"""A lease: the slice of one window that this process may spend without asking, and how much of it is to lie ahead.

    window:   limit >= spent + held, always, in the ledger
    lease:    granted = free + in use + used + returned; held for it in the ledger: granted - used - returned

Units of a rate are granted one by one and never go back: what is not used in time comes back with time.
"""

from __future__ import annotations

import math
from typing import Final

from keyproxy import limit_state
from keyproxy.limits.ledger_protocol import CONCURRENCY, RATE, TOKENS, LeaseGrant, LeaseReport, Window
from keyproxy.limits.plan import Plan

#: How long units of a rate may be used after they were asked for. What is admitted in any t seconds, over all proxies, is
#: at most burst + rate * (t + RATE_SECONDS).
RATE_SECONDS: Final = 1.0

#: A lease is meant to last so long, at the pace at which it is used; it is asked for more when half of it is gone.
#: Of a rate no more lies ahead than comes back in that time: what is not used of it is lost.
_LASTS_SECONDS: Final = 2.0
_RATE_LASTS_SECONDS: Final = 0.4

#: What was not used for so long goes back. No lease ends sooner: a ledger that lost less than that hears of all of them.
IDLE_SECONDS: Final = 1.0

#: The pace is not measured over less than this. A burst shorter than that does not tell how much will be used.
_PACE_SECONDS_MIN: Final = 0.05

#: What is asked for at first beyond what is needed, when it is not known yet how much will be used. From there on what
#: lies ahead at most doubles from one message to the next.
_FIRST_UNITS: Final = 4

#: Units of a rate that were granted so shortly after others lapse with them.
_RATE_STEP_SECONDS: Final = 0.0625


_WINDOW_SECONDS: Final = {
    "requests_per_day": 86_400, "tokens_per_day": 86_400,
    "requests_per_month": 2_592_000, "tokens_per_month": 2_592_000,
}  # fmt: skip
_UNITS: Final = {CONCURRENCY: limit_state.CONCURRENT_REQUESTS, **dict.fromkeys(TOKENS, limit_state.TOKENS)}


class Lease:
    """One lease as this process keeps it. `free` may be taken now, without asking.

    Taking is `free -= 1`, spending it is `used += 1`, giving it back `free += 1`: what is in use is the difference.
    Times are monotonic seconds.
    """

    __slots__ = (
        "ahead", "at_least", "confirmed", "empty_need", "empty_until_mono", "ends_mono", "free",
        "granted", "interval_seconds", "is_aging", "is_current", "is_noted", "is_wanted_until", "lapses", "limit", "low",
        "need", "number",
        "others_held", "pace", "paced_mono", "piece", "plan", "policy", "retry_mono", "returned", "seen_available",
        "spent_apart", "starts", "taken_before", "takes_all", "touched_mono", "touched_taken", "used", "window",
    )  # fmt: skip

    def __init__(self, window: Window, plan: Plan, now_mono: float) -> None:
        self.window = window
        self.limit = 0
        self.interval_seconds = 0.0
        #: What the ledger could still have granted when it last answered.
        self.seen_available = 0
        self.replan(plan)
        #: In this holder's life; 0: nothing was asked for yet.
        self.number = 0
        self.starts = 0
        self.free = self.granted = self.used = self.returned = 0
        #: What of `used + returned` the ledger has confirmed.
        self.confirmed = 0
        #: When what is free here ends, or the first of it.
        self.ends_mono = math.inf
        #: Of a rate: until when the units may be used that make up the first so many granted.
        self.lapses: list[tuple[float, int]] = []
        #: How much is to lie ahead, and below what it is time to ask for more.
        self.ahead = self.low = 0
        #: The largest part of it that one request has lately taken.
        self.piece = 1
        #: What those who wait need, all together, and the least that helps one of them.
        self.need = 0
        self.at_least = 0
        self.takes_all = False
        #: So much could not be had, which is remembered for a moment.
        self.empty_need = 0
        self.empty_until_mono = 0.0
        self.retry_mono = 0.0
        self.is_wanted_until = 0.0
        #: What the window has spent beside `used`, as of the ledger's last reply: by others, and by earlier leases.
        self.spent_apart = 0
        self.others_held = 0
        #: Units per second, and since when and from what it was measured.
        self.pace = 0.0
        self.paced_mono = now_mono
        self.taken_before = 0
        self.touched_mono = now_mono
        self.touched_taken = 0
        #: Whether it is to be looked at, because something has happened to it, or will be when it has been left alone.
        self.is_noted = self.is_aging = False
        #: False: its window is over, or its holder has ended. What is in use still ends here.
        self.is_current = True

    @property
    def is_rate(self) -> bool:
        """Whether it is units of a rate."""
        return self.interval_seconds > 0.0

    @property
    def spent(self) -> int:
        """What is spent of the window, with what was used here since the ledger replied."""
        return self.spent_apart + self.used

    @property
    def outstanding(self) -> int:
        """What the ledger holds for it."""
        return self.granted - self.used - self.returned

    @property
    def taken(self) -> int:
        """What requests have taken since the lease began."""
        return self.granted - self.returned - self.free

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is free or in use any more."""
        return self.free <= 0 and (self.is_rate or self.free == self.outstanding)

    @property
    def owes(self) -> bool:
        """Whether more was used than was ever granted."""
        return not self.is_rate and self.outstanding < 0

    def is_busy(self, now_mono: float) -> bool:
        """Whether something was taken of it lately."""
        return now_mono - self.touched_mono < IDLE_SECONDS

    @property
    def has_news(self) -> bool:
        """Whether the ledger has not confirmed all that it is to know."""
        return not self.is_rate and self.confirmed != self.used + self.returned

    @property
    def has_all(self) -> bool:
        """Whether the ledger had nothing left to grant when it last answered."""
        return self.number != 0 and self.seen_available == 0

    @property
    def remaining(self) -> int:
        """What a caller may still expect: what is free here, and what the ledger had when it last answered."""
        return max(0, self.seen_available + self.free)

    def replan(self, plan: Plan) -> None:
        """Another plan: its limit is in force from now on, and for all that lies free here too."""
        measure = self.window.measure
        if measure == RATE:
            assert plan.rate is not None  # noqa: S101 - who asks has looked
            limit, interval = plan.burst_requests, 1.0 / plan.rate
        else:
            limit, interval = getattr(plan, measure), 0.0
        self.plan = plan
        self.seen_available = max(0, self.seen_available + limit - self.limit)
        self.limit, self.interval_seconds = limit, interval
        seconds = _WINDOW_SECONDS.get(measure)
        if measure == RATE:
            seconds = max(1, math.ceil(limit * interval))
        self.policy = limit_state.policy(self.window.policy, limit, seconds, _UNITS.get(measure, limit_state.REQUESTS))

    def owed(self) -> Lease | None:
        """What was taken beyond all that was granted, as a lease of its own; None if nothing was.

        The ledger charges a holder that ends for what it was granted. It has to be told of the rest.
        """
        if self.free >= 0 or self.window.measure in (RATE, CONCURRENCY):
            return None
        rest = Lease(self.window, self.plan, self.paced_mono)
        rest.starts, rest.used, rest.free, rest.is_current = self.starts, -self.free, self.free, False
        return rest

    def reset(self) -> None:
        """All of it was used or returned. The next lease of this window begins at zero."""
        self.number = self.starts = 0
        self.spent_apart += self.used
        self.granted = self.used = self.returned = self.confirmed = self.free = 0
        self.taken_before = self.touched_taken = self.low = 0
        self.ends_mono = math.inf
        self.lapses.clear()

    def give_back(self) -> None:
        """What is free goes back to the ledger with the next line."""
        if self.free > 0:
            self.returned += self.free
            self.free = 0

    def lapse(self, now_mono: float) -> None:
        """Units of a rate whose time is over are free no more. The oldest are used first."""
        while self.lapses and now_mono >= self.lapses[0][0]:
            _, granted = self.lapses.pop(0)
            late = min(self.free, granted - (self.granted - self.free))
            if late > 0:
                self.free -= late
                self.returned += late
        self.ends_mono = self.lapses[0][0] if self.lapses else math.inf

    def is_refused(self, need: int, now_mono: float) -> bool:
        """Whether the ledger has said a moment ago that so much cannot be had."""
        return now_mono < self.empty_until_mono and need >= self.empty_need

    def ask(self, need: int, *, takes_all: bool = False) -> None:
        """Somebody waits for so much."""
        self.at_least = min(need, self.at_least) if self.need else need
        self.need += need
        self.takes_all = self.takes_all or takes_all

    def line(self, now_mono: float, *, is_closing: bool = False) -> LeaseReport:
        """What to tell the ledger now, and what to ask of it. Its reply belongs to `apply`."""
        want, at_least = self._wanted(now_mono) if self.is_current and not is_closing else (0, 0)
        line = LeaseReport(
            self.number, self.window, self.starts, self.limit, self.interval_seconds, self.granted, self.used,
            self.returned, want, at_least, self.takes_all, is_closing,
        )  # fmt: skip
        self.need = self.at_least = 0
        self.takes_all = False
        return line

    def _wanted(self, now_mono: float) -> tuple[int, int]:
        """How much to ask for, and the least that helps."""
        elapsed = now_mono - self.paced_mono
        if elapsed >= _PACE_SECONDS_MIN:
            taken = self.taken
            # It rises at once and falls by half in a second: a gap between requests is not their end.
            self.pace = max((taken - self.taken_before) / elapsed, self.pace * 0.5**elapsed)
            self.taken_before, self.paced_mono = taken, now_mono
        is_quiet = now_mono < self.is_wanted_until or not (self.need or self.is_busy(now_mono))
        self.ahead = 0 if is_quiet else self._wanted_ahead()
        self.low = self.ahead // 2
        want = max(max(self.ahead, self.need) - self.free, 0)
        if self.takes_all:
            # Who takes all there is waits until the ledger has said that it has no more.
            want = max(want, 1)
        # A caller who waits needs so much in one piece; what lies free here is part of it.
        short = max(1, self.at_least - max(self.free, 0)) if self.need else 1
        return want, min(short, want)

    def _wanted_ahead(self) -> int:
        """As much as will be used in a while at this pace, and no less than what two requests take."""
        if self.is_rate:
            lasts = min(self.pace, 1.0 / self.interval_seconds) * _RATE_LASTS_SECONDS
            return math.ceil(lasts) if self.interval_seconds < _RATE_LASTS_SECONDS else 0
        first = max(_FIRST_UNITS, 2 * self.piece)
        if not self.granted:
            return self.need + first if self.need else 0
        ahead = min(math.ceil(self.pace * _LASTS_SECONDS), 2 * self.ahead + first)
        return max(ahead, 2 * self.piece) if self.pace > 0.0 and self.piece > 1 else ahead

    def apply(self, line: LeaseReport, reply: LeaseGrant, *, asked_mono: float, heard_mono: float) -> None:
        """What the ledger answered. `asked_mono`: when it was asked."""
        got = reply.granted - (0 if self.is_rate else self.granted)
        self.granted += got
        self.free += got
        if got > 0:
            # Not idle, however long that took: who asked may still wait for another lease. Given back meanwhile, the two
            # would never meet.
            self.touched_mono = heard_mono
        self.confirmed = line.used + line.returned
        self.starts = 0 if self.is_rate else reply.starts
        self.spent_apart = reply.spent - line.used
        self.others_held = 0 if self.is_rate else max(0, reply.held - (reply.granted - line.used - line.returned))
        self.seen_available = max(0, self.limit - reply.spent - reply.held)
        if reply.is_wanted:
            self.is_wanted_until = asked_mono + _LASTS_SECONDS
        if self.is_rate:
            self._note_lapse(got, asked_mono)
            self.retry_mono = heard_mono + reply.wait_seconds
        else:
            self.ends_mono = self.retry_mono = asked_mono + reply.ends_seconds
        if not self.is_current or (line.limit, line.interval_seconds) != (self.limit, self.interval_seconds):
            # Granted under a plan that is not in force any more.
            self.give_back()

    def _note_lapse(self, got: int, asked_mono: float) -> None:
        if not got:
            return
        ends = asked_mono + RATE_SECONDS
        if self.lapses and ends - self.lapses[-1][0] < _RATE_STEP_SECONDS:
            ends, _ = self.lapses.pop()
        self.lapses.append((ends, self.granted))
        self.ends_mono = self.lapses[0][0]
