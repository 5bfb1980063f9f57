"""The pools that an identity's requests draw on, and this process's leases on them."""

from __future__ import annotations

from typing import Final

from keyproxy.limit_state import TOKENS as TOKEN_UNIT
from keyproxy.limit_state import LimitState, policy
from keyproxy.limits.lease import Lease
from keyproxy.limits.ledger_protocol import CONCURRENCY, RATE, REQUESTS, TOKENS, Pool
from keyproxy.limits.plan import Plan
from keyproxy.limits.pool_leases import PoolLeases
from keyproxy.limits.ratelimit_headers import RateLimitHeaders
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal

_COUNTED: Final = (RATE, *REQUESTS)

#: More tokens than any request holds.
_UNBOUNDED: Final = 10**18


class Allowance:
    """The limits that apply to an identity: pools with their plans. Made when its row enters the cache."""

    __slots__ = ("bundle", "pools")

    def __init__(self, pools: tuple[tuple[Pool, Plan], ...]) -> None:
        self.pools = pools
        #: The lease table's bundle for it.
        self.bundle: Bundle | None = None


@mypyc_attr(acyclic=True)
class TokenNeed:
    """Token bounds of a request: at least `least`, at most `most`; None if the request sets no bound."""

    __slots__ = ("least", "most")

    def __init__(self, least: int, most: int | None) -> None:
        self.least: Final = least
        self.most: Final = most

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.least}, {self.most})"


class Hold:
    """What one request has taken: a unit of each of the bundle's `units`, and `tokens` of each of `budgets`.

    `earlier`: holds on leases that ended during the request, because their window ended. `paid`: for a request that was
    charged before, the tokens of that charge. Such a request takes units of `paced` only, and does not hold these
    tokens again. `has_slots` is false once the request has ended and released its slots.
    """

    __slots__ = ("budgets", "bundle", "earlier", "has_slots", "paid", "tokens")

    def __init__(
        self,
        bundle: Bundle,
        budgets: tuple[Lease, ...],
        tokens: int,
        earlier: Hold | None = None,
        *,
        paid: int | None = None,
        has_slots: bool = True,
    ) -> None:
        self.bundle: Final = bundle
        self.budgets: Final = budgets
        self.tokens: Final = tokens
        self.earlier: Final = earlier
        self.paid: Final = paid
        self.has_slots: Final = has_slots

    @property
    def covers(self) -> int:
        """The number of tokens that the request may use."""
        return self.tokens + (self.paid or 0)


class Bundle:
    """All leases that requests under one allowance draw on, looked up once.

    `units`: every request takes one of each; `counted` ones are used up, `slots` are released at the end. `paced`: the
    units that a request takes even if it was charged before. Requests that count no tokens share one `hold`.
    `reported`: the leases reported to callers; `statement`: the headers that report them.
    """

    __slots__ = (
        "budgets",
        "counted",
        "counts_tokens",
        "hold",
        "paced",
        "pools",
        "reported",
        "slots",
        "statement",
        "tokens_bound",
        "tokens_per_request",
        "units",
    )

    def __init__(self, pools: tuple[PoolLeases, ...]) -> None:
        self.pools = pools
        leases = [lease for of_pool in pools for lease in of_pool.leases.values()]
        self.slots = tuple(lease for lease in leases if lease.window.measure == CONCURRENCY)
        self.counted = tuple(lease for lease in leases if lease.window.measure in _COUNTED)
        self.units = self.slots + self.counted
        self.paced = tuple(lease for lease in self.units if lease.window.measure in (RATE, CONCURRENCY))
        self.budgets = tuple(lease for lease in leases if lease.window.measure in TOKENS)
        self.reported = self.counted + self.slots + self.budgets
        self.statement = RateLimitHeaders(self.reported)
        self.hold = Hold(self, (), 0)
        bounds = [
            LimitState(policy(f"{of_pool.pool.kind}.tokens_per_request", bound, None, TOKEN_UNIT), bound)
            for of_pool in pools
            if (bound := _per_request(of_pool.plan)) is not None
        ]
        #: The lowest limit of tokens per request.
        self.tokens_per_request = min(bounds, key=lambda limit: limit.remaining, default=None)
        #: The most tokens that a request may hold without the slower check.
        self.tokens_bound = _UNBOUNDED if self.tokens_per_request is None else self.tokens_per_request.remaining
        self.counts_tokens = bool(self.budgets) or self.tokens_per_request is not None


def _per_request(plan: Plan) -> int | None:
    limit = plan.limit("tokens/request")
    return None if limit is None else limit.quota


def amount_of(bundle: Bundle, tokens: TokenNeed) -> int:
    """Return how many tokens to hold for a request: its own bound, else the plan's, else the whole window.

    Raises a Refusal if the request may use more than the plan allows per request.
    """
    bound = bundle.tokens_per_request
    most = tokens.least if tokens.most is None else tokens.most
    if bound is not None and most > bound.remaining:
        raise Refusal(
            Reason.TOKEN_LIMIT_PER_REQUEST,
            caller_text=f"The request may use up to {most} tokens; the plan allows {bound.remaining} per request.",
            limit=bound,
        )
    # At least one: a hold of 0 would pass even if no tokens are left.
    if tokens.most is not None:
        return max(1, tokens.most)
    if bound is not None:
        return max(1, bound.remaining)
    return max(1, tokens.least, min((lease.free for lease in bundle.budgets), default=0))
