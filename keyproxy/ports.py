"""The ports: what the gateway needs of the edges, and what the wire needs of the gateway.

Implementations live in the rooms of layer 2 and are introduced by `app`. Each port has one contract suite in
tests/contracts.py, run on the fake and on the real thing.

Those that a request passes several times are classes, which implementations extend: in the compiled build a method of a
class is an address, one of a Protocol is looked up by its name, and its arguments by theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from keyproxy.ai.requests.body_reading import BodyReading
from keyproxy.ai.requests.request_bound import TokenBound
from keyproxy.ai.responses.meter import Meter
from keyproxy.auth.api_key import SecretKey
from keyproxy.http.headers import Forwarding
from keyproxy.http.idempotency_key import Fingerprint
from keyproxy.http.routes import KNOWN_METHODS
from keyproxy.limits.allowance import Allowance, Hold, TokenNeed
from keyproxy.model import (
    ANSWERED,
    Ending,
    Identity,
    KeyDigest,
    Missing,
    Moment,
    Permit,
    RequestHead,
    ResponseHead,
    Route,
    TimeBudget,
    TokenUse,
)
from keyproxy.mypyc_compat import mypyc_attr
from keyproxy.reasons import Reason, Refusal


@mypyc_attr(allow_interpreted_subclasses=True)
class Identities:
    """What keys resolve to."""

    def known(self, digest: KeyDigest, now: Moment, *, is_first_lookup: bool = True) -> Identity:
        """The identity behind a digest, from memory. Never waits.

        Not `is_first_lookup`: this request has looked before, and has waited for what was missing.

        Raises Missing if the store has to be asked first, a Refusal (KEY_INVALID) if memory knows that there is no such
        key, a Refusal (STORE_UNAVAILABLE) if it cannot be known now.
        """
        raise NotImplementedError

    def fetching(self, key: SecretKey, missing: Missing) -> Missing:
        """What to fetch for a key that `known` misses: `missing`, or more than that if another program issued it."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Ledger:
    """What may still be spent under limits. Contract: what is admitted in a window is never more than its limit."""

    def take(
        self, allowance: Allowance, now: Moment, tokens: TokenNeed | None = None, *, may_be_paid: bool = False
    ) -> Hold:
        """Take what one request needs of every limit it is under, or nothing. Never waits.

        Raises Missing if the ledger has to be asked first, a Refusal if a limit is used up or the ledger cannot be asked.
        `may_be_paid`: that a window is used up is not the last word, and not counted as a refusal.
        """
        raise NotImplementedError

    def check(
        self, allowance: Allowance, now: Moment, paid: int | None = None, *, asks: bool, may_be_paid: bool = False
    ) -> None:
        """Raise the Refusal if a limit refuses the request regardless of its needs. Reserves nothing, never waits.

        `paid`: what the request was charged in tokens before, as `take_again` has it. `asks`: raise Missing if the
        ledger has to be asked first; else only what it has answered lately counts. `may_be_paid`: see `take`.
        """
        raise NotImplementedError

    def take_again(self, allowance: Allowance, now: Moment, tokens: TokenNeed | None, paid: int) -> Hold:
        """As `take`, for a request that was charged before, `paid` tokens: no request of any window, nor those tokens."""
        raise NotImplementedError

    def extend(self, hold: Hold, tokens: int) -> Hold:
        """The same hold with so many tokens more. Raises what `take` raises, and then changes nothing."""
        raise NotImplementedError

    def release(self, hold: Hold) -> Hold:
        """Its request is not under way any more. What is left of it, to be settled later."""
        raise NotImplementedError

    def settle(self, hold: Hold, *, was_sent: bool, tokens: int = 0, is_repeat: bool = False) -> None:
        """What became of it, exactly once. Not `was_sent`: the upstream saw nothing, and nothing is charged.

        `is_repeat`: the request was charged before; of this attempt `tokens` alone are.
        """
        raise NotImplementedError


class Claims(Protocol):
    """Which requests with an Idempotency-Key were charged. All attempts at one are charged as the largest is."""

    def add(self, hold: Hold, fingerprint: bytes, tokens: int, paid: int | None) -> None:
        """An attempt has ended that used so many tokens: have its hold settled, in place of `Ledger.settle`. Never waits.

        `paid`: what it was taken again for, None if it was taken like any other.
        """
        ...

    async def paid(self, fingerprint: bytes, patience: TimeBudget) -> int | None:
        """What the request was charged in tokens in the last 24 hours; None if it was not charged.

        Raises a Refusal if that cannot be known now, or not before the request's patience has ended.
        """
        ...


