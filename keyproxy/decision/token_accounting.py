"""The tokens and the money of one exchange: what to reserve before it is forwarded, what to charge when it has ended.

`ai.metered_request` decides on the numbers; this module reads them from the exchange, and writes them back.
"""

from __future__ import annotations

from typing import Final

from keyproxy.ai.charge import ResponseEnd
from keyproxy.ai.metered_request import MeteredRequest
from keyproxy.ai.requests.forwarded_headers import for_metering, with_length
from keyproxy.ai.responses.meter import ResponseUse
from keyproxy.http_messages import RequestHead
from keyproxy.limits.allowance import Hold
from keyproxy.model import COMPLETED, Ending, Missing
from keyproxy.ports.exchange import Exchange
from keyproxy.problem_spec import Blame

_SWITCHING_PROTOCOLS: Final = 101

#: The response to an opened tunnel, whose content is not read.
_TUNNELED: Final = ResponseUse()

#: A stream's hold is extended when no more than the reserve remains of it, by the extension or a quarter of the hold.
_RESERVE_TOKENS: Final = 32
_EXTENSION_TOKENS: Final = 256


def read(exchange: Exchange, head: RequestHead, metered: MeteredRequest) -> None:
    """Read what a request needs. Raises Missing until its body has arrived and is read."""
    if metered.collects:
        if not exchange.is_complete:
            raise Missing("body", lambda _patience: exchange.whole_body())
        if head.fields.codings and metered.memory is None:
            metered.memory = exchange.content_memory()
        if metered.has_begun or not metered.reads_at_once(head, exchange.body):
            raise _reading(exchange, head, metered)
    if not metered.read(head, exchange.body):
        raise _reading(exchange, head, metered)


def _reading(exchange: Exchange, head: RequestHead, metered: MeteredRequest) -> Missing:
    return Missing("reading", lambda _patience: exchange.in_turns(lambda: metered.read(head, exchange.body)))


def is_read_at_once(exchange: Exchange, head: RequestHead, metered: MeteredRequest) -> bool:
    """Whether reading the body is as cheap as checking whether a limit refuses the request."""
    if not metered.collects:
        return True
    return exchange.is_complete and metered.reads_at_once(head, exchange.body)


def fit(metered: MeteredRequest, hold: Hold | None) -> None:
    """Fit the request's output to its hold."""
    if hold is not None and hold.meters is not None:
        metered.fit(hold.covers, None if hold.paid is not None else hold.total_spend)
    elif metered.uses_tokens:
        metered.fit(metered.need.most, None)


def write_body(exchange: Exchange, metered: MeteredRequest) -> bool:
    """Write the next portion of the changed body; return whether it was the last, or nothing is changed."""
    if not metered.edits:
        return True
    body = metered.write_body()
    if body is None:
        return False
    exchange.body = body
    return True


def finish_body(exchange: Exchange, head: RequestHead, metered: MeteredRequest) -> None:
    """Set the header lines that go upstream, and release what was kept of the body."""
    judgement = None if exchange.judged is None else exchange.judged.judgement
    if metered.uses_tokens:
        fields, block = head.fields, head.block
        if metered.edits and not fields.is_chunked:
            block = with_length(block, head.content_length, len(exchange.body))
        block = for_metering(block, accepts_codings=fields.accepts_codings)
        exchange.block = block + (metered.model_line if judgement is None or judgement.model is None else b"")
    if judgement is not None:
        exchange.block = (head.block if exchange.block is None else exchange.block) + judgement.lines
    metered.forget_content()


def charge(exchange: Exchange, metered: MeteredRequest) -> tuple[int, int]:
    """The tokens and the money to charge for a request that has ended. Stores the usage in the exchange."""
    exchange.model = metered.model
    if not metered.uses_tokens:
        return 0, 0
    meter = exchange.meter
    use, status = None, None
    if meter is not None:
        use, status = meter.result(), exchange.status
    elif metered.is_tunnel and exchange.responded_mono:
        use, status = _TUNNELED, _SWITCHING_PROTOCOLS
    if not exchange.sent_mono:
        return 0, 0
    # A tunnel has no end that could be missing.
    was_sent = exchange.was_sent_whole or metered.is_tunnel
    charged = metered.charge(_end(exchange), status=status, use=use, was_sent_whole=was_sent)
    used = exchange.token_use = charged.tokens.use
    exchange.is_estimated = charged.is_estimated
    cost_micros = exchange.cost_micros = metered.cost(used, None if use is None else use.model)
    return used.total, cost_micros


def _end(exchange: Exchange) -> ResponseEnd:
    if exchange.ending is COMPLETED:
        return ResponseEnd.COMPLETE
    reason = exchange.reason
    if exchange.ending is not Ending.CLIENT_GONE and reason is not None and reason.value.blame is Blame.UPSTREAM:
        return ResponseEnd.BROKEN
    return ResponseEnd.ABORTED


def extension_needed(exchange: Exchange, hold: Hold) -> tuple[int, int, bool]:
    """The tokens and the money by which to extend a stream's hold, 0 for not yet; and whether the hold is used up.

    Near the end of a budget, the extension is whatever remains of it.
    """
    metered, meter, meters = exchange.metered, exchange.meter, hold.meters
    if metered is None or meter is None or meters is None or not (meters.token_leases or meters.spend_windows):
        return 0, 0, False
    reserved, reported = metered.tokens_reserved, meter.tokens_in
    tokens_in = metered.need.tokens_in if reported is None else reported
    if tokens_in + meter.produced_bound + _RESERVE_TOKENS < reserved:
        return 0, 0, False
    used = tokens_in + meter.produced
    if used + _RESERVE_TOKENS < reserved:
        return 0, 0, False
    tokens = max(_EXTENSION_TOKENS, reserved // 4)
    if meters.token_leases:
        tokens = min(tokens, hold.tokens_left)
    if meters.spend_windows:
        affordable = metered.candidates.affordable_output(0, hold.spend_left)
        tokens = tokens if affordable is None else min(tokens, affordable)
    tokens = max(1, tokens)
    return tokens, metered.extension_cost(tokens), used >= reserved


def extend(exchange: Exchange, tokens: int) -> None:
    """The hold of a stream has so many more tokens of output."""
    if exchange.metered is not None:
        exchange.metered.output += tokens
