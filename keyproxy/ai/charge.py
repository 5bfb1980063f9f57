"""What a request is charged. One pure function, by how its response ended:

    report of all usage              exactly that, even above the reservation
    status 400 or above              nothing, whatever it reports
    no byte of a response            nothing: the upstream failed, or the proxy answered for it
    complete or broken, no report    the input as estimated, and what was produced; an endpoint that only reads: the input
    aborted                          the input, what was produced and the reasoning reservation, the output at most as
                                     reserved; nothing if the request had not been sent whole
    tunnel                           the reservation

An aborted response is one that the client, or the proxy for it, gave up while the model may still have been at work:
its reasoning is invisible, and is taken to be as long as reserved.
"""

from __future__ import annotations

import enum
from typing import Final

from keyproxy.ai.dialects.endpoint import EndpointClass
from keyproxy.ai.responses.meter import ResponseUse
from keyproxy.ai.responses.usage_objects import UsageReport
from keyproxy.mypyc_compat import mypyc_attr

#: The model did not process a request with such a status. Vendors bill none either.
_ERROR_STATUS: Final = 400


class ResponseEnd(enum.Enum):
    """How a response ended.

    COMPLETE: relayed completely. BROKEN: the upstream broke it off, or stayed silent for too long. ABORTED: the client
    left, or the proxy ended the exchange: its budget is used up, its key was revoked, the proxy stops.
    """

    COMPLETE = "complete"
    BROKEN = "broken"
    ABORTED = "aborted"


@mypyc_attr(acyclic=True)
class Reserved:
    """What was reserved for a request: the estimated input, the output with all extensions, and of the output the
    reasoning: the stated budget for it, else all of it; 0 for a model that does not reason."""

    __slots__ = ("is_tunnel", "kind", "reasoning", "tokens_in", "tokens_out")

    def __init__(
        self, kind: EndpointClass, tokens_in: int, tokens_out: int, *, reasoning: int = 0, is_tunnel: bool = False
    ) -> None:
        self.kind: Final = kind
        self.tokens_in: Final = tokens_in
        self.tokens_out: Final = tokens_out
        self.reasoning: Final = reasoning
        self.is_tunnel: Final = is_tunnel

    def __repr__(self) -> str:
        return f"Reserved({self.kind}, {self.tokens_in}, {self.tokens_out}, reasoning={self.reasoning})"


@mypyc_attr(acyclic=True)
class Charge:
    """The tokens to charge. `is_estimated`: they were not reported."""

    __slots__ = ("is_estimated", "tokens")

    def __init__(self, tokens: UsageReport, *, is_estimated: bool) -> None:
        self.tokens: Final = tokens
        self.is_estimated: Final = is_estimated

    @property
    def total(self) -> int:
        """The number of tokens."""
        return self.tokens.tokens_in + self.tokens.tokens_out

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Charge):
            return NotImplemented
        return self.tokens == other.tokens and self.is_estimated == other.is_estimated

    def __hash__(self) -> int:
        return hash((self.tokens, self.is_estimated))

    def __repr__(self) -> str:
        return f"Charge({self.tokens}, is_estimated={self.is_estimated})"


NOTHING: Final = Charge(UsageReport(0, 0), is_estimated=False)


def charge_of(
    reserved: Reserved, end: ResponseEnd, *, status: int | None, use: ResponseUse | None, was_sent_whole: bool
) -> Charge:
    """Return the charge of a request that was forwarded.

    `status`, `use`: of the upstream's response; None if no byte of it arrived. `was_sent_whole`: the upstream has the
    whole request.
    """
    if reserved.kind is EndpointClass.NONE or (status is not None and status >= _ERROR_STATUS):
        return NOTHING
    if use is not None and use.report is not None and (use.is_final or end is ResponseEnd.COMPLETE):
        return Charge(use.report, is_estimated=False)
    is_aborted = end is ResponseEnd.ABORTED
    if is_aborted and not was_sent_whole:
        return NOTHING
    if use is None and (reserved.is_tunnel or not is_aborted):
        return NOTHING
    if reserved.is_tunnel:
        return _estimated(reserved, None, reserved.tokens_out, reasoning=0)
    known = None if use is None else use.reported_input
    if reserved.kind is EndpointClass.READS:
        return _estimated(reserved, known, 0, reasoning=0)
    produced = 0 if use is None else use.produced
    if not is_aborted:
        return _estimated(reserved, known, produced, reasoning=0)
    tokens_out = min(produced + reserved.reasoning, reserved.tokens_out)
    return _estimated(reserved, known, tokens_out, reasoning=max(0, tokens_out - produced))


def _estimated(reserved: Reserved, known: UsageReport | None, tokens_out: int, *, reasoning: int) -> Charge:
    tokens = UsageReport(
        reserved.tokens_in if known is None else known.tokens_in,
        tokens_out,
        cached=0 if known is None else known.cached,
        cache_write=0 if known is None else known.cache_write,
        reasoning=reasoning,
    )
    return Charge(tokens, is_estimated=True)
