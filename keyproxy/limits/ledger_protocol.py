"""What a process and the ledger say to each other: a line for every lease that is news, and a reply to each line.

Whoever keeps windows knows these words and nothing of how a lease is spent. All that travels is cumulative: how much was
granted, used and returned since the lease began. So a message may be lost, repeated or answered twice without anything
being counted twice, and a ledger that has lost its latest commits learns them again from those who hold the leases.
"""

from __future__ import annotations

from typing import Final, NamedTuple

#: The measures, by their names in `Plan`: units of a rate, slots, and windows that count requests or tokens.
RATE: Final = "rate"
CONCURRENCY: Final = "concurrency"
REQUESTS: Final = ("requests_per_day", "requests_per_month")
TOKENS: Final = ("tokens_per_day", "tokens_per_month")

#: Every policy that may refuse a request, by its name in responses: `user.requests_per_day`.
POLICIES: Final = tuple(
    [
        f"{kind}.{measure}"
        for kind in ("tenant", "user", "key")
        for measure in (RATE, CONCURRENCY, *REQUESTS, *TOKENS, "tokens_per_request")
    ]
)


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


class LeaseReport(NamedTuple):
    """What a process tells the ledger of one lease, and asks of it.

    `lease` is unique in this holder's life. `starts` is the Unix time at which the lease's window began, 0: the present
    one. `limit` is the window's; for a rate its burst, and `interval_seconds` the time in which one unit comes back.
    `granted`, `used`, `returned` are cumulative; of a rate the ledger asks nothing of them.
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


class LeaseGrant(NamedTuple):
    """What the ledger says of one lease.

    `granted` is cumulative, for a rate what was granted now. `spent` and `held` are the whole window's, after this line;
    for a rate `held` is what is not to be had at present. `ends_seconds`: until the window's end, by the ledger's clock.
    `wait_seconds`: until `at_least` units of a rate can be had. `is_wanted`: another holder is short of what lies idle.
    A reply whose `lease` is 0 is about the ledger itself: it has lost its latest history, wants to hear again all that
    it was told lately, and grants nothing for `wait_seconds`.
    """

    lease: int
    starts: int
    granted: int
    spent: int
    held: int
    ends_seconds: float
    wait_seconds: float
    is_wanted: bool
