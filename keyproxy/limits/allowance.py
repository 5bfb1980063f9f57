"""The pools that an identity's requests draw on, what a request needs of them, and this process's leases on them."""

from __future__ import annotations

from typing import Final

from keyproxy import limit_state
from keyproxy.limit_state import LimitState, policy
from keyproxy.limits.ledger_protocol import CONCURRENCY, RATE, REQUESTS, SPEND, TOKEN_RATE, TOKENS, Pool, Window
from keyproxy.limits.plan import PER_REQUEST, Limit, Plan
from keyproxy.limits.plan import TOKENS as TOKEN_MEASURE
from keyproxy.limits.pool_leases import PoolLeases
from keyproxy.limits.ratelimit_headers import RateLimitHeaders
from keyproxy.mypyc_compat import mypyc_attr

_COUNTED: Final = (RATE, *REQUESTS)

#: More than any request holds.
_UNBOUNDED: Final = 10**18

#: Bundles that one allowance keeps for combinations of routes and models. At the bound they are all dropped, and made
#: again as requests need them; the leases stay.
BUNDLES_MAX: Final = 64

#: A route, and the models that may serve a request; only those that a limit names.
Selection = tuple[str, tuple[str, ...]]

_NO_NAMES: Final[frozenset[str]] = frozenset()

NO_SELECTION: Final[Selection] = ("", ())


@mypyc_attr(acyclic=True)
class Need:
    """What a request needs, of tokens and of money in micro-units: at least and at most.

    The two differ only if the request sets no maximum, and the proxy limits its output to what it holds. `route` and
    `models` select the limits that apply: all models that may serve the request. Not `is_priced`: one of them has no
    price, so that a spend limit refuses the request.
    """

    __slots__ = ("is_priced", "models", "route", "spend_least", "spend_most", "tokens_least", "tokens_most")

    def __init__(
        self,
        tokens_least: int,
        tokens_most: int,
        spend_least: int = 0,
        spend_most: int = 0,
        *,
        route: str = "",
        models: tuple[str, ...] = (),
        is_priced: bool = True,
    ) -> None:
        self.tokens_least: Final = tokens_least
        self.tokens_most: Final = tokens_most
        self.spend_least: Final = spend_least
        self.spend_most: Final = spend_most
        self.route: Final = route
        self.models: Final = models
        self.is_priced: Final = is_priced

    def within(self, tokens_bound: int, spend_bound: int, paid: int) -> Need:
        """What to take: at most what the plan allows per request, without the tokens that were paid before."""
        tokens, spend = min(self.tokens_most, tokens_bound), min(self.spend_most, spend_bound)
        if not paid:
            return Need(self.tokens_least, tokens, self.spend_least, spend)
        least, most = max(0, self.tokens_least - paid), max(0, tokens - paid)
        return Need(least, most, share_of(self.spend_least, least, self.tokens_least), share_of(spend, most, tokens))

    def __repr__(self) -> str:
        spend = f", {self.spend_least}, {self.spend_most}" if self.spend_most else ""
        return f"{type(self).__name__}({self.tokens_least}, {self.tokens_most}{spend})"