class Exchange:
    """One request and its answer, as the gateway and the recorder see it. Times are `clock` seconds, 0.0: never.

    What every exchange begins with is on the class, so that making one writes only what is its own.
    """

    #: The request; None if its head could not be read.
    head: RequestHead | None = None
    request_id: bytes = b""

    #: What it is to be looked up by, once a key was found in it.
    digest: KeyDigest | None = None

    #: Whose key it is, once that is known; also for a request that is then refused.
    identity: Identity | None = None

    #: Which route it is on, once it is known whose request it is.
    route: Route | None = None

    permit: Permit | None = None

    #: The reason for a refusal, the detail for our log, and the policy if a limit refused it.
    reason: Reason | None = None
    refusal_detail: str = ""
    policy: str = ""

    #: Knows the address of the client.
    peer: Forwarding | None = None
    ending: Ending = ANSWERED
    status: int = 0
    started_mono: float = 0.0
    sent_mono: float = 0.0

    #: How long it waited before being sent: for the client's body, and for a connection to the upstream.
    body_wait_seconds: float = 0.0
    connection_wait_seconds: float = 0.0
    answered_mono: float = 0.0
    ended_mono: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    is_over: bool = False

    #: What it asks for in tokens, and what reads its answer; on routes with tokens. `reading`: what has its body
    #: while a long one is read.
    ask: TokenBound | None = None
    reading: BodyReading | None = None
    meter: Meter | None = None

    #: What it is charged in tokens, once it has ended, and whether nobody has said so.
    token_use: TokenUse | None = None
    is_estimated: bool = False

    #: What it is recognised by if it comes again; of requests under limits with an Idempotency-Key.
    fingerprint: Fingerprint | None = None

    #: The request's body as far as it has arrived and is not sent yet, and whether all of it has arrived.
    body: bytes = b""
    is_complete: bool = True

    #: The header lines that go upstream instead of the client's, None if those go.
    block: bytes | None = None

    async def whole_body(self, otherwise: Refusal | None = None) -> None:
        """Wait until the body has arrived whole, or the exchange is over. `otherwise`: what one too large is told."""
        raise NotImplementedError

    async def in_turns(self, advance: Callable[[], bool]) -> None:
        """Call this until it returns True or the exchange is over, and let other work go on between two calls.

        Only one exchange is called at a time, so that many of them delay others no longer than one does; and users take
        turns, so that the many requests of one user leave those of others their time.
        """
        raise NotImplementedError

    def forward(self, permit: Permit) -> None:
        """Send the request upstream and relay the answer."""
        raise NotImplementedError

    def extend(self, permit: Permit) -> None:
        """Go on with a permit that holds more."""
        raise NotImplementedError

    def pause_stream(self) -> None:
        """Read no more of the answer, until `extend` or `end_stream`."""
        raise NotImplementedError

    def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal. If an answer has begun already, it is cut off so that the client can tell."""
        raise NotImplementedError

    def end_stream(self, refusal: Refusal) -> None:
        """End a stream of events that is under way: its client hears why, and can tell that it ended here."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Gate:
    """What the wire asks of the gateway."""

    #: Methods that are served; a request with any other is refused.
    methods: frozenset[bytes] = KNOWN_METHODS

    def request_id(self, head: RequestHead | None) -> bytes:
        """The client's own request id if it is sane, else a new one."""
        raise NotImplementedError

    def holds_key(self, target: bytes) -> bool:
        """Whether a request target has a key in it."""
        raise NotImplementedError

    def begin(self, exchange: Exchange) -> None:
        """Decide. Calls `forward` or `refuse` on the exchange, before it returns or later. Never raises a Refusal."""
        raise NotImplementedError

    def review(self, exchange: Exchange) -> None:
        """Look again at an exchange that is under way: `refuse` it if its key would not be let in any more."""
        raise NotImplementedError

    def meter(self, exchange: Exchange, answer: ResponseHead) -> Meter:
        """What reads the answer to a request that asks for tokens."""
        raise NotImplementedError

    def watch(self, exchange: Exchange) -> None:
        """A metered stream has gone on: see that what is held for it suffices."""
        raise NotImplementedError

    def settle(self, exchange: Exchange) -> None:
        """An exchange that had a permit has ended: what it held is charged, or given back. Exactly once."""
        raise NotImplementedError

    def limit_headers(self, permit: Permit, now_mono: float) -> bytes:
        """Header lines that tell how it stands now with the limits a request is under; empty if there are none."""
        raise NotImplementedError

    def retiring_header(self, identity: Identity) -> bytes:
        """The header line that tells for how long a key that was replaced still works; empty for any other."""
        raise NotImplementedError

    def error_shape(self, head: RequestHead | None) -> str:
        """The shape in which a refusal of this request is told."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Recorder:
    """Counts and logs what has happened."""

    def record(self, exchange: Exchange) -> None:
        """One exchange that has ended. Never waits. Called exactly once for every exchange, refused ones too."""
        raise NotImplementedError
