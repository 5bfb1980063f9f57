"""The values of a request's life, independent of their source and use. Values that requests share are compared by
identity, so that a lookup costs no more than hashing a pointer.

Each phase consumes the type that the phase before it made: a `RequestHead` is validated, an `Identity` is resolved, a
`Grant` states that this identity may use this route now, a `Permit` is required for forwarding. There is no other way
to make one. On public routes a `PublicGrant` takes the place of identity and grant.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, NewType, TypeVar

from keyproxy.limits.allowance import Allowance, Hold
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal

#: SHA-256 of the whole key, 32 bytes. The digest is cached, stored and compared, never the key itself.
KeyDigest = NewType("KeyDigest", bytes)

#: The owner of a request: tenant, user and mode. All keys of a user count together, test and live traffic separately.
Owner = tuple[str, str, str]

LIVE: Final = "live"
TEST: Final = "test"
PUBLIC: Final = "public"

#: All requests on public routes together.
PUBLIC_OWNER: Final[Owner] = ("", "", PUBLIC)

NEVER = math.inf

NO_TOKENS = "none"

#: What a route serves that mints agent tokens.
AGENT_TOKENS: Final = "agent-tokens"


@mypyc_attr(acyclic=True, free_list_len=1)
class Moment:
    """One instant on both clocks. `wall_seconds` is Unix time, for configured dates; `mono_seconds` never jumps."""

    # Made for every request, as Grant and Permit are: a NamedTuple takes twice as long to make.
    __slots__ = ("mono_seconds", "wall_seconds")

    def __init__(self, wall_seconds: float, mono_seconds: float) -> None:
        self.wall_seconds: Final = wall_seconds
        self.mono_seconds: Final = mono_seconds

    def __repr__(self) -> str:
        return f"Moment({self.wall_seconds!r}, {self.mono_seconds!r})"


@dataclass(frozen=True, slots=True, eq=False)
class AgentToken:
    """The agent token behind an identity, and what tokens minted from it must not exceed.

    `agents`: the chain of agents, the current one first. A budget of None does not limit.
    """

    token_id: str
    agents: tuple[str, ...]
    depth: int
    token_budget: int | None = None
    request_budget: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class OAuthSession:
    """The session of an OAuth client behind an identity, whose key id is that of the session.

    `client_id`: that of the client's row, `cli_…`. `bound_to`: SHA-256 of the client's certificate, which the connection
    must have (RFC 8705); None: any will do.
    """

    grant_id: str
    client_id: str
    bound_to: bytes | None = None


@mypyc_attr(acyclic=True)
class CachedAssertion:
    """The signed assertion of one identity, as a header line. It is used while `signed_by` is the number of the signer in
    use, and before `renew_mono_seconds`."""

    __slots__ = ("line", "renew_mono_seconds", "signed_by")

    def __init__(self) -> None:
        self.line = b""
        self.renew_mono_seconds = 0.0
        self.signed_by = 0


@mypyc_attr(acyclic=True)
@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """The identity behind a credential, computed once when its row enters the cache.

    `header_block` is the identity headers as ready bytes. `standing` is None, or the reason for refusing every request
    with this key. `expires_wall_seconds` is Unix time, NEVER if the key has no expiry. `mode` is `live` or `test`.
    `allowance` is the limits that apply to its requests, None if there are none. `retiring_field` is the start of the
    header line with the remaining lifetime of the key, None unless another key has replaced it. `owner` is the unit by
    which requests are counted where users share a bounded resource.

    `key_id`: the key; behind an agent token, the key that it was cut from. `user_id`: the user whose data, limits and
    usage the request concerns. `actor_user_id`: the owner of the key, if it acts for that user; else None.
    `agent_token`: the agent token; None: the credential is none. `oauth`: the session of an OAuth access token; None: the
    credential is none. `lineage`: the first key of its rotations, or itself; the grant of a session. `can_act`: the key
    may act for users of its tenant.
    """

    key_id: str
    user_id: str
    tenant_id: str
    scopes: frozenset[str]
    is_test: bool
    expires_wall_seconds: float
    standing: Reason | None
    header_block: bytes = field(repr=False)
    allowance: Allowance | None = field(default=None, repr=False)
    retiring_field: bytes | None = field(default=None, repr=False)
    actor_user_id: str | None = None
    agent_token: AgentToken | None = None
    can_act: bool = False
    lineage: str = ""
    oauth: OAuthSession | None = None
    assertion: CachedAssertion = field(default_factory=CachedAssertion, repr=False)
    mode: str = field(init=False)
    owner: Owner = field(init=False)

    def __post_init__(self) -> None:
        mode = TEST if self.is_test else LIVE
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "owner", (self.tenant_id, self.user_id, mode))

    def retiring_header(self, wall_seconds: float) -> bytes:
        """The header line with the number of seconds for which a replaced key still works; empty for any other key."""
        if self.retiring_field is None:
            return b""
        return b"%b%d\r\n" % (self.retiring_field, max(0, math.floor(self.expires_wall_seconds - wall_seconds)))


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """One compiled row of the route table. `name` is its text in the configuration, and its label in the metrics.

    `tokens`: the dialect of metered requests; NO_TOKENS: no metering. `deduplicates`: repeats of a request with an
    Idempotency-Key are charged once. `is_public`: requests need no key, and credentials are ignored.
    `forwards_encoded_slash`: paths may have `%2F` in the value of a placeholder. `serves`: what the proxy responds with
    itself, such as AGENT_TOKENS; empty: requests are forwarded. `tool`: the name of the tool that its requests call, and
    `tool_scopes` what that requires; `protocol`: "mcp" if the body names the tool; `provider`: whose credential goes
    upstream; each may be empty.
    """

    name: str
    scopes: frozenset[str] = frozenset()
    error_shape: str = "problem"
    tokens: str = NO_TOKENS
    deduplicates: bool = True
    is_public: bool = False
    forwards_encoded_slash: bool = False
    serves: str = ""
    tool: str = ""
    protocol: str = ""
    provider: str = ""
    #: Whether lists of tools omit those that the credential may not call.
    filters_tools_list: bool = False
    tool_scopes: frozenset[str] = frozenset()


@mypyc_attr(acyclic=True)
class Grant:
    """This identity may use this route at this moment."""

    __slots__ = ("identity", "route")

    def __init__(self, identity: Identity, route: Route) -> None:
        self.identity: Final = identity
        self.route: Final = route


@mypyc_attr(acyclic=True)
class PublicGrant:
    """Any client may use this public route. No identity is known, so none goes upstream and no limits apply."""

    __slots__ = ("route",)

    def __init__(self, route: Route) -> None:
        self.route: Final = route


@mypyc_attr(acyclic=True)
class Permit:
    """A decision to forward. Nothing is written upstream without one. `hold`: the request's reservation under limits."""

    __slots__ = ("grant", "hold")

    def __init__(self, grant: Grant | PublicGrant, hold: Hold | None = None) -> None:
        self.grant: Final = grant
        self.hold: Final = hold

    def limit_headers(self, now_mono: float) -> bytes:
        """The RateLimit header lines for the limits that apply to the request; empty if there are none."""
        return b"" if self.hold is None else self.hold.bundle.statement.lines(now_mono)


