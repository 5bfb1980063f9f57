"""The ports: interfaces between the gateway and the edges, and between the wire and the gateway.

`process.app` connects them to their implementations. Each port has one contract suite in tests/contracts.py, which runs
against the fake and the real implementation.

Ports on the hot path are classes that implementations extend: in the compiled build a call of a class's method is
direct, while one of a Protocol's method looks up the method and its arguments by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from keyproxy.ai.access.judged_request import JudgedRequest
from keyproxy.ai.metered_request import MeteredRequest
from keyproxy.ai.requests.inflation import ContentMemory
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.token_use import TokenUse
from keyproxy.auth.api_key import SecretKey
from keyproxy.auth.minting import MintedToken, MintParent, MintRequest
from keyproxy.http.forwarding import Forwarding
from keyproxy.http.idempotency_key import Fingerprint
from keyproxy.http.own_response import OwnResponse
from keyproxy.http_messages import RequestHead, RequestLine, ResponseHead
from keyproxy.limits.allowance import Allowance, Hold, Need
from keyproxy.model import COMPLETED, Ending, Identity, KeyDigest, Missing, Moment, Permit, Route, TimeBudget
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal


@mypyc_attr(allow_interpreted_subclasses=True)
class Identities:
    """Resolves keys to identities."""

    def known(self, digest: KeyDigest, now: Moment, *, is_first_lookup: bool = True) -> Identity:
        """The identity behind a digest, from memory. Never waits.

        `is_first_lookup` False: the request has looked it up before, and has waited for the missing value.

        Raises Missing if a store lookup is needed, a Refusal (KEY_INVALID) if the key is cached as unknown, a Refusal
        (STORE_UNAVAILABLE) if it cannot be looked up now.
        """
        raise NotImplementedError

    def acting(self, digest: KeyDigest, user_id: str, now: Moment, *, is_first_lookup: bool = True) -> Identity:
        """The identity of a key that acts for a user of its tenant, from memory. Never waits.

        Raises what `known` raises. If the credential may not act for this user, or `user_id` is no id, the identity is
        that of the credential itself, with a `standing`: DELEGATION_REFUSED, unless it is refused on its own account.
        """
        raise NotImplementedError

    def reviewed(self, digest: KeyDigest, before: Identity, now: Moment) -> Identity:
        """The identity behind a credential as it is now. Never waits. `before`: what it was resolved to earlier.

        Raises what `known` raises.
        """
        raise NotImplementedError

    def fetching(self, key: SecretKey, missing: Missing) -> Missing:
        """What to fetch after `known` raised `missing`: the same, or also a lookup of a key from another program.

        Raises a Refusal for an agent token whose signature or claims are invalid, or that has expired.
        """
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class OwnedIds:
    """Which ids of the upstream's objects belong to which tenant."""

    def is_owned(
        self,
        kind: str,
        id: str,  # noqa: A002 - the name of the column
        tenant_id: str,
        now: Moment,
        *,
        is_first_lookup: bool = True,
    ) -> bool:
        """Whether the tenant owns the id, from memory. Never waits.

        `is_first_lookup`: see `Identities.known`.

        Raises Missing if the store has to be queried, a Refusal (STORE_UNAVAILABLE) if it cannot be queried now.
        """
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Ledger:
    """Enforces limits. Contract: what is reserved and used of a window never exceeds its limit and credits."""

    def take(self, allowance: Allowance, now: Moment, need: Need | None = None, *, may_be_paid: bool = False) -> Hold:
        """Reserve what a request needs from every limit that applies to it, or nothing. Never waits.

        The hold has the most that the request can use, or what is left of it in every window if that is at least what
        it needs. None: the request is not metered; limits of routes and models do not apply. Raises Missing if a round
        trip to the ledger is needed, a Refusal if a limit is exceeded or the ledger is unavailable. `may_be_paid`: a
        Refusal for an exhausted window is provisional, and not counted.
        """
        raise NotImplementedError

    def check(
        self,
        allowance: Allowance,
        now: Moment,
        need: Need,
        paid: int | None = None,
        *,
        asks: bool,
        may_be_paid: bool = False,
    ) -> None:
        """Raise what `take` would raise. Reserves nothing, never waits.

        Before the body is read, `need` is one token (`Need(1, 1, route=...)`): what any such request needs. `paid`: the
        tokens that the request was charged before, see `take_again`. `asks`: raise Missing if a round trip to the ledger
        is needed; else use only its latest responses. `may_be_paid`: see `take`.
        """
        raise NotImplementedError

    def take_slots(self, allowance: Allowance, now: Moment, need: Need) -> Hold | None:
        """Reserve only the concurrency of a request, while its body is read. Never waits.

        `release` it just before `take`, which reserves it again, and when the request ends before that. None: nothing was
        reserved, because there is no such limit or the ledger has to be asked. Raises a Refusal if none is left.
        """
        raise NotImplementedError

    def per_request(self, allowance: Allowance, now: Moment, need: Need) -> tuple[int | None, int | None]:
        """The lowest limits of tokens and of money per request that apply to the need's route and models; None: none."""
        raise NotImplementedError

    def take_again(self, allowance: Allowance, now: Moment, need: Need | None, paid: int) -> Hold:
        """Like `take`, for a retry of a request that was charged `paid` tokens: reserves only what is beyond those."""
        raise NotImplementedError

    def trim(self, hold: Hold, tokens: int, spend: int) -> Hold:
        """Reduce a hold that was just taken to what the request will use at most."""
        raise NotImplementedError

    def extend(self, hold: Hold, tokens: int, spend: int = 0) -> Hold:
        """Add tokens and money to a hold. Raises what `take` raises, and then changes nothing."""
        raise NotImplementedError

    def release(self, hold: Hold) -> Hold:
        """End the concurrency of a hold when its request has ended. Returns the rest of the hold, to be settled later."""
        raise NotImplementedError

    def settle(self, hold: Hold, *, was_sent: bool, tokens: int = 0, spend: int = 0, is_repeat: bool = False) -> None:
        """Settle a hold, exactly once. `was_sent` False: the upstream received nothing, and nothing is charged.

        `tokens`, `spend`: what the request used, also beyond the hold. `is_repeat`: the request was charged before; this
        attempt is charged only these.
        """
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class PromptTemplates:
    """The registered templates of instructions."""

    def category(self, digest: bytes, tenant_id: str, now: Moment) -> str | None:
        """The category registered for the digest and visible to the tenant; None: unregistered. Never waits.

        Raises a Refusal (STORE_UNAVAILABLE) before the first load, and once the templates are older than stale_seconds.
        """
        raise NotImplementedError


