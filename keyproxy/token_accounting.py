"""Tokens of one request: how many to reserve before it is forwarded, how many to charge when it has ended.

    reserve  bound of the prompt + requested maximum; without a maximum a default, within the plan's limit per request
    charge   the usage in the response; for an interrupted stream, the tokens received so far; else the reservation

A charge that does not come from the response is marked as estimated. The reservation is an upper bound, so the charge
fits into it; the hold of a stream that outgrows it is extended (`extension_needed`).
"""

from __future__ import annotations

from typing import Final

from keyproxy.ai.requests.body_reading import BodyReading
from keyproxy.ai.requests.forwarded_headers import for_metering
from keyproxy.ai.requests.request_bound import PARSED_BYTES_MAX, TokenBound, bound_of
from keyproxy.limits.allowance import Hold
from keyproxy.model import COMPLETED, Missing, Permit, RequestHead, Route, TokenUse
from keyproxy.ports import Exchange
from keyproxy.reasons import Reason, Refusal

#: The maximum size of a body's content, after decompression.
BODY_BYTES_MAX: Final = 33_554_432

#: The average size of a token in most languages and code; for estimates where the response reports no usage.
_BYTES_A_TOKEN: Final = 4

#: A stream's hold is extended when no more than the reserve remains of it, by the extension or a quarter of the hold.
_RESERVE_TOKENS: Final = 32
_EXTENSION_TOKENS: Final = 256


def need(exchange: Exchange, route: Route) -> TokenBound:
    """The tokens to reserve for a request on a metered route. Raises Missing until its body has arrived and is parsed."""
    token_bound = exchange.token_bound
    if token_bound is None:
        head = exchange.head
        if head is None:
            raise Refusal(Reason.INTERNAL_ERROR, "cannot meter a request without a head")
        if not exchange.is_complete:
            raise Missing("body", lambda _patience: exchange.whole_body())
        token_bound = _read(exchange, head, route)
    return token_bound


def is_read_at_once(exchange: Exchange) -> bool:
    """Whether parsing the body is as cheap as checking whether a limit refuses the request."""
    head = exchange.head
    return (
        exchange.is_complete and len(exchange.body) <= PARSED_BYTES_MAX and head is not None and not head.fields.codings
    )


def _read(exchange: Exchange, head: RequestHead, route: Route) -> TokenBound:
    reading = exchange.reading
    token_bound = bound_of(route.tokens, head, exchange.body) if reading is None else reading.asked
    if token_bound is None:
        raise _reading(exchange, reading, head, route)
    fields, length = head.fields, None
    if reading is not None:
        exchange.body, exchange.reading = reading.body, None
    elif token_bound.body is not None:
        exchange.body, token_bound.body = token_bound.body, None
    if token_bound.hides_usage:
        length = None if fields.is_chunked else len(exchange.body)
    exchange.block = for_metering(head.block, accepts_codings=fields.accepts_codings, content_length=length)
    exchange.token_bound = token_bound
    return token_bound


def _reading(exchange: Exchange, reading: BodyReading | None, head: RequestHead, route: Route) -> Missing:
    """Start reading a body that is too long to parse at once. The reading takes over the body."""
    if reading is None:
        reading = BodyReading(route.tokens, head, exchange.body, bytes_max=BODY_BYTES_MAX)
        exchange.reading, exchange.body = reading, b""
    advance = reading.advance
    return Missing("reading", lambda _patience: exchange.in_turns(advance))


def charge(exchange: Exchange, permit: Permit) -> int:
    """The number of tokens to charge for a request that has ended. Stores the usage in the exchange."""
    token_bound = exchange.token_bound
    if token_bound is None or not exchange.sent_mono:
        return 0
    exchange.token_use, exchange.is_estimated = _use(exchange, token_bound, permit.hold)
    return exchange.token_use.total


def _use(exchange: Exchange, token_bound: TokenBound, hold: Hold | None) -> tuple[TokenUse, bool]:
    meter = exchange.meter
    reported = None if meter is None else meter.use
    is_whole = exchange.ending is COMPLETED
    if reported is not None and is_whole:
        return reported, False
    prompt = -(-token_bound.prompt_bound // _BYTES_A_TOKEN)
    if meter is not None and meter.is_stream and not is_whole:
        tokens_in = meter.tokens_in if meter.tokens_in is not None else prompt
        so_far = TokenUse(0, 0) if reported is None else reported
        use = TokenUse(max(tokens_in, so_far.tokens_in), max(meter.produced, so_far.tokens_out))
        if hold is not None and hold.limits_tokens and use.total > hold.covers:
            # A stream ends with its budget; an event with more than one token must not exceed it.
            tokens_in = min(use.tokens_in, hold.covers)
            use = TokenUse(tokens_in, hold.covers - tokens_in)
        return use, True
    if reported is not None:
        return reported, False
    if hold is None or not hold.limits_tokens:
        return TokenUse(prompt, 0 if meter is None else meter.produced), True
    tokens_in = min(prompt, hold.covers)
    return TokenUse(tokens_in, hold.covers - tokens_in), True


def extension_needed(exchange: Exchange, hold: Hold) -> tuple[int, bool]:
    """The number of tokens by which to extend a stream's hold, 0 for not yet; and whether the hold is used up already.

    Near the end of the budget, the extension is whatever remains of it.
    """
    token_bound, meter = exchange.token_bound, exchange.meter
    if token_bound is None or meter is None or not hold.limits_tokens:
        return 0, False
    tokens_in = meter.tokens_in if meter.tokens_in is not None else -(-token_bound.prompt_bound // _BYTES_A_TOKEN)
    used = tokens_in + meter.produced
    if used + _RESERVE_TOKENS < hold.covers:
        return 0, False
    left = hold.tokens_left
    return max(1, min(max(_EXTENSION_TOKENS, hold.covers // 4), left)), used >= hold.covers
