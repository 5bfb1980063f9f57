"""The life of a request, top to bottom: decide without waiting; fetch only what is missing; decide again.

`decide` is one synchronous function over values in memory. When it misses one it says which; the cold path fetches that
and calls the same function again, so it cannot decide differently from the hot one. On the hot path no task is made and
nothing is awaited between the request and the bytes that go upstream.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Final

from keyproxy import token_accounting
from keyproxy.ai.responses.meter import Meter
from keyproxy.ai.responses.select_meter import meter_for
from keyproxy.auth import authorization, credentials
from keyproxy.auth.api_key import KeyFormat
from keyproxy.http import headers, idempotency_key
from keyproxy.http.idempotency_key import Fingerprint
from keyproxy.http.routes import RouteTable
from keyproxy.limits.allowance import Allowance, Hold, TokenNeed
from keyproxy.model import NO_TOKENS, Identity, Missing, Moment, Permit, RequestHead, ResponseHead, TimeBudget
from keyproxy.ports import Claims, Exchange, Gate, Identities, Ledger
from keyproxy.reasons import Blame, Reason, Refusal

_log = logging.getLogger(__name__)

#: A decision misses an identity, a body, a payment, a lease, and what was brought may be gone when it is looked for.
_ROUNDS_MAX: Final = 8


class Gateway(Gate):
    """Decides on requests. Knows ports, not implementations."""

    def __init__(
        self, *, key_format: KeyFormat, identities: Identities, ledger: Ledger, claims: Claims,
        routes: RouteTable, now: Callable[[], Moment], instance: bytes,
    ) -> None:  # fmt: skip
        """`instance`: a few random characters that make this process's request ids its own."""
        self._key_format = key_format
        self._identities = identities
        self._ledger = ledger
        self._claims = claims
        self._routes = routes
        self.methods = routes.methods()
        self._now = now
        self._instance = instance
        self._serial = itertools.count(1)
        self._undecided: set[asyncio.Task[None]] = set()

    def begin(self, exchange: Exchange) -> None:
        """Decide on a request, now if memory suffices, else as soon as what is missing has been fetched."""
        try:
            permit = self.decide(exchange)
        except Missing as missing:
            self._start(self._fetch_and_decide(exchange, missing))
        except Refusal as refusal:
            exchange.refuse(refusal)
        else:
            exchange.forward(permit)

    def decide(self, exchange: Exchange, *, is_first_lookup: bool = True) -> Permit:
        """May this request go upstream, and as whom? Never waits.

        Raises Missing for a value that has to be fetched first, a Refusal if it may not.
        """
        head = exchange.head
        if head is None:
            raise Refusal(Reason.INTERNAL_ERROR, "a request without a head was to be decided")
        now = self._now()
        digest = exchange.digest = credentials.digest(head)
        try:
            identity = self._identities.known(digest, now, is_first_lookup=is_first_lookup)
        except Refusal:
            # Whatever memory or the store may say: a key that cannot exist is told so, and nobody is asked.
            credentials.checked(head, self._key_format)
            raise
        except Missing as missing:
            raise self._identities.fetching(credentials.checked(head, self._key_format), missing) from None
        exchange.identity = identity
        exchange.route = self._routes.match(head.line.method, head.line.path)
        grant = authorization.admit(identity, exchange.route, now)
        allowance = identity.allowance
        if head.fields.has_idempotency_key and allowance is not None and exchange.fingerprint is None:
            # Of the body as it came: before anything is read or changed of it.
            exchange.fingerprint = idempotency_key.fingerprint(identity, head, exchange.body)
        need = None
        if grant.route.tokens is not NO_TOKENS:
            if exchange.ask is None and allowance is not None:
                self._check_limits(exchange, allowance, now)
            need = token_accounting.need(exchange, grant.route)
        if allowance is None:
            return Permit(grant)
        if exchange.fingerprint is not None:
            return Permit(grant, self._take_once(exchange, exchange.fingerprint, allowance, need))
        return Permit(grant, self._ledger.take(allowance, now, need))

    def _check_limits(self, exchange: Exchange, allowance: Allowance, now: Moment) -> None:
        """Refuse a request that a limit refuses regardless of its body, before waiting for the body or reading it."""
        fingerprint = exchange.fingerprint
        asks = exchange.reading is None and not token_accounting.is_read_at_once(exchange)
        if fingerprint is None:
            self._ledger.check(allowance, now, asks=asks)
            return
        try:
            self._ledger.check(allowance, now, fingerprint.paid, asks=asks, may_be_paid=not fingerprint.is_asked)
        except Refusal as refusal:
            raise self._unless_paid(exchange, fingerprint, refusal) from None

    def _take_once(
        self, exchange: Exchange, fingerprint: Fingerprint, allowance: Allowance, need: TokenNeed | None
    ) -> Hold:
        """As the ledger's `take`, but a request that was charged before is not refused for what it has paid already."""
        now = self._now()
        if fingerprint.paid is not None:
            return self._ledger.take_again(allowance, now, need, fingerprint.paid)
        try:
            return self._ledger.take(allowance, now, need, may_be_paid=not fingerprint.is_asked)
        except Refusal as refusal:
            raise self._unless_paid(exchange, fingerprint, refusal) from None

    def _unless_paid(self, exchange: Exchange, fingerprint: Fingerprint, refusal: Refusal) -> Exception:
        """The refusal, or what is missing if the request may have been charged before."""
        if not fingerprint.may_be_paid(refusal.reason):
            return refusal
        return Missing("payment", lambda patience: self._ask_whether_paid(exchange, fingerprint, refusal, patience))

    async def _ask_whether_paid(
        self, exchange: Exchange, fingerprint: Fingerprint, spent: Refusal, patience: TimeBudget
    ) -> None:
        """Have the store asked, once all of the request is there to be recognised. Too much to hold: it is refused."""
        await exchange.whole_body(spent)
        if not exchange.is_over:
            fingerprint.paid = await self._claims.paid(fingerprint.digest(), patience)
            fingerprint.is_asked = True

    @property
    def is_deciding(self) -> bool:
        """Whether a request waits in here for what its decision is missing."""
        return bool(self._undecided)

    async def all_decided(self) -> None:
        """Wait until none does."""
        while waiting := [task for task in self._undecided if not task.done()]:
            await asyncio.wait(waiting)

    async def _fetch_and_decide(self, exchange: Exchange, missing: Missing) -> None:
        """The cold path. Ends with the exchange forwarded, refused, or found to be over already."""
        patience = TimeBudget()
        try:
            for _ in range(_ROUNDS_MAX):
                failure = await _fetched(missing, patience)
                if exchange.is_over:
                    return
                try:
                    permit = self.decide(exchange, is_first_lookup=False)
                except Missing as still:
                    # What could not be fetched may have become unnecessary: a stale value serves while the store is
                    # down. Only if the decision still needs it is the failure the answer.
                    if failure is not None:
                        raise failure from still
                    missing = still
                else:
                    exchange.forward(permit)
                    return
            raise Refusal(Reason.OVERLOADED, f"no decision after {_ROUNDS_MAX} rounds; missing: {missing}")
        except Refusal as refusal:
            exchange.refuse(refusal)
        except Exception:  # noqa: BLE001 - the outermost boundary of this task
            _log.exception("deciding failed", extra={"request_id": exchange.request_id.decode("ascii")})
            exchange.refuse(Refusal(Reason.INTERNAL_ERROR))

    def review(self, exchange: Exchange) -> None:
        """Look again at an exchange that is under way: refuse it if its key would not be let in any more.

        What was asked for stays asked for, so only the key, its owners and the route are looked at. That the store
        cannot be asked ends nothing that was verified when it began.
        """
        try:
            self._review(exchange)
        except Missing as missing:
            self._start(self._fetch_and_review(exchange, missing))

    def _start(self, fetching: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(fetching)
        self._undecided.add(task)
        task.add_done_callback(self._undecided.discard)

    def _review(self, exchange: Exchange) -> None:
        if exchange.digest is None or exchange.is_over:
            return
        now = self._now()
        try:
            identity = self._identities.known(exchange.digest, now, is_first_lookup=False)
            authorization.admit(identity, exchange.route, now)
        except Refusal as refusal:
            if refusal.reason.value.blame is Blame.CALLER:
                exchange.refuse(refusal)

    async def _fetch_and_review(self, exchange: Exchange, missing: Missing) -> None:
        await _fetched(missing, TimeBudget())
        # Missing again: the next review asks again.
        with contextlib.suppress(Missing):
            self._review(exchange)

    def settle(self, exchange: Exchange) -> None:
        """What an exchange held is charged if the upstream saw anything of it, else given back."""
        permit = exchange.permit
        if permit is None:
            return
        tokens = 0 if exchange.ask is None else token_accounting.charge(exchange, permit)
        if permit.hold is None:
            return
        fingerprint, was_sent = exchange.fingerprint, exchange.sent_mono > 0.0
        if fingerprint is not None and was_sent and exchange.is_complete:
            self._claims.add(permit.hold, fingerprint.digest(), tokens, fingerprint.paid)
        else:
            self._ledger.settle(permit.hold, was_sent=was_sent, tokens=tokens)

    def meter(self, exchange: Exchange, answer: ResponseHead) -> Meter:
        """What reads the answer to a request that asks for tokens."""
        kind = NO_TOKENS if exchange.route is None else exchange.route.tokens
        hides_usage = exchange.ask is not None and exchange.ask.hides_usage
        return meter_for(kind, answer, hides_usage=hides_usage)

    def watch(self, exchange: Exchange) -> None:
        """A metered stream has gone on: extend what is held for it if it needs more, end it if there is no more."""
        self._watch(exchange)

    def _watch(self, exchange: Exchange, patience: TimeBudget | None = None) -> None:
        permit = exchange.permit
        if permit is None or permit.hold is None or exchange.is_over:
            return
        tokens, is_used_up = token_accounting.extension_needed(exchange, permit.hold)
        if not tokens:
            return
        try:
            exchange.extend(Permit(permit.grant, self._ledger.extend(permit.hold, tokens)))
        except Missing as missing:
            exchange.pause_stream()
            self._start(self._fetch_and_watch(exchange, missing, patience or TimeBudget()))
        except Refusal as refusal:
            if is_used_up:
                exchange.end_stream(refusal)
            else:
                exchange.extend(permit)

    async def _fetch_and_watch(self, exchange: Exchange, missing: Missing, patience: TimeBudget) -> None:
        try:
            refusal = await _fetched(missing, patience)
            if refusal is not None and not exchange.is_over:
                exchange.end_stream(refusal)
            else:
                self._watch(exchange, patience)
        except Exception:  # noqa: BLE001 - the outermost boundary of this task: the stream is held up until it says so
            _log.exception("extending failed", extra={"request_id": exchange.request_id.decode("ascii")})
            exchange.refuse(Refusal(Reason.INTERNAL_ERROR))

    def limit_headers(self, permit: Permit, now_mono: float) -> bytes:
        """Header lines that tell how it stands with the limits a request is under."""
        return b"" if permit.hold is None else permit.hold.bundle.statement.lines(now_mono)

    def retiring_header(self, identity: Identity) -> bytes:
        """The header line that tells for how many seconds a key that was replaced still works."""
        if identity.retiring_field is None:
            return b""
        left = max(0, math.floor(identity.expires_wall_seconds - self._now().wall_seconds))
        return b"%b%d\r\n" % (identity.retiring_field, left)

    def holds_key(self, target: bytes) -> bool:
        """Whether a request target has a key in it."""
        return credentials.holds_key(target, self._key_format)

    def request_id(self, head: RequestHead | None) -> bytes:
        """The client's own request id if it is sane, else a new one: unique, not secret."""
        sent = head.request_id if head is not None else None
        if head is not None and sent is not None and headers.sane_request_id(sent):
            # A key in this place would be logged and echoed.
            keys = (token for field in head.credentials for token in field.value.split()[-1:])
            if not self._key_format.is_within(sent) and not any(key in sent for key in keys):
                return sent
        return b"%b%010x" % (self._instance, next(self._serial))

    def error_shape(self, head: RequestHead | None) -> str:
        """The shape in which a refusal of this request is told."""
        if head is not None:
            try:
                route = self._routes.match(head.line.method, head.line.path)
            except Refusal:
                route = None
            if route is not None:
                return route.error_shape
        return "problem"


async def _fetched(missing: Missing, patience: TimeBudget) -> Refusal | None:
    """Fetch what is missing; the Refusal that says why not, if it could not be had."""
    try:
        await missing.fetch_missing(patience)
    except Refusal as refusal:
        return refusal
    return None