class Claims(Protocol):
    """Deduplicates charges of requests with an Idempotency-Key. All attempts together are charged as the largest one."""

    def add(self, hold: Hold, fingerprint: bytes, tokens: int, paid: int | None, *, spend: int = 0) -> None:
        """Settle the hold of an attempt that used these tokens and this money, in place of `Ledger.settle`. Never waits.

        `paid`: the value passed to `Ledger.take_again`, None if the hold comes from `take`.
        """
        ...

    async def paid(self, fingerprint: bytes, patience: TimeBudget) -> int | None:
        """The tokens that the request was charged in the last 24 hours; None if it was not charged.

        Raises a Refusal if the lookup fails or exceeds the request's time budget.
        """
        ...


@mypyc_attr(allow_interpreted_subclasses=True)
class AgentTokenMint:
    """Mints agent tokens."""

    async def mint(self, parent: MintParent, request: MintRequest, *, actor: str) -> MintedToken:
        """Mint a token from its parent, if every bound holds at that moment. A token that is returned exists.

        `actor`: for the audit log, such as `key:<id>`.

        Raises a Refusal: DELEGATION_REFUSED if a bound does not hold, REQUEST_MALFORMED if the signed token would be
        too long, QUOTA_EXHAUSTED if the root key has as many live tokens as it may have, STORE_UNAVAILABLE if the store
        cannot be reached or no key can sign, OVERLOADED if too many tokens are being minted. Then the caller has no
        token, and there is no row unless the store was lost during the statement.
        """
        raise NotImplementedError


