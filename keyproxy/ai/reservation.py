"""What to reserve for an AI request: input by its length or an estimate, output by its maximum or a cap. Pure.

The order of use: `need_of` when the body is read, `TokenNeed.output_within` with what is left in the windows, and
`TokenNeed.cap` for the value to insert.
"""

from __future__ import annotations

from typing import Final

from keyproxy.ai.dialects.endpoint import EndpointClass
from keyproxy.ai.models import Candidates
from keyproxy.ai.requests.request_facts import RequestFacts, multiplied

INSERT: Final = "insert"
REFUSE: Final = "refuse"
OFF: Final = "off"

BYTES: Final = "bytes"
ESTIMATE: Final = "estimate"

_MESSAGE_TOKENS: Final = 4
_REQUEST_TOKENS: Final = 3


class TokenRules:
    """The settings of `[tokens]` that determine reservations."""

    __slots__ = ("input_bound", "output_default", "output_min", "unknown_input_max")

    def __init__(
        self,
        *,
        input_bound: str = ESTIMATE,
        output_default: int = 4_096,
        output_min: int = 16,
        unknown_input_max: int = 131_072,
    ) -> None:
        self.input_bound: Final = input_bound
        self.output_default: Final = output_default
        self.output_min: Final = output_min
        self.unknown_input_max: Final = unknown_input_max


class MaximumRequiredError(Exception):
    """The request states no output maximum, and the proxy may not insert one."""


class TokenNeed:
    """What one request has to reserve, in tokens.

    `tokens_in`: its input. `output_most`: the output to reserve if everything is left; `output_least`: the smallest
    that is of use, less than `output_most` only without a stated maximum. `multiplier`: the output is a multiple of it.
    `inserts`: a cap is to be inserted. `is_stated`: the request states a maximum.
    """

    __slots__ = ("inserts", "is_stated", "multiplier", "output_least", "output_most", "tokens_in")

    def __init__(
        self,
        tokens_in: int,
        output_least: int,
        output_most: int,
        *,
        multiplier: int = 1,
        inserts: bool = False,
        is_stated: bool = True,
    ) -> None:
        self.tokens_in: Final = tokens_in
        self.output_least: Final = output_least
        self.output_most: Final = output_most
        self.multiplier: Final = multiplier
        self.inserts: Final = inserts
        self.is_stated: Final = is_stated

    @property
    def least(self) -> int:
        """The fewest tokens that admit the request: what is compared with limits, the rest of windows, and bursts."""
        return self.tokens_in + self.output_least

    @property
    def most(self) -> int:
        """The tokens that are reserved if everything is left."""
        return self.tokens_in + self.output_most

    def output_within(self, left: int) -> int | None:
        """The output to reserve where `left` tokens remain after the input; None if they are too few."""
        if left >= self.output_most:
            return self.output_most
        if left < self.output_least:
            return None
        return left // self.multiplier * self.multiplier

    def cap(self, output: int) -> int:
        """The value to insert, for this reservation of output."""
        return output // self.multiplier

    def __repr__(self) -> str:
        return f"TokenNeed({self.tokens_in}, {self.output_least}, {self.output_most})"


def need_of(
    facts: RequestFacts,
    rules: TokenRules,
    candidates: Candidates,
    *,
    cap: str = INSERT,
    tokens_per_request: int | None = None,
) -> TokenNeed:
    """Return what to reserve. `cap`: the route's setting, REFUSE if the body must not change.

    `tokens_per_request`: the smallest such limit that applies; the caller compares `least` with it. Raises
    MaximumRequiredError.
    """
    kind = facts.endpoint.kind
    if kind is EndpointClass.NONE:
        return TokenNeed(0, 0, 0)
    tokens_in = _input_tokens(facts, rules, candidates)
    refers, is_blank = bool(facts.reference), facts.input_override == 0 and facts.parts is None
    visible = 0 if refers else tokens_in
    if kind is EndpointClass.READS:
        output = TokenNeed(tokens_in, 0, 0)
    elif facts.maximum is not None:
        output = _stated(facts, candidates, facts.maximum, tokens_in)
    elif is_blank and kind is not EndpointClass.GENERATES and facts.dialect.usual.maximums:
        output = TokenNeed(0, 0, 0)  # an action, such as a cancellation
    else:
        can_insert = facts.parts is not None and cap != REFUSE
        if kind is EndpointClass.GENERATES and cap != OFF and not can_insert:
            raise MaximumRequiredError
        room = None if tokens_per_request is None else tokens_per_request - visible
        output = _unstated(facts, rules, candidates, tokens_in, room, inserts=cap == INSERT)
    if not refers or tokens_per_request is None:
        return output
    # The context is unknown: the request holds all that it may use.
    unseen = max(0, tokens_per_request - output.output_most)
    return TokenNeed(
        unseen, output.output_least, output.output_most,
        multiplier=output.multiplier, inserts=output.inserts, is_stated=output.is_stated,
    )  # fmt: skip


def tunnel_need(rules: TokenRules, tokens_per_request: int | None) -> TokenNeed:
    """What a tunnel reserves, and is charged: its content is not read."""
    return TokenNeed(rules.unknown_input_max if tokens_per_request is None else tokens_per_request, 0, 0)


def reasoning_reservation(candidates: Candidates, output: int, thinking: int | None, multiplier: int) -> int:
    """The reasoning to charge for a stream that is aborted: the stated budget, else all of the output's reservation."""
    if not candidates.reasons:
        return 0
    return output if thinking is None else min(output, multiplied(thinking, multiplier))


def _input_tokens(facts: RequestFacts, rules: TokenRules, candidates: Candidates) -> int:
    if facts.reference:
        return candidates.context_tokens_max or rules.unknown_input_max
    if facts.input_override is not None:
        return facts.input_override or (_REQUEST_TOKENS if facts.endpoint.kind is EndpointClass.GENERATES else 0)
    tokens = _media_tokens(facts, candidates)
    if facts.has_tools:
        tokens += facts.dialect.tools_tokens
    if rules.input_bound == BYTES:
        return tokens + facts.content_bytes
    tokens += facts.text_tokens + _MESSAGE_TOKENS * facts.message_objects + facts.array_numbers
    return tokens + _REQUEST_TOKENS


def _media_tokens(facts: RequestFacts, candidates: Candidates) -> int:
    media, dialect = facts.media, facts.dialect
    row = candidates.image_tokens
    tokens = media.tokens + media.images * (row or dialect.image_tokens)
    return tokens + media.low_detail_images * (row or dialect.low_detail_image_tokens)


def _stated(facts: RequestFacts, candidates: Candidates, maximum: int, tokens_in: int) -> TokenNeed:
    if candidates.output_tokens_max:
        maximum = min(maximum, candidates.output_tokens_max)
    output = multiplied(maximum, facts.multiplier)
    return TokenNeed(tokens_in, output, output, multiplier=facts.multiplier)


def _unstated(
    facts: RequestFacts, rules: TokenRules, candidates: Candidates, tokens_in: int, room: int | None, *, inserts: bool
) -> TokenNeed:
    generates = facts.endpoint.kind is EndpointClass.GENERATES
    multiplier = facts.multiplier if generates else 1
    most, least = rules.output_default, rules.output_min
    if generates and candidates.output_tokens_max:
        most = min(most, candidates.output_tokens_max)
        least = min(least, most)
    most, least = multiplied(most, multiplier), multiplied(least, multiplier)
    if room is not None:
        most = max(least, min(most, room) // multiplier * multiplier)
    return TokenNeed(tokens_in, least, most, multiplier=multiplier, inserts=generates and inserts, is_stated=False)
