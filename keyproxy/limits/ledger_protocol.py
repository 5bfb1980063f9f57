"""The messages between a process and the ledger: a line for every lease that changed, and a reply to each line.

A ledger implementation depends on these types only, not on how a lease is spent. All values are cumulative: how much
was granted, used and returned since the lease began. So a message may be lost, repeated or answered twice without
anything being counted twice, and a ledger that has lost its latest commits recovers them from the lease holders.
"""

from __future__ import annotations

from typing import Final, NamedTuple

#: The measures, by their names in `Plan`: units of a rate, slots, and windows that count requests or tokens.
RATE: Final = "rate"
CONCURRENCY: Final = "concurrency"
REQUESTS: Final = ("requests_per_day", "requests_per_month")
TOKENS: Final = ("tokens_per_day", "tokens_per_month")

#: Every policy that can refuse a request, by its name in responses: `user.requests_per_day`.
POLICIES: Final = tuple(
    [
        f"{kind}.{measure}"
        for kind in ("tenant", "user", "key")
        for measure in (RATE, CONCURRENCY, *REQUESTS, *TOKENS, "tokens_per_request")
    ]
)


class Pool(NamedTuple):
    """The owner of limits: a tenant, a user or a key, in live or test mode. All keys of a user draw on one pool."""

    kind: str
    owner: str
    is_test: bool


class Window(NamedTuple):
    """The unit of accounting: one measure of one pool. The ledger determines the current day or month."""

    pool: Pool
    measure: str

    @property
    def policy(self) -> str:
        """The name in responses."""
        return f"{self.pool.kind}.{self.measure}"


class LeaseReport(NamedTuple):
    """A process's report on one lease, and its request for more.

    `lease` is unique in this holder's life. `starts` is the Unix time at which the lease's window began, 0: the current
    one. `limit` is the window's limit; for a rate it is the burst, and `interval_seconds` is the time in which one unit
    is refilled. `granted`, `used`, `returned` are cumulative; for a rate the ledger ignores them. The line requests at
    most `want` units, and none rather than fewer than `at_least`; `takes_all`: whatever is left. `is_closing`: the
    lease ends, all of it was used or returned.
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


class LeaseGrant(NamedTuple):
    """The ledger's reply to one line.

    `granted` is cumulative; for a rate it is the amount granted now. `spent` and `held` are those of the whole window,
    after this line; for a rate `held` is the amount currently unavailable. `ends_seconds`: until the window's end, by
    the ledger's clock. `wait_seconds`: until `at_least` units of a rate are available. `is_wanted`: another holder is
    short of idle units. A reply with `lease` 0 is about the ledger itself: it has lost its latest history, needs all
    recent lines again, and grants nothing for `wait_seconds`.
    """

    lease: int
    starts: int
    granted: int
    spent: int
    held: int
    ends_seconds: float
    wait_seconds: float
    is_wanted: bool