class Exchange:
    """One request and its response, as the gateway and the recorder see it. Times are `clock` seconds, 0.0: never.

    Initial values are class attributes, so that making an exchange writes only those that differ.
    """

    #: The request; None if its head could not be read.
    head: RequestHead | None = None

    #: For the log, without a head: what is known of the request line. Its path is empty if it is not a valid one.
    refused_line: RequestLine | None = None
    request_id: bytes = b""

    #: The digest of the request's key, once it was found.
    digest: KeyDigest | None = None

    #: The identity behind the key, once it is resolved; also for a request that is then refused.
    identity: Identity | None = None

    #: The matched route, once the identity is resolved; a public one, which needs none, at once.
    route: Route | None = None

    permit: Permit | None = None

    #: The reason for a refusal, the detail for the log, and the policy and why it refuses if a limit was exceeded.
    reason: Reason | None = None
    refusal_detail: str = ""
    policy: str = ""
    limit_reason: str = ""

    #: Provides the address of the client.
    peer: Forwarding | None = None
    ending: Ending = COMPLETED
    status: int = 0
    started_mono: float = 0.0

    #: When the request was sent upstream; when minting began, if the agent token exists. Such a request is charged.
    sent_mono: float = 0.0

    #: Waiting time before the request was sent: for the client's body, and for a connection to the upstream.
    body_wait_seconds: float = 0.0
    connection_wait_seconds: float = 0.0
    responded_mono: float = 0.0
    ended_mono: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    is_over: bool = False

    #: Whether the upstream has the whole request, as far as is known: once a metered exchange has ended early.
    was_sent_whole: bool = False

    #: On metered routes: what the request reserves, and the meter of its response.
    metered: MeteredRequest | None = None
    meter: Meter | None = None

    #: On routes that judge models, categories or namespaces: the values that the request is judged by.
    judged: JudgedRequest | None = None

    #: What it holds of limits of concurrency before it has a permit.
    slots: Hold | None = None

    #: The tokens charged, once the exchange has ended, and whether they are estimated.
    token_use: TokenUse | None = None
    is_estimated: bool = False

    #: The model in records: the name of a configured one, else as sent; empty if none was read. And the price charged.
    model: str = ""
    cost_micros: int = 0

    #: The categories of the prompt with their sources, once the request is judged by them; None: it is not.
    categories: tuple[tuple[str, str], ...] | None = None

    #: The fingerprint for recognising retries, for requests under limits with an Idempotency-Key.
    fingerprint: Fingerprint | None = None

    #: The part of the request's body that has arrived and is not sent yet, and whether the body has arrived completely.
    body: bytes = b""
    is_complete: bool = True

    #: Header lines that go upstream in place of the client's; None: the client's.
    block: bytes | None = None

    #: Whether it is admitted to mint an agent token, and what it asks for, once its body was read.
    is_minting: bool = False
    mint_request: MintRequest | None = None

    async def whole_body(self, otherwise: Refusal | None = None, *, bytes_max: int | None = None) -> None:
        """Wait until the body is complete, or the exchange is over.

        `otherwise`: the refusal if it is too large; `bytes_max`: the largest body, None: the configured bound.
        """
        raise NotImplementedError

    async def in_turns(self, advance: Callable[[], bool]) -> None:
        """Call this repeatedly until it returns True or the exchange is over, and yield to other work between calls.

        Only one exchange runs at a time, so that many of them delay other requests no longer than one does; users take
        turns, so that many requests of one user do not starve those of others.
        """
        raise NotImplementedError

    def content_memory(self) -> ContentMemory:
        """The memory of the inflated body, which the metered request releases."""
        raise NotImplementedError

    def forward(self, permit: Permit) -> None:
        """Send the request upstream and relay the response."""
        raise NotImplementedError

    def serve(self, permit: Permit) -> None:
        """Wait for `respond` or `refuse` instead of an upstream. The exchange lasts until then, even without a client."""
        raise NotImplementedError

    def respond(self, response: OwnResponse) -> None:
        """Send the response of a request that the proxy serves itself."""
        raise NotImplementedError

    def extend(self, permit: Permit) -> None:
        """Continue with a permit that has a larger hold."""
        raise NotImplementedError

    def pause_stream(self) -> None:
        """Stop reading the response until `extend` or `end_stream`."""
        raise NotImplementedError

    def refuse(self, refusal: Refusal) -> None:
        """Respond with a refusal. If a response has begun already, abort it so that the client can detect this."""
        raise NotImplementedError

    def end_stream(self, refusal: Refusal) -> None:
        """End an event stream in flight with an error event, so that the client learns the reason."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Assertions:
    """Signs the identities of forwarded requests. `number` is that of no other one in this process, and not 0."""

    number: int

    def sign(self, identity: Identity, now_mono: float) -> None:
        """Replace the identity's assertion by a new one. Raises a Refusal if there is no key to sign with."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Gate:
    """Decides on requests, and reserves and settles what they use."""

    def begin(self, exchange: Exchange) -> None:
        """Decide on a request. Calls the exchange's `forward`, `serve` or `refuse`, now or later. Raises no Refusal."""
        raise NotImplementedError

    def review(self, exchange: Exchange) -> None:
        """Recheck an exchange in flight: `refuse` it if its key is no longer valid for it."""
        raise NotImplementedError

    #: How long the rest of a response is read for its usage after the client has left.
    usage_wait_seconds: float = 0.0

    def meter(self, exchange: Exchange, response: ResponseHead) -> Meter | None:
        """The meter that reads the response to a request on a metered route; None for one that uses no tokens."""
        raise NotImplementedError

    def watch(self, exchange: Exchange) -> None:
        """After progress of a metered stream: ensure that its hold suffices."""
        raise NotImplementedError

    def settle(self, exchange: Exchange) -> None:
        """When an exchange with a permit or slots has ended: charge or release what it holds. Called exactly once."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Recorder:
    """Counts and logs exchanges."""

    def record(self, exchange: Exchange) -> None:
        """Record an exchange that has ended. Never waits. Called exactly once for every exchange, even a refused one."""
        raise NotImplementedError