def share_of(spend: int, tokens: int, of_tokens: int) -> int:
    """The part of some money that belongs to so many of its tokens, rounded up."""
    return -(-spend * tokens // of_tokens) if of_tokens > 0 else 0


class Allowance:
    """The limits that apply to an identity: pools with their plans. Made when its row enters the cache."""

    __slots__ = ("bundle", "has_selectors", "models", "pools", "routes", "selected")

    def __init__(self, pools: tuple[tuple[Pool, Plan], ...]) -> None:
        self.pools = pools
        limits = [limit for _, plan in pools for limit in plan.limits]
        #: The models and routes that limits name.
        # There are many identities; an empty set of its own takes 216 bytes.
        self.models = frozenset([limit.model for limit in limits if limit.model]) or _NO_NAMES
        self.routes = frozenset([limit.route for limit in limits if limit.route]) or _NO_NAMES
        self.has_selectors = bool(self.models or self.routes)
        #: The lease table's bundle for all requests, if no limit names a model or route.
        self.bundle: Bundle | None = None
        #: Otherwise: for requests with the same limits, at most `BUNDLES_MAX`.
        self.selected: dict[Selection, Bundle] = {}

    def selection(self, need: Need | None) -> Selection:
        """What of a request's route and models matters to its limits."""
        if need is None:
            return NO_SELECTION
        route = need.route if need.route in self.routes else ""
        return route, tuple([model for model in need.models if model in self.models])


class Hold:
    """What one request has taken: a unit of each of the bundle's `units`, and `tokens` and `spend` of `meters`.

    `meters`: the bundle whose windows of tokens and money it draws on; None: the request is not metered. `earlier`: a
    hold on leases that ended during the request, because their window ended. `paid`: for a request that was charged
    before, the tokens of that charge. Such a request takes units of `paced` only, and does not hold these tokens again.
    `has_slots` is false once the request has ended and released its slots. `granted_at`: the ledger's time at which the
    units of token rates were granted, at the earliest.
    """

    __slots__ = ("bundle", "earlier", "granted_at", "has_slots", "meters", "paid", "spend", "tokens")

    def __init__(
        self,
        bundle: Bundle,
        meters: Bundle | None = None,
        tokens: int = 0,
        spend: int = 0,
        *,
        earlier: Hold | None = None,
        paid: int | None = None,
        has_slots: bool = True,
        granted_at: float = 0.0,
    ) -> None:
        self.bundle: Final = bundle
        self.meters: Final = meters
        self.tokens: Final = tokens
        self.spend: Final = spend
        self.earlier: Final = earlier
        self.paid: Final = paid
        self.has_slots: Final = has_slots
        self.granted_at: Final = granted_at

    @property
    def total_tokens(self) -> int:
        """The tokens that it holds of each window in turn, with those of earlier windows."""
        return self.tokens + (0 if self.earlier is None else self.earlier.total_tokens)

    @property
    def total_spend(self) -> int:
        """The money that it holds, with that of earlier windows."""
        return self.spend + (0 if self.earlier is None else self.earlier.total_spend)

    @property
    def limits_tokens(self) -> bool:
        """Whether tokens of any window or rate are held."""
        return self.meters is not None and bool(self.meters.token_leases)

    @property
    def tokens_left(self) -> int:
        """The tokens that are left of every window and rate, as of the ledger's last replies."""
        return 0 if self.meters is None else min([lease.remaining for lease in self.meters.token_leases], default=0)

    @property
    def spend_left(self) -> int:
        """The money that is left of every window."""
        return 0 if self.meters is None else min([lease.remaining for lease in self.meters.spend_windows], default=0)

    @property
    def covers(self) -> int:
        """The number of tokens that the request may use."""
        return self.total_tokens + (self.paid or 0)


class Bundle:
    """All leases that requests with one selection draw on under one allowance, looked up once.

    `units`: every request takes one of each; `counted` ones are used up, `slots` are released at the end. `paced`: the
    units that a request takes even if it was charged before. Metered requests take tokens of `token_leases`, which are
    `token_windows` and `token_rates`, and money of `spend_windows`; the others share one `hold`. `reported`: the leases
    reported to callers; `statement`: the headers that report them.
    """

    __slots__ = (
        "counted",
        "hold",
        "is_metered",
        "leases",
        "paced",
        "pools",
        "selection",
        "slots",
        "spend_bound",
        "spend_per_request",
        "spend_windows",
        "statement",
        "token_leases",
        "token_rates",
        "token_windows",
        "tokens_bound",
        "tokens_per_request",
        "units",
    )

    def __init__(self, pools: tuple[PoolLeases, ...], selection: Selection = NO_SELECTION) -> None:
        self.pools = pools
        self.selection = selection
        leases = [lease for of_pool in pools for lease in of_pool.all if applies(lease.rule, selection)]
        self.slots = tuple([lease for lease in leases if lease.measure == CONCURRENCY])
        self.counted = tuple([lease for lease in leases if lease.measure in _COUNTED])
        self.units = self.slots + self.counted
        paced = tuple([lease for lease in self.units if lease.measure in (RATE, CONCURRENCY)])
        self.paced = self.slots if paced == self.slots else paced
        self.token_windows = tuple([lease for lease in leases if lease.measure in TOKENS])
        self.token_rates = tuple([lease for lease in leases if lease.measure == TOKEN_RATE])
        self.token_leases = self.token_windows + self.token_rates
        self.spend_windows = tuple([lease for lease in leases if lease.measure in SPEND])
        #: All of them, in the order in which they are reported to callers.
        self.leases = self.counted + self.slots + self.token_leases + self.spend_windows
        self.statement = RateLimitHeaders(self.leases)
        #: Made for the first request that is not metered.
        self.hold: Hold | None = None
        #: The lowest limits of tokens and money per request, and as numbers.
        self.tokens_per_request = _lowest(pools, selection, is_spend=False)
        self.spend_per_request = _lowest(pools, selection, is_spend=True)
        self.tokens_bound = _UNBOUNDED if self.tokens_per_request is None else self.tokens_per_request.remaining
        self.spend_bound = _UNBOUNDED if self.spend_per_request is None else self.spend_per_request.remaining
        has_bounds = self.tokens_per_request is not None or self.spend_per_request is not None
        self.is_metered = bool(self.token_leases or self.spend_windows) or has_bounds

    def shared_hold(self) -> Hold:
        """The hold of every request that is not metered."""
        hold = self.hold
        if hold is None:
            hold = self.hold = Hold(self)
        return hold

    @property
    def limits_spend(self) -> bool:
        """Whether any limit is about money."""
        return bool(self.spend_windows) or self.spend_per_request is not None


def applies(limit: Limit, selection: Selection) -> bool:
    """Whether a limit of the right mode applies to requests with this selection."""
    route, models = selection
    return (not limit.route or limit.route == route) and (not limit.model or limit.model in models)


def is_of_mode(limit: Limit, pool: Pool) -> bool:
    """Whether a limit applies to the pool's mode, live or test."""
    return not limit.mode or (limit.mode == "test") is pool.is_test


def _lowest(pools: tuple[PoolLeases, ...], selection: Selection, *, is_spend: bool) -> LimitState | None:
    lowest = None
    for of_pool in pools:
        for limit in of_pool.plan.limits:
            if limit.per != PER_REQUEST or (limit.measure == TOKEN_MEASURE) is is_spend:
                continue
            if is_of_mode(limit, of_pool.pool) and applies(limit, selection):
                unit = limit_state.MONEY if is_spend else limit_state.TOKENS
                name = Window(of_pool.pool, limit.window_measure, limit.selector).policy
                state = LimitState(policy(name, limit.quota, None, unit), limit.quota)
                lowest = state if lowest is None or state.remaining < lowest.remaining else lowest
    return lowest
