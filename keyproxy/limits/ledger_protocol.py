"""The messages between a process and the ledger: a line for every lease that changed, and a reply to each line.

A ledger implementation depends on these types only, not on how a lease is spent. All values are cumulative: how much
was granted, used and returned since the lease began. So a message may be lost, repeated or answered twice without
anything being counted twice, and a ledger that has lost its latest commits recovers them from the lease holders. Only
rates differ: their values are those of one message, and a repeated message is refused by its serial.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from keyproxy import limit_state
from keyproxy.limits.plan import PERIODS, TOTAL, Limit
from keyproxy.reasons import LimitReason

#: The measures of windows: units of rates, slots, and windows that count requests, tokens, or money in micro-units. Those
#: of budgets never end.
RATE: Final = "rate"
TOKEN_RATE: Final = "token_rate"  # noqa: S105 - tokens of a language model
RATES: Final = (RATE, TOKEN_RATE)
CONCURRENCY: Final = "concurrency"
REQUESTS_TOTAL: Final = f"requests_{TOTAL}"
TOKENS_TOTAL: Final = f"tokens_{TOTAL}"
BUDGETS: Final = (REQUESTS_TOTAL, TOKENS_TOTAL)
REQUESTS: Final = (*[f"requests_per_{period}" for period in PERIODS], REQUESTS_TOTAL)
TOKENS: Final = (*[f"tokens_per_{period}" for period in PERIODS], TOKENS_TOTAL)
SPEND: Final = tuple([f"spend_per_{period}" for period in PERIODS])

MEASURES: Final = (CONCURRENCY, *RATES, *REQUESTS, *TOKENS, *SPEND)

#: The kinds of pools: those with plans, and that of an agent token, whose limits are its budgets.
TENANT_POOL: Final = "tenant"
USER_POOL: Final = "user"
KEY_POOL: Final = "key"
AGENT_POOL: Final = "agent"
TOKEN_POOL: Final = "token"  # noqa: S105 - a kind of pool
PLANNED_POOLS: Final = (TENANT_POOL, USER_POOL, KEY_POOL, AGENT_POOL)

#: How many reports of one window all its holders together send per second.
REPORTS_PER_SECOND: Final = 120.0

#: With more holders of a window than this, the ledger paces their requests and recalls units from few of them: at the
#: default `settle_seconds`, more holders than this report less often.
FEW_HOLDERS: Final = 60

#: Limits of a single request, which have no window.
TOKENS_PER_REQUEST: Final = "tokens_per_request"
SPEND_PER_REQUEST: Final = "spend_per_request"

#: Every policy that can refuse a request, by its name in responses without a selector: `user.requests_per_day`.
POLICIES: Final = tuple(
    [
        f"{kind}.{measure}"
        for kind in PLANNED_POOLS
        for measure in (*MEASURES, TOKENS_PER_REQUEST, SPEND_PER_REQUEST)
        if measure not in BUDGETS
    ]
    + [f"{TOKEN_POOL}.{measure}" for measure in BUDGETS]
)


def _reasons(measure: str) -> tuple[LimitReason, ...]:
    if measure in (TOKENS_PER_REQUEST, SPEND_PER_REQUEST):
        return (LimitReason.NEVER_FITS,)
    if measure == CONCURRENCY:
        return (LimitReason.NONE,)
    if measure == RATE:
        return (LimitReason.PACE,)
    if measure == TOKEN_RATE:
        return (LimitReason.PACE, LimitReason.NEVER_FITS)
    if measure in REQUESTS or measure in BUDGETS:
        return (LimitReason.SPENT, LimitReason.HELD)
    return (LimitReason.SPENT, LimitReason.HELD, LimitReason.NEVER_FITS)


#: Every policy with each reason for which it can refuse.
REFUSALS: Final = tuple(
    [(policy, reason.value) for policy in POLICIES for reason in _reasons(policy.partition(".")[2])]
)


class Pool(NamedTuple):
    """The owner of limits, in live or test mode. All keys of a user draw on one pool.

    `owner`: the id of the tenant, user, agent token, or first key of the line. An agent's is `USER/AGENT`.
    """

    kind: str
    owner: str
    is_test: bool


class Window(NamedTuple):
    """The unit of accounting: one measure of one pool. The ledger determines the current period.

    `selector`: the requests that count in it, in canonical form: `mode:...`, `model:...`, `route:...` in this order,
    joined by commas; empty: all.
    """

    pool: Pool
    measure: str
    selector: str = ""

    @property
    def policy(self) -> str:
        """The name in responses: `user.tokens_per_day@model:gpt-4o`."""
        name = f"{self.pool.kind}.{self.measure}"
        return f"{name}@{self.selector}" if self.selector else name


_PERIOD_SECONDS: Final = {"minute": 60, "hour": 3_600, "day": 86_400, "week": 604_800, "month": 2_592_000}
_UNITS: Final = {
    CONCURRENCY: limit_state.CONCURRENT_REQUESTS,
    **dict.fromkeys((*TOKENS, TOKEN_RATE), limit_state.TOKENS),
    **dict.fromkeys(SPEND, limit_state.MONEY),
}


def policy_of(window: Window, rule: Limit, quota: int) -> limit_state.LimitPolicy:
    """Describe a limit to callers. `quota` includes what is credited to the current window."""
    interval = rule.interval_seconds
    seconds = max(1, math.ceil(quota * interval)) if interval else _PERIOD_SECONDS.get(rule.per)
    return limit_state.policy(window.policy, quota, seconds, _UNITS.get(window.measure, limit_state.REQUESTS))


class LeaseReport(NamedTuple):
    """A process's report on one lease, and its request for more.

    `lease` is unique in this holder's life. `starts` is the Unix time at which the lease's window began, 0: the current
    one. `limit` is the window's limit; for a rate it is the burst, and `interval_seconds` is the time in which one unit
    is refilled. `granted`, `used`, `returned` are cumulative. `is_closing`: the lease ends, all of it was used or
    returned.

    The line requests `want` units (a window with many holders may grant more), and none rather than fewer than
    `at_least`. Up to `most` of them are needed by requests that wait now: they are granted in full if they are available,
    and only what is wanted beyond them is shared with other holders. `at_least <= most <= want`; if no request waits,
    `most` is 0 and `at_least` at most 1.

    For a rate the ledger ignores `starts`, `granted` and `used`. A token rate may return units: `returned` of them since
    the last line, granted at `granted_at`, the Unix time by the ledger's clock in its reply (0.0 otherwise). The ledger
    takes back what has not been refilled since: `max(0, returned - (now - granted_at) / interval_seconds)`. A negative
    `returned` is use beyond the units that were held, and counts up to one burst.
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
    most: int
    is_closing: bool
    granted_at: float = 0.0

    def units_granted(self, available: int, alive: int, share: int = 0) -> int:
        """How many of the available units it gets, if so many holders are alive; of what it wants, at least `share`."""
        if not self.want or available < self.at_least:
            return 0
        # Beyond what its requests wait for, it leaves units for others: the fewer are available, the fewer it gets.
        fair = self.want if alive <= 1 else max(self.at_least, self.most, available // (2 * alive))
        return min(available, max(share, min(self.want, fair)))


class LeaseGrant(NamedTuple):
    """The ledger's reply to one line.

    `granted` is cumulative; for a rate it is the amount granted now, and `granted_at` is when (Unix time, by the ledger's
    clock). `spent` and `held` are those of the whole window, after this line; for a rate `held` is the amount currently
    unavailable. `credited` is added to the window's limit: the ledger grants up to `limit + credited - spent - held`.
    `holders` is the number of holders that have a lease of the window and have not ended, at least 1; 1 for a rate. It is
    higher while a new window expects those of its predecessor, or while the messages about a window with many holders
    exceed their schedule: it determines their pace. `ends_seconds`: until the window's end, by the ledger's clock.
    `wait_seconds`: until `at_least` units of a rate are available; for other windows, how long to wait before the next
    request for units. `is_wanted`: another holder is short of idle units. A reply with `lease` 0 is about the ledger
    itself: it has lost its latest history, needs all recent lines again, and grants nothing for `wait_seconds`.
    """

    lease: int
    starts: int
    granted: int
    spent: int
    held: int
    ends_seconds: float
    wait_seconds: float
    is_wanted: bool
    credited: int = 0
    holders: int = 1
    granted_at: float = 0.0