class Ending(enum.Enum):
    """How an exchange ended."""

    COMPLETED = "completed"  # the upstream's response was relayed completely, or the proxy served the request itself
    REFUSED = "refused"  # the proxy refused the request
    CUT = "cut"  # the response broke off; its framing is left incomplete, so that the client notices
    CLIENT_GONE = "client_gone"  # the client disconnected before the response was complete


#: The most frequent ending. An attribute lookup on the enum class would cost more than the comparison itself.
COMPLETED: Final = Ending.COMPLETED


#: A decision may need an identity, a body, its reading, ownership, an earlier charge, a lease, consents, an upstream
#: credential, an approval and a compressed body; a fetched value may be evicted before its use.
_ROUNDS_MAX: Final = 12

_Decision = TypeVar("_Decision")

#: The maximum time for which one request waits for the ledger, over all rounds of its decision.
PATIENCE_SECONDS: Final = 4.0


class TimeBudget:
    """The remaining time for which a request may wait for the ledger. Each wait is subtracted from it."""

    __slots__ = ("seconds_left",)

    def __init__(self) -> None:
        self.seconds_left = PATIENCE_SECONDS


class Missing(Exception):
    """A decision needs a value that is not in memory. `fetch_missing` fetches it, or raises a Refusal."""

    def __init__(
        self,
        what: str,
        fetch_missing: Callable[[TimeBudget], Awaitable[None]],
        begin: Callable[[Callable[[Refusal | None], None]], None] | None = None,
    ) -> None:
        super().__init__(what)
        self._bring = fetch_missing
        #: Fetches the value without a task; when that has ended, in a later iteration of the event loop, it calls its
        #: argument, with the refusal if there is none. None: only `fetch_missing` fetches it.
        self.begin = begin

    async def fetch_missing(self, patience: TimeBudget | None = None) -> None:
        """Fetch the value. `patience`: the request's time budget, which earlier rounds may have reduced; None: full."""
        await self._bring(TimeBudget() if patience is None else patience)

    async def failure(self, patience: TimeBudget) -> Refusal | None:
        """Fetch the value. Returns the Refusal if that fails."""
        try:
            await self.fetch_missing(patience)
        except Refusal as refusal:
            return refusal
        return None

    async def fetch_and_decide(self, decide: Callable[[], _Decision], is_over: Callable[[], bool]) -> _Decision | None:
        """The cold path of a decision: fetch the value and decide again, until no value is missing.

        Returns None if `is_over`: nothing waits for the decision any more. Raises a Refusal.
        """
        missing, patience = self, TimeBudget()
        for _ in range(_ROUNDS_MAX):
            failure = await missing.failure(patience)
            if is_over():
                return None
            try:
                return decide()
            except Missing as still:
                # A value that could not be fetched may no longer be needed: stale values are used while the store is
                # down. The failure becomes the refusal only if the decision still needs the value.
                if failure is not None:
                    raise failure from still
                missing = still
        raise Refusal(Reason.OVERLOADED, f"no decision after {_ROUNDS_MAX} rounds; missing: {missing}")
