"""A lease: the slice of one window that this process may spend without asking, and what it says to the ledger about it.

    window:   limit >= spent + held, always, in the ledger
    lease:    granted = free + in use + used + returned; held for it in the ledger: granted - used - returned

All that travels is cumulative: how much was granted, used and returned since the lease began. So a message may be lost,
repeated or answered twice without anything being counted twice, and a ledger that has lost its latest commits learns them
again from those who hold the leases. Only units of a rate travel as differences: what is lost comes back with time.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from keyproxy import ratelimit
from keyproxy.limits.plan import Plan
from keyproxy.ratelimit import LimitPolicy

RATE: Final = "rate"
CONCURRENCY: Final = "concurrency"

#: The windows that count requests, and those that count tokens, as in `Plan`.
REQUESTS: Final = ("requests_per_day", "requests_per_month")
TOKENS: Final = ("tokens_per_day", "tokens_per_month")

#: How long units of a rate may be used after they were asked for. What is admitted in any t seconds, over all proxies, is
#: at most burst + rate * (t + RATE_SECONDS).
RATE_SECONDS: Final = 1.0

#: A lease is meant to last so long, at the rate at which it is used; it is asked for more when half of it is gone.
_LASTS_SECONDS: Final = 2.0
_RATE_LASTS_SECONDS: Final = 0.4

#: What is asked for at first beyond what is needed, when it is not known yet how much will be used.
_FIRST_UNITS: Final = 4


_WINDOW_SECONDS: Final = {
    "requests_per_day": 86_400, "tokens_per_day": 86_400,
    "requests_per_month": 2_592_000, "tokens_per_month": 2_592_000,
}  # fmt: skip
_UNITS: Final = {CONCURRENCY: ratelimit.CONCURRENT_REQUESTS, **dict.fromkeys(TOKENS, ratelimit.TOKENS)}


class Pool(NamedTuple):
    """Whose limits: a tenant's, a user's or a key's, in live or test mode. All keys of a user draw on one pool."""

    kind: str
    owner: str
    is_test: bool


class Window(NamedTuple):
    """What is accounted: one measure of one pool. Which day or month it is, is the ledger's to say."""

    pool: Pool
    measure: str

    @property
    def policy(self) -> str:
        """The name that callers are told."""
        return f"{self.pool.kind}.{self.measure}"


class Line(NamedTuple):
    """What a process tells the ledger of one lease, and asks of it.

    `lease` is unique in this holder's life. `starts` is the Unix time at which the lease's window began, 0: the present
    one. `limit` is the window's; for a rate its burst, and `interval_seconds` the time in which one unit comes back.
    `granted`, `used`, `returned` are cumulative, except for a rate: there `returned` is what comes back now.
    At most `want` units are asked for, none rather than fewer than `at_least`; `takes_all`: whatever there is.
    `is_closing`: the lease ends, all of it was used or returned.
    """

    lease: int
    window: Window
    starts: int
    limit: int
    interval_seconds: float
    granted: int
    used: int
    returned: int
    want: int
    at_least: int
    takes_all: bool
    is_closing: bool


class Reply(NamedTuple):
    """What the ledger says of one lease.

    `granted` is cumulative, for a rate what was granted now. `spent` and `held` are the whole window's, after this line;
    for a rate `held` is what is not to be had at present. `ends_seconds`: until the window's end, by the ledger's clock.
    `wait_seconds`: until `at_least` units of a rate can be had. `is_wanted`: another holder is short of what lies idle.
    """

    lease: int
    starts: int
    granted: int
    spent: int
    held: int
    ends_seconds: float
    wait_seconds: float
    is_wanted: bool


class Lease:
    """One lease as this process keeps it. `free` may be taken now, without asking.

    Taking is `free -= 1`, spending it is `used += 1`, giving it back `free += 1`: what is in use is the difference.
    Times are monotonic seconds.
    """

    __slots__ = (
        "__weakref__", "asked_mono", "at_least", "confirmed", "empty_need", "empty_until_mono", "ends_mono",
        "free", "given_back", "granted", "interval_seconds", "is_current", "is_wanted_until", "limit", "low",
        "need", "number", "others_held", "policy", "retry_mono", "returned", "seen_available", "spent", "starts",
        "taken_before", "takes_all", "touched_mono", "touched_taken", "used", "window",
    )  # fmt: skip

    def __init__(self, window: Window, plan: Plan, now_mono: float) -> None:
        self.window = window
        self.limit = 0
        self.interval_seconds = 0.0
        self.replan(plan)
        #: In this holder's life; 0: nothing was asked for yet.
        self.number = 0
        self.starts = 0
        self.free = self.granted = self.used = self.returned = 0
        #: What of `used + returned` the ledger has confirmed.
        self.confirmed = 0
        #: Units of a rate that go back with the next line.
        self.given_back = 0
        self.ends_mono = 0.0
        #: Below this it is time to ask for more.
        self.low = 0
        #: What those who wait need, all together, and the least that helps one of them.
        self.need = 0
        self.at_least = 0
        self.takes_all = False
        #: So much could not be had, which is remembered for a moment.
        self.empty_need = 0
        self.empty_until_mono = 0.0
        self.retry_mono = 0.0
        self.is_wanted_until = 0.0
        self.spent = self.others_held = 0
        #: What the ledger could still have granted when it last answered.
        self.seen_available = self.limit
        self.asked_mono = now_mono
        self.taken_before = 0
        self.touched_mono = now_mono
        self.touched_taken = 0
        #: False: its window is over, or its holder has ended. What is in use still ends here.
        self.is_current = True

    @property
    def is_rate(self) -> bool:
        """Whether it is units of a rate."""
        return self.interval_seconds > 0.0

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
    def has_news(self) -> bool:
        """Whether the ledger has not confirmed all that it is to know."""
        return self.given_back > 0 or (not self.is_rate and self.confirmed != self.used + self.returned)

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
        self.limit, self.interval_seconds = limit, interval
        seconds = _WINDOW_SECONDS.get(measure)
        if measure == RATE:
            seconds = max(1, math.ceil(limit * interval))
        self.policy = LimitPolicy(self.window.policy, limit, seconds, _UNITS.get(measure, ratelimit.REQUESTS))

    def begin_anew(self) -> None:
        """All of it was used or returned. The next lease of this window begins at zero."""
        self.number = self.starts = 0
        self.granted = self.used = self.returned = self.confirmed = self.free = 0
        self.taken_before = self.touched_taken = self.low = self.given_back = 0

    def give_back(self, units: int) -> None:
        """Free units go back to the ledger with the next line."""
        self.free -= units
        self.returned += units
        if self.is_rate:
            self.given_back += units

    def is_refused(self, need: int, now_mono: float) -> bool:
        """Whether the ledger has said a moment ago that so much cannot be had."""
        return now_mono < self.empty_until_mono and need >= self.empty_need

    def ask(self, need: int, *, takes_all: bool = False) -> None:
        """Somebody waits for so much."""
        self.at_least = min(need, self.at_least) if self.need else need
        self.need += need
        self.takes_all = self.takes_all or takes_all

    def line(self, now_mono: float, *, is_closing: bool = False) -> Line:
        """What to tell the ledger now, and what to ask of it. Its reply belongs to `apply`."""
        want, at_least = (0, 0) if is_closing else self._wanted(now_mono)
        returned = self.given_back if self.is_rate else self.returned
        line = Line(
            self.number, self.window, self.starts, self.limit, self.interval_seconds, self.granted, self.used,
            returned, want, at_least, self.takes_all, is_closing,
        )  # fmt: skip
        self.given_back = 0
        self.need = self.at_least = 0
        self.takes_all = False
        return line

    def _wanted(self, now_mono: float) -> tuple[int, int]:
        taken = self.taken
        elapsed = max(now_mono - self.asked_mono, 0.005)
        lasts = _RATE_LASTS_SECONDS if self.is_rate else _LASTS_SECONDS
        # As much as was used in that time lately; at most twice what there is, so that a spike takes not all at once.
        pace = (taken - self.taken_before) / elapsed
        target = math.ceil(pace * lasts)
        if self.need and not self.granted:
            target = max(target, self.need + _FIRST_UNITS)
        if now_mono < self.is_wanted_until:
            target = 0
        self.taken_before, self.asked_mono = taken, now_mono
        self.low = target // 2
        want = max(max(target, self.need) - self.free, 0)
        # A caller who waits needs so much in one piece; what lies free here is part of it.
        short = max(1, self.at_least - max(self.free, 0)) if self.need else 1
        return want, min(short, want)

    def apply(self, line: Line, reply: Reply, asked_mono: float) -> None:
        """What the ledger answered. `asked_mono`: when it was asked."""
        got = reply.granted - (0 if self.is_rate else self.granted)
        self.granted += got
        self.free += got
        self.confirmed = line.used + line.returned
        self.starts = reply.starts
        self.spent = reply.spent
        self.others_held = 0 if self.is_rate else max(0, reply.held - (reply.granted - line.used - line.returned))
        self.seen_available = max(0, self.limit - reply.spent - reply.held)
        self.ends_mono = asked_mono + (min(reply.ends_seconds, RATE_SECONDS) if self.is_rate else reply.ends_seconds)
        if reply.is_wanted:
            self.is_wanted_until = asked_mono + _LASTS_SECONDS
        self.retry_mono = asked_mono + (reply.wait_seconds if self.is_rate else reply.ends_seconds)
